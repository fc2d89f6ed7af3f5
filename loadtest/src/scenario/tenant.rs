//! `tenant`: one hub with two bundles of the cluster. Tenant A attacks the hub with all that its rights allow, tenant B
//! works as before. The scenario measures by how much later B sees its own changes, and the memory of the hub.

#![expect(clippy::large_futures, reason = "one run at a time, which is awaited once")]

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{ErrorKind, Read as _};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::Args;
use flate2::read::GzDecoder;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Api;
use kube::api::{DeleteParams, ListParams, ObjectMeta, PostParams};
use opa_hub_loadtest::cluster::{Cluster, DATA, POLICY};
use opa_hub_loadtest::eventually::{equal, eventually, within};
use opa_hub_loadtest::lab::process::{Process, Usage};
use opa_hub_loadtest::lab::{Agent, ControlPlane, Delivery, Hub, Opa, http};
use opa_hub_proto::frame::FRAME_BYTES_MAX;
use opa_hub_proto::sse::{Decoder, Message};
use reqwest::{Client, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::{Common, at_least, at_rate, command, megabytes};
use crate::histogram::Histogram;
use crate::results::{Goal, Measured, Results};
use crate::swarm::Schedule;

/// Names of the bundles, and of the tenants' namespaces.
const A: &str = "tenant-a";
const B: &str = "tenant-b";
/// A namespace whose data belongs to A, with the name of a package of A.
const SEIZED: &str = "seized";
/// The label of A's ConfigMaps that are removed after an attack.
const ATTACK: (&str, &str) = ("tenant.example.com/attack", "true");
/// The label of ConfigMaps with tests.
const TESTS: (&str, &str) = ("tenant.example.com/tests", "true");
const BUNDLES: &str = "/apis/opahub.dev/v1alpha1/bundles";
/// The limit of A's data: five times A's pods.
const MAX_BYTES: &str = "64Mi";
/// A's pods, and the bytes of an annotation of each: 12 MB, which a flood of reconcile requests multiplies.
const HEAVY_PODS: usize = 60;
const HEAVY_BYTES: usize = 200_000;
/// B's objects that are edited.
const POD: &str = "web";
const SETTINGS: &str = "settings";

/// B's work, a second. Each policy edit costs two runs of OPA, which two cores must bear next to everything else.
const POLICY_RATE: f64 = 2.0;
const CHANGE_RATE: f64 = 5.0;
const ARCHIVE_RATE: f64 = 4.0;

/// Maximum time until an edit of B is seen. Later ones count as unseen.
const LATE_MAX: Duration = Duration::from_secs(30);
/// Maximum time of one write to the API server; a longer one ends the scenario.
const WRITE_MAX: Duration = Duration::from_secs(30);
/// Maximum time for the removal of what an attack created: a thousand ConfigMaps, one after the other.
const CLEAN_MAX: Duration = Duration::from_secs(60);
/// Maximum time of a start: the hub is built first, if it is older than its sources.
const START_MAX: Duration = Duration::from_secs(600);
/// Maximum time of one HTTP request.
const REQUEST_MAX: Duration = Duration::from_secs(10);
/// Maximum time, after the attack, until the hub takes an edit of A again: two runs of OPA that time out, and a third.
const SETTLE_MAX: Duration = Duration::from_secs(90);
/// Maximum time, after the last step, until an attack leaves a trace.
const TRACE_MAX: Duration = Duration::from_secs(30);
/// Maximum silence of B's stream: three heartbeats.
const SILENCE: Duration = Duration::from_secs(15);
/// Pause before a stream is opened again.
const RETRY: Duration = Duration::from_millis(100);
/// Interval at which B's OPA is asked while an edit is awaited.
const LOOK: Duration = Duration::from_millis(2);
/// Interval at which the hub's memory is sampled: a runaway grows by 1 GB/s, so by 25 MB.
const GUARD_LOOK: Duration = Duration::from_millis(25);
/// Bytes of memory at which the hub is stopped, so that the machine survives.
const MEMORY_DEADLY: u64 = 2 << 30;

/// Maximum steps of an attack of edits, far above what the time of a phase allows.
const STEPS_MAX: u64 = 10_000;
/// A's writes to the API server at a time.
const WRITERS: usize = 16;
/// A's data ConfigMaps that are refused, and as many policies.
const REFUSED: usize = 500;
const DEFINITIONS: usize = 30_000;
const SLOW_TESTS: usize = 14;
/// Levels of the policy that multiplies fields, by six each.
const LEVELS: usize = 12;
/// Keys of the large data ConfigMap. With three letters each, and again in managedFields, etcd accepts 70,000.
const WIDE_KEYS: usize = 60_000;
/// Reconcile requests at a time, and in all.
const RECONCILES_AT_ONCE: u64 = 60;
const RECONCILES_MAX: u64 = 12_000;
/// Requests with an invented namespace at a time, and in all.
const NAMESPACES_AT_ONCE: u64 = 50;
const NAMESPACES_MAX: u64 = 2000;
/// Pause between two volleys of requests, so that sending them leaves the cores to the hub.
const VOLLEY_PAUSE: Duration = Duration::from_millis(100);
/// Connections that are opened and then silent.
const SILENT: usize = 500;
/// The beginnings of their requests.
const HALVES: [&str; 2] = [
    "GET /bundles/tenant-b/stream HTTP/1.1\r\nhost: hub\r\n",
    "POST /bundles/tenant-a/reconcile?namespace=tenant-a HTTP/1.1\r\nhost: hub\r\ncontent-length: 1000000\r\n\r\n{",
];

/// Columns other than those of the attacks.
const CALM: &str = "no attack";
const WHOLE: &str = "the whole run";
/// Kinds of B's work.
const POLICIES: &str = "policy edit until B's OPA decides by it";
const PODS: &str = "pod change until B's stream has it";
const EDITS: &str = "data edit until B's stream has it";
const ARCHIVES: &str = "B's archive";
const WRITES: &str = "answer of the API server to B";
/// Figures.
const SLOWDOWN: &str = "slowdown of B (p99, the worst kind of work)";
const DONE: &str = "edits and requests of B";
const UNSEEN: &str = "of these never seen";
const STEPS: &str = "steps of the attack";
const HITS: &str = "of these with a trace in the hub";
const CLOSED: &str = "requests and connections that the hub refused or closed";
const MEMORY: &str = "hub memory, highest";
const RESTARTS: &str = "times that the hub had to be started again";
const DIFFERENCES: &str = "differences from B's expected content at the end";
/// The goals.
const SLOWDOWN_MAX: f64 = 2.0;
const MEMORY_MAX_MB: f64 = 600.0;

#[derive(Args)]
pub(crate) struct Options {
    /// Length of a phase: one without an attack, then one of each attack
    #[arg(long, default_value_t = 20, value_parser = at_least::<2>)]
    seconds: usize,
    #[command(flatten)]
    common: Common,
}

/// What A does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Attack {
    /// A policy whose fields multiply by six at each of twelve levels.
    Fields,
    /// Policies that `opa check` accepts and `opa build --target=plan` does not.
    Plan,
    /// Tests that each run until their timeout.
    Tests,
    /// A rule whose type is a union of 30,000 objects.
    Definitions,
    /// A policy that seems to read a resource, and its correction.
    Typo,
    /// Data below a package, and edits of many policies.
    Refused,
    /// Reconcile requests, no two alike.
    Reconciles,
    /// Requests for namespaces that do not exist.
    Namespaces,
    /// Connections with half a head, or with a body that does not arrive.
    Silent,
    /// A data ConfigMap all of whose keys change.
    Wide,
    /// A Bundle document with `maxBytes` and without.
    Document,
}

