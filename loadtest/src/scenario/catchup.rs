//! `catchup`: an agent that was away for thousands of changes, and resumes from what its OPA says that it holds. How many frames it takes, and how long its OPA's queries
//! wait meanwhile.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::Args;
use opa_hub_loadtest::eventually::{equal, eventually};
use opa_hub_loadtest::lab::{Agent, Delivery, Opa, assets};
use serde_json::json;
use tokio::sync::watch;

use super::{Common, command, hub_over};
use crate::histogram::Histogram;
use crate::results::{Goal, Measured, Results};
use crate::stub::Stub;

/// Between two queries.
const QUERY: Duration = Duration::from_millis(1);
const FRAMES: &str = "frames";
const WAITS: &str = "query of OPA meanwhile";

#[derive(Args)]
pub(crate) struct Options {
    /// Changes that it misses
    #[arg(long, default_value_t = 10_000)]
    changes: usize,
    /// Pods among which they are spread
    #[arg(long, default_value_t = 6000)]
    pods: usize,
    #[command(flatten)]
    common: Common,
}

pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let Options { changes, pods, common } = options;
    let mut runs = Vec::new();
    for _ in 0..common.runs {
        runs.push(vec![once(changes, pods).await?]);
    }
    let results = Results {
        scenario: "catchup".into(),
        what: format!("An agent {changes} changes of {pods} pods behind"),
        command: command("catchup", &[("changes", changes), ("pods", pods), ("runs", common.runs)]),
        goals: vec![
            Goal::at_most("opa-hub", FRAMES, 1.0),
            Goal::at_most("opa-hub", &format!("{WAITS}, max"), 50.0),
        ],
        runs,
    };
    results.finish(common.out.as_deref())
}

async fn once(changes: usize, pods: usize) -> anyhow::Result<Measured> {
    let assets = tokio::task::spawn_blocking(assets::folder).await??;
    let dir = tempfile::tempdir()?;
    let stub = Stub::start(dir.path(), pods).await?;
    let hub = hub_over(&stub, dir.path()).await?;
    let opa = Opa::start(&assets, dir.path(), None, &[]).await?;
    let mut agent = Agent::start(dir.path(), &Agent::address()?, &[&hub.url], &opa.url, Delivery::Rest, &[])?;
    agent.wait_ready().await?;
    agent.kill();
    for number in 1..=changes {
        stub.change(number % pods, number as u64);
    }
    eventually("the hub has the last change", async || {
        let events = hub.metric("opa_hub_source_events_total").await.map_err(|error| error.to_string())?;
        equal(&(events >= (pods + changes) as u64), &true)
    })
    .await?;
    let queries = Histogram::new();
    let (stop, stopped) = watch::channel(false);
    let started = Instant::now();
    agent.spawn()?;
    let asks = async {
        while !*stopped.borrow() {
            let asked = Instant::now();
            let pod = opa.data("/kubernetes/pods/team-000/web-00001/status").await?;
            ensure!(!pod.is_null(), "OPA lost a pod");
            queries.record(asked.elapsed());
            tokio::time::sleep(QUERY).await;
        }
        anyhow::Ok(())
    };
    let arrives = async {
        let last = changes % pods;
        let path = format!("/kubernetes/pods/team-{:03}/web-{last:05}/metadata/labels/round", last / 100);
        let arrived = eventually("the last change", async || {
            equal(&opa.data(&path).await.map_err(|error| error.to_string())?, &json!(changes.to_string()))
        });
        arrived.await?;
        stop.send_replace(true);
        anyhow::Ok(())
    };
    let (asked, arrived) = tokio::join!(asks, arrives);
    asked?;
    arrived?;
    let mut measured = Measured::new("opa-hub");
    measured.add("until OPA has the last change", "ms", started.elapsed().as_secs_f64() * 1000.0);
    agent.wait_ready().await?;
    measured.add(FRAMES, "", frames(&agent).await? as f64);
    measured.add_delays(WAITS, &queries);
    let done = &agent.status().await?["done"];
    measured.add("reconciles", "", done["reconciles"].as_u64().unwrap_or_default() as f64);
    Ok(measured)
}

async fn frames(agent: &Agent) -> anyhow::Result<u64> {
    agent.status().await?["done"]["frames"].as_u64().context("a count of frames")
}
