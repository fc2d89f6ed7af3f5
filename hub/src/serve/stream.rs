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
use opa_hub_proto::revision::Revision;
use serde::Deserialize;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::Hub;
use super::error::Error;
use crate::bundle::{Counters, Edition, Next};
use crate::config::HEARTBEAT;

#[derive(Deserialize)]
pub(super) struct Options {
    /// What `Last-Event-ID` says, for readers that cannot set headers.
    since: Option<String>,
    /// Whose objects are wanted.
    namespace: Option<String>,
}

pub(super) async fn get(
    State(hub): State<Hub>,
    Path(name): Path<String>,
    Query(options): Query<Options>,
    headers: HeaderMap,
) -> Result<Response, Error> {
    let bundle = hub.part(&name, options.namespace.as_deref())?;
    let head = bundle.head();
    let edition = head.borrow().clone().ok_or(Error::NotReady)?;
    let header =
        headers.get("last-event-id").map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    let since = header.or(options.since);
    let held = match since.filter(|since| !since.is_empty()) {
        None => edition.view.revision,
        Some(text) => text.parse().map_err(|_| Error::InvalidRevision(text))?,
    };
    if matches!(edition.next(held), Next::Unknown) {
        bundle.counters.unknown_revisions.fetch_add(1, Ordering::Relaxed);
        return Err(Error::UnknownRevision(held.to_string()));
    }
    let headers = [(CONTENT_TYPE, "text/event-stream"), (CACHE_CONTROL, "no-store")];
    let open = Open::new(Arc::clone(&bundle.counters));
    let reader = Reader { name, stop: hub.0.stop.clone(), head, held, greeted: false, _open: open };
    Ok((headers, Body::from_stream(events(reader))).into_response())
}

struct Reader {
    name: String,
    stop: CancellationToken,
    head: watch::Receiver<Option<Arc<Edition>>>,
    held: Revision,
    greeted: bool,
    _open: Open,
}

fn events(reader: Reader) -> impl Stream<Item = Result<Bytes, Infallible>> {
    stream::unfold(reader, |mut reader| async move {
        let event = reader.next().await?;
        Some((Ok(event), reader))
    })
}

impl Reader {
    /// The next bytes; none when the stream must end: the hub stops, another bundle took the name of this one, or the log
    /// no longer reaches back to a reader that was too slow, which then reconciles.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            let edition = self.head.borrow_and_update().clone()?;
            match edition.next(self.held) {
                Next::Frames(bytes) => {
                    self.held = edition.view.revision;
                    return Some(bytes);
                }
                Next::Unknown => return None,
                // Tells the reader at once that it holds all there is, and opens the stream through proxies.
                Next::UpToDate if !self.greeted => {
                    self.greeted = true;
                    return Some(format!(": {}\nid: {}\n\n", self.name, self.held).into());
                }
                Next::UpToDate => {}
            }
            let changed = tokio::select! {
                changed = tokio::time::timeout(HEARTBEAT, self.head.changed()) => changed,
                () = self.stop.cancelled() => return None,
            };
            match changed {
                Ok(Ok(())) => {}
                Ok(Err(_closed)) => return None,
                Err(_quiet) => return Some(Bytes::from_static(b":\n\n")),
            }
        }
    }
}

/// A stream that is open, counted.
struct Open(Arc<Counters>);

impl Open {
    fn new(counters: Arc<Counters>) -> Self {
        counters.agents.fetch_add(1, Ordering::Relaxed);
        Self(counters)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.agents.fetch_sub(1, Ordering::Relaxed);
    }
}
