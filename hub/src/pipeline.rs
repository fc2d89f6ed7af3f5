//! The one writer: events in, editions out. It runs on a thread of its own, takes whatever waits, and publishes once
//! for all of it, so that a lone change travels at once and a storm is merged. Policies are checked beside it: data
//! never waits for a compiler.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use opa_hub_proto::path::DirPath;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::bundle::kept::Kept;
use crate::bundle::log::Log;
use crate::bundle::project::Projection;
use crate::bundle::view::{Batch, Changed, View};
use crate::bundle::{Bundle, Reading};
use crate::config::{CHECK_RETRY, COMMIT_EVENTS_MAX, NARROW_AFTER, Rego, Selection};
use crate::model::{Change, Content, Event, Feed, FeedId};
use crate::policy::analyze::{self, Reads};
use crate::policy::candidates::LastGood;
use crate::policy::check::{Compiler, Modules};
use crate::policy::settle::{Candidates, Outcome, settle};
use crate::policy::verdict::Fault;
use crate::readiness::Readiness;
use crate::source::auto::Auto;
use crate::store::Store;

/// What [`Readiness`] calls the policies.
pub const POLICIES: &str = "policies checked";
/// What it calls the fields.
const FIELDS: &str = "--fields auto";

/// What the writer is told of policies.
pub enum Said {
    /// The policies that were accepted before a restart.
    Restored(LastGood),
    /// What came of the check under way.
    Checked {
        /// What is accepted.
        outcome: Outcome,
        /// What that reads; none: fields do not follow from it.
        reads: Option<Reads>,
    },
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
    /// Objects and keys of which something changed for OPAs.
    pub changes: AtomicU64,
    /// Objects that exist.
    pub objects: AtomicU64,
    /// Whether the feed goes on.
    open: AtomicBool,
}

impl FeedCounters {
    fn new(name: String) -> Self {
        Self {
            name,
            events: AtomicU64::new(0),
            changes: AtomicU64::new(0),
            objects: AtomicU64::new(0),
            open: AtomicBool::new(true),
        }
    }
}

/// Checks policies until the writer is gone. When the compiler itself fails, nobody is blamed, what was good stays,
/// and it is tried again.
pub async fn check(
    compiler: Compiler,
    mut jobs: mpsc::UnboundedReceiver<Arc<Candidates>>,
    said: mpsc::Sender<Said>,
    mut auto: Option<Auto>,
    fields: Selection,
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
        let modules = outcome.accepted.values().flat_map(|texts| &texts.modules).collect();
        // What policies read comes before them, and goes after them.
        let mut resources = None;
        if let Some(auto) = &mut auto {
            resources = auto.reads(&compiler, &modules, &readiness).await;
            if let Some(resources) = &resources {
                auto.widen(resources).await;
            }
        }
        let reads = match &fields {
            Selection::Given(_) => None,
            Selection::Auto { entrypoints, .. } => {
                Some(read_by(&compiler, &modules, entrypoints, &readiness).await)
            }
        };
        if said.send(Said::Checked { outcome, reads }).await.is_err() {
            return;
        }
        if let (Some(auto), Some(resources)) = (&mut auto, &resources) {
            auto.narrow(resources);
        }
    }
}

/// What of the data `modules` read: all of it where that cannot be told, which is said.
async fn read_by(
    compiler: &Compiler,
    modules: &Modules<'_>,
    entrypoints: &[DirPath],
    readiness: &Readiness,
) -> Reads {
    if modules.is_empty() {
        return Reads::default();
    }
    let plan = compiler.plan(modules, entrypoints).await;
    let problem = match &plan {
        Ok(Some(_)) => None,
        Ok(None) => Some("it needs a real OPA: give --opa-bin; until then whole objects travel".to_owned()),
        Err(error) => Some(format!("whole objects travel: {error}")),
    };
    if let Some(problem) = problem.as_ref().filter(|problem| readiness.is_news(FIELDS, problem)) {
        tracing::warn!("{FIELDS}: {problem}");
    }
    readiness.problem(FIELDS, problem);
    plan.ok().flatten().map_or_else(Reads::everything, |plan| analyze::reads(&plan))
}

