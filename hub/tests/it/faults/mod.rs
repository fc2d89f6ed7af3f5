//! Diagnostic test of a source, hub replicas with several bundles, and agents. The faults:
//!
//! - hubs lag, relist, or restart without state
//! - watches fail or are silent; the server is restored from a backup; resources appear and disappear
//! - documents change; policies break or read other fields and resources; the compiler fails
//! - connections break within a frame, or are abandoned unnoticed; OPAs restart empty
//! - bundles exceed every limit
//!
//! A seed determines a run, which is single-threaded. A read may leave an agent with a complete state at a proven
//! position. That state must equal the source's at the agent's newest position ever, with all that policies read. Every
//! few hundred steps the faults end, and every stream, archive and reconcile response must match the source.
//! `OPA_HUB_FAULT_STEPS` and `OPA_HUB_FAULT_SEED` select another run.

mod agent;
mod document;
mod hub;
mod limits;
mod model;
mod reads;
mod source;
mod streams;
mod written;

use std::collections::BTreeMap;

use fastrand::Rng;
use opa_hub::bundle::namespaces::SCOPE_IDLE;
use opa_hub::policy::registry::LastGood;

use self::agent::Agent;
use self::document::{Document, FIELDS};
use self::hub::Hub;
use self::model::{Asked, let_others_run, units_of};
use self::source::Source;

const STEPS: usize = 3000;
const SEEDS: u64 = 4;
const HUBS: usize = 3;
/// Number of steps between quiet phases.
const QUIET_AFTER: usize = 400;
const NAMESPACES: [&str; 3] = ["ns0", "ns1", "ns2"];
/// Bundle and namespace of each agent.
const AGENTS: [(&str, &str); 14] = [
    ("main", "ns0"),
    ("main", "ns1"),
    ("main", "ns2"),
    ("fields", "ns0"),
    ("fields", "ns0"),
    ("fields", "ns1"),
    ("auto", "ns0"),
    ("auto", "ns1"),
    ("limit", "ns0"),
    ("few", "ns0"),
    ("spaces", "ns0"),
    ("spaces", "ns0"),
    ("spaces", "ns1"),
    ("spaces", "ns2"),
];

