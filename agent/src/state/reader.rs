//! Reads a committed state.

use std::collections::BTreeMap;

use opa_hub_proto::head::{DataHead, Head};
use opa_hub_proto::patch::push_json_string;
use opa_hub_proto::path::DirPath;
use opa_hub_proto::revision::Digest;
use redb::{ReadTransaction, ReadableTable as _, TableError};

use super::error::Error;
use super::tables::{BUNDLE, DIRS, ENTRIES, HEAD, META, MODULES, Meta, StateSummary};
use crate::archive::{PATCH_BYTES_MAX, Piece, PolicyBundle};

pub(super) fn read_digests(
    table: &impl redb::ReadableTable<&'static str, &'static str>,
) -> Result<BTreeMap<DirPath, Digest>, Error> {
    let mut dirs = BTreeMap::new();
    for entry in table.iter()? {
        let (dir, digest) = entry?;
        if let (Ok(dir), Ok(digest)) = (dir.value().parse(), digest.value().parse()) {
            dirs.insert(dir, digest);
        }
    }
    Ok(dirs)
}

fn read_meta(read: &ReadTransaction) -> Result<Option<Meta>, Error> {
    let table = match read.open_table(META) {
        Err(TableError::TableDoesNotExist(_)) => return Ok(None),
        table => table?,
    };
    let head = table.get(HEAD)?;
    Ok(head.map(|head| serde_json::from_slice(head.value())).transpose()?)
}

pub(super) fn read_summary(read: &ReadTransaction) -> Result<StateSummary, Error> {
    let Some(meta) = read_meta(read)? else { return Ok(StateSummary::default()) };
    let bundle = read_bundle(read, &meta)?;
    let mut summary = StateSummary { meta: Some(meta), bundle, ..StateSummary::default() };
    summary.dirs = read_digests(&read.open_table(DIRS)?)?;
    for entry in read.open_table(MODULES)?.iter()? {
        let (id, text) = entry?;
        summary.modules.insert(id.value().to_owned(), Digest::of(text.value().as_bytes()));
    }
    Ok(summary)
}

fn read_bundle(read: &ReadTransaction, meta: &Meta) -> Result<Option<PolicyBundle>, Error> {
    let Some(etag) = meta.etag.clone() else { return Ok(None) };
    let table = read.open_table(META)?;
    let archive = table.get(BUNDLE)?;
    Ok(archive.map(|archive| PolicyBundle { etag, archive: archive.value().to_vec().into() }))
}

/// Stops when `emit` returns `false`.
pub(super) fn read_pieces(read: &ReadTransaction, emit: &mut dyn FnMut(Piece) -> bool) -> Result<(), Error> {
    let StateSummary { meta: Some(meta), dirs, modules, .. } = read_summary(read)? else { return Ok(()) };
    let Meta { revision, ensure, rego_version, field_mask: reads, .. } = meta;
    let data = Some(DataHead { dirs: dirs.clone(), ensure });
    let head =
        Head { data, modules: Some(modules), modules_digest: Some(revision.modules), reads, rego_version };
    if !emit(Piece::Head(head)) {
        return Ok(());
    }
    for entry in read.open_table(MODULES)?.iter()? {
        let (id, text) = entry?;
        if !emit(Piece::Module { id: id.value().to_owned(), text: text.value().to_owned() }) {
            return Ok(());
        }
    }
    let entries = read.open_table(ENTRIES)?;
    for dir in dirs.into_keys() {
        let end = format!("{dir}\0");
        let dir_entries = || entries.range((dir.as_str(), "")..(end.as_str(), ""));
        let mut bytes = 2;
        for entry in dir_entries()? {
            let (key, value) = entry?;
            bytes += key.value().1.len() + value.value().len() + 4;
        }
        if bytes > PATCH_BYTES_MAX {
            if !emit(Piece::Begin(dir.clone())) {
                return Ok(());
            }
            for entry in dir_entries()? {
                let (key, value) = entry?;
                if !emit(Piece::Entry(key.value().1.to_owned(), value.value().to_vec())) {
                    return Ok(());
                }
            }
            if !emit(Piece::End) {
                return Ok(());
            }
            continue;
        }
        let mut json = Vec::with_capacity(bytes);
        json.push(b'{');
        for entry in dir_entries()? {
            let (key, value) = entry?;
            if json.len() > 1 {
                json.push(b',');
            }
            push_json_string(&mut json, key.value().1);
            json.push(b':');
            json.extend_from_slice(value.value());
        }
        json.push(b'}');
        if !emit(Piece::Directory(dir, json)) {
            return Ok(());
        }
    }
    Ok(())
}
