//! `memory`: memory and delays with whole objects and with the fields that policies read.

mod chart;
mod world;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use opa_hub_loadtest::eventually::{equal, eventually};
use opa_hub_loadtest::lab::process::{Process, Usage, program};
use opa_hub_loadtest::lab::{Agent, Delivery, Hub, Opa};
use opa_hub_loadtest::pods::Nth;
use serde_json::{Value, json};

pub(crate) use self::world::fill;
use self::world::{Stage, World};
use crate::scenario::at_least;

/// OPA's garbage collector frees memory while idle.
const OPA_IDLE_TIME: Duration = Duration::from_secs(10);
/// Ratio of accounted to resident memory.
const ACCOUNTED_RATIO: std::ops::RangeInclusive<f64> = 0.8..=1.2;
const ROLLOUT_PODS: usize = 20;

#[derive(Args)]
pub(crate) struct Options {
    /// Pods of 10 KB each
    #[arg(long, default_value_t = 30_000, value_parser = at_least::<2>)]
    pods: usize,
    /// Source of the pods
    #[arg(long, value_enum, default_value = "folder")]
    source: SourceKind,
    /// Timed label changes
    #[arg(long, default_value_t = 50, value_parser = at_least::<1>)]
    changes: usize,
    /// Write memory-SOURCE.json, .md and .svg to this folder
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum SourceKind {
    /// Folder of manifests
    Folder,
    /// API server, filled first: about 4 minutes for 30,000 pods
    Cluster,
}

impl SourceKind {
    fn name(self) -> &'static str {
        match self {
            Self::Folder => "folder",
            Self::Cluster => "cluster",
        }
    }
}

struct MemoryRow {
    fields: &'static str,
    hub_ready: Duration,
    hub_cpu: Duration,
    hub: Usage,
    hub_accounted: u64,
    snapshot: u64,
    load: Duration,
    opa: Usage,
    opa_settled: u64,
    opa_forecast: u64,
    agent: Usage,
    change_p50: Duration,
    change_max: Duration,
    change_cpu: Duration,
    policy_edit: Duration,
    rollout_events: u64,
    rollout_changes: u64,
}

pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    // Builds are not timed.
    for name in ["opa-hub", "opa-hub-agent"] {
        program(name)?;
    }
    let world = World::new(options.source, options.pods).await?;
    let mut rows = Vec::new();
    for fields in ["all", "auto"] {
        eprintln!("fields {fields}:");
        rows.push(measure(&world, fields, &options).await?);
    }
    let [all, auto] = &rows[..] else { anyhow::bail!("two measurements are expected") };
    let table = table(&options, all, auto);
    println!("{table}");
    if let Some(out) = &options.out {
        let file = |end: &str| out.join(format!("memory-{}.{end}", options.source.name()));
        std::fs::create_dir_all(out)?;
        std::fs::write(file("md"), &table)?;
        std::fs::write(file("json"), serde_json::to_string_pretty(&results(&options, &rows))? + "\n")?;
        std::fs::write(file("svg"), chart::draw(options.pods, all, auto))?;
        println!("written to {}", out.display());
    }
    Ok(())
}

