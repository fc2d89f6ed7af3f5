//! The one writer: events in, editions out. It runs on a thread of its own, takes whatever waits, and publishes once
//! for all of it, so that a lone change travels at once and a storm is merged. Policies are checked beside it: data
//! never waits for a compiler.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::bundle::Bundle;
use crate::bundle::fields::Fields;
use crate::bundle::log::Log;
use crate::bundle::project::Projection;
use crate::bundle::view::{Batch, View};
use crate::config::{CHECK_RETRY, COMMIT_EVENTS_MAX, Rego};
use crate::model::{Change, Content, Event, Feed, FeedId};
use crate::policy::candidates::LastGood;
use crate::policy::check::Compiler;
use crate::policy::settle::{Candidates, Outcome, settle};
use crate::policy::verdict::Fault;
use crate::readiness::Readiness;
use crate::source::auto::Auto;
use crate::store::Store;

/// What [`Readiness`] calls the policies.
pub const POLICIES: &str = "policies checked";

/// What the writer is told of policies.
pub enum Said {
    /// The policies that were accepted before a restart.
    Restored(LastGood),
    /// What came of the check under way.
    Checked(Outcome),
}

/// What the sources said, feed by feed.
#[derive(Default)]
pub struct Feeds(RwLock<Vec<Arc<FeedCounters>>>);

impl Feeds {
    /// The feeds that there are.
    pub fn list(&self) -> Vec<Arc<FeedCounters>> {
        let feeds = self.0.read().unwrap_or_else(PoisonError::into_inner);
        feeds.iter().filter(|feed| feed.open.load(Ordering::Relaxed)).cloned().collect()
    }

    fn of(&self, id: FeedId) -> Arc<FeedCounters> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)[id.0].clone()
    }

    fn open(&self, id: FeedId, name: String) {
        let mut feeds = self.0.write().unwrap_or_else(PoisonError::into_inner);
        match feeds.get(id.0) {
            Some(feed) => feed.open.store(true, Ordering::Relaxed),
            None => feeds.push(Arc::new(FeedCounters::new(name))),
        }
    }
}

/// What a source said of one feed.
pub struct FeedCounters {
    /// The feed's name.
    pub name: String,
    /// Events that came.
    pub events: AtomicU64,
    /// Objects that exist.
    pub objects: AtomicU64,
    /// Whether the feed goes on.
    open: AtomicBool,
}

impl FeedCounters {
    fn new(name: String) -> Self {
        Self { name, events: AtomicU64::new(0), objects: AtomicU64::new(0), open: AtomicBool::new(true) }
    }
}

