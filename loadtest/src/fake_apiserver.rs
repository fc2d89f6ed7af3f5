//! A fake API server with pods. Real ones reach only 100 changes per second on two cores.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use futures::{Stream, StreamExt as _, stream};
use opa_hub_loadtest::pods::Nth;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

const WATCH_SECONDS: u64 = 300;

pub(crate) struct FakeApiServer {
    pub(crate) kubeconfig: PathBuf,
    pods: Pods,
    server: JoinHandle<()>,
}

#[derive(Clone)]
struct Pods(Arc<Shared>);

type PodFactory = fn(usize, u64, u64) -> Value;

struct Shared {
    factory: PodFactory,
    state: Mutex<Store>,
    events: watch::Sender<usize>,
}

#[derive(Default)]
struct Store {
    pods: BTreeMap<usize, Value>,
    events: VecDeque<Bytes>,
    /// Number of evicted events.
    evicted: usize,
}

/// Half a minute of the fastest runs.
const EVENTS_MAX: usize = 50_000;

impl Store {
    fn version(&self) -> usize {
        self.evicted + self.events.len()
    }
}

impl FakeApiServer {
    /// Pods have about 300 bytes.
    pub(crate) async fn start(dir: &Path, pods: usize) -> anyhow::Result<Self> {
        Self::start_with(dir, pods, small_pod).await
    }

    pub(crate) async fn start_with(dir: &Path, pods: usize, factory: PodFactory) -> anyhow::Result<Self> {
        let shared = Shared { factory, state: Mutex::default(), events: watch::Sender::new(0) };
        let served = Pods(Arc::new(shared));
        (0..pods).for_each(|pod| served.put(pod, 0));
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let kubeconfig = dir.join("stub.kubeconfig");
        let text = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "stub",
            "contexts": [{ "name": "stub", "context": { "cluster": "stub", "user": "stub" } }],
            "clusters": [{ "name": "stub", "cluster": { "server": format!("http://{}", listener.local_addr()?) } }],
            "users": [{ "name": "stub", "user": {} }],
        });
        std::fs::write(&kubeconfig, text.to_string())?;
        let router = Router::new()
            .route("/api/v1", get(resources))
            .route("/api/v1/pods", get(list_or_watch_pods))
            .route("/api/v1/configmaps", get(list_or_watch_configmaps))
            .fallback(not_found)
            .with_state(served.clone());
        let server = tokio::spawn(async move { _ = axum::serve(listener, router).await });
        Ok(Self { kubeconfig, pods: served, server })
    }

    /// Pods as expected at `data.kubernetes.pods`.
    pub(crate) fn pods(&self) -> Value {
        let store = self.pods.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all = json!({});
        for pod in store.pods.values() {
            let metadata = |field: &str| pod["metadata"][field].as_str().unwrap_or_default().to_owned();
            all[metadata("namespace")][metadata("name")] = pod.clone();
        }
        all
    }

    pub(crate) fn status_path(&self, pod: usize) -> String {
        let object = (self.pods.0.factory)(pod, 0, 0);
        let metadata = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
        format!("/kubernetes/pods/{}/{}/status", metadata("namespace"), metadata("name"))
    }

    pub(crate) fn change(&self, pod: usize, number: u64) {
        self.pods.put(pod, number);
    }
}

impl Drop for FakeApiServer {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Pods {
    fn put(&self, pod: usize, number: u64) {
        let mut store = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        let object = (self.0.factory)(pod, number, store.version() as u64 + 1);
        let kind = if store.pods.contains_key(&pod) { "MODIFIED" } else { "ADDED" };
        // In an API server's field order.
        store.events.push_back(format!("{{\"type\":\"{kind}\",\"object\":{object}}}\n").into());
        store.pods.insert(pod, object);
        if store.events.len() > EVENTS_MAX {
            store.events.pop_front();
            store.evicted += 1;
        }
        self.0.events.send_replace(store.version());
    }

