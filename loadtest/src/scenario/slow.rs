//! `slow`: some agents do not read, some read a few bytes now and then. What that costs the others, and the hub.

use std::collections::BTreeMap;
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
/// What 200 slow agents cost is less than what a process's memory varies by.
const SLOWER: &str = "10 % stalled, 10 % trickling";
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
            Goal::at_most(SLOWER, MEMORY, 4.0),
            Goal::at_most(SLOW, ENDED, 0.0),
            Goal::at_most(SLOWER, ENDED, 0.0),
            Goal::at_most(SLOW, ASTRAY, 0.0),
        ],
    );
    for run in 0..common.runs {
        eprintln!("run {} of {}", run + 1, common.runs);
        let mut who = [(STEADY, 0), (SLOW, agents / 100), (SLOWER, agents / 10)];
        // Who comes later meets another machine than who is first.
        let first = run % who.len();
        who.rotate_left(first);
        let mut of = BTreeMap::new();
        for (name, each) in who {
            of.insert(each, once(name, agents, each, rate, seconds).await?);
        }
        let base = of.get(&0).map_or(f64::NAN, |(_, grown)| *grown);
        let measured = of.into_iter().map(|(each, (mut measured, grown))| {
            // Nobody is slow among the steady.
            measured.add(MEMORY, "KB", (grown - base) / 1024.0 / (2 * each) as f64);
            measured
        });
        results.push(measured.collect(), common.out.as_deref())?;
    }
    results.finish(common.out.as_deref());
    Ok(())
}

/// What was measured, and the bytes that the hub's memory grew by while changes came.
async fn once(
    who: &str,
    agents: usize,
    each: usize,
    rate: usize,
    time: usize,
) -> anyhow::Result<(Measured, f64)> {
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
    let mut measured = Measured::new(who);
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
