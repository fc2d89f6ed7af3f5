//! Applies frames and modules to OPA. Decisions see the state before or after a change.

use std::ops::Bound;
use std::time::Duration;

use opa_hub_proto::frame::Delta;
use opa_hub_proto::patch::{PATCH_OPS_MAX, PatchWriter};
use opa_hub_proto::path::DirPath;
use opa_hub_proto::revision::{Digest, Revision};
use serde_json::value::RawValue;
use tokio::time::Instant;

use super::client::{self, OpaClient};
use super::marker::{MARKERS, Marker, WRITER};
use super::modules::{ModuleApplier, ModuleChanges, ModuleResults, Rejections};
use crate::archive::{self, PATCH_BYTES_MAX};

/// Maximum bytes of a frame that is one atomic PATCH. The agent stores them three times.
const FRAME_PATCH_BYTES_MAX: usize = 1 << 20;
/// Interval between checks of one directory; 1,000 directories need 84 minutes.
const VERIFY_INTERVAL: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Opa(#[from] client::Error),
    #[error(transparent)]
    Archive(#[from] archive::Error),
    #[error("OPA's marker changed: OPA restarted or has another writer")]
    OtherWriter,
    #[error("parsing an event of the hub failed: {0}")]
    Event(#[from] serde_json::Error),
    /// I3
    #[error("the hub sent a frame from {from}, OPA is at {applied}")]
    WrongBase { from: Digest, applied: Digest },
    #[error("the frame led to {actual}, not to {expected}")]
    Diverged { expected: Digest, actual: Digest },
    #[error("the archive lacks {0}")]
    Incomplete(DirPath),
    #[error("the archive is invalid: header missing or entries out of order")]
    InvalidArchive,
}

pub(crate) struct Applier {
    pub(crate) opa: OpaClient,
    pub(crate) bundle: String,
    writer: String,
    modules: ModuleApplier,
    verified_dir: Option<DirPath>,
    verified_at: Instant,
}

impl Applier {
    pub(crate) fn new(opa: OpaClient, bundle: String) -> Self {
        let (writer, modules) = (String::new(), ModuleApplier::default());
        Self { opa, bundle, writer, modules, verified_dir: None, verified_at: Instant::now() }
    }

    /// Starts a session: OPA rejects writes of earlier ones. Returns `None` if OPA was never loaded.
    pub(crate) async fn claim(&mut self) -> Result<Option<Marker>, Error> {
        // A rollback must not replace modules of another session.
        if self.modules.is_interrupted() && !self.opa.has_writer(&self.bundle, &self.writer).await? {
            self.modules.reset();
        }
        self.writer = format!("{:016x}", fastrand::u64(..));
        let mut patch = PatchWriter::default();
        let writer = serde_json::json!({ &self.writer: true }).to_string();
        patch.add(&Marker::path(&self.bundle), WRITER, writer.as_bytes());
        match self.opa.patch(patch.into_array()).await {
            Ok(()) => self.modules.allow_retries(),
            Err(client::Error::Missing(_)) => {
                self.modules.reset();
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        }
        // The hub sends lost modules: the marker has no digest of them.
        match self.modules.roll_back(&self.opa).await {
            Err(error @ client::Error::Unreachable(_)) => return Err(error.into()),
            Err(error) => tracing::warn!(%error, "rollback of modules failed"),
            Ok(_) => {}
        }
        Ok(self.opa.marker(&self.bundle).await?)
    }

    /// Checks one directory per [`VERIFY_INTERVAL`]. A missing one is created, and OPA's marker loses its revision.
    pub(crate) async fn verify(&mut self, marker: &Marker) -> Result<(), Error> {
        if self.verified_at.elapsed() < VERIFY_INTERVAL {
            return Ok(());
        }
        let next = self.verified_dir.as_ref().and_then(|last| {
            marker.dirs.range::<DirPath, _>((Bound::Excluded(last), Bound::Unbounded)).next()
        });
        let dir = next.or_else(|| marker.dirs.first_key_value()).map(|(dir, _)| dir.clone());
        if let Some(dir) = &dir
            && !self.opa.ensure(dir).await?
        {
            let mut partial = Marker { revision: None, ..marker.clone() };
            partial.dirs.insert(dir.clone(), None);
            self.write_marker(&partial).await?;
            return Err(client::Error::Missing(format!("data{dir}")).into());
        }
        (self.verified_dir, self.verified_at) = (dir, Instant::now());
        Ok(())
    }

    /// Sends a patch for this session only. OPA has no test operation, so the patch replaces a key that must exist.
    pub(super) async fn patch(&self, patch: PatchWriter) -> Result<(), Error> {
        let mut guard = PatchWriter::default();
        let writers = Marker::path(&self.bundle).join(WRITER).expect("constants are segments");
        guard.replace(&writers, &self.writer, b"true");
        match self.opa.patch(patch.into_array_after(&guard)).await {
            // The error names no path (v1/storage/errors.go).
            Err(client::Error::Missing(_)) if !self.opa.has_writer(&self.bundle, &self.writer).await? => {
                Err(Error::OtherWriter)
            }
            other => Ok(other?),
        }
    }

    pub(super) fn add_marker(&self, marker: &Marker, patch: &mut PatchWriter) {
        marker.write(patch, &self.bundle, &self.writer);
    }

    /// Applies `delta` as one PATCH, unless it is large or adds maps. `marker` is invalid after an error.
    pub(crate) async fn apply_delta(&self, marker: &mut Marker, delta: &Delta<'_>) -> Result<(), Error> {
        let applied = marker.revision.unwrap_or_else(|| unreachable!("streams start from a revision"));
        if delta.from != applied.data {
            return Err(Error::WrongBase { from: delta.from, applied: applied.data });
        }
        let revision = Revision { data: delta.to, ..applied };
        let position = delta.after(&marker.position);
        let ops = delta.patch.get();
        let is_small = delta.ops + delta.dirs.len() < PATCH_OPS_MAX && ops.len() <= FRAME_PATCH_BYTES_MAX;
        let is_atomic = is_small && delta.ensure.is_empty();
        let mut patch = PatchWriter::default();
        if is_atomic {
            patch.splice(ops.trim_start_matches('[').trim_end_matches(']').as_bytes(), delta.ops);
            marker.write_delta(&mut patch, &self.bundle, delta, revision, &position);
        }
        marker.apply_dirs(delta);
        if marker.data_digest() != delta.to {
            return Err(Error::Diverged { expected: delta.to, actual: marker.data_digest() });
        }
        marker.position = position;
        if !is_atomic {
            // A crash may leave part of the frame: the new position prevents older content.
            marker.revision = None;
            marker.dirs.extend(delta.dirs.keys().map(|dir| (dir.clone(), None)));
            self.write_marker(marker).await?;
            for dir in &delta.ensure {
                self.opa.ensure(dir).await?;
            }
            for op in serde_json::from_str::<Vec<&RawValue>>(ops)? {
                self.reserve(&mut patch, op.get().len()).await?;
                patch.splice(op.get().as_bytes(), 1);
            }
            self.reserve(&mut patch, PATCH_BYTES_MAX).await?;
            marker.apply_dirs(delta);
            marker.revision = Some(revision);
            self.add_marker(marker, &mut patch);
        }
        marker.revision = Some(revision);
        self.patch(patch).await
    }

    /// Updates `marker` and returns OPA's messages for rejected modules.
    pub(crate) async fn apply_modules(
        &mut self,
        marker: &mut Marker,
        changes: &ModuleChanges,
        field_mask: Option<String>,
    ) -> Result<Rejections, Error> {
        let path = Marker::path(&self.bundle);
        let mut intent = PatchWriter::default();
        let has_mask = field_mask.is_some();
        marker.add_field_mask(field_mask);
        let masks = serde_json::to_vec(&marker.field_masks).expect("strings are JSON");
        intent.add(&path, "reads", &masks);
        if !marker.position.is_empty() {
            intent.add(&path, "position", marker.position.to_string().as_bytes());
        }
        let modules = path.join("modules").expect("constants are segments");
        for id in changes.keys() {
            self.reserve(&mut intent, 0).await?;
            intent.add(&modules, id, b"null");
        }
        self.patch(intent).await?;

        let ModuleResults { rejected, absent } = self.modules.apply(&self.opa, changes).await?;
        for (id, text) in changes.iter().filter(|(id, _)| !rejected.contains_key(*id)) {
            match text {
                Some(text) => _ = marker.modules.insert(id.clone(), Some(Digest::of(text.as_bytes()))),
                None => _ = marker.modules.remove(id),
            }
        }
        marker.modules.retain(|id, _| !absent.contains(id));
        if rejected.is_empty() {
            if has_mask { marker.drop_old_field_masks() } else { marker.field_masks.clear() }
        }
        marker.revision = Some(Revision { modules: marker.modules_digest(), data: marker.data_digest() });
        self.write_marker(marker).await?;
        for (id, message) in &rejected {
            tracing::error!(module = id, reason = message, "module rejected, old version remains");
        }
        Ok(rejected)
    }

    pub(crate) async fn write_marker(&self, marker: &Marker) -> Result<(), Error> {
        let mut patch = PatchWriter::default();
        self.add_marker(marker, &mut patch);
        self.patch(patch).await
    }

    pub(super) async fn write_first_marker(&self, marker: &Marker) -> Result<(), Error> {
        self.opa.ensure(&MARKERS.parse().expect("a constant path is valid")).await?;
        let mut patch = PatchWriter::default();
        self.add_marker(marker, &mut patch);
        Ok(self.opa.patch(patch.into_array()).await?)
    }

    /// Sends the patch if `bytes` more exceed its limits.
    pub(super) async fn reserve(&self, patch: &mut PatchWriter, bytes: usize) -> Result<(), Error> {
        if patch.ops() + 1 >= PATCH_OPS_MAX || !patch.is_empty() && patch.len() + bytes > PATCH_BYTES_MAX {
            self.patch(std::mem::take(patch)).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
