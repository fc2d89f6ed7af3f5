//! The single writer of a bundle.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use opa_hub_proto::path::DirPath;
use opa_hub_proto::position::{Bounds, Position};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::bundle::{Bundle, FieldState};
use crate::fields::masks::FieldMasks;
use crate::health::Health;
use crate::model::{Change, Content, InputId, NamespaceSelector, Version, WatchSpec};
use crate::pipeline::{NARROW_AFTER, POLICIES, WriterCommand, WriterHandles};
use crate::policy::candidate::{Candidates, Progress};
use crate::policy::dataflow::ReadSet;
use crate::policy::registry::LastGood;
use crate::projection::Projector;
use crate::snapshot::history::{BundleLimits, History};
use crate::snapshot::{Batch, ChangeSet, Snapshot};
use crate::spec::BundleSpec;
use crate::store::{ChangeBatch, Store, Subscription};

/// Writer of one bundle.
pub struct BundleWriter {
    feeds: Vec<WatchSpec>,
    source: Subscription,
    projection: Projector,
    batch: Batch,
    snapshot: Snapshot,
    history: History,
    observed: Watermarks,
    /// Policies in the running check.
    in_check: Watermarks,
    /// Policies in the last complete check.
    verified: Watermarks,
    bundle: Arc<Bundle>,
    readiness: Health,
    jobs: mpsc::UnboundedSender<Arc<Candidates>>,
    last_good: watch::Sender<Option<LastGood>>,
    is_restored: bool,
    /// Whether last good policies are published during the check.
    has_interim: bool,
    list_waiters: Vec<oneshot::Sender<()>>,
    auto_resources: BTreeSet<DirPath>,
    pending_removal: Option<PendingRemoval>,
    limits: BundleLimits,
    phase: Phase,
}

/// Data is removed after agents have dropped the policies that read it (I10).
struct PendingRemoval {
    remaining: FieldMasks,
    resources: BTreeSet<DirPath>,
    due: Instant,
}

#[derive(Default)]
struct Watermarks {
    /// All changes up to these were drained.
    complete: BTreeMap<InputId, Version>,
    /// No later changes were drained.
    newest: BTreeMap<InputId, Version>,
}

#[derive(PartialEq, Eq, Clone, Copy)]
enum Phase {
    Listing,
    Checking,
    Live,
}

impl BundleWriter {
    /// Creates a writer, which publishes nothing before [`WriterCommand::RestoreLastGood`].
    pub fn new(
        spec: &BundleSpec,
        bundle: Arc<Bundle>,
        store: &Arc<Store>,
        readiness: Health,
    ) -> (Self, WriterHandles) {
        let ensure: BTreeSet<_> = spec.feeds.iter().filter_map(|feed| feed.place().cloned()).collect();
        let source = store.subscribe();
        for (id, feed) in spec.feeds.iter().enumerate() {
            let watch = source.open(InputId(id), feed);
            bundle.feeds.open(InputId(id), feed, watch);
        }
        let (jobs, checker) = mpsc::unbounded_channel();
        let last_good = watch::Sender::new(None);
        let ends = WriterHandles { jobs: checker, good: last_good.subscribe() };
        let mut snapshot = Snapshot::empty(ensure.into_iter().collect(), spec.dialect.version());
        let kept = spec.fields.given.clone();
        let reads = (!spec.fields.follows.is_nothing()).then(ReadSet::default);
        // Agents need explicit fields too: after a restart fields may follow policies.
        let is_auto = spec.auto.is_some();
        snapshot.reads = (reads.is_some() || !kept.is_all() || is_auto).then(|| kept.to_text().into());
        bundle.set_reading(FieldState { kept: kept.clone(), reads });
        bundle.set_objects(Box::new(source.replicated()));
        bundle.set_newest(Box::new(source.newest_by_feed()));
        let writer = Self {
            snapshot,
            source,
            projection: Projector::new(spec, kept),
            auto_resources: BTreeSet::new(),
            pending_removal: None,
            limits: spec.limits,
            feeds: spec.feeds.clone(),
            batch: Batch::default(),
            history: History::new(spec.limits),
            observed: Watermarks::default(),
            in_check: Watermarks::default(),
            verified: Watermarks::default(),
            bundle,
            readiness,
            jobs,
            last_good,
            is_restored: false,
            has_interim: false,
            list_waiters: Vec::new(),
            phase: Phase::Listing,
        };
        (writer, ends)
    }

