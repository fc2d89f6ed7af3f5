//! An agent of the fault test, with its OPA and the connections that it has or had.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use opa_hub::bundle::{Edition, Next, Part};
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
use crate::fold::{Held, Refused};

/// Connections that one agent has given up without the hub's knowing.
const GIVEN_UP: usize = 2;
/// Refusals by hubs that are behind after which an agent believes that the source went back: of all of them.
const REFUSALS_MAX: usize = HUBS;

/// What positions call policies.
const POLICIES: &str = "policies";

pub(super) struct Agent {
    pub(super) name: &'static str,
    pub(super) namespace: &'static str,
    pub(super) held: Held,
    /// Its OPA holds nothing.
    is_empty: bool,
    /// What it holds, as which document says it.
    document: Option<Document>,
    /// Of which its positions are; none: of several, or of several documents.
    epoch: Option<usize>,
    /// The newest that was held, by kind.
    latest: BTreeMap<Kind, u64>,
    /// It has all of the change that it was told last.
    is_whole: bool,
    following: Option<(Wire, Decoder)>,
    /// Which hub it follows.
    hub: usize,
    /// As of when it opened that.
    opened: Position,
    /// Connections that it gave up without the hub's knowing.
    given_up: VecDeque<Wire>,
    /// In a row.
    refusals: usize,
}

impl Agent {
    /// Beside an OPA that holds nothing.
    pub(super) fn start(name: &'static str, namespace: &'static str) -> Self {
        Self {
            name,
            namespace,
            held: Held::empty(),
            is_empty: true,
            document: None,
            epoch: None,
            latest: BTreeMap::new(),
            is_whole: true,
            following: None,
            hub: 0,
            opened: Position::default(),
            given_up: VecDeque::new(),
            refusals: 0,
        }
    }

    /// Asks hubs for a stream, the one `at` first, and the next one where that is behind.
    pub(super) async fn connect(&mut self, hubs: &mut [Hub], at: usize, world: &mut World) {
        for turn in 0..HUBS {
            let is_behind = self.connect_to(hubs, (at + turn) % HUBS, world).await;
            if !is_behind {
                return;
            }
        }
    }

    /// Asks a hub for a stream, and for what it takes to get one. Says nothing of connections that it had. Returns whether
    /// the hub is behind.
    async fn connect_to(&mut self, hubs: &mut [Hub], at: usize, world: &mut World) -> bool {
        let hub = &mut hubs[at];
        let Some((part, document)) = hub.part(self.name, self.namespace) else { return false };
        let here = part.position();
        let Some(head) = part.head().borrow().clone() else { return false };
        if self.is_empty {
            world.seen.add("snapshots");
            let bytes = archive(&head, Part::Whole).await;
            self.take_archive(&bytes, &head, &here);
            // Between a backup and the next quiet moment hubs tell versions of both.
            self.epoch = Some(world.source.epoch).filter(|epoch| *epoch == world.quiet_epoch);
        } else if !self.resume(&head, &here, world).await {
            world.seen.add("lags");
            self.was_refused(world);
            return true;
        }
        // What one document leaves out another has not: positions tell nothing of that.
        let is_same = self.document.is_none_or(|held| held == document);
        self.epoch = self.epoch.filter(|_| is_same);
        (self.refusals, self.document) = (0, Some(document));
        self.opened = self.held.position.clone();
        self.held.judge = Judge::new(self.opened.clone());
        let wire = hub.streams.open(&part, (self.name, self.namespace), self.held.revision());
        self.give_up();
        (self.hub, self.following) = (at, Some((wire, Decoder::new(FRAME_BYTES_MAX))));
        false
    }

    /// Leaves its connection without the hub's knowing.
    fn give_up(&mut self) {
        self.given_up.extend(self.following.take().map(|(wire, _)| wire));
        if self.given_up.len() > GIVEN_UP {
            self.given_up.pop_front().unwrap().lock().unwrap().take();
        }
    }

    /// Whether frames can lead on from what it holds, where needed once it was repaired; not where that would take it
    /// back in time.
    async fn resume(&mut self, head: &Arc<Edition>, here: &Position, world: &mut World) -> bool {
        let there = self.held.position.clone();
        if head.lag(self.held.revision(), here, &there).is_some() {
            return false;
        }
        for round in 0..RECONCILES_MAX {
            // As each request for a stream does.
            head.tell_as_of(here, &self.held.position);
            if !matches!(head.next(self.held.revision()), Next::Unknown) {
                return true;
            }
            let (held, there) = (self.held.reconcile(), &self.held.position);
            if head.lag_of(&held, Some(self.held.revision().modules), here, there).is_some() {
                return false;
            }
            world.seen.add("reconciles");
            world.seen.add_if(round > 0, "answers to older policies");
            let bytes = answer(head, &self.held).await;
            // What comes there does not lead on any more.
            self.give_up();
            self.take_archive(&bytes, head, here);
        }
        assert_eq!(self.held.revision(), head.view.revision, "{}: reconcile ends at the head", self.name);
        true
    }

