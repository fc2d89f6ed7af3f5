//! The one writer: events in, editions out. It runs on a thread of its own, takes whatever waits, and publishes once
//! for all of it, so that a lone change travels at once and a storm is merged.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::mpsc;

use crate::bundle::Bundle;
use crate::bundle::log::Log;
use crate::bundle::project::Projection;
use crate::bundle::view::{Batch, View};
use crate::config::COMMIT_EVENTS_MAX;
use crate::model::{Change, Content, Event, Feed, FeedId};
use crate::readiness::Readiness;
use crate::store::Store;

/// What the sources said, by feed.
pub struct FeedCounters {
    /// The feed's name.
    pub name: String,
    /// Events that came.
    pub events: AtomicU64,
    /// Objects that exist.
    pub objects: AtomicU64,
}

impl FeedCounters {
    /// Counters at zero for these feeds.
    pub fn new(feeds: &[Feed]) -> Vec<Self> {
        let counters = |feed: &Feed| Self {
            name: feed.to_string(),
            events: AtomicU64::new(0),
            objects: AtomicU64::new(0),
        };
        feeds.iter().map(counters).collect()
    }
}

/// The writer.
pub struct Pipeline {
    feeds: Vec<Feed>,
    store: Store,
    projection: Projection,
    batch: Batch,
    view: View,
    log: Log,
    bundle: Arc<Bundle>,
    readiness: Readiness,
    counters: Arc<Vec<FeedCounters>>,
    /// Not every source has listed yet. What they gave is then taken in one order on every replica, since who comes
    /// first may keep another out (I2).
    is_first: bool,
}

impl Pipeline {
    /// A writer of `bundle` that has seen nothing.
    pub fn new(
        feeds: Vec<Feed>,
        bundle: Arc<Bundle>,
        readiness: Readiness,
        counters: Arc<Vec<FeedCounters>>,
    ) -> Self {
        let ensure = feeds.iter().filter_map(|feed| match &feed.content {
            Content::Resource(prefix) => Some(prefix.clone()),
            _ => None,
        });
        Self {
            view: View::empty(ensure.collect()),
            store: Store::new(&feeds),
            projection: Projection::new(feeds.clone()),
            feeds,
            batch: Batch::default(),
            log: Log::default(),
            bundle,
            readiness,
            counters,
            is_first: true,
        }
    }

    /// Writes until the sources are gone. Blocks its thread.
    pub fn run(mut self, mut events: mpsc::Receiver<(FeedId, Event)>) {
        let mut waiting = Vec::new();
        while events.blocking_recv_many(&mut waiting, COMMIT_EVENTS_MAX) > 0 {
            waiting.drain(..).for_each(|(id, event)| self.take(id, event));
            self.commit();
        }
    }

    /// Takes one event into the batch.
    pub fn take(&mut self, id: FeedId, event: Event) {
        let counters = &self.counters[id.0];
        if matches!(event, Event::Apply(_) | Event::Delete(_)) {
            counters.events.fetch_add(1, Ordering::Relaxed);
        }
        if event == Event::InitDone {
            self.readiness.ready(&self.feeds[id.0].to_string());
        }
        for change in self.store.apply(id, event) {
            if !self.is_first {
                self.projection.apply(change, &mut self.batch);
            }
        }
        counters.objects.store(self.store.len(id) as u64, Ordering::Relaxed);
    }

    /// Publishes what the batch changed, once every source has listed (I5).
    pub fn commit(&mut self) {
        if !self.store.is_complete() {
            return;
        }
        let is_first = std::mem::take(&mut self.is_first);
        if is_first {
            let mut first = self.store.objects();
            first.sort_unstable_by(|(a, one), (b, other)| (a, &one.key).cmp(&(b, &other.key)));
            for (id, object) in first {
                self.projection.apply(Change::Put(id, object), &mut self.batch);
            }
        }
        let before = self.view.revision;
        let next = self.view.apply(std::mem::take(&mut self.batch));
        self.bundle.set_problems(self.projection.problems());
        match next {
            None if !is_first => return,
            None => {}
            Some((view, changed)) => {
                tracing::debug!(bundle = self.bundle.name, revision = %view.revision, keys = changed.len(), "new view");
                self.view = view;
                if !is_first {
                    self.log.push(before, changed);
                }
            }
        }
        if is_first {
            tracing::info!(
                bundle = self.bundle.name,
                revision = %self.view.revision,
                modules = self.view.modules.len(),
                directories = self.view.dirs.len(),
                entries = self.view.entries(),
                "ready"
            );
        }
        self.bundle.publish(self.view.clone(), self.log.clone());
    }
}
