//! Concurrent histogram of delays, in buckets of 2 %.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

const FIRST: f64 = 10e-6;
const STEP: f64 = 1.02;
/// `FIRST * STEP^BUCKETS` is 11 minutes.
const BUCKETS: usize = 910;

pub(crate) struct Histogram(Vec<AtomicU64>);

impl Histogram {
    pub(crate) fn new() -> Self {
        Self((0..=BUCKETS).map(|_| AtomicU64::new(0)).collect())
    }

    pub(crate) fn record(&self, delay: Duration) {
        let steps = (delay.as_secs_f64().max(FIRST) / FIRST).ln() / STEP.ln();
        self.0[(steps.ceil() as usize).min(BUCKETS)].fetch_add(1, Relaxed);
    }

    pub(crate) fn add(&self, other: &Self) {
        self.0
            .iter()
            .zip(&other.0)
            .for_each(|(count, other)| _ = count.fetch_add(other.load(Relaxed), Relaxed));
    }

    pub(crate) fn count(&self) -> u64 {
        self.0.iter().map(|count| count.load(Relaxed)).sum()
    }

    pub(crate) fn percentile(&self, percent: f64) -> f64 {
        let rank = (self.count() as f64 * percent / 100.0).ceil().max(1.0);
        let mut seen = 0.0;
        for (bucket, count) in self.0.iter().enumerate() {
            seen += count.load(Relaxed) as f64;
            if seen >= rank {
                return FIRST * STEP.powf(bucket as f64);
            }
        }
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_within_a_step() {
        let histogram = Histogram::new();
        (1..=1000).for_each(|ms| histogram.record(Duration::from_millis(ms)));
        assert_eq!(histogram.count(), 1000);
        for (percent, seconds) in [(50.0, 0.5), (99.0, 0.99), (100.0, 1.0)] {
            let found = histogram.percentile(percent);
            assert!((1.0..1.021).contains(&(found / seconds)), "{percent} %: {found}");
        }
    }
}
