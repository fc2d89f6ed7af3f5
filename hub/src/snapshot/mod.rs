//! Immutable content of a bundle: directories of entries, and modules. Views share unchanged pieces.
//!
//! The data digest includes empty maps.

pub mod archive;
pub mod bundle_archive;
pub mod edit;
pub(crate) mod frame;
pub mod history;

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;
use opa_hub_proto::path::DirPath;
use opa_hub_proto::revision::{Digest, Hasher, Revision, data_digest, modules_digest};

use crate::model::ALLOCATION_BYTES;
use crate::policy::modules::Module;
use crate::snapshot::edit::{EDITED_KEYS_MAX, Edit};

/// Mean keys of a chunk. A change hashes and compresses its chunk again.
const CHUNK_KEYS_MEAN: u32 = 64;

/// Clones share the content.
#[derive(Clone)]
pub struct Snapshot {
    /// Digest of the content.
    pub revision: Revision,
    /// Directories with at least one entry.
    pub dirs: Arc<BTreeMap<DirPath, Arc<Directory>>>,
    /// Modules by id.
    pub modules: Arc<BTreeMap<String, Arc<Module>>>,
    /// Replicated resources: maps even if empty.
    pub ensure: Arc<[DirPath]>,
    /// Rego version, if configured.
    pub rego_version: Option<u8>,
    /// Field masks. `None` if objects are served whole.
    pub reads: Option<Arc<str>>,
}

/// Entries in chunks. Keys decide where chunks end: equal entries make equal chunks (I2).
pub struct Directory {
    /// Digest of all chunks.
    pub digest: Digest,
    pub(crate) chunks: Vec<Arc<Chunk>>,
}

/// Entries with neighbouring keys.
pub struct Chunk {
    pub(crate) digest: Digest,
    pub(crate) json_bytes: usize,
    pub(crate) entries: Vec<Entry>,
}

/// A key and its value.
#[derive(Clone)]
pub struct Entry {
    /// Unescaped key.
    pub key: Arc<str>,
    /// JSON without insignificant white space.
    pub value: Bytes,
    digest: Digest,
}

/// Updates of a view.
#[derive(Default)]
pub struct Batch {
    /// Values by directory and key. `None` removes.
    pub dirs: BTreeMap<DirPath, BTreeMap<Arc<str>, Option<Bytes>>>,
    /// Modules by id. `None` removes.
    pub modules: BTreeMap<String, Option<Arc<Module>>>,
}

/// Difference of two views.
#[derive(Default)]
pub struct ChangeSet {
    pub(crate) dirs: Vec<DirectoryChanges>,
    pub(crate) modules: Vec<String>,
}

/// Changed keys of a directory.
#[derive(Clone)]
pub struct DirectoryChanges {
    pub(crate) path: DirPath,
    pub(crate) existed: bool,
    pub(crate) keys: Vec<ChangedKey>,
}

/// A changed key.
#[derive(Clone)]
pub struct ChangedKey {
    pub(crate) key: Arc<str>,
    pub(crate) existed: bool,
    /// Edit of the value; `None` if the value is as small.
    pub(crate) edit: Option<Arc<Edit>>,
}

impl Snapshot {
    /// A view without entries and modules.
    pub fn empty(ensure: Arc<[DirPath]>, rego_version: Option<u8>) -> Self {
        let dirs = Arc::default();
        let modules = Arc::default();
        let revision = revision(&dirs, &ensure, &modules, rego_version);
        Self { revision, dirs, modules, ensure, rego_version, reads: None }
    }