    /// Delays the hub's readiness until the first snapshot.
    pub fn gate(&self) {
        self.readiness.pending(POLICIES, "not checked yet");
        self.source.gate();
    }

    /// Runs until all senders are dropped. Blocks its thread.
    pub fn run(mut self, mut commands: mpsc::Receiver<WriterCommand>) {
        futures::executor::block_on(async {
            loop {
                tokio::select! {
                    () = self.source.changed() => {}
                    command = commands.recv() => match command {
                        Some(command) => self.hear(command),
                        None => return,
                    },
                    () = sleep_until_some(self.pending_removal.as_ref().map(|removal| removal.due)) => self.narrow(),
                }
                self.commit();
            }
        });
    }

    /// Handles a command, for the next commit.
    pub fn hear(&mut self, command: WriterCommand) {
        match command {
            WriterCommand::RestoreLastGood(good) => {
                self.projection.restore(good);
                self.is_restored = true;
            }
            WriterCommand::ApplyCheck { outcome, reads, resources } => {
                // Same commit as the policies: its frames send data first.
                if reads.is_some() || resources.is_some() {
                    self.add_fields(reads, resources.as_ref());
                }
                let in_check = std::mem::take(&mut self.in_check);
                match outcome.progress {
                    Progress::All => self.verified = in_check,
                    Progress::Good => self.has_interim = true,
                    Progress::Nothing => {}
                }
                self.projection.take_outcome(outcome, &mut self.batch);
                let good = self.projection.last_good();
                self.last_good.send_if_modified(|current| {
                    let changed = current.as_ref() != Some(&good);
                    *current = Some(good);
                    changed
                });
            }
            WriterCommand::Recheck => self.projection.recheck(),
            WriterCommand::AddWatches { feeds, settled } => {
                for feed in &feeds {
                    self.open(feed);
                }
                self.list_waiters.push(settled);
            }
        }
    }

    /// Adds fields, and schedules the removal of unread data.
    fn add_fields(&mut self, reads: Option<ReadSet>, resources: Option<&BTreeSet<DirPath>>) {
        let unread: BTreeSet<_> = match resources {
            Some(resources) => self.auto_resources.difference(resources).cloned().collect(),
            None => self.pending_removal.take().map(|removal| removal.resources).unwrap_or_default(),
        };
        let mut target = match &reads {
            Some(reads) => self.projection.kept_for(reads),
            None => self.projection.kept().clone(),
        };
        for path in self.auto_resources.difference(&unread) {
            target.name(path);
        }
        for path in &unread {
            target.forget(path);
        }
        self.snapshot.reads = Some(target.to_text().into());
        if let Some(reads) = &reads {
            self.projection.read_by(reads, &target);
        }
        self.bundle.set_reading(FieldState { kept: target.clone(), reads });
        let mut combined = self.projection.kept().clone();
        combined.join(&target);
        let due = Instant::now() + NARROW_AFTER;
        self.pending_removal = (combined != target || !unread.is_empty()).then_some(PendingRemoval {
            remaining: target,
            resources: unread,
            due,
        });
        self.set_fields(combined);
        if self.phase != Phase::Live {
            self.remove_unread();
        }
    }

    /// Removes unread data in a separate commit.
    pub fn narrow(&mut self) {
        if self.remove_unread() {
            self.publish(true);
        }
    }

