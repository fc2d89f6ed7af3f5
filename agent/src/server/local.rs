//! What the agent serves on loopback: health, and the policy bundle for its OPA, by OPA's own protocol.
//!
//! `/bundles/{name}` is the policy bundle. `/bundles/{name}/data-only` is an empty bundle that owns nothing of use:
//! OPA checks after each REST write whether data and rules collide below the roots of the bundle that it activated
//! last, and copies the data for it where a package lies beside it. So this one is given anew whenever OPA activated
//! policies, and by then owns nothing to check.
//!
//! An OPA that says of no policy bundle that it activated it may have restarted, and then has no data either. It gets
//! no policies before somebody looked: they would decide on nothing.
//!
//! A poll is the only word on what OPA has activated. It counts until OPA is given something else or is lost: polls in
//! flight end then, and OPA polls again.

use std::sync::Arc;

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

use crate::config::{GATE_MAX, LONG_POLL_MAX};
use crate::pull::PolicyBundle;
use crate::status::{self, Detail, Report, Status};

/// What the handlers share.
#[derive(Clone)]
pub struct Local(Arc<Shared>);

struct Shared {
    bundle: String,
    status: Status,
    policy: watch::Sender<Option<PolicyBundle>>,
    data_only: watch::Sender<Option<PolicyBundle>>,
    gate: watch::Sender<Gate>,
    /// Changed whenever OPA is lost.
    losses: watch::Sender<()>,
}

/// Polls by an OPA that has activated no policies, counted.
#[derive(Clone, Copy, Default)]
struct Gate {
    /// All of them.
    polls: u64,
    /// Those after which OPA was seen to hold its data.
    passed: u64,
}

impl Local {
    /// Serves `bundle`, once there is one.
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

    /// Number of polls so far by an OPA that has activated no policies.
    pub fn polls(&self) -> u64 {
        self.0.gate.borrow().polls
    }

    /// Waits until one of these polls has not passed.
    pub async fn needs_data(&self) {
        let mut gate = self.0.gate.subscribe();
        // The sender lives as long as this.
        _ = gate.wait_for(|gate| gate.passed < gate.polls).await;
    }

    /// Lets the first so many polls pass: OPA was seen to hold its data after they came.
    pub fn pass(&self, polls: u64) {
        self.0.gate.send_modify(|gate| gate.passed = gate.passed.max(polls));
    }

    /// The policy bundle that is served.
    pub fn served(&self) -> Option<PolicyBundle> {
        self.0.policy.borrow().clone()
    }

    /// Waits until OPA says that it activated these modules.
    pub async fn activated(&self, modules: Digest) {
        // Each poll that says so sends this, the same or not.
        let mut said = self.0.data_only.subscribe();
        let is_it = |_: &Option<PolicyBundle>| self.0.status.with(|status| status.activated) == Some(modules);
        // The sender lives as long as this.
        _ = said.wait_for(is_it).await;
    }

    /// Serves this policy bundle from now on; `None` if that of OPA's data is not known.
    pub fn serve(&self, policy: Option<PolicyBundle>) {
        self.0.policy.send_replace(policy);
    }

    /// Forgets what OPA said: it restarted, or may have.
    pub fn lost(&self) {
        self.0.status.with(status::State::lost);
        self.0.losses.send_replace(());
    }