async fn measure(world: &World, fields: &'static str, options: &Options) -> anyhow::Result<MemoryRow> {
    world.reset_policies().await?;
    let flag = format!("--fields={fields}");
    let flags: Vec<&str> = world.hub_flags.iter().map(String::as_str).chain([flag.as_str()]).collect();
    let started = Instant::now();
    let mut hub = Hub::start_unready(world.dir(), &flags)?;
    hub.wait_ready().await?;
    let hub_ready = started.elapsed();
    let hub_cpu = usage(hub.process.as_ref())?.cpu;
    eprintln!("  hub ready after {:.1} s", hub_ready.as_secs_f64());
    let address = Agent::address()?;
    let opa = Opa::start(&world.assets, world.dir(), Some(&Agent::opa_config(&address)), &[]).await?;
    let started = Instant::now();
    let mut agent = Agent::start(world.dir(), &address, &[&hub.url], &opa.url, Delivery::Bundle, &[])?;
    agent.wait_in_step().await?;
    let load = started.elapsed();
    eprintln!("  OPA loaded after {:.1} s", load.as_secs_f64());
    tokio::time::sleep(OPA_IDLE_TIME).await;
    let snapshot = world.length(&format!("{}/bundles/main", hub.url)).await?;

    let (changes, cpu) = label_changes(world, &hub, &opa, options.changes).await?;
    let opa_settled = usage(opa.process.as_ref())?.rss;
    let count = async |name: &str| hub.metric(&format!("opa_hub_source_{name}_total")).await;
    let before = (count("events").await?, count("changes").await?);
    rollout(world, &hub).await?;
    let after = (count("events").await?, count("changes").await?);
    let forecast = hub.json("/v1/bundles/main").await?["counts"]["opaBytes"].clone();
    let policy_edit = policy_edit(world, &opa, fields).await?;
    agent.wait_in_step().await?;
    let (hub_accounted, rss) = (hub.metric("opa_hub_memory_bytes").await?, usage(hub.process.as_ref())?.rss);
    let share = hub_accounted as f64 / rss as f64;
    anyhow::ensure!(
        ACCOUNTED_RATIO.contains(&share),
        "checking memory failed: the hub accounts for {hub_accounted} of its {rss} resident bytes; see opa_hub_memory_bytes at /metrics"
    );
    Ok(MemoryRow {
        fields,
        hub_ready,
        hub_cpu,
        hub: usage(hub.process.as_ref())?,
        hub_accounted,
        snapshot,
        load,
        opa: usage(opa.process.as_ref())?,
        opa_settled,
        opa_forecast: forecast.as_u64().context("reading the bundle failed: no opaBytes")?,
        agent: usage(agent.process.as_ref())?,
        change_p50: changes[changes.len() / 2],
        change_max: changes[changes.len() - 1],
        change_cpu: cpu,
        policy_edit,
        rollout_events: after.0 - before.0,
        rollout_changes: after.1 - before.1,
    })
}

fn usage(process: Option<&Process>) -> anyhow::Result<Usage> {
    process.context("the process is stopped")?.usage()
}

/// Sorted times from label edit to OPA's data, and the hub's CPU time per change.
async fn label_changes(
    world: &World,
    hub: &Hub,
    opa: &Opa,
    changes: usize,
) -> anyhow::Result<(Vec<Duration>, Duration)> {
    let pod = Nth(0);
    let path = format!("/kubernetes/pods/{}/{}/metadata/labels/team", pod.namespace(), pod.name());
    let before = usage(hub.process.as_ref())?.cpu;
    let mut times = Vec::new();
    for change in 0..changes {
        let team = format!("team-{change}");
        let started = Instant::now();
        world.label(pod, &team).await?;
        eventually("the label reaches OPA", async || {
            let found = opa.data(&path).await.map_err(|error| error.to_string())?;
            equal(&found, &json!(team))
        })
        .await?;
        times.push(started.elapsed());
    }
    let cpu = usage(hub.process.as_ref())?.cpu.saturating_sub(before);
    times.sort_unstable();
    Ok((times, cpu / u32::try_from(changes)?))
}

async fn policy_edit(world: &World, opa: &Opa, fields: &str) -> anyhow::Result<Duration> {
    let pod = Nth(1);
    let started = Instant::now();
    world.edit_policy(fields).await?;
    let input = json!({ "namespace": pod.namespace(), "pod": pod.name() });
    eventually("the edited policy decides", async || {
        let found = opa.decide("/shop/address/node", &input).await.map_err(|error| error.to_string())?;
        equal(&found, &json!([fields, pod.node()]))
    })
    .await?;
    Ok(started.elapsed())
}

async fn rollout(world: &World, hub: &Hub) -> anyhow::Result<()> {
    for index in 0..ROLLOUT_PODS {
        for stage in [Stage::Posted, Stage::Bound, Stage::Started, Stage::Ready, Stage::Gone] {
            let before = hub.metric("opa_hub_source_events_total").await?;
            world.put(Nth(world.pods + index), stage).await?;
            eventually(format!("the hub sees {stage:?}"), async || {
                let events = hub.metric("opa_hub_source_events_total").await.map_err(|e| e.to_string())?;
                if events > before { Ok(()) } else { Err("not yet".to_owned()) }
            })
            .await?;
        }
    }
    Ok(())
}

