//! `start`: cold starts of OPAs, simultaneous joins, and snapshots after a change.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use futures::future::try_join_all;
use opa_hub_loadtest::eventually::{equal, eventually};
use opa_hub_loadtest::lab::http;

use super::{
    Common, KERNEL, at_least, cluster_of, command, hub_over, kernel_growth, megabytes, seconds, usage,
};
use crate::baseline::{self, Baseline, Scale};
use crate::fake_apiserver::FakeApiServer;
use crate::results::{Goal, Measurement, Results};
use crate::swarm::Schedule;

const CHANGES: u64 = 20;
const COLD: &str = "until every OPA has every pod";
const ENCODES: &str = "snapshots encoded for all that join";
const SNAPSHOT: &str = "hub CPU of one change and a snapshot of it";

#[derive(Args)]
pub(crate) struct Options {
    /// Number of pods of 10 KB on the API server
    #[arg(long, default_value_t = 3000, value_parser = at_least::<1>)]
    pods: usize,
    /// Number of real OPAs
    #[arg(long, default_value_t = 10, value_parser = at_least::<1>)]
    opas: usize,
    /// Number of agents that request a snapshot at once
    #[arg(long, default_value_t = 1000, value_parser = at_least::<1>)]
    joins: usize,
    /// Number of pods of 300 bytes in the changing snapshot
    #[arg(long, default_value_t = 30_000, value_parser = at_least::<1>)]
    small_pods: usize,
    /// Also measure OPAs with this kube-mgmt as sidecar
    #[arg(long, value_name = "PROGRAM")]
    kube_mgmt: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let Options { pods, opas, joins, small_pods, kube_mgmt, common } = options;
    let mut baselines = vec![Baseline::Hub, Baseline::HubAuto, Baseline::Bundles];
    baselines.extend(baseline::sidecars(kube_mgmt));
    let settings =
        [("pods", pods), ("opas", opas), ("joins", joins), ("small-pods", small_pods), ("runs", common.runs)];
    let mut results = Results::new(
        "start",
        format!(
            "{opas} OPAs with {pods} pods of 10 KB from cold; {joins} joins with {small_pods} pods of 300 bytes"
        ),
        command("start", &settings),
        vec![
            Goal::at_most("opa-hub", COLD, 3.0),
            Goal::at_most("opa-hub, fields auto", COLD, 3.0),
            Goal::at_most("opa-hub", ENCODES, 1.0),
            Goal::at_most("opa-hub", SNAPSHOT, 20.0),
        ],
    );
    for run in 0..common.runs {
        eprintln!("run {} of {}", run + 1, common.runs);
        let (plane, cluster) = cluster_of(pods).await?;
        baseline::policy(&cluster).await?;
        let mut measured = Vec::new();
        for baseline in &baselines {
            let running =
                baseline.start(&plane, Scale { pods, opas, agents: 0 }, &Schedule::default()).await?;
            let mut row = Measurement::new(baseline.name());
            row.add(COLD, "s", running.cold.as_secs_f64());
            for (name, cpu) in running.cpu()? {
                row.add(&format!("CPU of {name} by then"), "s", cpu);
            }
            eprintln!("  {}: {:.1} s", baseline.name(), running.cold.as_secs_f64());
            measured.push(row);
        }
        drop(plane);
        join(&mut measured[0], joins, small_pods).await?;
        results.push(measured, common.out.as_deref())?;
    }
    results.finish(common.out.as_deref());
    Ok(())
}

async fn join(measured: &mut Measurement, joins: usize, pods: usize) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let apiserver = FakeApiServer::start(dir.path(), pods).await?;
    let hub = hub_over(&apiserver, dir.path()).await?;
    let (http, url) = (http()?, format!("{}/bundles/main/data", hub.url));
    let get = async || anyhow::Ok(http.get(&url).send().await?.error_for_status()?.bytes().await?.len());
    let (started, alone) = (Instant::now(), usage(&hub)?);
    let lengths = try_join_all((0..joins).map(|_| get())).await?;
    measured.add("all that join have downloaded their snapshot", "s", started.elapsed().as_secs_f64());
    let joined = usage(&hub)?;
    measured.add("hub memory before they join", "MB", megabytes(alone.rss));
    measured.add("hub memory, highest until they have joined", "MB", megabytes(joined.peak));
    measured.add(KERNEL, "MB", kernel_growth(alone, joined) / f64::from(1 << 20));
    measured.add(ENCODES, "", hub.metric("opa_hub_snapshot_encodes_total").await? as f64);
    measured.add("snapshot", "KB", lengths[0] as f64 / 1024.0);
    let mut cpu = 0.0;
    for number in 1..=CHANGES {
        let editions = hub.metric("opa_hub_view_changes_total").await?;
        let before = hub.metric("opa_hub_snapshot_encodes_total").await?;
        let used = usage(&hub)?;
        apiserver.change(pods / 2, number);
        eventually("the hub has the change", async || {
            let now = hub.metric("opa_hub_view_changes_total").await.map_err(|error| error.to_string())?;
            equal(&(now > editions), &true)
        })
        .await?;
        // Archives are throttled to about one per second.
        eventually("a new snapshot", async || {
            get().await.map_err(|error| error.to_string())?;
            let now =
                hub.metric("opa_hub_snapshot_encodes_total").await.map_err(|error| error.to_string())?;
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            equal(&now, &(before + 1))
        })
        .await?;
        cpu += seconds(used, usage(&hub)?);
    }
    measured.add(SNAPSHOT, "ms", cpu / CHANGES as f64 * 1000.0);
    Ok(())
}
