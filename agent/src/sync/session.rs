//! One session with OPA and a hub.

use std::collections::BTreeMap;

use opa_hub_proto::position::Position;

use super::applied::{AppliedState, MarkerTrust};
use super::error::SessionError;
use super::opa_watch::ExpectedMarker;
use super::replica::Replica;
use crate::config::Delivery;
use crate::hub::{self, Stream};
use crate::opa::{self, Marker};

/// Reconcile requests before a stream opens: one with fields for old policies, and one without.
const RECONCILES_MAX: usize = 2;

impl Replica {
    pub(super) async fn session(&mut self) -> Result<std::convert::Infallible, SessionError> {
        let (marker, is_complete) = self.claim().await?;
        if self.repair.modules_first && self.policies.delivery == Delivery::Bundle {
            let policy = self.watch_opa().guard(self.hub.policy_bundle()).await??;
            self.policies.server.publish(Some(policy));
        }
        let applied = self.resume_or_repair(marker, is_complete).await?;
        self.repair.trust = MarkerTrust::Full;
        self.last_good.bundle = None;
        let (stream, applied) = self.open_stream(applied).await?;
        self.repair.modules_first = false;
        if self.policies.delivery == Delivery::Rest {
            self.policies.layout.read(&self.applier.opa, &applied.marker).await;
            self.report_layout(&applied.marker);
        }
        tracing::info!(hub = %self.hub.current(), revision = %applied.revision(), "stream opened");
        self.status.with(|state| (state.hub.disconnected_since, state.problems.failure) = (None, None));
        self.follow(stream, applied).await
    }

    /// Returns the marker, and whether its revision is complete.
    async fn claim(&mut self) -> Result<(Option<Marker>, bool), SessionError> {
        self.expected = ExpectedMarker::Unwritten;
        let mut found = self.applier.claim().await?;
        if found.is_none() {
            self.policies.server.reset_opa();
        } else {
            self.expected = ExpectedMarker::Any;
        }
        if let Some(marker) = &mut found {
            self.repair.trust.restrict(marker);
            if self.freshness.has_source_regressed() {
                tracing::warn!(
                    reason = "all hubs are behind OPA, so their source went back",
                    "accepting older content"
                );
                marker.position = Position::default();
            }
        }
        let complete = found.as_ref().filter(|marker| self.verified_modules(marker).is_some());
        self.status.with(|state| {
            state.applied = complete.and_then(|marker| marker.revision);
            // A restarted agent knows the target from OPA.
            state.target = state.target.or(state.applied);
        });
        let is_complete = complete.is_some();
        if let Some(marker) = &mut found {
            let original = marker.clone();
            self.last_good.reduce_to_common(marker).await;
            if let Some(modules) = self.verified_modules(&original) {
                // OPA must not wait for the hub.
                self.policies.server.publish(self.known_bundle(modules));
                self.expected = ExpectedMarker::from(&original);
                self.check_applied(original.revision).await?;
            }
        }
        Ok((found, is_complete))
    }

    async fn resume_or_repair(
        &mut self,
        marker: Option<Marker>,
        is_complete: bool,
    ) -> Result<AppliedState, SessionError> {
        let resumable = match &marker {
            Some(marker) if !self.repair.awaits_activation => self.resumable_modules(marker).await?,
            _ => None,
        };
        let applied = match (marker, resumable) {
            (Some(marker), Some(modules)) => {
                // OPA accepted these modules.
                self.status.with(|state| state.problems.rejected_modules.clear());
                return Ok(AppliedState { marker, modules, rejected: BTreeMap::new() });
            }
            (None, _) => self.load().await?,
            (Some(marker), None) => match self.reconcile(marker.clone()).await {
                // An interrupted load, and no hub.
                Err(error @ (SessionError::Hub(_) | SessionError::Apply(opa::Error::Archive(_))))
                    if !is_complete =>
                {
                    match self.last_good.meta(self.policies.delivery).await {
                        Some(meta) => self.restore(Some(&marker), meta).await?,
                        None => return Err(error),
                    }
                }
                other => other?,
            },
        };
        self.check_applied(applied.marker.revision).await?;
        Ok(applied)
    }

    async fn open_stream(
        &mut self,
        mut applied: AppliedState,
    ) -> Result<(Stream, AppliedState), SessionError> {
        let mut stream = self.request_stream(&applied).await?;
        for _ in 0..RECONCILES_MAX {
            if stream.is_none() && !self.repair.awaits_activation {
                applied = self.reconcile(applied.marker).await?;
                stream = self.request_stream(&applied).await?;
            }
        }
        self.repair.awaits_activation = false;
        match stream {
            Some(stream) => Ok((stream, applied)),
            // OPA has fields for old policies, so no revision of a hub.
            None if self.policies.delivery == Delivery::Bundle && applied.marker.field_masks.len() > 1 => {
                Err(SessionError::NotActivated)
            }
            // The hub does not know its own response.
            None => Err(hub::Error::Closed.into()),
        }
    }

    async fn request_stream(&self, applied: &AppliedState) -> Result<Option<Stream>, SessionError> {
        let request = self.hub.stream(applied.revision(), &applied.marker.position);
        Ok(self.watch_opa().guard(request).await??)
    }
}
