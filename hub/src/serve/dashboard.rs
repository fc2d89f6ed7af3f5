//! `GET /`: one page over `/v1/bundles` and the stream.

use axum::response::Html;

pub(super) async fn page() -> Html<&'static str> {
    Html(include_str!("dashboard.html"))
}