    fn remove_unread(&mut self) -> bool {
        let Some(PendingRemoval { remaining, resources, .. }) = self.pending_removal.take() else {
            return false;
        };
        self.close(&resources);
        self.set_fields(remaining);
        true
    }

    fn set_fields(&mut self, kept: FieldMasks) {
        let feeds = self.projection.keep(kept);
        let objects = self.source.objects_of(&feeds);
        // Deleted objects cannot be pruned again.
        let live = objects.iter().map(|(id, object)| (*id, object.key.clone())).collect();
        self.projection.remove_others(&feeds, &live, &mut self.batch);
        for (id, object) in objects {
            self.projection.apply_again(id, object, &mut self.batch);
        }
        self.observed.newest = self.source.newest();
    }

    /// Returns whether no changes are left.
    fn drain(&mut self, max: usize) -> bool {
        let ChangeBatch { changes, all, newest } = self.source.take(max);
        let is_all = all.is_some();
        if let Some(all) = all {
            self.observed.complete = all;
        } else {
            self.observed.complete.retain(|id, _| newest.contains_key(id));
            for id in newest.keys() {
                self.observed.complete.entry(*id).or_insert(Version(0));
            }
        }
        self.observed.newest = newest;
        for change in changes {
            let (Change::Put(id, _) | Change::Remove(id, _)) = &change;
            if !self.projection.is_closed(*id) {
                self.projection.apply(change, &mut self.batch);
            }
        }
        is_all
    }

    fn policy_watermarks(&self) -> Watermarks {
        let policies_only = |versions: &BTreeMap<InputId, Version>| {
            let versions = versions.iter().map(|(id, version)| (*id, *version));
            versions.filter(|(id, _)| self.is_policies(*id)).collect()
        };
        Watermarks {
            complete: policies_only(&self.observed.complete),
            newest: policies_only(&self.observed.newest),
        }
    }

    fn is_policies(&self, id: InputId) -> bool {
        self.feeds[id.0].content == Content::PolicyRegistry
    }

    fn position(&self, versions: impl Fn(&Watermarks) -> &BTreeMap<InputId, Version>) -> Position {
        let mut position = Position::default();
        let data = versions(&self.observed).iter().filter(|(id, _)| !self.is_policies(**id));
        for (id, Version(version)) in data.chain(versions(&self.verified)) {
            position.heard(self.feeds[id.0].position_name(), *version);
        }
        position
    }

    fn open(&mut self, feed: &WatchSpec) {
        if let Some(removal) = &mut self.pending_removal
            && let Some(path) = feed.place()
        {
            removal.resources.remove(path);
        }
        if feed.place().is_some_and(|path| self.auto_resources.contains(path)) {
            return;
        }
        let name = feed.to_string();
        let index = self.feeds.iter().position(|known| known.content == feed.content);
        let id = InputId(index.unwrap_or(self.feeds.len()));
        match self.feeds.get_mut(id.0) {
            Some(known) => *known = feed.clone(),
            None => self.feeds.push(feed.clone()),
        }
        let rejection = self.projection.open(id, feed.clone()).err();
        match &rejection {
            Some(error) => tracing::warn!(resource = name, %error, "resource not replicated"),
            None => self.bundle.feeds.open(id, feed, self.source.open(id, feed)),
        }
        self.auto_resources.extend(feed.place().cloned());
        self.readiness.problem(&format!("replicated {name}"), rejection.map(|error| error.to_string()));
    }

    fn close(&mut self, resources: &BTreeSet<DirPath>) {
        let is_closing = |feed: &WatchSpec| feed.place().is_some_and(|path| resources.contains(path));
        let ids: Vec<_> =
            (0..self.feeds.len()).filter(|id| is_closing(&self.feeds[*id])).map(InputId).collect();
        for id in ids {
            self.source.close(id);
            self.projection.close(id, &mut self.batch);
            self.bundle.feeds.close(id);
            self.readiness.problem(&format!("replicated {}", self.feeds[id.0]), None);
        }
        self.auto_resources.retain(|path| !resources.contains(path));
    }

