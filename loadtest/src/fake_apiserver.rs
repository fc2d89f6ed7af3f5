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

type Make = fn(usize, u64, u64) -> Value;

struct Shared {
    make: Make,
    state: Mutex<World>,
    events: watch::Sender<usize>,
}

#[derive(Default)]
struct World {
    pods: BTreeMap<usize, Value>,
    events: VecDeque<Bytes>,
    /// Number of evicted events.
    gone: usize,
}

/// Half a minute of the fastest runs.
const EVENTS_MAX: usize = 50_000;

impl World {
    fn version(&self) -> usize {
        self.gone + self.events.len()
    }
}

impl FakeApiServer {
    /// Pods have about 300 bytes.
    pub(crate) async fn start(dir: &Path, pods: usize) -> anyhow::Result<Self> {
        Self::of(dir, pods, object).await
    }

    pub(crate) async fn of(dir: &Path, pods: usize, make: Make) -> anyhow::Result<Self> {
        let shared = Shared { make, state: Mutex::default(), events: watch::Sender::new(0) };
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
            .route("/api/v1/pods", get(pods_of))
            .route("/api/v1/configmaps", get(none))
            .fallback(unknown)
            .with_state(served.clone());
        let server = tokio::spawn(async move { _ = axum::serve(listener, router).await });
        Ok(Self { kubeconfig, pods: served, server })
    }

    /// Pods as expected at `data.kubernetes.pods`.
    pub(crate) fn pods(&self) -> Value {
        let world = self.pods.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all = json!({});
        for pod in world.pods.values() {
            let of = |field: &str| pod["metadata"][field].as_str().unwrap_or_default().to_owned();
            all[of("namespace")][of("name")] = pod.clone();
        }
        all
    }

    pub(crate) fn path(&self, pod: usize) -> String {
        let object = (self.pods.0.make)(pod, 0, 0);
        let of = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
        format!("/kubernetes/pods/{}/{}/status", of("namespace"), of("name"))
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
        let mut world = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        let object = (self.0.make)(pod, number, world.version() as u64 + 1);
        let kind = if world.pods.contains_key(&pod) { "MODIFIED" } else { "ADDED" };
        // In an API server's field order.
        world.events.push_back(format!("{{\"type\":\"{kind}\",\"object\":{object}}}\n").into());
        world.pods.insert(pod, object);
        if world.events.len() > EVENTS_MAX {
            world.events.pop_front();
            world.gone += 1;
        }
        self.0.events.send_replace(world.version());
    }

    fn list(&self) -> Value {
        let world = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        let items: Vec<_> = world.pods.values().cloned().collect();
        list("PodList", &items, world.version())
    }

    /// Events from index `from` and their new count; `None` if some were evicted.
    fn after(&self, from: usize) -> Option<(Bytes, usize)> {
        let world = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        let news: Vec<_> = world.events.iter().skip(from.checked_sub(world.gone)?).cloned().collect();
        Some((news.concat().into(), world.version()))
    }
}

pub(crate) fn object(pod: usize, number: u64, version: u64) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": format!("web-{pod:05}"), "namespace": format!("team-{:03}", pod / 100),
            "resourceVersion": version.to_string(), "labels": { "app": "web", "round": number.to_string() },
        },
        "status": { "phase": "Running", "podIP": format!("10.0.{}.{}", pod / 256, pod % 256) },
    })
}

pub(crate) fn large_object(pod: usize, number: u64, version: u64) -> Value {
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

async fn pods_of(State(pods): State<Pods>, Query(asked): Query<BTreeMap<String, String>>) -> Response {
    if asked.contains_key("sendInitialEvents") {
        return (StatusCode::UNPROCESSABLE_ENTITY, "no streaming lists here").into_response();
    }
    if !asked.contains_key("watch") {
        return Json(pods.list()).into_response();
    }
    let from = asked.get("resourceVersion").and_then(|version| version.parse().ok()).unwrap_or_default();
    if pods.after(from).is_none() {
        return (StatusCode::GONE, Json(refusal(410, "Expired", "too old"))).into_response();
    }
    let news = pods.0.events.subscribe();
    let events = stream::unfold((pods, news, from), |(pods, mut news, from)| async move {
        news.wait_for(|count| *count > from).await.ok()?;
        let (bytes, count) = pods.after(from)?;
        Some((Ok::<_, Infallible>(bytes), (pods, news, count)))
    });
    watched(&asked, events)
}

async fn none(Query(asked): Query<BTreeMap<String, String>>) -> Response {
    if asked.contains_key("sendInitialEvents") {
        return (StatusCode::UNPROCESSABLE_ENTITY, "no streaming lists here").into_response();
    }
    if !asked.contains_key("watch") {
        return Json(list("ConfigMapList", &[], 1)).into_response();
    }
    watched(&asked, stream::pending())
}

async fn unknown() -> Response {
    (StatusCode::NOT_FOUND, Json(refusal(404, "NotFound", "only pods are served here"))).into_response()
}

fn refusal(code: u16, reason: &str, message: &str) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code, "message": message,
    })
}

/// An orderly end proves that the server is alive.
fn watched(
    asked: &BTreeMap<String, String>,
    events: impl Stream<Item = Result<Bytes, Infallible>> + Send + 'static,
) -> Response {
    let seconds = asked.get("timeoutSeconds").and_then(|seconds| seconds.parse().ok());
    let end = tokio::time::sleep(Duration::from_secs(seconds.unwrap_or(WATCH_SECONDS)));
    ([("content-type", "application/json")], Body::from_stream(events.take_until(end))).into_response()
}

fn list(kind: &str, items: &[Value], version: usize) -> Value {
    json!({ "kind": kind, "apiVersion": "v1", "metadata": { "resourceVersion": version.to_string() }, "items": items })
}
