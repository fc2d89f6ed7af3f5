//! A source, replicas of the hub and agents, with everything between them that fails: hubs that lag, list again, or die
//! with all they knew; connections that break in the middle of a frame, or die unnoticed while the agent asks
//! elsewhere; OPAs that come back empty. One seed makes one run, step by step. At every step what an agent holds is
//! what the source had at the newest position that the agent ever named; at the end it is what the source has.
//! `OPA_HUB_FAULT_STEPS` and `OPA_HUB_FAULT_SEED` ask for another run.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

use fastrand::Rng;
use opa_hub::bundle::{Edition, Next, Part};
use opa_hub::model::{Event, Object, ObjectKey, Version, WatchId};
use opa_hub_proto::frame::FRAME_BYTES_MAX;
use opa_hub_proto::position::{Judge, Position};
use opa_hub_proto::revision::Revision;
use opa_hub_proto::sse::{Decoder, Message};
use serde_json::{Value, json};

use crate::fold::{Held, Refused, prune};
use crate::invariants::{self, DATA, NODES, PODS, POLICIES, Writer, runtime};

const STEPS: usize = 3000;
const SEEDS: u64 = 4;
const HUBS: usize = 3;
const AGENTS: usize = 8;
/// Connections that one agent has given up without the hub's knowing.
const GIVEN_UP: usize = 2;
const WATCHES: [WatchId; 4] = [POLICIES, DATA, PODS, NODES];

/// What the API server has, and all that it ever said.
#[derive(Default)]
struct Source {
    /// Every change, in order: the first has version 1.
    history: Vec<(WatchId, ObjectKey, Option<Value>)>,
}

impl Source {
    fn version(&self) -> Version {
        Version(self.history.len() as u64)
    }

    fn at(&self, watch: WatchId, version: u64) -> BTreeMap<ObjectKey, Value> {
        let mut objects = BTreeMap::new();
        let past = self.history.iter().take(usize::try_from(version).unwrap());
        for (_, key, value) in past.filter(|(of, _, _)| *of == watch) {
            match value {
                Some(value) => _ = objects.insert(key.clone(), value.clone()),
                None => _ = objects.remove(key),
            }
        }
        objects
    }

    fn change(&mut self, rng: &mut Rng) {
        // As it was before: content that is known from another time.
        if let (Some((watch, key, _)), 0..90) = (self.history.last(), rng.u8(..)) {
            let (watch, key) = (*watch, key.clone());
            let before = self.at(watch, self.version().0 - 1).remove(&key);
            self.history.push((watch, key, before));
            return;
        }
        let feed = rng.u8(0..4);
        let watch = WatchId(feed.into());
        let (name, value) = (rng.u8(0..12), rng.u8(0..3));
        let key = invariants::key(feed, rng.u8(0..3), name);
        let value = rng.bool().then(|| {
            let mut value = invariants::json(watch, name, value);
            if watch == PODS || watch == NODES {
                // Objects that never were there before, too.
                value["round"] = json!(rng.u16(..));
            }
            value
        });
        self.history.push((watch, key, value));
    }
}

struct Hub {
    writer: Writer,
    /// How much of the source's history it was told.
    told: usize,
    streams: Vec<Stream>,
}

/// The hub's end of a connection.
struct Stream {
    held: Revision,
    wire: Wire,
}

/// What is under way to an agent.
#[derive(Default)]
struct UnderWay {
    bytes: VecDeque<u8>,
    /// The revisions that whole changes lead to: one of data and policies comes in two events.
    ends: VecDeque<String>,
}

/// None once either side closed it.
type Wire = Arc<Mutex<Option<UnderWay>>>;

impl Hub {
    /// With empty memory.
    fn start(source: &Source) -> Self {
        let mut hub = Self { writer: Writer::new(), told: 0, streams: Vec::new() };
        hub.list(source, || false);
        hub.writer.commit();
        hub
    }

    /// Says all that there is. What is said of a list that is not complete is published, whenever it `commits`.
    fn list(&mut self, source: &Source, mut commits: impl FnMut() -> bool) {
        for watch in WATCHES {
            self.writer.store.apply((watch, Event::Init, None));
            for (key, value) in source.at(watch, source.version().0) {
                let object = Object { key, json: value.to_string().into() };
                self.writer.store.apply((watch, Event::Apply(object), None));
                if commits() {
                    self.writer.pipeline.commit();
                }
            }
            self.writer.store.apply((watch, Event::InitDone, Some(source.version())));
        }
        self.told = source.history.len();
    }

    /// Some of what it was not told yet, of which so much at most is published.
    fn hear(&mut self, source: &Source, count: usize, most: usize) {
        for (watch, key, value) in source.history.iter().skip(self.told).take(count) {
            self.told += 1;
            let event = match value.clone() {
                Some(value) => Event::Apply(Object { key: key.clone(), json: value.to_string().into() }),
                None => Event::Delete(key.clone()),
            };
            self.writer.store.apply((*watch, event, Some(Version(self.told as u64))));
        }
        self.writer.pipeline.commit_some(most);
    }

