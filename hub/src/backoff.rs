//! Bounds of the pauses between retries.

use std::time::Duration;

/// First pause.
pub(crate) const BACKOFF_MIN: Duration = Duration::from_millis(500);
/// Maximum pause: hubs are few, and their agents wait.
pub(crate) const BACKOFF_MAX: Duration = Duration::from_secs(10);

/// Returns the pause that follows `pause`.
pub(crate) fn increased(pause: Duration) -> Duration {
    (pause * 2).min(BACKOFF_MAX)
}
