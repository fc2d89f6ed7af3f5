//! `/livez` and `/readyz`.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::IntoResponse;
use serde::Deserialize;
use serde_json::json;

use crate::bundle::Bundle;
use crate::serve::Hub;

/// Restarts help only processes that do not answer.
pub(super) async fn live() -> &'static str {
    "ok\n"
}

#[derive(Deserialize)]
pub(super) struct Options {
    bundle: Option<String>,
}

/// Ready if nothing is pending and a bundle has an edition from sources that answer.
pub(super) async fn ready(State(hub): State<Hub>, Query(options): Query<Options>) -> impl IntoResponse {
    let pending = hub.0.readiness.pendings();
    let mut bundles = hub.0.bundles.list();
    let has_none = bundles.is_empty();
    if let Some(name) = &options.bundle {
        bundles.retain(|bundle| bundle.name == *name);
    }
    let stale: BTreeMap<_, _> = bundles
        .iter()
        .filter_map(|bundle| Some((bundle.name.clone(), bundle.feeds.stale()?.to_string())))
        .collect();
    // With a bundle name, an agent looks for a better replica. Without, the Service decides: a resource that is denied
    // to every replica must not make all of them unready.
    let is_unreachable = |bundle: &Arc<Bundle>| match &options.bundle {
        Some(_) => stale.contains_key(&bundle.name),
        None => bundle.feeds.silent().is_some(),
    };
    let serves = |bundle: &Arc<Bundle>| bundle.head().borrow().is_some() && !is_unreachable(bundle);
    let stopping = hub.0.stop.is_cancelled();
    let ready = !stopping
        && pending.is_empty()
        && (has_none && options.bundle.is_none() || bundles.iter().any(serves));
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (
        status,
        Json(json!({
            "ready": ready,
            "stopping": stopping,
            "pending": pending,
            "stale": stale,
            "problems": hub.0.readiness.problems(),
            "notices": hub.0.readiness.notices(),
            "checkedBy": hub.0.checked_by,
        })),
    )
}
