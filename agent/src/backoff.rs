//! Exponential backoff with full jitter.

use std::time::Duration;

const BACKOFF_MIN: Duration = Duration::from_millis(100);

pub(crate) struct Backoff {
    /// Bound of the next pause.
    bound: Duration,
    max: Duration,
}

impl Backoff {
    pub(crate) fn new(max: Duration) -> Self {
        Self { bound: BACKOFF_MIN, max }
    }

    pub(crate) fn reset(&mut self) {
        self.bound = BACKOFF_MIN;
    }

    /// Sleeps up to the bound, which doubles.
    pub(crate) async fn sleep(&mut self) {
        let bound = self.bound;
        // The caller may drop this future.
        self.bound = (bound * 2).min(self.max);
        tokio::time::sleep(bound.mul_f64(fastrand::f64())).await;
    }
}
