//! Loopback server: health, and the policy bundle for OPA.
//!
//! After each REST write OPA checks data against rules below the roots of the bundle activated last, and copies that
//! data. So `/bundles/{name}/data-only`, an empty bundle, changes after each activation of policies: OPA activates it
//! last and has nothing to check.
//!
//! An OPA without activated policies may have restarted. Its poll waits for data: policies must not decide without it.
//!
//! Only polls report the activated revision. A new bundle or a loss of OPA ends its validity.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::Router;
use axum::extract::{Path, RawQuery, State};
use axum::http::header::{CONTENT_TYPE, ETAG, IF_NONE_MATCH, USER_AGENT};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use opa_hub_proto::manifest::{MANIFEST_FILE, Manifest};
use opa_hub_proto::poll::{BUNDLE_TYPE, OPA_AGENT, entity_tags, wait};
use opa_hub_proto::revision::Digest;
use tokio::sync::watch;

use crate::archive::PolicyBundle;
use crate::status::{Detail, Report, Status, SyncState};

/// Minimum wait for data. OPA waits 10 s (OPA v1/plugins/rest/rest.go, `defaultResponseHeaderTimeoutSeconds`).
const DATA_WAIT_MIN: Duration = Duration::from_secs(5);
const LONG_POLL_MAX: Duration = Duration::from_secs(300);

/// Server for OPA and probes.
#[derive(Clone)]
pub struct LocalServer(Arc<Shared>);

struct Shared {
    bundle: String,
    status: Status,
    policy: watch::Sender<Option<PolicyBundle>>,
    data_only: watch::Sender<Option<PolicyBundle>>,
    gate: watch::Sender<Gate>,
    losses: watch::Sender<()>,
}

/// Polls of an OPA without activated policies.
#[derive(Clone, Copy, Default)]
struct Gate {
    polls: u64,
    confirmed: u64,
}

impl LocalServer {
    /// Creates a server without a policy bundle.
    pub fn new(bundle: String, status: Status) -> Self {
        Self(Arc::new(Shared {
            bundle,
            status,
            policy: watch::Sender::new(None),
            data_only: watch::Sender::new(None),
            gate: watch::Sender::default(),
            losses: watch::Sender::default(),
        }))
    }

    pub(crate) fn polls(&self) -> u64 {
        self.0.gate.borrow().polls
    }

    pub(crate) async fn needs_data(&self) {
        let mut gate = self.0.gate.subscribe();
        _ = gate.wait_for(|gate| gate.confirmed < gate.polls).await;
    }

    pub(crate) fn confirm_data(&self, polls: u64) {
        self.0.gate.send_modify(|gate| gate.confirmed = gate.confirmed.max(polls));
    }

    pub(crate) fn published(&self) -> Option<PolicyBundle> {
        self.0.policy.borrow().clone()
    }

    pub(crate) async fn wait_activated(&self, modules: Digest) {
        // Notified by every poll of OPA.
        let mut polled = self.0.data_only.subscribe();
        let is_activated =
            |_: &Option<PolicyBundle>| self.0.status.with(|status| status.activated) == Some(modules);
        _ = polled.wait_for(is_activated).await;
    }

    pub(crate) fn publish(&self, policy: Option<PolicyBundle>) {
        self.0.policy.send_replace(policy);
    }

    pub(crate) fn reset_opa(&self) {
        self.0.status.with(SyncState::reset_opa);
        self.0.losses.send_replace(());
    }

    pub(crate) fn router(self) -> Router {
        Router::new()
            .route("/bundles/{name}", get(policy))
            .route("/bundles/{name}/data-only", get(data_only))
            .route(
                "/v1/status",
                get(|State(local): State<Self>| async move { Json(local.0.status.report(Detail::Full)) }),
            )
            .with_state(self.clone())
            .merge(self.probes(Detail::Full))
    }

    pub(crate) fn health_router(self) -> Router {
        self.probes(Detail::Counts)
    }

