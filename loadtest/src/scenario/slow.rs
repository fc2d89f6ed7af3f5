//! `slow`: cost of stalled and trickling agents. The control has only the steady agents, since readers share the hub's
//! cores.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use clap::Args;

use super::{Common, KERNEL, MISMATCHES, SwarmSetup, at_least, at_rate, command, kernel_growth, usage};
use crate::results::{Goal, Measurement, Results};
use crate::swarm::{Pace, WHOLE};

const PODS: usize = 1000;
const SETTLE: Duration = Duration::from_secs(3);
const DELAY: &str = "change at the steady agents";
const GROWTH: &str = "hub memory that changes took";
const MEMORY: &str = "more hub memory a slow agent";
const KERNEL_MEMORY: &str = "more kernel memory a slow agent, both ends";
const ENDED: &str = "streams that ended";
const SLOW: &str = "1 % stalled, 1 % trickling";
/// The memory of 200 slow agents is within a process's noise.
const SLOWER: &str = "10 % stalled, 10 % trickling";
const STEADY: &str = "the 98 % steady alone";
const FEWER_STEADY: &str = "the 80 % steady alone";
/// Control, phase, and divisor for stalled and for trickling agents.
const PHASES: [(&str, &str, usize); 2] = [(STEADY, SLOW, 100), (FEWER_STEADY, SLOWER, 10)];

#[derive(Args)]
pub(crate) struct Options {
    #[arg(long, default_value_t = 10_000, value_parser = at_least::<100>)]
    agents: usize,
    /// Changes per second
    #[arg(long, default_value_t = 5, value_parser = at_least::<1>)]
    rate: usize,
    /// Duration of the changes, in seconds; 12 s at 5 per second fill the sockets of stalled agents
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
            Goal::at_most(SLOW, MISMATCHES, 0.0),
        ],
    );
    for run in 0..common.runs {
        eprintln!("run {} of {}", run + 1, common.runs);
        let mut measured = Vec::new();
        for (base, name, share) in PHASES {
            let each = agents / share;
            let steady = agents - 2 * each;
            // Alternates: the first phase meets another machine state.
            let (mut alone, mut slow) = (None, None);
            for is_slow in [run % 2 == 1, run % 2 == 0] {
                if is_slow {
                    slow = Some(run_once(name, agents, each, rate, seconds).await?);
                } else {
                    alone = Some(run_once(base, steady, 0, rate, seconds).await?);
                }
            }
            let (Some((alone, base)), Some((mut slow, grown))) = (alone, slow) else { continue };
            let kilobytes_per_slow_agent =
                |grown: f64, base: f64| (grown - base) / 1024.0 / (2 * each) as f64;
            slow.add(MEMORY, "KB", kilobytes_per_slow_agent(grown.resident, base.resident));
            slow.add(KERNEL_MEMORY, "KB", kilobytes_per_slow_agent(grown.kernel, base.kernel));
            measured.extend([alone, slow]);
        }
        results.push(measured, common.out.as_deref())?;
    }
    results.finish(common.out.as_deref());
    Ok(())
}

/// In bytes.
struct Growth {
    resident: f64,
    /// Includes the agents' ends.
    kernel: f64,
}

async fn run_once(
    subject: &str,
    agents: usize,
    each: usize,
    rate: usize,
    time: usize,
) -> anyhow::Result<(Measurement, Growth)> {
    let paces = [(Pace::Stalled, each), (Pace::Trickling, each)];
    let SwarmSetup { apiserver, hub, due, swarm, before: alone, .. } =
        &mut SwarmSetup::start(PODS, agents, &paces).await?;
    tokio::time::sleep(SETTLE).await;
    swarm.take_delays();
    let before = usage(hub)?;
    let last = at_rate(due, rate as f64, Duration::from_secs(time as u64), async |number, _| {
        apiserver.change(number as usize % PODS, number);
        swarm.check()
    })
    .await?;
    swarm.reach(last, 2 * each).await?;
    let mut measured = Measurement::new(subject);
    measured.add_delays(DELAY, &swarm.take_delays());
    let after = usage(hub)?;
    let resident = after.rss as f64 - before.rss as f64;
    let grown = Growth { resident, kernel: kernel_growth(before, after) };
    measured.add(GROWTH, "MB", grown.resident / f64::from(1 << 20));
    measured.add(KERNEL, "MB", kernel_growth(*alone, after) / f64::from(1 << 20));
    swarm.wake();
    swarm.reach(last, 0).await?;
    if each > 0 {
        let frames = swarm.counts().stalled_frames.load(Relaxed);
        measured.add("frames that a stalled agent was sent", "", frames as f64 / each as f64);
        measured.add("changes that there were", "", last as f64);
    }
    measured.add(ENDED, "", swarm.counts().ended.load(Relaxed) as f64);
    measured.add(MISMATCHES, "", swarm.mismatches(&apiserver.pods(), WHOLE) as f64);
    eprintln!("  {}: {last} changes", measured.subject);
    Ok((measured, grown))
}
