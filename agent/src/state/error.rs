//! Failures of the state file.

use std::io;
use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("using the state directory {} failed: {source}; grant the agent write access", path.display())]
    Directory { path: PathBuf, source: io::Error },
    #[error("reading or writing the state failed: {0}")]
    Database(#[from] redb::Error),
    #[error("parsing the state failed: {0}")]
    Content(#[from] serde_json::Error),
    #[error("the archive lacks {0}")]
    Incomplete(String),
}

impl Error {
    /// Whether the file is corrupt.
    pub(super) fn is_corruption(&self) -> bool {
        match self {
            Self::Database(redb::Error::Io(error)) => {
                matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof)
            }
            Self::Database(error) => {
                matches!(error, redb::Error::Corrupted(_) | redb::Error::UpgradeRequired(_))
            }
            _ => false,
        }
    }
}

macro_rules! from_redb {
    ($($error:ty),*) => { $(impl From<$error> for Error {
        fn from(error: $error) -> Self {
            Self::Database(error.into())
        }
    })* };
}
from_redb!(
    redb::DatabaseError,
    redb::TransactionError,
    redb::TableError,
    redb::StorageError,
    redb::CommitError,
    redb::CompactionError,
    redb::SetDurabilityError
);
