//! `restart`: time to a right decision after each component is killed and restarted.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use opa_hub_loadtest::cluster::Cluster;
use opa_hub_loadtest::eventually::{equal, eventually};
use opa_hub_loadtest::lab::{Agent, ControlPlane, Opa};
use opa_hub_loadtest::pods::Nth;
use serde_json::json;

use super::{Common, at_least, cluster_of, command};
use crate::baseline::{self, Baseline, Running, Scale};
use crate::probe;
use crate::results::{Goal, Measurement, Results};
use crate::swarm::Schedule;

const ALL: &str = "from the kill until every OPA has what changed meanwhile";
const SNAPSHOTS: &str = "OPAs that were loaded anew";

#[derive(Args)]
pub(crate) struct Options {
    /// Number of pods of 10 KB
    #[arg(long, default_value_t = 3000, value_parser = at_least::<1>)]
    pods: usize,
    /// Number of real OPAs, each with an agent
    #[arg(long, default_value_t = 5, value_parser = at_least::<1>)]
    opas: usize,
    #[command(flatten)]
    common: Common,
}

#[derive(Clone, Copy)]
enum Part {
    Hub,
    Agents,
    Opas,
    ApiServer,
}

pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let Options { pods, opas, common } = options;
    let mut results = Results::new(
        "restart",
        format!("{opas} OPAs with {pods} pods of 10 KB; kill -9 of each part, and its start"),
        command("restart", &[("pods", pods), ("opas", opas), ("runs", common.runs)]),
        vec![
            Goal::at_most("the hub", ALL, 5000.0),
            Goal::at_most("the hub", SNAPSHOTS, 0.0),
            Goal::at_most("the agents", SNAPSHOTS, 0.0),
            Goal::at_most("the API server", SNAPSHOTS, 0.0),
        ],
    );
    for run in 0..common.runs {
        eprintln!("run {} of {}", run + 1, common.runs);
        results.push(run_once(pods, opas).await?, common.out.as_deref())?;
    }
    results.finish(common.out.as_deref());
    Ok(())
}

async fn run_once(pods: usize, opas: usize) -> anyhow::Result<Vec<Measurement>> {
    let (mut plane, cluster) = cluster_of(pods).await?;
    baseline::policy(&cluster).await?;
    let mut running =
        Baseline::Hub.start(&plane, Scale { pods, opas, agents: 0 }, &Schedule::default()).await?;
    let parts = [
        ("the hub", Part::Hub),
        ("the agents", Part::Agents),
        ("the OPAs", Part::Opas),
        ("the API server", Part::ApiServer),
    ];
    let mut measured = Vec::new();
    for ((name, part), round) in parts.into_iter().zip(1_u64..) {
        if matches!(part, Part::ApiServer) && !plane.is_local() {
            continue;
        }
        let before = snapshots(&running).await?;
        let took = kill(part, round, &mut plane, &cluster, &mut running).await?;
        let mut row = Measurement::new(name);
        row.add(ALL, "ms", took.as_secs_f64() * 1000.0);
        for agent in &mut running.agents {
            agent.wait_in_step().await?;
        }
        let loaded = snapshots(&running).await?;
        // Restarted agents count from zero.
        let before = if matches!(part, Part::Agents) { 0 } else { before };
        row.add(SNAPSHOTS, "", loaded.saturating_sub(before) as f64);
        eprintln!("  {name}: {:.0} ms", took.as_secs_f64() * 1000.0);
        measured.push(row);
    }
    Ok(measured)
}

async fn kill(
    part: Part,
    round: u64,
    plane: &mut ControlPlane,
    cluster: &Cluster,
    running: &mut Running,
) -> anyhow::Result<Duration> {
    let nth = Nth(0);
    let label = async |round: u64| {
        cluster.label_pod(&nth.namespace(), &nth.name(), &[("round", &round.to_string())]).await
    };
    let started = Instant::now();
    match part {
        Part::Hub => running.hub.as_mut().context("the hub is missing")?.kill(),
        Part::Agents => running.agents.iter_mut().for_each(Agent::kill),
        Part::Opas => running.opas.iter_mut().for_each(|opa| opa.process = None),
        Part::ApiServer => plane.stop_apiserver(),
    }
    if !matches!(part, Part::ApiServer) {
        label(round).await?;
    }
    match part {
        Part::Hub => running.hub.as_mut().context("the hub is missing")?.spawn()?,
        Part::Agents => running.agents.iter_mut().try_for_each(Agent::spawn)?,
        Part::Opas => {
            futures::future::try_join_all(running.opas.iter_mut().map(Opa::restart)).await?;
        }
        Part::ApiServer => {
            plane.start_apiserver().await?;
            label(round).await?;
        }
    }
    let input = probe::input(nth);
    for opa in &running.opas {
        eventually("OPA decides by the change", async || {
            let found = opa.decide(probe::DECISION, &input).await.map_err(|error| error.to_string())?;
            equal(&found, &json!(round.to_string()))
        })
        .await?;
    }
    Ok(started.elapsed())
}

async fn snapshots(running: &Running) -> anyhow::Result<u64> {
    let mut all = 0;
    for agent in &running.agents {
        all += agent.status().await?["done"]["snapshots"]
            .as_u64()
            .context("reading the agent's status failed: no snapshots")?;
    }
    Ok(all)
}