    /// `/health` is kube-mgmt's name of `/livez`.
    fn probes(self, detail: Detail) -> Router {
        let live = || async { "ok\n" };
        let ready = move |State(local): State<Self>, RawQuery(query): RawQuery| async move {
            ready(&local.0.status.report(detail), query.as_deref())
        };
        Router::new()
            .route("/health", get(live))
            .route("/livez", get(live))
            .route("/readyz", get(ready))
            .route("/metrics", get(|State(local): State<Self>| async move { local.0.status.metrics() }))
            .with_state(self)
    }
}

fn ready(report: &Report, query: Option<&str>) -> Response {
    let status = if report.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    match query {
        Some("verbose") => (status, Json(report)).into_response(),
        _ => (status, if report.ready { "ok\n".into() } else { report.reasons.join("\n") + "\n" })
            .into_response(),
    }
}

async fn policy(State(local): State<LocalServer>, Path(name): Path<String>, headers: HeaderMap) -> Response {
    // OPA sends the ETag of its activated bundle, none after a start.
    let is_opa = name == local.0.bundle
        && header_values(&headers, USER_AGENT.as_str()).any(|agent| agent.starts_with(OPA_AGENT));
    let activated = requested_etags(&headers).into_iter().next();
    if is_opa {
        local
            .0
            .status
            .with(|status| status.activated = activated.as_deref().and_then(|etag| etag.parse().ok()));
    }
    if is_opa && activated.is_none() {
        let mut poll = 0;
        local.0.gate.send_modify(|gate| {
            gate.polls += 1;
            poll = gate.polls;
        });
        let mut gate = local.0.gate.subscribe();
        let max_wait = wait(header_values(&headers, "prefer"), LONG_POLL_MAX).max(DATA_WAIT_MIN);
        let confirmed = tokio::time::timeout(max_wait, gate.wait_for(|gate| gate.confirmed >= poll)).await;
        if confirmed.is_err() {
            return (StatusCode::SERVICE_UNAVAILABLE, "the data is not loaded yet\n").into_response();
        }
    }
    if let Some(etag) = activated.filter(|_| is_opa) {
        let mut losses = local.0.losses.subscribe();
        local.0.data_only.send_modify(|published| {
            if published.as_ref().is_none_or(|published| published.etag != etag) {
                let archive = empty_bundle(&local.0.bundle, &etag);
                *published = Some(PolicyBundle { archive, etag: etag.clone() });
            }
        });
        let response = tokio::select! {
            biased;
            _ = losses.changed() => not_modified(&etag),
            response = long_poll(&local, &name, &headers, local.0.policy.subscribe()) => response,
        };
        if response.status() == StatusCode::OK {
            // Until the next poll OPA may use the old or the new bundle.
            let reported: Option<Digest> = etag.parse().ok();
            local
                .0
                .status
                .with(|status| _ = status.activated.take_if(|activated| Some(*activated) == reported));
        }
        return response;
    }
    long_poll(&local, &name, &headers, local.0.policy.subscribe()).await
}

fn not_modified(etag: &str) -> Response {
    (StatusCode::NOT_MODIFIED, [(ETAG, format!("\"{etag}\""))]).into_response()
}

