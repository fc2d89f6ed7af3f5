//! `catchup`: an agent resumes thousands of changes behind, while its OPA serves queries.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::Args;
use opa_hub_loadtest::eventually::{equal, eventually};
use opa_hub_loadtest::lab::{Agent, Delivery, Opa, assets};

use super::{Common, address, at_least, at_rate, command, hub_over};
use crate::fake_apiserver::{FakeApiServer, large_pod, small_pod};
use crate::histogram::Histogram;
use crate::results::{Goal, Measurement, Results};
use crate::swarm::{Schedule, Start, Swarm};

const QUERY_INTERVAL: Duration = Duration::from_millis(2);
/// Queries before the agent starts, for comparison.
const IDLE_QUERY_TIME: Duration = Duration::from_secs(2);
/// In percent. Above this, the hub sends the whole namespace.
const CHANGED_PERCENT: usize = 40;
/// Per second: slow enough for nearly one commit each, which exceeds the history.
const SPREAD_RATE: f64 = 500.0;
/// Divisor: a pod of 10 KB uses 90 KB of OPA's memory.
const LARGE_DIVISOR: usize = 10;
const FRAMES: &str = "frames";
const RECONCILES: &str = "reconciles";
const BURST: &str = "opa-hub";
const SPREAD: &str = "opa-hub, changes spread";
const LARGE: &str = "opa-hub, pods of 10 KB";
const WAITS: &str = "query of OPA meanwhile";

#[derive(Args)]
pub(crate) struct Options {
    /// Missed changes
    #[arg(long, default_value_t = 10_000, value_parser = at_least::<1>)]
    changes: usize,
    /// Number of pods; 40 % of them change
    #[arg(long, default_value_t = 20_000, value_parser = at_least::<100>)]
    pods: usize,
    #[command(flatten)]
    common: Common,
}

pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let Options { changes, pods, common } = options;
    let mut results = Results::new(
        "catchup",
        format!(
            "An agent {changes} changes behind, of {pods} pods of 300 bytes; a tenth of both with pods of 10 KB"
        ),
        command("catchup", &[("changes", changes), ("pods", pods), ("runs", common.runs)]),
        vec![
            Goal::at_most(BURST, FRAMES, 1.0),
            Goal::at_most(BURST, &format!("{WAITS}, max"), 50.0),
            // Beyond the history, one repair by digests suffices.
            Goal::at_most(SPREAD, RECONCILES, 1.0),
            Goal::at_most(SPREAD, &format!("{WAITS}, max"), 50.0),
            Goal::at_most(LARGE, RECONCILES, 1.0),
            Goal::at_most(LARGE, &format!("{WAITS}, max"), 50.0),
        ],
    );
    for run in 0..common.runs {
        eprintln!("run {} of {}", run + 1, common.runs);
        let mut measured = Vec::new();
        for subject in [BURST, SPREAD, LARGE] {
            let divisor = if subject == LARGE { LARGE_DIVISOR } else { 1 };
            measured.push(run_once(subject, (changes / divisor).max(1), pods / divisor).await?);
        }
        results.push(measured, common.out.as_deref())?;
    }
    results.finish(common.out.as_deref());
    Ok(())
}

