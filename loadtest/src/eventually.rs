//! Polling for a condition.

use std::fmt::Display;
use std::time::{Duration, Instant};

use anyhow::bail;

/// Enough to start processes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Retries until success and returns the elapsed time; fails after [`PATIENCE`].
pub async fn eventually<T, E: Display>(
    what: impl Display,
    attempt: impl AsyncFnMut() -> Result<T, E>,
) -> anyhow::Result<(T, Duration)> {
    within(PATIENCE, what, attempt).await
}

/// Retries for at most `patience`.
pub async fn within<T, E: Display>(
    patience: Duration,
    what: impl Display,
    mut attempt: impl AsyncFnMut() -> Result<T, E>,
) -> anyhow::Result<(T, Duration)> {
    let started = Instant::now();
    loop {
        match attempt().await {
            Ok(value) => return Ok((value, started.elapsed())),
            Err(error) if started.elapsed() > patience => {
                bail!("timed out after {} s: {what}: {error}", patience.as_secs())
            }
            Err(_) => tokio::time::sleep(POLL_INTERVAL).await,
        }
    }
}

/// Succeeds if both values are equal.
pub fn equal<T: PartialEq + std::fmt::Debug>(found: &T, expected: &T) -> Result<(), String> {
    if found == expected { Ok(()) } else { Err(format!("found {found:?}, expected {expected:?}")) }
}
