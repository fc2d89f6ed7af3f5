//! Two hub replicas on one API server: agents switch between them without rollback.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use opa_hub_loadtest::cluster::{Cluster, DATA};
use opa_hub_loadtest::eventually::{equal, eventually};
use opa_hub_loadtest::lab::blackhole_proxy::BlackholeProxy;
use opa_hub_loadtest::lab::{Agent, ControlPlane, Delivery, Hub, Opa, assets, free_port};
use serde_json::{Value, json};

use crate::world::write_manifest;

struct Replicas {
    _plane: ControlPlane,
    cluster: Cluster,
    /// Proxies between hubs and API server.
    proxies: [BlackholeProxy; 2],
    hubs: [Hub; 2],
    opa: Opa,
    agent: Agent,
}

impl Replicas {
    async fn start() -> anyhow::Result<Self> {
        let plane = ControlPlane::start().await?;
        let cluster = Cluster { client: plane.client().await? };
        cluster.namespace("opa").await?;
        let proxies = [plane.blackhole_proxy().await?, plane.blackhole_proxy().await?];
        let dir = plane.dir.path();
        let hub = async |valve: &BlackholeProxy| {
            let kubeconfig = plane.kubeconfig_through(valve)?.display().to_string();
            Hub::start(dir, &["--kubeconfig", &kubeconfig]).await
        };
        let hubs = [hub(&proxies[0]).await?, hub(&proxies[1]).await?];
        let opa = Opa::start(&plane.assets, dir, None, &[]).await?;
        let urls = hubs.each_ref().map(|hub| hub.url.as_str());
        let flags = ["--unready-after", "1"];
        let mut agent = Agent::start(dir, &Agent::address()?, &urls, &opa.url, Delivery::Rest, &flags)?;
        agent.wait_in_step().await?;
        Ok(Self { _plane: plane, cluster, proxies, hubs, opa, agent })
    }

    async fn write(&self, value: u64) -> anyhow::Result<()> {
        let value = json!({ "value": value }).to_string();
        self.cluster.configmap("opa", "m", Some(DATA), &[("k", &value)]).await
    }

    async fn value(&self) -> anyhow::Result<Value> {
        self.opa.data("/opa/m/k/value").await
    }

    async fn holds(&self, value: u64) -> anyhow::Result<()> {
        eventually(format!("{value} reaches OPA"), async || {
            equal(&self.value().await.map_err(|error| error.to_string())?, &json!(value))
        })
        .await
        .map(drop)
    }

    /// I2.
    async fn agree(&self) -> anyhow::Result<()> {
        eventually("both hubs serve one revision", async || {
            let one = self.hubs[0].json("/v1/bundles/main").await.map_err(|error| error.to_string())?;
            let other = self.hubs[1].json("/v1/bundles/main").await.map_err(|error| error.to_string())?;
            equal(&one["revision"], &other["revision"])
        })
        .await
        .map(drop)
    }

    /// The hub that the agent follows.
    async fn followed(&self) -> anyhow::Result<usize> {
        let (followed, _) = eventually("the agent has a hub", async || {
            for (index, hub) in self.hubs.iter().enumerate().filter(|(_, hub)| hub.process.is_some()) {
                if hub.metric("opa_hub_agents").await.map_err(|error| error.to_string())? == 1 {
                    return Ok(index);
                }
            }
            Err("none is".to_owned())
        })
        .await?;
        Ok(followed)
    }

    async fn has_agents(&self, hub: usize, count: u64) -> anyhow::Result<()> {
        eventually(format!("{count} agents at hub {hub}"), async || {
            let agents = self.hubs[hub].metric("opa_hub_agents").await.map_err(|error| error.to_string())?;
            equal(&agents, &count)
        })
        .await
        .map(drop)
    }

    async fn done(&self) -> anyhow::Result<(u64, u64)> {
        let done = &self.agent.status().await?["done"];
        let count = |name: &str| done[name].as_u64().context("counter missing");
        Ok((count("snapshots")?, count("reconciles")?))
    }

    async fn is_behind(&self, because: &str) -> anyhow::Result<()> {
        eventually(format!("behind: {because}"), async || {
            let status = self.agent.status().await.map_err(|error| error.to_string())?;
            if status["behind"].to_string().contains(because) { Ok(()) } else { Err(status.to_string()) }
        })
        .await
        .map(drop)
    }
}

#[tokio::test]
async fn agents_fail_over_and_back_by_frames() -> anyhow::Result<()> {
    let mut world = Replicas::start().await?;
    world.write(0).await?;
    world.holds(0).await?;
    for value in 1..=2 {
        // Shutdown moves the agents; the change follows during the outage.
        let followed = world.followed().await?;
        let process = world.hubs[followed].process.as_mut().context("the hub runs")?;
        process.terminate()?;
        process.ended().await?;
        world.hubs[followed].kill();
        world.write(value).await?;
        world.holds(value).await?;
        assert_eq!(world.followed().await?, 1 - followed);
        world.hubs[followed].spawn()?;
        world.hubs[followed].wait_ready().await?;
    }
    world.agent.wait_in_step().await?;
    // A restarted hub has one revision, so one reconcile is allowed.
    let (snapshots, reconciles) = world.done().await?;
    assert!(snapshots == 1 && reconciles <= 1, "{snapshots} snapshots, {reconciles} reconciles");

    // All hubs restart, after a deletion that none observed.
    world.hubs.iter_mut().for_each(Hub::kill);
    world.cluster.delete_configmap("opa", "m").await?;
    world.cluster.configmap("opa", "n", Some(DATA), &[("k", "{}")]).await?;
    let (_, before) = world.done().await?;
    world.hubs[0].spawn()?;
    eventually("OPA has the existing objects", async || {
        let found = world.opa.data("/opa").await.map_err(|error| error.to_string())?;
        equal(&found, &json!({ "n": { "k": {} } }))
    })
    .await?;
    world.agent.wait_in_step().await?;
    assert_eq!(world.done().await?, (1, before + 1));
    Ok(())
}

