//! Sessions with a faulty OPA and hub.

use std::collections::BTreeMap;
use std::future::pending;
use std::io::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header::ETAG;
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse as _, Response};
use flate2::write::GzEncoder;
use futures::{StreamExt as _, stream};
use opa_hub_agent::archive::Piece;
use opa_hub_agent::config::{Config, Delivery, OpaConfig};
use opa_hub_agent::opa::Marker;
use opa_hub_agent::server::LocalServer;
use opa_hub_agent::state::{Meta, StateStore};
use opa_hub_agent::status::Status;
use opa_hub_agent::sync::Replica;
use opa_hub_proto::frame::{DELTA_EVENT, Delta, write_event};
use opa_hub_proto::head::{DataHead, Head};
use opa_hub_proto::position::Position;
use opa_hub_proto::reconcile::Reconcile;
use opa_hub_proto::revision::{Digest, Revision, data_digest};
use reqwest::Url;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;

/// Less than any wait for a hub.
const DETECTION_TIMEOUT: Duration = Duration::from_secs(4);
const TEST_TIMEOUT: Duration = Duration::from_secs(60);

const MARKER: &str = "/system/opahub/main";

#[derive(Default)]
struct Opa {
    marker: Option<Value>,
    /// Whether the revision never matches.
    is_shared: bool,
    claims: usize,
    /// Operations on data.
    ops: Vec<(String, String)>,
}

impl Opa {
    fn patch(&mut self, ops: &[Value]) -> Result<(), String> {
        let mut marker = self.marker.clone();
        let mut others = Vec::new();
        for op in ops {
            let (kind, path) = (op["op"].as_str().unwrap(), op["path"].as_str().unwrap());
            let Some(below) = path.strip_prefix(MARKER) else {
                others.push((kind.to_owned(), path.to_owned()));
                continue;
            };
            self.claims += usize::from(below == "/writer");
            if below.is_empty() {
                marker = Some(op["value"].clone());
                continue;
            }
            let (parent, key) = below.rsplit_once('/').unwrap();
            let key = key.replace("~1", "/").replace("~0", "~");
            let parent = marker.as_mut().and_then(|marker| marker.pointer_mut(parent));
            let parent = parent.and_then(Value::as_object_mut).ok_or(path)?;
            if kind != "add" && !parent.contains_key(&key) {
                return Err(path.to_owned());
            }
            match op.get("value") {
                Some(value) => _ = parent.insert(key, value.clone()),
                None => _ = parent.remove(&key),
            }
        }
        self.marker = marker;
        self.ops.extend(others);
        Ok(())
    }

    fn compile(&self, query: &str) -> bool {
        let Some(marker) = &self.marker else { return false };
        match query.split_once(".revision == ") {
            Some((_, revision)) => {
                let revision: Value = serde_json::from_str(revision).unwrap();
                !self.is_shared && marker["revision"] == revision
            }
            None => true,
        }
    }
}

type Shared = Arc<watch::Sender<Opa>>;

fn answer(opa: &watch::Sender<Opa>, method: Method, uri: &Uri, body: &[u8]) -> Response {
    let json: Value = serde_json::from_slice(body).unwrap_or_default();
    if method == Method::PATCH {
        let mut patched = Ok(());
        opa.send_modify(|opa| patched = opa.patch(json.as_array().unwrap()));
        return match patched {
            Ok(()) => StatusCode::NO_CONTENT.into_response(),
            Err(path) => (StatusCode::NOT_FOUND, path).into_response(),
        };
    }
    let answer = match (method, uri.path()) {
        (Method::PUT, _) => return StatusCode::NO_CONTENT.into_response(),
        (Method::POST, "/v1/compile") if opa.borrow().compile(json["query"].as_str().unwrap()) => {
            json!({ "result": { "queries": [[]] } })
        }
        (Method::POST, "/v1/compile") => json!({ "result": {} }),
        (Method::POST, _) => json!({ "result": [] }),
        (Method::GET, path) if path.ends_with(MARKER) => json!({ "result": opa.borrow().marker }),
        _ => return StatusCode::NOT_FOUND.into_response(),
    };
    answer.to_string().into_response()
}

