//! The lab from the command line.

mod demo;
mod fanout;
mod memory;

use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use opa_hub_loadtest::lab::{ControlPlane, assets};

/// The lab of opa-hub: real etcd, kube-apiserver, kubectl and OPA, built once from their Go modules, run as child
/// processes on loopback, gone when the command ends.
#[derive(Parser)]
#[command(version, name = "opa-hub-loadtest")]
struct Cli {
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
    /// Measure what one change costs the hub with many agents, beside a thread that only writes to as many sockets
    Fanout(fanout::Options),
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
            ExitCode::FAILURE
        }
    }
}

async fn run() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Assets => {
            println!("{}", tokio::task::spawn_blocking(assets::folder).await??.display());
            Ok(())
        }
        Command::Lab => lab().await,
        Command::Memory(options) => memory::run(options).await,
        Command::Fanout(options) => fanout::run(options).await,
        Command::Raw { listen, bytes } => fanout::serve_raw(listen, bytes),
        Command::Demo => demo::run().await,
    }
}

async fn lab() -> anyhow::Result<()> {
    let plane = ControlPlane::start().await?;
    println!("KUBECONFIG={}", plane.kubeconfig.display());
    eprintln!("kubectl is {}; Ctrl-C ends the lab", plane.assets.join("kubectl").display());
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        _ = terminate.recv() => Ok(()),
        ended = tokio::signal::ctrl_c() => ended.context("cannot wait for Ctrl-C"),
    }
}
