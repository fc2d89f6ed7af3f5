//! `GET /bundles/{name}[/policy|/data]`: OPA's bundle protocol (OPA v1/download/download.go).
//!
//! - A 304 repeats the client's ETag. An early 304 under `wait` would make OPA retry without pause.
//! - `If-None-Match` may be a list, newest first, with weak tags.
//! - OPA compares the content type byte by byte, and expects no `Content-Encoding` on a gzip'd tar.
//! - With `--fields auto`, policies and data must come in one bundle: `/policy` and `/data` are rejected for OPA.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE, ETAG, IF_NONE_MATCH, USER_AGENT};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use futures::stream;
use opa_hub_proto::poll::{BUNDLE_TYPE, OPA_AGENT, Tag, entity_tags, wait};
use opa_hub_proto::position::POSITION_HEADER;
use serde::Deserialize;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::bundle::{Bundle, CachedSnapshot};
use crate::serve::Hub;
use crate::serve::error::Error;
use crate::snapshot::archive::Archive;
use crate::snapshot::bundle_archive::ArchiveKind;

/// Maximum duration of a long poll. OPA's default is 30 s.
pub(super) const LONG_POLL_MAX: Duration = Duration::from_secs(300);

#[derive(Deserialize)]
pub(super) struct Options {
    namespace: Option<String>,
}

pub(super) async fn get(
    part: ArchiveKind,
    State(hub): State<Hub>,
    Path(name): Path<String>,
    Query(options): Query<Options>,
    headers: HeaderMap,
) -> Result<Response, Error> {
    let tags = entity_tags(text_values(&headers, IF_NONE_MATCH.as_str()));
    let max_wait = wait(text_values(&headers, "prefer"), LONG_POLL_MAX);
    let namespace = options.namespace.as_deref();
    let bundle = match max_wait {
        Duration::ZERO => hub.part_once(&name, namespace)?,
        _ => hub.part(&name, namespace)?,
    };
    let Some(edition) = wait_for(&bundle, &hub.0.stop, part, &tags, max_wait).await? else {
        // If this replica is behind, an older tag may match: repeat the newest.
        let newest = tags.first().map_or("", |tag| tag.raw);
        return Ok((StatusCode::NOT_MODIFIED, [(ETAG, newest)]).into_response());
    };
    let is_opa = || text_values(&headers, USER_AGENT.as_str()).any(|name| name.starts_with(OPA_AGENT));
    if part != ArchiveKind::Full && bundle.reading().reads.is_some() && is_opa() {
        return Err(Error::Split(name));
    }
    let tag = format!("\"{}\"", part.revision(&edition.view));
    bundle.counters.snapshots[part as usize].fetch_add(1, Ordering::Relaxed);
    let archive = edition.archive(part).await;
    let headers = [(ETAG.as_str(), tag), (POSITION_HEADER, bundle.newest_of(&edition).to_string())];
    Ok((headers, respond(archive)).into_response())
}

/// Waits for an edition without a match in `tags`.
async fn wait_for(
    bundle: &Bundle,
    stop: &CancellationToken,
    part: ArchiveKind,
    tags: &[Tag<'_>],
    max_wait: Duration,
) -> Result<Option<Arc<CachedSnapshot>>, Error> {
    let deadline = Instant::now() + max_wait;
    let mut editions = bundle.archived(part);
    loop {
        let edition = editions.borrow_and_update().clone();
        let waits_for_first = edition.is_none();
        if let Some(edition) = edition {
            let revision = part.revision(&edition.view);
            if tags.iter().all(|tag| tag.opaque != revision) {
                return Ok(Some(edition));
            }
        }
        let timed_out = tokio::select! {
            changed = tokio::time::timeout_at(deadline, editions.changed()) => match changed {
                Ok(Ok(())) => false,
                // The bundle was replaced.
                Ok(Err(_closed)) => return Err(Error::NotReady),
                Err(_late) => true,
            },
            // OPA retries at once, on another replica.
            () = stop.cancelled() => return Err(Error::NotReady),
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

fn text_values<'a>(headers: &'a HeaderMap, name: &str) -> impl Iterator<Item = &'a str> {
    headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok())
}
