//! Request errors: status, cause and remedy.

use std::time::Duration;

use axum::Json;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use opa_hub_proto::position::{self, Lag, POSITION_HEADER};
use opa_hub_proto::reconcile::RECONCILE_BYTES_MAX;

use crate::bundle::namespaces;
use crate::bundle::watches::{Stale, WatchStatuses};

#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("no bundle is named {0:?}; GET /v1/bundles lists the names")]
    NoSuchBundle(String),
    #[error(transparent)]
    Namespace(#[from] namespaces::Error),
    /// I5.
    #[error("hub is not ready: some resources are not listed yet; GET /readyz names them")]
    NotReady,
    /// I10.
    #[error("separate bundles cannot follow the policies' fields; use bundles/{0}, or an agent")]
    Split(String),
    #[error("revision {0} is unknown; POST the digests of your content to …/reconcile")]
    UnknownRevision(String),
    #[error(
        "{0:?} is not a revision; send the id of the last event, or none to start at the newest revision"
    )]
    InvalidRevision(String),
    #[error("{POSITION_HEADER} is invalid: {0}")]
    InvalidPosition(#[from] position::Invalid),
    #[error("this replica is behind the client ({0}); retry, or use another replica")]
    Lags(Lag),
    #[error("this replica is behind the client ({lag}) and stale ({stale}); use another replica")]
    Stale { lag: Lag, stale: Stale },
    #[error("frame memory is exhausted; retry later, or use another replica")]
    Full,
    #[error("encoding the answer failed: answer memory is exhausted; retry later, or use another replica")]
    AnswersFull,
    /// Would need memory for the largest body.
    #[error("reading the body failed: its length is unknown; send Content-Length")]
    LengthRequired,
    #[error("reading the body failed: incomplete after {0:?}; send all of the body within that time")]
    BodyTimeout(Duration),
    #[error("reading the body failed: {0}; send all of the body, at most {max} bytes", max = RECONCILE_BYTES_MAX)]
    Body(#[from] BytesRejection),
    #[error("parsing the reconcile request failed: {0}")]
    InvalidReconcile(String),
}

impl Error {
    /// Answers 503 if the watch is stale, since 412 from every hub lets agents go back in time.
    pub(super) fn lags(lag: Lag, feeds: &WatchStatuses) -> Self {
        match feeds.stale_of(&lag.name) {
            Some(stale) => Self::Stale { lag, stale },
            None => Self::Lags(lag),
        }
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let status = match self {
            Self::NoSuchBundle(_) => StatusCode::NOT_FOUND,
            Self::NotReady
            | Self::Stale { .. }
            | Self::Full
            | Self::AnswersFull
            | Self::Namespace(namespaces::Error::TooMany) => StatusCode::SERVICE_UNAVAILABLE,
            Self::BodyTimeout(_) => StatusCode::REQUEST_TIMEOUT,
            Self::LengthRequired => StatusCode::LENGTH_REQUIRED,
            Self::Body(ref rejection) => rejection.status(),
            Self::Split(_) => StatusCode::CONFLICT,
            Self::UnknownRevision(_) => StatusCode::GONE,
            Self::Lags(_) => StatusCode::PRECONDITION_FAILED,
            Self::Namespace(_)
            | Self::InvalidRevision(_)
            | Self::InvalidPosition(_)
            | Self::InvalidReconcile(_) => StatusCode::BAD_REQUEST,
        };
        (status, Json(serde_json::json!({ "error": self.to_string() }))).into_response()
    }
}
