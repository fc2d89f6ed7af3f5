//! HTTP responses of a hub over a folder: OPA's bundle protocol, reconcile, streams and invalid requests.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::ConnectInfo;
use axum::http::{HeaderMap, Request, Response, StatusCode};
use futures::StreamExt;
use opa_hub::bundle::Bundle;
use opa_hub::bundle::registry::BundleRegistry;
use opa_hub::health::Health;
use opa_hub::model::{Content, NamespaceSelector, Resource, WatchSpec};
use opa_hub::pipeline::WriterCommand;
use opa_hub::pipeline::writer::BundleWriter;
use opa_hub::policy::registry::LastGood;
use opa_hub::serve::{Hub, router};
use opa_hub::source::folder;
use opa_hub::spec::BundleSpec;
use opa_hub::store::Store;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use crate::fold::AppliedState;

/// A hub over a folder, without sockets.
struct Served {
    dir: tempfile::TempDir,
    bundle: Arc<Bundle>,
    router: axum::Router,
}

impl Served {
    async fn start() -> Self {
        let served = Self::empty();
        served.follow_folder();
        served.bundle.head().wait_for(Option::is_some).await.unwrap();
        served
            .bundle
            .archived(opa_hub::snapshot::bundle_archive::ArchiveKind::Full)
            .wait_for(Option::is_some)
            .await
            .unwrap();
        served
    }

    fn empty() -> Self {
        let bundle = Arc::new(Bundle::new("main".into(), None));
        let bundles = Arc::new(BundleRegistry::default());
        bundles.serve(bundle.clone());
        let hub = Hub::new(bundles, String::new(), Health::default(), Vec::new(), CancellationToken::new());
        Self { dir: tempfile::tempdir().unwrap(), bundle, router: router(hub) }
    }

    fn follow_folder(&self) {
        self.write("a", "x", "{\"v\": 0}");
        let feeds = vec![WatchSpec {
            resource: Resource::configmaps(),
            scope: NamespaceSelector::AllExcept { ignored: Vec::new() },
            labels: Vec::new(),
            content: Content::Data,
        }];
        let (events, queue) = mpsc::channel(16);
        let store = Arc::new(Store::new(Health::default()));
        let wanted = store.wanted();
        tokio::spawn(folder::run(self.dir.path().to_owned(), wanted, events, Health::default()));
        let spec = BundleSpec::of_feeds("main", feeds);
        let (mut writer, _) = BundleWriter::new(&spec, self.bundle.clone(), &store, Health::default());
        std::thread::spawn(move || store.run(queue));
        writer.hear(WriterCommand::RestoreLastGood(LastGood::new()));
        let (sender, receiver) = mpsc::channel(1);
        std::thread::spawn(move || writer.run(receiver));
        let bundle = self.bundle.clone();
        tokio::spawn(async move {
            // The writer runs while any event sender exists.
            let _sender = sender;
            bundle.pace().await;
        });
    }

    fn write(&self, name: &str, key: &str, value: &str) {
        let manifest = serde_json::json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": name, "namespace": "ns" }, "data": { key: value },
        });
        write(self.dir.path(), name, &manifest.to_string());
    }

    async fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Response<Body> {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let peer: SocketAddr = "127.0.0.1:1".parse().unwrap();
        let request = request.extension(ConnectInfo(peer)).body(Body::from(body.to_vec())).unwrap();
        self.router.clone().oneshot(request).await.unwrap()
    }

    async fn get(&self, path: &str, headers: &[(&str, &str)]) -> (StatusCode, HeaderMap, Bytes) {
        let (parts, body) = self.send("GET", path, headers, b"").await.into_parts();
        (parts.status, parts.headers, axum::body::to_bytes(body, usize::MAX).await.unwrap())
    }

    /// Waits for a revision other than this.
    async fn changes_from(&self, revision: &str) {
        let changed = |edition: &Option<Arc<opa_hub::bundle::CachedSnapshot>>| {
            edition.as_ref().is_some_and(|edition| edition.view.revision.to_string() != revision)
        };
        self.bundle
            .archived(opa_hub::snapshot::bundle_archive::ArchiveKind::Full)
            .wait_for(changed)
            .await
            .unwrap();
    }
}

fn write(dir: &Path, name: &str, text: &str) {
    // Atomic, as editors do, so that no reader sees a partial file.
    std::fs::write(dir.join("draft"), text).unwrap();
    std::fs::rename(dir.join("draft"), dir.join(format!("{name}.json"))).unwrap();
}

fn tag(headers: &HeaderMap) -> String {
    headers["etag"].to_str().unwrap().trim_matches('"').to_owned()
}

