//! `GET /bundles/{name}/stream`: server-sent events, computed when the client can receive more. Slow clients receive
//! fewer, larger events.

pub(super) mod fanout;
pub(super) mod listener;
pub(super) mod peers;

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::HeaderMap;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::{Stream, stream};
use opa_hub_proto::position::POSITION_HEADER;
use opa_hub_proto::revision::Revision;
use opa_hub_proto::sse::Word;
use serde::Deserialize;
use tokio::sync::watch;
use tokio::time::{Instant, Interval};

use crate::bundle::watches::WatchStatuses;
use crate::bundle::{Bundle, CachedSnapshot, CatchUp, Counters};
use crate::serve::error::Error;
use crate::serve::{Duration, Hub};

/// Interval of stream heartbeats, which reveal a lost hub and satisfy proxies.
pub(super) const HEARTBEAT: Duration = Duration::from_secs(5);

#[derive(Deserialize)]
pub(super) struct Options {
    /// For clients that cannot set `Last-Event-ID`.
    since: Option<String>,
    namespace: Option<String>,
}

pub(super) struct StreamRequest {
    name: String,
    namespace: Option<String>,
    since: Option<String>,
    position: Option<String>,
}

impl StreamRequest {
    /// `Last-Event-ID` overrides `since`.
    pub(super) fn new(name: &str, options: Options, header: impl Fn(&str) -> Option<String>) -> Self {
        let (id, position) = (header("last-event-id"), header(POSITION_HEADER));
        let since = id.or(options.since).filter(|since| !since.is_empty());
        Self { name: name.to_owned(), namespace: options.namespace, since, position }
    }

    /// Returns the bundle and the client's revision.
    pub(super) async fn open(&self, hub: &Hub) -> Result<(Arc<Bundle>, Revision), Error> {
        let bundle = hub.part(&self.name, self.namespace.as_deref())?;
        let current = bundle.position();
        let edition = bundle.head().borrow().clone().ok_or(Error::NotReady)?;
        let revision = match &self.since {
            None => edition.view.revision,
            Some(text) => text.parse().map_err(|_| Error::InvalidRevision(text.clone()))?,
        };
        if let Some(required) = &self.position {
            let required = required.parse()?;
            if let Some(lag) = edition.lag(revision, &current, &required) {
                return Err(Error::lags(lag, &bundle.feeds));
            }
            edition.tell_as_of(&current, &required);
        }
        if edition.is_full() && !edition.is_near(revision) {
            edition.forget_frames();
            if edition.is_full() {
                return Err(Error::Full);
            }
        }
        if matches!(edition.next_beside(revision).await, CatchUp::TooOld) {
            return Err(Error::UnknownRevision(revision.to_string()));
        }
        Ok((bundle, revision))
    }
}

impl std::fmt::Display for StreamRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:?} {:?}", self.name, self.namespace, self.since)
    }
}

/// Confirms the newest revision; proxies then forward the response.
pub(super) fn synced_comment(bundle: &str, feeds: &WatchStatuses, revision: Revision) -> Bytes {
    let comment = match feeds.stale() {
        Some(stale) => Word::Stale(&stale.to_string()).to_string(),
        None => format!("bundle {bundle}"),
    };
    format!(": {comment}\nid: {revision}\n\n").into()
}

pub(super) fn header_text(value: &[u8]) -> String {
    String::from_utf8_lossy(value).into_owned()
}

/// The client's frame is being encoded.
pub(super) const PENDING: Bytes = Bytes::from_static(b": wait\n\n");

/// An empty comment, or one that reports a stale source.
pub(super) fn heartbeat(feeds: &WatchStatuses) -> Bytes {
    let comment = |stale: String| format!(": {}\n\n", Word::Stale(&stale)).into();
    feeds.stale().map_or(Bytes::from_static(b":\n\n"), |stale| comment(stale.to_string()))
}

/// Serves streams that are not the first request of their connection.
pub(super) async fn get(
    State(hub): State<Hub>,
    Path(name): Path<String>,
    Query(options): Query<Options>,
    headers: HeaderMap,
) -> Result<Response, Error> {
    let header = |name: &str| headers.get(name).map(|value| header_text(value.as_bytes()));
    let request = StreamRequest::new(&name, options, header);
    let (bundle, revision) = request.open(&hub).await.inspect_err(|error| {
        if let (Error::UnknownRevision(_), Some(bundle)) = (error, hub.0.bundles.get(&name)) {
            bundle.counters.unknown_revisions.fetch_add(1, Ordering::Relaxed);
        }
    })?;
    let headers = [(CONTENT_TYPE, "text/event-stream"), (CACHE_CONTROL, "no-store")];
    let guard = StreamGuard::new(Arc::clone(&bundle.counters));
    let feeds = bundle.feeds.clone();
    let (head, heartbeats) = (bundle.head(), tokio::time::interval_at(Instant::now() + HEARTBEAT, HEARTBEAT));
    let body = StreamBody {
        name,
        feeds,
        hub,
        head,
        revision,
        heartbeats,
        synced_sent: false,
        go_away_sent: false,
        _guard: guard,
    };
    Ok((headers, Body::from_stream(events(body))).into_response())
}

struct StreamBody {
    name: String,
    feeds: WatchStatuses,
    hub: Hub,
    head: watch::Receiver<Option<Arc<CachedSnapshot>>>,
    revision: Revision,
    heartbeats: Interval,
    synced_sent: bool,
    go_away_sent: bool,
    _guard: StreamGuard,
}

fn events(body: StreamBody) -> impl Stream<Item = Result<Bytes, Infallible>> {
    stream::unfold(body, |mut body| async move {
        let event = body.next().await?;
        Some((Ok(event), body))
    })
}

impl StreamBody {
    /// `None` if the hub stops, the bundle was replaced, or the client must reconcile.
    async fn next(&mut self) -> Option<Bytes> {
        while !self.go_away_sent {
            let edition = self.head.borrow_and_update().clone()?;
            let is_waiting = edition.is_full() && !edition.is_near(self.revision);
            let next = if is_waiting { CatchUp::UpToDate } else { edition.next_beside(self.revision).await };
            match next {
                CatchUp::Frame(bytes) => {
                    self.revision = edition.view.revision;
                    return Some(bytes);
                }
                CatchUp::TooOld => return None,
                CatchUp::UpToDate if !self.synced_sent && !is_waiting => {
                    self.synced_sent = true;
                    return Some(synced_comment(&self.name, &self.feeds, self.revision));
                }
                CatchUp::UpToDate => {}
            }
            tokio::select! {
                changed = self.head.changed() => changed.ok()?,
                _ = self.heartbeats.tick() => {
                    if edition.is_full() {
                        edition.forget_frames();
                    }
                    return Some(if is_waiting { PENDING } else { heartbeat(&self.feeds) });
                }
                () = self.hub.0.stop.cancelled() => {
                    self.go_away_sent = true;
                    return Some(self.hub.farewell().await);
                }
            }
        }
        None
    }
}

/// Counts open streams.
pub(super) struct StreamGuard(Arc<Counters>);

impl StreamGuard {
    pub(super) fn new(counters: Arc<Counters>) -> Self {
        counters.agents.fetch_add(1, Ordering::Relaxed);
        Self(counters)
    }
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        self.0.agents.fetch_sub(1, Ordering::Relaxed);
    }
}
