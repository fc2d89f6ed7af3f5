//! What each feed of a bundle was told and what came of it.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::model::{self, FeedId};
use crate::store;

/// By feed; none: it ended. Cloning shares them.
#[derive(Clone, Default)]
pub struct Feeds(Arc<Mutex<Vec<Option<Arc<Feed>>>>>);

/// A feed whose source was not heard for too long.
#[derive(Debug)]
pub struct Stale {
    /// Its name.
    pub feed: String,
    /// Since so long.
    pub silent: Duration,
}

impl std::fmt::Display for Stale {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} was not heard for {} s", self.feed, self.silent.as_secs())
    }
}

/// One feed.
pub struct Feed {
    /// Its name.
    pub name: String,
    /// What it is called in positions.
    pub position_name: String,
    /// What its watch said, which may serve others too.
    pub watch: Arc<store::Counters>,
    /// Objects and keys of which something changed for OPAs.
    pub changes: AtomicU64,
}

impl Feeds {
    /// The feeds that there are.
    pub fn list(&self) -> Vec<Arc<Feed>> {
        self.with(|feeds| feeds.iter().flatten().cloned().collect())
    }

    /// The feed whose source said nothing new for longest, where that is too long to trust what it said.
    pub fn stale(&self) -> Option<Stale> {
        self.longest(|_| true)
    }

    /// The same of what positions call `name`.
    pub fn stale_of(&self, name: &str) -> Option<Stale> {
        self.longest(|feed| feed.position_name == name)
    }

    /// The same, of those whose source says nothing at all. What refuses one replica something refuses it to all.
    pub fn silent(&self) -> Option<Stale> {
        self.longest(|feed| !feed.watch.is_refused())
    }

    fn longest(&self, of: impl Fn(&Feed) -> bool) -> Option<Stale> {
        let feeds = self.list();
        let feeds = feeds.iter().filter(|feed| of(feed));
        let stale =
            feeds.filter_map(|feed| Some(Stale { silent: feed.watch.stale()?, feed: feed.name.clone() }));
        stale.max_by_key(|stale| stale.silent)
    }

    /// The feed `id`, if it goes on.
    pub fn of(&self, id: FeedId) -> Option<Arc<Feed>> {
        self.with(|feeds| feeds.get(id.0).cloned().flatten())
    }

    /// The feed `id` begins.
    pub fn open(&self, id: FeedId, feed: &model::Feed, watch: Arc<store::Counters>) {
        self.with(|feeds| {
            if feeds.len() <= id.0 {
                feeds.resize(id.0 + 1, None);
            }
            let (name, position_name) = (feed.to_string(), feed.position_name());
            feeds[id.0] = Some(Arc::new(Feed { name, position_name, watch, changes: AtomicU64::new(0) }));
        });
    }

    /// Ends the feed `id`, if it was open.
    pub fn close(&self, id: FeedId) {
        self.with(|feeds| feeds.get_mut(id.0).map(Option::take));
    }

    fn with<T>(&self, f: impl FnOnce(&mut Vec<Option<Arc<Feed>>>) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
