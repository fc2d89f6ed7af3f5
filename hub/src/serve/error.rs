//! What a request is told when it cannot be answered: a status, and JSON that says what to do.

use std::time::Duration;

use axum::Json;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use opa_hub_proto::position::{self, Lag, POSITION_HEADER};
use opa_hub_proto::reconcile::RECONCILE_BYTES_MAX;

use crate::bundle::feeds::{Feeds, Stale};
use crate::bundle::scopes;

/// Every way in which a request fails.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// No such bundle.
    #[error("there is no bundle {0:?}; GET /v1/bundles lists them")]
    NoSuchBundle(String),
    /// No part of it either.
    #[error(transparent)]
    Scope(#[from] scopes::Error),
    /// I5.
    #[error("not ready: some sources have not listed yet, GET /readyz tells which")]
    NotReady,
    /// I10 does not hold over two bundles.
    #[error(
        "fields follow the policies here, so data and policies must come in one bundle: use bundles/{0}, or an agent"
    )]
    Split(String),
    /// The revision is not remembered, or is too far away.
    #[error("revision {0} is not known here: POST the digests of what you hold to …/reconcile")]
    UnknownRevision(String),
    /// A revision that is none.
    #[error("{0:?} is no revision: send the id of the last event, or nothing to start at the head")]
    InvalidRevision(String),
    /// A position that is none.
    #[error("in {POSITION_HEADER}: {0}")]
    InvalidPosition(#[from] position::Invalid),
    /// Who asks would go back in time.
    #[error("here {0}, and it is not the same: ask again, or another hub")]
    Lags(Lag),
    /// The same, and nothing new is heard here either.
    #[error("here {lag}, and {stale}: ask another hub")]
    Stale {
        /// What would go back.
        lag: Lag,
        /// Since when nothing was heard.
        stale: Stale,
    },
    /// Many are far behind and read slowly.
    #[error("frames for readers far behind take all their memory: ask again in a moment, or another hub")]
    Full,
    /// Answers that are cached or being sent take all the memory that they may.
    #[error(
        "encoding the answer failed: memory for answers is used up; ask again in a moment, or another hub"
    )]
    AnswersFull,
    /// A body of unknown length would need as much room as the largest.
    #[error("reading the body failed: its length is unknown; send Content-Length")]
    LengthRequired,
    /// The body did not arrive in time.
    #[error("reading the body failed: it is incomplete after {0:?}; send all of it within that time")]
    BodyTimeout(Duration),
    /// The body is too long, or the connection ended.
    #[error("reading the body failed: {0}; send all of it, and at most {max} bytes", max = RECONCILE_BYTES_MAX)]
    Body(#[from] BytesRejection),
    /// A reconcile request that does not parse.
    #[error("not a reconcile request: {0}")]
    InvalidReconcile(String),
}

impl Error {
    /// A hub that is cut off is no witness of a source that went back.
    pub(super) fn lags(lag: Lag, feeds: &Feeds) -> Self {
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
            | Self::Scope(scopes::Error::TooMany) => StatusCode::SERVICE_UNAVAILABLE,
            Self::BodyTimeout(_) => StatusCode::REQUEST_TIMEOUT,
            Self::LengthRequired => StatusCode::LENGTH_REQUIRED,
            Self::Body(ref rejection) => rejection.status(),
            Self::Split(_) => StatusCode::CONFLICT,
            Self::UnknownRevision(_) => StatusCode::GONE,
            Self::Lags(_) => StatusCode::PRECONDITION_FAILED,
            Self::Scope(_)
            | Self::InvalidRevision(_)
            | Self::InvalidPosition(_)
            | Self::InvalidReconcile(_) => StatusCode::BAD_REQUEST,
        };
        (status, Json(serde_json::json!({ "error": self.to_string() }))).into_response()
    }
}
