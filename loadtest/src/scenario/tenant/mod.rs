//! `tenant`: tenant A attacks a hub; measures tenant B's slowdown and the hub's memory.

#![expect(clippy::large_futures, reason = "one run at a time, which is awaited once")]
mod attack;
mod objects;
mod site;
mod work;

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::Args;
use opa_hub_loadtest::cluster::Cluster;
use opa_hub_loadtest::eventually::{equal, eventually, within};
use opa_hub_loadtest::lab::process::{Process, Usage};
use opa_hub_loadtest::lab::{Agent, ControlPlane, Delivery, Hub, Opa, http};
use reqwest::Client;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use self::attack::{ATTACKS, Attack, Counts};
use self::objects::{
    A, B, BUNDLES, HEAVY_PODS, POD, SEIZED, SETTINGS, clean, cluster_put, document, heavy_pod, policy_of_a,
    policy_of_b, settings, spec_of_a,
};
use self::site::{Site, get, in_time};
use self::work::{LATE_MAX, POLICIES, Tenant, read_stream_of_a, revision};
use super::{Common, at_least, command, megabytes};
use crate::results::{Goal, Measurement, Results};

/// Includes building an outdated hub.
const START_MAX: Duration = Duration::from_secs(600);

/// A runaway hub grows by 25 MB per sample.
const MEMORY_SAMPLE_INTERVAL: Duration = Duration::from_millis(25);
/// Protects the machine from a runaway hub.
const MEMORY_KILL_BYTES: u64 = 2 << 30;

const CALM: &str = "no attack";
const WHOLE: &str = "the whole run";

const WRITES: &str = "answer of the API server to B";
const SLOWDOWN: &str = "slowdown of B (p99, the worst kind of work)";
const DONE: &str = "edits and requests of B";
const UNSEEN: &str = "of these never seen";
const STEPS: &str = "steps of the attack";
const HITS: &str = "of these with a trace in the hub";
const CLOSED: &str = "requests and connections that the hub refused or closed";
const CPU: [&str; 3] = ["CPU of the hub", "CPU of its runs of OPA that ended", "CPU of the API server"];
const CONTROL: &str = "slowdown of B by the same writes, not selected by the hub";
const MEMORY: &str = "hub memory, highest";
const RESTARTS: &str = "times that the hub had to be started again";
const DIFFERENCES: &str = "differences from B's expected content at the end";
const SLOWDOWN_MAX: f64 = 2.0;
const MEMORY_MAX_MB: f64 = 600.0;

#[derive(Args)]
pub(crate) struct Options {
    /// Duration of a phase, in seconds: one without an attack, then one per attack
    #[arg(long, default_value_t = 20, value_parser = at_least::<2>)]
    seconds: usize,
    #[command(flatten)]
    common: Common,
}

#[derive(Default)]
struct Memory {
    /// Sampled maximum of the phase, in bytes.
    phase: Cell<u64>,
    /// Kernel's maximum over all hubs, in bytes.
    peak: Cell<u64>,
}

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

struct Phase {
    measured: Measurement,
    /// For each kind of B's work, in seconds.
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
        let (measured, failed) = Box::pin(run_once(Duration::from_secs(seconds as u64))).await?;
        results.push(measured, common.out.as_deref())?;
        failures.extend(failed);
    }
    results.finish(common.out.as_deref());
    ensure!(failures.is_empty(), "isolating tenant B from tenant A failed:\n{}", failures.join("\n"));
    Ok(())
}

