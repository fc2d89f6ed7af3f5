//! Isolation between clients: slow or silent connections over real sockets, and requests that copy a snapshot.

use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, StatusCode};
use futures::future::join_all;
use opa_hub::bundle::Bundle;
use opa_hub::bundle::cache::{RECONCILE_CACHE_BYTES_MAX, RECONCILE_ENCODES_MAX, RECONCILE_LIVE_MAX};
use opa_hub::bundle::registry::BundleRegistry;
use opa_hub::health::Health;
use opa_hub::model::Replicated;
use opa_hub::serve::{self, Hub, Limits};
use opa_hub::snapshot::bundle_archive::ArchiveKind;
use opa_hub::snapshot::history::BundleLimits;
use opa_hub::snapshot::history::History;
use opa_hub::snapshot::{Batch, Snapshot};
use opa_hub_proto::position::Bounds;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

/// Test failure timeout, longer than any limit.
const PATIENCE: Duration = Duration::from_secs(60);

/// Creates a bundle with one snapshot of `entries` copies of `json`.
fn bundle(entries: usize, json: &str) -> Arc<Bundle> {
    let bundle = Arc::new(Bundle::new("main".into(), None));
    publish(&bundle, &Snapshot::empty(Arc::new([]), None), entries, json);
    bundle
}

fn publish(bundle: &Bundle, before: &Snapshot, entries: usize, json: &str) {
    let (mut batch, value) = (Batch::default(), bytes::Bytes::from(json.to_owned()));
    for entry in 0..entries {
        batch.entry(&"/ns/m".parse().unwrap(), format!("k{entry}"), Some(value.clone()));
    }
    let (view, changed) = before.apply(batch).unwrap();
    let mut log = History::new(BundleLimits::default());
    log.push(before.revision, changed, false);
    bundle.publish(view, log, Bounds::default());
}

fn hub(bundle: &Arc<Bundle>, stop: CancellationToken) -> Hub {
    let bundles = Arc::new(BundleRegistry::default());
    bundles.serve(Arc::clone(bundle));
    Hub::new(bundles, String::new(), Health::default(), Vec::new(), stop)
}

struct Listening {
    bundle: Arc<Bundle>,
    address: SocketAddr,
    health: SocketAddr,
    stop: CancellationToken,
    server: JoinHandle<std::io::Result<()>>,
}

impl Listening {
    async fn start(limits: Limits) -> Self {
        let (bundle, stop) = (bundle(1, "1"), CancellationToken::new());
        let hub = hub(&bundle, stop.clone()).with_limits(limits);
        let paced = Arc::clone(&bundle);
        tokio::spawn(async move { paced.pace().await });
        bundle.archived(ArchiveKind::Full).wait_for(Option::is_some).await.unwrap();
        let bind = async || TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (listener, other) = (bind().await, bind().await);
        let (address, health) = (listener.local_addr().unwrap(), other.local_addr().unwrap());
        tokio::spawn(serve::run_health(other, hub.clone()));
        let server = tokio::spawn(serve::run(listener, hub));
        Self { bundle, address, health, stop, server }
    }

    async fn send(&self, request: &str) -> TcpStream {
        send(self.address, request).await
    }
}

async fn send(address: SocketAddr, request: &str) -> TcpStream {
    let mut tcp = TcpStream::connect(address).await.unwrap();
    tcp.write_all(request.as_bytes()).await.unwrap();
    tcp
}

async fn to_end(mut tcp: TcpStream) -> String {
    let mut read = Vec::new();
    tokio::time::timeout(PATIENCE, tcp.read_to_end(&mut read)).await.expect("connection is closed").unwrap();
    String::from_utf8(read).unwrap()
}

async fn until(tcp: &mut TcpStream, end: &str) -> String {
    let mut read = Vec::new();
    while !String::from_utf8_lossy(&read).contains(end) {
        let byte = tokio::time::timeout(PATIENCE, tcp.read_u8()).await;
        let byte = byte.unwrap_or_else(|_| panic!("no {end:?} in {:?}", String::from_utf8_lossy(&read)));
        read.push(byte.unwrap());
    }
    String::from_utf8(read).unwrap()
}

fn limits(milliseconds: u64, connections: usize) -> Limits {
    let limit = Duration::from_millis(milliseconds);
    Limits { head: limit, body: limit, connections }
}

