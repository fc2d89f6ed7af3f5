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
    let ready = pending.is_empty() && hub.0.bundle.head().borrow().is_some();
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
