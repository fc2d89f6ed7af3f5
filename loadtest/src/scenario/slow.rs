//! `slow`: some agents do not read, some read a few bytes now and then. What that costs the others, and the hub.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use clap::Args;

use super::{ASTRAY, Common, Crowd, at_least, at_rate, command, usage};
use crate::results::{Goal, Measured, Results};
use crate::swarm::Pace;

const PODS: usize = 1000;
const SETTLE: Duration = Duration::from_secs(3);
const DELAY: &str = "change at the steady agents";
const GROWTH: &str = "hub memory that changes took";
const MEMORY: &str = "more hub memory a slow agent";
const ENDED: &str = "streams that ended";
const SLOW: &str = "1 % stalled, 1 % trickling";
const STEADY: &str = "all steady";

#[derive(Args)]
pub(crate) struct Options {
    #[arg(long, default_value_t = 10_000, value_parser = at_least::<100>)]
    agents: usize,
    /// Changes a second
    #[arg(long, default_value_t = 5, value_parser = at_least::<1>)]
    rate: usize,
    /// How long changes come: after 12 s of 5 changes the sockets of those are full who do not read
    #[arg(long, default_value_t = 40, value_parser = at_least::<1>)]
    seconds: usize,
    #[command(flatten)]
    common: Common,
}

pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let Options { agents, rate, seconds, common } = options;
    let settings = [("agents", agents), ("rate", rate), ("seconds", seconds), ("runs", common.runs)];
    let mut results = Results::new(
        "slow",
        format!("{agents} agents, {rate} changes a second of {PODS} pods of 300 bytes for {seconds} s"),
        command("slow", &settings),
        vec![
            Goal::at_most(SLOW, &format!("{DELAY}, p99"), 1.05).times(STEADY),
            Goal::at_most(SLOW, MEMORY, 4.0),
            Goal::at_most(SLOW, ENDED, 0.0),
            Goal::at_most(SLOW, ASTRAY, 0.0),
        ],
    );
    for run in 0..common.runs {
        eprintln!("run {} of {}", run + 1, common.runs);
        // Who is second meets another machine than who is first.
        let order = if run % 2 == 0 { [0, agents / 100] } else { [agents / 100, 0] };
        let mut both = Vec::new();
        for each in order {
            both.push(once(agents, each, rate, seconds).await?);
        }
        both.sort_by_key(|(measured, _)| measured.who == STEADY);
        let [(slow, grown), (steady, else_grown)] = &mut both[..] else { unreachable!("two were measured") };
        let more = (*grown - *else_grown) / 1024.0 / (2 * (agents / 100)) as f64;
        slow.add(MEMORY, "KB", more);
        results.push(vec![slow.clone(), steady.clone()], common.out.as_deref())?;
    }
    results.finish(common.out.as_deref());
    Ok(())
}

/// What was measured, and the bytes that the hub's memory grew by while changes came.
async fn once(agents: usize, each: usize, rate: usize, time: usize) -> anyhow::Result<(Measured, f64)> {
    let paces = [(Pace::Stalled, each), (Pace::Trickling, each)];
    let Crowd { stub, hub, due, swarm, .. } = &mut Crowd::start(PODS, agents, &paces).await?;
    tokio::time::sleep(SETTLE).await;
    swarm.take_delays();
    let before = usage(hub)?.rss;
    let last = at_rate(due, rate as f64, Duration::from_secs(time as u64), async |number, _| {
        stub.change(number as usize % PODS, number);
        swarm.check()
    })
    .await?;
    swarm.reach(last, 2 * each).await?;
    let mut measured = Measured::new(if each == 0 { STEADY } else { SLOW });
    measured.add_delays(DELAY, &swarm.take_delays());
    let grown = usage(hub)?.rss as f64 - before as f64;
    measured.add(GROWTH, "MB", grown / f64::from(1 << 20));
    swarm.wake();
    swarm.reach(last, 0).await?;
    if each > 0 {
        let frames = swarm.counts().frames_of_stalled.load(Relaxed);
        measured.add("frames that a stalled agent was sent", "", frames as f64 / each as f64);
        measured.add("changes that there were", "", last as f64);
    }
    measured.add(ENDED, "", swarm.counts().ended.load(Relaxed) as f64);
    measured.add(ASTRAY, "", swarm.astray(&stub.pods()) as f64);
    eprintln!("  {}: {last} changes", measured.who);
    Ok((measured, grown))
}
