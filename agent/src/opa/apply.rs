//! What comes from the hub becomes requests to OPA: frames one PATCH each, archives directory by directory, modules
//! one by one. Decisions never see less than before or after: nothing is blanked first.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ops::Bound;

use opa_hub_proto::frame::Delta;
use opa_hub_proto::head::{DataHead, Head};
use opa_hub_proto::patch::{PATCH_OPS_MAX, PatchWriter};
use opa_hub_proto::path::{DirPath, is_segment};
use opa_hub_proto::position::Position;
use opa_hub_proto::revision::{Digest, Revision};
use serde_json::value::RawValue;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::archive::{self, Piece};
use crate::config::{FRAME_PATCH_BYTES_MAX, PATCH_BYTES_MAX, VERIFY_INTERVAL};
use crate::marker::{MARKERS, Marker, WRITER};
use crate::opa::{self, Opa};
use crate::rounds::{Rounds, Turned};

/// Why OPA does not hold what the hub said.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// OPA failed.
    #[error(transparent)]
    Opa(#[from] opa::Error),
    /// The archive failed.
    #[error(transparent)]
    Archive(#[from] archive::Error),
    /// The marker is another session's, or gone.
    #[error("OPA holds something else than it was given: it restarted, or somebody else writes to it")]
    OtherWriter,
    /// An event that is none.
    #[error("the hub sent an event that does not parse: {0}")]
    Event(#[from] serde_json::Error),
    /// I3.
    #[error("the hub sent a frame from {from}, but {held} is held")]
    NotHeld {
        /// The frame's.
        from: Digest,
        /// Ours.
        held: Digest,
    },
    /// The digests of the directories do not add up to the frame's.
    #[error("after the frame {held} is held, not {to}")]
    Diverged {
        /// What the frame promised.
        to: Digest,
        /// What came of it.
        held: Digest,
    },
    /// An archive that ended before its end.
    #[error("the archive lacks {0}")]
    Incomplete(DirPath),
    /// An archive that does not begin with what it is.
    #[error("the archive has no head")]
    NoHead,
}

/// Applies to one OPA.
pub struct Applier {
    /// The OPA.
    pub opa: Opa,
    /// The bundle whose marker is kept.
    pub bundle: String,
    /// Name of the session that may write to OPA.
    writer: String,
    rounds: Rounds,
    /// Directory that was looked for last, and when.
    verified: (Option<DirPath>, Instant),
}

/// What an archive left to be done.
#[derive(Default)]
pub struct Modules {
    /// Texts that the archive carried.
    pub put: BTreeMap<String, String>,
    /// All the modules that there should be; none when the archive says nothing of modules.
    pub all: Option<BTreeMap<String, Digest>>,
    /// The digest of the modules that the archive's data is for.
    pub digest: Option<Digest>,
    /// What these read.
    pub reads: Option<String>,
}

impl Modules {
    /// What to put (`Some`) and to remove (`None`) where there is what `held` names.
    pub fn changes(&self, held: Option<&Marker>) -> BTreeMap<String, Option<String>> {
        let all = self.all.as_ref();
        let gone = held.into_iter().flat_map(|held| held.modules.keys());
        let gone = gone.filter(|id| all.is_some_and(|all| !all.contains_key(*id)));
        let put = self.put.iter().map(|(id, text)| (id.clone(), Some(text.clone())));
        gone.map(|id| (id.clone(), None)).chain(put).collect()
    }
}

impl Applier {
    /// An applier without a session.
    pub fn new(opa: Opa, bundle: String) -> Self {
        let verified = (None, Instant::now());
        Self { opa, bundle, writer: String::new(), rounds: Rounds::default(), verified }
    }

    /// Begins a session: from now on OPA refuses what earlier ones wrote and OPA has not yet applied. Returns what OPA
    /// says that it holds; `None` when it was never loaded.
    pub async fn claim(&mut self) -> Result<Option<Marker>, Error> {
        // Another session's modules are not to be replaced by those from before this one's trial.
        if self.rounds.is_cut_off() && !self.opa.has_writer(&self.bundle, &self.writer).await? {
            self.rounds.forget();
        }
        self.writer = format!("{:016x}", fastrand::u64(..));
        let mut patch = PatchWriter::default();
        let writer = serde_json::json!({ &self.writer: true }).to_string();
        patch.add(&Marker::path(&self.bundle), WRITER, writer.as_bytes());
        match self.opa.patch(patch.into_array()).await {
            Ok(()) => self.rounds.retry(),
            Err(opa::Error::Missing(_)) => {
                self.rounds.forget();
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        }
        // The marker names no text of what OPA lacks, so that a hub gives it.
        match self.rounds.put_back(&self.opa).await {
            Err(error @ opa::Error::Unreachable(_)) => return Err(error.into()),
            Err(error) => tracing::warn!(%error, "modules of a trial that was cut off are not put back"),
            Ok(_) => {}
        }
        Ok(self.opa.marker(&self.bundle).await?)
    }

    /// Looks, once in [`VERIFY_INTERVAL`], whether the next directory of `marker` is in OPA. One that is not is an empty
    /// one from then on, and OPA's marker names no revision.
    pub async fn verify(&mut self, marker: &Marker) -> Result<(), Error> {
        let (last, at) = &self.verified;
        if at.elapsed() < VERIFY_INTERVAL {
            return Ok(());
        }
        let next = last.as_ref().and_then(|last| {
            marker.dirs.range::<DirPath, _>((Bound::Excluded(last), Bound::Unbounded)).next()
        });
        let dir = next.or_else(|| marker.dirs.first_key_value()).map(|(dir, _)| dir.clone());
        if let Some(dir) = &dir
            && !self.opa.ensure(dir).await?
        {
            let mut half = Marker { revision: None, ..marker.clone() };
            half.dirs.insert(dir.clone(), None);
            self.mark(&half).await?;
            return Err(opa::Error::Missing(format!("data{dir}")).into());
        }
        self.verified = (dir, Instant::now());
        Ok(())
    }

    /// Sends a patch that OPA applies while this session may write to it. OPA has no operation that tests a value, so the
    /// value is a key that must exist.
    async fn patch(&self, patch: PatchWriter) -> Result<(), Error> {
        let mut guard = PatchWriter::default();
        let place = Marker::path(&self.bundle).join(WRITER).expect("a segment");
        guard.replace(&place, &self.writer, b"true");
        match self.opa.patch(patch.into_array_after(&guard)).await {
            // OPA's answer does not say which place is missing (v1/storage/errors.go).
            Err(opa::Error::Missing(_)) if !self.opa.has_writer(&self.bundle, &self.writer).await? => {
                Err(Error::OtherWriter)
            }
            other => Ok(other?),
        }
    }

    fn write(&self, marker: &Marker, patch: &mut PatchWriter) {
        marker.write(patch, &self.bundle, &self.writer);
    }

    /// Applies the event `delta`: one PATCH, the marker in it, unless it is more than OPA likes or there are places to be
    /// made first. After an error `marker` says nothing.
    pub async fn delta(&self, marker: &mut Marker, delta: &Delta<'_>) -> Result<(), Error> {
        let held = marker.revision.unwrap_or_else(|| unreachable!("only a whole marker is followed"));
        if delta.from != held.data {
            return Err(Error::NotHeld { from: delta.from, held: held.data });
        }
        let revision = Revision { data: delta.to, ..held };
        let position = delta.after(&marker.position);
        let ops = delta.patch.get();
        let is_small = delta.ops + delta.dirs.len() < PATCH_OPS_MAX && ops.len() <= FRAME_PATCH_BYTES_MAX;
        let is_one = is_small && delta.ensure.is_empty();
        let mut patch = PatchWriter::default();
        if is_one {
            patch.splice(ops.trim_start_matches('[').trim_end_matches(']').as_bytes(), delta.ops);
            marker.write_delta(&mut patch, &self.bundle, delta, revision, &position);
        }
        marker.take_dirs(delta);
        if marker.data_digest() != delta.to {
            return Err(Error::Diverged { to: delta.to, held: marker.data_digest() });
        }
        marker.position = position;
        if !is_one {
            // Some of what is new may be there after a crash: it must not be taken back.
            marker.revision = None;
            marker.dirs.extend(delta.dirs.keys().map(|dir| (dir.clone(), None)));
            self.mark(marker).await?;
            for dir in &delta.ensure {
                self.opa.ensure(dir).await?;
            }
            for op in serde_json::from_str::<Vec<&RawValue>>(ops)? {
                self.make_room(&mut patch, op.get().len()).await?;
                patch.splice(op.get().as_bytes(), 1);
            }
            self.make_room(&mut patch, PATCH_BYTES_MAX).await?;
            marker.take_dirs(delta);
            marker.revision = Some(revision);
            self.write(marker, &mut patch);
        }
        marker.revision = Some(revision);
        self.patch(patch).await
    }

    /// Applies an archive, which is as of `position`, onto what `held` says that OPA holds, or onto an OPA that never
    /// heard of us. The marker that results names no revision, until its modules are there. `modules_first`: the
    /// archive's modules are put before its data, which may take a place that a package leaves.
    pub async fn archive(
        &mut self,
        held: Option<&Marker>,
        modules_first: bool,
        position: Position,
        pieces: &mut mpsc::Receiver<Result<Piece, archive::Error>>,
    ) -> Result<(Marker, Modules), Error> {
        let Some(Piece::Head(head)) = pieces.recv().await.transpose()? else { return Err(Error::NoHead) };
        let Head { data, modules, modules_digest: digest, reads, rego_version } = head;
        let mut found = Modules { put: BTreeMap::new(), all: modules, digest, reads };
        let data = data.ok_or(Error::NoHead)?;
        let mut half = held.cloned().unwrap_or_default();
        half.revision = None;
        half.position = position.after(&half.position);
        for (dir, digest) in &mut half.dirs {
            *digest = digest.filter(|held| data.dirs.get(dir) == Some(held));
        }
        let mut missing: BTreeSet<&DirPath> = BTreeSet::new();
        for dir in data.dirs.keys() {
            if half.dirs.entry(dir.clone()).or_default().is_none() {
                missing.insert(dir);
            }
        }
        // Everywhere else a missing marker must fail, since then OPA restarted meanwhile.
        if held.is_some() {
            self.mark(&half).await?;
        } else {
            self.mark_first(&half).await?;
        }
        for prefix in &data.ensure {
            self.opa.ensure(prefix).await?;
        }
        let mut patch = PatchWriter::default();
        let gone = self.gone(held, &data).await?;
        // A directory in whose place others come must make room for them.
        let is_outer = |dir: &&DirPath| data.dirs.keys().any(|other| other.is_within(dir));
        for dir in gone.iter().filter(is_outer) {
            self.opa.ensure(dir).await?;
            self.make_room(&mut patch, 0).await?;
            patch.add_dir(dir, b"{}");
        }
        self.make_room(&mut patch, PATCH_BYTES_MAX).await?;
        let mut large: Option<(DirPath, HashSet<String>)> = None;
        let mut modules_open = modules_first;
        while let Some(piece) = pieces.recv().await {
            let piece = piece?;
            if modules_open && !matches!(piece, Piece::Module { .. }) {
                modules_open = false;
                self.modules(&mut half, &found.changes(held), found.reads.clone()).await?;
            }
            match piece {
                Piece::Head(_) => return Err(Error::NoHead),
                Piece::Module { id, text } => _ = found.put.insert(id, text),
                Piece::Directory(dir, json) => {
                    // The maps of replicated resources that have no object come too.
                    if missing.remove(&dir) {
                        self.ensure_outside(&data, held, &dir).await?;
                        self.make_room(&mut patch, json.len()).await?;
                        patch.add_dir(&dir, &json);
                    }
                }
                Piece::Begin(dir) => {
                    missing.remove(&dir);
                    self.opa.ensure(&dir).await?;
                    let stale: HashSet<_> = self.opa.keys(&dir).await?.into_iter().collect();
                    if stale.is_empty() {
                        // Nothing to blank, and somebody may have put something else than a map there.
                        self.make_room(&mut patch, 0).await?;
                        patch.add_dir(&dir, b"{}");
                    }
                    large = Some((dir, stale));
                }
                Piece::Entry(key, value) => {
                    let Some((dir, stale)) = &mut large else { return Err(Error::NoHead) };
                    self.make_room(&mut patch, value.len()).await?;
                    patch.add(dir, &key, &value);
                    stale.remove(&key);
                }
                Piece::End => {
                    let Some((dir, stale)) = large.take() else { return Err(Error::NoHead) };
                    for key in stale {
                        self.make_room(&mut patch, key.len()).await?;
                        patch.remove(&dir, &key);
                    }
                }
            }
        }
        if let Some(dir) = missing.first() {
            return Err(Error::Incomplete((*dir).clone()));
        }
        for dir in gone.iter().filter(|dir| !is_outer(dir)) {
            self.opa.ensure(dir).await?;
            self.make_room(&mut patch, 0).await?;
            if data.ensure.contains(dir) { patch.add_dir(dir, b"{}") } else { patch.remove_dir(dir) }
        }
        let mut marker = Marker {
            revision: None,
            dirs: data.dirs.into_iter().map(|(dir, digest)| (dir, Some(digest))).collect(),
            ensure: data.ensure,
            rego_version,
            ..half
        };
        // The policies that this data is for come next, or a crash before them.
        marker.may_read(found.reads.clone());
        self.make_room(&mut patch, PATCH_BYTES_MAX).await?;
        self.write(&marker, &mut patch);
        self.patch(patch).await?;
        Ok((marker, found))
    }

    /// Puts (`Some`) and removes (`None`) modules in an order that OPA takes. Says which it refuses, and why; `marker`
    /// says what OPA really holds. The modules that result are said to read `reads`.
    pub async fn modules(
        &mut self,
        marker: &mut Marker,
        changes: &BTreeMap<String, Option<String>>,
        reads: Option<String>,
    ) -> Result<BTreeMap<String, String>, Error> {
        let place = Marker::path(&self.bundle);
        let mut intent = PatchWriter::default();
        let is_whole = reads.is_some();
        marker.may_read(reads);
        let held = serde_json::to_vec(&marker.reads).expect("texts");
        intent.add(&place, "reads", &held);
        if !marker.position.is_empty() {
            intent.add(&place, "position", marker.position.to_string().as_bytes());
        }
        let place = place.join("modules").expect("a segment");
        for id in changes.keys() {
            self.make_room(&mut intent, 0).await?;
            intent.add(&place, id, b"null");
        }
        self.patch(intent).await?;

        let Turned { refused, absent } = self.rounds.turn(&self.opa, changes).await?;
        for (id, text) in changes.iter().filter(|(id, _)| !refused.contains_key(*id)) {
            match text {
                Some(text) => _ = marker.modules.insert(id.clone(), Some(Digest::of(text.as_bytes()))),
                None => _ = marker.modules.remove(id),
            }
        }
        marker.modules.retain(|id, _| !absent.contains(id));
        if refused.is_empty() {
            if is_whole { marker.only_newest() } else { marker.reads.clear() }
        }
        marker.revision = Some(Revision { modules: marker.modules_digest(), data: marker.data_digest() });
        self.mark(marker).await?;
        for (id, message) in &refused {
            tracing::error!(module = id, message, "OPA refuses a module; it keeps what it had");
        }
        Ok(refused)
    }

    /// Writes the marker by itself.
    pub async fn mark(&self, marker: &Marker) -> Result<(), Error> {
        let mut patch = PatchWriter::default();
        self.write(marker, &mut patch);
        self.patch(patch).await
    }

    /// Writes the first marker of an OPA that has none.
    async fn mark_first(&self, marker: &Marker) -> Result<(), Error> {
        self.opa.ensure(&MARKERS.parse().expect("a path")).await?;
        let mut patch = PatchWriter::default();
        self.write(marker, &mut patch);
        Ok(self.opa.patch(patch.into_array()).await?)
    }

    /// Sends the patch if there is no room in it for an operation of `bytes`.
    async fn make_room(&self, patch: &mut PatchWriter, bytes: usize) -> Result<(), Error> {
        if patch.ops() + 1 >= PATCH_OPS_MAX || !patch.is_empty() && patch.len() + bytes > PATCH_BYTES_MAX {
            self.patch(std::mem::take(patch)).await?;
        }
        Ok(())
    }

    /// Makes the place of a directory that lies in no replicated resource. Only itself: a policy bundle may own a
    /// path beside it, and then OPA lets nobody write above.
    async fn ensure_outside(
        &self,
        data: &DataHead,
        held: Option<&Marker>,
        dir: &DirPath,
    ) -> Result<(), Error> {
        let known = held.is_some_and(|held| held.dirs.get(dir).is_some_and(Option::is_some));
        if !known && !data.ensure.iter().any(|prefix| dir.is_within(prefix)) {
            self.opa.ensure(dir).await?;
        }
        Ok(())
    }

    /// Directories and maps that OPA has and the head has not, inner ones first. An OPA without a marker is asked for what lies below the
    /// replicated resources: somebody may have filled it before us.
    async fn gone(&self, held: Option<&Marker>, data: &DataHead) -> Result<Vec<DirPath>, Error> {
        let is_gone = |dir: &DirPath| !data.dirs.contains_key(dir);
        if let Some(held) = held {
            let is_empty = |map: &&DirPath| {
                let dirs = data.dirs.keys().chain(&data.ensure);
                !held.dirs.contains_key(*map) && !dirs.into_iter().any(|dir| dir.is_within(map))
            };
            let dirs = held.dirs.keys().rev().filter(|dir| is_gone(dir));
            return Ok(dirs.chain(held.ensure.iter().rev().filter(is_empty)).cloned().collect());
        }
        let mut gone = Vec::new();
        for prefix in data.ensure.iter().filter(|prefix| is_gone(prefix)) {
            let keys = self.opa.keys(prefix).await?;
            let dirs = keys.iter().filter(|key| is_segment(key)).filter_map(|key| prefix.join(key).ok());
            gone.extend(dirs.filter(is_gone));
        }
        Ok(gone)
    }
}

#[cfg(test)]
mod tests;
