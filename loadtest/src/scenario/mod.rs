//! Scenarios, one per file.

pub(crate) mod catchup;
pub(crate) mod churn;
pub(crate) mod failover;
pub(crate) mod fanout;
pub(crate) mod restart;
pub(crate) mod slow;
pub(crate) mod soak;
pub(crate) mod start;
pub(crate) mod tenant;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use opa_hub_loadtest::cluster::Cluster;
use opa_hub_loadtest::lab::process::Usage;
use opa_hub_loadtest::lab::{ControlPlane, Hub};
use opa_hub_loadtest::pods::{self, Nth};
use tempfile::TempDir;

use crate::baseline::POLICY_LABEL;
use crate::fake_apiserver::FakeApiServer;
use crate::memory;
use crate::swarm::{Pace, Schedule, Start, Swarm};

#[derive(Args)]
pub(crate) struct Common {
    /// Number of runs; tables show medians
    #[arg(long, default_value_t = 1, value_parser = at_least::<1>)]
    pub(crate) runs: usize,
    /// Write results, table and chart to this folder
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
}

/// Both ends cannot be separated.
pub(crate) const KERNEL: &str = "kernel memory of the connections, both ends";

/// Column for [`Swarm::mismatches`].
pub(crate) const MISMATCHES: &str = "witnesses that hold something else in the end";

/// Larger numbers are typing errors.
const COUNT_MAX: usize = 1_000_000;

pub(crate) fn at_least<const LEAST: usize>(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| (LEAST..=COUNT_MAX).contains(number));
    number.ok_or_else(|| format!("expected a number from {LEAST} to {COUNT_MAX}"))
}

pub(crate) fn command(name: &str, options: &[(&str, usize)]) -> String {
    let options = options.iter().map(|(name, value)| format!(" --{name} {value}"));
    let external = if pods::external_prefix().is_some() { " --kubeconfig FILE --create-pods" } else { "" };
    format!("opa-hub-loadtest {name}{}{external}", options.collect::<String>())
}

pub(crate) fn kernel_growth(from: Usage, to: Usage) -> f64 {
    to.kernel as f64 - from.kernel as f64
}

pub(crate) async fn cluster_of(pods: usize) -> anyhow::Result<(ControlPlane, Cluster)> {
    ControlPlane::reset_external_cluster().await?;
    let plane = ControlPlane::start().await?;
    let cluster = Cluster { client: plane.client().await? };
    eprintln!("  creating {pods} pods in namespaces from {}", Nth(0).namespace());
    memory::fill(&cluster, pods).await?;
    Ok((plane, cluster))
}

/// The hub selects the run's policies only.
pub(crate) fn hub_flags(plane: &ControlPlane, policies: &str) -> Vec<String> {
    let namespace = Nth(0).namespace();
    let state = plane.dir.path().display();
    vec![
        format!("--kubeconfig={}", plane.kubeconfig.display()),
        "--replicate=v1/pods".into(),
        "--log-level=error".into(),
        format!("--namespaces={namespace}"),
        format!("--namespace={namespace}"),
        format!("--policy-label={POLICY_LABEL}"),
        format!("--policy-value={policies}"),
        "--data-label=opahub.dev/load-data".into(),
        "--write-verdicts=false".into(),
        format!("--state-dir={state}"),
    ]
}

pub(crate) struct SwarmSetup {
    pub(crate) apiserver: FakeApiServer,
    pub(crate) hub: Hub,
    pub(crate) due: Schedule,
    pub(crate) swarm: Swarm,
    /// Usage before agents connect.
    pub(crate) before: Usage,
    _dir: TempDir,
}

impl SwarmSetup {
    /// Returns once every stream is open.
    pub(crate) async fn start(pods: usize, agents: usize, paces: &[(Pace, usize)]) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let apiserver = FakeApiServer::start(dir.path(), pods).await?;
        let hub = hub_over(&apiserver, dir.path()).await?;
        let (before, due) = (usage(&hub)?, Schedule::default());
        let start = Arc::new(Start::fetch(&hub.url).await?);
        let swarm = Swarm::open(start, vec![address(&hub)?], due.clone(), agents, paces).await?;
        Ok(Self { apiserver, hub, due, swarm, before, _dir: dir })
    }
}

pub(crate) async fn hub_over(apiserver: &FakeApiServer, dir: &Path) -> anyhow::Result<Hub> {
    let kubeconfig = apiserver.kubeconfig.display().to_string();
    Hub::start(dir, &["--kubeconfig", &kubeconfig, "--replicate=v1/pods", "--log-level=error"]).await
}

pub(crate) fn address(hub: &Hub) -> anyhow::Result<SocketAddr> {
    Ok(hub.url.trim_start_matches("http://").parse()?)
}

pub(crate) fn usage(hub: &Hub) -> anyhow::Result<Usage> {
    hub.process.as_ref().context("the hub is stopped")?.usage()
}

/// Changes are due at fixed times, regardless of earlier latency. Returns the last number.
pub(crate) async fn at_rate(
    due: &Schedule,
    rate: f64,
    time: Duration,
    mut change: impl AsyncFnMut(u64, Instant) -> anyhow::Result<()>,
) -> anyhow::Result<u64> {
    let started = Instant::now();
    let count = (rate * time.as_secs_f64()) as u32;
    let mut last = due.len();
    for step in 0..count {
        let due_at = started + Duration::from_secs_f64(f64::from(step) / rate);
        tokio::time::sleep_until(due_at.into()).await;
        last = due.push(due_at);
        change(last, due_at).await?;
    }
    Ok(last)
}

pub(crate) fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

pub(crate) fn seconds(from: Usage, to: Usage) -> f64 {
    to.cpu.saturating_sub(from.cpu).as_secs_f64()
}