    /// Applies `batch`. `None` if nothing changes.
    pub fn apply(&self, batch: Batch) -> Option<(Self, ChangeSet)> {
        let mut changed = ChangeSet::default();
        let mut dirs = Arc::clone(&self.dirs);
        let is_edited = batch.dirs.values().map(BTreeMap::len).sum::<usize>() <= EDITED_KEYS_MAX;
        for (path, keys) in batch.dirs {
            let old = dirs.get(&path);
            let find = |key: &str| old.and_then(|dir| dir.get(key));
            let unchanged = |key: &str, value: &Option<Bytes>| match (find(key), value) {
                (None, None) => true,
                (Some(entry), Some(value)) => entry.value == *value,
                _ => false,
            };
            let keys: BTreeMap<_, _> =
                keys.into_iter().filter(|(key, value)| !unchanged(key, value)).collect();
            if keys.is_empty() {
                continue;
            }
            changed.dirs.push(DirectoryChanges {
                path: path.clone(),
                existed: old.is_some(),
                keys: keys
                    .iter()
                    .map(|(key, value)| ChangedKey::new(key, find(key), value.as_ref(), is_edited))
                    .collect(),
            });
            let new = Directory::updated(old.map(AsRef::as_ref), keys);
            let dirs = Arc::make_mut(&mut dirs);
            if new.chunks.is_empty() {
                dirs.remove(&path)
            } else {
                dirs.insert(path, Arc::new(new))
            };
        }
        let mut modules = Arc::clone(&self.modules);
        for (id, module) in batch.modules {
            if modules.get(&id).map(|old| old.digest) == module.as_ref().map(|module| module.digest) {
                continue;
            }
            let modules = Arc::make_mut(&mut modules);
            match module {
                None => modules.remove(&id),
                Some(module) => modules.insert(id.clone(), module),
            };
            changed.modules.push(id);
        }
        if changed.dirs.is_empty() && changed.modules.is_empty() {
            return None;
        }
        let revision = revision(&dirs, &self.ensure, &modules, self.rego_version);
        let next = Self { revision, dirs, modules, ..self.clone() };
        Some((next, changed))
    }

    /// This view with other directories.
    #[must_use]
    pub(crate) fn with_dirs(&self, dirs: BTreeMap<DirPath, Arc<Directory>>) -> Self {
        let data = data_digest(dirs.iter().map(|(path, dir)| (path, dir.digest)), &self.ensure);
        Self { revision: Revision { data, ..self.revision }, dirs: Arc::new(dirs), ..self.clone() }
    }

    /// Number of entries.
    pub fn entries(&self) -> usize {
        self.dirs.values().map(|dir| dir.len()).sum()
    }

    /// Bytes of entries and of modules, without values that the store shares.
    pub(crate) fn memory(&self) -> (usize, usize) {
        let entry = |entry: &Entry| {
            let value = if entry.value.is_unique() { entry.value.len() + ALLOCATION_BYTES } else { 0 };
            size_of::<Entry>() + entry.key.len() + ALLOCATION_BYTES + value
        };
        let chunks = self.dirs.values().flat_map(|dir| &dir.chunks);
        let entries = chunks.flat_map(|chunk| &chunk.entries).map(entry).sum();
        let module = |(id, module): (&String, &Arc<Module>)| {
            id.len() + module.text.len() + size_of::<Module>() + ALLOCATION_BYTES
        };
        (entries, self.modules.iter().map(module).sum())
    }

    pub(crate) fn json_bytes(&self) -> usize {
        self.dirs.values().map(|dir| dir.json_bytes()).sum()
    }
}

fn revision(
    dirs: &BTreeMap<DirPath, Arc<Directory>>,
    ensure: &[DirPath],
    modules: &BTreeMap<String, Arc<Module>>,
    rego_version: Option<u8>,
) -> Revision {
    let modules = modules.iter().map(|(id, module)| (id.as_str(), module.digest));
    Revision {
        modules: modules_digest(modules, rego_version),
        data: data_digest(dirs.iter().map(|(path, dir)| (path, dir.digest)), ensure),
    }
}

impl Directory {
    /// Updates `old`. Unchanged chunks are shared.
    fn updated(old: Option<&Self>, mut keys: BTreeMap<Arc<str>, Option<Bytes>>) -> Self {
        let mut chunks: Vec<Arc<Chunk>> = Vec::new();
        // Not empty if the previous chunk lost its last key.
        let mut open: Vec<Entry> = Vec::new();
        for chunk in old.map_or(&[][..], |old| &old.chunks) {
            let last = chunk.last_key();
            // All remaining keys fall into an unfinished last chunk.
            let beyond = if is_boundary(last) { keys.split_off::<str>(last) } else { BTreeMap::new() };
            let mut chunk_keys = std::mem::replace(&mut keys, beyond);
            if let Some((key, value)) = keys.remove_entry(last) {
                chunk_keys.insert(key, value);
            }
            if open.is_empty() && chunk_keys.is_empty() {
                chunks.push(Arc::clone(chunk));
            } else {
                merge(&chunk.entries, chunk_keys, &mut open, &mut chunks);
            }
        }
        merge(&[], keys, &mut open, &mut chunks);
        finish_chunk(&mut open, &mut chunks);
        let mut hasher = Hasher::default();
        for chunk in &chunks {
            hasher.part(chunk.digest.as_bytes());
        }
        Self { digest: hasher.finish(), chunks }
    }

