//! Changes since the last commit.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use opa_hub_proto::head::Head;
use opa_hub_proto::path::{DirPath, unescape};
use opa_hub_proto::revision::Digest;
use redb::{ReadableTable as _, WriteTransaction};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use super::error::Error;
use super::reader::read_digests;
use super::tables::{DIRS, ENTRIES, MODULES};
use crate::archive::Piece;

pub(super) struct Draft {
    pub(super) write: WriteTransaction,
    /// Entries that the archive must still contain.
    missing: BTreeSet<String>,
    large: Option<DirPath>,
}

impl Draft {
    pub(super) fn new(write: WriteTransaction) -> Self {
        Self { write, missing: BTreeSet::new(), large: None }
    }

    pub(super) fn check_complete(&mut self) -> Result<(), Error> {
        self.missing.pop_first().map_or(Ok(()), |missing| Err(Error::Incomplete(missing)))
    }

    pub(super) fn apply_piece(&mut self, piece: Piece) -> Result<(), Error> {
        match piece {
            Piece::Head(head) => self.apply_head(head),
            Piece::Module { id, text } => {
                self.missing.remove(&id);
                self.apply_modules(BTreeMap::from([(id, Some(text))]))
            }
            Piece::Directory(dir, json) => {
                self.missing.remove(dir.as_str());
                self.replace(dir.as_str(), &json)
            }
            Piece::Begin(dir) => {
                self.missing.remove(dir.as_str());
                self.clear(dir.as_str())?;
                self.large = Some(dir);
                Ok(())
            }
            Piece::Entry(key, value) => {
                if let Some(dir) = &self.large {
                    self.write.open_table(ENTRIES)?.insert((dir.as_str(), key.as_str()), &value[..])?;
                }
                Ok(())
            }
            Piece::End => Ok(()),
        }
    }

    /// Removes what the archive lacks.
    fn apply_head(&mut self, head: Head) -> Result<(), Error> {
        let Some(data) = head.data else { return Ok(()) };
        let stored = read_digests(&self.write.open_table(DIRS)?)?;
        let mut removed: Vec<DirPath> =
            stored.keys().filter(|dir| !data.dirs.contains_key(*dir)).cloned().collect();
        let mut dirs = self.write.open_table(DIRS)?;
        for (dir, digest) in &data.dirs {
            if stored.get(dir) != Some(digest) {
                self.missing.insert(dir.as_str().to_owned());
                dirs.insert(dir.as_str(), digest.to_string().as_str())?;
            }
        }
        for dir in &removed {
            dirs.remove(dir.as_str())?;
        }
        drop(dirs);
        removed.drain(..).try_for_each(|dir| self.clear(dir.as_str()))?;
        let mut modules = self.write.open_table(MODULES)?;
        let all = head.modules.unwrap_or_default();
        modules.retain(|id, text| all.get(id) == Some(&Digest::of(text.as_bytes())))?;
        for id in all.into_keys() {
            if modules.get(id.as_str())?.is_none() {
                self.missing.insert(id);
            }
        }
        Ok(())
    }

    pub(super) fn apply_modules(&mut self, changes: BTreeMap<String, Option<String>>) -> Result<(), Error> {
        let mut modules = self.write.open_table(MODULES)?;
        for (id, text) in changes {
            match text {
                Some(text) => drop(modules.insert(id.as_str(), text.as_str())?),
                None => drop(modules.remove(id.as_str())?),
            }
        }
        Ok(())
    }

    fn clear(&self, dir: &str) -> Result<(), Error> {
        let end = format!("{dir}\0");
        self.write.open_table(ENTRIES)?.retain_in((dir, "")..(end.as_str(), ""), |_, _| false)?;
        Ok(())
    }

    fn replace(&self, dir: &str, json: &[u8]) -> Result<(), Error> {
        self.clear(dir)?;
        let entries: BTreeMap<String, &RawValue> = serde_json::from_slice(json)?;
        let mut table = self.write.open_table(ENTRIES)?;
        for (key, value) in entries {
            table.insert((dir, key.as_str()), value.get().as_bytes())?;
        }
        Ok(())
    }

    pub(super) fn apply_delta(
        &mut self,
        dirs: &BTreeMap<DirPath, Option<Digest>>,
        patch: &RawValue,
    ) -> Result<(), Error> {
        #[derive(Deserialize)]
        struct Op<'a> {
            path: String,
            #[serde(borrow, default, deserialize_with = "present")]
            value: Option<&'a RawValue>,
        }
        /// Distinguishes `null` from a missing value.
        fn present<'de, D: Deserializer<'de>>(value: D) -> Result<Option<&'de RawValue>, D::Error> {
            <&RawValue>::deserialize(value).map(Some)
        }
        for Op { path, value } in serde_json::from_str::<Vec<Op>>(patch.get())? {
            // The innermost directory owns the operation.
            let ends = path.match_indices('/').map(|(end, _)| end).chain([path.len()]).rev();
            let mut inner = ends.map(|end| path.split_at(end));
            let Some((dir, below)) = inner.find(|(dir, _)| has_digest(dirs, dir)) else { continue };
            let mut tokens = below.split('/').skip(1).map(unescape);
            let Some(key) = tokens.next() else {
                match value {
                    Some(value) => self.replace(dir, value.get().as_bytes())?,
                    None => self.clear(dir)?,
                }
                continue;
            };
            let mut table = self.write.open_table(ENTRIES)?;
            let tokens: Vec<_> = tokens.collect();
            let edited = match table.get((dir, key.as_ref()))? {
                Some(stored) if !tokens.is_empty() => Some(set_member(stored.value(), &tokens, value)?),
                _ => None,
            };
            match edited.as_deref().or(value.map(RawValue::get)) {
                Some(value) => drop(table.insert((dir, key.as_ref()), value.as_bytes())?),
                None => drop(table.remove((dir, key.as_ref()))?),
            }
        }
        let mut table = self.write.open_table(DIRS)?;
        for (dir, digest) in dirs {
            if let Some(digest) = digest {
                table.insert(dir.as_str(), digest.to_string().as_str())?;
            } else {
                table.remove(dir.as_str())?;
                self.clear(dir.as_str())?;
            }
        }
        Ok(())
    }
}

fn has_digest(dirs: &BTreeMap<DirPath, Option<Digest>>, dir: &str) -> bool {
    dir.parse().is_ok_and(|dir: DirPath| dirs.get(&dir).is_some_and(Option::is_some))
}

fn set_member(object: &[u8], path: &[Cow<'_, str>], value: Option<&RawValue>) -> serde_json::Result<String> {
    let mut members: BTreeMap<Cow<'_, str>, &RawValue> = serde_json::from_slice(object)?;
    let inner;
    let (name, rest) = path.split_first().expect("the path of a member has a segment");
    let value = match members.get(name) {
        Some(member) if !rest.is_empty() => {
            inner = RawValue::from_string(set_member(member.get().as_bytes(), rest, value)?)?;
            Some(&*inner)
        }
        _ => value,
    };
    match value {
        Some(value) => drop(members.insert(name.clone(), value)),
        None => drop(members.remove(name)),
    }
    serde_json::to_string(&members)
}
