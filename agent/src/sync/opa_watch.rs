//! Detects restarts of OPA during a wait.

use std::time::Duration;

use opa_hub_proto::revision::Revision;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

use super::error::SessionError;
use crate::opa::{self, Applier, ClientError, Marker, OpaClient};
use crate::server::LocalServer;

/// Maximum time to detect a restart.
const OPA_POLL_INTERVAL: Duration = Duration::from_millis(500);

pub(super) fn poll_interval(delay: Duration) -> Interval {
    let mut interval = interval_at(Instant::now() + delay, OPA_POLL_INTERVAL);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

/// Marker until a restart.
#[derive(Clone, Copy)]
pub(super) enum ExpectedMarker {
    /// No marker: a restart loses nothing.
    Unwritten,
    Any,
    /// OPA may get the policies of this revision.
    Revision(Revision),
}

impl From<&Marker> for ExpectedMarker {
    fn from(marker: &Marker) -> Self {
        marker.revision.map_or(Self::Any, Self::Revision)
    }
}

pub(super) struct OpaWatch<'a> {
    opa: OpaClient,
    bundle: String,
    server: &'a LocalServer,
    expected: ExpectedMarker,
}

impl<'a> OpaWatch<'a> {
    pub(super) fn new(applier: &Applier, server: &'a LocalServer, expected: ExpectedMarker) -> Self {
        Self { opa: applier.opa.clone(), bundle: applier.bundle.clone(), server, expected }
    }

    /// Fails as soon as OPA restarts: it needs its last good state.
    pub(super) async fn guard<T>(&self, wait: impl Future<Output = T>) -> Result<T, SessionError> {
        tokio::select! {
            biased;
            result = wait => Ok(result),
            error = self.restart() => Err(error),
        }
    }

    async fn restart(&self) -> SessionError {
        let Self { opa, bundle, .. } = self;
        let mut expected = self.expected;
        let is_complete = matches!(expected, ExpectedMarker::Revision(_));
        let mut poll = poll_interval(OPA_POLL_INTERVAL);
        loop {
            tokio::select! {
                // A restarted OPA polls at once.
                () = self.server.needs_data(), if is_complete => {}
                _ = poll.tick() => {}
            }
            let polls = self.server.polls();
            let matched = match expected {
                ExpectedMarker::Unwritten | ExpectedMarker::Any => opa.has_marker(bundle).await,
                ExpectedMarker::Revision(revision) => opa.has_revision(bundle, Some(revision)).await,
            };
            match matched {
                Ok(true) if is_complete => self.server.confirm_data(polls),
                Ok(true) => expected = ExpectedMarker::Any,
                Ok(false) if matches!(expected, ExpectedMarker::Unwritten) => {}
                Ok(false) => return opa::Error::OtherWriter.into(),
                Err(ClientError::Unreachable(error)) if error.is_connect() => {
                    return ClientError::Unreachable(error).into();
                }
                // A busy OPA is not restarted.
                Err(_) => _ = poll.tick().await,
            }
        }
    }
}
