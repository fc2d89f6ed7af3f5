//! Ends of a session.

use crate::{hub, opa};

#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    #[error(transparent)]
    Hub(#[from] hub::Error),
    #[error(transparent)]
    Apply(#[from] opa::Error),
    /// Old policies would miss removed fields.
    #[error("OPA has not activated the latest policies; fields that its current policies read remain")]
    NotActivated,
}

impl From<opa::ClientError> for SessionError {
    fn from(error: opa::ClientError) -> Self {
        Self::Apply(error.into())
    }
}
