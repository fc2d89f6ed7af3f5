//! `fanout`: many agents, one change at a time and then as many as go. What a delivery costs the hub, beside what it
//! costs a thread that only writes.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use opa_hub_loadtest::lab::free_port;
use opa_hub_loadtest::lab::process::{Process, Usage};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{Common, Crowd, command, seconds};
use crate::peer::raw;
use crate::results::{Goal, Measured, Results};
use crate::swarm::{Protocol, Schedule, Swarm};

/// Between two changes: everybody is idle again.
const PAUSE: Duration = Duration::from_millis(300);
/// Between two of them: many times what a sweep over the agents takes would fit in.
const FLOOD_PAUSE: Duration = Duration::from_millis(1);

const DELAY: &str = "change at an agent";
const CPU: &str = "server CPU a delivery";
const MEMORY: &str = "resident memory an idle agent";
const RATE: &str = "delivered while flooded";
const SLOWNESS: &str = "time of a delivery while flooded";
const ENCODES: &str = "frames encoded a change";

#[derive(Args)]
pub(crate) struct Options {
    /// Agents, each with a stream of its own
    #[arg(long, default_value_t = 10_000)]
    agents: usize,
    /// Changes, one after the other
    #[arg(long, default_value_t = 20)]
    rounds: usize,
    /// How long changes come as fast as they go, then
    #[arg(long, default_value_t = 10)]
    flood_seconds: usize,
    #[command(flatten)]
    common: Common,
}

pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let Options { agents, rounds, flood_seconds, common } = options;
    let flood = Duration::from_secs(flood_seconds as u64);
    let mut runs = Vec::new();
    for run in 0..common.runs {
        eprintln!("run {} of {}", run + 1, common.runs);
        let (ours, frame) = ours(agents, rounds, flood).await?;
        let dir = tempfile::tempdir()?;
        runs.push(vec![ours, raw(dir.path(), agents, rounds, flood, frame).await?]);
    }
    let results = Results {
        scenario: "fanout".into(),
        what: format!(
            "{agents} agents, {rounds} changes one by one, then {flood_seconds} s of as many as go"
        ),
        command: command("fanout", &[("agents", agents), ("rounds", rounds), ("runs", common.runs)]),
        goals: vec![
            Goal::at_most("opa-hub", &format!("{DELAY}, p99"), 1.3).times("raw"),
            Goal::at_most("opa-hub", CPU, 1.25).times("raw"),
            Goal::at_most("opa-hub", MEMORY, 2048.0),
            // 0.9 as many deliveries.
            Goal::at_most("opa-hub", SLOWNESS, 1.11).times("raw"),
            Goal::at_most("opa-hub", ENCODES, 1.0),
        ],
        runs,
    };
    results.finish(common.out.as_deref())
}

/// A hub over an API server of one pod.
async fn ours(agents: usize, rounds: usize, time: Duration) -> anyhow::Result<(Measured, usize)> {
    let Crowd { stub, hub, due, swarm, before, .. } = &mut Crowd::start(1, agents, &[]).await?;
    tokio::time::sleep(PAUSE * 10).await;
    eprintln!("  opa-hub: {agents} agents");
    let encodes = hub.metric("opa_hub_frame_encodes_total").await?;
    let process = hub.process.as_ref().context("the hub runs")?;
    let change = async |number| {
        stub.change(0, number);
        Ok(())
    };
    let mut measured = Measured::new("opa-hub");
    let bytes = one_by_one(&mut measured, swarm, due, process, *before, rounds, change).await?;
    let encodes = hub.metric("opa_hub_frame_encodes_total").await? - encodes;
    measured.add(ENCODES, "", encodes as f64 / rounds as f64);
    flood(&mut measured, swarm, due, time, change).await?;
    anyhow::ensure!(swarm.counts().ended.load(Relaxed) == 0, "an agent lost its stream");
    Ok((measured, bytes))
}

/// A thread that writes as many bytes to as many sockets.
async fn raw(
    dir: &Path,
    agents: usize,
    rounds: usize,
    time: Duration,
    bytes: usize,
) -> anyhow::Result<Measured> {
    let address: SocketAddr = format!("127.0.0.1:{}", free_port()?).parse()?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["raw", "--listen", &address.to_string(), "--bytes", &bytes.to_string()]);
    let mut process = Process::start("raw", dir, &mut command)?;
    process.until("raw listens", async || std::net::TcpStream::connect(address).map(drop)).await?;
    let before = process.usage()?;
    let due = Schedule::default();
    let mut swarm = Swarm::open(Protocol::Raw, vec![address], due.clone(), agents, &[]).await?;
    tokio::time::sleep(PAUSE * 10).await;
    eprintln!("  raw: {agents} readers");
    // The number is counted over there.
    let change = async |_| {
        let mut tcp = tokio::net::TcpStream::connect(address).await?;
        tcp.write_all(raw::GO).await?;
        tcp.read_exact(&mut [0; raw::GO.len()]).await?;
        anyhow::Ok(())
    };
    let mut measured = Measured::new("raw");
    one_by_one(&mut measured, &mut swarm, &due, &process, before, rounds, change).await?;
    flood(&mut measured, &mut swarm, &due, time, change).await?;
    Ok(measured)
}

/// Bytes of an event.
async fn one_by_one(
    measured: &mut Measured,
    swarm: &mut Swarm,
    due: &Schedule,
    process: &Process,
    before: Usage,
    rounds: usize,
    mut change: impl AsyncFnMut(u64) -> anyhow::Result<()>,
) -> anyhow::Result<usize> {
    let agents = swarm.counts().open.load(Relaxed);
    let idle = process.usage()?;
    swarm.take_delays();
    let mut received = 0;
    for _ in 0..rounds {
        let bytes = swarm.counts().bytes.load(Relaxed);
        let number = due.push(Instant::now());
        change(number).await?;
        swarm.reach(number, 0).await?;
        received = swarm.counts().bytes.load(Relaxed) - bytes;
        tokio::time::sleep(PAUSE).await;
    }
    let cpu = seconds(idle, process.usage()?) / (agents * rounds) as f64;
    measured.add_delays(DELAY, &swarm.take_delays());
    measured.add(CPU, "µs", cpu * 1e6);
    measured.add(MEMORY, "B", idle.rss.saturating_sub(before.rss) as f64 / agents as f64);
    let bytes = received as f64 / agents as f64;
    measured.add("bytes an agent and change", "B", bytes);
    Ok(bytes.round() as usize)
}

async fn flood(
    measured: &mut Measured,
    swarm: &mut Swarm,
    due: &Schedule,
    time: Duration,
    mut change: impl AsyncFnMut(u64) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let frames = || swarm.counts().frames.load(Relaxed);
    let (started, first) = (Instant::now(), frames());
    let mut last = 0;
    while started.elapsed() < time {
        last = due.push(Instant::now());
        change(last).await?;
        tokio::time::sleep(FLOOD_PAUSE).await;
    }
    let (delivered, took) = (frames() - first, started.elapsed().as_secs_f64());
    swarm.reach(last, 0).await?;
    measured.add(RATE, "a second", delivered as f64 / took);
    measured.add(SLOWNESS, "µs", took / delivered as f64 * 1e6);
    Ok(())
}