const ATTACKS: [(&str, Attack); 11] = [
    ("fields that multiply", Attack::Fields),
    ("no plan", Attack::Plan),
    ("slow tests", Attack::Tests),
    ("30,000 definitions", Attack::Definitions),
    ("a typo for a resource", Attack::Typo),
    ("refused data, 500 policies", Attack::Refused),
    ("reconcile flood", Attack::Reconciles),
    ("invented namespaces", Attack::Namespaces),
    ("silent connections", Attack::Silent),
    ("60,000 keys rewritten", Attack::Wide),
    ("a document that changes", Attack::Document),
];

/// The way to the API server and to the hub.
#[derive(Clone)]
struct Site {
    cluster: Cluster,
    /// Base URL.
    hub: String,
    /// Process id of the hub.
    process: u32,
    http: Client,
}

/// A ConfigMap that is to be created or replaced.
struct Put {
    namespace: &'static str,
    name: String,
    labels: Vec<(&'static str, &'static str)>,
    data: BTreeMap<String, String>,
}

/// Progress of an attack.
#[derive(Default)]
struct Counts {
    steps: AtomicU64,
    hits: AtomicU64,
    closed: AtomicU64,
}

/// One kind of work: what was asked, what was seen, and how long each took.
struct Tracker {
    due: Schedule,
    state: Mutex<State>,
}

struct State {
    /// The newest number that was seen.
    newest: u64,
    /// Numbers that are awaited, each since the API server accepted it.
    open: Vec<(u64, Instant)>,
    seen: u64,
    delays: Histogram,
}

/// B, with what reads its bundle.
struct Tenant {
    policies: Arc<Tracker>,
    pods: Arc<Tracker>,
    edits: Arc<Tracker>,
    archives: Arc<Tracker>,
    writes: Tracker,
    /// Streams that ended.
    ended: Arc<AtomicU64>,
    _reading: JoinSet<()>,
}

/// Bytes of the hub's memory.
#[derive(Default)]
struct Memory {
    /// The most of the current phase, as sampled.
    phase: Cell<u64>,
    /// The most of any hub, by the kernel's count.
    peak: Cell<u64>,
}

/// Everything that runs.
struct Lab {
    tenant: Tenant,
    _agent: Agent,
    opa: Opa,
    hub: Hub,
    flags: Vec<String>,
    cluster: Cluster,
    plane: ControlPlane,
    http: Client,
    memory: Memory,
    restarts: u64,
    _reader_of_a: JoinSet<()>,
}

/// Results of a phase.
struct Phase {
    measured: Measured,
    /// p99 of each kind of B's work, in seconds.
    p99: [f64; 4],
    unseen: u64,
    failures: Vec<String>,
}

pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let Options { seconds, common } = options;
    let mut goals: Vec<_> =
        ATTACKS.iter().map(|(name, _)| Goal::at_most(name, SLOWDOWN, SLOWDOWN_MAX)).collect();
    goals.push(Goal::at_most(WHOLE, MEMORY, MEMORY_MAX_MB));
    goals.extend([UNSEEN, RESTARTS, DIFFERENCES].map(|figure| Goal::at_most(WHOLE, figure, 0.0)));
    let mut results = Results::new(
        "tenant",
        format!("Tenant B while tenant A attacks their hub in {} ways, {seconds} s each", ATTACKS.len()),
        command("tenant", &[("seconds", seconds), ("runs", common.runs)]),
        goals,
    );
    let mut failures = Vec::new();
    for run in 0..common.runs {
        eprintln!("run {} of {}", run + 1, common.runs);
        let (measured, failed) = Box::pin(once(Duration::from_secs(seconds as u64))).await?;
        results.push(measured, common.out.as_deref())?;
        failures.extend(failed);
    }
    results.finish(common.out.as_deref());
    ensure!(failures.is_empty(), "tenant B is not safe from tenant A:\n{}", failures.join("\n"));
    Ok(())
}

async fn once(length: Duration) -> anyhow::Result<(Vec<Measured>, Vec<String>)> {
    let mut lab = Lab::start().await?;
    let (mut all, mut failures, mut unseen) = (Vec::new(), Vec::new(), 0);
    let mut calm = None;
    let attacks = ATTACKS.into_iter().map(|(name, attack)| (name, Some(attack)));
    for (name, attack) in std::iter::once((CALM, None)).chain(attacks) {
        let phase = Box::pin(lab.phase(name, attack, length)).await.context(name)?;
        let mut measured = phase.measured;
        unseen += phase.unseen;
        failures.extend(phase.failures);
        let before = *calm.get_or_insert(phase.p99);
        let ratios = phase.p99.iter().zip(before).map(|(now, before)| now / before);
        let slowdown = ratios.fold(0.0, f64::max);
        if attack.is_some() {
            measured.add(SLOWDOWN, "×", slowdown);
        }
        eprintln!("  {name}: slowdown {slowdown:.1}, {} of B's edits and requests unseen", phase.unseen);
        all.push(measured);
    }
    let differences = lab.differences().await?;
    let mut whole = Measured::new(WHOLE);
    whole.add(UNSEEN, "", unseen as f64);
    whole.add(MEMORY, "MB", megabytes(lab.memory.peak.get()));
    whole.add(RESTARTS, "", lab.restarts as f64);
    whole.add(DIFFERENCES, "", differences.len() as f64);
    all.push(whole);
    failures.extend(differences.into_iter().map(|difference| format!("at the end: {difference}")));
    Ok((all, failures))
}

