//! Use of the last good state on disk.

use opa_hub_proto::revision::Revision;
use tokio::sync::mpsc;

use super::applied::AppliedState;
use crate::archive::{self, Piece, PolicyBundle};
use crate::config::{Config, Delivery};
use crate::opa::Marker;
use crate::state::{Meta, StateStore, StateSummary};

pub(super) struct LastGood {
    /// `None` without a directory.
    pub(super) store: Option<StateStore>,
    saved: Option<Revision>,
    /// Policies from disk, until a session succeeds.
    pub(super) bundle: Option<PolicyBundle>,
}

impl LastGood {
    pub(super) fn open(config: &Config) -> Self {
        let store = config.state_dir.as_ref().and_then(|dir| {
            let opened = StateStore::open(dir.clone(), &config.bundle, config.namespace.as_deref());
            // A disk must not stop OPA.
            opened.inspect_err(|error| tracing::error!(%error, "opening the state failed")).ok()
        });
        Self { store, saved: None, bundle: None }
    }

    pub(super) async fn close(self) {
        if let Some(store) = self.store {
            store.close().await;
        }
    }

    /// Removes digests that the state lacks, so that the hub sends them: after a crash, or in a new directory.
    pub(super) async fn reduce_to_common(&mut self, marker: &mut Marker) {
        let Some(store) = &mut self.store else { return };
        store.abort().await;
        if self.saved.is_none() || self.saved != marker.revision {
            let mut summary = store.summary().await;
            self.bundle = summary.bundle.take();
            self.saved = summary.meta.as_ref().map(|meta| meta.revision);
            if self.saved.is_none() || self.saved != marker.revision {
                intersect(marker, &summary);
            }
        }
    }

    /// Returns `None` for a state of another delivery.
    pub(super) async fn meta(&mut self, delivery: Delivery) -> Option<Meta> {
        let store = self.store.as_mut()?;
        store.abort().await;
        let summary = store.summary().await;
        self.bundle = summary.bundle;
        summary.meta.filter(|meta| meta.etag.is_some() == (delivery == Delivery::Bundle))
    }

    pub(super) fn record_saved(&mut self, revision: Revision) {
        self.saved = Some(revision);
    }

    pub(super) async fn save(&mut self, applied: &AppliedState, delivery: Delivery) {
        let Some(store) = &mut self.store else { return };
        let meta = Meta {
            revision: applied.revision(),
            position: applied.marker.position.clone(),
            ensure: applied.marker.ensure.clone(),
            rego_version: applied.marker.rego_version,
            field_mask: applied.marker.field_masks.last().cloned(),
            etag: (delivery == Delivery::Bundle).then(|| applied.modules.to_string()),
        };
        self.saved = Some(meta.revision);
        store.commit(meta).await;
    }
}

fn intersect(marker: &mut Marker, summary: &StateSummary) {
    marker.revision = None;
    for (dir, digest) in &mut marker.dirs {
        *digest = digest.filter(|digest| summary.dirs.get(dir) == Some(digest));
    }
    for (id, digest) in &mut marker.modules {
        *digest = digest.filter(|digest| summary.modules.get(id) == Some(digest));
    }
}

/// Ends with the receiver of `out`.
pub(super) async fn store_and_forward(
    store: &mut StateStore,
    pieces: &mut mpsc::Receiver<Result<Piece, archive::Error>>,
    out: mpsc::Sender<Result<Piece, archive::Error>>,
) {
    loop {
        let piece = tokio::select! {
            piece = pieces.recv() => piece,
            () = out.closed() => return,
        };
        let Some(piece) = piece else { return };
        if let Ok(piece) = &piece {
            store.write_piece(piece).await;
        }
        if out.send(piece).await.is_err() {
            return;
        }
    }
}