async fn run_once(length: Duration) -> anyhow::Result<(Vec<Measurement>, Vec<String>)> {
    let mut lab = Lab::start().await?;
    let (mut all, mut failures, mut unseen) = (Vec::new(), Vec::new(), 0);
    let mut calm = [0.0; 4];
    let attacks = ATTACKS.into_iter().map(|(name, attack)| (name, Some(attack)));
    for (name, attack) in std::iter::once((CALM, None)).chain(attacks) {
        // Control: the same writes, not selected by the hub.
        let control = attack.is_some_and(Attack::writes).then_some(false);
        let (mut slowdowns, mut measured) = (Vec::new(), Measurement::new(name));
        for is_selected in control.into_iter().chain([true]) {
            let phase = Box::pin(lab.phase(name, attack, is_selected, length)).await.context(name)?;
            unseen += phase.unseen;
            failures.extend(phase.failures);
            let ratios = phase.p99.iter().zip(calm).map(|(now, calm)| now / calm);
            slowdowns.push(ratios.fold(0.0, f64::max));
            measured = phase.measured;
            if attack.is_none() {
                calm = phase.p99;
            }
        }
        if let Some(slowdown) = slowdowns.pop().filter(|_| attack.is_some()) {
            eprintln!("  {name}: slowdown {slowdown:.1}");
            measured.add(SLOWDOWN, "×", slowdown);
        }
        if let Some(control) = slowdowns.pop() {
            measured.add(CONTROL, "×", control);
        }
        all.push(measured);
    }
    let differences = lab.differences().await?;
    let mut whole = Measurement::new(WHOLE);
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
        let cluster = Cluster { client: plane.client().await? };
        let definition: Value =
            serde_saphyr::from_str(include_str!("../../../../deploy/kubernetes/bundles.yaml"))?;
        cluster.create("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", &definition).await?;
        for namespace in [A, B, SEIZED] {
            cluster.namespace(namespace).await?;
        }
        for index in 0..HEAVY_PODS {
            cluster.create(&format!("/api/v1/namespaces/{A}/pods"), &heavy_pod(index)).await?;
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
        let other_flags = ["--enable-policies=false", "--enable-data=false", "--log-level=error"];
        let flags: Vec<String> = std::iter::once(kubeconfig).chain(other_flags.map(Into::into)).collect();
        let dir = plane.dir.path();
        let refs: Vec<_> = flags.iter().map(String::as_str).collect();
        let hub = in_time("the start of the hub", START_MAX, Hub::start(dir, &refs)).await?;
        let opa = Opa::start(&plane.assets, dir, None, &[]).await?;
        let flags_of_agent = ["--bundle", B];
        let mut agent =
            Agent::start(dir, &Agent::address()?, &[&hub.url], &opa.url, Delivery::Rest, &flags_of_agent)?;
        in_time("the agent is ready", START_MAX, agent.wait_in_step()).await?;
        let http = http()?;
        let tenant = Tenant::start(&http, &hub.url, &opa.url);
        let mut reader_of_a = JoinSet::new();
        reader_of_a.spawn(read_stream_of_a(http.clone(), hub.url.clone()));
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
        lab.restore_calm().await?.map_err(anyhow::Error::msg).context("before any attack")?;
        Ok(lab)
    }

    fn site(&self, is_selected: bool) -> anyhow::Result<Site> {
        let process = self.hub.process.as_ref().context("the hub is stopped")?.id();
        Ok(Site {
            cluster: self.cluster.clone(),
            hub: self.hub.url.clone(),
            process,
            http: self.http.clone(),
            is_selected,
        })
    }

    /// Ends early if the hub ends.
    async fn phase(
        &mut self,
        name: &str,
        attack: Option<Attack>,
        is_selected: bool,
        length: Duration,
    ) -> anyhow::Result<Phase> {
        let (site, counts) = (self.site(is_selected)?, Arc::new(Counts::default()));
        let mut attacking = JoinSet::new();
        if let Some(attack) = attack {
            attacking.spawn(attack.run(site.clone(), Instant::now() + length, Arc::clone(&counts)));
        }
        self.memory.phase.set(0);
        let before = self.cpu();
        let (tenant, ended) = (&self.tenant, self.tenant.ended.load(Relaxed));
        let work = async {
            if let Ok(worked) = tokio::time::timeout(length + LATE_MAX, tenant.work(&site, length)).await {
                worked?;
            }
            while let Some(attacked) = attacking.join_next().await {
                attacked??;
            }
            anyhow::Ok(())
        };
        let process = self.hub.process.as_mut().context("the hub is stopped")?;
        let death = match guarded(process, &self.memory, work).await {
            Ok(done) => done.map(|()| None)?,
            Err(death) => Some(death),
        };
        attacking.abort_all();
        let after = self.cpu();

        let mut measured = Measurement::new(name);
        let (mut p99, mut done, mut seen) = ([0.0; 4], 0, 0);
        for ((kind, rate, tracker), p99) in self.tenant.kinds().into_iter().zip(&mut p99) {
            let (delays, seen_of_kind) = tracker.drain();
            measured.add_delays(kind, &delays);
            *p99 = delays.percentile(99.0);
            // Same as `at_rate`, even if the phase ended early.
            done += (rate * length.as_secs_f64()) as u64;
            seen += seen_of_kind;
        }
        measured.add_delays(WRITES, &self.tenant.writes.drain().0);
        // More curves would make the chart unreadable.
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
            if is_selected && hits == 0 && death.is_none() {
                failures.push("the attack left no trace in the hub, so nothing was measured".to_owned());
            }
        }
        if unseen > 0 {
            failures.push(format!("{unseen} of {done} edits and requests of B were never seen"));
        }
        // A restarted hub counts from zero.
        for (name, (before, after)) in CPU.into_iter().zip(before.into_iter().zip(after)) {
            measured.add(name, "s", after.saturating_sub(before).as_secs_f64());
        }
        failures.extend(self.recover(death).await?);
        measured.add(MEMORY, "MB", megabytes(self.memory.phase.get()));
        for failure in &mut failures {
            failure.insert_str(0, &format!("{name}: "));
            eprintln!("  {failure}");
        }
        Ok(Phase { measured, p99, unseen, failures })
    }

    /// In the order of [`CPU`]; zero for a process that ended.
    fn cpu(&self) -> [Duration; 3] {
        let hub = self.hub.process.as_ref().and_then(|process| process.usage().ok());
        let apiserver = self.plane.usage();
        let times = |usage: Option<Usage>| {
            usage.map_or((Duration::ZERO, Duration::ZERO), |usage| (usage.cpu, usage.children))
        };
        let ((hub, runs), (apiserver, _)) = (times(hub), times(apiserver));
        [hub, runs, apiserver]
    }

    /// Restarts a hub that ended or does not serve both tenants. Returns the reason.
    async fn recover(&mut self, death: Option<String>) -> anyhow::Result<Option<String>> {
        let reason = match death {
            Some(death) => Some(format!("the attack killed the hub: {death}")),
            None => self.restore_calm().await?.err(),
        };
        if reason.is_some() {
            self.restarts += 1;
            self.hub.kill();
            clean(&self.cluster).await?;
            self.hub.spawn()?;
            in_time("the hub is ready again", START_MAX, self.hub.wait_ready()).await?;
            self.restore_calm()
                .await?
                .map_err(anyhow::Error::msg)
                .context("after the hub was started again")?;
        }
        Ok(reason)
    }

    /// Waits until the hub serves an edit of each tenant. The inner error is the hub's.
    async fn restore_calm(&mut self) -> anyhow::Result<Result<(), String>> {
        let (site, tenant) = (self.site(true)?, &self.tenant);
        let calm = async {
            clean(&site.cluster).await?;
            tenant.wait_served(&site).await?;
            site.wait_a_served().await
        };
        let process = self.hub.process.as_mut().context("the hub is stopped")?;
        let calmed = guarded(process, &self.memory, calm).await;
        Ok(calmed.and_then(|calmed| calmed.map_err(|error| format!("{error:#}"))))
    }

    /// Compares B's OPA with the last writes, and B's revision with that of a fresh hub.
    async fn differences(&self) -> anyhow::Result<Vec<String>> {
        let mut differences = Vec::new();
        for (path, tracker) in [
            ("/shop/revision".to_owned(), &self.tenant.policies),
            (format!("/kubernetes/pods/{B}/{POD}/metadata/labels/round"), &self.tenant.pods),
            (format!("/{B}/{SETTINGS}/current/setting"), &self.tenant.edits),
        ] {
            let (url, expected) = (format!("{}/v1/data{path}", self.opa.url), tracker.due.len());
            let matching = within(LATE_MAX, format!("data{path} of B's OPA"), async || {
                equal(&revision(&self.http, &url).await, &Some(expected))
            });
            differences.extend(matching.await.err().map(|error| error.to_string()));
        }
        let dir = self.plane.dir.path().join("reference");
        std::fs::create_dir_all(&dir)?;
        let flags: Vec<_> = self.flags.iter().map(String::as_str).collect();
        let reference = in_time("the start of another hub", START_MAX, Hub::start(&dir, &flags)).await?;
        let [url, reference_url] = [&self.hub, &reference].map(|hub| format!("{}/v1/bundles/{B}", hub.url));
        let matching = within(LATE_MAX, "the revision of B at a hub that saw no attack", async || {
            let found = get(&self.http, &url).await.map_err(|error| error.to_string())?;
            let expected = get(&self.http, &reference_url).await.map_err(|error| error.to_string())?;
            let expected = expected["revision"].as_str().ok_or("the reference hub has no revision yet")?;
            equal(&found["revision"].as_str(), &Some(expected))
        });
        differences.extend(matching.await.err().map(|error| error.to_string()));
        Ok(differences)
    }
}

impl Memory {
    fn sample(&self, usage: Usage) {
        self.phase.set(self.phase.get().max(usage.rss));
        self.peak.set(self.peak.get().max(usage.peak));
    }
}

/// The error is the cause of the hub's end.
async fn guarded<T>(
    process: &mut Process,
    memory: &Memory,
    work: impl Future<Output = T>,
) -> Result<T, String> {
    let death = async {
        loop {
            if let Some(ended) = process.exit_error() {
                return format!("{ended:#}");
            }
            // No usage between the hub's end and the next sample.
            if let Ok(usage) = process.usage() {
                memory.sample(usage);
                if usage.rss > MEMORY_KILL_BYTES {
                    process.kill();
                    return format!("killed at {:.0} MB of memory", megabytes(usage.rss));
                }
            }
            tokio::time::sleep(MEMORY_SAMPLE_INTERVAL).await;
        }
    };
    tokio::select! {
        done = work => Ok(done),
        death = death => Err(death),
    }
}