#[tokio::test]
async fn bundle_responses_follow_opas_protocol() {
    let served = Served::start().await;
    for path in ["/bundles/main", "/bundles/main/data", "/bundles/main/policy"] {
        let (status, headers, body) = served.get(path, &[]).await;
        assert_eq!(status, StatusCode::OK);
        assert_eq!(headers["content-type"], "application/vnd.openpolicyagent.bundles");
        assert_eq!(headers["content-length"], body.len().to_string().as_str());
        assert!(!headers.contains_key("content-encoding"));
        let etag = tag(&headers);
        for known in [format!("\"{etag}\""), format!("W/\"{etag}\""), format!("\"newer\", \"{etag}\"")] {
            let (status, headers, body) = served.get(path, &[("if-none-match", &known)]).await;
            assert_eq!((status, body.len()), (StatusCode::NOT_MODIFIED, 0));
            assert_eq!(headers["etag"], known.split(", ").next().unwrap(), "304 repeats the client's tag");
        }
        let other =
            served.get(path, &[("if-none-match", "\"other\""), ("prefer", "modes=snapshot,delta;wait=300")]);
        assert_eq!(other.await.0, StatusCode::OK, "other revisions get an immediate response");
    }
    assert_eq!(served.get("/bundles/other", &[]).await.0, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn long_poll_ends_on_change_or_timeout() {
    let served = Served::start().await;
    let (_, headers, _) = served.get("/bundles/main", &[]).await;
    let known = format!("\"{}\"", tag(&headers));
    let started = std::time::Instant::now();
    let (status, ..) = served.get("/bundles/main", &[("if-none-match", &known), ("prefer", "wait=1")]).await;
    assert_eq!(status, StatusCode::NOT_MODIFIED);
    assert!(started.elapsed().as_secs_f32() >= 1.0, "no 304 before the timeout");
    let headers = [("if-none-match", known.as_str()), ("prefer", "wait=300")];
    let poll = served.get("/bundles/main", &headers);
    let policy = served.get("/bundles/main/policy", &[("prefer", "wait=300")]);
    served.write("a", "x", "{\"v\": 1}");
    let (status, headers, body) = poll.await;
    assert_eq!(status, StatusCode::OK);
    assert_ne!(format!("\"{}\"", tag(&headers)), known);
    let mut read = AppliedState::empty();
    read.archive(&body);
    assert_eq!(read.data["ns"]["a"]["x"]["v"], 1);
    assert_eq!(policy.await.0, StatusCode::OK);
}

#[tokio::test]
async fn i5_nothing_is_served_before_the_first_list() {
    let served = Served::empty();
    for path in ["/bundles/main", "/bundles/main/stream", "/readyz"] {
        assert_eq!(served.get(path, &[]).await.0, StatusCode::SERVICE_UNAVAILABLE, "{path}");
    }
    let answer = served.send("POST", "/bundles/main/reconcile", &[], b"{\"dirs\":{}}").await;
    assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
    let first = served.get("/bundles/main", &[("prefer", "wait=300")]);
    let (answer, ()) = futures::join!(first, async { served.follow_folder() });
    assert_eq!(answer.0, StatusCode::OK, "waiting client gets the first snapshot");
    assert_eq!(served.get("/livez", &[]).await.0, StatusCode::OK);
}

#[tokio::test]
async fn stream_resumes_from_the_clients_revision() {
    let served = Served::start().await;
    let (_, _, body) = served.get("/bundles/main", &[]).await;
    let mut applied = AppliedState::empty();
    applied.archive(&body);
    let before = applied.revision().to_string();
    served.write("a", "x", "{\"v\": 1}");
    served.changes_from(&before).await;
    let answer = served.send("GET", "/bundles/main/stream", &[("last-event-id", &before)], b"").await;
    assert_eq!(answer.headers()["content-type"], "text/event-stream");
    let mut stream = answer.into_body().into_data_stream();
    applied.events(&stream.next().await.unwrap().unwrap());
    assert_eq!(applied.data["ns"]["a"]["x"]["v"], 1);
    let greeting = format!(": bundle main\nid: {}\n\n", applied.revision());
    assert_eq!(stream.next().await.unwrap().unwrap(), greeting, "synced comment after the frames");
    served.write("b", "y", "{\"v\": 2}");
    applied.events(&stream.next().await.unwrap().unwrap());
    assert_eq!(applied.data["ns"]["b"]["y"]["v"], 2);
    drop(stream);
    let metrics = served.get("/metrics", &[]).await.2;
    assert!(String::from_utf8_lossy(&metrics).contains("opa_hub_agents{bundle=\"main\"} 0"));
    let unknown = format!("{}-{}", "0".repeat(32), "1".repeat(32));
    for (since, status) in [
        (unknown.as_str(), StatusCode::GONE),
        ("x", StatusCode::BAD_REQUEST),
        ("\"", StatusCode::BAD_REQUEST),
    ] {
        assert_eq!(
            served.get("/bundles/main/stream", &[("last-event-id", since)]).await.0,
            status,
            "{since}"
        );
    }
}

/// Fields of newer agents are optional.
#[tokio::test]
async fn reconcile_accepts_requests_of_older_agents() {
    let served = Served::start().await;
    let answer = served.send("POST", "/bundles/main/reconcile", &[], b"{\"dirs\":{}}").await;
    assert_eq!(answer.status(), StatusCode::OK);
}

/// I9: the reconcile endpoint never panics; every request is accepted or rejected.
#[tokio::test]
async fn i9_reconcile_survives_any_request() {
    let served = Served::start().await;
    let mut random = fastrand::Rng::with_seed(9);
    let valid = br#"{"dirs":{"/ns/a":"00000000000000000000000000000000"},"modules":{"a/b/c":"00000000000000000000000000000000"}}"#;
    let (mut taken, mut refused) = (0, 0);
    for round in 0..2000 {
        let mut body = valid.to_vec();
        for _ in 0..round % 4 {
            let index = random.usize(..body.len());
            body[index] = random.u8(..);
        }
        if round % 5 == 4 {
            body.truncate(random.usize(..body.len()));
        }
        match served.send("POST", "/bundles/main/reconcile", &[], &body).await.status() {
            StatusCode::OK => taken += 1,
            StatusCode::BAD_REQUEST => refused += 1,
            status => panic!("{status} for {}", String::from_utf8_lossy(&body)),
        }
    }
    assert!(taken > 100 && refused > 100, "{taken} taken, {refused} refused");
    let huge = vec![b' '; opa_hub_proto::reconcile::RECONCILE_BYTES_MAX + 1];
    let answer = served.send("POST", "/bundles/main/reconcile", &[], &huge).await;
    assert_eq!(answer.status(), StatusCode::PAYLOAD_TOO_LARGE);
}
