//! API servers that deny, lack or fail requests of the hub.

use std::path::Path;
use std::process::Command;

use anyhow::Context as _;
use opa_hub_loadtest::cluster::{Cluster, DATA};
use opa_hub_loadtest::eventually::{equal, eventually};
use opa_hub_loadtest::lab::apiserver::PLAIN_USER;
use opa_hub_loadtest::lab::process::Process;
use opa_hub_loadtest::lab::{ControlPlane, Hub};
use serde_json::{Value, json};

/// Waits until `/readyz` contains this reason for a source.
async fn is_pending(hub: &Hub, source: &str, reason: &str) -> anyhow::Result<()> {
    eventually(format!("{source} is not ready"), async || {
        let ready = hub.json("/readyz").await.map_err(|error| error.to_string())?;
        let found = ready["pending"][source].as_str().unwrap_or_default();
        if found.contains(reason) { Ok(()) } else { Err(ready.to_string()) }
    })
    .await
    .map(drop)
}

async fn modules_and_entries(hub: &Hub) -> Result<(Value, Value), String> {
    let bundle = hub.json("/v1/bundles/main").await.map_err(|error| error.to_string())?;
    Ok((bundle["counts"]["modules"].clone(), bundle["counts"]["entries"].clone()))
}

#[tokio::test]
async fn missing_permissions_are_reported() -> anyhow::Result<()> {
    let plane = ControlPlane::start().await?;
    let kubeconfig = plane.plain_kubeconfig.as_ref().context("the lab has a user without permissions")?;
    let cluster = Cluster { client: plane.client().await? };
    let kubeconfig = kubeconfig.display().to_string();
    let mut hub =
        Hub::start_unready(plane.dir.path(), &["--kubeconfig", &kubeconfig, "--replicate", "v1/pods"])?;
    is_pending(&hub, "v1/pods", "grant the hub the verbs list, watch on v1/pods").await?;
    is_pending(&hub, "policies (v1/configmaps)", "grant the hub the verbs list, watch on v1/configmaps")
        .await?;
    let reads = json!({ "apiGroups": [""], "resources": ["pods", "configmaps"], "verbs": ["list", "watch"] });
    cluster.grant("hub", PLAIN_USER, &[reads]).await?;
    hub.wait_ready().await
}

#[tokio::test]
async fn hub_waits_for_a_missing_resource() -> anyhow::Result<()> {
    let plane = ControlPlane::start().await?;
    let cluster = Cluster { client: plane.client().await? };
    let kubeconfig = plane.kubeconfig.display().to_string();
    let flags = [
        "--kubeconfig",
        &kubeconfig,
        "--replicate",
        "example.com/v1/widgets",
        "--replicate-cluster",
        "v1/pods",
    ];
    let mut hub = Hub::start_unready(plane.dir.path(), &flags)?;
    is_pending(&hub, "v1/pods", "v1/pods is namespaced; use --replicate instead").await?;
    drop(hub);
    hub = Hub::start_unready(plane.dir.path(), &flags[..4])?;
    is_pending(&hub, "example.com/v1/widgets", "does not serve example.com/v1/widgets").await?;
    cluster.widgets().await?;
    hub.wait_ready().await?;
    let widget =
        json!({ "apiVersion": "example.com/v1", "kind": "Widget", "metadata": { "name": "w" }, "size": 1.5 });
    cluster.create("/apis/example.com/v1/namespaces/default/widgets", &widget).await?;
    eventually("the widget is served", async || {
        equal(&modules_and_entries(&hub).await?, &(json!(0), json!(1)))
    })
    .await?;
    Ok(())
}

/// Without streaming lists (KEP-3157) the hub lists by pages, with identical bytes.
#[tokio::test]
async fn hub_lists_by_pages_without_streaming_lists() -> anyhow::Result<()> {
    let plane = ControlPlane::start_with(&["--feature-gates=WatchList=false"]).await?;
    let cluster = Cluster { client: plane.client().await? };
    for name in ["a", "b"] {
        cluster.pod("default", name, &[("app", name)]).await?;
    }
    let kubeconfig = plane.kubeconfig.display().to_string();
    let flags = ["--kubeconfig", &kubeconfig, "--replicate", "v1/pods"];
    let hub = Hub::start(plane.dir.path(), &flags).await?;
    let listed = hub.json("/v1/bundles/main").await?;
    assert_eq!(listed["counts"]["entries"], 2, "{listed}");
    let log = hub.process.as_ref().map(Process::log).unwrap_or_default();
    assert!(log.contains("using pages"), "{log}");
    cluster.pod("default", "c", &[]).await?;
    eventually("the third pod", async || equal(&modules_and_entries(&hub).await?, &(json!(0), json!(3))))
        .await?;
    let watched = hub.json("/v1/bundles/main").await?;
    // I2: another hub lists objects that this one watched.
    let other = Hub::start(plane.dir.path(), &flags).await?;
    assert_eq!(other.json("/v1/bundles/main").await?["revision"], watched["revision"]);
    Ok(())
}

/// A restored server accepts a watch from a future version, but sends nothing until reaching it.
#[tokio::test]
async fn restored_source_is_relisted() -> anyhow::Result<()> {
    let mut plane = ControlPlane::start().await?;
    let cluster = Cluster { client: plane.client().await? };
    let write = async |value: u64| {
        cluster.configmap("default", "m", Some(DATA), &[("k", &json!({ "value": value }).to_string())]).await
    };
    write(0).await?;
    let hub =
        Hub::start(plane.dir.path(), &["--kubeconfig", &plane.kubeconfig.display().to_string()]).await?;
    let revision =
        async || -> anyhow::Result<Value> { Ok(hub.json("/v1/bundles/main").await?["revision"].clone()) };
    let before = revision().await?;
    let copy = |from: &Path, to: &Path| Command::new("cp").arg("-r").args([from, to]).status().map(drop);
    let backup = plane.dir.path().join("etcd-before");
    plane.while_stopped(|data| copy(data, &backup)).await?;
    for value in 1..=200 {
        write(value).await?;
    }
    let is_unchanged = async |expected: bool| {
        eventually("the hub has the event", async || {
            let now = revision().await.map_err(|error| error.to_string())?;
            equal(&(now == before), &expected)
        })
        .await
    };
    is_unchanged(false).await?;
    plane
        .while_stopped(|data| {
            std::fs::remove_dir_all(data)?;
            copy(&backup, data)
        })
        .await?;
    is_unchanged(true).await.map(drop)
}