impl Lab {
    async fn start() -> anyhow::Result<Self> {
        let plane = ControlPlane::start().await?;
        ensure!(plane.is_own(), "this scenario attacks a hub, so it runs on the lab's own API server only");
        let cluster = Cluster { client: plane.client().await? };
        let definition: Value =
            serde_saphyr::from_str(include_str!("../../../deploy/kubernetes/bundles.yaml"))?;
        cluster.create("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", &definition).await?;
        for namespace in [A, B, SEIZED] {
            cluster.namespace(namespace).await?;
        }
        for at in 0..HEAVY_PODS {
            cluster.create(&format!("/api/v1/namespaces/{A}/pods"), &heavy_pod(at)).await?;
        }
        cluster.pod(B, POD, &[("round", "0")]).await?;
        for put in [policy_of_a(0), policy_of_b(0), settings(0)] {
            cluster_put(&cluster, put).await?;
        }
        let spec_of_b = json!({
            "policies": { "namespaces": [B] }, "data": { "namespaces": [B] },
            "replicate": [{ "resource": "v1/pods", "namespaces": [B], "fields": "auto" }],
        });
        for document in [document(A, &spec_of_a()), document(B, &spec_of_b)] {
            eventually("the definition of Bundle is served", async || {
                cluster.create(BUNDLES, &document).await.map_err(|error| error.to_string())
            })
            .await?;
        }
        let kubeconfig = format!("--kubeconfig={}", plane.kubeconfig.display());
        let others = ["--enable-policies=false", "--enable-data=false", "--log-level=error"];
        let flags: Vec<String> = std::iter::once(kubeconfig).chain(others.map(Into::into)).collect();
        let dir = plane.dir.path();
        let refs: Vec<_> = flags.iter().map(String::as_str).collect();
        let hub = in_time("the start of the hub", START_MAX, Hub::start(dir, &refs)).await?;
        let opa = Opa::start(&plane.assets, dir, None, &[]).await?;
        let flags_of_agent = ["--bundle", B];
        let mut agent =
            Agent::start(dir, &Agent::address()?, &[&hub.url], &opa.url, Delivery::Rest, &flags_of_agent)?;
        in_time("the agent is ready", START_MAX, agent.wait_ready()).await?;
        let http = http()?;
        let tenant = Tenant::start(&http, &hub.url, &opa.url);
        let mut reader_of_a = JoinSet::new();
        reader_of_a.spawn(drain(http.clone(), hub.url.clone()));
        let mut lab = Self {
            tenant,
            _agent: agent,
            opa,
            hub,
            flags,
            cluster,
            plane,
            http,
            memory: Memory::default(),
            restarts: 0,
            _reader_of_a: reader_of_a,
        };
        lab.calm().await?.map_err(anyhow::Error::msg).context("before any attack")?;
        Ok(lab)
    }

    fn site(&self) -> anyhow::Result<Site> {
        let process = self.hub.process.as_ref().context("the hub was started")?.id();
        Ok(Site {
            cluster: self.cluster.clone(),
            hub: self.hub.url.clone(),
            process,
            http: self.http.clone(),
        })
    }

    /// B works for this long while A attacks. Ends early when the hub does.
    async fn phase(&mut self, name: &str, attack: Option<Attack>, length: Duration) -> anyhow::Result<Phase> {
        let (site, counts) = (self.site()?, Arc::new(Counts::default()));
        let mut attacking = JoinSet::new();
        if let Some(attack) = attack {
            attacking.spawn(attack.run(site.clone(), Instant::now() + length, Arc::clone(&counts)));
        }
        self.memory.phase.set(0);
        let (tenant, ended) = (&self.tenant, self.tenant.ended.load(Relaxed));
        let both = async {
            if let Ok(worked) = tokio::time::timeout(length + LATE_MAX, tenant.work(&site, length)).await {
                worked?;
            }
            while let Some(attacked) = attacking.join_next().await {
                attacked??;
            }
            anyhow::Ok(())
        };
        let process = self.hub.process.as_mut().context("the hub was started")?;
        let death = match guarded(process, &self.memory, both).await {
            Ok(done) => done.map(|()| None)?,
            Err(death) => Some(death),
        };
        attacking.abort_all();

        let mut measured = Measured::new(name);
        let (mut p99, mut done, mut seen) = ([0.0; 4], 0, 0);
        for ((kind, rate, tracker), p99) in self.tenant.kinds().into_iter().zip(&mut p99) {
            let (delays, seen_of_kind) = tracker.take();
            measured.add_delays(kind, &delays);
            *p99 = delays.percentile(99.0);
            // As many as `at_rate` makes, even when the phase ended early.
            done += (rate * length.as_secs_f64()) as u64;
            seen += seen_of_kind;
        }
        measured.add_delays(WRITES, &self.tenant.writes.take().0);
        // One curve an attack is as much as a picture shows.
        measured.curves.retain(|kind, _| kind == POLICIES);
        let unseen = done.saturating_sub(seen);
        measured.add(DONE, "", done as f64);
        measured.add(UNSEEN, "", unseen as f64);
        measured.add("streams of B that ended", "", (self.tenant.ended.load(Relaxed) - ended) as f64);
        let hits = counts.hits.load(Relaxed);
        let mut failures = Vec::new();
        if attack.is_some() {
            measured.add(STEPS, "", counts.steps.load(Relaxed) as f64);
            measured.add(HITS, "", hits as f64);
            measured.add(CLOSED, "", counts.closed.load(Relaxed) as f64);
            if hits == 0 && death.is_none() {
                failures.push("the attack left no trace in the hub, so nothing was measured".to_owned());
            }
        }
        if unseen > 0 {
            failures.push(format!("{unseen} of {done} edits and requests of B were never seen"));
        }
        failures.extend(self.recover(death).await?);
        measured.add(MEMORY, "MB", megabytes(self.memory.phase.get()));
        for failure in &mut failures {
            failure.insert_str(0, &format!("{name}: "));
            eprintln!("  {failure}");
        }
        Ok(Phase { measured, p99, unseen, failures })
    }

    /// Removes what the attack left. A hub that ended, or does not serve both tenants after that, is started again.
    /// Returns why.
    async fn recover(&mut self, death: Option<String>) -> anyhow::Result<Option<String>> {
        let trouble = match death {
            Some(death) => Some(format!("the attack killed the hub: {death}")),
            None => self.calm().await?.err(),
        };
        if trouble.is_some() {
            self.restarts += 1;
            self.hub.kill();
            clean(&self.cluster).await?;
            self.hub.spawn()?;
            in_time("the hub is ready again", START_MAX, self.hub.wait_ready()).await?;
            self.calm().await?.map_err(anyhow::Error::msg).context("after the hub was started again")?;
        }
        Ok(trouble)
    }