async fn serve(router: Router) -> Url {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await });
    url.parse().unwrap()
}

async fn replica(
    marker: &Marker,
    hub: Url,
    delivery: Delivery,
    dir: Option<&std::path::Path>,
) -> (Shared, Replica) {
    _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let state = Opa { marker: Some(serde_json::to_value(marker).unwrap()), ..Opa::default() };
    let shared: Shared = Arc::new(watch::Sender::new(state));
    let opa = |State(opa): State<Shared>, method: Method, uri: Uri, body: Bytes| async move {
        answer(&opa, method, &uri, &body)
    };
    let url = serve(Router::new().fallback(opa).with_state(Arc::clone(&shared))).await;
    let opa = OpaConfig { url: url.join("v1/").unwrap(), token: None, ca_file: None, allow_insecure: false };
    let config = Config {
        hubs: vec![hub],
        hub_ca_file: None,
        bundle: "main".to_owned(),
        namespace: None,
        opa,
        delivery,
        listen: ([127, 0, 0, 1], 0).into(),
        health: None,
        state_dir: dir.map(Into::into),
        unready_after: None,
    };
    let status = Status::new(delivery, None);
    let local = LocalServer::new("main".to_owned(), status.clone());
    (shared, Replica::new(&config, local, status).unwrap())
}

async fn until<T>(replica: Replica, done: impl Future<Output = T>) -> T {
    tokio::select! {
        () = replica.run(pending()) => unreachable!("the loop has no end"),
        done = tokio::time::timeout(TEST_TIMEOUT, done) => done.unwrap(),
    }
}

fn digest(dir: &str) -> Digest {
    Digest::of(dir.as_bytes())
}

fn marker(dirs: &[&str], modules: Option<Digest>) -> Marker {
    let dirs = dirs.iter().map(|dir| (dir.parse().unwrap(), Some(digest(dir)))).collect();
    let mut marker = Marker { dirs, ..Marker::default() };
    let modules = modules.unwrap_or(marker.modules_digest());
    marker.revision = Some(Revision { modules, data: marker.data_digest() });
    marker
}

fn archive(head: &Head, files: &[(&str, &str)]) -> Vec<u8> {
    let mut tar = tar_of(head, files);
    tar.finish().unwrap();
    tar.into_inner().unwrap().finish().unwrap()
}

fn beginning(head: &Head, files: &[(&str, &str)]) -> Bytes {
    let mut tar = tar_of(head, files);
    tar.get_mut().flush().unwrap();
    tar.get_mut().get_mut().clone().into()
}

fn tar_of(head: &Head, files: &[(&str, &str)]) -> tar::Builder<GzEncoder<Vec<u8>>> {
    let gzip = GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let mut tar = tar::Builder::new(gzip);
    let head = serde_json::to_string(head).unwrap();
    for (path, content) in [("opahub.json", head.as_str())].iter().chain(files) {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        tar.append_data(&mut header, path, content.as_bytes()).unwrap();
    }
    tar
}

fn head(marker: &Marker) -> Head {
    let dirs = marker.dirs().map(|(dir, digest)| (dir.clone(), digest)).collect();
    Head {
        data: Some(DataHead { dirs, ensure: Vec::new() }),
        modules: Some(BTreeMap::new()),
        modules_digest: marker.revision.map(|revision| revision.modules),
        ..Head::default()
    }
}

/// H4: OPA's restart is detected while a hub does not respond.
#[tokio::test]
async fn restart_of_opa_is_detected_while_the_hub_is_silent() {
    let hub = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", hub.local_addr().unwrap()).parse().unwrap();
    let whole = marker(&["/pods"], None);
    let dir = last_good(&whole).await;
    let (opa, replica) = replica(&whole, url, Delivery::Rest, Some(dir.path())).await;
    until(replica, async {
        let connection = hub.accept().await.unwrap();
        opa.send_modify(|opa| opa.marker = None);
        has_applied(&opa, whole.revision.unwrap()).await;
        drop(connection);
    })
    .await;
}

