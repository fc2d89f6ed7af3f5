//! Content of archives and verifiers.

use std::io::Read as _;

use anyhow::{Context as _, bail, ensure};
use flate2::read::GzDecoder;
use opa_hub_proto::head::{DataHead, HEAD_FILE, Head};
use opa_hub_proto::manifest::DATA_FILE;
use opa_hub_proto::path::DirPath;
use opa_hub_proto::revision::{Digest, data_digest};
use serde_json::{Value, json};

pub(super) fn dir_mut<'a>(content: &'a mut Value, dir: &DirPath) -> &'a mut Value {
    let value = dir.relative().split('/').fold(content, |value, segment| &mut value[segment]);
    if value.is_null() {
        *value = json!({});
    }
    value
}

pub(super) fn digest(data: &DataHead) -> Digest {
    data_digest(data.dirs.iter().map(|(dir, digest)| (dir, *digest)), &data.ensure)
}

/// Newest multiple of `every` in `text`. Objects have their change's number in a label, which edits set by path.
pub(super) fn newest_change(text: &str, every: u64) -> Option<u64> {
    let numbers =
        ["\"round\":\"", "/round\",\"value\":\""].into_iter().flat_map(|label| text.split(label).skip(1));
    let numbers = numbers.filter_map(|rest| rest.split('"').next()?.parse().ok());
    numbers.filter(|number: &u64| number.is_multiple_of(every)).max()
}

pub(super) struct Digests {
    pub(super) data: DataHead,
    pub(super) modules: Option<Digest>,
    pub(super) reads: Option<String>,
}

/// A null `content` is not updated.
pub(super) fn apply_archive(archive: &[u8], content: &mut Value) -> anyhow::Result<Digests> {
    let mut tar = tar::Archive::new(GzDecoder::new(archive));
    let mut entries = tar.entries()?;
    let mut first = entries.next().context("reading an archive failed: no entries")??;
    ensure!(first.path()?.to_str() == Some(HEAD_FILE), "reading an archive failed: no header");
    let mut text = Vec::new();
    first.read_to_end(&mut text)?;
    let head: Head = serde_json::from_slice(&text)?;
    let Some(data) = head.data else { bail!("reading an archive failed: no data") };
    if content.is_null() {
        return Ok(Digests { data, modules: head.modules_digest, reads: head.reads });
    }
    // Directories that the archive does not name are removed; those without content are unchanged.
    let mut next = json!({});
    data.ensure.iter().for_each(|dir| _ = dir_mut(&mut next, dir));
    for dir in data.dirs.keys() {
        if let Some(value) = content.pointer(dir.as_str()) {
            *dir_mut(&mut next, dir) = value.clone();
        }
    }
    for entry in entries {
        let mut entry = entry?;
        let path = entry.path()?.to_str().unwrap_or_default().to_owned();
        if let Some(dir) = path.strip_suffix(DATA_FILE) {
            let mut text = Vec::new();
            entry.read_to_end(&mut text)?;
            *dir_mut(&mut next, &format!("/{}", dir.trim_matches('/')).parse()?) =
                serde_json::from_slice(&text)?;
        }
    }
    *content = next;
    Ok(Digests { data, modules: head.modules_digest, reads: head.reads })
}

pub(super) fn newest_in_archive(archive: &[u8], every: u64) -> anyhow::Result<Option<u64>> {
    let mut text = String::new();
    GzDecoder::new(archive).read_to_string(&mut text)?;
    Ok(newest_change(&text, every))
}
