//! Detects a restart of OPA during a wait.

use std::time::Duration;

use opa_hub_proto::revision::Revision;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

use super::error::SessionError;
use crate::opa::{self, Applier, ClientError, Marker, OpaClient};
use crate::server::LocalServer;

/// Interval of checks of OPA's marker, so the maximum time to detect a restart.
const OPA_POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Returns the interval of checks of OPA's marker, first after `delay`.
pub(super) fn poll_interval(delay: Duration) -> Interval {
    let mut interval = interval_at(Instant::now() + delay, OPA_POLL_INTERVAL);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

/// Marker that OPA has until it restarts.
#[derive(Clone, Copy)]
pub(super) enum ExpectedMarker {
    /// None yet: a restart loses nothing.
    Unwritten,
    Any,
    /// OPA may have the policies of this revision.
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

    /// Returns the result of `wait`, or an error as soon as OPA restarts: OPA needs its last good state then.
    pub(super) async fn guard<T>(&self, wait: impl Future<Output = T>) -> Result<T, SessionError> {
        tokio::select! {
            biased;
            result = wait => Ok(result),
            error = self.restart() => Err(error),
        }
    }

    /// Waits for a restart of OPA. Releases polls for policies while OPA has the data.
    async fn restart(&self) -> SessionError {
        let Self { opa, bundle, .. } = self;
        let mut expected = self.expected;
        let is_complete = matches!(expected, ExpectedMarker::Revision(_));
        let mut poll = poll_interval(OPA_POLL_INTERVAL);
        loop {
            tokio::select! {
                // An OPA that restarted polls at once.
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
                // A busy OPA is slow, not restarted.
                Err(_) => _ = poll.tick().await,
            }
        }
    }
}
