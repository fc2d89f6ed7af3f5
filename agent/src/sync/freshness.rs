//! Schedule of searches for a ready hub.

use std::time::Duration;

use tokio::time::Instant;

const PROBE_PAUSE_MIN: Duration = Duration::from_secs(5);
const PROBE_PAUSE_MAX: Duration = Duration::from_secs(60);
/// After this time the source itself went back, e.g. to a backup.
const BEHIND_MAX: Duration = Duration::from_secs(60);

pub(super) struct Freshness {
    next_probe: Instant,
    pause: Duration,
    /// First and last response of a hub behind OPA.
    behind: Option<(Instant, Instant)>,
}

impl Freshness {
    pub(super) fn new() -> Self {
        Self { next_probe: Instant::now(), pause: PROBE_PAUSE_MIN, behind: None }
    }

    pub(super) fn reset_probes(&mut self) {
        (self.next_probe, self.pause) = (Instant::now(), PROBE_PAUSE_MIN);
    }

    /// Schedules the next search if one is due.
    pub(super) fn is_probe_due(&mut self) -> bool {
        let now = Instant::now();
        if now < self.next_probe {
            return false;
        }
        self.next_probe = now + self.pause.mul_f64(0.5 + fastrand::f64());
        self.pause = (self.pause * 2).min(PROBE_PAUSE_MAX);
        true
    }

    /// Starts a new period if the last one is older than `rotation_timeout`.
    pub(super) fn record_behind(&mut self, rotation_timeout: Duration) {
        let now = Instant::now();
        let recent = self.behind.filter(|(_, last)| now - *last < rotation_timeout);
        self.behind = Some((recent.map_or(now, |(first, _)| first), now));
    }

    pub(super) fn clear_behind(&mut self) {
        self.behind = None;
    }

    pub(super) fn has_source_regressed(&self) -> bool {
        self.behind.is_some_and(|(first, last)| last - first > BEHIND_MAX)
    }
}
