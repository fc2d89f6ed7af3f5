//! Loads and repairs OPA.

use std::time::Duration;

use opa_hub_proto::reconcile::Reconcile;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

use super::applied::{AppliedState, MarkerTrust};
use super::error::SessionError;
use super::last_good::store_and_forward;
use super::opa_watch::{ExpectedMarker, OpaWatch};
use super::replica::Replica;
use crate::config::Delivery;
use crate::hub::Download;
use crate::opa::Marker;
use crate::state::Meta;
use crate::{archive, hub, opa};

/// Maximum wait for the hub if OPA can start from disk.
const HUB_FIRST_TIMEOUT: Duration = Duration::from_millis(300);
/// Consecutive rejections of reconcile requests before a full load: during an upgrade each of two hubs may reject one.
const REJECTIONS_MAX: u32 = 3;

impl Replica {
    /// Loads an OPA without a marker, from disk if no hub responds.
    pub(super) async fn load(&mut self) -> Result<AppliedState, SessionError> {
        let started = Instant::now();
        let last_good = self.last_good.meta(self.policies.delivery).await;
        let download = match last_good {
            None => self.download_all().await?,
            Some(meta) => match timeout(HUB_FIRST_TIMEOUT, self.download_all()).await {
                Ok(Ok(download)) => download,
                _ => return self.restore(None, meta).await,
            },
        };
        let applied = self.apply_download(None, download).await?;
        self.status.with(|state| state.counters.snapshots += 1);
        tracing::info!(revision = %applied.revision(), elapsed = ?started.elapsed(), "OPA loaded");
        Ok(applied)
    }

    async fn download_all(&self) -> Result<Download, hub::Error> {
        match self.policies.delivery {
            Delivery::Rest => self.hub.full().await,
            Delivery::Bundle => self.hub.data().await,
        }
    }

    /// Loads from disk; OPA may have other content.
    pub(super) async fn restore(
        &mut self,
        marker: Option<&Marker>,
        meta: Meta,
    ) -> Result<AppliedState, SessionError> {
        let started = Instant::now();
        let Some(store) = &mut self.last_good.store else { return Err(opa::Error::InvalidArchive.into()) };
        let mut pieces = store.read().await;
        let modules_first = self.repair.modules_first;
        let (marker, modules) = self.applier.load(marker, modules_first, meta.position, &mut pieces).await?;
        self.expected = ExpectedMarker::Any;
        let applied = self.apply_policies(marker, modules).await?;
        self.last_good.record_saved(applied.revision());
        self.status.with(|state| state.counters.restores += 1);
        self.report_applied(&applied);
        tracing::warn!(revision = %applied.revision(), elapsed = ?started.elapsed(), "OPA loaded from disk");
        Ok(applied)
    }

    /// Requests and applies the content that differs from `marker`.
    pub(super) async fn reconcile(&mut self, mut marker: Marker) -> Result<AppliedState, SessionError> {
        let started = Instant::now();
        self.status.with(|state| state.applied = None);
        let modules = match self.policies.delivery {
            _ if self.repair.rejections >= REJECTIONS_MAX => return self.reload(marker).await,
            Delivery::Rest => Some(marker.modules().map(|(id, digest)| (id.to_owned(), digest)).collect()),
            Delivery::Bundle => {
                if let (Some(published), true) = (marker.revision, marker.field_masks.len() > 1)
                    && !self.repair.awaits_activation
                {
                    // Activation makes the response smaller.
                    _ = self.wait_activated(published.modules).await?;
                }
                self.drop_replaced_masks(&mut marker);
                None
            }
        };
        let dirs = marker.dirs().map(|(dir, digest)| (dir.clone(), digest)).collect();
        let request = Reconcile { dirs, modules, reads: marker.field_masks.clone() };
        let response = self.hub.reconcile(&request, marker.revision, &marker.position);
        let response = self.watch_opa().guard(response).await?;
        let download = match response {
            Err(error) if error.is_permanent() => {
                self.repair.rejections += 1;
                return Err(error.into());
            }
            other => other?,
        };
        self.repair.rejections = 0;
        let applied = self.apply_download(Some(&marker), download).await?;
        self.status.with(|state| state.counters.reconciles += 1);
        tracing::info!(revision = %applied.revision(), elapsed = ?started.elapsed(), "OPA reconciled");
        Ok(applied)
    }

    /// Loads all content, if hubs reject digests. Old policies may lack fields until activation. A hub behind OPA catches up
    /// when it renews its watches.
    async fn reload(&mut self, mut marker: Marker) -> Result<AppliedState, SessionError> {
        tracing::warn!(rejections = self.repair.rejections, "reconcile rejected, loading OPA again");
        MarkerTrust::Names.restrict(&mut marker);
        let download = self.watch_opa().guard(self.download_all()).await??;
        if download.position.is_behind(&marker.position) {
            let reason = format!("{} is behind {}", download.position, marker.position);
            return Err(hub::Error::BehindOpa(reason).into());
        }
        self.repair.rejections = 0;
        let applied = self.apply_download(Some(&marker), download).await?;
        self.status.with(|state| state.counters.snapshots += 1);
        Ok(applied)
    }

    async fn apply_download(
        &mut self,
        marker: Option<&Marker>,
        download: Download,
    ) -> Result<AppliedState, SessionError> {
        let Download { chunks, position, task } = download;
        let mut pieces = archive::read(chunks).map_err(opa::Error::from)?;
        // The first piece writes the marker.
        self.expected = if marker.is_some() { ExpectedMarker::Any } else { ExpectedMarker::Unwritten };
        let watch = OpaWatch::new(&self.applier, &self.policies.server, self.expected);
        let (applier, modules_first) = (&mut self.applier, self.repair.modules_first);
        let (marker, modules) = match &mut self.last_good.store {
            None => {
                let apply = applier.load(marker, modules_first, position, &mut pieces);
                watch.guard(Box::pin(apply)).await??
            }
            Some(store) => {
                let (out, mut copy) = mpsc::channel(1);
                let store = store_and_forward(store, &mut pieces, out);
                let apply = async move { applier.load(marker, modules_first, position, &mut copy).await };
                let work = Box::pin(async { tokio::join!(store, apply) });
                let ((), result) = watch.guard(work).await?;
                result?
            }
        };
        drop(task);
        self.expected = ExpectedMarker::Any;
        let applied = self.apply_policies(marker, modules).await?;
        self.save(&applied).await;
        Ok(applied)
    }
}