    /// A directory whose entries exist at the client only.
    pub(super) fn elsewhere(digest: Digest) -> Self {
        Self { digest, chunks: Vec::new() }
    }

    /// Entry of `key`.
    pub fn get(&self, key: &str) -> Option<&Entry> {
        let chunk = self.chunks.get(self.chunks.partition_point(|chunk| chunk.last_key() < key))?;
        let index = chunk.entries.binary_search_by(|entry| (*entry.key).cmp(key)).ok()?;
        Some(&chunk.entries[index])
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.entries.len()).sum()
    }

    /// Always false in a view.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    pub(crate) fn json_bytes(&self) -> usize {
        let chunks: usize = self.chunks.iter().map(|chunk| chunk.json_bytes).sum();
        chunks + 2 + self.chunks.len().saturating_sub(1)
    }

    /// Appends a JSON object.
    pub fn write_json(&self, out: &mut Vec<u8>) {
        out.push(b'{');
        for (index, chunk) in self.chunks.iter().enumerate() {
            if index > 0 {
                out.push(b',');
            }
            chunk.write_json(out);
        }
        out.push(b'}');
    }
}

/// Merges in order into `open`, and complete chunks into `chunks`.
fn merge(
    entries: &[Entry],
    keys: BTreeMap<Arc<str>, Option<Bytes>>,
    open: &mut Vec<Entry>,
    chunks: &mut Vec<Arc<Chunk>>,
) {
    let mut push = |entry: Entry| {
        let is_complete = is_boundary(&entry.key);
        open.push(entry);
        if is_complete {
            finish_chunk(open, chunks);
        }
    };
    let mut entries = entries.iter().peekable();
    for (key, value) in keys {
        while let Some(entry) = entries.next_if(|entry| entry.key < key) {
            push(entry.clone());
        }
        entries.next_if(|entry| entry.key == key);
        if let Some(value) = value {
            push(Entry { digest: Digest::of(&value), key, value });
        }
    }
    entries.cloned().for_each(push);
}

fn finish_chunk(open: &mut Vec<Entry>, chunks: &mut Vec<Arc<Chunk>>) {
    if !open.is_empty() {
        chunks.push(Arc::new(Chunk::new(std::mem::take(open))));
    }
}

fn is_boundary(key: &str) -> bool {
    crc32fast::hash(key.as_bytes()).is_multiple_of(CHUNK_KEYS_MEAN)
}

impl Chunk {
    fn new(entries: Vec<Entry>) -> Self {
        let mut hasher = Hasher::default();
        for entry in &entries {
            hasher.part(entry.key.as_bytes());
            hasher.part(entry.digest.as_bytes());
        }
        let mut chunk = Self { digest: hasher.finish(), json_bytes: 0, entries };
        let mut key = Vec::new();
        let lengths = chunk.entries.iter().map(|entry| {
            key.clear();
            opa_hub_proto::patch::push_json_string(&mut key, &entry.key);
            key.len() + entry.value.len() + 2
        });
        chunk.json_bytes = lengths.sum::<usize>() - 1;
        chunk
    }

    fn last_key(&self) -> &str {
        &self.entries.last().expect("no chunk is empty").key
    }

    /// Appends the members of a JSON object.
    pub(crate) fn write_json(&self, out: &mut Vec<u8>) {
        for (index, entry) in self.entries.iter().enumerate() {
            if index > 0 {
                out.push(b',');
            }
            opa_hub_proto::patch::push_json_string(out, &entry.key);
            out.push(b':');
            out.extend_from_slice(&entry.value);
        }
    }
}

impl Batch {
    /// Sets (`Some`) or removes (`None`) an entry.
    pub fn entry(&mut self, dir: &DirPath, key: impl Into<Arc<str>>, value: Option<Bytes>) {
        let keys = match self.dirs.get_mut(dir) {
            Some(keys) => keys,
            None => self.dirs.entry(dir.clone()).or_default(),
        };
        keys.insert(key.into(), value);
    }
}

