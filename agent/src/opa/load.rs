//! Applies an archive directory by directory.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use opa_hub_proto::head::{DataHead, Head};
use opa_hub_proto::patch::PatchWriter;
use opa_hub_proto::path::{DirPath, is_segment};
use opa_hub_proto::position::Position;
use opa_hub_proto::revision::Digest;
use tokio::sync::mpsc;

use super::apply::{Applier, Error};
use super::marker::Marker;
use super::modules::ModuleChanges;
use crate::archive::{self, PATCH_BYTES_MAX, Piece};

/// Modules to apply after the data.
pub(crate) struct ArchiveModules {
    put: BTreeMap<String, String>,
    /// `None` if the archive has data only.
    pub(crate) all: Option<BTreeMap<String, Digest>>,
    /// Modules that the data is for.
    pub(crate) digest: Option<Digest>,
    pub(crate) field_mask: Option<String>,
}

impl ArchiveModules {
    pub(crate) fn changes(&self, known: Option<&Marker>) -> ModuleChanges {
        let all = self.all.as_ref();
        let removed = known.into_iter().flat_map(|known| known.modules.keys());
        let removed = removed.filter(|id| all.is_some_and(|all| !all.contains_key(*id)));
        let put = self.put.iter().map(|(id, text)| (id.clone(), Some(text.clone())));
        removed.map(|id| (id.clone(), None)).chain(put).collect()
    }
}

impl Applier {
    /// Applies an archive to an OPA with the content of `known`, `None` if never loaded. The returned marker lacks the
    /// modules. `modules_first` frees paths of packages for data.
    pub(crate) async fn load(
        &mut self,
        known: Option<&Marker>,
        modules_first: bool,
        position: Position,
        pieces: &mut mpsc::Receiver<Result<Piece, archive::Error>>,
    ) -> Result<(Marker, ArchiveModules), Error> {
        let Some(Piece::Head(head)) = pieces.recv().await.transpose()? else {
            return Err(Error::InvalidArchive);
        };
        let Head { data, modules: all, modules_digest: digest, reads: field_mask, rego_version } = head;
        let modules = ArchiveModules { put: BTreeMap::new(), all, digest, field_mask };
        let data = data.ok_or(Error::InvalidArchive)?;
        let mut loader = Loader::start(self, known, &data, modules, position).await?;
        let mut modules_due = modules_first;
        while let Some(piece) = pieces.recv().await {
            let piece = piece?;
            if modules_due && !matches!(piece, Piece::Module { .. }) {
                modules_due = false;
                loader.apply_modules().await?;
            }
            match piece {
                Piece::Head(_) => return Err(Error::InvalidArchive),
                Piece::Module { id, text } => _ = loader.modules.put.insert(id, text),
                Piece::Directory(dir, json) => loader.replace_dir(&dir, &json).await?,
                Piece::Begin(dir) => loader.begin_dir(dir).await?,
                Piece::Entry(key, value) => loader.add_entry(&key, &value).await?,
                Piece::End => loader.end_dir().await?,
            }
        }
        loader.finish(rego_version).await
    }
}

struct Loader<'a> {
    applier: &'a mut Applier,
    known: Option<&'a Marker>,
    data: &'a DataHead,
    modules: ArchiveModules,
    /// Lacks digests of changed content.
    marker: Marker,
    /// Directories that the archive must still contain.
    missing: BTreeSet<&'a DirPath>,
    /// Obsolete directories and maps.
    removed: Vec<DirPath>,
    patch: PatchWriter,
    /// Large directory, and its obsolete keys.
    large: Option<(DirPath, HashSet<String>)>,
}

impl<'a> Loader<'a> {
    /// Writes the incomplete marker and creates maps.
    async fn start(
        applier: &'a mut Applier,
        known: Option<&'a Marker>,
        data: &'a DataHead,
        modules: ArchiveModules,
        position: Position,
    ) -> Result<Self, Error> {
        let mut marker = known.cloned().unwrap_or_default();
        marker.revision = None;
        marker.position = position.after(&marker.position);
        for (dir, digest) in &mut marker.dirs {
            *digest = digest.filter(|known| data.dirs.get(dir) == Some(known));
        }
        let mut missing = BTreeSet::new();
        for dir in data.dirs.keys() {
            if marker.dirs.entry(dir.clone()).or_default().is_none() {
                missing.insert(dir);
            }
        }
        // Later writes need the marker: without it OPA restarted.
        if known.is_some() {
            applier.write_marker(&marker).await?;
        } else {
            applier.write_first_marker(&marker).await?;
        }
        for map in &data.ensure {
            applier.opa.ensure(map).await?;
        }
        let removed = find_removed(applier, known, data).await?;
        let patch = PatchWriter::default();
        let mut loader = Self { applier, known, data, modules, marker, missing, removed, patch, large: None };
        loader.empty_outer_dirs().await?;
        Ok(loader)
    }

