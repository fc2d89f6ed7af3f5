//! Status of each watch of a bundle.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::model::{self, InputId};
use crate::store;

/// By feed, `None` if closed. Clones share the content.
#[derive(Clone, Default)]
pub struct WatchStatuses(Arc<Mutex<Vec<Option<Arc<WatchStatus>>>>>);

/// A feed without recent response from its source.
#[derive(Debug)]
pub struct Stale {
    pub(crate) feed: String,
    pub(crate) silent: Duration,
}

impl std::fmt::Display for Stale {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "no response from {} for {} s", self.feed, self.silent.as_secs())
    }
}

/// Status of a feed.
pub struct WatchStatus {
    /// Display name.
    pub name: String,
    /// Name in positions.
    pub position_name: String,
    /// Counters of the watch, which bundles share.
    pub(crate) watch: Arc<store::Counters>,
    /// Total changed objects and keys.
    pub changes: AtomicU64,
}

impl WatchStatuses {
    /// Open feeds.
    pub fn list(&self) -> Vec<Arc<WatchStatus>> {
        self.with(|feeds| feeds.iter().flatten().cloned().collect())
    }

    /// The feed that has been stale for longest.
    pub(crate) fn stale(&self) -> Option<Stale> {
        self.longest(|_| true)
    }

    /// The stale feed with this position name.
    pub(crate) fn stale_of(&self, name: &str) -> Option<Stale> {
        self.longest(|feed| feed.position_name == name)
    }

    /// The stalest feed, except denied ones: every replica is denied those.
    pub(crate) fn silent(&self) -> Option<Stale> {
        self.longest(|feed| !feed.watch.is_refused())
    }

    fn longest(&self, matches: impl Fn(&WatchStatus) -> bool) -> Option<Stale> {
        let feeds = self.list();
        let feeds = feeds.iter().filter(|feed| matches(feed));
        let stale =
            feeds.filter_map(|feed| Some(Stale { silent: feed.watch.stale()?, feed: feed.name.clone() }));
        stale.max_by_key(|stale| stale.silent)
    }

    pub(crate) fn of(&self, id: InputId) -> Option<Arc<WatchStatus>> {
        self.with(|feeds| feeds.get(id.0).cloned().flatten())
    }

    pub(crate) fn open(&self, id: InputId, feed: &model::WatchSpec, watch: Arc<store::Counters>) {
        self.with(|feeds| {
            if feeds.len() <= id.0 {
                feeds.resize(id.0 + 1, None);
            }
            let (name, position_name) = (feed.to_string(), feed.position_name());
            feeds[id.0] =
                Some(Arc::new(WatchStatus { name, position_name, watch, changes: AtomicU64::new(0) }));
        });
    }

    pub(crate) fn close(&self, id: InputId) {
        self.with(|feeds| feeds.get_mut(id.0).map(Option::take));
    }

    fn with<T>(&self, f: impl FnOnce(&mut Vec<Option<Arc<WatchStatus>>>) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