#[tokio::test]
async fn slow_clients_are_disconnected() {
    let hub = Listening::start(limits(200, 64)).await;
    let (main, health) = (hub.address, hub.health);
    let reconcile = "POST /bundles/main/reconcile HTTP/1.1\r\nhost: x\r\ncontent-length: 16777216\r\n\r\n{";
    let clients = [
        (main, "", "", ""),
        (main, "GET /livez HT", "", ""),
        (main, "GET /bundles/main/stream HTTP/1.1\r\nhost", "", ""),
        (main, "GET /livez HTTP/1.1\r\nhost: x\r\n\r\n", "HTTP/1.1 200 ", "ok\n"),
        (
            main,
            "GET /livez HTTP/1.1\r\nhost: x\r\ncontent-length: 16777216\r\n\r\nx",
            "HTTP/1.1 200 ",
            "ok\n",
        ),
        (main, reconcile, "HTTP/1.1 408 ", "send all of the body within that time\"}"),
        (health, "", "", ""),
        (health, "GET /readyz HT", "", ""),
        (health, "GET /livez HTTP/1.1\r\nhost: x\r\n\r\n", "HTTP/1.1 200 ", "ok\n"),
    ];
    join_all(clients.map(|(address, request, begin, end)| async move {
        let response = to_end(send(address, request).await).await;
        assert!(response.starts_with(begin) && response.ends_with(end), "{request:?}: {response:?}");
        assert_eq!(response.is_empty(), begin.is_empty(), "{request:?}: {response:?}");
    }))
    .await;
}

