//! `failover`: a hub dies. How long until every agent has what changed then, by another replica, and by the same hub started
//! again with empty memory.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use clap::Args;
use opa_hub_loadtest::cluster::Cluster;
use opa_hub_loadtest::lab::{ControlPlane, Hub};

use super::{Common, address, command};
use crate::results::{Goal, Measured, Results};
use crate::swarm::{Protocol, Schedule, Start, Swarm};

const NAMESPACE: &str = "load";
const POD: &str = "hot";
const SETTLE: Duration = Duration::from_secs(3);
const ALL: &str = "until every agent has a change made at that moment";
const SNAPSHOTS: &str = "snapshots served";
const RECONCILES: &str = "reconciles";
const OTHER: &str = "another replica";
const SAME: &str = "the same hub, restarted";

#[derive(Args)]
pub(crate) struct Options {
    #[arg(long, default_value_t = 10_000)]
    agents: usize,
    #[command(flatten)]
    common: Common,
}

pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let Options { agents, common } = options;
    let mut runs = Vec::new();
    for run in 0..common.runs {
        eprintln!("run {} of {}", run + 1, common.runs);
        runs.push(once(agents).await?);
    }
    let results = Results {
        scenario: "failover".into(),
        what: format!("{agents} agents, kill -9 of their hub, on a real API server"),
        command: command("failover", &[("agents", agents), ("runs", common.runs)]),
        goals: vec![
            Goal::at_most(OTHER, ALL, 2000.0),
            Goal::at_most(OTHER, SNAPSHOTS, 0.0),
            Goal::at_most(SAME, ALL, 5000.0),
            Goal::at_most(SAME, SNAPSHOTS, 0.0),
        ],
        runs,
    };
    results.finish(common.out.as_deref())
}

async fn once(agents: usize) -> anyhow::Result<Vec<Measured>> {
    let plane = ControlPlane::start().await?;
    let cluster = Cluster { client: plane.client().await? };
    cluster.namespace(NAMESPACE).await?;
    cluster.pod(NAMESPACE, POD, &[("round", "0")]).await?;
    let kubeconfig = plane.kubeconfig.display().to_string();
    let flags = ["--kubeconfig", &kubeconfig, "--replicate=v1/pods", "--log-level=error"];
    let dir = plane.dir.path();
    let mut hubs = [Hub::start(dir, &flags).await?, Hub::start(dir, &flags).await?];
    let mut measured = Vec::new();
    for (who, dies, stays) in [(OTHER, 0, 1), (SAME, 0, 0)] {
        if hubs[dies].process.is_none() {
            hubs[dies].spawn()?;
            hubs[dies].wait_ready().await?;
        }
        let start = Arc::new(Start::of(&hubs[dies].url).await?);
        let due = Schedule::default();
        let mut addresses = vec![address(&hubs[dies])?];
        addresses.extend((dies != stays).then(|| address(&hubs[stays])).transpose()?);
        let mut swarm = Swarm::open(Protocol::Hub(start), addresses, due.clone(), agents, &[]).await?;
        tokio::time::sleep(SETTLE).await;
        let change =
            async |number: u64| cluster.label_pod(NAMESPACE, POD, &[("round", &number.to_string())]).await;
        // One before, so that a log leads on where there is one.
        let number = due.push(Instant::now());
        change(number).await?;
        swarm.reach(number, 0).await?;
        swarm.take_delays();
        let before = served(&hubs[stays]).await?;

        let number = due.push(Instant::now());
        hubs[dies].kill();
        if dies == stays {
            hubs[dies].spawn()?;
        }
        change(number).await?;
        swarm.reach(number, 0).await?;
        let delays = swarm.take_delays();
        let mut of = Measured::new(who);
        of.add(ALL, "ms", delays.percentile(100.0) * 1000.0);
        of.add_delays("at an agent", &delays);
        let before = if dies == stays { 0 } else { before };
        of.add(SNAPSHOTS, "", served(&hubs[stays]).await?.saturating_sub(before) as f64);
        of.add(RECONCILES, "", swarm.counts().reconciles.load(Relaxed) as f64);
        of.add(
            "answers encoded for them",
            "",
            hubs[stays].metric("opa_hub_reconcile_encodes_total").await? as f64,
        );
        of.add("requests refused meanwhile", "", swarm.counts().refused.load(Relaxed) as f64);
        eprintln!("  {who}: {:.0} ms", delays.percentile(100.0) * 1000.0);
        measured.push(of);
    }
    Ok(measured)
}

/// Archives that a hub gave whole.
async fn served(hub: &Hub) -> anyhow::Result<u64> {
    hub.metric("opa_hub_snapshots_served_total").await
}
