//! An agent of the fault test, with its OPA and connections.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use opa_hub::bundle::{CachedSnapshot, CatchUp};
use opa_hub::snapshot::bundle_archive::ArchiveKind;
use opa_hub_proto::frame::FRAME_BYTES_MAX;
use opa_hub_proto::position::{Judge, Position};
use opa_hub_proto::sse::{Decoder, Message};

use super::document::{AUTO, Document};
use super::hub::Hub;
use super::limits::LIMITED;
use super::model::{Asked, RECONCILES_MAX, answer, archive, units_held};
use super::reads::{i10, i10_auto};
use super::source::Kind;
use super::streams::{UnderWay, Wire};
use super::{HUBS, World};
use crate::fold::{AppliedState, Refused};

/// Maximum number of connections abandoned without the hub's notice.
const ABANDONED_MAX: usize = 2;
/// Rejections, one by every hub, after which an agent assumes a source rollback.
const REFUSALS_MAX: usize = HUBS;

/// Name of policies in positions.
const POLICIES: &str = "policies";

pub(super) struct Agent {
    pub(super) name: &'static str,
    pub(super) namespace: &'static str,
    pub(super) applied: AppliedState,
    is_empty: bool,
    /// Document of the applied content.
    document: Option<Document>,
    /// Epoch of the positions; `None` if mixed.
    epoch: Option<usize>,
    /// Newest applied version by kind.
    latest: BTreeMap<Kind, u64>,
    /// Whether the last change is complete.
    is_whole: bool,
    following: Option<(Wire, Decoder)>,
    hub: usize,
    /// Position when the stream was opened.
    opened: Position,
    /// Connections abandoned without the hub's notice.
    abandoned: VecDeque<Wire>,
    /// Consecutive rejections.
    refusals: usize,
}

impl Agent {
    pub(super) fn start(name: &'static str, namespace: &'static str) -> Self {
        Self {
            name,
            namespace,
            applied: AppliedState::empty(),
            is_empty: true,
            document: None,
            epoch: None,
            latest: BTreeMap::new(),
            is_whole: true,
            following: None,
            hub: 0,
            opened: Position::default(),
            abandoned: VecDeque::new(),
            refusals: 0,
        }
    }

    /// Opens a stream at hub `index`, or at the next one if that is behind.
    pub(super) async fn connect(&mut self, hubs: &mut [Hub], index: usize, world: &mut World) {
        for turn in 0..HUBS {
            let is_behind = self.connect_to(hubs, (index + turn) % HUBS, world).await;
            if !is_behind {
                return;
            }
        }
    }

    /// Opens a stream, after reconcile if needed, without closing earlier connections. Returns whether the hub is behind.
    async fn connect_to(&mut self, hubs: &mut [Hub], index: usize, world: &mut World) -> bool {
        let hub = &mut hubs[index];
        let Some((part, document)) = hub.part(self.name, self.namespace) else { return false };
        let current = part.position();
        let Some(head) = part.head().borrow().clone() else { return false };
        if self.is_empty {
            world.seen.add("snapshots");
            let bytes = archive(&head, ArchiveKind::Full).await;
            self.apply_archive(&bytes, &head, &current);
            // Until the next quiet phase after a restore, hubs send versions of both epochs.
            self.epoch = Some(world.source.epoch).filter(|epoch| *epoch == world.quiet_epoch);
        } else if !self.resume(&head, &current, world).await {
            world.seen.add("lags");
            self.count_rejection(world);
            return true;
        }
        // Documents omit different objects, which positions do not show.
        let is_same = self.document.is_none_or(|applied| applied == document);
        self.epoch = self.epoch.filter(|_| is_same);
        (self.refusals, self.document) = (0, Some(document));
        self.opened = self.applied.position.clone();
        self.applied.judge = Judge::new(self.opened.clone());
        let wire = hub.streams.open(&part, (self.name, self.namespace), self.applied.revision());
        self.abandon();
        (self.hub, self.following) = (index, Some((wire, Decoder::new(FRAME_BYTES_MAX))));
        false
    }

    /// Abandons the connection without the hub's notice.
    fn abandon(&mut self) {
        self.abandoned.extend(self.following.take().map(|(wire, _)| wire));
        if self.abandoned.len() > ABANDONED_MAX {
            self.abandoned.pop_front().unwrap().lock().unwrap().take();
        }
    }

    /// Reconciles if needed. Returns whether frames can follow, `false` if the position would regress.
    async fn resume(&mut self, head: &Arc<CachedSnapshot>, current: &Position, world: &mut World) -> bool {
        let required = self.applied.position.clone();
        if head.lag(self.applied.revision(), current, &required).is_some() {
            return false;
        }
        for round in 0..RECONCILES_MAX {
            head.tell_as_of(current, &self.applied.position);
            if !matches!(head.next(self.applied.revision()), CatchUp::TooOld) {
                return true;
            }
            let (applied, required) = (self.applied.reconcile(), &self.applied.position);
            if head.lag_of(&applied, Some(self.applied.revision().modules), current, required).is_some() {
                return false;
            }
            world.seen.add("reconciles");
            world.seen.add_if(round > 0, "responses to older policies");
            let bytes = answer(head, &self.applied).await;
            // Frames on the old stream no longer apply.
            self.abandon();
            self.apply_archive(&bytes, head, current);
        }
        assert_eq!(self.applied.revision(), head.view.revision, "{}: reconcile ends at the head", self.name);
        true
    }

