//! Failed requests and streams, retried with the next hub.

use std::time::Duration;

use opa_hub_proto::sse;
use reqwest::{StatusCode, Url};

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(
        "creating the client for the hub failed: {0}; check --hub-ca-file and the certificates of the image"
    )]
    Client(String),
    #[error("request to the hub failed: {0}")]
    Unreachable(#[from] reqwest::Error),
    #[error("the hub sent nothing for {} s; retrying with another hub", .0.as_secs())]
    Timeout(Duration),
    #[error("the hub sent less than {bytes} bytes in {} s; retrying with another hub", .window.as_secs())]
    TooSlow { bytes: usize, window: Duration },
    #[error("the hub did not complete an event within {} s; retrying with another hub", .0.as_secs())]
    EventTimeout(Duration),
    #[error("the hub rejected {request} with {status}: {message}")]
    Rejected { request: &'static str, status: StatusCode, message: String },
    #[error("this hub would move OPA back in time: {0}")]
    BehindOpa(String),
    #[error("the hub lost its source, another hub is ready: {0}")]
    Stale(String),
    /// Carries the ready peers.
    #[error("the hub shuts down")]
    GoAway(Vec<Url>),
    #[error("decoding the stream failed: {0}")]
    Stream(#[from] sse::Error),
    /// Also closes streams of unknown revisions.
    #[error("the hub closed the stream")]
    Closed,
    #[error("policies changed while data was fetched; retrying")]
    PoliciesChanged,
    #[error("the policy bundle exceeds {0} bytes")]
    PolicyBundleTooLarge(usize),
}

impl Error {
    /// Whether a retry would fail again.
    pub(crate) fn is_permanent(&self) -> bool {
        let transient = [
            StatusCode::NOT_FOUND,
            StatusCode::REQUEST_TIMEOUT,
            StatusCode::GONE,
            StatusCode::TOO_MANY_REQUESTS,
        ];
        matches!(self, Self::Rejected { status, .. } if status.is_client_error() && !transient.contains(status))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A10
    #[test]
    fn permanent_rejections_are_recognized() {
        for (status, expected) in [
            (400, true),
            (401, true),
            (403, true),
            (404, false),
            (408, false),
            (409, true),
            (410, false),
            (413, true),
            (422, true),
            (429, false),
            (500, false),
            (503, false),
        ] {
            let status = StatusCode::from_u16(status).unwrap();
            let error = Error::Rejected { request: "", status, message: String::new() };
            assert_eq!(error.is_permanent(), expected, "{status}");
        }
    }
}
