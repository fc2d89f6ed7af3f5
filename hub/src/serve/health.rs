//! `/livez` and `/readyz`.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use serde_json::json;

use super::Hub;

/// The process answers: that is all a restart could mend.
pub(super) async fn live() -> &'static str {
    "ok\n"
}

/// Every source has listed once, and there is an edition to serve.
pub(super) async fn ready(State(hub): State<Hub>) -> impl IntoResponse {
    let pending = hub.0.readiness.pendings();
    let bundles = hub.0.bundles.list();
    let serves = bundles.is_empty() || bundles.iter().any(|bundle| bundle.head().borrow().is_some());
    let ready = pending.is_empty() && serves;
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (
        status,
        Json(json!({
            "ready": ready,
            "pending": pending,
            "problems": hub.0.readiness.problems(),
            "checkedBy": hub.0.checked_by,
        })),
    )
}
