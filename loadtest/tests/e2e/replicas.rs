//! Two replicas of the hub on one API server: agents move between them and never back in time.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use opa_hub_loadtest::cluster::{Cluster, DATA};
use opa_hub_loadtest::eventually::{equal, eventually};
use opa_hub_loadtest::lab::valve::Valve;
use opa_hub_loadtest::lab::{Agent, ControlPlane, Delivery, Hub, Opa, assets, free_port};
use serde_json::{Value, json};

use crate::world::write_manifest;

struct Replicas {
    _plane: ControlPlane,
    cluster: Cluster,
    /// Between each hub and the API server.
    valves: [Valve; 2],
    hubs: [Hub; 2],
    opa: Opa,
    agent: Agent,
}

impl Replicas {
    async fn start() -> anyhow::Result<Self> {
        let plane = ControlPlane::start().await?;
        let cluster = Cluster { client: plane.client().await? };
        cluster.namespace("opa").await?;
        let valves = [plane.valve().await?, plane.valve().await?];
        let dir = plane.dir.path();
        let hub = async |valve: &Valve| {
            let kubeconfig = plane.kubeconfig_through(valve)?.display().to_string();
            Hub::start(dir, &["--kubeconfig", &kubeconfig]).await
        };
        let hubs = [hub(&valves[0]).await?, hub(&valves[1]).await?];
        let opa = Opa::start(&plane.assets, dir, None, &[]).await?;
        let urls = hubs.each_ref().map(|hub| hub.url.as_str());
        let flags = ["--unready-after", "1"];
        let mut agent = Agent::start(dir, &Agent::address()?, &urls, &opa.url, Delivery::Rest, &flags)?;
        agent.wait_in_step().await?;
        Ok(Self { _plane: plane, cluster, valves, hubs, opa, agent })
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
        let (followed, _) = eventually("one is followed", async || {
            for (at, hub) in self.hubs.iter().enumerate().filter(|(_, hub)| hub.process.is_some()) {
                if hub.metric("opa_hub_agents").await.map_err(|error| error.to_string())? == 1 {
                    return Ok(at);
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
        let count = |name: &str| done[name].as_u64().context("a count");
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
async fn agents_go_to_another_replica_and_back_by_frames() -> anyhow::Result<()> {
    let mut world = Replicas::start().await?;
    world.write(0).await?;
    world.holds(0).await?;
    for value in 1..=2 {
        // A hub that stops tells its agents to go; the change comes while it is away.
        let followed = world.followed().await?;
        let process = world.hubs[followed].process.as_mut().context("it runs")?;
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
    // The hub that came back knows one revision only: it may be asked for the rest once.
    let (snapshots, reconciles) = world.done().await?;
    assert!(snapshots == 1 && reconciles <= 1, "{snapshots} snapshots, {reconciles} reconciles");

    // All are gone, and what was deleted meanwhile none of the new ones ever saw.
    world.hubs.iter_mut().for_each(Hub::kill);
    world.cluster.delete_configmap("opa", "m").await?;
    world.cluster.configmap("opa", "n", Some(DATA), &[("k", "{}")]).await?;
    let (_, before) = world.done().await?;
    world.hubs[0].spawn()?;
    eventually("OPA holds what is there", async || {
        let found = world.opa.data("/opa").await.map_err(|error| error.to_string())?;
        equal(&found, &json!({ "n": { "k": {} } }))
    })
    .await?;
    world.agent.wait_in_step().await?;
    assert_eq!(world.done().await?, (1, before + 1));
    Ok(())
}

/// An agent that knows one hub only is told of another one, and comes back when that is gone.
#[tokio::test]
async fn a_hub_that_stops_says_where_to_go() -> anyhow::Result<()> {
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
    // One of them is not there, and neither is ready that stops.
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
    let process = hubs[0].process.as_mut().context("it runs")?;
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
async fn a_replica_that_lags_takes_nobody_back() -> anyhow::Result<()> {
    let mut world = Replicas::start().await?;
    world.write(0).await?;
    world.holds(0).await?;
    let followed = world.followed().await?;
    world.agree().await?;
    // The other one hears no more. Content that it had before is no proof that it is as new.
    world.valves[1 - followed].set_open(false);
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
    world.valves[1 - followed].set_open(true);
    world.agent.wait_in_step().await?;
    assert_eq!(world.value().await?, json!(2));
    world.write(3).await?;
    world.holds(3).await
}

#[tokio::test]
async fn a_hub_that_is_cut_off_is_left() -> anyhow::Result<()> {
    let mut world = Replicas::start().await?;
    world.write(0).await?;
    world.holds(0).await?;
    let followed = world.followed().await?;
    world.valves[followed].set_open(false);
    world.write(1).await?;
    let started = Instant::now();
    // It knows by the silence, since no connection was closed; so do its agents.
    world.holds(1).await?;
    assert!(started.elapsed() > Duration::from_secs(5), "its source was cut off: {:?}", started.elapsed());
    world.has_agents(1 - followed, 1).await?;
    world.has_agents(followed, 0).await?;
    let ready = world.hubs[followed].json("/readyz").await?;
    assert_eq!(ready["ready"], json!(false));
    assert!(ready["stale"]["main"].to_string().contains("was not heard"), "{ready}");

    // The other one is cut off too: there is nowhere to go, so the agent stays and says so.
    world.valves[1 - followed].set_open(false);
    world.is_behind("the hub's data may be stale").await?;
    assert_eq!(world.hubs[1 - followed].metric("opa_hub_agents").await?, 1);
    assert_eq!(world.value().await?, json!(1));
    world.valves.iter().for_each(|valve| valve.set_open(true));
    world.agent.wait_in_step().await?;
    world.write(2).await?;
    world.holds(2).await
}
