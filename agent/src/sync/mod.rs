//! Keeps one OPA in sync, session after session.
//!
//! ```text
//!                  ┌─ no marker ───────▶ load ───────┐
//!  read marker ────┼─ incomplete ──────▶ reconcile ──┼─▶ stream ─▶ follow events, check the marker
//!    ▲             └─ complete ──────────────────────┘    │ 410: reconcile
//!    │                                                    │
//!    └── back off ◀── no hub, no OPA, another marker, an event that does not fit ◀──┘
//! ```
//!
//! This file is the retry loop. Starts and restarts share one path.
//!
//! - `session`: marker to stream
//! - `load`: load, restore, reconcile
//! - `follow`: events
//! - `policies`: delivery
//! - `last_good`: state on disk
//! - `freshness`: search for a ready hub
//! - `opa_watch`: restarts of OPA
//! - `applied`: content of OPA
//! - `replica`: state between sessions
//! - `error`: ends of sessions

mod applied;
mod error;
mod follow;
mod freshness;
mod last_good;
mod load;
mod opa_watch;
mod policies;
mod replica;
mod session;

use std::time::Duration;

use tokio::time::{Instant, timeout};

use self::applied::MarkerTrust;
use self::error::SessionError;
use self::opa_watch::ExpectedMarker;
pub use self::replica::Replica;
use crate::backoff::Backoff;
use crate::opa::ClientError;
use crate::{hub, opa};

/// A shorter session is followed by a pause: two agents of one OPA would alternate without one.
const SESSION_MIN: Duration = Duration::from_secs(1);
/// Maximum pause for an OPA that starts, within a second.
const OPA_BACKOFF_MAX: Duration = Duration::from_millis(500);
/// Pause between repairs of an OPA that activates no policies; each costs the hub a response.
const UNACTIVATED_PAUSE: Duration = Duration::from_secs(5);

impl Replica {
    /// Keeps OPA in sync until `stop`.
    pub async fn run(mut self, stop: impl Future<Output = ()>) {
        tokio::select! {
            () = self.run_sessions() => unreachable!("the loop has no end"),
            () = stop => {}
        }
        self.last_good.close().await;
    }

    async fn run_sessions(&mut self) {
        let mut opa_backoff = Backoff::new(OPA_BACKOFF_MAX);
        loop {
            let started = Instant::now();
            let Err(error) = self.session().await;
            self.status.with(|state| {
                state.hub.disconnected_since.get_or_insert_with(Instant::now);
                state.problems.failure = Some(error.to_string());
            });
            match error {
                SessionError::NotActivated => self.wait_for_activation().await,
                SessionError::Hub(error) => self.recover_from_hub(error, started).await,
                SessionError::Apply(opa::Error::Opa(ClientError::Unreachable(error))) => {
                    self.report_unreachable(&error);
                    opa_backoff.sleep().await;
                    continue;
                }
                SessionError::Apply(error) => self.recover_from_opa(&error, started).await,
            }
            opa_backoff.reset();
        }
    }

    async fn wait_for_activation(&mut self) {
        tracing::warn!(reason = "OPA has not activated its policies", "reconciling again");
        self.repair.awaits_activation = true;
        let activated = async {
            match self.published_modules() {
                Some(modules) => self.policies.server.wait_activated(modules).await,
                None => std::future::pending().await,
            }
        };
        let pause = UNACTIVATED_PAUSE.mul_f64(0.5 + fastrand::f64() / 2.0);
        // The next session reports errors.
        _ = self.watch_opa().guard(timeout(pause, activated)).await;
    }

    async fn recover_from_hub(&mut self, error: hub::Error, started: Instant) {
        match error {
            hub::Error::Stale(reason) => {
                tracing::warn!(hub = %self.hub.current(), reason, "moved from stale hub");
            }
            hub::Error::GoAway(peers) => {
                let previous = self.hub.current().to_string();
                self.hub.move_to_peer(peers);
                tracing::info!(hub = %self.hub.current(), previous, "hub shuts down, moved");
                if started.elapsed() < SESSION_MIN {
                    self.back_off().await;
                }
            }
            error => {
                if let hub::Error::BehindOpa(_) = error {
                    self.freshness.record_behind(self.hub.rotation_timeout());
                }
                tracing::warn!(hub = %self.hub.current(), %error, "stream failed, trying next hub");
                self.hub.next_hub();
                self.back_off().await;
            }
        }
    }

    fn report_unreachable(&self, error: &reqwest::Error) {
        tracing::warn!(%error, "OPA unreachable, retrying");
        // A slow OPA has its content.
        if error.is_connect() {
            self.policies.server.reset_opa();
        } else {
            self.status.with(|state| state.applied = None);
        }
    }

    async fn recover_from_opa(&mut self, error: &opa::Error, started: Instant) {
        tracing::warn!(%error, "repairing OPA");
        self.status.with(|state| state.applied = None);
        if let opa::Error::OtherWriter = error {
            // The other writer's marker remains.
            self.expected = ExpectedMarker::Any;
            if started.elapsed() < SESSION_MIN {
                self.back_off().await;
            }
            return;
        }
        // Modules may have to precede data, or follow it.
        let is_permanent = matches!(error, opa::Error::Opa(error) if error.is_permanent());
        self.repair.modules_first = is_permanent && !self.repair.modules_first;
        self.repair.trust = match error {
            opa::Error::Opa(ClientError::Missing(_)) => MarkerTrust::Names,
            _ => MarkerTrust::Digests,
        };
        // OPA may have no marker with a revision.
        self.expected = ExpectedMarker::Unwritten;
        self.hub.next_hub();
        self.back_off().await;
    }
}