    fn head(&self) -> Option<Arc<Edition>> {
        self.writer.bundle.head().borrow().clone()
    }

    /// Brings its streams to the head, or those of them that take something.
    fn write(&mut self, rng: &mut Rng) {
        let Some(head) = self.head() else { return };
        self.streams.retain_mut(|stream| {
            let mut wire = stream.wire.lock().unwrap();
            let Some(under_way) = wire.as_mut() else { return false };
            // A reader that stalls keeps its place.
            if !under_way.bytes.is_empty() && rng.bool() {
                return true;
            }
            match head.next(stream.held) {
                Next::UpToDate => {}
                Next::Frames(frames) => {
                    under_way.bytes.extend(&frames[..]);
                    under_way.ends.push_back(head.view.revision.to_string());
                    stream.held = head.view.revision;
                }
                // What is under way still comes.
                Next::Unknown => return false,
            }
            true
        });
    }
}

struct Agent {
    held: Held,
    /// The newest that was held, by name in positions.
    latest: BTreeMap<&'static str, u64>,
    /// It has all of the change that it was told last.
    is_whole: bool,
    following: Option<(Wire, Decoder)>,
    /// As of when it opened that.
    opened: Position,
    /// Connections that it gave up without the hub's knowing.
    given_up: VecDeque<Wire>,
}

/// What happened, to see that all of it did.
#[derive(Default, Debug)]
struct Seen {
    frames: usize,
    snapshots: usize,
    reconciles: usize,
    lags: usize,
    cuts: usize,
    kills: usize,
    restarts: usize,
    lists: usize,
}

impl Agent {
    /// Beside an OPA that holds nothing.
    fn start() -> Self {
        Self {
            held: Held::empty(),
            latest: BTreeMap::new(),
            is_whole: true,
            following: None,
            opened: Position::default(),
            given_up: VecDeque::new(),
        }
    }

    /// Asks `hub` for a stream, and for what it takes to get one. Says nothing of connections that it had.
    async fn connect(&mut self, hub: &mut Hub, seen: &mut Seen) {
        let here = hub.writer.bundle.position();
        let Some(head) = hub.head() else { return };
        let there = self.held.position.clone();
        if self.held.position.is_empty() {
            seen.snapshots += 1;
            self.held.archive(&head.archive(Part::Whole).await.pieces.concat());
            self.arrive(&head, &here);
        } else {
            if head.lag(self.held.revision(), &here, &there).is_some() {
                seen.lags += 1;
                return;
            }
            head.tell_as_of(&here, &there);
            if let Next::Unknown = head.next(self.held.revision()) {
                let (held, modules) = (self.held.reconcile(), self.held.revision().modules);
                if head.lag_of(&held, Some(modules), &here, &there).is_some() {
                    seen.lags += 1;
                    return;
                }
                seen.reconciles += 1;
                self.held.archive(&head.reconcile(held).await.unwrap().pieces.concat());
                self.arrive(&head, &here);
            }
        }
        self.opened = self.held.position.clone();
        self.held.judge = Judge::new(self.opened.clone());
        let wire = Wire::default();
        *wire.lock().unwrap() = Some(UnderWay::default());
        hub.streams.push(Stream { held: self.held.revision(), wire: Arc::clone(&wire) });
        if let Some((wire, _)) = self.following.replace((wire, Decoder::new(FRAME_BYTES_MAX))) {
            self.given_up.push_back(wire);
        }
        if self.given_up.len() > GIVEN_UP {
            self.given_up.pop_front().unwrap().lock().unwrap().take();
        }
    }

    fn arrive(&mut self, head: &Edition, here: &Position) {
        self.held.proven = here.clone().after(&self.held.proven);
        self.held.position = head.newest().after(&self.held.position);
        self.is_whole = true;
    }

    /// Its connection breaks, maybe in the middle of a frame.
    fn cut(&mut self) {
        if let Some((wire, _)) = self.following.take() {
            wire.lock().unwrap().take();
        }
    }

    /// Reads some bytes of its connection.
    fn read(&mut self, most: usize, seen: &mut Seen) {
        let Some((wire, decoder)) = &mut self.following else { return };
        let bytes: Vec<u8> = match wire.lock().unwrap().as_mut() {
            Some(UnderWay { bytes, .. }) => bytes.drain(..most.min(bytes.len())).collect(),
            None => Vec::new(),
        };
        decoder.push(&bytes);
        while let Some(message) = decoder.next().unwrap() {
            let Message::Event { id, .. } = &message else { continue };
            let is_end = |under_way: &mut UnderWay| under_way.ends.pop_front_if(|end| end == id).is_some();
            let is_whole = wire.lock().unwrap().as_mut().is_some_and(is_end);
            match self.held.take(message) {
                Ok(()) => {
                    self.is_whole = is_whole;
                    seen.frames += 1;
                }
                Err(Refused::NotHeld) => panic!("I3"),
                Err(Refused::Lags(lag)) => {
                    let before = self.opened.of(&lag.name);
                    assert!(
                        before >= Some(lag.there),
                        "{lag}: by what the same hub said, {before:?} before that"
                    );
                    seen.lags += 1;
                    return self.cut();
                }
            }
        }
    }

