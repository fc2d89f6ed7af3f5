//! Requests that write to the API server: identity, namespace, time limit, errors. Only the leader sends them.

use std::time::{Duration, SystemTime};

use kube::Client;
use tokio::sync::watch;

use crate::health::Health;

/// Timeout of a write-back request with kube's retries, for busy API servers.
pub const WRITEBACK_TIMEOUT: Duration = Duration::from_secs(10);

/// Returns the `explicit` namespace, or that of the pod or kubeconfig.
pub fn namespace(explicit: Option<&str>, client: &Client) -> String {
    explicit.unwrap_or_else(|| client.default_namespace()).to_owned()
}

/// Returns an identity that is unique among processes of a host.
pub fn identity() -> String {
    let host = std::env::var("HOSTNAME").unwrap_or_else(|_| FIELD_MANAGER.into());
    let started = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    format!("{host}_{}-{}", std::process::id(), started.as_micros())
}

pub(crate) const FIELD_MANAGER: &str = "opa-hub";

/// A request to the API server failed.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The request was dropped after this time.
    #[error("no answer within {} s", .0.as_secs())]
    Timeout(Duration),
    /// The connection failed, or the API server rejected the request.
    #[error("{}", api_message(.0))]
    Failed(kube::Error),
}

impl RequestError {
    pub(crate) fn is_forbidden(&self) -> bool {
        matches!(self, Self::Failed(kube::Error::Api(status)) if status.code == 403)
    }
}

/// Returns the message without the rest of the answer.
pub(crate) fn api_message(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}

/// kube's client has no time limit, and retries 429, 503 and 504 inside one call for minutes. `limit` includes those
/// retries.
pub(crate) async fn within<T>(
    limit: Duration,
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, RequestError> {
    match tokio::time::timeout(limit, request).await {
        Ok(answer) => answer.map_err(RequestError::Failed),
        Err(_) => Err(RequestError::Timeout(limit)),
    }
}

/// Drops `writes`, and their current request, when leadership ends. `None` if they did not complete.
pub(crate) async fn while_leading<T>(
    leads: &watch::Receiver<bool>,
    writes: impl Future<Output = T>,
) -> Option<T> {
    let mut leads = leads.clone();
    if !*leads.borrow_and_update() {
        return None;
    }
    tokio::select! {
        biased;
        // Any change: this replica may already lead again.
        _ = leads.changed() => None,
        done = writes => Some(done),
    }
}

/// Reports a problem, and logs a new one.
pub(crate) fn report(readiness: &Health, subject: &str, message: String) {
    if readiness.is_news(subject, &message) {
        tracing::warn!(subject, error = message, "reading or writing state failed");
    }
    readiness.problem(subject, Some(message));
}