async fn last_good(whole: &Marker) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut last_good = StateStore::open(dir.path().to_owned(), "main", None).unwrap();
    last_good.write_piece(&Piece::Head(head(whole))).await;
    last_good.write_piece(&Piece::Directory("/pods".parse().unwrap(), b"{}".to_vec())).await;
    let meta = Meta {
        revision: whole.revision.unwrap(),
        position: Position::default(),
        ensure: Vec::new(),
        rego_version: None,
        field_mask: None,
        etag: None,
    };
    last_good.commit(meta).await;
    last_good.close().await;
    dir
}

async fn has_applied(opa: &Shared, revision: Revision) {
    let revision = json!(revision.to_string());
    let has_applied = |opa: &Opa| opa.marker.as_ref().is_some_and(|marker| marker["revision"] == revision);
    tokio::time::timeout(DETECTION_TIMEOUT, opa.subscribe().wait_for(has_applied)).await.unwrap().unwrap();
}

#[tokio::test]
async fn interrupted_archive_leads_to_the_last_good_state() {
    let whole = marker(&["/pods"], None);
    let dir = last_good(&whole).await;
    let first = beginning(&head(&marker(&["/pods", "/shop"], None)), &[]);
    let hub = move |method: Method| async move {
        let cut = [Ok(first), Err(std::io::Error::other("cut"))];
        match method {
            Method::POST => Body::from_stream(stream::iter(cut)).into_response(),
            _ => StatusCode::GONE.into_response(),
        }
    };
    let url = serve(Router::new().fallback(hub)).await;
    let half = Marker { revision: None, dirs: [("/pods".parse().unwrap(), None)].into(), ..whole.clone() };
    let (opa, replica) = replica(&half, url, Delivery::Rest, Some(dir.path())).await;
    until(replica, has_applied(&opa, whole.revision.unwrap())).await;
}

#[tokio::test]
async fn rejection_by_opa_ends_a_load_at_once() {
    let whole = marker(&["/pods"], None);
    let dir = last_good(&whole).await;
    let first = beginning(&head(&marker(&["/pods", "/shop"], None)), &[]);
    let requested = Arc::new(watch::Sender::new(0));
    let opa: Arc<std::sync::OnceLock<Shared>> = Arc::default();
    let hub = {
        let (requested, opa) = (Arc::clone(&requested), Arc::clone(&opa));
        move |method: Method| async move {
            if method != Method::POST {
                return StatusCode::GONE.into_response();
            }
            let other = |opa: &mut Opa| opa.marker.as_mut().unwrap()["writer"] = json!({ "other": true });
            opa.get().unwrap().send_modify(other);
            requested.send_modify(|requested| *requested += 1);
            Body::from_stream(stream::iter([Ok::<_, std::io::Error>(first)]).chain(stream::pending()))
                .into_response()
        }
    };
    let url = serve(Router::new().fallback(hub)).await;
    let half = Marker { revision: None, dirs: [("/pods".parse().unwrap(), None)].into(), ..whole };
    let (shared, replica) = replica(&half, url, Delivery::Rest, Some(dir.path())).await;
    _ = opa.set(shared);
    until(replica, async {
        let again = tokio::time::timeout(DETECTION_TIMEOUT, async {
            requested.subscribe().wait_for(|requested| *requested >= 2).await.map(|requested| *requested)
        });
        again.await.unwrap().unwrap();
    })
    .await;
}

/// A9
#[tokio::test]
async fn conflicting_writers_back_off() {
    let hub = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", hub.local_addr().unwrap()).parse().unwrap();
    let (opa, replica) = replica(&marker(&[], None), url, Delivery::Rest, None).await;
    opa.send_modify(|opa| opa.is_shared = true);
    let started = Instant::now();
    until(replica, async {
        _ = opa.subscribe().wait_for(|opa| opa.claims == 6).await.unwrap();
    })
    .await;
    // Five random pauses of up to 0.1 s, 0.2 s … 1.6 s.
    assert!(started.elapsed() > Duration::from_millis(100), "{:?}", started.elapsed());
}

