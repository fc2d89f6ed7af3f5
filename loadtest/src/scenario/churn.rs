//! `churn`: API server load and time to decision while pods change, for each baseline.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use opa_hub_loadtest::cluster::{Cluster, has_code};
use opa_hub_loadtest::eventually::{PATIENCE, equal, eventually};
use opa_hub_loadtest::lab::ControlPlane;
use opa_hub_loadtest::pods::Nth;
use tokio::sync::mpsc::unbounded_channel;
use tokio::task::JoinSet;

use super::{Common, MISMATCHES, at_least, at_rate, cluster_of, command, megabytes, seconds, usage};
use crate::baseline::{self, Baseline, Scale};
use crate::histogram::Histogram;
use crate::probe::{self, Probes};
use crate::results::{Goal, Measurement, Results};
use crate::swarm::{Schedule, WHOLE};

/// One in so many changes is of the probed pod.
const CYCLE: u64 = 10;
const SETTLE: Duration = Duration::from_secs(5);

static PHASE: AtomicU64 = AtomicU64::new(0);

const EVENTS: &str = "events";
const CPU: &str = "API server CPU a change";
const HUB_CPU: &str = "hub CPU a change";
const WATCHES: &str = "watches on the API server";
const EVENT: &str = "change to event of a watch";
const DECISION: &str = "change to decision";
const MANY: &str = "opa-hub and many agents";
const AUTO_AND_MANY: &str = "opa-hub, fields auto, and many agents";

#[derive(Args)]
pub(crate) struct Options {
    /// Number of pods of 10 KB
    #[arg(long, default_value_t = 3000, value_parser = at_least::<2>)]
    pods: usize,
    /// Number of real OPAs
    #[arg(long, default_value_t = 10, value_parser = at_least::<1>)]
    opas: usize,
    /// Number of additional simulated agents, or of raw watches
    #[arg(long, default_value_t = 1000, value_parser = at_least::<1>)]
    agents: usize,
    /// Changes per second
    #[arg(long, default_value_t = 30, value_parser = at_least::<1>)]
    rate: usize,
    /// Duration of the changes, in seconds
    #[arg(long, default_value_t = 30, value_parser = at_least::<1>)]
    seconds: usize,
    /// Also measure OPAs with this kube-mgmt as sidecar
    #[arg(long, value_name = "PROGRAM")]
    kube_mgmt: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let Options { pods, opas, agents, rate, seconds, kube_mgmt, common } = options;
    let scale = Scale { pods, opas, agents };
    let mut baselines = vec![
        Baseline::Nothing,
        Baseline::HubAutoAndMany,
        Baseline::HubAndMany,
        Baseline::HubAuto,
        Baseline::Hub,
        Baseline::Watches,
        Baseline::Bundles,
        Baseline::HubShared,
    ];
    baselines.extend(baseline::sidecars(kube_mgmt));
    let settings = [
        ("pods", pods),
        ("opas", opas),
        ("agents", agents),
        ("rate", rate),
        ("seconds", seconds),
        ("runs", common.runs),
    ];
    let mut results = Results::new(
        "churn",
        format!(
            "{pods} pods of 10 KB, {rate} changes a second; {opas} OPAs, and {agents} agents or watches more"
        ),
        command("churn", &settings),
        vec![
            Goal::at_most(AUTO_AND_MANY, CPU, 1.03).times("nobody"),
            Goal::at_most(MANY, CPU, 1.03).times("nobody"),
            Goal::at_most(MANY, WATCHES, 3.0),
            Goal::at_most(AUTO_AND_MANY, HUB_CPU, 3.0),
            Goal::at_most(MANY, HUB_CPU, 3.0),
            Goal::at_most(AUTO_AND_MANY, &format!("{DECISION}, p99"), 60.0),
            Goal::at_most(MANY, &format!("{DECISION}, p99"), 60.0),
            Goal::at_most("opa-hub", &format!("{DECISION}, p99"), 30.0),
            Goal::at_most("opa-hub, fields auto", &format!("{DECISION}, p99"), 30.0),
            Goal::at_most(MANY, MISMATCHES, 0.0),
        ],
    );
    let mut order = baselines.clone();
    for run in 0..common.runs {
        eprintln!("run {} of {}", run + 1, common.runs);
        let (plane, cluster) = cluster_of(pods).await?;
        baseline::policy(&cluster).await?;
        if !plane.is_local() {
            eprintln!("watches are skipped; they need the lab's API server");
            order.retain(|baseline| !matches!(baseline, Baseline::Watches));
        }
        let mut measured = Vec::new();
        for baseline in &order {
            match run_once(baseline, &plane, &cluster, scale, (rate, seconds)).await {
                Ok(figures) => measured.push(figures),
                Err(error) if !baseline.must_succeed() => {
                    eprintln!("  {} failed: {error:#}", baseline.name());
                }
                Err(error) => return Err(error),
            }
        }
        measured.sort_by_key(|row| baselines.iter().position(|baseline| baseline.name() == row.subject));
        results.push(measured, common.out.as_deref())?;
        // Later baselines meet an API server with a longer history.
        order.rotate_left(2);
    }
    results.finish(common.out.as_deref());
    Ok(())
}