/// Counts of events, for coverage.
#[derive(Default, Debug)]
struct Seen(BTreeMap<&'static str, usize>);

/// Maximum number of reads per checked state. Other reads leave a partial change or an unproven position.
const READS_A_CHECK_MAX: usize = 20;

/// Events that every long run must cover.
const TRIED: [&str; 31] = [
    "agent rollbacks",
    "bundles removed",
    "bundles replaced",
    "checked reads",
    "checks without a compiler",
    "checks without a plan",
    "connections cut",
    "directories omitted",
    "edits",
    "failing watches",
    "field removals",
    "frames",
    "incomplete lists",
    "lags",
    "lists",
    "objects omitted",
    "OPA kills",
    "outdated streams",
    "path conflicts",
    "reads in between",
    "rechecks",
    "reconciles",
    "rejected policies",
    "responses to older policies",
    "restarts",
    "restored servers",
    "silent watches",
    "snapshots",
    "unserved resources",
    "watches closed",
    "watches opened",
];

impl Seen {
    fn add(&mut self, what: &'static str) {
        assert!(TRIED.contains(&what), "{what} is not counted");
        *self.0.entry(what).or_default() += 1;
    }

    fn add_if(&mut self, happened: bool, what: &'static str) {
        if happened {
            self.add(what);
        }
    }
}

struct World {
    rng: Rng,
    source: Source,
    documents: BTreeMap<&'static str, Document>,
    /// Persisted last good modules by bundle.
    persisted: BTreeMap<&'static str, LastGood>,
    seen: Seen,
    /// Source's epoch at the last quiet phase.
    quiet_epoch: usize,
}

impl World {
    fn edit(&mut self) {
        let all = Document::all();
        let document = all[self.rng.usize(..all.len())];
        match self.documents.remove(document.name) {
            None => _ = self.documents.insert(document.name, document),
            Some(_) if self.rng.u8(..4) == 0 => {}
            Some(present) => _ = self.documents.insert(present.name, present.edited(&mut self.rng)),
        }
    }
}

struct Run {
    world: World,
    hubs: Vec<Hub>,
    agents: Vec<Agent>,
}

impl Run {
    fn start(seed: u64) -> Self {
        let documents = Document::all().into_iter().map(|document| (document.name, document));
        let mut world = World {
            rng: Rng::with_seed(seed),
            source: Source::new(),
            documents: documents.collect(),
            persisted: BTreeMap::new(),
            seen: Seen::default(),
            quiet_epoch: 0,
        };
        let hubs = (0..HUBS).map(|_| Hub::start(&mut world)).collect();
        let agents = AGENTS.map(|(name, namespace)| Agent::start(name, namespace)).into();
        Self { world, hubs, agents }
    }

    async fn step(&mut self) {
        let Self { world, hubs, agents } = self;
        let (index, agent) = (world.rng.usize(..HUBS), world.rng.usize(..AGENTS.len()));
        let (hub, agent) = (&mut hubs[index], &mut agents[agent]);
        match world.rng.u16(..1000) {
            0..250 => world.source.change(&mut world.rng),
            250..430 => hub.receive(world),
            430..520 => hub.check(world),
            520..670 => {
                let behind = hub.streams.write(|| world.rng.bool());
                world.seen.add_if(behind > 0, "outdated streams");
            }
            670..860 => {
                let most = if world.rng.bool() { world.rng.usize(..400) } else { usize::MAX };
                agent.read(most, world);
                let is_checked = agent.check(world);
                world.seen.add(if is_checked { "checked reads" } else { "reads in between" });
            }
            860..910 => agent.connect(hubs, index, world).await,
            910..922 => {
                world.seen.add("connections cut");
                agent.cut();
            }
            922..932 => hub.list_any(world),
            // Connections stay open: agents are not notified.
            932..937 => {
                world.seen.add("restarts");
                *hub = Hub::start(world);
            }
            937..944 => {
                world.seen.add("OPA kills");
                *agent = Agent::start(agent.name, agent.namespace);
            }
            944..958 => hub.trouble(world),
            958..961 => {
                world.seen.add("restored servers");
                world.source.restore(&mut world.rng);
            }
            961..964 => {
                let written = hub.any(world);
                written.fails = !written.fails;
            }
            964..967 => world.source.toggle_jobs(),
            967..971 => world.source.toggle_place_of_jobs(),
            971..975 => {
                if let Some(written) = hub.written_of(FIELDS) {
                    written.plan_fails = !written.plan_fails;
                }
            }
            975..982 => world.edit(),
            982..990 => hub.reconcile(world),
            _ => hub.narrow(world),
        }
    }

    /// Ends all faults temporarily; `is_mended` also fixes user errors.
    async fn quiet(&mut self, is_mended: bool) {
        let Self { world, hubs, agents } = self;
        world.source.end_faults();
        world.quiet_epoch = world.source.epoch;
        for document in Document::all() {
            world.documents.entry(document.name).or_insert(document);
        }
        if is_mended {
            world.source.fix_rejected();
        }
        for hub in &mut *hubs {
            hub.settle(world);
        }
        // Replaced and abandoned connections are dropped.
        for _ in 0..3 {
            tokio::time::advance(SCOPE_IDLE).await;
            let_others_run().await;
        }
        for hub in &mut *hubs {
            hub.streams.write(|| false);
            hub.check_streams();
        }
        for agent in &mut *agents {
            agent.read(usize::MAX, world);
            agent.settle(hubs, world).await;
        }
        let others: Vec<_> = agents.iter().map(|agent| agent.applied.clone()).collect();
        let looked_at = world.rng.usize(..HUBS);
        let mut revisions = BTreeMap::new();
        for (index, hub) in hubs.iter().enumerate() {
            for written in hub.bundles() {
                let document = written.document;
                let namespaces = NAMESPACES.into_iter().filter(|_| document.is_scoped);
                for namespace in namespaces.map(Some).chain([None]) {
                    let part = match namespace {
                        Some(_) => written.bundle().of(namespace).unwrap(),
                        None => written.bundle().clone(),
                    };
                    let head = part.head().borrow().clone().unwrap();
                    let asked = Asked::new(document, namespace, &part);
                    let left_out = asked.check_all(&world.source, &units_of(&head.view));
                    let is_by_bytes = document.max_bytes.is_some();
                    world.seen.add_if(left_out > 0 && is_by_bytes, "objects omitted");
                    world.seen.add_if(left_out > 0 && !is_by_bytes, "directories omitted");
                    if index == looked_at {
                        // Reconciles any agent's content, even of another bundle.
                        let other = &others[world.rng.usize(..others.len())];
                        asked.check_archives(&world.source, &head, std::slice::from_ref(other)).await;
                    }
                    let revision = head.view.revision;
                    let view = (document.name, namespace, asked.opened.clone());
                    let same = *revisions.entry(view).or_insert(revision);
                    // Earlier objects may displace later ones.
                    let depends = document.is_limited() || !world.source.is_good();
                    assert!(same == revision || depends, "{asked}: I2");
                }
            }
        }
    }
}

async fn run(seed: u64, steps: usize) -> Seen {
    let mut run = Run::start(seed);
    for step in 1..=steps {
        run.step().await;
        if step % QUIET_AFTER == 0 {
            let is_mended = run.world.rng.bool();
            run.quiet(is_mended).await;
        }
    }
    run.quiet(true).await;
    run.world.seen
}

#[test]
fn agents_match_the_source_despite_faults() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let steps = number("OPA_HUB_FAULT_STEPS").and_then(|steps: u64| steps.try_into().ok()).unwrap_or(STEPS);
    let seeds = number("OPA_HUB_FAULT_SEED").map_or(0..SEEDS, |seed| seed..seed + 1);
    let is_long = steps as u64 * (seeds.end - seeds.start) >= STEPS as u64 * SEEDS;
    let mut all = Seen::default();
    for seed in seeds {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        let seen = runtime.unwrap().block_on(run(seed, steps));
        println!("seed {seed}, {steps} steps: {seen:?}");
        seen.0.into_iter().for_each(|(what, count)| *all.0.entry(what).or_default() += count);
    }
    let missing: Vec<_> = TRIED.into_iter().filter(|what| !all.0.contains_key(what)).collect();
    assert!(missing.is_empty() || !is_long, "never covered: {missing:?}");
    let [checked, others] = ["checked reads", "reads in between"].map(|what| all.0.get(what).copied());
    let (checked, others) = (checked.unwrap_or(0), others.unwrap_or(0));
    assert!(
        checked * READS_A_CHECK_MAX >= checked + others,
        "{checked} of {} reads checked",
        checked + others
    );
}
