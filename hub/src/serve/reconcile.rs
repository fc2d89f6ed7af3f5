//! `POST /bundles/{name}/reconcile`: digests in, an archive of the missing content out.

use std::sync::atomic::Ordering;

use axum::body::{Bytes, HttpBody as _};
use axum::extract::{FromRequest as _, Path, Query, Request, State};
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use opa_hub_proto::position::{POSITION_HEADER, Position};
use opa_hub_proto::reconcile::Reconcile;
use opa_hub_proto::revision::Revision;
use serde::Deserialize;
use tokio::time::timeout;

use crate::serve::Hub;
use crate::serve::bundle::respond;
use crate::serve::error::Error;

#[derive(Deserialize)]
pub(super) struct Options {
    namespace: Option<String>,
}

pub(super) async fn post(
    State(hub): State<Hub>,
    Path(name): Path<String>,
    Query(options): Query<Options>,
    headers: HeaderMap,
    request: Request,
) -> Result<Response, Error> {
    let bundle = hub.part_once(&name, options.namespace.as_deref())?;
    let length = request.body().size_hint().upper().and_then(|bytes| usize::try_from(bytes).ok());
    let length = length.ok_or(Error::LengthRequired)?;
    let _permit = bundle.admit_reconcile(length).await.ok_or(Error::AnswersFull)?;
    let limit = hub.1.body;
    let body = timeout(limit, Bytes::from_request(request, &())).await;
    let body = body.map_err(|_late| Error::BodyTimeout(limit))??;
    let current = bundle.position();
    let edition = bundle.head().borrow().clone().ok_or(Error::NotReady)?;
    let header = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let required: Option<Position> = header(POSITION_HEADER).map(str::parse).transpose()?;
    let revision: Option<Revision> = header("last-event-id").and_then(|id| id.parse().ok());
    let position = current.clone().after(&edition.newest());
    let (snapshot, feeds) = (edition.clone(), bundle.feeds.clone());
    // Large requests need some hundred milliseconds.
    let parse = move || {
        let digests: Reconcile =
            serde_json::from_slice(&body).map_err(|error| Error::InvalidReconcile(error.to_string()))?;
        let modules = revision.map(|revision| revision.modules);
        let lag = required.and_then(|required| snapshot.lag_of(&digests, modules, &current, &required));
        lag.map_or(Ok(digests), |lag| Err(Error::lags(lag, &feeds)))
    };
    let digests = tokio::task::spawn_blocking(parse).await.expect("parsing does not panic")?;
    bundle.counters.reconciles.fetch_add(1, Ordering::Relaxed);
    let (archive, is_widened) = edition.reconcile(digests).await.ok_or(Error::AnswersFull)?;
    let position = if is_widened { position.after(&bundle.newest()) } else { position };
    Ok(([(POSITION_HEADER, position.to_string())], respond(archive)).into_response())
}