    /// All that the source had at the agent's position, and at any before, and nothing else.
    fn check(&mut self, source: &Source) {
        let Held { position, proven, .. } = &self.held;
        if position.is_empty() || !self.is_whole || proven.is_behind(position) {
            return;
        }
        let mut of = |watch: WatchId, name: &'static str| {
            let latest = self.latest.entry(name).or_default();
            *latest = (*latest).max(self.held.proven.of(name).unwrap_or(0));
            source.at(watch, *latest)
        };
        let mut data = json!({});
        let mut modules = BTreeMap::new();
        for (key, value) in of(POLICIES, "policies") {
            for (file, text) in value["data"].as_object().unwrap() {
                modules.insert(format!("{key}/{file}"), text.as_str().unwrap().to_owned());
            }
        }
        for (key, value) in of(DATA, "data") {
            for (file, text) in value["data"].as_object().unwrap() {
                let value: Value = serde_json::from_str(text.as_str().unwrap()).unwrap();
                data[&*key.namespace][&*key.name][file] = value;
            }
        }
        for (key, value) in of(PODS, "/kubernetes/pods") {
            data["kubernetes"]["pods"][&*key.namespace][&*key.name] = value;
        }
        for (key, value) in of(NODES, "/kubernetes/nodes") {
            data["kubernetes"]["nodes"][&*key.name] = value;
        }
        assert_eq!(self.held.content(), prune(data));
        assert_eq!(self.held.modules, modules);
    }
}

async fn run(seed: u64, steps: usize) -> Seen {
    let mut rng = Rng::with_seed(seed);
    let (mut source, mut seen) = (Source::default(), Seen::default());
    let mut hubs: Vec<_> = (0..HUBS).map(|_| Hub::start(&source)).collect();
    let mut agents: Vec<_> = (0..AGENTS).map(|_| Agent::start()).collect();
    for _ in 0..steps {
        let (hub, agent) = (rng.usize(..HUBS), rng.usize(..AGENTS));
        match rng.u16(..1000) {
            0..300 => source.change(&mut rng),
            300..500 => {
                let count = rng.usize(..8);
                let most = if rng.bool() { rng.usize(1..4) } else { usize::MAX };
                hubs[hub].hear(&source, count, most);
            }
            500..580 => _ = hubs[hub].writer.check(),
            580..730 => hubs[hub].write(&mut rng),
            730..930 => {
                // In pieces, and all of it.
                let most = if rng.bool() { rng.usize(..400) } else { usize::MAX };
                agents[agent].read(most, &mut seen);
                agents[agent].check(&source);
            }
            930..970 => agents[agent].connect(&mut hubs[hub], &mut seen).await,
            970..982 => {
                seen.cuts += 1;
                agents[agent].cut();
            }
            982..988 => {
                seen.lists += 1;
                hubs[hub].list(&source, || rng.u8(..8) == 0);
                hubs[hub].writer.pipeline.commit();
            }
            // Its connections stay as they are: nobody told the agents.
            988..993 => {
                seen.restarts += 1;
                hubs[hub] = Hub::start(&source);
            }
            _ => {
                seen.kills += 1;
                agents[agent] = Agent::start();
            }
        }
    }
    // Whatever failed stops failing.
    for hub in &mut hubs {
        hub.hear(&source, usize::MAX, usize::MAX);
        hub.writer.commit();
    }
    for agent in &mut agents {
        agent.following = None;
        agent.connect(&mut hubs[0], &mut seen).await;
        hubs[0].write(&mut rng);
        agent.read(usize::MAX, &mut seen);
        let head = hubs[0].head().unwrap();
        assert_eq!(agent.held.revision(), head.view.revision, "I2");
        agent.arrive(&head, &hubs[0].writer.bundle.position());
        agent.check(&source);
    }
    for hub in &hubs {
        assert_eq!(hub.head().unwrap().view.revision, hubs[0].head().unwrap().view.revision, "I2");
    }
    seen
}

#[test]
fn whatever_fails_agents_hold_what_the_source_has() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let steps = number("OPA_HUB_FAULT_STEPS").and_then(|steps: u64| steps.try_into().ok()).unwrap_or(STEPS);
    let seeds = number("OPA_HUB_FAULT_SEED").map_or(0..SEEDS, |seed| seed..seed + 1);
    for seed in seeds {
        let seen = runtime().block_on(run(seed, steps));
        println!("seed {seed}, {steps} steps: {seen:?}");
        let Seen { frames, snapshots, reconciles, lags, cuts, kills, restarts, lists } = seen;
        let all = [frames, snapshots, reconciles, lags, cuts, kills, restarts, lists];
        assert!(all.iter().all(|count| *count > 0), "something was never tried");
    }
}