/// Checks policies until the writer is gone. When the compiler itself fails, nobody is blamed, what was good stays,
/// and it is tried again.
pub async fn check(
    compiler: Compiler,
    mut jobs: mpsc::UnboundedReceiver<Arc<Candidates>>,
    said: mpsc::Sender<Said>,
    mut auto: Option<Auto>,
    readiness: Readiness,
) {
    while let Some(candidates) = jobs.recv().await {
        let started = Instant::now();
        let mut outcome = loop {
            match settle(&candidates, async |selection| compiler.check(selection).await).await {
                Ok(outcome) => break outcome,
                Err(error) => {
                    tracing::warn!(%error, "cannot check the policies");
                    readiness.failing(POLICIES, &error.to_string());
                    tokio::time::sleep(CHECK_RETRY).await;
                }
            }
        };
        readiness.problem(POLICIES, None);
        if let Compiler::Syntax(_) = compiler {
            for key in outcome.accepted.keys() {
                let warning = Fault::new("unchecked", "only its syntax was checked: the hub has no opa");
                outcome.warnings.entry(key.clone()).or_default().push(warning);
            }
        }
        let took = started.elapsed();
        tracing::debug!(checks = outcome.checks, ?took, "checked the policies");
        // What policies read comes before them, and goes after them.
        let mut reads = None;
        if let Some(auto) = &mut auto {
            let modules = outcome.accepted.values().flat_map(|texts| &texts.modules).collect();
            reads = auto.reads(&compiler, &modules, &readiness).await;
            if let Some(reads) = &reads {
                auto.widen(reads).await;
            }
        }
        if said.send(Said::Checked(outcome)).await.is_err() {
            return;
        }
        if let (Some(auto), Some(reads)) = (&mut auto, &reads) {
            auto.narrow(reads);
        }
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
    counters: Arc<Feeds>,
    jobs: mpsc::UnboundedSender<Arc<Candidates>>,
    settled: watch::Sender<BTreeSet<FeedId>>,
    good: watch::Sender<Option<LastGood>>,
    restored: bool,
    stage: Stage,
}

/// How far the first edition is.
#[derive(PartialEq, Eq, Clone, Copy)]
enum Stage {
    /// Not every source has listed yet.
    Listing,
    /// All is known, and the policies are being checked.
    Checking,
    /// Editions are published.
    Live,
}

/// Where the writer's ends lead.
pub struct Ends {
    /// What is to be checked: never more than one at a time.
    pub jobs: mpsc::UnboundedReceiver<Arc<Candidates>>,
    /// The feeds that nobody need wait for: listed, or not to be had.
    pub settled: watch::Receiver<BTreeSet<FeedId>>,
    /// What is accepted, whenever that changed.
    pub good: watch::Receiver<Option<LastGood>>,
}

impl Pipeline {
    /// A writer of `bundle` that has seen nothing, and waits for [`Said::Restored`].
    pub fn new(
        feeds: Vec<Feed>,
        rego: &Rego,
        fields: Fields,
        bundle: Arc<Bundle>,
        readiness: Readiness,
        counters: Arc<Feeds>,
    ) -> (Self, Ends) {
        let ensure = feeds.iter().filter_map(|feed| match &feed.content {
            Content::Resource(prefix) => Some(prefix.clone()),
            _ => None,
        });
        for (id, feed) in feeds.iter().enumerate() {
            counters.open(FeedId(id), feed.to_string());
        }
        let (jobs, checker) = mpsc::unbounded_channel();
        let (good, settled) = (watch::Sender::new(None), watch::Sender::default());
        let ends = Ends { jobs: checker, good: good.subscribe(), settled: settled.subscribe() };
        let writer = Self {
            view: View::empty(ensure.collect(), rego.dialect.version()),
            store: Store::new(&feeds),
            projection: Projection::new(feeds.clone(), rego.test_label.clone(), fields),
            feeds,
            batch: Batch::default(),
            log: Log::default(),
            bundle,
            readiness,
            counters,
            jobs,
            settled,
            good,
            restored: false,
            stage: Stage::Listing,
        };
        (writer, ends)
    }

    /// Writes until the sources are gone. Blocks its thread.
    pub fn run(mut self, mut events: mpsc::Receiver<(FeedId, Event)>, mut said: mpsc::Receiver<Said>) {
        let mut waiting = Vec::new();
        futures::executor::block_on(async {
            loop {
                tokio::select! {
                    count = events.recv_many(&mut waiting, COMMIT_EVENTS_MAX) => {
                        if count == 0 {
                            return;
                        }
                        waiting.drain(..).for_each(|(id, event)| self.take(id, event));
                    }
                    Some(said) = said.recv() => self.hear(said),
                }
                self.commit();
            }
        });
    }

    /// Takes what was said of policies into the batch.
    pub fn hear(&mut self, said: Said) {
        match said {
            Said::Restored(good) => {
                self.projection.restore(good);
                self.restored = true;
            }
            Said::Checked(outcome) => {
                self.projection.take_outcome(outcome, &mut self.batch);
                let good = self.projection.last_good();
                self.good.send_if_modified(|held| {
                    let changed = held.as_ref() != Some(&good);
                    *held = Some(good);
                    changed
                });
            }
        }
    }

    /// Takes one event into the batch.
    pub fn take(&mut self, id: FeedId, event: Event) {
        match &event {
            Event::Open(feed) => self.open(id, feed.clone()),
            Event::InitDone | Event::Unavailable => {
                self.settled.send_if_modified(|settled| settled.insert(id));
            }
            Event::Close => {
                self.settled.send_if_modified(|settled| settled.remove(&id));
            }
            _ => {}
        }
        let is_end = event == Event::Close;
        let counters = self.counters.of(id);
        if matches!(event, Event::Apply(_) | Event::Delete(_)) {
            counters.events.fetch_add(1, Ordering::Relaxed);
        }
        if event == Event::InitDone {
            self.readiness.ready(&self.feeds[id.0].to_string());
        }
        for change in self.store.apply(id, event) {
            if self.stage != Stage::Listing && !self.projection.is_closed(id) {
                self.projection.apply(change, &mut self.batch);
            }
        }
        if is_end {
            self.projection.close(id, &mut self.batch);
            counters.open.store(false, Ordering::Relaxed);
        }
        counters.objects.store(self.store.len(id) as u64, Ordering::Relaxed);
    }

    fn open(&mut self, id: FeedId, feed: Feed) {
        let name = feed.to_string();
        self.counters.open(id, name.clone());
        match self.feeds.get_mut(id.0) {
            Some(held) => *held = feed.clone(),
            None => self.feeds.push(feed.clone()),
        }
        let refused = self.projection.open(id, feed).err();
        if let Some(error) = &refused {
            tracing::warn!(feed = name, %error, "not replicated");
        }
        self.readiness.problem(&name, refused.map(|error| error.to_string()));
    }

    /// Publishes what the batch changed, once every source has listed and every policy was checked (I5, I6).
    pub fn commit(&mut self) {
        if self.stage == Stage::Listing {
            if !self.store.is_complete() || !self.restored {
                return;
            }
            self.project_all();
            self.stage = Stage::Checking;
        }
        if let Some(candidates) = self.projection.job() {
            // The checker ends with the hub only.
            _ = self.jobs.send(candidates);
        }
        self.bundle.verdicts.take(self.projection.told());
        self.bundle.set_problems(self.projection.problems());
        if self.stage == Stage::Checking && !self.projection.is_settled() {
            return;
        }
        let is_first = self.stage == Stage::Checking;
        self.stage = Stage::Live;
        let before = self.view.revision;
        match self.view.apply(std::mem::take(&mut self.batch)) {
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
            self.readiness.ready(POLICIES);
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

    /// Takes what all sources listed in one order on every replica, since who comes first may keep another out (I2):
    /// behind the policies that were restored data comes first, then the policies that are new.
    fn project_all(&mut self) {
        let mut first = self.store.objects();
        let is_policy = |id: FeedId| self.feeds[id.0].content == Content::Policies;
        first.sort_unstable_by(|(a, one), (b, other)| {
            (is_policy(*a), a, &one.key).cmp(&(is_policy(*b), b, &other.key))
        });
        for (id, object) in first {
            self.projection.apply(Change::Put(id, object), &mut self.batch);
        }
    }
}
