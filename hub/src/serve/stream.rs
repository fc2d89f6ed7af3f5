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

use super::error::Error;
use super::{Hub, Shared};
use crate::bundle::{Edition, Next};
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
    let head = hub.part(&name, options.namespace.as_deref())?.head();
    let edition = head.borrow().clone().ok_or(Error::NotReady)?;
    let header =
        headers.get("last-event-id").map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    let since = header.or(options.since);
    let held = match since.filter(|since| !since.is_empty()) {
        None => edition.view.revision,
        Some(text) => text.parse().map_err(|_| Error::InvalidRevision(text))?,
    };
    if matches!(edition.next(held), Next::Unknown) {
        hub.0.unknown_revisions.fetch_add(1, Ordering::Relaxed);
        return Err(Error::UnknownRevision(held.to_string()));
    }
    let headers = [(CONTENT_TYPE, "text/event-stream"), (CACHE_CONTROL, "no-store")];
    let reader = Reader { hub: Open::new(hub.0), head, held, greeted: false };
    Ok((headers, Body::from_stream(events(reader))).into_response())
}

struct Reader {
    hub: Open,
    head: watch::Receiver<Option<Arc<Edition>>>,
    held: Revision,
    greeted: bool,
}

fn events(reader: Reader) -> impl Stream<Item = Result<Bytes, Infallible>> {
    stream::unfold(reader, |mut reader| async move {
        let event = reader.next().await?;
        Some((Ok(event), reader))
    })
}

impl Reader {
    /// The next bytes; none when the stream must end: the hub stops, or the log no longer reaches back to a reader
    /// that was too slow, which then reconciles.
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
                    return Some(format!(": {}\nid: {}\n\n", self.hub.0.bundle.name, self.held).into());
                }
                Next::UpToDate => {}
            }
            let changed = tokio::select! {
                changed = tokio::time::timeout(HEARTBEAT, self.head.changed()) => changed,
                () = self.hub.0.stop.cancelled() => return None,
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
struct Open(Arc<Shared>);

impl Open {
    fn new(hub: Arc<Shared>) -> Self {
        hub.agents.fetch_add(1, Ordering::Relaxed);
        Self(hub)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.agents.fetch_sub(1, Ordering::Relaxed);
    }
}
