//! The one writer of a bundle: changes in, editions out. It runs on a thread of its own, takes whatever waits, and
//! publishes once for all of it, so that a lone change travels at once and a storm is merged. Policies are checked
//! beside it: data never waits for a compiler.

mod checker;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use opa_hub_proto::path::DirPath;
use opa_hub_proto::position::{Bounds, Position};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::bundle::kept::Kept;
use crate::bundle::log::Log;
use crate::bundle::project::Projection;
use crate::bundle::spec::Spec;
use crate::bundle::view::{Batch, Changed, View};
use crate::bundle::{Bundle, Reading};
use crate::config::{self, NARROW_AFTER};
use crate::model::{Change, Content, Feed, FeedId, Scope, Version};
use crate::policy::analyze::Reads;
use crate::policy::candidates::LastGood;
use crate::policy::settle::{Candidates, Outcome, Progress};
use crate::readiness::Readiness;
use crate::store::{Store, Subscription, Taken};

pub use checker::check;

/// What [`Readiness`] calls the policies.
pub const POLICIES: &str = "policies checked";

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
        /// Places of the resources that it reads and the spec does not name; `None` if that is not known, or not asked.
        resources: Option<BTreeSet<DirPath>>,
    },
    /// More is known of what policies read than when they were checked.
    Recheck,
    /// Resources that policies are about to read.
    Opened {
        /// Not open yet.
        feeds: Vec<Feed>,
        /// Dropped once they were listed, or cannot be had.
        settled: oneshot::Sender<()>,
    },
}

/// The writer.
pub struct Pipeline {
    /// The spec's, and those that came because of policies.
    feeds: Vec<Feed>,
    source: Subscription,
    projection: Projection,
    batch: Batch,
    view: View,
    log: Log,
    /// How far each feed is in what was taken.
    heard: Heard,
    /// How far those of policies are in the check under way …
    checking: Heard,
    /// … and in what came of the last.
    checked: Heard,
    bundle: Arc<Bundle>,
    readiness: Readiness,
    jobs: mpsc::UnboundedSender<Arc<Candidates>>,
    good: watch::Sender<Option<LastGood>>,
    restored: bool,
    /// The policies that were good before a restart may be served.
    has_interim: bool,
    /// Who waits for feeds that were opened lately.
    opening: Vec<oneshot::Sender<()>>,
    /// Resources that came because policies read them.
    auto: BTreeSet<DirPath>,
    /// Data that goes once agents are past the policies that read it.
    narrower: Option<Narrower>,
    limits: config::BundleLimits,
    stage: Stage,
}

/// What remains of replicated objects once older policies no longer decide.
struct Narrower {
    kept: Kept,
    /// Resources that go.
    closing: BTreeSet<DirPath>,
    at: Instant,
}

/// How far feeds are.
#[derive(Default)]
struct Heard {
    /// All is taken that happened before …
    all: BTreeMap<FeedId, Version>,
    /// … and nothing that happened after this.
    newest: BTreeMap<FeedId, Version>,
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
    /// What is accepted, whenever that changed.
    pub good: watch::Receiver<Option<LastGood>>,
}

impl Pipeline {
    /// A writer of `bundle` as `spec` says that has seen nothing, and waits for [`Said::Restored`].
    pub fn new(spec: &Spec, bundle: Arc<Bundle>, store: &Arc<Store>, readiness: Readiness) -> (Self, Ends) {
        let ensure: BTreeSet<_> = spec.feeds.iter().filter_map(|feed| feed.place().cloned()).collect();
        let source = store.subscribe();
        for (id, feed) in spec.feeds.iter().enumerate() {
            let watch = source.open(FeedId(id), feed);
            bundle.feeds.open(FeedId(id), feed, watch);
        }
        let (jobs, checker) = mpsc::unbounded_channel();
        let good = watch::Sender::new(None);
        let ends = Ends { jobs: checker, good: good.subscribe() };
        let mut view = View::empty(ensure.into_iter().collect(), spec.dialect.version());
        let kept = spec.fields.given.clone();
        let reads = (!spec.fields.follows.is_nothing()).then(Reads::default);
        // Given fields are known to agents too, in case that they follow the policies after a restart.
        let is_auto = spec.auto.is_some();
        view.reads = (reads.is_some() || !kept.is_all() || is_auto).then(|| kept.to_text().into());
        bundle.set_reading(Reading { kept: kept.clone(), reads });
        bundle.set_objects(Box::new(source.replicated()));
        bundle.set_newest(Box::new(source.newest_by_feed()));
        let writer = Self {
            view,
            source,
            projection: Projection::new(spec, kept),
            auto: BTreeSet::new(),
            narrower: None,
            limits: spec.limits,
            feeds: spec.feeds.clone(),
            batch: Batch::default(),
            log: Log::new(spec.limits),
            heard: Heard::default(),
            checking: Heard::default(),
            checked: Heard::default(),
            bundle,
            readiness,
            jobs,
            good,
            restored: false,
            has_interim: false,
            opening: Vec::new(),
            stage: Stage::Listing,
        };
        (writer, ends)
    }

