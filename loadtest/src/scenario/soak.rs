//! `soak`: changes at a rate for minutes. Nobody falls behind, nothing is lost, nothing grows.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use clap::Args;

use super::{Common, Crowd, at_rate, command, megabytes, seconds, usage};
use crate::results::{Goal, Measured, Results};

const PODS: usize = 3000;
const DELAY: &str = "change at an agent";
const LOST: &str = "agents without the last change";

#[derive(Args)]
pub(crate) struct Options {
    #[arg(long, default_value_t = 1000)]
    agents: usize,
    /// Changes a second
    #[arg(long, default_value_t = 500)]
    rate: usize,
    /// How long changes come
    #[arg(long, default_value_t = 600)]
    seconds: usize,
    #[command(flatten)]
    common: Common,
}

pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let Options { agents, rate, seconds, common } = options;
    let mut runs = Vec::new();
    for _ in 0..common.runs {
        runs.push(vec![once(agents, rate, seconds).await?]);
    }
    let settings = [("agents", agents), ("rate", rate), ("seconds", seconds), ("runs", common.runs)];
    let results = Results {
        scenario: "soak".into(),
        what: format!("{agents} agents, {rate} changes a second of {PODS} pods for {seconds} s"),
        command: command("soak", &settings),
        goals: vec![
            Goal::at_most("opa-hub", &format!("{DELAY}, p99"), 250.0),
            Goal::at_most("opa-hub", LOST, 0.0),
        ],
        runs,
    };
    results.finish(common.out.as_deref())
}

async fn once(agents: usize, rate: usize, time: usize) -> anyhow::Result<Measured> {
    let Crowd { stub, hub, due, swarm, .. } = &mut Crowd::start(PODS, agents, &[]).await?;
    let before = usage(hub)?;
    let encodes = hub.metric("opa_hub_frame_encodes_total").await?;
    // In parts, to see whether the last is like the first.
    let parts = [time / 10, time - 2 * (time / 10), time / 10].map(|part| Duration::from_secs(part as u64));
    let mut measured = Measured::new("opa-hub");
    let mut last = 0;
    let all = crate::histogram::Histogram::new();
    let mut p99 = Vec::new();
    for part in parts {
        last = at_rate(due, rate as f64, part, async |number| {
            stub.change(number as usize % PODS, number);
            Ok(())
        })
        .await?;
        let delays = swarm.take_delays();
        eprintln!("  {last} changes, p99 {:.1} ms", delays.percentile(99.0) * 1000.0);
        p99.push(delays.percentile(99.0) * 1000.0);
        all.add(&delays);
    }
    swarm.reach(last, 0).await?;
    let after = usage(hub)?;
    all.add(&swarm.take_delays());
    let lost = agents - swarm.at(last, 0);
    let counts = swarm.counts();
    let frames = counts.frames.load(Relaxed);
    measured.add_delays(DELAY, &all);
    measured.add("p99 of the first tenth", "ms", p99[0]);
    measured.add("p99 of the last tenth", "ms", p99[2]);
    measured.add(LOST, "", lost as f64);
    measured.add("streams that ended", "", counts.ended.load(Relaxed) as f64);
    measured.add("changes in a frame", "", (last * agents as u64) as f64 / frames as f64);
    let encodes = hub.metric("opa_hub_frame_encodes_total").await? - encodes;
    measured.add("frames encoded a sweep", "", encodes as f64 / (frames as f64 / agents as f64));
    measured.add(
        "bytes an agent and change",
        "B",
        counts.bytes.load(Relaxed) as f64 / (last * agents as u64) as f64,
    );
    measured.add("hub CPU", "% of a core", seconds(before, after) / time as f64 * 100.0);
    measured.add("hub memory before", "MB", megabytes(before.rss));
    measured.add("hub memory after", "MB", megabytes(after.rss));
    Ok(measured)
}