async fn data_only(
    State(local): State<LocalServer>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Response {
    long_poll(&local, &name, &headers, local.0.data_only.subscribe()).await
}

async fn long_poll(
    local: &LocalServer,
    name: &str,
    headers: &HeaderMap,
    mut bundle: watch::Receiver<Option<PolicyBundle>>,
) -> Response {
    if name != local.0.bundle {
        return (StatusCode::NOT_FOUND, format!("this agent serves only the bundle {:?}\n", local.0.bundle))
            .into_response();
    }
    let etags = requested_etags(headers);
    let max_wait = wait(header_values(headers, "prefer"), LONG_POLL_MAX);
    let is_newer =
        |bundle: &Option<PolicyBundle>| bundle.as_ref().is_some_and(|bundle| !etags.contains(&bundle.etag));
    let found = tokio::time::timeout(max_wait, bundle.wait_for(is_newer)).await;
    let newer = found.ok().and_then(Result::ok).and_then(|bundle| bundle.clone());
    match newer {
        Some(bundle) => {
            let headers = [(CONTENT_TYPE, BUNDLE_TYPE.to_owned()), (ETAG, format!("\"{}\"", bundle.etag))];
            (headers, bundle.archive).into_response()
        }
        None if etags.is_empty() => {
            (StatusCode::SERVICE_UNAVAILABLE, "no bundle received from the hub yet\n").into_response()
        }
        None => not_modified(&etags[0]),
    }
}

fn requested_etags(headers: &HeaderMap) -> Vec<String> {
    entity_tags(header_values(headers, IF_NONE_MATCH.as_str()))
        .iter()
        .map(|tag| tag.opaque.to_owned())
        .collect()
}

fn header_values<'a>(headers: &'a HeaderMap, name: &str) -> impl Iterator<Item = &'a str> {
    headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok())
}

/// The root belongs to no other bundle.
fn empty_bundle(bundle: &str, revision: &str) -> Bytes {
    let manifest = Manifest {
        revision: revision.to_owned(),
        roots: vec![format!("opahub/{bundle}/data-only")],
        rego_version: None,
    };
    let manifest = serde_json::to_vec(&manifest).expect("a manifest has string keys");
    let mut header = tar::Header::new_gnu();
    header.set_size(manifest.len() as u64);
    header.set_mode(0o644);
    let mut tar = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
    tar.append_data(&mut header, MANIFEST_FILE, &manifest[..]).expect("memory writes do not fail");
    tar.into_inner().and_then(GzEncoder::finish).expect("memory writes do not fail").into()
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use axum::http::HeaderValue;
    use futures::poll;

    use super::*;
    use crate::config::Delivery;

    fn bundle(modules: Digest) -> PolicyBundle {
        PolicyBundle { etag: modules.to_string(), archive: Bytes::from_static(b"archive") }
    }

    async fn poll_bundle(local: &LocalServer, modules: Digest) -> StatusCode {
        let mut headers = HeaderMap::new();
        headers.insert(USER_AGENT, HeaderValue::from_static("Open-Policy-Agent/1"));
        headers.insert(IF_NONE_MATCH, HeaderValue::try_from(format!("\"{modules}\"")).unwrap());
        headers.insert("prefer", HeaderValue::from_static("wait=30"));
        policy(State(local.clone()), Path("main".to_owned()), headers).await.status()
    }

    /// M4: polls in flight are no evidence for a restarted OPA, nor for the bundle in their response.
    #[tokio::test]
    async fn activation_is_reset_by_a_loss_or_a_new_bundle() {
        let (first, second) = (Digest::of(b"1"), Digest::of(b"2"));
        let status = Status::new(Delivery::Bundle, None);
        let local = LocalServer::new("main".to_owned(), status.clone());
        let activated = || status.with(|status| status.activated);
        local.publish(Some(bundle(first)));
        let mut flight = pin!(poll_bundle(&local, first));
        assert!(poll!(&mut flight).is_pending());
        local.wait_activated(first).await;
        local.reset_opa();
        assert!(
            poll!(pin!(local.wait_activated(first))).is_pending(),
            "the next OPA has activated nothing yet"
        );
        assert_eq!(flight.await, StatusCode::NOT_MODIFIED, "OPA must poll again");
        assert_eq!(activated(), None);

        let mut flight = pin!(poll_bundle(&local, first));
        assert!(poll!(&mut flight).is_pending());
        assert_eq!(activated(), Some(first));
        local.publish(Some(bundle(second)));
        assert_eq!(flight.await, StatusCode::OK);
        local.publish(Some(bundle(first)));
        assert!(poll!(pin!(local.wait_activated(first))).is_pending(), "OPA may be activating the second");
    }
}