type Cell<'a> = &'a dyn Fn(&MemoryRow) -> String;

fn table(options: &Options, all: &MemoryRow, auto: &MemoryRow) -> String {
    let megabytes = |bytes: u64| format!("{:.1} MB", bytes as f64 / f64::from(1 << 20));
    let seconds = |time: Duration| format!("{:.2} s", time.as_secs_f64());
    let milliseconds = |time: Duration| format!("{:.1} ms", time.as_secs_f64() * 1000.0);
    let share = |row: &MemoryRow| {
        let share = 100.0 * row.rollout_changes as f64 / row.rollout_events as f64;
        format!("{} of {} ({share:.0} %)", row.rollout_changes, row.rollout_events)
    };
    let rows: [(&str, Cell); 14] = [
        ("OPA, resident, in use", &|row| megabytes(row.opa_settled)),
        ("OPA, resident, at most", &|row| megabytes(row.opa.peak)),
        ("OPA, as the hub forecasts it", &|row| megabytes(row.opa_forecast)),
        ("snapshot", &|row| megabytes(row.snapshot)),
        ("agent, resident, at most", &|row| megabytes(row.agent.peak)),
        ("hub, resident, in use", &|row| megabytes(row.hub.rss)),
        ("hub, resident, at most", &|row| megabytes(row.hub.peak)),
        ("hub, as it accounts for it", &|row| megabytes(row.hub_accounted)),
        ("hub started to ready", &|row| format!("{}, {} CPU", seconds(row.hub_ready), seconds(row.hub_cpu))),
        ("agent started to OPA loaded", &|row| seconds(row.load)),
        ("label change to OPA's data, median (max)", &|row| {
            format!("{} ({})", milliseconds(row.change_p50), milliseconds(row.change_max))
        }),
        ("hub CPU a label change", &|row| milliseconds(row.change_cpu)),
        ("policy edit that reads one field more to its decision", &|row| milliseconds(row.policy_edit)),
        ("events of a rollout that reach agents", &|row| share(row)),
    ];
    let mut text = format!(
        "{} pods of 10 KB from a {}, ten policies: `opa-hub-loadtest memory --source {}`\n\n| | whole objects | `--fields auto` |\n|---|--:|--:|\n",
        options.pods,
        options.source.name(),
        options.source.name()
    );
    for (name, cell) in rows {
        _ = writeln!(text, "| {name} | {} | {} |", cell(all), cell(auto));
    }
    text
}

fn results(options: &Options, rows: &[MemoryRow]) -> Value {
    let usage = |usage: &Usage| json!({ "rssBytes": usage.rss, "peakBytes": usage.peak, "cpuSeconds": usage.cpu.as_secs_f64() });
    let row = |row: &MemoryRow| {
        json!({
            "fields": row.fields, "hubReadySeconds": row.hub_ready.as_secs_f64(),
            "hubReadyCpuSeconds": row.hub_cpu.as_secs_f64(), "hub": usage(&row.hub), "hubAccountedBytes": row.hub_accounted, "snapshotBytes": row.snapshot,
            "loadSeconds": row.load.as_secs_f64(), "opa": usage(&row.opa), "opaSettledBytes": row.opa_settled, "opaForecastBytes": row.opa_forecast,
            "agent": usage(&row.agent), "changeMedianSeconds": row.change_p50.as_secs_f64(),
            "changeMaxSeconds": row.change_max.as_secs_f64(), "changeHubCpuSeconds": row.change_cpu.as_secs_f64(),
            "policyEditSeconds": row.policy_edit.as_secs_f64(), "rolloutEvents": row.rollout_events,
            "rolloutChanges": row.rollout_changes,
        })
    };
    json!({ "pods": options.pods, "source": options.source.name(), "rows": rows.iter().map(row).collect::<Value>() })
}