async fn run_once(subject: &str, changes: usize, pods: usize) -> anyhow::Result<Measurement> {
    let assets = tokio::task::spawn_blocking(assets::folder).await??;
    let dir = tempfile::tempdir()?;
    let factory = if subject == LARGE { large_pod } else { small_pod };
    let apiserver = FakeApiServer::start_with(dir.path(), pods, factory).await?;
    let hub = hub_over(&apiserver, dir.path()).await?;
    let opa = Opa::start(&assets, dir.path(), None, &[]).await?;
    let mut agent = Agent::start(dir.path(), &Agent::address()?, &[&hub.url], &opa.url, Delivery::Rest, &[])?;
    agent.wait_in_step().await?;
    agent.kill();
    let start = Arc::new(Start::fetch(&hub.url).await?);
    let commits = hub.metric("opa_hub_view_changes_total").await?;
    let changed: Vec<_> = (0..pods).filter(|pod| pod % 100 < CHANGED_PERCENT).collect();
    let change = |number: u64| apiserver.change(changed[number as usize % changed.len()], number);
    if subject == SPREAD {
        let time = Duration::from_secs_f64((changes as f64 + 0.5) / SPREAD_RATE);
        at_rate(&Schedule::default(), SPREAD_RATE, time, async |number, _| {
            change(number);
            Ok(())
        })
        .await?;
    } else {
        (1..=changes as u64).for_each(change);
    }
    eventually("the hub has the last change", async || {
        let events = hub.metric("opa_hub_source_events_total").await.map_err(|error| error.to_string())?;
        equal(&(events >= (pods + changes) as u64), &true)
    })
    .await?;
    let commits = hub.metric("opa_hub_view_changes_total").await? - commits;
    let alone = Histogram::new();
    let stop = Cell::new(false);
    let pause = async {
        tokio::time::sleep(IDLE_QUERY_TIME).await;
        stop.set(true);
    };
    let path = apiserver.status_path(1);
    tokio::join!(query(&opa, &path, &alone, &stop), pause).0?;
    let before = patches(&opa).await?;
    let (queries, started) = (Histogram::new(), Instant::now());
    stop.set(false);
    agent.spawn()?;
    let newest = hub.json("/v1/bundles/main").await?["revision"].take();
    let arrives = async {
        let arrived = eventually("OPA has all that the hub has", async || {
            let status = agent.status().await.map_err(|error| error.to_string())?;
            equal(&status["held"], &newest)
        });
        let arrived = arrived.await.map(|_| started.elapsed());
        stop.set(true);
        arrived
    };
    let (answered, arrived) = tokio::join!(query(&opa, &path, &queries, &stop), arrives);
    answered?;
    let mut measured = Measurement::new(subject);
    measured.add("commits that it missed", "", commits as f64);
    measured.add("until OPA has all that the hub has", "ms", arrived?.as_secs_f64() * 1000.0);
    let found = opa.data("/kubernetes/pods").await?;
    ensure!(found == apiserver.pods(), "comparing pods failed: OPA and the source differ");
    let done = &agent.status().await?["done"];
    let count = |name: &str| {
        done[name].as_u64().with_context(|| format!("reading the agent's status failed: no {name}"))
    };
    measured.add(FRAMES, "", count("frames")? as f64);
    if count("frames")? > 0 {
        // A second agent receives the same frame and counts its operations.
        let mut second = Swarm::open(start, vec![address(&hub)?], Schedule::default(), 1, &[]).await?;
        second.reach(changes as u64, 0).await?;
        measured.add("operations in it", "", second.counts().operations.load(Relaxed) as f64);
    }
    measured.add("PATCHes", "", patches(&opa).await? - before);
    measured.add(RECONCILES, "", count("reconciles")? as f64);
    measured.add_delays("query of OPA before", &alone);
    measured.add_delays(WAITS, &queries);
    Ok(measured)
}

async fn patches(opa: &Opa) -> anyhow::Result<f64> {
    let text =
        opa_hub_loadtest::lab::http()?.get(format!("{}/metrics", opa.url)).send().await?.text().await?;
    let counts = text.lines().filter(|line| line.starts_with("http_request_duration_seconds_count"));
    let patches = counts.filter(|line| line.contains("method=\"patch\""));
    Ok(patches.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
}

/// Queries are due at fixed times, regardless of earlier latency.
async fn query(opa: &Opa, path: &str, queries: &Histogram, stop: &Cell<bool>) -> anyhow::Result<()> {
    let mut due = Instant::now();
    while !stop.get() {
        let pod = opa.data(path).await?;
        ensure!(!pod.is_null(), "querying OPA failed: a pod is missing");
        queries.record(due.elapsed());
        due += QUERY_INTERVAL;
        tokio::time::sleep_until(due.into()).await;
    }
    Ok(())
}