    async fn empty_outer_dirs(&mut self) -> Result<(), Error> {
        for dir in self.removed.iter().filter(|dir| is_outer(self.data, dir)) {
            self.applier.opa.ensure(dir).await?;
            self.applier.reserve(&mut self.patch, 0).await?;
            self.patch.add_dir(dir, b"{}");
        }
        self.applier.reserve(&mut self.patch, PATCH_BYTES_MAX).await
    }

    async fn apply_modules(&mut self) -> Result<(), Error> {
        let (changes, field_mask) = (self.modules.changes(self.known), self.modules.field_mask.clone());
        self.applier.apply_modules(&mut self.marker, &changes, field_mask).await?;
        Ok(())
    }

    async fn replace_dir(&mut self, dir: &DirPath, json: &[u8]) -> Result<(), Error> {
        // Archives repeat empty maps.
        if self.missing.remove(dir) {
            self.ensure_parents(dir).await?;
            self.applier.reserve(&mut self.patch, json.len()).await?;
            self.patch.add_dir(dir, json);
        }
        Ok(())
    }

    async fn begin_dir(&mut self, dir: DirPath) -> Result<(), Error> {
        self.missing.remove(&dir);
        self.applier.opa.ensure(&dir).await?;
        let stale: HashSet<_> = self.applier.opa.keys(&dir).await?.into_iter().collect();
        if stale.is_empty() {
            // The value may not be a map.
            self.applier.reserve(&mut self.patch, 0).await?;
            self.patch.add_dir(&dir, b"{}");
        }
        self.large = Some((dir, stale));
        Ok(())
    }

    async fn add_entry(&mut self, key: &str, value: &[u8]) -> Result<(), Error> {
        let Some((dir, stale)) = &mut self.large else { return Err(Error::InvalidArchive) };
        self.applier.reserve(&mut self.patch, value.len()).await?;
        self.patch.add(dir, key, value);
        stale.remove(key);
        Ok(())
    }

    async fn end_dir(&mut self) -> Result<(), Error> {
        let Some((dir, stale)) = self.large.take() else { return Err(Error::InvalidArchive) };
        for key in stale {
            self.applier.reserve(&mut self.patch, key.len()).await?;
            self.patch.remove(&dir, &key);
        }
        Ok(())
    }

    async fn finish(mut self, rego_version: Option<u8>) -> Result<(Marker, ArchiveModules), Error> {
        if let Some(dir) = self.missing.first() {
            return Err(Error::Incomplete((*dir).clone()));
        }
        for dir in self.removed.iter().filter(|dir| !is_outer(self.data, dir)) {
            self.applier.opa.ensure(dir).await?;
            self.applier.reserve(&mut self.patch, 0).await?;
            if self.data.ensure.contains(dir) {
                self.patch.add_dir(dir, b"{}");
            } else {
                self.patch.remove_dir(dir);
            }
        }
        let mut marker = self.marker;
        marker.revision = None;
        marker.dirs.retain(|dir, digest| {
            *digest = self.data.dirs.get(dir).copied();
            digest.is_some()
        });
        marker.ensure.clone_from(&self.data.ensure);
        marker.rego_version = rego_version;
        // A crash may precede the new policies.
        marker.add_field_mask(self.modules.field_mask.clone());
        self.applier.reserve(&mut self.patch, PATCH_BYTES_MAX).await?;
        self.applier.add_marker(&marker, &mut self.patch);
        self.applier.patch(self.patch).await?;
        Ok((marker, self.modules))
    }

    /// Creates only the directory itself: if a policy bundle owns a path next to it, OPA rejects writes above.
    async fn ensure_parents(&self, dir: &DirPath) -> Result<(), Error> {
        let is_known = self.known.is_some_and(|known| known.dirs.get(dir).is_some_and(Option::is_some));
        if !is_known && !self.data.ensure.iter().any(|map| dir.is_within(map)) {
            self.applier.opa.ensure(dir).await?;
        }
        Ok(())
    }
}

fn is_outer(data: &DataHead, dir: &DirPath) -> bool {
    data.dirs.keys().any(|other| other.is_within(dir))
}

/// Returns obsolete paths, inner ones first. Without a marker replicated resources are read from OPA.
async fn find_removed(
    applier: &Applier,
    known: Option<&Marker>,
    data: &DataHead,
) -> Result<Vec<DirPath>, Error> {
    let is_removed = |dir: &DirPath| !data.dirs.contains_key(dir);
    if let Some(known) = known {
        let is_empty = |map: &&DirPath| {
            let dirs = data.dirs.keys().chain(&data.ensure);
            !known.dirs.contains_key(*map) && !dirs.into_iter().any(|dir| dir.is_within(map))
        };
        let dirs = known.dirs.keys().rev().filter(|dir| is_removed(dir));
        return Ok(dirs.chain(known.ensure.iter().rev().filter(is_empty)).cloned().collect());
    }
    let mut removed = Vec::new();
    for map in data.ensure.iter().filter(|map| is_removed(map)) {
        let keys = applier.opa.keys(map).await?;
        let dirs = keys.iter().filter(|key| is_segment(key)).filter_map(|key| map.join(key).ok());
        removed.extend(dirs.filter(is_removed));
    }
    Ok(removed)
}
