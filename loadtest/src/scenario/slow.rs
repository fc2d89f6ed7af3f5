//! `slow`: some agents do not read, some read a few bytes now and then. What that costs the others, and the hub.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use clap::Args;

use super::{Common, Crowd, at_rate, command, usage};
use crate::results::{Goal, Measured, Results};
use crate::swarm::Pace;

const PODS: usize = 1000;
const SETTLE: Duration = Duration::from_secs(3);
const DELAY: &str = "change at the steady agents";
const MEMORY: &str = "more hub memory a slow agent";
const ENDED: &str = "streams that ended";
const FRAMES: &str = "frames that a stalled agent took to be current";

#[derive(Args)]
pub(crate) struct Options {
    #[arg(long, default_value_t = 10_000)]
    agents: usize,
    /// Changes a second
    #[arg(long, default_value_t = 5)]
    rate: usize,
    /// How long changes come
    #[arg(long, default_value_t = 20)]
    seconds: usize,
    #[command(flatten)]
    common: Common,
}

pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let Options { agents, rate, seconds, common } = options;
    let mut runs = Vec::new();
    for run in 0..common.runs {
        eprintln!("run {} of {}", run + 1, common.runs);
        let steady = once(agents, 0, rate, seconds, 0).await?;
        let slow = once(agents, agents / 100, rate, seconds, steady.1).await?;
        runs.push(vec![slow.0, steady.0]);
    }
    let settings = [("agents", agents), ("rate", rate), ("seconds", seconds), ("runs", common.runs)];
    let (slow, steady) = ("1 % stalled, 1 % trickling", "all steady");
    let results = Results {
        scenario: "slow".into(),
        what: format!("{agents} agents, {rate} changes a second for {seconds} s"),
        command: command("slow", &settings),
        goals: vec![
            Goal::at_most(slow, &format!("{DELAY}, p99"), 1.05).times(steady),
            Goal::at_most(slow, MEMORY, 4.0),
            Goal::at_most(slow, ENDED, 0.0),
        ],
        runs,
    };
    results.finish(common.out.as_deref())
}

/// What was measured, and the hub's memory at the end.
async fn once(
    agents: usize,
    each: usize,
    rate: usize,
    time: usize,
    memory: u64,
) -> anyhow::Result<(Measured, u64)> {
    let paces = [(Pace::Stalled, each), (Pace::Trickling, each)];
    let Crowd { stub, hub, due, swarm, .. } = &mut Crowd::start(PODS, agents, &paces).await?;
    tokio::time::sleep(SETTLE).await;
    swarm.take_delays();
    let last = at_rate(due, rate as f64, Duration::from_secs(time as u64), async |number| {
        stub.change(number as usize % PODS, number);
        Ok(())
    })
    .await?;
    swarm.reach(last, 2 * each).await?;
    let mut measured = Measured::new(if each == 0 { "all steady" } else { "1 % stalled, 1 % trickling" });
    measured.add_delays(DELAY, &swarm.take_delays());
    let rss = usage(hub)?.rss;
    let counts = swarm.counts();
    eprintln!("  {}: {} changes, {} streams ended", measured.who, last, counts.ended.load(Relaxed));
    if each > 0 {
        measured.add(MEMORY, "KB", rss.saturating_sub(memory) as f64 / 1024.0 / (2 * each) as f64);
        let frames = counts.frames.load(Relaxed);
        swarm.wake();
        swarm.reach(last, 0).await?;
        let frames = swarm.counts().frames.load(Relaxed) - frames;
        measured.add(FRAMES, "", frames as f64 / each as f64);
        measured.add("changes that it missed", "", last as f64);
    }
    measured.add(ENDED, "", swarm.counts().ended.load(Relaxed) as f64);
    Ok((measured, rss))
}
