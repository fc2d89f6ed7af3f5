//! `/livez` and `/readyz`.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::IntoResponse;
use serde::Deserialize;
use serde_json::json;

use super::Hub;
use crate::bundle::Bundle;

/// The process answers: that is all a restart could mend.
pub(super) async fn live() -> &'static str {
    "ok\n"
}

#[derive(Deserialize)]
pub(super) struct Options {
    /// Which bundle is asked for; none: any will do.
    bundle: Option<String>,
}

/// Every source has listed once, and there is an edition to serve whose sources were heard lately.
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
    // Whether another replica does better is asked for a bundle. One that is ready at all is in the Service, where all
    // of them would be missed that are refused the same.
    let has_gone_silent = |bundle: &Arc<Bundle>| match &options.bundle {
        Some(_) => stale.contains_key(&bundle.name),
        None => bundle.feeds.silent().is_some(),
    };
    let serves = |bundle: &Arc<Bundle>| bundle.head().borrow().is_some() && !has_gone_silent(bundle);
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