    fn list(&self) -> Value {
        let store = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        let items: Vec<_> = store.pods.values().cloned().collect();
        list("PodList", &items, store.version())
    }

    /// Events from index `from` and their new count; `None` if some were evicted.
    fn events_from(&self, from: usize) -> Option<(Bytes, usize)> {
        let store = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        let events: Vec<_> = store.events.iter().skip(from.checked_sub(store.evicted)?).cloned().collect();
        Some((events.concat().into(), store.version()))
    }
}

pub(crate) fn small_pod(pod: usize, number: u64, version: u64) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": format!("web-{pod:05}"), "namespace": format!("team-{:03}", pod / 100),
            "resourceVersion": version.to_string(), "labels": { "app": "web", "round": number.to_string() },
        },
        "status": { "phase": "Running", "podIP": format!("10.0.{}.{}", pod / 256, pod % 256) },
    })
}

pub(crate) fn large_pod(pod: usize, number: u64, version: u64) -> Value {
    let mut object = Nth(pod).served();
    object["metadata"]["resourceVersion"] = version.to_string().into();
    object["metadata"]["labels"]["round"] = number.to_string().into();
    // The hub drops these.
    object["metadata"].as_object_mut().and_then(|metadata| metadata.remove("managedFields"));
    object
}

async fn resources() -> Json<Value> {
    let resource = |name: &str, kind: &str| json!({ "name": name, "singularName": "", "namespaced": true, "kind": kind, "verbs": ["list", "watch"] });
    Json(json!({
        "kind": "APIResourceList", "groupVersion": "v1",
        "resources": [resource("pods", "Pod"), resource("configmaps", "ConfigMap")],
    }))
}

async fn list_or_watch_pods(
    State(pods): State<Pods>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Response {
    if query.contains_key("sendInitialEvents") {
        return (StatusCode::UNPROCESSABLE_ENTITY, "no streaming lists here").into_response();
    }
    if !query.contains_key("watch") {
        return Json(pods.list()).into_response();
    }
    let from = query.get("resourceVersion").and_then(|version| version.parse().ok()).unwrap_or_default();
    if pods.events_from(from).is_none() {
        return (StatusCode::GONE, Json(error_status(410, "Expired", "too old"))).into_response();
    }
    let event_count = pods.0.events.subscribe();
    let events = stream::unfold((pods, event_count, from), |(pods, mut event_count, from)| async move {
        event_count.wait_for(|count| *count > from).await.ok()?;
        let (bytes, count) = pods.events_from(from)?;
        Some((Ok::<_, Infallible>(bytes), (pods, event_count, count)))
    });
    watch_response(&query, events)
}

async fn list_or_watch_configmaps(Query(query): Query<BTreeMap<String, String>>) -> Response {
    if query.contains_key("sendInitialEvents") {
        return (StatusCode::UNPROCESSABLE_ENTITY, "no streaming lists here").into_response();
    }
    if !query.contains_key("watch") {
        return Json(list("ConfigMapList", &[], 1)).into_response();
    }
    watch_response(&query, stream::pending())
}

async fn not_found() -> Response {
    (StatusCode::NOT_FOUND, Json(error_status(404, "NotFound", "only pods are served here"))).into_response()
}

fn error_status(code: u16, reason: &str, message: &str) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code, "message": message,
    })
}

/// An orderly end proves that the server is alive.
fn watch_response(
    query: &BTreeMap<String, String>,
    events: impl Stream<Item = Result<Bytes, Infallible>> + Send + 'static,
) -> Response {
    let seconds = query.get("timeoutSeconds").and_then(|seconds| seconds.parse().ok());
    let end = tokio::time::sleep(Duration::from_secs(seconds.unwrap_or(WATCH_SECONDS)));
    ([("content-type", "application/json")], Body::from_stream(events.take_until(end))).into_response()
}

fn list(kind: &str, items: &[Value], version: usize) -> Value {
    json!({ "kind": kind, "apiVersion": "v1", "metadata": { "resourceVersion": version.to_string() }, "items": items })
}