    /// All that the agent answers.
    pub fn router(self) -> Router {
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

    /// Health for a listener that the cluster reaches.
    pub fn health(self) -> Router {
        self.probes(Detail::Counts)
    }

    /// Whether the process answers, whether OPA is loaded, and metrics. kube-mgmt's name for the first is `/health`.
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

/// `?verbose`: with reasons.
fn ready(report: &Report, query: Option<&str>) -> Response {
    let status = if report.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    match query {
        Some("verbose") => (status, Json(report)).into_response(),
        _ => (status, if report.ready { "ok\n".into() } else { report.because.join("\n") + "\n" })
            .into_response(),
    }
}

async fn policy(State(local): State<Local>, Path(name): Path<String>, headers: HeaderMap) -> Response {
    // What OPA sends is what it has activated; nothing, when it just started. Nobody else is asked.
    let is_opa = name == local.0.bundle
        && values(&headers, USER_AGENT.as_str()).any(|agent| agent.starts_with(OPA_AGENT));
    let activated = held(&headers).into_iter().next();
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
        let patience = wait(values(&headers, "prefer"), LONG_POLL_MAX).max(GATE_MAX);
        let passed = tokio::time::timeout(patience, gate.wait_for(|gate| gate.passed >= poll)).await;
        if passed.is_err() {
            return (StatusCode::SERVICE_UNAVAILABLE, "the data is not there yet\n").into_response();
        }
    }
    if let Some(etag) = activated.filter(|_| is_opa) {
        let mut lost = local.0.losses.subscribe();
        local.0.data_only.send_modify(|served| {
            if served.as_ref().is_none_or(|served| served.etag != etag) {
                let archive = empty_bundle(&local.0.bundle, &etag);
                *served = Some(PolicyBundle { archive, etag: etag.clone() });
            }
        });
        let answer = tokio::select! {
            biased;
            _ = lost.changed() => not_modified(&etag),
            answer = poll(&local, &name, &headers, local.0.policy.subscribe()) => answer,
        };
        if answer.status() == StatusCode::OK {
            // Until the next poll OPA decides by this or by what it was given now.
            let said: Option<Digest> = etag.parse().ok();
            local.0.status.with(|status| _ = status.activated.take_if(|activated| Some(*activated) == said));
        }
        return answer;
    }
    poll(&local, &name, &headers, local.0.policy.subscribe()).await
}

fn not_modified(tag: &str) -> Response {
    (StatusCode::NOT_MODIFIED, [(ETAG, format!("\"{tag}\""))]).into_response()
}

async fn data_only(State(local): State<Local>, Path(name): Path<String>, headers: HeaderMap) -> Response {
    poll(&local, &name, &headers, local.0.data_only.subscribe()).await
}

async fn poll(
    local: &Local,
    name: &str,
    headers: &HeaderMap,
    mut bundle: watch::Receiver<Option<PolicyBundle>>,
) -> Response {
    if name != local.0.bundle {
        return (StatusCode::NOT_FOUND, format!("this agent keeps the bundle {:?}\n", local.0.bundle))
            .into_response();
    }
    let tags = held(headers);
    let patience = wait(values(headers, "prefer"), LONG_POLL_MAX);
    let lacks =
        |bundle: &Option<PolicyBundle>| bundle.as_ref().is_some_and(|bundle| !tags.contains(&bundle.etag));
    let found = tokio::time::timeout(patience, bundle.wait_for(lacks)).await;
    let newer = found.ok().and_then(Result::ok).and_then(|bundle| bundle.clone());
    match newer {
        Some(bundle) => {
            let headers = [(CONTENT_TYPE, BUNDLE_TYPE.to_owned()), (ETAG, format!("\"{}\"", bundle.etag))];
            (headers, bundle.archive).into_response()
        }
        None if tags.is_empty() => {
            (StatusCode::SERVICE_UNAVAILABLE, "no bundle from the hub yet\n").into_response()
        }
        None => not_modified(&tags[0]),
    }
}

fn held(headers: &HeaderMap) -> Vec<String> {
    entity_tags(values(headers, IF_NONE_MATCH.as_str())).iter().map(|tag| tag.opaque.to_owned()).collect()
}

fn values<'a>(headers: &'a HeaderMap, name: &str) -> impl Iterator<Item = &'a str> {
    headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok())
}

/// A bundle of nothing, below a root that nobody else has.
fn empty_bundle(bundle: &str, revision: &str) -> Bytes {
    let manifest = Manifest {
        revision: revision.to_owned(),
        roots: vec![format!("opahub/{bundle}/data-only")],
        rego_version: None,
    };
    let manifest = serde_json::to_vec(&manifest).expect("a manifest has text keys only");
    let mut header = tar::Header::new_gnu();
    header.set_size(manifest.len() as u64);
    header.set_mode(0o644);
    let mut tar = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
    tar.append_data(&mut header, MANIFEST_FILE, &manifest[..]).expect("written into memory");
    tar.into_inner().and_then(GzEncoder::finish).expect("written into memory").into()
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

    /// A poll by an OPA that has activated these modules.
    async fn ask(local: &Local, modules: Digest) -> StatusCode {
        let mut headers = HeaderMap::new();
        headers.insert(USER_AGENT, HeaderValue::from_static("Open-Policy-Agent/1"));
        headers.insert(IF_NONE_MATCH, HeaderValue::try_from(format!("\"{modules}\"")).unwrap());
        headers.insert("prefer", HeaderValue::from_static("wait=30"));
        policy(State(local.clone()), Path("main".to_owned()), headers).await.status()
    }

    /// M4: a poll in flight says nothing of the OPA that comes after a loss, nor of what its answer brings.
    #[tokio::test]
    async fn what_opa_has_activated_is_forgotten_when_it_is_lost_or_given_more() {
        let (first, second) = (Digest::of(b"1"), Digest::of(b"2"));
        let status = Status::new(Delivery::Bundle, None);
        let local = Local::new("main".to_owned(), status.clone());
        let activated = || status.with(|status| status.activated);
        local.serve(Some(bundle(first)));
        let mut flight = pin!(ask(&local, first));
        assert!(poll!(&mut flight).is_pending());
        local.activated(first).await;
        local.lost();
        assert!(poll!(pin!(local.activated(first))).is_pending(), "the next OPA has activated nothing yet");
        assert_eq!(flight.await, StatusCode::NOT_MODIFIED, "OPA is to poll again");
        assert_eq!(activated(), None);

        let mut flight = pin!(ask(&local, first));
        assert!(poll!(&mut flight).is_pending());
        assert_eq!(activated(), Some(first));
        local.serve(Some(bundle(second)));
        assert_eq!(flight.await, StatusCode::OK);
        local.serve(Some(bundle(first)));
        assert!(poll!(pin!(local.activated(first))).is_pending(), "it may be activating the second");
    }
}
