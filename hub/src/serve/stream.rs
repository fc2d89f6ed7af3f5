//! `GET /bundles/{name}/stream`: one server-sent event after the other, each computed for the revision that the
//! reader holds when it is ready for more. A reader that is slow gets fewer, larger events, and costs nobody else
//! anything.

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

use super::Hub;
use super::error::Error;
use crate::bundle::feeds::Feeds;
use crate::bundle::{Bundle, Counters, Edition, Next};
use crate::config::HEARTBEAT;

#[derive(Deserialize)]
pub(super) struct Options {
    /// What `Last-Event-ID` says, for readers that cannot set headers.
    since: Option<String>,
    /// Whose objects are wanted.
    namespace: Option<String>,
}

/// What a request for a stream asks for.
pub(super) struct Asked {
    name: String,
    namespace: Option<String>,
    since: Option<String>,
    position: Option<String>,
}

impl Asked {
    /// By path and query, and by headers: `Last-Event-ID` comes before what the query says.
    pub(super) fn new(name: &str, options: Options, header: impl Fn(&str) -> Option<String>) -> Self {
        let (id, position) = (header("last-event-id"), header(POSITION_HEADER));
        let since = id.or(options.since).filter(|since| !since.is_empty());
        Self { name: name.to_owned(), namespace: options.namespace, since, position }
    }

    /// The bundle to follow, and where its reader is.
    pub(super) async fn open(&self, hub: &Hub) -> Result<(Arc<Bundle>, Revision), Error> {
        let bundle = hub.part(&self.name, self.namespace.as_deref())?;
        let here = bundle.position();
        let edition = bundle.head().borrow().clone().ok_or(Error::NotReady)?;
        let held = match &self.since {
            None => edition.view.revision,
            Some(text) => text.parse().map_err(|_| Error::InvalidRevision(text.clone()))?,
        };
        if let Some(there) = &self.position {
            let there = there.parse()?;
            if let Some(lag) = edition.lag(held, &here, &there) {
                return Err(Error::lags(lag, &bundle.feeds));
            }
            edition.tell_as_of(&here, &there);
        }
        if edition.is_full() && !edition.is_near(held) {
            edition.forget_frames();
            if edition.is_full() {
                return Err(Error::Full);
            }
        }
        if matches!(edition.next_beside(held).await, Next::Unknown) {
            return Err(Error::UnknownRevision(held.to_string()));
        }
        Ok((bundle, held))
    }
}

impl std::fmt::Display for Asked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:?} {:?}", self.name, self.namespace, self.since)
    }
}

/// Tells a reader that it holds all there is, or all that was heard lately, and opens the stream through proxies.
pub(super) fn greeting(bundle: &str, feeds: &Feeds, held: Revision) -> Bytes {
    let word = match feeds.stale() {
        Some(stale) => Word::Stale(&stale.to_string()).to_string(),
        None => format!("bundle {bundle}"),
    };
    format!(": {word}\nid: {held}\n\n").into()
}

/// What a header says.
pub(super) fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value).into_owned()
}

/// What leads on from where a reader is takes a moment.
pub(super) const WAIT: Bytes = Bytes::from_static(b": wait\n\n");

/// The hub is there, and nothing is new; or what it last heard is old.
pub(super) fn heartbeat(feeds: &Feeds) -> Bytes {
    let word = |stale: String| format!(": {}\n\n", Word::Stale(&stale)).into();
    feeds.stale().map_or(Bytes::from_static(b":\n\n"), |stale| word(stale.to_string()))
}

/// Streams that the front door does not hand to the fan-out: whose request is not the first of its connection.
pub(super) async fn get(
    State(hub): State<Hub>,
    Path(name): Path<String>,
    Query(options): Query<Options>,
    headers: HeaderMap,
) -> Result<Response, Error> {
    let header = |name: &str| headers.get(name).map(|value| text(value.as_bytes()));
    let asked = Asked::new(&name, options, header);
    let (bundle, held) = asked.open(&hub).await.inspect_err(|error| {
        if let (Error::UnknownRevision(_), Some(bundle)) = (error, hub.0.bundles.get(&name)) {
            bundle.counters.unknown_revisions.fetch_add(1, Ordering::Relaxed);
        }
    })?;
    let headers = [(CONTENT_TYPE, "text/event-stream"), (CACHE_CONTROL, "no-store")];
    let open = Open::new(Arc::clone(&bundle.counters));
    let feeds = bundle.feeds.clone();
    let (head, beats) = (bundle.head(), tokio::time::interval_at(Instant::now() + HEARTBEAT, HEARTBEAT));
    let reader = Reader { name, feeds, hub, head, held, beats, greeted: false, ended: false, _open: open };
    Ok((headers, Body::from_stream(events(reader))).into_response())
}

struct Reader {
    name: String,
    feeds: Feeds,
    hub: Hub,
    head: watch::Receiver<Option<Arc<Edition>>>,
    held: Revision,
    beats: Interval,
    greeted: bool,
    ended: bool,
    _open: Open,
}

fn events(reader: Reader) -> impl Stream<Item = Result<Bytes, Infallible>> {
    stream::unfold(reader, |mut reader| async move {
        let event = reader.next().await?;
        Some((Ok(event), reader))
    })
}

impl Reader {
    /// The next bytes; none when the stream must end: the hub stops, another bundle took the name of this one, or the
    /// log no longer reaches back to a reader that was too slow, which then reconciles.
    async fn next(&mut self) -> Option<Bytes> {
        while !self.ended {
            let edition = self.head.borrow_and_update().clone()?;
            let waits = edition.is_full() && !edition.is_near(self.held);
            let next = if waits { Next::UpToDate } else { edition.next_beside(self.held).await };
            match next {
                Next::Frames(bytes) => {
                    self.held = edition.view.revision;
                    return Some(bytes);
                }
                Next::Unknown => return None,
                Next::UpToDate if !self.greeted && !waits => {
                    self.greeted = true;
                    return Some(greeting(&self.name, &self.feeds, self.held));
                }
                Next::UpToDate => {}
            }
            tokio::select! {
                changed = self.head.changed() => changed.ok()?,
                _ = self.beats.tick() => {
                    if edition.is_full() {
                        edition.forget_frames();
                    }
                    return Some(if waits { WAIT } else { heartbeat(&self.feeds) });
                }
                () = self.hub.0.stop.cancelled() => {
                    self.ended = true;
                    return Some(self.hub.farewell().await);
                }
            }
        }
        None
    }
}

/// A stream that is open, counted.
pub(super) struct Open(Arc<Counters>);

impl Open {
    pub(super) fn new(counters: Arc<Counters>) -> Self {
        counters.agents.fetch_add(1, Ordering::Relaxed);
        Self(counters)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.agents.fetch_sub(1, Ordering::Relaxed);
    }
}