    /// Removes what an attack left, and waits until the hub serves an edit of each tenant. The inner error is the hub's.
    async fn calm(&mut self) -> anyhow::Result<Result<(), String>> {
        let (site, tenant) = (self.site()?, &self.tenant);
        let calm = async {
            clean(&site.cluster).await?;
            tenant.is_served(&site).await?;
            site.serves_a().await
        };
        let process = self.hub.process.as_mut().context("the hub was started")?;
        let calmed = guarded(process, &self.memory, calm).await;
        Ok(calmed.and_then(|calmed| calmed.map_err(|error| format!("{error:#}"))))
    }

    /// Compares the values in B's OPA with those written last, and B's revision with that of a hub that saw no attack.
    async fn differences(&self) -> anyhow::Result<Vec<String>> {
        let mut differences = Vec::new();
        for (path, tracker) in [
            ("/shop/revision".to_owned(), &self.tenant.policies),
            (format!("/kubernetes/pods/{B}/{POD}/metadata/labels/round"), &self.tenant.pods),
            (format!("/{B}/{SETTINGS}/current/setting"), &self.tenant.edits),
        ] {
            let (url, expected) = (format!("{}/v1/data{path}", self.opa.url), tracker.due.len());
            let same = within(LATE_MAX, format!("data{path} of B's OPA"), async || {
                equal(&revision(&self.http, &url).await, &Some(expected))
            });
            differences.extend(same.await.err().map(|error| error.to_string()));
        }
        let dir = self.plane.dir.path().join("reference");
        std::fs::create_dir_all(&dir)?;
        let flags: Vec<_> = self.flags.iter().map(String::as_str).collect();
        let reference = in_time("the start of another hub", START_MAX, Hub::start(&dir, &flags)).await?;
        let [here, there] = [&self.hub, &reference].map(|hub| format!("{}/v1/bundles/{B}", hub.url));
        let same = within(LATE_MAX, "the revision of B at a hub that saw no attack", async || {
            let found = get(&self.http, &here).await.map_err(|error| error.to_string())?;
            let expected = get(&self.http, &there).await.map_err(|error| error.to_string())?;
            let expected = expected["revision"].as_str().ok_or("it has none yet")?;
            equal(&found["revision"].as_str(), &Some(expected))
        });
        differences.extend(same.await.err().map(|error| error.to_string()));
        Ok(differences)
    }
}

impl Memory {
    fn sample(&self, usage: Usage) {
        self.phase.set(self.phase.get().max(usage.rss));
        self.peak.set(self.peak.get().max(usage.peak));
    }
}

/// Does this work while the hub runs within its memory. The error is how the hub ended.
async fn guarded<T>(
    process: &mut Process,
    memory: &Memory,
    work: impl Future<Output = T>,
) -> Result<T, String> {
    let death = async {
        loop {
            if let Some(ended) = process.has_ended() {
                return format!("{ended:#}");
            }
            // Between its end and the next look there is no usage.
            if let Ok(usage) = process.usage() {
                memory.sample(usage);
                if usage.rss > MEMORY_DEADLY {
                    process.kill();
                    return format!("it was stopped at {:.0} MB of memory", megabytes(usage.rss));
                }
            }
            tokio::time::sleep(GUARD_LOOK).await;
        }
    };
    tokio::select! {
        done = work => Ok(done),
        death = death => Err(death),
    }
}

impl Tenant {
    fn start(http: &Client, hub: &str, opa: &str) -> Self {
        let tracker = || Arc::new(Tracker::new());
        let (policies, pods, edits, ended) = (tracker(), tracker(), tracker(), Arc::new(AtomicU64::new(0)));
        let mut reading = JoinSet::new();
        reading.spawn(ask(http.clone(), format!("{opa}/v1/data/shop/revision"), Arc::clone(&policies)));
        let (of_pods, of_edits, of_ended) = (Arc::clone(&pods), Arc::clone(&edits), Arc::clone(&ended));
        let (http, hub) = (http.clone(), hub.to_owned());
        reading.spawn(async move {
            loop {
                // However it ended, the next one begins with all that there is.
                _ = follow(&http, &hub, &of_pods, &of_edits).await;
                of_ended.fetch_add(1, Relaxed);
                tokio::time::sleep(RETRY).await;
            }
        });
        let (archives, writes) = (tracker(), Tracker::new());
        Self { policies, pods, edits, archives, writes, ended, _reading: reading }
    }

