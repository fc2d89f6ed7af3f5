//! What the hub writes down: verdicts where authors of policies look, and the last good policies where a restart finds
//! them. Of several replicas the one that holds the Lease writes to the cluster.

pub mod lease;

pub mod verdicts;

pub mod statuses;

pub mod last_good;

use std::time::SystemTime;

use kube::Client;

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

/// The API server's words, without all the rest of its answer.
fn words(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}

/// Whether the API server said that the hub may not.
fn is_forbidden(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 403)
}
