//! What the hub writes down: verdicts where authors of policies look, and the last good policies where a restart finds
//! them. Of several replicas the one that holds the Lease writes to the cluster.

pub mod lease;

pub mod verdicts;

pub mod statuses;

pub mod last_good;

#[cfg(test)]
mod fake_api;

use std::time::{Duration, SystemTime};

use kube::Client;
use tokio::sync::watch;

/// The hub's own namespace: the one `given`, else that of its pod or its kubeconfig.
pub fn namespace(given: Option<&str>, client: &Client) -> String {
    given.unwrap_or_else(|| client.default_namespace()).to_owned()
}

/// Who writes: the pod, and the process, since two hubs may run on one host.
pub fn identity() -> String {
    let host = std::env::var("HOSTNAME").unwrap_or_else(|_| WRITER.into());
    let started = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    format!("{host}_{}-{}", std::process::id(), started.as_micros())
}

/// The name under which the hub writes.
const WRITER: &str = "opa-hub";

/// Why a request to the API server failed.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The request exceeded this time limit and was dropped.
    #[error("no answer within {} s", .0.as_secs())]
    Timeout(Duration),
    /// The connection failed, or the API server refused the request.
    #[error("{}", words(.0))]
    Failed(kube::Error),
}

impl RequestError {
    /// Whether RBAC denies the request.
    fn is_forbidden(&self) -> bool {
        matches!(self, Self::Failed(kube::Error::Api(status)) if status.code == 403)
    }
}

/// The API server's words, without all the rest of its answer.
fn words(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}

/// Sends `request` with a time `limit`. kube's client has none: it waits without end for an answer, and retries 429, 503
/// and 504 inside one call for minutes. The limit covers those retries, which end with the dropped call.
async fn within<T>(
    limit: Duration,
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, RequestError> {
    match tokio::time::timeout(limit, request).await {
        Ok(answer) => answer.map_err(RequestError::Failed),
        Err(_) => Err(RequestError::Timeout(limit)),
    }
}

/// Runs `writes` while this replica `leads`, and drops them, with the request under way, when its leadership ends. `None`
/// if they did not complete.
async fn while_leading<T>(leads: &watch::Receiver<bool>, writes: impl Future<Output = T>) -> Option<T> {
    let mut leads = leads.clone();
    if !*leads.borrow_and_update() {
        return None;
    }
    tokio::select! {
        biased;
        // Any change ends the writes, also if this replica has become the leader again since.
        _ = leads.changed() => None,
        done = writes => Some(done),
    }
}