#[tokio::test]
async fn long_polls_and_streams_exceed_request_timeouts() {
    let hub = Listening::start(limits(700, 64)).await;
    let head = hub.bundle.head().borrow().clone().unwrap();
    // axum serves a connection's second request.
    let mut stream = hub.send("GET /livez HTTP/1.1\r\nhost: x\r\n\r\n").await;
    until(&mut stream, "ok\n").await;
    stream.write_all(b"GET /bundles/main/stream HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    until(&mut stream, ": bundle main\n").await;
    let poll = format!(
        "GET /bundles/main HTTP/1.1\r\nhost: x\r\nif-none-match: \"{}\"\r\nprefer: wait=1\r\n\r\n",
        head.view.revision
    );
    assert!(to_end(hub.send(&poll).await).await.starts_with("HTTP/1.1 304 "));
    publish(&hub.bundle, &head.view, 1, "2");
    until(&mut stream, "event: delta").await;
}

#[tokio::test]
async fn full_listener_accepts_streams_and_recovers() {
    let hub = Listening::start(limits(300, 1)).await;
    let mut idle = hub.send("GET /v1/bundles HTTP/1.1\r\nhost: x\r\n\r\n").await;
    until(&mut idle, "\"problems\":[]}").await;
    let mut stream = hub.send("GET /bundles/main/stream HTTP/1.1\r\nhost: x\r\n\r\n").await;
    until(&mut stream, ": bundle main\n").await;
    // Probes have a separate connection limit.
    let mut probe = hub.send("GET /livez HTTP/1.1\r\nhost: x\r\n\r\n").await;
    until(&mut probe, "ok\n").await;
    let next = to_end(hub.send("GET /v1/bundles HTTP/1.1\r\nhost: x\r\n\r\n").await).await;
    assert!(next.starts_with("HTTP/1.1 200 "), "{next}");
    assert_eq!(to_end(idle).await, "");
}

#[tokio::test]
async fn excess_connection_gets_503() {
    let hub = Listening::start(limits(60_000, 1)).await;
    let mut stream = hub.send("GET /bundles/main/stream HTTP/1.0\r\n\r\n").await;
    until(&mut stream, ": bundle main\n").await;
    let refused = to_end(hub.send("GET /v1/bundles HTTP/1.1\r\nhost: x\r\n\r\n").await).await;
    assert!(refused.starts_with("HTTP/1.1 503 ") && refused.contains("retry later"), "{refused}");
}

#[tokio::test]
async fn nearly_full_listener_disables_keep_alive() {
    let hub = Listening::start(limits(60_000, 4)).await;
    let request = "GET /v1/bundles HTTP/1.1\r\nhost: x\r\n\r\n";
    let mut connections = Vec::new();
    for _ in 0..2 {
        let mut tcp = hub.send(request).await;
        until(&mut tcp, "\"problems\":[]}").await;
        connections.push(tcp);
    }
    assert!(to_end(hub.send(request).await).await.contains("connection: close\r\n"));
}

#[tokio::test]
async fn shutdown_closes_idle_connections_and_finishes_responses() {
    let Listening { address, stop, server, .. } = Listening::start(limits(60_000, 64)).await;
    let first = "GET /livez HTTP/1.1\r\nhost: x\r\n\r\n";
    let (mut idle, mut stream) = (send(address, first).await, send(address, first).await);
    until(&mut idle, "ok\n").await;
    until(&mut stream, "ok\n").await;
    stream.write_all(b"GET /bundles/main/stream HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    until(&mut stream, ": bundle main\n").await;
    stop.cancel();
    assert_eq!(to_end(idle).await, "");
    let rest = to_end(stream).await;
    assert!(rest.ends_with("\r\n0\r\n\r\n"), "last chunk is missing: {rest:?}");
    tokio::time::timeout(PATIENCE, server).await.unwrap().unwrap().unwrap();
}

async fn ask(router: &axum::Router, method: &str, path: &str, body: String) -> (StatusCode, Body) {
    let request = Request::builder().method(method).uri(path).body(Body::from(body)).unwrap();
    let (parts, body) = router.clone().oneshot(request).await.unwrap().into_parts();
    (parts.status, body)
}

async fn reconcile(router: &axum::Router, dir: &str) -> (StatusCode, Body) {
    let body = format!("{{\"dirs\":{{\"/gone/{dir}\":\"{}\"}}}}", "0".repeat(32));
    ask(router, "POST", "/bundles/main/reconcile", body).await
}

#[tokio::test]
async fn reconcile_responses_use_bounded_memory() {
    const ENTRY: usize = 64 << 10;
    const ENTRIES: usize = 320;
    // Random text repeats beyond deflate's window.
    let mut random = fastrand::Rng::with_seed(16);
    let text: String = (0..ENTRY).map(|_| random.alphanumeric()).collect();
    let bundle = bundle(ENTRIES, &format!("\"{text}\""));
    let router = serve::router(hub(&bundle, CancellationToken::new()));
    let live = || bundle.counters.answer_bytes.load(Relaxed);
    let requests = (0..60).map(|index| format!("d{index}")).collect::<Vec<_>>();
    let answers = join_all(requests.iter().map(|dir| reconcile(&router, dir))).await;
    let answered = answers.iter().filter(|(status, _)| *status == StatusCode::OK).count();
    assert!(answered > 0 && answered < answers.len(), "{answered} answered");
    assert!(live() > RECONCILE_LIVE_MAX, "{} in flight", live());
    assert!(live() <= RECONCILE_LIVE_MAX + RECONCILE_ENCODES_MAX * ENTRY * ENTRIES, "{} in flight", live());
    for (status, body) in answers {
        if status != StatusCode::OK {
            assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
            let error = axum::body::to_bytes(body, ENTRY).await.unwrap();
            assert!(String::from_utf8_lossy(&error).contains("retry later"), "{error:?}");
        }
    }
    assert!(live() <= RECONCILE_CACHE_BYTES_MAX, "{} cached", live());
    assert_eq!(reconcile(&router, "d60").await.0, StatusCode::OK);
}

#[tokio::test]
async fn equal_requests_share_one_encoding() {
    let bundle = bundle(1000, "{\"a\": 1}");
    let router = serve::router(hub(&bundle, CancellationToken::new()));
    let dirs = ["a", "b", "c"];
    let storm = (0..3000).map(|index| reconcile(&router, dirs[index % dirs.len()]));
    for (status, _) in join_all(storm).await {
        assert_eq!(status, StatusCode::OK);
    }
    assert_eq!(bundle.counters.reconcile_encodes.load(Relaxed), 3);
}

#[tokio::test]
async fn field_costs_are_measured_one_request_at_a_time() {
    const REQUESTS: usize = 4;
    let bundle = bundle(1, "1");
    let (running, entered) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (release, released) = mpsc::channel();
    let released = Mutex::new(released);
    let (inside, ever) = (Arc::clone(&running), Arc::clone(&entered));
    bundle.set_objects(Box::new(move || {
        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "no concurrent measurement");
        ever.fetch_add(1, Ordering::SeqCst);
        released.lock().unwrap().recv().unwrap();
        inside.fetch_sub(1, Ordering::SeqCst);
        Replicated::default()
    }));
    let router = serve::router(hub(&bundle, CancellationToken::new()));
    let requests =
        join_all((0..REQUESTS).map(|_| ask(&router, "GET", "/v1/bundles/main/fields", String::new())));
    let releases = async {
        for count in 1..=REQUESTS {
            while entered.load(Ordering::SeqCst) < count {
                tokio::task::yield_now().await;
            }
            // Other requests are served concurrently.
            assert_eq!(ask(&router, "GET", "/v1/bundles", String::new()).await.0, StatusCode::OK);
            release.send(()).unwrap();
        }
    };
    let (answers, ()) = tokio::join!(requests, releases);
    assert!(answers.iter().all(|(status, _)| *status == StatusCode::OK));
    assert_eq!(running.load(Ordering::SeqCst), 0);
}
