//! `churn`: pods change on a real API server. What that costs it, by who listens, and how long until an OPA decides by it.

use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use clap::Args;
use opa_hub_loadtest::cluster::Cluster;
use opa_hub_loadtest::eventually::{equal, eventually};
use opa_hub_loadtest::lab::ControlPlane;
use opa_hub_loadtest::pods::Nth;
use tokio::task::JoinSet;

use super::{Common, at_rate, cluster_of, command, megabytes, seconds, usage};
use crate::peer::{self, Peer, Scale};
use crate::probe::Probes;
use crate::results::{Goal, Measured, Results};
use crate::swarm::Schedule;

/// One change in so many is of the pod that OPAs are asked of.
const PROBED: u64 = 10;
const SETTLE: Duration = Duration::from_secs(5);

const CPU: &str = "API server CPU a change";
const WATCHES: &str = "watches of pods";
const DECISION: &str = "change to decision";
const MANY: &str = "opa-hub and many agents";

#[derive(Args)]
pub(crate) struct Options {
    /// Pods of 10 KB
    #[arg(long, default_value_t = 3000)]
    pods: usize,
    /// Real OPAs
    #[arg(long, default_value_t = 10)]
    opas: usize,
    /// Many agents beside those, and raw watches
    #[arg(long, default_value_t = 1000)]
    agents: usize,
    /// Changes a second
    #[arg(long, default_value_t = 30)]
    rate: usize,
    /// How long changes come
    #[arg(long, default_value_t = 30)]
    seconds: usize,
    /// Measure OPAs with this kube-mgmt beside each, too
    #[arg(long, value_name = "PROGRAM")]
    kube_mgmt: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let Options { pods, opas, agents, rate, seconds, kube_mgmt, common } = options;
    let scale = Scale { pods, opas, agents };
    let mut peers =
        vec![Peer::Nothing, Peer::HubAuto, Peer::Hub, Peer::HubAndMany, Peer::Watches, Peer::Bundles];
    match kube_mgmt {
        Some(program) => peers.push(Peer::Sidecars(program)),
        None => eprintln!("sidecars are left out: --kube-mgmt says where the program is"),
    }
    let mut runs = Vec::new();
    for run in 0..common.runs {
        eprintln!("run {} of {}: {pods} pods are made", run + 1, common.runs);
        let (plane, cluster) = cluster_of(pods).await?;
        peer::policy(&cluster).await?;
        if !plane.is_own() {
            eprintln!("watches are left out: raw ones are for the lab's API server");
            peers.retain(|peer| !matches!(peer, Peer::Watches));
        }
        let mut measured = Vec::new();
        for peer in &peers {
            measured.push(once(peer, &plane, &cluster, scale, (rate, seconds)).await?);
        }
        runs.push(measured);
        // Who comes later meets an API server that has more behind it.
        peers.rotate_left(1);
    }
    let settings = [
        ("pods", pods),
        ("opas", opas),
        ("agents", agents),
        ("rate", rate),
        ("seconds", seconds),
        ("runs", common.runs),
    ];
    let results = Results {
        scenario: "churn".into(),
        what: format!(
            "{pods} pods, {rate} changes a second; {opas} OPAs, and {agents} agents or watches more"
        ),
        command: command("churn", &settings),
        goals: vec![
            Goal::at_most(MANY, CPU, 1.03).times("nobody"),
            Goal::at_most(MANY, WATCHES, 1.0),
            Goal::at_most("opa-hub", &format!("{DECISION}, p99"), 30.0),
            Goal::at_most("opa-hub, fields auto", &format!("{DECISION}, p99"), 30.0),
        ],
        runs,
    };
    results.finish(common.out.as_deref())
}

async fn once(
    peer: &Peer,
    plane: &ControlPlane,
    cluster: &Cluster,
    scale: Scale,
    (rate, time): (usize, usize),
) -> anyhow::Result<Measured> {
    let due = Schedule::default();
    let idle = watches(cluster).await?;
    let mut running = peer.start(plane, scale, &due).await?;
    tokio::time::sleep(SETTLE).await;
    let mut measured = Measured::new(peer.name());
    let urls: Vec<_> = running.opas.iter().map(|opa| opa.url.clone()).collect();
    let hot = Nth(0);
    let path = format!("/kubernetes/pods/{}/{}/metadata/labels/round", hot.namespace(), hot.name());
    let probes = Probes::start(&urls, &path)?;
    let (server, received) = (plane.usage(), running.received());
    let hub = running.hub.as_ref().map(usage).transpose()?;
    let watching = watches(cluster).await?.saturating_sub(idle);
    let (mut probed, mut changing) = (0, JoinSet::new());
    let last = at_rate(&due, rate as f64, Duration::from_secs(time as u64), async |number| {
        // None waits for the one before: what is late is late for everybody.
        let at = Instant::now();
        let is_probe = number % PROBED == 0;
        let nth = if is_probe { hot } else { Nth(1 + number as usize % (scale.pods - 1)) };
        let cluster = cluster.clone();
        changing.spawn(async move {
            cluster.label_pod(&nth.namespace(), &nth.name(), &[("round", &number.to_string())]).await
        });
        if is_probe {
            probes.expect(number, at);
            probed = number;
        }
        Ok(())
    })
    .await?;
    while let Some(changed) = changing.join_next().await {
        changed??;
    }
    if let Some(swarm) = &mut running.swarm {
        swarm.reach(last, 0).await?;
        measured.add_delays("change to agent", &swarm.take_delays());
    }
    eventually("every OPA has the last change", async || equal(&probes.have(probed), &true)).await?;
    if let (Some(before), Some(after)) = (server, plane.usage()) {
        measured.add(CPU, "ms", seconds(before, after) / last as f64 * 1000.0);
        measured.add("API server memory", "MB", megabytes(after.rss));
    }
    measured.add(WATCHES, "", watching as f64);
    if let (Some(before), Some(after)) = (received, running.received()) {
        measured.add(
            "received by the watches a change",
            "KB",
            (after - before) as f64 / last as f64 / 1024.0,
        );
    }
    if let Some(given_up) = running.given_up() {
        measured.add("watches that the API server gave up", "", given_up as f64);
    }
    if !running.opas.is_empty() {
        measured.add_delays(DECISION, &probes.delays);
        measured.add("cold start of the OPAs", "s", running.cold.as_secs_f64());
    }
    if let Some((beside, opa)) = running.memory()? {
        measured.add("memory of an OPA", "MB", megabytes(opa));
        measured.add("memory beside an OPA", "MB", megabytes(beside));
    }
    if let (Some(before), Some(hub)) = (hub, &running.hub) {
        measured.add("hub CPU a change", "ms", seconds(before, usage(hub)?) / last as f64 * 1000.0);
        measured.add("hub memory", "MB", megabytes(usage(hub)?.rss));
    }
    if let Some(swarm) = &running.swarm {
        measured.add("streams that ended", "", swarm.counts().ended.load(Relaxed) as f64);
    }
    eprintln!("  {}: {last} changes", peer.name());
    Ok(measured)
}

async fn watches(cluster: &Cluster) -> anyhow::Result<u64> {
    cluster.metric("apiserver_longrunning_requests", &[("resource", "pods"), ("verb", "WATCH")]).await
}
