//! `POST /bundles/{name}/reconcile`: digests of what the sender holds in, an archive of what it lacks out.

use std::sync::atomic::Ordering;

use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use opa_hub_proto::position::POSITION_HEADER;
use opa_hub_proto::reconcile::Reconcile;
use opa_hub_proto::revision::Revision;
use serde::Deserialize;

use super::Hub;
use super::bundle::respond;
use super::error::Error;

#[derive(Deserialize)]
pub(super) struct Options {
    /// Whose objects are wanted.
    namespace: Option<String>,
}

pub(super) async fn post(
    State(hub): State<Hub>,
    Path(name): Path<String>,
    Query(options): Query<Options>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, Error> {
    let bundle = hub.part(&name, options.namespace.as_deref())?;
    let here = bundle.position();
    let held: Reconcile =
        serde_json::from_slice(&body).map_err(|error| Error::InvalidReconcile(error.to_string()))?;
    drop(body);
    let edition = bundle.head().borrow().clone().ok_or(Error::NotReady)?;
    let header = |name| headers.get(name).and_then(|value| value.to_str().ok());
    if let Some(there) = header(POSITION_HEADER) {
        let revision: Option<Revision> = header("last-event-id").and_then(|id| id.parse().ok());
        let modules = revision.map(|revision| revision.modules);
        if let Some(lag) = edition.lag_of(&held, modules, &here, &there.parse()?) {
            return Err(Error::lags(lag, &bundle.feeds));
        }
    }
    bundle.counters.reconciles.fetch_add(1, Ordering::Relaxed);
    let position = [(POSITION_HEADER, here.after(&edition.newest()).to_string())];
    Ok((position, respond(edition.reconcile(held).await)).into_response())
}