impl ChangedKey {
    fn new(key: &Arc<str>, old: Option<&Entry>, new: Option<&Bytes>, is_edited: bool) -> Self {
        let edit = old.zip(new).filter(|_| is_edited).and_then(|(old, new)| Edit::between(&old.value, new));
        Self { key: Arc::clone(key), existed: old.is_some(), edit: edit.map(Arc::new) }
    }
}

impl ChangeSet {
    pub(crate) fn len(&self) -> usize {
        self.dirs.iter().map(|dir| dir.keys.len()).sum::<usize>() + self.modules.len()
    }

    pub(crate) fn edit_bytes(&self) -> usize {
        let keys = self.dirs.iter().flat_map(|dir| &dir.keys);
        keys.filter_map(|key| key.edit.as_ref()).map(|edit| edit.memory()).sum()
    }

    #[must_use]
    pub(crate) fn without_edits(&self) -> Self {
        let mut dirs = self.dirs.clone();
        dirs.iter_mut().flat_map(|dir| &mut dir.keys).for_each(|key| key.edit = None);
        Self { dirs, modules: self.modules.clone() }
    }
}

/// Directories at or below `path`.
pub(crate) fn within<'a>(
    dirs: &'a BTreeMap<DirPath, Arc<Directory>>,
    path: &'a DirPath,
) -> impl Iterator<Item = (&'a DirPath, &'a Arc<Directory>)> {
    let from = (Bound::Included(path.as_str()), Bound::Unbounded);
    dirs.range::<str, _>(from)
        .take_while(move |(dir, _)| dir.as_str().starts_with(path.as_str()))
        .filter(move |(dir, _)| dir.is_within(path))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Script = Vec<Vec<(u16, Option<u8>)>>;

    fn run(script: &Script) -> Snapshot {
        let dir: DirPath = "/d".parse().unwrap();
        let mut view = Snapshot::empty(Arc::new([]), None);
        for batch in script {
            let mut next = Batch::default();
            for (key, value) in batch {
                next.entry(&dir, format!("k{key}"), value.map(|value| Bytes::from(value.to_string())));
            }
            if let Some((next, _)) = view.apply(next) {
                view = next;
            }
        }
        view
    }

    fn scripts() -> impl Strategy<Value = Script> {
        proptest::collection::vec(proptest::collection::vec((0u16..400, any::<Option<u8>>()), 0..60), 0..12)
    }

    proptest! {
        /// I2, whatever the order of updates.
        #[test]
        fn i2_equal_content_equal_revision(script in scripts()) {
            let one = run(&script);
            let mut content = BTreeMap::new();
            for (key, value) in script.iter().flatten() {
                match value {
                    Some(value) => _ = content.insert(*key, *value),
                    None => _ = content.remove(key),
                }
            }
            let other = run(&vec![content.iter().map(|(key, value)| (*key, Some(*value))).collect()]);
            prop_assert_eq!(one.revision, other.revision);
            prop_assert_eq!(one.entries(), content.len());
            for ((_, a), (_, b)) in one.dirs.iter().zip(other.dirs.iter()) {
                let digests = |dir: &Directory| dir.chunks.iter().map(|chunk| chunk.digest).collect::<Vec<_>>();
                prop_assert_eq!(digests(a), digests(b));
                let mut json = Vec::new();
                a.write_json(&mut json);
                prop_assert_eq!(json.len(), a.json_bytes());
                let parsed: BTreeMap<String, u8> = serde_json::from_slice(&json).unwrap();
                prop_assert_eq!(parsed.len(), content.len());
                for (key, value) in &content {
                    prop_assert_eq!(&a.get(&format!("k{key}")).unwrap().value, &value.to_string());
                }
            }
        }

        /// I2.
        #[test]
        fn i2_different_content_different_revision(script in scripts(), key in 0u16..400) {
            let before = run(&script);
            let mut longer = script.clone();
            longer.push(vec![(key, Some(0)), (key + 1000, Some(1))]);
            prop_assert_ne!(before.revision, run(&longer).revision);
        }
    }
}