    /// Publishes pending changes once every watch has listed and every policy was checked (I5, I6).
    pub fn commit(&mut self) {
        self.commit_some(self.limits.commit_events_max);
    }

    /// Like [`commit`](Self::commit), with at most `max` changes.
    pub fn commit_some(&mut self, max: usize) {
        if self.phase == Phase::Listing {
            if !self.source.is_listed() || !self.is_restored {
                return;
            }
            self.project_all();
            self.phase = Phase::Checking;
        }
        // Read before the drain, so that a settled list is drained.
        let is_settled = self.source.is_settled();
        let is_all = self.drain(max);
        self.projection.retry_refused(&mut self.batch);
        if is_all && is_settled {
            self.list_waiters.clear();
        }
        if let Some(candidates) = self.projection.job() {
            self.in_check = self.policy_watermarks();
            _ = self.jobs.send(candidates);
        } else if self.projection.is_settled() {
            self.verified = self.policy_watermarks();
        }
        self.bundle.counters.projection_bytes.store(self.projection.memory(), Ordering::Relaxed);
        self.bundle.verdicts.take(self.projection.told());
        self.bundle.set_problems(self.projection.problems());
        if self.phase == Phase::Checking && !self.has_interim && !self.projection.is_settled() {
            return;
        }
        self.publish(false);
    }

    /// `narrows`: removes fields that older modules read.
    fn publish(&mut self, narrows: bool) {
        let is_first = self.phase == Phase::Checking;
        self.phase = Phase::Live;
        let before = self.snapshot.revision;
        match self.snapshot.apply(std::mem::take(&mut self.batch)) {
            None if !is_first => {
                return self.bundle.set_position(&self.position(|watermarks| &watermarks.complete));
            }
            None => {}
            Some((snapshot, changed)) => {
                tracing::debug!(bundle = self.bundle.name, revision = %snapshot.revision, keys = changed.len(), "snapshot created");
                self.count(&changed);
                self.snapshot = snapshot;
                if !is_first {
                    self.history.push(before, changed, narrows);
                }
            }
        }
        if is_first {
            self.readiness.ready(POLICIES);
            tracing::info!(
                bundle = self.bundle.name,
                revision = %self.snapshot.revision,
                modules = self.snapshot.modules.len(),
                directories = self.snapshot.dirs.len(),
                entries = self.snapshot.entries(),
                "ready"
            );
        }
        let complete = self.position(|watermarks| &watermarks.complete);
        let bounds = Bounds { all: complete.clone(), newest: self.position(|watermarks| &watermarks.newest) };
        self.bundle.publish(self.snapshot.clone(), self.history.clone(), bounds);
        self.bundle.set_position(&complete);
    }

    fn count(&self, changed: &ChangeSet) {
        for (id, path, _) in self.projection.places() {
            let dir = match &self.feeds[id.0].scope {
                NamespaceSelector::Only(namespace) => path.join(namespace).unwrap_or_else(|_| path.clone()),
                _ => path.clone(),
            };
            let keys = changed
                .dirs
                .iter()
                .filter(|changes| changes.path.is_within(&dir))
                .map(|changes| changes.keys.len());
            if let Some(feed) = self.bundle.feeds.of(id) {
                feed.changes.fetch_add(keys.sum::<usize>() as u64, Ordering::Relaxed);
            }
        }
    }

    /// Applies data, then new policies, in one order on every replica, since the first object owns a path (I2).
    fn project_all(&mut self) {
        let mut listed = self.source.start();
        let is_policy = |id: InputId| self.feeds[id.0].content == Content::PolicyRegistry;
        listed.sort_unstable_by(|(a, one), (b, other)| {
            (is_policy(*a), a, &one.key).cmp(&(is_policy(*b), b, &other.key))
        });
        for (id, object) in listed {
            self.projection.apply(Change::Put(id, object), &mut self.batch);
        }
    }
}

async fn sleep_until_some(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
