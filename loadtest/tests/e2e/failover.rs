//! Fail-over between hubs: agents switch, report correctly whether they are up to date, and retain their content.

use std::path::Path;

use opa_hub_loadtest::eventually::{equal, eventually};
use opa_hub_loadtest::lab::{Agent, Delivery, Hub, Opa, assets};
use serde_json::{Value, json};

use crate::world::write_manifest;

fn write(dir: &Path, value: u64) -> anyhow::Result<()> {
    let manifest = json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": { "name": "m", "namespace": "ns", "labels": { "openpolicyagent.org/data": "opa" } },
        "data": { "k": json!({ "value": value }).to_string() },
    });
    write_manifest(dir, "m.json", &manifest)
}

async fn holds(opa: &Opa, value: u64) -> anyhow::Result<()> {
    eventually("the value reaches OPA", async || {
        equal(&opa.data("/ns/m/k/value").await.map_err(|error| error.to_string())?, &json!(value))
    })
    .await
    .map(drop)
}

async fn is_behind(agent: &Agent, because: &str) -> anyhow::Result<()> {
    eventually(format!("behind: {because}"), async || {
        let status = agent.status().await.map_err(|error| error.to_string())?;
        if status["behind"].to_string().contains(because) { Ok(()) } else { Err(status.to_string()) }
    })
    .await
    .map(drop)
}

#[tokio::test]
async fn agent_fails_over_and_retains_content() -> anyhow::Result<()> {
    let assets = tokio::task::spawn_blocking(assets::folder).await??;
    let work = tempfile::tempdir()?;
    let manifests = tempfile::tempdir()?;
    let folder = manifests.path().display().to_string();
    write(manifests.path(), 0)?;
    let mut hubs = [
        Hub::start(work.path(), &["--manifests", &folder]).await?,
        Hub::start(work.path(), &["--manifests", &folder]).await?,
    ];
    let mut opa = Opa::start(&assets, work.path(), None, &[]).await?;
    let urls = [hubs[0].url.clone(), hubs[1].url.clone()];
    let urls = urls.each_ref().map(String::as_str);
    let flags = ["--unready-after", "1"];
    let mut agent = Agent::start(work.path(), &Agent::address()?, &urls, &opa.url, Delivery::Rest, &flags)?;
    agent.wait_in_step().await?;
    holds(&opa, 0).await?;

    // The current hub stops: the agent resumes by frame at the other.
    let followed = usize::from(hubs[1].metric("opa_hub_agents").await? == 1);
    hubs[followed].kill();
    write(manifests.path(), 1)?;
    holds(&opa, 1).await?;
    agent.wait_in_step().await?;
    let done = &agent.status().await?["done"];
    assert_eq!((&done["snapshots"], &done["reconciles"]), (&json!(1), &json!(0)), "{done}");

    // Both stop: OPA keeps its content, and the agent reports staleness.
    hubs[1 - followed].kill();
    is_behind(&agent, "no stream from the hub").await?;
    has_readiness(&agent, false, "OPA is out of step for").await?;
    assert_eq!(opa.data("/ns/m/k/value").await?, json!(1));
    // OPA restarts empty, which the agent reports.
    opa.process = None;
    opa.restart().await?;
    is_behind(&agent, "OPA has not applied the hub's latest revision").await?;
    assert_eq!(opa.data("/ns/m").await?, Value::Null);
    // One hub restarts, and all content returns.
    hubs[followed].spawn()?;
    agent.wait_in_step().await?;
    holds(&opa, 1).await
}

async fn has_readiness(agent: &Agent, is_ready: bool, words: &str) -> anyhow::Result<()> {
    eventually(format!("readiness: {is_ready}, {words}"), async || {
        let found = agent.readiness().await.map_err(|error| error.to_string())?;
        if found.0 == is_ready && found.1.contains(words) { Ok(()) } else { Err(format!("{found:?}")) }
    })
    .await
    .map(drop)
}

