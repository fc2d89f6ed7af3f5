//! Follows a stream and checks OPA's marker.

use std::time::Duration;

use opa_hub_proto::frame::{DELTA_EVENT, Delta, POLICY_EVENT, Policy};
use opa_hub_proto::position::{Judge, Lag};
use opa_hub_proto::revision::{Digest, Revision};
use opa_hub_proto::sse::{Message, Word};
use tokio::time::Instant;

use super::applied::AppliedState;
use super::error::SessionError;
use super::opa_watch::{ExpectedMarker, OpaWatch, poll_interval};
use super::replica::Replica;
use crate::config::Delivery;
use crate::hub::{self, Stream};
use crate::opa;

/// Maximum time from an announcement to its event; another hub may be faster.
const PENDING_TIMEOUT: Duration = Duration::from_secs(60);

impl Replica {
    pub(super) async fn follow(
        &mut self,
        mut stream: Stream,
        mut applied: AppliedState,
    ) -> Result<std::convert::Infallible, SessionError> {
        let mut judge = Judge::new(applied.marker.position.clone());
        let mut announced_at = None;
        let mut poll = poll_interval(Duration::ZERO);
        loop {
            tokio::select! {
                biased;
                // A restarted OPA polls at once.
                () = self.policies.server.needs_data() => self.check_applied(applied.marker.revision).await?,
                _ = poll.tick() => {
                    self.check_applied(applied.marker.revision).await?;
                    self.applier.verify(&applied.marker).await?;
                }
                message = stream.next() => {
                    match message? {
                        Message::Event { id, event, data } => {
                            announced_at = None;
                            let target = id.parse().ok();
                            self.status.with(|state| state.target = target);
                            self.apply_event(&mut applied, &mut judge, &event, &data, target).await?;
                            self.record_progress();
                            // Halves of a change arrive together.
                            if stream.is_drained() {
                                self.report_applied(&applied);
                            }
                        }
                        Message::Comment(comment) => {
                            self.handle_comment(&comment, &applied, &mut announced_at).await?;
                        }
                    }
                    stream.reset_idle_timeout();
                }
            }
        }
    }

    async fn handle_comment(
        &mut self,
        comment: &str,
        applied: &AppliedState,
        announced_at: &mut Option<Instant>,
    ) -> Result<(), SessionError> {
        match Word::of(comment) {
            Word::Go(urls) => {
                let peers = urls.into_iter().filter_map(|url| url.parse().ok()).collect();
                return Err(hub::Error::GoAway(peers).into());
            }
            Word::Wait => {
                self.status.with(|state| _ = state.hub.pending_since.get_or_insert_with(Instant::now));
                let since = *announced_at.get_or_insert_with(Instant::now);
                if since.elapsed() > PENDING_TIMEOUT {
                    return Err(hub::Error::EventTimeout(PENDING_TIMEOUT).into());
                }
                return Ok(());
            }
            Word::Here | Word::Stale(_) => *announced_at = None,
        }
        // Other policies are published, and no event is due.
        if !self.is_published(applied.modules) {
            return Err(hub::Error::PoliciesChanged.into());
        }
        self.record_progress();
        self.report_applied(applied);
        self.check_freshness(comment).await
    }

    /// An open stream alone is no progress: its first frame may be older than OPA.
    fn record_progress(&mut self) {
        self.status.with(|state| state.hub.pending_since = None);
        self.hub.reset_backoff();
        self.freshness.clear_behind();
    }

    /// Releases polls for policies if OPA has `revision`.
    pub(super) async fn check_applied(&self, revision: Option<Revision>) -> Result<(), SessionError> {
        let polls = self.policies.server.polls();
        if !self.applier.opa.has_revision(&self.applier.bundle, revision).await? {
            return Err(opa::Error::OtherWriter.into());
        }
        self.policies.server.confirm_data(polls);
        Ok(())
    }