/// The writer.
pub struct Pipeline {
    feeds: Vec<Feed>,
    store: Arc<Mutex<Store>>,
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
    fields: Selection,
    /// What is to be kept once agents are past the policies that read more, and when that is.
    narrower: Option<(Kept, Instant)>,
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
        fields: Selection,
        bundle: Arc<Bundle>,
        readiness: Readiness,
        counters: Arc<Feeds>,
    ) -> (Self, Ends) {
        let ensure = feeds.iter().filter_map(|feed| feed.place().cloned());
        for (id, feed) in feeds.iter().enumerate() {
            counters.open(FeedId(id), feed.to_string());
        }
        let (jobs, checker) = mpsc::unbounded_channel();
        let (good, settled) = (watch::Sender::new(None), watch::Sender::default());
        let ends = Ends { jobs: checker, good: good.subscribe(), settled: settled.subscribe() };
        let mut view = View::empty(ensure.collect(), rego.dialect.version());
        let (kept, reads) = match &fields {
            Selection::Given(fields) => (Kept::alike(fields.clone()), None),
            Selection::Auto { include, .. } => (Kept::alike(include.clone()), Some(Reads::default())),
        };
        // Given fields are known to agents too, in case that they follow the policies after a restart.
        let is_whole = matches!(&fields, Selection::Given(fields) if fields.is_all());
        view.reads = (!is_whole).then(|| kept.to_text().into());
        bundle.set_reading(Reading { kept: kept.clone(), reads });
        let store = Arc::new(Mutex::new(Store::new(&feeds)));
        let shared = Arc::clone(&store);
        bundle.set_objects(Box::new(move || {
            shared.lock().unwrap_or_else(PoisonError::into_inner).replicated()
        }));
        let writer = Self {
            view,
            store,
            projection: Projection::new(feeds.clone(), rego.test_label.clone(), kept),
            fields,
            narrower: None,
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
                    () = due(self.narrower.as_ref().map(|(_, at)| *at)) => self.narrow(),
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
            Said::Checked { outcome, reads } => {
                // Before the policies that read it, and in one commit with them: frames tell data first.
                if let Some(reads) = reads {
                    self.widen(reads);
                }
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

    /// Keeps what is read from now on, beside what was read until now.
    fn widen(&mut self, reads: Reads) {
        let Selection::Auto { include, .. } = &self.fields else { return };
        let places = self.projection.places().map(|(_, place, scope)| (place.clone(), scope));
        let mut target = Kept::of_reads(&reads, places);
        target.join_alike(include);
        self.view.reads = Some(target.to_text().into());
        self.projection.read_by(&reads, &target);
        self.bundle.set_reading(Reading { kept: target.clone(), reads: Some(reads) });
        if self.stage != Stage::Live {
            return self.keep(target);
        }
        let mut both = self.projection.kept().clone();
        both.join(&target);
        self.narrower = (both != target).then(|| (target, Instant::now() + NARROW_AFTER));
        self.keep(both);
    }

    /// Gives up what is no longer read. It goes in a commit of its own.
    pub fn narrow(&mut self) {
        if let Some((target, _)) = self.narrower.take() {
            self.keep(target);
            self.publish(true);
        }
    }

    fn keep(&mut self, kept: Kept) {
        let feeds = self.projection.keep(kept);
        let objects = self.store().objects_of(&feeds);
        for (id, object) in objects {
            self.projection.apply(Change::Put(id, object), &mut self.batch);
        }
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
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
        let changes = self.store().apply(id, event);
        for change in changes {
            if self.stage != Stage::Listing && !self.projection.is_closed(id) {
                self.projection.apply(change, &mut self.batch);
            }
        }
        if is_end {
            self.projection.close(id, &mut self.batch);
            counters.open.store(false, Ordering::Relaxed);
        }
        counters.objects.store(self.store().len(id) as u64, Ordering::Relaxed);
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
            if !self.store().is_complete() || !self.restored {
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
        self.publish(false);
    }

    /// `narrows`: fields go that older modules read.
    fn publish(&mut self, narrows: bool) {
        let is_first = self.stage == Stage::Checking;
        self.stage = Stage::Live;
        let before = self.view.revision;
        match self.view.apply(std::mem::take(&mut self.batch)) {
            None if !is_first => return,
            None => {}
            Some((view, changed)) => {
                tracing::debug!(bundle = self.bundle.name, revision = %view.revision, keys = changed.len(), "new view");
                self.count(&changed);
                self.view = view;
                if !is_first {
                    self.log.push(before, changed, narrows);
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

    fn count(&self, changed: &Changed) {
        for (id, place, _) in self.projection.places() {
            let keys = changed.dirs.iter().filter(|dir| dir.path.is_within(place)).map(|dir| dir.keys.len());
            self.counters.of(id).changes.fetch_add(keys.sum::<usize>() as u64, Ordering::Relaxed);
        }
    }

    /// Takes what all sources listed in one order on every replica, since who comes first may keep another out (I2):
    /// behind the policies that were restored data comes first, then the policies that are new.
    fn project_all(&mut self) {
        let mut first = self.store().objects();
        let is_policy = |id: FeedId| self.feeds[id.0].content == Content::Policies;
        first.sort_unstable_by(|(a, one), (b, other)| {
            (is_policy(*a), a, &one.key).cmp(&(is_policy(*b), b, &other.key))
        });
        for (id, object) in first {
            self.projection.apply(Change::Put(id, object), &mut self.batch);
        }
    }
}

/// Waits until then; for ever, where there is nothing to wait for.
async fn due(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