/// A8: OPA gets data, with fields for its old policies.
#[tokio::test]
async fn data_continues_without_activation() {
    let modules = digest("new");
    let mut old = marker(&["/pods"], Some(modules));
    old.field_masks = vec!["old".to_owned(), "new".to_owned()];
    let from = old.data_digest();
    let dirs = BTreeMap::from([("/pods".parse().unwrap(), Some(digest("narrow")))]);
    let to = data_digest(dirs.keys().map(|dir| (dir, digest("narrow"))), &[]);
    let patch = RawValue::from_string(r#"[{"op":"remove","path":"/pods/a"}]"#.to_owned()).unwrap();
    let position = Position::default();
    let delta = Delta {
        from,
        to,
        position,
        newest: None,
        ensure: Vec::new(),
        dirs,
        narrows: true,
        ops: 1,
        patch: &patch,
    };
    let mut event = Vec::new();
    let json = serde_json::to_vec(&delta).unwrap();
    write_event(&mut event, Revision { modules, data: to }, DELTA_EVENT, &json);
    let event = Bytes::from(event);

    let mut wide = marker(&[], Some(modules));
    wide.dirs.insert("/pods".parse().unwrap(), Some(digest("wide")));
    let answer = archive(
        &Head { modules: None, reads: Some("new".to_owned()), ..head(&wide) },
        &[("pods/data.json", "{\"a\":1}")],
    );
    let first = old.revision.unwrap().to_string();
    let requested = Arc::new(watch::Sender::new(Reconcile::default()));
    let hub = {
        let requested = Arc::clone(&requested);
        move |method: Method, uri: Uri, headers: axum::http::HeaderMap, body: Bytes| async move {
            match (method, uri.path()) {
                (Method::GET, "/bundles/main/policy") => {
                    ([(ETAG, format!("\"{modules}\""))], "").into_response()
                }
                (Method::GET, "/bundles/main/stream") if headers["last-event-id"] == first.as_str() => {
                    let event = stream::iter([Ok::<_, std::io::Error>(event)]);
                    Body::from_stream(event.chain(stream::pending())).into_response()
                }
                (Method::POST, "/bundles/main/reconcile") => {
                    requested.send_replace(serde_json::from_slice(&body).unwrap());
                    answer.into_response()
                }
                _ => StatusCode::GONE.into_response(),
            }
        }
    };
    let url = serve(Router::new().fallback(hub)).await;
    let (opa, replica) = replica(&old, url, Delivery::Bundle, None).await;
    until(replica, async {
        let has_applied = |opa: &Opa| opa.ops.contains(&("add".to_owned(), "/pods".to_owned()));
        _ = opa.subscribe().wait_for(has_applied).await.unwrap();
    })
    .await;
    assert_eq!(requested.borrow().reads, ["old", "new"]);
    assert!(
        !opa.borrow().ops.contains(&("remove".to_owned(), "/pods/a".to_owned())),
        "old policies read this field"
    );
}

/// A10: OPA is loaded, and obsolete content removed.
#[tokio::test]
async fn permanent_rejection_of_reconcile_leads_to_a_load() {
    let answer = archive(&head(&marker(&["/b"], None)), &[("b/data.json", "{\"x\":1}")]);
    let hub = move |method: Method, uri: Uri| async move {
        match (method, uri.path()) {
            (Method::GET, "/bundles/main") => answer.into_response(),
            (Method::POST, _) => (StatusCode::BAD_REQUEST, "unknown field").into_response(),
            _ => StatusCode::GONE.into_response(),
        }
    };
    let url = serve(Router::new().fallback(hub)).await;
    let (opa, replica) = replica(&marker(&["/a", "/b"], None), url, Delivery::Rest, None).await;
    until(replica, async {
        let op = |kind: &str, path: &str| (kind.to_owned(), path.to_owned());
        let is_loaded =
            |opa: &Opa| [op("add", "/b"), op("remove", "/a")].iter().all(|op| opa.ops.contains(op));
        _ = opa.subscribe().wait_for(is_loaded).await.unwrap();
    })
    .await;
}