    /// Moves from a stale hub to a ready one.
    async fn check_freshness(&mut self, comment: &str) -> Result<(), SessionError> {
        let Word::Stale(reason) = Word::of(comment) else {
            self.status.with(|state| state.hub.stale = None);
            self.freshness.reset_probes();
            return Ok(());
        };
        let reason = reason.to_owned();
        let now = Instant::now();
        self.status.with(|state| {
            let since = state.hub.stale.take().map_or(now, |(since, _)| since);
            state.hub.stale = Some((since, reason.clone()));
        });
        if !self.freshness.is_probe_due() {
            return Ok(());
        }
        let watch = OpaWatch::new(&self.applier, &self.policies.server, self.expected);
        let has_moved = watch.guard(self.hub.move_to_ready()).await?;
        if has_moved { Err(hub::Error::Stale(reason).into()) } else { Ok(()) }
    }

    /// Applies the data or the policies of `target`.
    async fn apply_event(
        &mut self,
        applied: &mut AppliedState,
        judge: &mut Judge,
        event: &str,
        data: &[u8],
        target: Option<Revision>,
    ) -> Result<(), SessionError> {
        match event {
            DELTA_EVENT => {
                check_base(target.map(|target| target.modules), applied.modules)?;
                let delta: Delta = serde_json::from_slice(data).map_err(opa::Error::from)?;
                judge.pass(&delta.position, delta.dirs.keys(), false).map_err(|lag| behind_opa(&lag))?;
                if delta.narrows
                    && self.policies.delivery == Delivery::Bundle
                    && !self.wait_activated(applied.modules).await?
                {
                    return Err(SessionError::NotActivated);
                }
                self.applier.apply_delta(&mut applied.marker, &delta).await?;
                if let Some(store) = &mut self.last_good.store {
                    store.apply_delta(&delta).await;
                }
            }
            POLICY_EVENT => {
                check_base(target.map(|target| target.data), applied.revision().data)?;
                let policy: Policy = serde_json::from_slice(data).map_err(opa::Error::from)?;
                check_base(Some(policy.from), applied.modules)?;
                judge.pass(&policy.position, std::iter::empty(), true).map_err(|lag| behind_opa(&lag))?;
                applied.marker.position = policy.after(&applied.marker.position);
                match self.policies.delivery {
                    Delivery::Rest => self.apply_module_changes(applied, policy).await?,
                    Delivery::Bundle => {
                        self.drop_replaced_masks(&mut applied.marker);
                        self.publish_policies(applied, policy.to, policy.reads).await?;
                    }
                }
            }
            // Newer hubs may send other events.
            _ => return Ok(()),
        }
        self.expected = ExpectedMarker::from(&applied.marker);
        self.save(applied).await;
        self.status.with(|state| state.counters.frames += 1);
        Ok(())
    }

    async fn apply_module_changes(
        &mut self,
        applied: &mut AppliedState,
        policy: Policy,
    ) -> Result<(), SessionError> {
        applied.modules = policy.to;
        if let Some(store) = &mut self.last_good.store {
            let put = policy.put.iter().map(|(id, text)| (id.clone(), Some(text.clone())));
            let removed = policy.remove.iter().map(|id| (id.clone(), None));
            store.write_modules(put.chain(removed).collect()).await;
        }
        let mut changes = std::mem::take(&mut applied.rejected);
        changes.extend(policy.put.into_iter().map(|(id, text)| (id, Some(text))));
        changes.extend(policy.remove.into_iter().map(|id| (id, None)));
        self.change_modules(applied, changes, policy.reads).await
    }
}

/// Checks that an event starts from the applied content (I3).
fn check_base(from: Option<Digest>, applied: Digest) -> Result<(), opa::Error> {
    match from {
        Some(from) if from != applied => Err(opa::Error::WrongBase { from, applied }),
        _ => Ok(()),
    }
}

/// A hub that knows OPA's revision may be behind the hub that sent it.
fn behind_opa(lag: &Lag) -> hub::Error {
    hub::Error::BehindOpa(lag.to_string())
}
