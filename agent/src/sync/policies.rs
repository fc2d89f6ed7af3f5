//! Delivery of policies.

use std::collections::BTreeMap;
use std::time::Duration;

use opa_hub_proto::revision::{Digest, modules_digest};
use tokio::time::timeout;

use super::applied::AppliedState;
use super::error::SessionError;
use super::opa_watch::ExpectedMarker;
use super::replica::Replica;
use crate::archive::PolicyBundle;
use crate::config::Delivery;
use crate::opa::{ArchiveModules, Marker, ModuleChanges};
use crate::{hub, opa};

/// Usual time until OPA activates a policy bundle.
const ACTIVATION_TIMEOUT: Duration = Duration::from_secs(2);

impl Replica {
    /// Delivers the policies of OPA's data.
    pub(super) async fn apply_policies(
        &mut self,
        marker: Marker,
        modules: ArchiveModules,
    ) -> Result<AppliedState, SessionError> {
        let mut applied =
            AppliedState { marker, modules: modules_digest([], None), rejected: BTreeMap::new() };
        match self.policies.delivery {
            Delivery::Rest => self.apply_archive_modules(&mut applied, modules).await?,
            Delivery::Bundle => {
                let digest = modules.digest.ok_or(opa::Error::InvalidArchive)?;
                self.publish_policies(&mut applied, digest, modules.field_mask).await?;
            }
        }
        self.expected = ExpectedMarker::from(&applied.marker);
        Ok(applied)
    }

    async fn apply_archive_modules(
        &mut self,
        applied: &mut AppliedState,
        modules: ArchiveModules,
    ) -> Result<(), SessionError> {
        let all = modules.all.as_ref().ok_or(opa::Error::InvalidArchive)?;
        let digests = all.iter().map(|(id, digest)| (id.as_str(), *digest));
        applied.modules = modules_digest(digests, applied.marker.rego_version);
        let changes = modules.changes(Some(&applied.marker));
        self.change_modules(applied, changes, modules.field_mask).await
    }

    pub(super) async fn change_modules(
        &mut self,
        applied: &mut AppliedState,
        changes: ModuleChanges,
        field_mask: Option<String>,
    ) -> Result<(), SessionError> {
        let rejected = self.applier.apply_modules(&mut applied.marker, &changes, field_mask).await?;
        for (id, text) in &changes {
            self.policies.layout.record(id, text.as_deref());
        }
        self.report_layout(&applied.marker);
        applied.rejected = changes.into_iter().filter(|(id, _)| rejected.contains_key(id)).collect();
        self.status.with(|state| state.problems.rejected_modules = rejected);
        Ok(())
    }

    /// Fails if the hub has newer modules: OPA may lack their data.
    pub(super) async fn publish_policies(
        &mut self,
        applied: &mut AppliedState,
        modules: Digest,
        field_mask: Option<String>,
    ) -> Result<(), SessionError> {
        let policy = self.policy_bundle(modules).await?.ok_or(hub::Error::PoliciesChanged)?;
        applied.marker.add_field_mask(field_mask);
        applied.modules = modules;
        applied.marker.revision = Some(applied.revision());
        self.applier.write_marker(&applied.marker).await?;
        if let Some(store) = &mut self.last_good.store {
            store.write_bundle(policy.clone()).await;
        }
        self.policies.server.publish(Some(policy));
        Ok(())
    }

    /// Returns `None` if the hub has newer modules.
    async fn policy_bundle(&self, modules: Digest) -> Result<Option<PolicyBundle>, SessionError> {
        if let Some(known) = self.known_bundle(modules) {
            return Ok(Some(known));
        }
        let latest = self.watch_opa().guard(self.hub.policy_bundle()).await??;
        Ok(Some(latest).filter(|policy| policy.etag == modules.to_string()))
    }

    pub(super) fn known_bundle(&self, modules: Digest) -> Option<PolicyBundle> {
        let known = self.policies.server.published().into_iter().chain(self.last_good.bundle.clone());
        known.into_iter().find(|policy| policy.etag == modules.to_string())
    }

    pub(super) fn is_published(&self, modules: Digest) -> bool {
        let is_current = |policy: PolicyBundle| policy.etag == modules.to_string();
        self.policies.delivery == Delivery::Rest || self.policies.server.published().is_some_and(is_current)
    }

    pub(super) fn published_modules(&self) -> Option<Digest> {
        self.policies.server.published()?.etag.parse().ok()
    }

    /// Returns `false` after [`ACTIVATION_TIMEOUT`].
    pub(super) async fn wait_activated(&self, modules: Digest) -> Result<bool, SessionError> {
        let activated = timeout(ACTIVATION_TIMEOUT, self.policies.server.wait_activated(modules));
        Ok(self.watch_opa().guard(activated).await?.is_ok())
    }

    /// Old masks are unused once OPA has activated the policies.
    pub(super) fn drop_replaced_masks(&self, marker: &mut Marker) {
        let published = self.published_modules();
        if published.is_some() && self.status.with(|state| state.activated) == published {
            marker.drop_old_field_masks();
        }
    }

    /// Returns the modules from which a stream may resume, `None` if the marker has no complete revision.
    pub(super) fn verified_modules(&self, marker: &Marker) -> Option<Digest> {
        let is_complete = marker.dirs.values().all(Option::is_some);
        let revision =
            marker.revision.filter(|revision| is_complete && revision.data == marker.data_digest())?;
        let is_complete = marker.modules.values().all(Option::is_some);
        let is_verified = self.policies.delivery == Delivery::Bundle
            || is_complete && revision.modules == marker.modules_digest();
        is_verified.then_some(revision.modules)
    }

    /// Publishes the policies from which a stream may resume, and returns their modules.
    pub(super) async fn resumable_modules(
        &mut self,
        marker: &Marker,
    ) -> Result<Option<Digest>, SessionError> {
        let Some(modules) = self.verified_modules(marker) else { return Ok(None) };
        if self.policies.delivery == Delivery::Bundle {
            self.policies.server.publish(self.policy_bundle(modules).await?);
        }
        Ok(Some(modules))
    }

    pub(super) fn report_layout(&self, marker: &Marker) {
        let notice = self.policies.layout.notice(marker);
        let has_changed = self.status.with(|state| {
            let has_changed = state.problems.notice != notice;
            state.problems.notice.clone_from(&notice);
            has_changed
        });
        if let Some(reason) = notice.filter(|_| has_changed) {
            tracing::warn!(reason, "packages make OPA slow");
        }
    }
}