    /// The kinds of work with their rates.
    fn kinds(&self) -> [(&'static str, f64, &Tracker); 4] {
        [
            (POLICIES, POLICY_RATE, &self.policies),
            (PODS, CHANGE_RATE, &self.pods),
            (EDITS, CHANGE_RATE, &self.edits),
            (ARCHIVES, ARCHIVE_RATE, &self.archives),
        ]
    }

    async fn work(&self, site: &Site, length: Duration) -> anyhow::Result<()> {
        let policies = at_rate(&self.policies.due, POLICY_RATE, length, async |number, _| {
            self.edit_policy(site, number).await
        });
        let pods = at_rate(&self.pods.due, CHANGE_RATE, length, async |number, _| {
            self.change_pod(site, number).await
        });
        let edits = at_rate(&self.edits.due, CHANGE_RATE, length, async |number, _| {
            self.edit_settings(site, number).await
        });
        let mut asking = JoinSet::new();
        let archives = at_rate(&self.archives.due, ARCHIVE_RATE, length, async |_, due| {
            asking.spawn(archive(site.clone(), due, Arc::clone(&self.archives)));
            Ok(())
        });
        tokio::try_join!(policies, pods, edits, archives)?;
        while asking.join_next().await.is_some() {}
        while !self.is_done() {
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    fn is_done(&self) -> bool {
        [&self.policies, &self.pods, &self.edits].into_iter().all(|tracker| tracker.is_done())
    }

    async fn edit_policy(&self, site: &Site, number: u64) -> anyhow::Result<()> {
        self.timed(cluster_put(&site.cluster, policy_of_b(number))).await?;
        self.policies.expect(number);
        Ok(())
    }

    async fn change_pod(&self, site: &Site, number: u64) -> anyhow::Result<()> {
        let round = number.to_string();
        self.timed(site.cluster.label_pod(B, POD, &[("round", &round)])).await?;
        self.pods.expect(number);
        Ok(())
    }

    async fn edit_settings(&self, site: &Site, number: u64) -> anyhow::Result<()> {
        self.timed(cluster_put(&site.cluster, settings(number))).await?;
        self.edits.expect(number);
        Ok(())
    }

    /// A write of B, as long as the API server takes for it.
    async fn timed(&self, write: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
        let started = Instant::now();
        in_time("a write to the API server", WRITE_MAX, write).await?;
        self.writes.answer(started, true);
        Ok(())
    }

    /// Waits until one edit of each kind is seen.
    async fn is_served(&self, site: &Site) -> anyhow::Result<()> {
        self.edit_policy(site, self.policies.due.push(Instant::now())).await?;
        self.change_pod(site, self.pods.due.push(Instant::now())).await?;
        self.edit_settings(site, self.edits.due.push(Instant::now())).await?;
        let served = within(LATE_MAX, "edits of B after the attack", async || {
            if self.is_done() { Ok(()) } else { Err("they are not seen") }
        });
        let served = served.await;
        self.kinds().iter().for_each(|(_, _, tracker)| drop(tracker.take()));
        drop(self.writes.take());
        served.map(drop)
    }
}

/// Asks B's OPA for the newest policy while one is awaited.
async fn ask(http: Client, url: String, policies: Arc<Tracker>) {
    loop {
        if !policies.is_done()
            && let Some(number) = revision(&http, &url).await
        {
            policies.arrive(number);
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// The policy by which B's OPA decides now.
async fn revision(http: &Client, url: &str) -> Option<u64> {
    get(http, url).await.ok()?["result"].as_str()?.parse().ok()
}

/// Reads B's stream until it ends.
async fn follow(http: &Client, hub: &str, pods: &Tracker, edits: &Tracker) -> anyhow::Result<()> {
    let arrive = |text: &str| {
        for (mark, tracker) in [("\"round\":\"", pods), ("\"setting\":\"", edits)] {
            if let Some(number) = newest(text, mark) {
                tracker.arrive(number);
            }
        }
    };
    let mut stream = http.get(format!("{hub}/bundles/{B}/stream")).send().await?.error_for_status()?;
    // A stream begins at the newest revision: what led to it is in the archive.
    let request = http.post(format!("{hub}/bundles/{B}/reconcile")).body(r#"{"dirs":{}}"#);
    let archive = request.timeout(REQUEST_MAX).send().await?.error_for_status()?.bytes().await?;
    let mut text = String::new();
    GzDecoder::new(&archive[..]).read_to_string(&mut text)?;
    arrive(&text);
    let mut decoder = Decoder::new(FRAME_BYTES_MAX);
    while let Some(chunk) = tokio::time::timeout(SILENCE, stream.chunk()).await?? {
        decoder.push(&chunk);
        while let Some(message) = decoder.next()? {
            if let Message::Event { data, .. } = message {
                arrive(&String::from_utf8_lossy(&data));
            }
        }
    }
    Ok(())
}

/// The newest number behind `mark`.
fn newest(text: &str, mark: &str) -> Option<u64> {
    text.split(mark).skip(1).filter_map(|rest| rest.split('"').next()?.parse().ok()).max()
}

/// Asks for B's archive once.
async fn archive(site: Site, due: Instant, archives: Arc<Tracker>) {
    let get = async {
        let request = site.http.get(format!("{}/bundles/{B}", site.hub)).timeout(LATE_MAX);
        anyhow::Ok(request.send().await?.error_for_status()?.bytes().await?)
    };
    let is_whole = get.await.is_ok_and(|bytes| !bytes.is_empty());
    archives.answer(due, is_whole);
}

/// Reads A's stream, as an agent of A does, until it is aborted.
async fn drain(http: Client, hub: String) {
    let url = format!("{hub}/bundles/{A}/stream?namespace={A}");
    loop {
        if let Ok(mut stream) = http.get(&url).send().await {
            while let Ok(Some(_)) = stream.chunk().await {}
        }
        tokio::time::sleep(RETRY).await;
    }
}

impl Tracker {
    fn new() -> Self {
        let state = State { newest: 0, open: Vec::new(), seen: 0, delays: Histogram::new() };
        Self { due: Schedule::default(), state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The edit of this number was accepted now. It may have been seen before that was known.
    fn expect(&self, number: u64) {
        let mut state = self.state();
        state.open.push((number, Instant::now()));
        let newest = state.newest;
        state.arrive(newest);
    }

    /// The edit of this number is seen, and so are those before it.
    fn arrive(&self, number: u64) {
        self.state().arrive(number);
    }

    /// A request that was due then has its answer.
    fn answer(&self, due: Instant, is_good: bool) {
        let mut state = self.state();
        state.seen += u64::from(is_good);
        state.delays.record(due.elapsed());
    }

    fn is_done(&self) -> bool {
        self.state().open.is_empty()
    }

    /// Delays so far, and how many were seen. An edit that is still open counts with its age, and is no longer awaited.
    fn take(&self) -> (Histogram, u64) {
        let mut state = self.state();
        for (_, since) in std::mem::take(&mut state.open) {
            state.delays.record(since.elapsed());
        }
        (std::mem::replace(&mut state.delays, Histogram::new()), std::mem::take(&mut state.seen))
    }
}

impl State {
    fn arrive(&mut self, number: u64) {
        self.newest = self.newest.max(number);
        let before = self.open.len();
        self.open.retain(|(open, since)| {
            let is_open = *open > self.newest;
            if !is_open {
                self.delays.record(since.elapsed());
            }
            is_open
        });
        self.seen += (before - self.open.len()) as u64;
    }
}

impl Site {
    /// Bundle A as the hub describes it.
    async fn bundle_of_a(&self) -> anyhow::Result<Value> {
        get(&self.http, &format!("{}/v1/bundles/{A}", self.hub)).await
    }

    /// Waits until an edit of A's own policy is served.
    async fn serves_a(&self) -> anyhow::Result<()> {
        let digest = async || {
            let bundle = self.bundle_of_a().await.map_err(|error| error.to_string())?;
            let modules = bundle["modules"].as_array().cloned().unwrap_or_default();
            let of_base = |module: &Value| module["package"] == "base";
            let digest = modules.into_iter().find(of_base).map(|mut module| module["digest"].take());
            digest
                .ok_or_else(|| format!("the bundle of A lacks its policy; problems: {}", bundle["problems"]))
        };
        let (before, _) = within(LATE_MAX, "the bundle of A", async || digest().await).await?;
        cluster_put(&self.cluster, policy_of_a(fastrand::u64(1..))).await?;
        within(SETTLE_MAX, "an edit of A after the attack", async || {
            if digest().await? != before {
                return Ok(());
            }
            tokio::time::sleep(VOLLEY_PAUSE).await;
            Err("it is not served".to_owned())
        })
        .await
        .map(drop)
    }

    /// Whether the hub has a verdict of this ConfigMap of A, or reports that it cannot check A's policies.
    async fn has_verdict(&self, name: &str) -> bool {
        let Ok(bundle) = self.bundle_of_a().await else { return false };
        let problems = bundle["problems"].as_array().into_iter().flatten();
        let mut subjects = problems.filter_map(|problem| problem["subject"].as_str());
        let is_of_check = |subject: &str| {
            subject.contains(A) && ["policies checked", "--fields auto"].iter().any(|of| subject.contains(of))
        };
        !bundle["verdicts"][format!("{A}/{name}")].is_null() || subjects.any(is_of_check)
    }
}

impl Counts {
    fn step(&self) {
        self.steps.fetch_add(1, Relaxed);
    }

    fn hit(&self) {
        self.hits.fetch_add(1, Relaxed);
    }
}

impl Attack {
    /// Attacks until then. Each step is bounded in time, so that the end is at most [`TRACE_MAX`] later.
    async fn run(self, site: Site, until: Instant, counts: Arc<Counts>) -> anyhow::Result<()> {
        match self {
            Self::Refused => refuse(&site, until, &counts).await,
            Self::Silent => {
                be_silent(&site, until, &counts).await;
                Ok(())
            }
            Self::Document => change_document(&site, until, &counts).await,
            Self::Reconciles => {
                let client = http()?;
                let url = format!("{}/bundles/{A}/reconcile?namespace={A}", site.hub);
                let request = move |number: u64| {
                    // A digest that the hub does not know: the answer is everything, and of all fields.
                    let dirs = BTreeMap::from([(format!("/flood/{number}"), format!("{number:032x}"))]);
                    client.post(&url).body(json!({ "dirs": dirs }).to_string())
                };
                flood(until, &counts, RECONCILES_AT_ONCE, RECONCILES_MAX, request).await;
                Ok(())
            }
            Self::Namespaces => {
                let client = http()?;
                let url = format!("{}/bundles/{A}?namespace=invented", site.hub);
                let request = move |number: u64| client.get(format!("{url}-{number}"));
                flood(until, &counts, NAMESPACES_AT_ONCE, NAMESPACES_MAX, request).await;
                Ok(())
            }
            _ => self.edit(&site, until, &counts).await,
        }
    }

    /// Writes the ConfigMaps of one step after the other, and looks for traces of each.
    async fn edit(self, site: &Site, until: Instant, counts: &Counts) -> anyhow::Result<()> {
        let mut before = BTreeMap::new();
        for step in 0..STEPS_MAX {
            let now = Instant::now();
            if now < until {
                for put in self.configmaps(step) {
                    cluster_put(&site.cluster, put).await?;
                }
                counts.step();
            } else if counts.hits.load(Relaxed) > 0 || now > until + TRACE_MAX {
                break;
            }
            tokio::time::sleep(self.pause()).await;
            let runs = runs_of_opa(site.process);
            let is_at_work = match self {
                Self::Tests => runs.values().any(|command| command == "test"),
                // B's runs of OPA end sooner than the next look.
                Self::Definitions => runs.keys().any(|run| before.contains_key(run)),
                _ => false,
            };
            if is_at_work || site.has_verdict(self.configmap()).await {
                counts.hit();
            }
            before = runs;
        }
        Ok(())
    }

    /// Pause between two steps: time enough for a check.
    fn pause(self) -> Duration {
        match self {
            Self::Definitions | Self::Typo | Self::Wide => Duration::from_secs(1),
            _ => Duration::from_millis(500),
        }
    }

    /// The ConfigMap whose verdict is a trace.
    fn configmap(self) -> &'static str {
        match self {
            Self::Fields => "fields",
            Self::Plan => "entry",
            Self::Tests => "tests",
            Self::Definitions => "definitions",
            Self::Typo => "typo",
            _ => "wide",
        }
    }

    fn configmaps(self, step: u64) -> Vec<Put> {
        let name = self.configmap();
        match self {
            Self::Fields => vec![attacking_policy(name, step, &multiplying_fields())],
            Self::Plan => {
                let roles = "package roles_of\n\nroles[x].q := 1 if {some x in [\"foo\"]}\n\n\
                             roles[x].r := 2 if {some x in [\"foo\"]; roles[\"foo\"].q}\n";
                let dynamic = "package dynamic\n\ndecision := data[input.name].p0\n";
                vec![
                    attacking_policy(name, step, "package opahub_entry\n\np0 := 1\n"),
                    attacking_policy("roles", step, roles),
                    attacking_policy("dynamic", step, dynamic),
                ]
            }
            Self::Tests => {
                let mut put = attacking_policy(name, step, "package slow\n\nx := 1\n");
                put.labels.push(TESTS);
                put.data.insert("slow_test.rego".into(), slow_tests());
                vec![put]
            }
            Self::Definitions => vec![attacking_policy(name, step, &definitions())],
            Self::Typo => {
                let helper = "exempt contains \"admin\"\n\n";
                let correction = if step.is_multiple_of(2) { "" } else { helper };
                let deny = "deny contains \"x\" if not data.kubernetes.admission.exempt[input.name]\n";
                vec![attacking_policy(
                    name,
                    step,
                    &format!("package kubernetes.admission\n\n{correction}{deny}"),
                )]
            }
            _ => {
                let first = if step.is_multiple_of(2) { 0 } else { WIDE_KEYS };
                let keys = (first..first + WIDE_KEYS).map(|number| (key(number), "{}".to_owned()));
                let labels = vec![DATA, ATTACK];
                vec![Put { namespace: A, name: name.to_owned(), labels, data: keys.collect() }]
            }
        }
    }
}

/// Data below a package that A owns, then edits of as many policies, again and again.
async fn refuse(site: &Site, until: Instant, counts: &Counts) -> anyhow::Result<()> {
    let owner = attacking_policy("owner", 0, &format!("package {SEIZED}\n\nx := 1\n"));
    cluster_put(&site.cluster, owner).await?;
    counts.step();
    // The package comes first, or the data would own its path.
    while Instant::now() < until && !site.has_verdict("owner").await {
        tokio::time::sleep(VOLLEY_PAUSE).await;
    }
    let data = |at| Put {
        namespace: SEIZED,
        name: format!("data-{at}"),
        labels: vec![DATA, ATTACK],
        data: BTreeMap::from([("k".to_owned(), json!({ "at": at }).to_string())]),
    };
    put_all(site, until, counts, (0..REFUSED).map(data).collect()).await?;
    for round in 0..STEPS_MAX {
        if Instant::now() >= until {
            break;
        }
        let policy = |at| {
            attacking_policy(
                &format!("policy-{at}"),
                round,
                &format!("package refused_p{at}\n\nx := {round}\n"),
            )
        };
        put_all(site, until, counts, (0..REFUSED).map(policy).collect()).await?;
    }
    while Instant::now() < until + TRACE_MAX {
        let bundle = site.bundle_of_a().await.unwrap_or_default();
        let verdicts = bundle["verdicts"].as_object().into_iter().flatten();
        let refused =
            verdicts.filter(|(key, verdict)| key.starts_with(SEIZED) && verdict["status"] == "error");
        let refused = refused.count() as u64;
        counts.hits.store(refused, Relaxed);
        if refused > 0 {
            break;
        }
        tokio::time::sleep(VOLLEY_PAUSE).await;
    }
    Ok(())
}

/// Writes these, some at a time, until then.
async fn put_all(site: &Site, until: Instant, counts: &Counts, puts: Vec<Put>) -> anyhow::Result<()> {
    let mut writing = JoinSet::new();
    for put in puts {
        if Instant::now() >= until {
            break;
        }
        if writing.len() >= WRITERS
            && let Some(written) = writing.join_next().await
        {
            written??;
        }
        let cluster = site.cluster.clone();
        writing.spawn(async move { cluster_put(&cluster, put).await });
        counts.step();
    }
    while let Some(written) = writing.join_next().await {
        written??;
    }
    Ok(())
}

/// Sends requests in volleys until then, so many at most. An answer, or a connection that the hub closes, is a trace.
async fn flood(
    until: Instant,
    counts: &Counts,
    at_once: u64,
    most: u64,
    request: impl Fn(u64) -> RequestBuilder + Send,
) {
    let mut next = 0;
    while next < most && Instant::now() < until {
        let mut asking = JoinSet::new();
        for number in next..next + at_once {
            let request = request(number).timeout(REQUEST_MAX);
            // The body is not read: the hub has made it all the same.
            asking.spawn(async move { request.send().await.map(|answer| answer.status()) });
            counts.step();
        }
        next += at_once;
        while let Some(asked) = asking.join_next().await {
            let (is_trace, is_closed) = match asked {
                Ok(Ok(status)) => {
                    let refusals = [StatusCode::SERVICE_UNAVAILABLE, StatusCode::TOO_MANY_REQUESTS];
                    (true, refusals.contains(&status))
                }
                Ok(Err(error)) => {
                    let is_closed = !error.is_timeout() && !error.is_connect();
                    (is_closed, is_closed)
                }
                Err(_aborted) => (false, false),
            };
            counts.hits.fetch_add(u64::from(is_trace), Relaxed);
            counts.closed.fetch_add(u64::from(is_closed), Relaxed);
        }
        tokio::time::sleep(VOLLEY_PAUSE).await;
    }
}

/// Opens connections and sends half a request on each, then nothing until then. Open files of the hub are the trace.
async fn be_silent(site: &Site, until: Instant, counts: &Counts) {
    let files = || std::fs::read_dir(format!("/proc/{}/fd", site.process)).map_or(0, Iterator::count);
    let before = files();
    let mut open = Vec::new();
    for half in HALVES.into_iter().cycle().take(SILENT) {
        if Instant::now() >= until {
            break;
        }
        counts.step();
        let begin = async {
            let mut tcp = TcpStream::connect(site.hub.trim_start_matches("http://")).await?;
            tcp.write_all(half.as_bytes()).await?;
            Ok::<_, std::io::Error>(tcp)
        };
        match tokio::time::timeout(REQUEST_MAX, begin).await {
            Ok(Ok(tcp)) => open.push(tcp),
            _ => _ = counts.closed.fetch_add(1, Relaxed),
        }
    }
    let first = files();
    tokio::time::sleep_until(until.into()).await;
    let opened = first.max(files()).saturating_sub(before) as u64;
    // An answer, e.g. 408, ends a connection too.
    let waits = |tcp: &&TcpStream| {
        let read = tcp.try_read(&mut [0]);
        read.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    };
    let closed = open.len() - open.iter().filter(waits).count();
    let closed = counts.closed.fetch_add(closed as u64, Relaxed) + closed as u64;
    counts.hits.store(opened.max(closed), Relaxed);
}

/// Sets the limit of A's bundle and removes it again. A bundle that is published again is the trace.
async fn change_document(site: &Site, until: Instant, counts: &Counts) -> anyhow::Result<()> {
    let mut before = Value::Null;
    for step in 0..STEPS_MAX {
        let now = Instant::now();
        if now < until {
            let limit = if step.is_multiple_of(2) { Value::Null } else { json!(MAX_BYTES) };
            limit_a(&site.cluster, &limit).await?;
            counts.step();
        } else if counts.hits.load(Relaxed) > 0 || now > until + TRACE_MAX {
            break;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
        let published = match site.bundle_of_a().await {
            Ok(mut bundle) => bundle["publishedUnixSeconds"].take(),
            Err(_) => Value::Null,
        };
        if !published.is_null() && !before.is_null() && published != before {
            counts.hit();
        }
        if !published.is_null() {
            before = published;
        }
    }
    Ok(())
}

/// Writes the limit into A's Bundle document; null removes it.
async fn limit_a(cluster: &Cluster, limit: &Value) -> anyhow::Result<()> {
    let (object, patch) = (format!("{BUNDLES}/{A}"), json!({ "spec": { "maxBytes": limit } }));
    in_time("a write to the API server", WRITE_MAX, cluster.merge(&object, &patch)).await
}

/// Removes what an attack created, and gives A's document its limit.
async fn clean(cluster: &Cluster) -> anyhow::Result<()> {
    let ours = ListParams::default().labels(&format!("{}={}", ATTACK.0, ATTACK.1));
    for namespace in [A, SEIZED] {
        let api: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), namespace);
        let params = DeleteParams::default();
        let remove = async {
            drop(api.delete_collection(&params, &ours).await?);
            anyhow::Ok(())
        };
        in_time("the removal of an attack's ConfigMaps", CLEAN_MAX, remove).await?;
    }
    limit_a(cluster, &json!(MAX_BYTES)).await
}

/// Fails when this takes longer than `limit`.
async fn in_time<T>(
    what: &str,
    limit: Duration,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    let done = tokio::time::timeout(limit, work).await;
    done.with_context(|| format!("{what}: not within {} s", limit.as_secs()))?
}

/// One JSON answer.
async fn get(http: &Client, url: &str) -> anyhow::Result<Value> {
    let answer = http.get(url).timeout(REQUEST_MAX).send().await?;
    Ok(serde_json::from_slice(&answer.bytes().await?)?)
}

/// Replaces a ConfigMap, or creates it.
async fn cluster_put(cluster: &Cluster, put: Put) -> anyhow::Result<()> {
    let Put { namespace, name, labels, data } = put;
    let own = |(label, value): (&str, &str)| (label.to_owned(), value.to_owned());
    let labels: BTreeMap<String, String> = labels.into_iter().map(own).collect();
    let configmap = ConfigMap {
        metadata: ObjectMeta { name: Some(name.clone()), labels: Some(labels), ..Default::default() },
        data: Some(data),
        ..Default::default()
    };
    let api: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), namespace);
    let params = PostParams::default();
    let write = async {
        match api.replace(&name, &params, &configmap).await {
            Err(kube::Error::Api(status)) if status.code == 404 => {
                drop(api.create(&params, &configmap).await?);
            }
            other => drop(other?),
        }
        anyhow::Ok(())
    };
    in_time("a write to the API server", WRITE_MAX, write).await
}

/// Runs of OPA that this hub has started and that have not ended: their process ids and commands.
fn runs_of_opa(hub: u32) -> BTreeMap<u32, String> {
    let threads = std::fs::read_dir(format!("/proc/{hub}/task")).into_iter().flatten().flatten();
    let children = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    let ids: Vec<u32> = children
        .flat_map(|of| of.split_whitespace().filter_map(|id| id.parse().ok()).collect::<Vec<_>>())
        .collect();
    let command = |id: u32| {
        let line = std::fs::read(format!("/proc/{id}/cmdline")).ok()?;
        let command = line.split(|byte| *byte == 0).nth(1)?;
        Some((id, String::from_utf8_lossy(command).into_owned()))
    };
    ids.into_iter().filter_map(command).collect()
}

fn document(name: &str, spec: &Value) -> Value {
    json!({ "apiVersion": "opahub.dev/v1alpha1", "kind": "Bundle", "metadata": { "name": name }, "spec": spec })
}

fn spec_of_a() -> Value {
    json!({
        "policies": { "namespaces": [A] }, "data": { "namespaces": [A, SEIZED] },
        "replicate": [{ "resource": "v1/pods", "namespaces": [A], "scope": "Namespace", "fields": "auto" }],
        "replicateAuto": { "scope": "Namespace", "fields": "auto" },
        "maxBytes": MAX_BYTES, "testLabel": TESTS.0,
    })
}

/// A pod with an annotation that does not compress.
fn heavy_pod(at: usize) -> Value {
    let ballast: String = std::iter::repeat_with(fastrand::alphanumeric).take(HEAVY_BYTES).collect();
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": format!("heavy-{at}"), "labels": { "team": A }, "annotations": { "ballast": ballast } },
        "spec": { "containers": [{ "name": "main", "image": "registry.local/app:1.0" }] },
    })
}

fn policy(namespace: &'static str, name: &str, text: String) -> Put {
    let data = BTreeMap::from([("p.rego".to_owned(), text)]);
    Put { namespace, name: name.to_owned(), labels: vec![POLICY], data }
}

fn policy_of_a(number: u64) -> Put {
    let text = format!(
        "package base\n\nround := \"{number}\"\n\n\
         teams contains pod.metadata.labels.team if some pod in data.kubernetes.pods[\"{A}\"]\n"
    );
    policy(A, "base", text)
}

fn policy_of_b(number: u64) -> Put {
    let text = format!(
        "package shop\n\nrevision := \"{number}\"\n\n\
         rounds[name] := pod.metadata.labels.round if some name, pod in data.kubernetes.pods[\"{B}\"]\n"
    );
    policy(B, "shop", text)
}

fn settings(number: u64) -> Put {
    let data = BTreeMap::from([("current".to_owned(), json!({ "setting": number.to_string() }).to_string())]);
    Put { namespace: B, name: SETTINGS.to_owned(), labels: vec![DATA], data }
}

/// A policy of A that is removed when the attack ends. Each `step` has another text.
fn attacking_policy(name: &str, step: u64, text: &str) -> Put {
    let mut put = policy(A, name, format!("# {step}\n{text}"));
    put.labels.push(ATTACK);
    put
}

fn multiplying_fields() -> String {
    let mut text = format!(
        "package multiplying\n\ndeny contains x{LEVELS} if {{\n\tsome x0 in data.kubernetes.pods[\"{A}\"]\n"
    );
    for level in 1..=LEVELS {
        let of = level - 1;
        _ = writeln!(text, "\tsome x{level} in [x{of}.a, x{of}.b, x{of}.c, x{of}.d, x{of}.e, x{of}.f]");
    }
    text + "}\n"
}

/// More than 5 s of work each, which is OPA's limit of one test.
fn slow_tests() -> String {
    let mut text = "package slow_test\n".to_owned();
    for at in 0..SLOW_TESTS {
        _ = write!(
            text,
            "\ntest_{at} if {{\n\tpairs := [1 | some x in numbers.range(1, 10000); some y in numbers.range(1, 10000); x * y < {at}]\n\tcount(pairs) >= 0\n}}\n"
        );
    }
    text
}

fn definitions() -> String {
    let mut text = "package definitions\n\n".to_owned();
    for at in 0..DEFINITIONS {
        _ = writeln!(text, "r := {{\"k{at}\": 0}} if input");
    }
    text
}

/// Three letters or digits: short, so that many keys fit into an object.
fn key(number: usize) -> String {
    const DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    [62 * 62, 62, 1].map(|unit| char::from(DIGITS[number / unit % 62])).iter().collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// What the API server accepts of one ConfigMap.
    const CONFIGMAP_BYTES_MAX: usize = 1 << 20;
    /// What etcd accepts of one object.
    const OBJECT_BYTES_MAX: usize = 3 << 19;

    #[test]
    fn configmaps_of_attacks_fit() {
        for (name, attack) in ATTACKS {
            for put in attack.configmaps(1) {
                let bytes: usize = put.data.values().map(String::len).sum();
                assert!(bytes < CONFIGMAP_BYTES_MAX, "{name}: {bytes} bytes");
                // Each key and value with its tags, and each key once more in managedFields.
                let bytes: usize = put.data.iter().map(|(key, value)| 2 * key.len() + value.len() + 14).sum();
                assert!(bytes < OBJECT_BYTES_MAX, "{name}: {bytes} bytes in etcd");
                assert!(put.labels.contains(&ATTACK), "{name}: {} would stay", put.name);
            }
        }
    }

    #[test]
    fn each_step_changes_every_key() {
        let keys = |step| Attack::Wide.configmaps(step).remove(0).data.into_keys().collect::<BTreeSet<_>>();
        assert_eq!(keys(0).len(), WIDE_KEYS);
        assert!(keys(0).is_disjoint(&keys(1)));
        assert_eq!(keys(0), keys(2));
    }

    #[test]
    fn an_edit_is_seen_once_and_an_open_one_is_not() {
        let tracker = Tracker::new();
        tracker.expect(1);
        tracker.expect(2);
        tracker.arrive(2);
        tracker.arrive(2);
        // It was seen before its write was answered.
        tracker.arrive(3);
        tracker.expect(3);
        assert!(tracker.is_done());
        tracker.expect(4);
        assert!(!tracker.is_done());
        let (delays, seen) = tracker.take();
        assert_eq!((delays.count(), seen, tracker.is_done()), (4, 3, true));
        assert_eq!(
            (tracker.take().1, newest("\"round\":\"7\" \"round\":\"12\"", "\"round\":\"")),
            (0, Some(12))
        );
    }
}
