//! `fanout`: cost of a delivery to many agents, compared with plain socket writers.

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

use super::{Common, MISMATCHES, SwarmSetup, at_least, command, kernel_growth, seconds};
use crate::baseline::raw;
use crate::results::{Goal, Measurement, Results};
use crate::swarm::{Schedule, Swarm, WHOLE};

/// Agents become idle between changes.
const PAUSE: Duration = Duration::from_millis(300);
/// Changes in flight: no agent falls behind, and none waits.
const IN_FLIGHT: u64 = 2;

const DELAY: &str = "change at an agent";
const CPU: &str = "server CPU a delivery";
const MEMORY: &str = "resident memory an idle agent";
const SLOWNESS: &str = "time of a delivery, sustained";
const ENCODES: &str = "frames encoded a change";

#[derive(Args)]
pub(crate) struct Options {
    /// Number of agents, one stream each
    #[arg(long, default_value_t = 10_000, value_parser = at_least::<1>)]
    agents: usize,
    /// Number of single changes
    #[arg(long, default_value_t = 20, value_parser = at_least::<1>)]
    rounds: usize,
    /// Duration of maximum throughput after that, in seconds
    #[arg(long, default_value_t = 10, value_parser = at_least::<1>)]
    sustained_seconds: usize,
    #[command(flatten)]
    common: Common,
}

pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let Options { agents, rounds, sustained_seconds, common } = options;
    let time = Duration::from_secs(sustained_seconds as u64);
    let settings = [
        ("agents", agents),
        ("rounds", rounds),
        ("sustained-seconds", sustained_seconds),
        ("runs", common.runs),
    ];
    let mut results = Results::new(
        "fanout",
        format!(
            "{agents} agents of a hub with one pod, {rounds} changes one by one, then {sustained_seconds} s of as many as go"
        ),
        command("fanout", &settings),
        vec![
            Goal::at_most("opa-hub", &format!("{DELAY}, p99"), 1.3).times("raw"),
            Goal::at_most("opa-hub", CPU, 1.25).times("raw"),
            Goal::at_most("opa-hub", MEMORY, 2048.0),
            // 0.9 times the deliveries.
            Goal::at_most("opa-hub", SLOWNESS, 1.11).times("raw"),
            Goal::at_most("opa-hub", ENCODES, 1.0),
            Goal::at_most("opa-hub", MISMATCHES, 0.0),
        ],
    );
    for run in 0..common.runs {
        eprintln!("run {} of {}", run + 1, common.runs);
        let (hub, frame_bytes) = measure_hub(agents, rounds, time).await?;
        let dir = tempfile::tempdir()?;
        let raw = measure_raw(dir.path(), agents, rounds, time, frame_bytes).await?;
        results.push(vec![hub, raw], common.out.as_deref())?;
    }
    results.finish(common.out.as_deref());
    Ok(())
}

async fn measure_hub(agents: usize, rounds: usize, time: Duration) -> anyhow::Result<(Measurement, usize)> {
    let SwarmSetup { apiserver, hub, due, swarm, before, .. } =
        &mut SwarmSetup::start(1, agents, &[]).await?;
    tokio::time::sleep(PAUSE * 10).await;
    eprintln!("  opa-hub: {agents} agents");
    let encodes = hub.metric("opa_hub_frame_encodes_total").await?;
    let process = hub.process.as_ref().context("the hub is stopped")?;
    let mut measured = Measurement::new("opa-hub");
    let change = async |number| {
        apiserver.change(0, number);
        Ok(())
    };
    let bytes = one_by_one(&mut measured, swarm, due, process, *before, rounds, change).await?;
    let encodes = hub.metric("opa_hub_frame_encodes_total").await? - encodes;
    measured.add(ENCODES, "", encodes as f64 / rounds as f64);
    sustained(&mut measured, swarm, process, due.len(), time, change).await?;
    measured.add(MISMATCHES, "", swarm.mismatches(&apiserver.pods(), WHOLE) as f64);
    anyhow::ensure!(swarm.counts().ended.load(Relaxed) == 0, "measuring failed: an agent lost its stream");
    Ok((measured, bytes))
}

async fn measure_raw(
    dir: &Path,
    agents: usize,
    rounds: usize,
    time: Duration,
    bytes: usize,
) -> anyhow::Result<Measurement> {
    let address: SocketAddr = format!("127.0.0.1:{}", free_port()?).parse()?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["raw", "--listen", &address.to_string(), "--bytes", &bytes.to_string()]);
    let mut process = Process::start("raw", dir, &mut command)?;
    let mut driver = process.until("raw listens", async || raw::Driver::new(address)).await?;
    let before = process.usage()?;
    let (due, start) = (Schedule::default(), Arc::new(raw::start()?));
    let mut swarm = Swarm::open(start, vec![address], due.clone(), agents, &[]).await?;
    tokio::time::sleep(PAUSE * 10).await;
    eprintln!("  raw: {agents} readers");
    // The raw server counts by itself.
    let mut change = async |_| driver.send_next();
    let mut measured = Measurement::new("raw");
    one_by_one(&mut measured, &mut swarm, &due, &process, before, rounds, &mut change).await?;
    sustained(&mut measured, &mut swarm, &process, due.len(), time, change).await?;
    Ok(measured)
}

/// Returns the bytes of an event.
async fn one_by_one(
    measured: &mut Measurement,
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
    measured.add("kernel memory an idle agent, both ends", "B", kernel_growth(before, idle) / agents as f64);
    let bytes = received as f64 / agents as f64;
    measured.add("bytes an agent and change", "B", bytes);
    Ok(bytes.round() as usize)
}

/// Delays are not recorded, to spare the readers.
async fn sustained(
    measured: &mut Measurement,
    swarm: &mut Swarm,
    process: &Process,
    mut last: u64,
    time: Duration,
    mut change: impl AsyncFnMut(u64) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let (first_frame, first) = (swarm.counts().frames.load(Relaxed), last);
    let (server, readers) = (process.usage()?, Usage::read("self")?);
    let started = Instant::now();
    while started.elapsed() < time {
        last += 1;
        change(last).await?;
        swarm.reach(last.saturating_sub(IN_FLIGHT - 1), 0).await?;
    }
    swarm.reach(last, 0).await?;
    let took = started.elapsed().as_secs_f64();
    let delivered = (swarm.counts().frames.load(Relaxed) - first_frame) as f64;
    let share = |from, to| seconds(from, to) / delivered * 1e6;
    measured.add("deliveries, sustained", "a second", delivered / took);
    measured.add(SLOWNESS, "µs", took / delivered * 1e6);
    measured.add("changes at all agents, sustained", "a second", (last - first) as f64 / took);
    measured.add("server CPU a delivery, sustained", "µs", share(server, process.usage()?));
    measured.add(
        "readers' and source's CPU a delivery, sustained",
        "µs",
        share(readers, Usage::read("self")?),
    );
    Ok(())
}