    fn apply_archive(&mut self, bytes: &[u8], head: &CachedSnapshot, current: &Position) {
        self.applied.archive_by_halves(bytes, i10);
        i10(&self.applied);
        if self.name == AUTO {
            i10_auto(&self.applied);
        }
        self.is_empty = false;
        self.record_head(head, current);
    }

    fn record_head(&mut self, head: &CachedSnapshot, current: &Position) {
        self.applied.proven = current.clone().after(&self.applied.proven);
        self.applied.position = head.newest().after(&self.applied.position);
        self.is_whole = self.applied.revision() == head.view.revision;
    }

    /// If every hub is behind, the source was rolled back, and the agent accepts that.
    fn count_rejection(&mut self, world: &mut World) {
        self.refusals += 1;
        if self.epoch != Some(world.source.epoch) && self.refusals >= REFUSALS_MAX {
            world.seen.add("agent rollbacks");
            self.forget_positions();
        }
    }

    fn forget_positions(&mut self) {
        (self.applied.position, self.applied.proven) = (Position::default(), Position::default());
        self.latest.clear();
        self.refusals = 0;
    }

    /// Breaks the connection, maybe within a frame.
    pub(super) fn cut(&mut self) {
        if let Some((wire, _)) = self.following.take() {
            wire.lock().unwrap().take();
        }
    }

    pub(super) fn read(&mut self, most: usize, world: &mut World) {
        let Some((wire, decoder)) = &mut self.following else { return };
        let bytes: Vec<u8> = match wire.lock().unwrap().as_mut() {
            Some(UnderWay { bytes, .. }) => bytes.drain(..most.min(bytes.len())).collect(),
            None => Vec::new(),
        };
        decoder.push(&bytes);
        while let Some(message) = decoder.next().unwrap() {
            let Message::Event { id, data, .. } = &message else { continue };
            let has_edits = String::from_utf8_lossy(data).contains("/metadata/labels/");
            let is_end = |under_way: &mut UnderWay| under_way.ends.pop_front_if(|end| end == id).is_some();
            let is_whole = wire.lock().unwrap().as_mut().is_some_and(is_end);
            let policies = self.applied.proven.of(POLICIES).unwrap_or(0);
            match self.applied.apply(message) {
                Ok(()) => {
                    self.is_whole = is_whole;
                    if !is_whole {
                        // Modules arrive last.
                        self.applied.proven.heard(POLICIES.into(), policies);
                    }
                    world.seen.add("frames");
                    world.seen.add_if(has_edits, "edits");
                    i10(&self.applied);
                    if self.name == AUTO {
                        i10_auto(&self.applied);
                    }
                }
                Err(Refused::NotHeld) => panic!("I3"),
                Err(Refused::Lags(lag)) => {
                    let before = self.opened.of(&lag.name);
                    assert!(
                        // A relisted watch has no version yet.
                        self.epoch != Some(world.source.epoch) || before >= Some(lag.there) || lag.here == 0,
                        "{lag}: rejected by the same hub's versions, {before:?} before"
                    );
                    world.seen.add("lags");
                    return self.cut();
                }
            }
        }
        // Heartbeats detect a closed stream or stopped hub.
        let is_over = Arc::strong_count(wire) == 1 && bytes.len() < most;
        if is_over {
            self.cut();
        }
    }

    /// Checks that the content equals the source's at the newest position so far. Returns `false` if the state is partial
    /// or its position unproven.
    pub(super) fn check(&mut self, world: &World) -> bool {
        let AppliedState { position, proven, .. } = &self.applied;
        let is_ready = self.is_whole && self.epoch == Some(world.source.epoch);
        if position.is_empty() || !is_ready || proven.is_behind(position) {
            return false;
        }
        let Some(document) = self.document else { return false };
        let is_looked_at = |kind: Kind| !document.is_limited() || !LIMITED.contains(&kind);
        for kind in [Kind::PolicyRegistry, Kind::Data, Kind::Pods, Kind::Nodes] {
            let latest = self.latest.entry(kind).or_default();
            *latest = (*latest).max(proven.of(kind.position_name()).unwrap_or(0));
        }
        let latest = |kind: Kind| self.latest.get(&kind).copied().filter(|_| is_looked_at(kind));
        let context = format!(
            ", position {position}, proven {proven}, latest {:?}, opened at {}, source at {} of epoch {}",
            self.latest,
            self.opened,
            world.source.version(),
            world.source.epoch
        );
        let asked = Asked { document, namespace: Some(self.namespace), opened: BTreeSet::new(), context };
        asked.check(&world.source, &units_held(&self.applied), false, latest);
        true
    }

    /// Without faults, checks that the agent reaches the head and has the source's content.
    pub(super) async fn settle(&mut self, hubs: &mut [Hub], world: &mut World) {
        if self.epoch != Some(world.source.epoch) {
            // A minute later.
            self.cut();
            self.forget_positions();
        }
        if self.following.is_none() {
            let index = world.rng.usize(..hubs.len());
            self.connect(hubs, index, world).await;
            hubs[self.hub].streams.write(|| false);
            self.read(usize::MAX, world);
        }
        assert!(self.following.is_some(), "{} {}: agent has a stream", self.name, self.namespace);
        let (part, document) = hubs[self.hub].part(self.name, self.namespace).unwrap();
        let head = part.head().borrow().clone().unwrap();
        assert_eq!(self.applied.revision(), head.view.revision, "{} {}: I1", self.name, self.namespace);
        (self.document, self.epoch) = (Some(document), Some(world.source.epoch));
        self.record_head(&head, &part.position());
        let asked = Asked::new(document, Some(self.namespace), &part);
        asked.check_all(&world.source, &units_held(&self.applied));
        _ = self.check(world);
    }
}
