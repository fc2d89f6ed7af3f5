//! `soak`: changes at a constant rate for minutes.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use clap::Args;

use super::{
    Common, KERNEL, MISMATCHES, SwarmSetup, at_least, at_rate, command, kernel_growth, megabytes, seconds,
    usage,
};
use crate::histogram::Histogram;
use crate::results::{Goal, Measurement, Results};
use crate::swarm::WHOLE;

const PODS: usize = 3000;
/// Agents without the last change by then have fallen behind.
const GRACE: Duration = Duration::from_secs(1);
const DELAY: &str = "change at an agent";
const BEHIND: &str = "agents without the last change after 1 s";
const SLOPE: &str = "p99 of the last tenth beside the first";

#[derive(Args)]
pub(crate) struct Options {
    #[arg(long, default_value_t = 1000, value_parser = at_least::<1>)]
    agents: usize,
    /// Changes per second
    #[arg(long, default_value_t = 500, value_parser = at_least::<1>)]
    rate: usize,
    /// Duration of the changes, in seconds
    #[arg(long, default_value_t = 600, value_parser = at_least::<10>)]
    seconds: usize,
    #[command(flatten)]
    common: Common,
}

pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let Options { agents, rate, seconds, common } = options;
    let settings = [("agents", agents), ("rate", rate), ("seconds", seconds), ("runs", common.runs)];
    let mut results = Results::new(
        "soak",
        format!("{agents} agents, {rate} changes a second of {PODS} pods of 300 bytes for {seconds} s"),
        command("soak", &settings),
        vec![
            Goal::at_most("opa-hub", &format!("{DELAY}, p99"), 250.0),
            Goal::at_most("opa-hub", SLOPE, 1.25),
            Goal::at_most("opa-hub", BEHIND, 0.0),
            Goal::at_most("opa-hub", MISMATCHES, 0.0),
        ],
    );
    for run in 0..common.runs {
        eprintln!("run {} of {}", run + 1, common.runs);
        results.push(vec![run_once(agents, rate, seconds).await?], common.out.as_deref())?;
    }
    results.finish(common.out.as_deref());
    Ok(())
}

async fn run_once(agents: usize, rate: usize, time: usize) -> anyhow::Result<Measurement> {
    const PARTS: usize = 10;
    let SwarmSetup { apiserver, hub, due, swarm, before: alone, .. } =
        &mut SwarmSetup::start(PODS, agents, &[]).await?;
    let before = usage(hub)?;
    let encodes = hub.metric("opa_hub_frame_encodes_total").await?;
    let mut measured = Measurement::new("opa-hub");
    let (all, mut p99, mut last) = (Histogram::new(), Vec::new(), 0);
    for part in 1..=PARTS {
        let part_of_time = Duration::from_secs(time as u64) / PARTS as u32;
        last = at_rate(due, rate as f64, part_of_time, async |number, _| {
            apiserver.change(number as usize % PODS, number);
            swarm.check()
        })
        .await?;
        let delays = swarm.take_delays();
        p99.push(delays.percentile(99.0) * 1000.0);
        eprintln!("  {part} of {PARTS}: {last} changes, p99 {:.1} ms", delays.percentile(99.0) * 1000.0);
        all.add(&delays);
    }
    tokio::time::sleep(GRACE).await;
    let behind = agents - swarm.count_with(last, 0);
    swarm.reach(last, 0).await?;
    let after = usage(hub)?;
    all.add(&swarm.take_delays());
    let counts = swarm.counts();
    let (frames, deliveries) = (counts.frames.load(Relaxed) as f64, (last * agents as u64) as f64);
    measured.add_delays(DELAY, &all);
    measured.add("p99 of the first tenth", "ms", p99[0]);
    measured.add("p99 of the last tenth", "ms", p99[PARTS - 1]);
    measured.add(SLOPE, "×", p99[PARTS - 1] / p99[0]);
    measured.add(BEHIND, "", behind as f64);
    measured.add(MISMATCHES, "", swarm.mismatches(&apiserver.pods(), WHOLE) as f64);
    measured.add("streams that ended", "", counts.ended.load(Relaxed) as f64);
    measured.add("changes in a frame", "", deliveries / frames);
    let encodes = hub.metric("opa_hub_frame_encodes_total").await? - encodes;
    measured.add("frames encoded a frame at all agents", "", encodes as f64 / (frames / agents as f64));
    measured.add("bytes an agent and change", "B", counts.bytes.load(Relaxed) as f64 / deliveries);
    measured.add("hub CPU", "% of a core", seconds(before, after) / time as f64 * 100.0);
    measured.add("hub memory before", "MB", megabytes(before.rss));
    measured.add("hub memory after", "MB", megabytes(after.rss));
    measured.add(KERNEL, "MB", kernel_growth(*alone, after) / f64::from(1 << 20));
    Ok(measured)
}
