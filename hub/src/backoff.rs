//! TODO

use std::time::Duration;

/// First pause after a failed watch, doubled by each failure.
pub const RETRY: Duration = Duration::from_millis(500);
/// Maximum pause after a failed watch.
pub const RETRY_MAX: Duration = Duration::from_secs(10);
