//! Writes verdicts, statuses and the last good policies. To the cluster only the leader writes.

pub mod last_good;
pub mod lease;
pub mod statuses;
pub mod verdicts;

#[cfg(test)]
mod fake_api;

use std::time::{Duration, SystemTime};

use kube::Client;
use tokio::sync::watch;

use crate::readiness::Readiness;

/// Returns the hub's namespace: `explicit`, or that of its pod or kubeconfig.
pub fn namespace(explicit: Option<&str>, client: &Client) -> String {
    explicit.unwrap_or_else(|| client.default_namespace()).to_owned()
}

/// Returns a unique identity for this process, since two hubs may run on one host.
pub fn identity() -> String {
    let host = std::env::var("HOSTNAME").unwrap_or_else(|_| FIELD_MANAGER.into());
    let started = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    format!("{host}_{}-{}", std::process::id(), started.as_micros())
}

const FIELD_MANAGER: &str = "opa-hub";

/// A request to the API server failed.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The request exceeded this time limit and was dropped.
    #[error("no answer within {} s", .0.as_secs())]
    Timeout(Duration),
    /// The connection failed, or the API server rejected the request.
    #[error("{}", api_message(.0))]
    Failed(kube::Error),
}

impl RequestError {
    /// Whether RBAC denies the request.
    fn is_forbidden(&self) -> bool {
        matches!(self, Self::Failed(kube::Error::Api(status)) if status.code == 403)
    }
}

/// Returns the API server's message, without the rest of its answer.
fn api_message(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}

/// Runs `request` with a time `limit`, because kube's client has none. kube retries 429, 503 and 504 inside one call for
/// minutes; the limit includes those retries.
async fn within<T>(
    limit: Duration,
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, RequestError> {
    match tokio::time::timeout(limit, request).await {
        Ok(answer) => answer.map_err(RequestError::Failed),
        Err(_) => Err(RequestError::Timeout(limit)),
    }
}

/// Runs `writes` while this replica `leads`. Drops them, and their current request, when leadership ends. `None` if
/// they did not complete.
async fn while_leading<T>(leads: &watch::Receiver<bool>, writes: impl Future<Output = T>) -> Option<T> {
    let mut leads = leads.clone();
    if !*leads.borrow_and_update() {
        return None;
    }
    tokio::select! {
        biased;
        // Any change ends the writes, even if this replica is the leader again.
        _ = leads.changed() => None,
        done = writes => Some(done),
    }
}

/// Reports `message` as the problem of `subject`, and logs it once.
fn report(readiness: &Readiness, subject: &str, message: String) {
    if readiness.is_news(subject, &message) {
        tracing::warn!(subject, error = message, "reading or writing state failed");
    }
    readiness.problem(subject, Some(message));
}
