//! `catchup`: an agent that was away for thousands of changes, and resumes from what its OPA says that it holds. How
//! many frames and PATCHes it takes, and how long its OPA's queries wait meanwhile.

use std::cell::Cell;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::Args;
use opa_hub_loadtest::eventually::{equal, eventually};
use opa_hub_loadtest::lab::{Agent, Delivery, Opa, assets};

use super::{Common, at_least, command, hub_over};
use crate::histogram::Histogram;
use crate::results::{Goal, Measured, Results};
use crate::stub::Stub;

/// Between two queries.
const QUERY: Duration = Duration::from_millis(2);
/// Queries before the agent starts, too: what they take by themselves.
const ALONE: Duration = Duration::from_secs(2);
/// Of the pods of a namespace so many in a hundred change: of more the whole namespace is sent, in fewer operations.
const CHANGED: usize = 40;
const FRAMES: &str = "frames";
const WAITS: &str = "query of OPA meanwhile";

#[derive(Args)]
pub(crate) struct Options {
    /// Changes that it misses
    #[arg(long, default_value_t = 10_000, value_parser = at_least::<1>)]
    changes: usize,
    /// Pods, of which 40 in a hundred change
    #[arg(long, default_value_t = 20_000, value_parser = at_least::<100>)]
    pods: usize,
    #[command(flatten)]
    common: Common,
}

pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let Options { changes, pods, common } = options;
    let mut results = Results::new(
        "catchup",
        format!("An agent {changes} changes behind, of {pods} pods of 300 bytes"),
        command("catchup", &[("changes", changes), ("pods", pods), ("runs", common.runs)]),
        vec![Goal::at_most("opa-hub", FRAMES, 1.0), Goal::at_most("opa-hub", &format!("{WAITS}, max"), 50.0)],
    );
    for run in 0..common.runs {
        eprintln!("run {} of {}", run + 1, common.runs);
        results.push(vec![once(changes, pods).await?], common.out.as_deref())?;
    }
    results.finish(common.out.as_deref());
    Ok(())
}

async fn once(changes: usize, pods: usize) -> anyhow::Result<Measured> {
    let assets = tokio::task::spawn_blocking(assets::folder).await??;
    let dir = tempfile::tempdir()?;
    let stub = Stub::start(dir.path(), pods).await?;
    let hub = hub_over(&stub, dir.path()).await?;
    let opa = Opa::start(&assets, dir.path(), None, &[]).await?;
    let mut agent = Agent::start(dir.path(), &Agent::address()?, &[&hub.url], &opa.url, Delivery::Rest, &[])?;
    agent.wait_in_step().await?;
    agent.kill();
    let changed: Vec<_> = (0..pods).filter(|pod| pod % 100 < CHANGED).collect();
    for number in 0..changes {
        stub.change(changed[number % changed.len()], number as u64 + 1);
    }
    eventually("the hub has the last change", async || {
        let events = hub.metric("opa_hub_source_events_total").await.map_err(|error| error.to_string())?;
        equal(&(events >= (pods + changes) as u64), &true)
    })
    .await?;
    let alone = Histogram::new();
    let stop = Cell::new(false);
    let pause = async {
        tokio::time::sleep(ALONE).await;
        stop.set(true);
    };
    tokio::join!(ask(&opa, &alone, &stop), pause).0?;
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
    let (asked, arrived) = tokio::join!(ask(&opa, &queries, &stop), arrives);
    asked?;
    let mut measured = Measured::new("opa-hub");
    measured.add("until OPA has all that the hub has", "ms", arrived?.as_secs_f64() * 1000.0);
    let held = opa.data("/kubernetes/pods").await?;
    ensure!(held == stub.pods(), "OPA holds other pods than the source");
    let done = &agent.status().await?["done"];
    let count = |name: &str| done[name].as_u64().with_context(|| format!("a count of {name}"));
    measured.add(FRAMES, "", count("frames")? as f64);
    measured.add("operations in it", "", changes.min(changed.len()) as f64);
    measured.add("PATCHes", "", patches(&opa).await? - before);
    measured.add("reconciles", "", count("reconciles")? as f64);
    measured.add_delays("query of OPA before", &alone);
    measured.add_delays(WAITS, &queries);
    Ok(measured)
}

/// That OPA took so far, by its own count.
async fn patches(opa: &Opa) -> anyhow::Result<f64> {
    let text =
        opa_hub_loadtest::lab::http()?.get(format!("{}/metrics", opa.url)).send().await?.text().await?;
    let counts = text.lines().filter(|line| line.starts_with("http_request_duration_seconds_count"));
    let patches = counts.filter(|line| line.contains("method=\"patch\""));
    Ok(patches.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
}

/// Asks OPA of a pod again and again, when it is due, whatever the query before takes.
async fn ask(opa: &Opa, queries: &Histogram, stop: &Cell<bool>) -> anyhow::Result<()> {
    let mut due = Instant::now();
    while !stop.get() {
        let pod = opa.data("/kubernetes/pods/team-000/web-00001/status").await?;
        ensure!(!pod.is_null(), "OPA lost a pod");
        queries.record(due.elapsed());
        due += QUERY;
        tokio::time::sleep_until(due.into()).await;
    }
    Ok(())
}
