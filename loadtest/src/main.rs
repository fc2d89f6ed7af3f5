//! The lab from the command line.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "counts and percentiles of a load run are far from either bound"
)]

mod demo;
mod histogram;
mod memory;
mod peer;
mod picture;
mod probe;
mod results;
mod scenario;
mod stub;
mod swarm;

use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use opa_hub_loadtest::lab::{ControlPlane, assets};

use self::scenario::{catchup, churn, failover, fanout, restart, slow, soak, start, tenant};

/// The lab of opa-hub: real etcd, kube-apiserver, kubectl and OPA, built once from their Go modules, run as child
/// processes on loopback, gone when the command ends.
#[derive(Parser)]
#[command(version, name = "opa-hub-loadtest")]
struct Cli {
    /// Use the cluster of this file, kind included, instead of the lab's; needs --create-pods. Its API server is measured
    /// by its own metrics
    #[arg(long, global = true, value_name = "FILE")]
    kubeconfig: Option<std::path::PathBuf>,
    /// Create pods in the cluster of --kubeconfig, in namespaces of their own, which are removed in the end. Nothing
    /// schedules them, but all that watches pods of all namespaces receives them, production OPAs included
    #[arg(long, global = true)]
    create_pods: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Find or build the components; the last line on stdout is the folder that holds them
    Assets,
    /// Keep a control plane up until Ctrl-C; prints how to reach it
    Lab,
    /// Measure what many pods cost in OPA, agent and hub, whole and cut down to what policies read
    Memory(memory::Options),
    /// Many agents: one change at a time, then as many as go, beside a thread that only writes
    Fanout(fanout::Options),
    /// Pods change on a real API server: what that costs it by who listens, and how long until OPAs decide by it
    Churn(churn::Options),
    /// OPAs from cold, joins at once, snapshots after a change
    Start(start::Options),
    /// kill -9 of the hub, the agents, the OPAs and the API server
    Restart(restart::Options),
    /// kill -9 of a hub with many agents: another replica, and the same one started again
    Failover(failover::Options),
    /// Agents that read slowly or not at all, and what that costs the others
    Slow(slow::Options),
    /// An agent thousands of changes behind, while its OPA is asked
    Catchup(catchup::Options),
    /// Changes at a rate for minutes
    Soak(soak::Options),
    /// Two bundles of one hub: one tenant attacks it, the other one works as before
    Tenant(tenant::Options),
    /// Write tables and pictures anew from results that were kept, and one table of all goals; fails when one is missed
    Report {
        /// Where they were kept
        dir: std::path::PathBuf,
    },
    /// What `fanout` compares with
    #[command(hide = true)]
    Raw {
        #[arg(long)]
        listen: std::net::SocketAddr,
        #[arg(long)]
        bytes: usize,
    },
    /// Walk through everything on a real cluster with one OPA and one agent
    Demo,
}

#[tokio::main]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("opa-hub-loadtest: {error:#}");
            // Not by return: what builds the lab's components on a thread of its own would be waited for.
            std::process::exit(1)
        }
    }
}

async fn run() -> anyhow::Result<()> {
    rlimit::increase_nofile_limit(u64::MAX).context("the limit of open files")?;
    let Cli { kubeconfig, create_pods, command } = Cli::parse();
    if let Command::Raw { listen, bytes } = command {
        return peer::raw::serve(listen, bytes);
    }
    if let Some(kubeconfig) = &kubeconfig {
        let uses_it = matches!(
            command,
            Command::Churn(_) | Command::Start(_) | Command::Restart(_) | Command::Failover(_)
        );
        anyhow::ensure!(
            uses_it,
            "--kubeconfig is for churn, start, restart and failover: the others make their own"
        );
        anyhow::ensure!(
            create_pods,
            "--kubeconfig needs --create-pods: thousands of pods become visible to all that watches pods there"
        );
        ControlPlane::use_cluster(kubeconfig).await?;
    }
    let is_lab = matches!(command, Command::Lab);
    let ended = tokio::select! {
        ended = perform(command) => ended,
        stopped = signal() => stopped.and_then(|()| if is_lab { Ok(()) } else { Err(anyhow::anyhow!("stopped")) }),
    };
    // Whatever came of it, nothing stays behind.
    let removed = ControlPlane::renew_guests().await;
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
        Command::Raw { .. } => unreachable!("it runs by itself"),
        Command::Demo => demo::run().await,
    }
}

async fn signal() -> anyhow::Result<()> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let mut hangup = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup())?;
    tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = hangup.recv() => Ok(()),
        ended = tokio::signal::ctrl_c() => ended.context("cannot wait for Ctrl-C"),
    }
}

fn report(dir: &std::path::Path) -> anyhow::Result<()> {
    let missed = results::report(dir)?;
    anyhow::ensure!(missed == 0, "{missed} goals are missed, or were not measured");
    Ok(())
}

async fn lab() -> anyhow::Result<()> {
    let plane = ControlPlane::start().await?;
    println!("KUBECONFIG={}", plane.kubeconfig.display());
    eprintln!("kubectl is {}; Ctrl-C ends the lab", plane.assets.join("kubectl").display());
    std::future::pending().await
}