    /// The hub is not ready before there is an edition.
    pub fn gate(&self) {
        self.readiness.pending(POLICIES, "not checked yet");
        self.source.gate();
    }

    /// Writes until nobody says anything of policies any more. Blocks its thread.
    pub fn run(mut self, mut said: mpsc::Receiver<Said>) {
        futures::executor::block_on(async {
            loop {
                tokio::select! {
                    () = self.source.changed() => {}
                    said = said.recv() => match said {
                        Some(said) => self.hear(said),
                        None => return,
                    },
                    () = due(self.narrower.as_ref().map(|narrower| narrower.at)) => self.narrow(),
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
            Said::Checked { outcome, reads, resources } => {
                // Before the policies that read it, and in one commit with them: frames tell data first.
                if reads.is_some() || resources.is_some() {
                    self.widen(reads, resources.as_ref());
                }
                // Policies that only wait are not checked yet.
                let checking = std::mem::take(&mut self.checking);
                match outcome.progress {
                    Progress::All => self.checked = checking,
                    Progress::Good => self.has_interim = true,
                    Progress::Nothing => {}
                }
                self.projection.take_outcome(outcome, &mut self.batch);
                let good = self.projection.last_good();
                self.good.send_if_modified(|held| {
                    let changed = held.as_ref() != Some(&good);
                    *held = Some(good);
                    changed
                });
            }
            Said::Recheck => self.projection.recheck(),
            Said::Opened { feeds, settled } => {
                for feed in &feeds {
                    self.open(feed);
                }
                self.opening.push(settled);
            }
        }
    }

    /// Keeps what is read from now on, beside what was read until now.
    fn widen(&mut self, reads: Option<Reads>, resources: Option<&BTreeSet<DirPath>>) {
        let closing: BTreeSet<_> = match resources {
            Some(resources) => self.auto.difference(resources).cloned().collect(),
            None => self.narrower.take().map(|narrower| narrower.closing).unwrap_or_default(),
        };
        let mut target = match &reads {
            Some(reads) => self.projection.kept_for(reads),
            None => self.projection.kept().clone(),
        };
        // The text tells agents which resources there are for these policies.
        for place in self.auto.difference(&closing) {
            target.name(place);
        }
        for place in &closing {
            target.forget(place);
        }
        self.view.reads = Some(target.to_text().into());
        if let Some(reads) = &reads {
            self.projection.read_by(reads, &target);
        }
        self.bundle.set_reading(Reading { kept: target.clone(), reads });
        let mut both = self.projection.kept().clone();
        both.join(&target);
        let at = Instant::now() + NARROW_AFTER;
        self.narrower =
            (both != target || !closing.is_empty()).then_some(Narrower { kept: target, closing, at });
        self.keep(both);
        if self.stage != Stage::Live {
            self.give_up();
        }
    }

    /// Gives up what is no longer read, in a commit of its own.
    pub fn narrow(&mut self) {
        if self.give_up() {
            self.publish(true);
        }
    }

    fn give_up(&mut self) -> bool {
        let Some(Narrower { kept, closing, .. }) = self.narrower.take() else { return false };
        self.close(&closing);
        self.keep(kept);
        true
    }

    fn keep(&mut self, kept: Kept) {
        let feeds = self.projection.keep(kept);
        let objects = self.source.objects_of(&feeds);
        // What is gone and was not taken yet has no object to be cut anew.
        let live = objects.iter().map(|(id, object)| (*id, object.key.clone())).collect();
        self.projection.remove_others(&feeds, &live, &mut self.batch);
        for (id, object) in objects {
            self.projection.apply_again(id, object, &mut self.batch);
        }
        self.heard.newest = self.source.newest();
    }

    /// Takes so much at most of what changed into the batch. Whether that is all.
    fn take(&mut self, max: usize) -> bool {
        let Taken { changes, all, newest } = self.source.take(max);
        let is_all = all.is_some();
        if let Some(all) = all {
            self.heard.all = all;
        } else {
            // Of a feed that came meanwhile nothing is all there.
            self.heard.all.retain(|id, _| newest.contains_key(id));
            for id in newest.keys() {
                self.heard.all.entry(*id).or_insert(Version(0));
            }
        }
        self.heard.newest = newest;
        for change in changes {
            let (Change::Put(id, _) | Change::Remove(id, _)) = &change;
            if !self.projection.is_closed(*id) {
                self.projection.apply(change, &mut self.batch);
            }
        }
        is_all
    }

    /// How far policies are in what was taken.
    fn policies_heard(&self) -> Heard {
        let of = |heard: &BTreeMap<FeedId, Version>| {
            let heard = heard.iter().map(|(id, version)| (*id, *version));
            heard.filter(|(id, _)| self.is_policies(*id)).collect()
        };
        Heard { all: of(&self.heard.all), newest: of(&self.heard.newest) }
    }

    fn is_policies(&self, id: FeedId) -> bool {
        self.feeds[id.0].content == Content::Policies
    }

    fn position(&self, of: impl Fn(&Heard) -> &BTreeMap<FeedId, Version>) -> Position {
        let mut position = Position::default();
        let others = of(&self.heard).iter().filter(|(id, _)| !self.is_policies(**id));
        for (id, Version(version)) in others.chain(of(&self.checked)) {
            position.heard(self.feeds[id.0].position_name(), *version);
        }
        position
    }

    fn open(&mut self, feed: &Feed) {
        if let Some(narrower) = &mut self.narrower
            && let Some(place) = feed.place()
        {
            narrower.closing.remove(place);
        }
        if feed.place().is_some_and(|place| self.auto.contains(place)) {
            return;
        }
        let name = feed.to_string();
        let held = self.feeds.iter().position(|held| held.content == feed.content);
        let id = FeedId(held.unwrap_or(self.feeds.len()));
        match self.feeds.get_mut(id.0) {
            Some(held) => *held = feed.clone(),
            None => self.feeds.push(feed.clone()),
        }
        let refused = self.projection.open(id, feed.clone()).err();
        match &refused {
            Some(error) => tracing::warn!(feed = name, %error, "not replicated"),
            None => self.bundle.feeds.open(id, feed, self.source.open(id, feed)),
        }
        self.auto.extend(feed.place().cloned());
        self.readiness.problem(&format!("replicated {name}"), refused.map(|error| error.to_string()));
    }

    fn close(&mut self, places: &BTreeSet<DirPath>) {
        let named = |feed: &Feed| feed.place().is_some_and(|place| places.contains(place));
        let ids: Vec<_> = (0..self.feeds.len()).filter(|id| named(&self.feeds[*id])).map(FeedId).collect();
        for id in ids {
            self.source.close(id);
            self.projection.close(id, &mut self.batch);
            self.bundle.feeds.close(id);
            self.readiness.problem(&format!("replicated {}", self.feeds[id.0]), None);
        }
        self.auto.retain(|place| !places.contains(place));
    }

    /// Publishes what the batch changed, once every source has listed and every policy was checked (I5, I6).
    pub fn commit(&mut self) {
        self.commit_some(self.limits.commit_events_max);
    }

    /// The same of so many changes at most.
    pub fn commit_some(&mut self, max: usize) {
        if self.stage == Stage::Listing {
            if !self.source.is_listed() || !self.restored {
                return;
            }
            self.project_all();
            self.stage = Stage::Checking;
        }
        // In this order: a list that ends in between is not taken yet.
        let is_settled = self.source.is_settled();
        let is_all = self.take(max);
        self.projection.retry_refused(&mut self.batch);
        if is_all && is_settled && !self.opening.is_empty() {
            self.opening.clear();
        }
        if let Some(candidates) = self.projection.job() {
            self.checking = self.policies_heard();
            // The checker ends with the hub only.
            _ = self.jobs.send(candidates);
        } else if self.projection.is_settled() {
            self.checked = self.policies_heard();
        }
        self.bundle.counters.projection_bytes.store(self.projection.memory(), Ordering::Relaxed);
        self.bundle.verdicts.take(self.projection.told());
        self.bundle.set_problems(self.projection.problems());
        if self.stage == Stage::Checking && !self.has_interim && !self.projection.is_settled() {
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
            None if !is_first => return self.bundle.set_position(&self.position(|heard| &heard.all)),
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
        let all = self.position(|heard| &heard.all);
        let bounds = Bounds { all: all.clone(), newest: self.position(|heard| &heard.newest) };
        self.bundle.publish(self.view.clone(), self.log.clone(), bounds);
        self.bundle.set_position(&all);
    }

    fn count(&self, changed: &Changed) {
        for (id, place, _) in self.projection.places() {
            let of = match &self.feeds[id.0].scope {
                Scope::Namespace(namespace) => place.join(namespace).unwrap_or_else(|_| place.clone()),
                _ => place.clone(),
            };
            let keys = changed.dirs.iter().filter(|dir| dir.path.is_within(&of)).map(|dir| dir.keys.len());
            if let Some(feed) = self.bundle.feeds.of(id) {
                feed.changes.fetch_add(keys.sum::<usize>() as u64, Ordering::Relaxed);
            }
        }
    }

    /// Takes what all sources listed in one order on every replica, since who comes first may keep another out (I2):
    /// behind the policies that were restored data comes first, then the policies that are new.
    fn project_all(&mut self) {
        let mut first = self.source.start();
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
