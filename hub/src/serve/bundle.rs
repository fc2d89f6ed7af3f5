//! `GET /bundles/{name}[/policy|/data]`: OPA's bundle protocol (OPA v1/download/download.go).
//!
//! What it takes to get right: a 304 carries the client's own ETag and is never sent early under `wait` (OPA would
//! ask again at once, for ever); `If-None-Match` may be a list, newest first, and weak; the content type is compared
//! byte by byte; a gzip'd tar goes without `Content-Encoding`.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{ConnectInfo, Path, Query, State};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE, ETAG, IF_NONE_MATCH};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use futures::stream;
use opa_hub_proto::revision::Revision;
use serde::Deserialize;
use tokio::time::Instant;

use super::error::Error;
use super::{Hub, Shared};
use crate::bundle::archive::Archive;
use crate::bundle::{Edition, Part};
use crate::config::{DELTA_CLIENTS_MAX, LONG_POLL_MAX};

/// OPA keeps long polling only while it sees exactly this.
const BUNDLE_TYPE: &str = "application/vnd.openpolicyagent.bundles";
/// A client that asks again from the revision it was given a delta for, within this time, failed to apply it.
const DELTA_RETRY: Duration = Duration::from_secs(60);

#[derive(Deserialize)]
pub(super) struct Options {
    /// Answer with OPA's own delta where one is possible.
    #[serde(default)]
    delta: bool,
}

/// Who was lately given a native delta, from which revision: who comes back from there gets a snapshot.
#[derive(Default)]
pub(super) struct DeltaClients(Mutex<HashMap<(IpAddr, Revision), Instant>>);

pub(super) async fn get(
    part: Part,
    State(hub): State<Hub>,
    Path(name): Path<String>,
    Query(options): Query<Options>,
    headers: HeaderMap,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
) -> Result<Response, Error> {
    let held = entity_tags(&headers);
    let Some(edition) = wait_for(&hub.0, &name, part, &held, wait(&headers)).await? else {
        // An older tag of the list may have matched here, on a replica that lags: what the client holds stands.
        let own = held.first().map_or("", |tag| tag.raw);
        return Ok((StatusCode::NOT_MODIFIED, [(ETAG, own)]).into_response());
    };
    let tag = format!("\"{}\"", part.revision(&edition.view));
    let delta = if options.delta && part == Part::Whole {
        native_delta(&hub.0, &edition, &held, peer.ip())
    } else {
        None
    };
    let archive = if let Some(delta) = delta {
        hub.0.native_deltas.fetch_add(1, Ordering::Relaxed);
        delta
    } else {
        hub.0.snapshots[part as usize].fetch_add(1, Ordering::Relaxed);
        edition.archive(part).await
    };
    Ok(([(ETAG, tag)], respond(archive)).into_response())
}

/// The edition that the client lacks; none when it holds the newest until its patience ends.
async fn wait_for(
    hub: &Shared,
    name: &str,
    part: Part,
    held: &[Tag<'_>],
    patience: Duration,
) -> Result<Option<Arc<Edition>>, Error> {
    if hub.bundle.name != name {
        return Err(Error::NoSuchBundle(name.to_owned()));
    }
    let deadline = Instant::now() + patience;
    let mut editions = hub.bundle.paced();
    loop {
        let edition = editions.borrow_and_update().clone();
        let waits_for_first = edition.is_none();
        if let Some(edition) = edition {
            let revision = part.revision(&edition.view);
            if held.iter().all(|tag| tag.opaque != revision) {
                return Ok(Some(edition));
            }
        }
        let timed_out = tokio::select! {
            changed = tokio::time::timeout_at(deadline, editions.changed()) => changed.is_err(),
            // OPA asks again at once, and finds another replica or the next start of this one.
            () = hub.stop.cancelled() => return Err(Error::NotReady),
        };
        if timed_out {
            return if waits_for_first { Err(Error::NotReady) } else { Ok(None) };
        }
    }
}

pub(super) fn respond(archive: Archive) -> Response {
    let headers = [(CONTENT_TYPE, BUNDLE_TYPE.to_owned()), (CONTENT_LENGTH, archive.bytes.to_string())];
    let body =
        Body::from_stream(stream::iter(archive.pieces.into_iter().map(Ok::<_, std::convert::Infallible>)));
    (headers, body).into_response()
}

fn native_delta(hub: &Shared, edition: &Edition, held: &[Tag], peer: IpAddr) -> Option<Archive> {
    let from: Revision = held.first()?.opaque.parse().ok()?;
    if !hub.deltas.first_try(peer, from) {
        return None;
    }
    edition.native_delta(from)
}

impl DeltaClients {
    fn first_try(&self, peer: IpAddr, from: Revision) -> bool {
        let mut given = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if given.len() >= DELTA_CLIENTS_MAX {
            given.retain(|_, at| now - *at < DELTA_RETRY);
        }
        if given.len() >= DELTA_CLIENTS_MAX {
            return false;
        }
        let before = given.insert((peer, from), now);
        before.is_none_or(|at| now - at >= DELTA_RETRY)
    }
}

/// One element of `If-None-Match`.
struct Tag<'a> {
    /// As it was sent.
    raw: &'a str,
    /// Without quotes and without the mark of weakness that proxies add.
    opaque: &'a str,
}

/// The tags of `If-None-Match` (RFC 9110 §13.1.2); our own hold no comma.
fn entity_tags(headers: &HeaderMap) -> Vec<Tag<'_>> {
    let values = headers.get_all(IF_NONE_MATCH).into_iter().filter_map(|value| value.to_str().ok());
    let raw = values.flat_map(|value| value.split(',')).map(str::trim).filter(|raw| !raw.is_empty());
    raw.map(|raw| Tag { raw, opaque: raw.strip_prefix("W/").unwrap_or(raw).trim_matches('"') }).collect()
}

/// The patience that `Prefer: wait=N` grants (RFC 7240 §4.3); OPA writes it behind a semicolon.
fn wait(headers: &HeaderMap) -> Duration {
    let values = headers.get_all("prefer").into_iter().filter_map(|value| value.to_str().ok());
    let mut parts = values.flat_map(|value| value.split([',', ';'])).map(str::trim);
    let seconds = parts.find_map(|part| part.strip_prefix("wait=")?.trim().parse().ok());
    Duration::from_secs(seconds.unwrap_or(0)).min(LONG_POLL_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: &'static str, values: &[&'static str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(name, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn tags_as_opa_and_proxies_send_them() {
        for (values, expected) in [
            (&["\"a\""][..], &["a"][..]),
            (&["W/\"a\", \"b\",c"], &["a", "b", "c"]),
            (&["\"a\"", "\"b\""], &["a", "b"]),
            (&["", " , "], &[]),
        ] {
            let headers = headers("if-none-match", values);
            let opaque: Vec<_> = entity_tags(&headers).iter().map(|tag| tag.opaque).collect();
            assert_eq!(opaque, expected);
        }
    }

    #[test]
    fn patience_as_opa_asks_for_it() {
        for (value, seconds) in [
            ("modes=snapshot,delta;wait=30", 30),
            ("wait=5", 5),
            ("modes=snapshot,delta", 0),
            ("wait=x", 0),
            ("wait=99999999", LONG_POLL_MAX.as_secs()),
        ] {
            assert_eq!(wait(&headers("prefer", &[value])).as_secs(), seconds, "{value}");
        }
        assert_eq!(wait(&HeaderMap::new()), Duration::ZERO);
    }
}