async fn run_once(
    baseline: &Baseline,
    plane: &ControlPlane,
    cluster: &Cluster,
    scale: Scale,
    (rate, time): (usize, usize),
) -> anyhow::Result<Measurement> {
    let due = Schedule::sampling(CYCLE);
    let idle = idle_watches(cluster).await?;
    // Otherwise a late OPA returns the previous baseline's number.
    label(cluster, Nth(0), "0").await?;
    let phase = PHASE.fetch_add(1, Relaxed);
    let mut running = baseline.start(plane, scale, &due).await?;
    tokio::time::sleep(SETTLE).await;
    let mut measured = Measurement::new(baseline.name());
    let urls: Vec<_> = running.opas.iter().map(|opa| opa.url.clone()).collect();
    let probes = Arc::new(Probes::start(&urls, Nth(0))?);
    let watching = watches(cluster).await?.saturating_sub(idle);
    let hub = running.hub.as_ref().map(usage).transpose()?;
    let received = running.received();
    let delays = Arc::new(Histogram::new());
    let (event_due, event_delays) = (due.clone(), Arc::clone(&delays));
    let events = cluster.count_pod_events(move |pod| {
        let is_hot = pod.name == Some(Nth(0).name());
        let round = pod.labels.iter().flatten().find(|(key, _)| is_hot && *key == "round");
        if let Some(due) = round.and_then(|(_, number)| event_due.due_at(number.parse().ok()?)) {
            event_delays.record(due.elapsed());
        }
    });
    let events = events.await?;
    let server = plane.reported_usage().await?;
    let (mut probed, mut changing) = (0, JoinSet::new());
    // Sequential: a busy API server could reorder concurrent changes.
    let (hot, mut numbers) = unbounded_channel::<u64>();
    let (hot_cluster, hot_due, hot_probes) = (cluster.clone(), due.clone(), Arc::clone(&probes));
    changing.spawn(async move {
        while let Some(number) = numbers.recv().await {
            label(&hot_cluster, Nth(0), &number.to_string()).await?;
            // Not earlier: queries load the API server.
            let due = hot_due.due_at(number).context("measuring failed: a change has no due time")?;
            hot_probes.expect(number, due);
        }
        Ok(())
    });
    let last = at_rate(&due, rate as f64, Duration::from_secs(time as u64), async |number, _| {
        if number % CYCLE == 0 {
            hot.send(number)?;
            probed = number;
        } else {
            // Concurrent: a late change must not delay the next.
            changing.spawn(change(cluster.clone(), scale.pods, phase, number));
        }
        Ok(())
    })
    .await?;
    drop(hot);
    while let Some(changed) = changing.join_next().await {
        changed??;
    }
    let server_after = plane.reported_usage().await?;
    // No-op updates would cost nothing.
    eventually("the API server has sent all changes", async || equal(&events.count(), &last)).await?;
    measured.add(EVENTS, "", events.count() as f64);
    measured.add_delays(EVENT, &delays);
    if let Some(swarm) = &mut running.swarm {
        swarm.reach(last - last % CYCLE, 0).await?;
    }
    if let (Some(before), Some(hub)) = (hub, &running.hub) {
        measured.add(HUB_CPU, "ms", seconds(before, usage(hub)?) / last as f64 * 1000.0);
        measured.add("hub memory", "MB", megabytes(usage(hub)?.rss));
        measured.add("frames encoded", "", hub.metric("opa_hub_frame_encodes_total").await? as f64);
        measured.add("snapshots encoded", "", hub.metric("opa_hub_snapshot_encodes_total").await? as f64);
    }
    if let Some(swarm) = &mut running.swarm {
        let fields = if matches!(baseline, Baseline::HubAutoAndMany) { probe::READS } else { WHOLE };
        let mismatches = swarm.settled_mismatches(&cluster.pods(&[]).await?, fields).await;
        measured.add(MISMATCHES, "", mismatches as f64);
        measured.add_delays("change to agent", &swarm.take_delays());
    }
    if probed > 0 {
        eventually("every OPA has the last change", async || equal(&probes.all_have(probed), &true)).await?;
    }
    if let (Some(before), Some(after)) = (server, server_after) {
        measured.add(CPU, "ms", seconds(before, after) / last as f64 * 1000.0);
        measured.add("API server memory", "MB", megabytes(after.rss));
        // An external API server may have several instances.
        measured.add(WATCHES, "", watching as f64);
    }
    if let (Some(before), Some(after)) = (received, running.received()) {
        let kilobytes = (after - before) as f64 / last as f64 / 1024.0;
        measured.add("received by the watches a change", "KB", kilobytes);
    }
    if let Some(dropped) = running.dropped_watches() {
        measured.add("watches that the API server gave up", "", dropped as f64);
    }
    if !running.opas.is_empty() {
        measured.add_delays(DECISION, &probes.delays);
        measured.add("cold start of the OPAs", "s", running.cold.as_secs_f64());
    }
    if let Some((sidecar, opa)) = running.memory()? {
        measured.add("memory of an OPA", "MB", megabytes(opa));
        measured.add("memory beside an OPA", "MB", megabytes(sidecar));
    }
    if let Some(swarm) = &running.swarm {
        let counts = swarm.counts();
        measured.add("streams that ended", "", counts.ended.load(Relaxed) as f64);
        let deliveries = last as f64 * scale.agents as f64;
        measured.add("bytes an agent and change", "B", counts.bytes.load(Relaxed) as f64 / deliveries);
    }
    eprintln!("  {}: {last} changes", baseline.name());
    Ok(measured)
}