/// An agent with one configured hub is redirected to another, and returns after that stops.
#[tokio::test]
async fn stopping_hub_redirects_agents() -> anyhow::Result<()> {
    let assets = tokio::task::spawn_blocking(assets::folder).await??;
    let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let write = |value: u64| {
        let manifest = json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": { "name": "m", "namespace": "opa", "labels": { "openpolicyagent.org/data": "opa" } },
            "data": { "k": json!({ "value": value }).to_string() },
        });
        write_manifest(manifests.path(), "m.json", &manifest)
    };
    write(1)?;
    let folder = manifests.path().display().to_string();
    // One replica does not exist; the stopping one is not ready.
    let replicas = [free_port()?, free_port()?, free_port()?].map(|port| format!("127.0.0.1:{port}"));
    let replicas_flag = format!("--replicas={}", replicas.join(","));
    let hub = async |listen: &str| {
        let mut hub = Hub::start_at(work.path(), listen, &["--manifests", &folder, &replicas_flag])?;
        hub.wait_ready().await.map(|()| hub)
    };
    let mut hubs = [hub(&replicas[0]).await?, hub(&replicas[1]).await?];
    let opa = Opa::start(&assets, work.path(), None, &[]).await?;
    let url = hubs[0].url.clone();
    let mut agent = Agent::start(
        work.path(),
        &Agent::address()?,
        &[&url],
        &opa.url,
        Delivery::Rest,
        &["--unready-after", "1"],
    )?;
    agent.wait_in_step().await?;
    let holds = async |value: u64| {
        eventually(format!("{value} reaches OPA"), async || {
            equal(&opa.data("/opa/m/k/value").await.map_err(|error| error.to_string())?, &json!(value))
        })
        .await
    };
    let process = hubs[0].process.as_mut().context("the hub runs")?;
    process.terminate()?;
    process.ended().await?;
    hubs[0].kill();
    write(2)?;
    holds(2).await?;
    assert_eq!(hubs[1].metric("opa_hub_agents").await?, 1);
    hubs[1].kill();
    hubs[0].spawn()?;
    write(3)?;
    holds(3).await?;
    agent.wait_in_step().await?;
    assert_eq!(agent.status().await?["done"]["snapshots"], json!(1));
    Ok(())
}

#[tokio::test]
async fn lagging_replica_never_rolls_agents_back() -> anyhow::Result<()> {
    let mut world = Replicas::start().await?;
    world.write(0).await?;
    world.holds(0).await?;
    let followed = world.followed().await?;
    world.agree().await?;
    // The other hub loses its source; equal content does not prove it is up to date.
    world.proxies[1 - followed].set_open(false);
    world.write(1).await?;
    world.holds(1).await?;
    world.write(0).await?;
    world.holds(0).await?;
    world.write(2).await?;
    world.holds(2).await?;
    world.hubs[followed].kill();
    world.is_behind("back in time").await?;
    assert_eq!(world.value().await?, json!(2));
    assert_eq!(world.hubs[1 - followed].metric("opa_hub_agents").await?, 0);
    world.proxies[1 - followed].set_open(true);
    world.agent.wait_in_step().await?;
    assert_eq!(world.value().await?, json!(2));
    world.write(3).await?;
    world.holds(3).await
}

#[tokio::test]
async fn agents_leave_a_hub_without_source() -> anyhow::Result<()> {
    let mut world = Replicas::start().await?;
    world.write(0).await?;
    world.holds(0).await?;
    let followed = world.followed().await?;
    world.proxies[followed].set_open(false);
    world.write(1).await?;
    let started = Instant::now();
    // Only timeouts reveal this, since no connection closes.
    world.holds(1).await?;
    assert!(started.elapsed() > Duration::from_secs(5), "source was cut off: {:?}", started.elapsed());
    world.has_agents(1 - followed, 1).await?;
    world.has_agents(followed, 0).await?;
    let ready = world.hubs[followed].json("/readyz").await?;
    assert_eq!(ready["ready"], json!(false));
    assert!(ready["stale"]["main"].to_string().contains("no response from"), "{ready}");

    // The other hub is cut off too, so the agent stays and reports staleness.
    world.proxies[1 - followed].set_open(false);
    world.is_behind("the hub's data may be stale").await?;
    assert_eq!(world.hubs[1 - followed].metric("opa_hub_agents").await?, 1);
    assert_eq!(world.value().await?, json!(1));
    world.proxies.iter().for_each(|valve| valve.set_open(true));
    world.agent.wait_in_step().await?;
    world.write(2).await?;
    world.holds(2).await
}