    fn take_archive(&mut self, bytes: &[u8], head: &Edition, here: &Position) {
        self.held.archive_by_halves(bytes, i10);
        i10(&self.held);
        if self.name == AUTO {
            i10_auto(&self.held);
        }
        self.is_empty = false;
        self.arrive(head, here);
    }

    fn arrive(&mut self, head: &Edition, here: &Position) {
        self.held.proven = here.clone().after(&self.held.proven);
        self.held.position = head.newest().after(&self.held.position);
        self.is_whole = self.held.revision() == head.view.revision;
    }

    /// Where no hub is as new as what it holds the source itself went back, and the agent goes with it.
    fn was_refused(&mut self, world: &mut World) {
        self.refusals += 1;
        if self.epoch != Some(world.source.epoch) && self.refusals >= REFUSALS_MAX {
            world.seen.add("agents that go back");
            self.forget_positions();
        }
    }

    fn forget_positions(&mut self) {
        (self.held.position, self.held.proven) = (Position::default(), Position::default());
        self.latest.clear();
        self.refusals = 0;
    }

    /// Its connection breaks, maybe in the middle of a frame.
    pub(super) fn cut(&mut self) {
        if let Some((wire, _)) = self.following.take() {
            wire.lock().unwrap().take();
        }
    }

    /// Reads some bytes of its connection.
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
            let policies = self.held.proven.of(POLICIES).unwrap_or(0);
            match self.held.take(message) {
                Ok(()) => {
                    self.is_whole = is_whole;
                    if !is_whole {
                        // Its modules come last.
                        self.held.proven.heard(POLICIES.into(), policies);
                    }
                    world.seen.add("frames");
                    world.seen.add_if(has_edits, "edits");
                    i10(&self.held);
                    if self.name == AUTO {
                        i10_auto(&self.held);
                    }
                }
                Err(Refused::NotHeld) => panic!("I3"),
                Err(Refused::Lags(lag)) => {
                    let before = self.opened.of(&lag.name);
                    assert!(
                        // What is listed anew is as of nothing yet.
                        self.epoch != Some(world.source.epoch) || before >= Some(lag.there) || lag.here == 0,
                        "{lag}: by what the same hub said, {before:?} before that"
                    );
                    world.seen.add("lags");
                    return self.cut();
                }
            }
        }
        // The hub has closed it, or is gone, which heartbeats tell.
        let is_over = Arc::strong_count(wire) == 1 && bytes.len() < most;
        if is_over {
            self.cut();
        }
    }

    /// Checks that the agent holds all that the source had at its position, and at any before, and nothing else. Returns
    /// whether what it holds could be checked: one whole state whose position is proven.
    pub(super) fn check(&mut self, world: &World) -> bool {
        let Held { position, proven, .. } = &self.held;
        let is_ready = self.is_whole && self.epoch == Some(world.source.epoch);
        if position.is_empty() || !is_ready || proven.is_behind(position) {
            return false;
        }
        let Some(document) = self.document else { return false };
        let is_looked_at = |kind: Kind| !document.is_limited() || !LIMITED.contains(&kind);
        for kind in [Kind::Policies, Kind::Data, Kind::Pods, Kind::Nodes] {
            let latest = self.latest.entry(kind).or_default();
            *latest = (*latest).max(proven.of(kind.position_name()).unwrap_or(0));
        }
        let latest = |kind: Kind| self.latest.get(&kind).copied().filter(|_| is_looked_at(kind));
        let context = format!(
            ", position {position}, proven {proven}, latest {:?}, opened as of {}, source at {} of epoch {}",
            self.latest,
            self.opened,
            world.source.version(),
            world.source.epoch
        );
        let asked = Asked { document, namespace: Some(self.namespace), opened: BTreeSet::new(), context };
        asked.check(&world.source, &units_held(&self.held), false, latest);
        true
    }

    /// Once all that failed has stopped failing it is at the head of a hub, and holds what the source has.
    pub(super) async fn settle(&mut self, hubs: &mut [Hub], world: &mut World) {
        if self.epoch != Some(world.source.epoch) {
            // A minute has passed.
            self.cut();
            self.forget_positions();
        }
        if self.following.is_none() {
            let at = world.rng.usize(..hubs.len());
            self.connect(hubs, at, world).await;
            hubs[self.hub].streams.write(|| false);
            self.read(usize::MAX, world);
        }
        assert!(self.following.is_some(), "{} {}: it has a stream", self.name, self.namespace);
        let (part, document) = hubs[self.hub].part(self.name, self.namespace).unwrap();
        let head = part.head().borrow().clone().unwrap();
        assert_eq!(self.held.revision(), head.view.revision, "{} {}: I1", self.name, self.namespace);
        (self.document, self.epoch) = (Some(document), Some(world.source.epoch));
        self.arrive(&head, &part.position());
        let asked = Asked::new(document, Some(self.namespace), &part);
        asked.check_all(&world.source, &units_held(&self.held));
        _ = self.check(world);
    }
}