async fn change(cluster: Cluster, pods: usize, phase: u64, number: u64) -> anyhow::Result<()> {
    let extra = Nth(pods + (number / CYCLE) as usize);
    match number % CYCLE {
        3 => {
            let mut pod = extra.posted();
            pod["metadata"]["labels"]["round"] = number.to_string().into();
            cluster.namespace(&extra.namespace()).await?;
            match cluster.create_pod(&extra.namespace(), &pod).await {
                // Left by a failed baseline.
                Err(error) if has_code(&error, 409) => Ok(()),
                created => created,
            }
        }
        8 => remove(&cluster, extra).await,
        // Differs in each phase, and is no change number.
        _ => label(&cluster, Nth(1 + number as usize % (pods - 1)), &format!("{phase}-{number}")).await,
    }
}

async fn label(cluster: &Cluster, nth: Nth, round: &str) -> anyhow::Result<()> {
    cluster.label_pod(&nth.namespace(), &nth.name(), &[("round", round)]).await
}

/// Retries: the pod may not exist yet.
async fn remove(cluster: &Cluster, nth: Nth) -> anyhow::Result<()> {
    let until = Instant::now() + PATIENCE;
    loop {
        match cluster.delete_pod(&nth.namespace(), &nth.name()).await {
            Err(_) if Instant::now() < until => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            removed => return removed,
        }
    }
}

async fn watches(cluster: &Cluster) -> anyhow::Result<u64> {
    cluster.metric("apiserver_longrunning_requests", &[("verb", "WATCH")]).await
}

/// Open watches, once those of earlier baselines have ended.
async fn idle_watches(cluster: &Cluster) -> anyhow::Result<u64> {
    let mut last = watches(cluster).await?;
    loop {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let now = watches(cluster).await?;
        if now >= last {
            return Ok(now);
        }
        last = now;
    }
}
