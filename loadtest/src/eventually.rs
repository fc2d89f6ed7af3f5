//! Waiting for a condition, never for a time.

use std::fmt::Display;
use std::time::{Duration, Instant};

use anyhow::bail;

/// How long a condition may take that involves starting processes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Between looks.
const LOOK: Duration = Duration::from_millis(5);

/// Tries until it succeeds, and says how long that took; fails with the last failure when [`PATIENCE`] ends.
pub async fn eventually<T, E: Display>(
    what: impl Display,
    attempt: impl AsyncFnMut() -> Result<T, E>,
) -> anyhow::Result<(T, Duration)> {
    within(PATIENCE, what, attempt).await
}

/// The same with a patience of its own.
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
                bail!("{what}: not within {} s: {error}", patience.as_secs())
            }
            Err(_) => tokio::time::sleep(LOOK).await,
        }
    }
}

/// Succeeds when the two are equal.
pub fn equal<T: PartialEq + std::fmt::Debug>(found: &T, expected: &T) -> Result<(), String> {
    if found == expected { Ok(()) } else { Err(format!("found {found:?}, expected {expected:?}")) }
}
