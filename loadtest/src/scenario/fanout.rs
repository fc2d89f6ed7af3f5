//! `fanout`: many agents, one change at a time and then as many as go. What a delivery costs the hub, beside what it
//! costs threads that only write the same to the same readers.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use opa_hub_loadtest::lab::free_port;
use opa_hub_loadtest::lab::process::{Process, Usage};

use super::{Common, Crowd, at_least, command, seconds};
use crate::peer::raw;
use crate::results::{Goal, Measured, Results};
use crate::swarm::{Schedule, Swarm};

/// Between two changes: everybody is idle again.
const PAUSE: Duration = Duration::from_millis(300);
/// Between two of a flood: many times what a round over the agents takes would fit in.
const FLOOD_PAUSE: Duration = Duration::from_millis(1);

const DELAY: &str = "change at an agent";
const CPU: &str = "server CPU a delivery";
const MEMORY: &str = "resident memory an idle agent";
const SLOWNESS: &str = "time of a delivery while flooded";
const ENCODES: &str = "frames encoded a change";
const ASTRAY: &str = "witnesses that hold something else in the end";

#[derive(Args)]
pub(crate) struct Options {
    /// Agents, each with a stream of its own
    #[arg(long, default_value_t = 10_000, value_parser = at_least::<1>)]
    agents: usize,
    /// Changes, one after the other
    #[arg(long, default_value_t = 20, value_parser = at_least::<1>)]
    rounds: usize,
    /// How long changes come as fast as they go, then
    #[arg(long, default_value_t = 10, value_parser = at_least::<1>)]
    flood_seconds: usize,
    #[command(flatten)]
    common: Common,
}

pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let Options { agents, rounds, flood_seconds, common } = options;
    let flood = Duration::from_secs(flood_seconds as u64);
    let settings =
        [("agents", agents), ("rounds", rounds), ("flood-seconds", flood_seconds), ("runs", common.runs)];
    let mut results = Results::new(
        "fanout",
        format!(
            "{agents} agents of a hub with one pod, {rounds} changes one by one, then {flood_seconds} s of as many as go"
        ),
        command("fanout", &settings),
        vec![
            Goal::at_most("opa-hub", &format!("{DELAY}, p99"), 1.3).times("raw"),
            Goal::at_most("opa-hub", CPU, 1.25).times("raw"),
            Goal::at_most("opa-hub", MEMORY, 2048.0),
            // 0.9 as many deliveries.
            Goal::at_most("opa-hub", SLOWNESS, 1.11).times("raw"),
            Goal::at_most("opa-hub", ENCODES, 1.0),
            Goal::at_most("opa-hub", ASTRAY, 0.0),
        ],
    );
    for run in 0..common.runs {
        eprintln!("run {} of {}", run + 1, common.runs);
        let (ours, frame) = ours(agents, rounds, flood).await?;
        let dir = tempfile::tempdir()?;
        let raw = raw(dir.path(), agents, rounds, flood, frame).await?;
        results.push(vec![ours, raw], common.out.as_deref())?;
    }
    results.finish(common.out.as_deref());
    Ok(())
}

/// A hub over an API server of one pod.
async fn ours(agents: usize, rounds: usize, time: Duration) -> anyhow::Result<(Measured, usize)> {
    let Crowd { stub, hub, due, swarm, before, .. } = &mut Crowd::start(1, agents, &[]).await?;
    tokio::time::sleep(PAUSE * 10).await;
    eprintln!("  opa-hub: {agents} agents");
    let encodes = hub.metric("opa_hub_frame_encodes_total").await?;
    let process = hub.process.as_ref().context("the hub runs")?;
    let mut measured = Measured::new("opa-hub");
    let change = async |number| {
        stub.change(0, number);
        Ok(())
    };
    let bytes = one_by_one(&mut measured, swarm, due, process, *before, rounds, change).await?;
    let encodes = hub.metric("opa_hub_frame_encodes_total").await? - encodes;
    measured.add(ENCODES, "", encodes as f64 / rounds as f64);
    let mut last = due.len();
    let changes = async {
        let until = Instant::now() + time;
        while Instant::now() < until {
            last += 1;
            stub.change(0, last);
            tokio::time::sleep(FLOOD_PAUSE).await;
        }
        Ok(last)
    };
    flood(&mut measured, swarm, process, changes).await?;
    measured.add(ASTRAY, "", swarm.astray(&stub.pods()) as f64);
    anyhow::ensure!(swarm.counts().ended.load(Relaxed) == 0, "an agent lost its stream");
    Ok((measured, bytes))
}

/// Threads that write as many bytes to as many sockets.
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
    let driver = process.until("raw listens", async || raw::Driver::new(address)).await?;
    let driver = Arc::new(std::sync::Mutex::new(driver));
    let before = process.usage()?;
    let (due, start) = (Schedule::default(), Arc::new(raw::start()?));
    let mut swarm = Swarm::open(start, vec![address], due.clone(), agents, &[]).await?;
    tokio::time::sleep(PAUSE * 10).await;
    eprintln!("  raw: {agents} readers");
    let drive = |command: fn(&mut raw::Driver, Duration) -> anyhow::Result<u64>| {
        let driver = Arc::clone(&driver);
        let blocking = move || command(&mut driver.lock().expect("nobody panics with it"), time);
        async { tokio::task::spawn_blocking(blocking).await? }
    };
    // The number is counted over there.
    let change = async |_| drive(|driver, _| driver.round()).await.map(drop);
    let mut measured = Measured::new("raw");
    one_by_one(&mut measured, &mut swarm, &due, &process, before, rounds, change).await?;
    flood(&mut measured, &mut swarm, &process, drive(raw::Driver::flood)).await?;
    Ok(measured)
}

/// Says the bytes of an event.
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

/// `changes` ends with the number of the last. No delay is counted meanwhile: that is work of the readers.
async fn flood(
    measured: &mut Measured,
    swarm: &mut Swarm,
    process: &Process,
    changes: impl Future<Output = anyhow::Result<u64>>,
) -> anyhow::Result<()> {
    let (started, first) = (Instant::now(), swarm.counts().frames.load(Relaxed));
    let (server, readers) = (process.usage()?, Usage::of("self")?);
    let last = changes.await?;
    swarm.reach(last, 0).await?;
    let (delivered, took) = (swarm.counts().frames.load(Relaxed) - first, started.elapsed().as_secs_f64());
    let share = |from, to| seconds(from, to) / delivered as f64 * 1e6;
    measured.add("delivered while flooded", "a second", delivered as f64 / took);
    measured.add(SLOWNESS, "µs", took / delivered as f64 * 1e6);
    measured.add("server CPU a delivery while flooded", "µs", share(server, process.usage()?));
    measured.add(
        "readers' and source's CPU a delivery while flooded",
        "µs",
        share(readers, Usage::of("self")?),
    );
    Ok(())
}