/// A hub outage affects no application: a loaded OPA stays ready until it restarts.
#[tokio::test]
async fn loaded_opa_stays_ready() -> anyhow::Result<()> {
    let assets = tokio::task::spawn_blocking(assets::folder).await??;
    let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
    write(manifests.path(), 0)?;
    let mut hub = Hub::start(work.path(), &["--manifests", &manifests.path().display().to_string()]).await?;
    let mut opa = Opa::start(&assets, work.path(), None, &[]).await?;
    let state = work.path().join("state").display().to_string();
    let flags = ["--state-dir", state.as_str()];
    let mut agent =
        Agent::start(work.path(), &Agent::address()?, &[&hub.url], &opa.url, Delivery::Rest, &flags)?;
    agent.wait_in_step().await?;
    // Not on disk before the kill.
    write(manifests.path(), 1)?;
    holds(&opa, 1).await?;
    hub.kill();
    is_behind(&agent, "no stream from the hub").await?;
    has_readiness(&agent, true, "ok").await?;
    // A restarted agent resumes from OPA's marker.
    agent.kill();
    agent.spawn()?;
    has_readiness(&agent, true, "ok").await?;
    is_behind(&agent, "no stream from the hub").await?;
    assert_eq!(agent.readiness().await?, (true, "ok\n".to_owned()));
    let metrics = reqwest::get(format!("{}/metrics", agent.url)).await?.text().await?;
    assert!(metrics.contains("\nopa_hub_agent_ready 1\n"), "{metrics}");
    assert!(!metrics.contains("\nopa_hub_agent_disconnected_seconds 0\n"), "{metrics}");
    agent.kill();
    std::fs::remove_dir_all(&state)?;
    agent.spawn()?;
    has_readiness(&agent, true, "ok").await?;
    opa.process = None;
    opa.restart().await?;
    has_readiness(&agent, false, "OPA is not loaded").await?;
    hub.spawn()?;
    has_readiness(&agent, true, "ok").await?;
    agent.wait_in_step().await
}

/// A hanging hub closes no connection; agents time out.
#[tokio::test]
async fn agents_leave_a_hanging_hub() -> anyhow::Result<()> {
    let assets = tokio::task::spawn_blocking(assets::folder).await??;
    let work = tempfile::tempdir()?;
    let manifests = tempfile::tempdir()?;
    let folder = manifests.path().display().to_string();
    write(manifests.path(), 0)?;
    let hubs = [
        Hub::start(work.path(), &["--manifests", &folder]).await?,
        Hub::start(work.path(), &["--manifests", &folder]).await?,
    ];
    let opa = Opa::start(&assets, work.path(), None, &[]).await?;
    let urls = hubs.each_ref().map(|hub| hub.url.as_str());
    let mut agent = Agent::start(work.path(), &Agent::address()?, &urls, &opa.url, Delivery::Rest, &[])?;
    agent.wait_in_step().await?;
    let followed = usize::from(hubs[1].metric("opa_hub_agents").await? == 1);
    hubs[followed].process.as_ref().expect("the hub runs").suspend()?;
    write(manifests.path(), 1)?;
    holds(&opa, 1).await
}

/// Content or markers removed by other clients are restored.
#[tokio::test]
async fn agent_restores_content_removed_by_others() -> anyhow::Result<()> {
    let assets = tokio::task::spawn_blocking(assets::folder).await??;
    let work = tempfile::tempdir()?;
    let manifests = tempfile::tempdir()?;
    write(manifests.path(), 0)?;
    let other = json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": { "name": "other", "namespace": "ns", "labels": { "openpolicyagent.org/data": "opa" } },
        "data": { "k": "{}" },
    });
    std::fs::write(manifests.path().join("other.json"), other.to_string())?;
    let hub = Hub::start(work.path(), &["--manifests", &manifests.path().display().to_string()]).await?;
    let opa = Opa::start(&assets, work.path(), None, &[]).await?;
    let mut agent =
        Agent::start(work.path(), &Agent::address()?, &[&hub.url], &opa.url, Delivery::Rest, &[])?;
    agent.wait_in_step().await?;
    let http = opa_hub_loadtest::lab::http()?;
    for (value, path) in [(1, "/system/opahub/main"), (2, "/system/opahub"), (3, "/ns/m"), (4, "/ns")] {
        http.delete(format!("{}/v1/data{path}", opa.url)).send().await?.error_for_status()?;
        write(manifests.path(), value)?;
        holds(&opa, value).await?;
        holds_other(&opa).await?;
        agent.wait_in_step().await?;
    }
    // The names in a marker of unknown origin are used.
    for (value, marker) in [(5, "{\"revision\": 5}"), (6, "{\"revision\": 5, \"dirs\": {\"/ns/gone\": 1}}")] {
        for (path, body) in [("ns/gone", "{\"k\": 1}"), ("system/opahub/main", marker)] {
            let put = http.put(format!("{}/v1/data/{path}", opa.url)).body(body.to_owned());
            put.send().await?.error_for_status()?;
        }
        write(manifests.path(), value)?;
        holds(&opa, value).await?;
    }
    assert_eq!(opa.data("/ns/gone").await?, Value::Null);
    agent.wait_in_step().await
}

/// Waits until the other directory is complete.
async fn holds_other(opa: &Opa) -> anyhow::Result<()> {
    eventually("the other directory", async || {
        equal(&opa.data("/ns/other/k").await.map_err(|error| error.to_string())?, &json!({}))
    })
    .await
    .map(drop)
}
