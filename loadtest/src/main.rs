//! Command line of the lab.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "counts and percentiles of a load run are far from either bound"
)]

mod baseline;
mod chart;
mod demo;
mod fake_apiserver;
mod histogram;
mod memory;
mod probe;
mod results;
mod scenario;
mod swarm;

use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use opa_hub_loadtest::lab::{ControlPlane, assets};

use self::scenario::{catchup, churn, failover, fanout, restart, slow, soak, start, tenant};

/// The lab of opa-hub: etcd, kube-apiserver, kubectl and OPA on loopback, built once from their Go modules
#[derive(Parser)]
#[command(version, name = "opa-hub-loadtest")]
struct Cli {
    /// Use this cluster instead of the lab's; needs --create-pods. API server usage is read from its metrics
    #[arg(long, global = true, value_name = "FILE")]
    kubeconfig: Option<std::path::PathBuf>,
    /// Create pods in the cluster of --kubeconfig, in namespaces that are removed at the end. They are never
    /// scheduled, but every watch of all pods receives them, including production OPAs
    #[arg(long, global = true)]
    create_pods: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Find or build the components; print their folder on the last line of stdout
    Assets,
    /// Run a control plane until Ctrl-C; print its kubeconfig
    Lab,
    /// Measure memory with whole objects and with the fields that policies read
    Memory(memory::Options),
    /// Measure delivery to many agents: single changes, then maximum throughput
    Fanout(fanout::Options),
    /// Measure API server load and time to decision while pods change
    Churn(churn::Options),
    /// Measure cold starts of OPAs, simultaneous joins, and snapshots after a change
    Start(start::Options),
    /// Kill and restart the hub, the agents, the OPAs and the API server
    Restart(restart::Options),
    /// Kill the hub of many agents: fail over to a replica, or restart the hub
    Failover(failover::Options),
    /// Measure the cost of slow and stalled agents
    Slow(slow::Options),
    /// Measure an agent that resumes thousands of changes behind
    Catchup(catchup::Options),
    /// Apply changes at a constant rate for minutes
    Soak(soak::Options),
    /// Serve two tenants, one of which attacks the hub
    Tenant(tenant::Options),
    /// Regenerate tables and charts from stored results; fail if a goal is missed
    Report {
        /// Folder of stored results
        dir: std::path::PathBuf,
    },
    /// Serve the socket writer that `fanout` compares with
    #[command(hide = true)]
    Raw {
        #[arg(long)]
        listen: std::net::SocketAddr,
        #[arg(long)]
        bytes: usize,
    },
    /// Walk through all features with one OPA and one agent
    Demo,
}

#[tokio::main]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("opa-hub-loadtest: {error:#}");
            // Returning would wait for the thread that builds components.
            std::process::exit(1)
        }
    }
}

async fn run() -> anyhow::Result<()> {
    rlimit::increase_nofile_limit(u64::MAX).context("raising the limit of open files failed")?;
    let Cli { kubeconfig, create_pods, command } = Cli::parse();
    if let Command::Raw { listen, bytes } = command {
        return baseline::raw::serve(listen, bytes);
    }
    if let Some(kubeconfig) = &kubeconfig {
        let uses_it = matches!(
            command,
            Command::Churn(_) | Command::Start(_) | Command::Restart(_) | Command::Failover(_)
        );
        anyhow::ensure!(
            uses_it,
            "--kubeconfig is rejected: only churn, start, restart and failover use an external cluster"
        );
        anyhow::ensure!(
            create_pods,
            "--kubeconfig is rejected: every watch of pods would receive thousands; pass --create-pods to confirm"
        );
        ControlPlane::use_cluster(kubeconfig).await?;
    }
    let is_lab = matches!(command, Command::Lab);
    let ended = tokio::select! {
        ended = perform(command) => ended,
        stopped = signal() => stopped.and_then(|()| if is_lab { Ok(()) } else { Err(anyhow::anyhow!("stopped")) }),
    };
    let removed = ControlPlane::reset_external_cluster().await;
    if ended.is_err()
        && let Err(error) = &removed
    {
        eprintln!("opa-hub-loadtest: {error:#}");
    }
    ended.and(removed)
}

async fn perform(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Assets => {
            println!("{}", tokio::task::spawn_blocking(assets::folder).await??.display());
            Ok(())
        }
        Command::Lab => lab().await,
        Command::Memory(options) => memory::run(options).await,
        Command::Fanout(options) => fanout::run(options).await,
        Command::Churn(options) => churn::run(options).await,
        Command::Start(options) => start::run(options).await,
        Command::Restart(options) => restart::run(options).await,
        Command::Failover(options) => failover::run(options).await,
        Command::Slow(options) => slow::run(options).await,
        Command::Catchup(options) => catchup::run(options).await,
        Command::Soak(options) => soak::run(options).await,
        Command::Tenant(options) => tenant::run(options).await,
        Command::Report { dir } => report(&dir),
        Command::Raw { .. } => unreachable!("run() handles this command"),
        Command::Demo => demo::run().await,
    }
}

async fn signal() -> anyhow::Result<()> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let mut hangup = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup())?;
    tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = hangup.recv() => Ok(()),
        ended = tokio::signal::ctrl_c() => ended.context("waiting for Ctrl-C failed"),
    }
}

fn report(dir: &std::path::Path) -> anyhow::Result<()> {
    let missed = results::report(dir)?;
    anyhow::ensure!(missed == 0, "checking goals failed: {missed} are missed or not measured");
    Ok(())
}

async fn lab() -> anyhow::Result<()> {
    let plane = ControlPlane::start().await?;
    println!("KUBECONFIG={}", plane.kubeconfig.display());
    eprintln!("kubectl is {}; Ctrl-C ends the lab", plane.assets.join("kubectl").display());
    std::future::pending().await
}
