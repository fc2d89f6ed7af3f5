//! What each feed of a bundle was told and what came of it.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};

use crate::model::FeedId;
use crate::store;

/// By feed; none: it ended.
#[derive(Default)]
pub struct Feeds(Mutex<Vec<Option<Arc<Feed>>>>);

/// One feed.
pub struct Feed {
    /// Its name.
    pub name: String,
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

    /// The feed `id`, if it goes on.
    pub fn of(&self, id: FeedId) -> Option<Arc<Feed>> {
        self.with(|feeds| feeds.get(id.0).cloned().flatten())
    }

    /// The feed `id` begins.
    pub fn open(&self, id: FeedId, name: String, watch: Arc<store::Counters>) {
        self.with(|feeds| {
            if feeds.len() <= id.0 {
                feeds.resize(id.0 + 1, None);
            }
            feeds[id.0] = Some(Arc::new(Feed { name, watch, changes: AtomicU64::new(0) }));
        });
    }

    /// It ends.
    pub fn close(&self, id: FeedId) {
        self.with(|feeds| feeds[id.0] = None);
    }

    fn with<T>(&self, f: impl FnOnce(&mut Vec<Option<Arc<Feed>>>) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
