//! The agent's last good state on disk: OPA and agent restart without hub and source.

use std::path::Path;
use std::time::{Duration, Instant};

use opa_hub_loadtest::eventually::{equal, eventually};
use opa_hub_loadtest::lab::{Agent, Delivery, Hub, Opa, assets};
use serde_json::{Value, json};

use crate::world::write_list;

/// Documented number of pods.
const PODS: usize = 3000;
/// Maximum time to the first correct decision, mostly OPA's startup on a busy machine.
const DECIDES_MAX: Duration = Duration::from_secs(5);
/// Time until a change is on disk.
const SYNCED: Duration = Duration::from_millis(1500);

/// Correct only on a complete state: all pods, and the newest of both values.
const POLICY: &str = "package count

pods := count([1 | some pod in data.kubernetes.pods.big; pod.metadata.name])

generation := data.ns.one.k.at if data.ns.one.k.at == data.ns.other.k.at
";

fn write(dir: &Path, generation: usize) -> anyhow::Result<()> {
    let configmap = |name: &str, label: (&str, &str), key: &str, text: String| {
        json!({
            "apiVersion": "v1", "kind": "ConfigMap", "data": { key: text },
            "metadata": { "name": name, "namespace": "ns", "labels": { label.0: label.1 } },
        })
    };
    let data = |name| {
        configmap(name, ("openpolicyagent.org/data", "opa"), "k", json!({ "at": generation }).to_string())
    };
    let policy = configmap("count", ("openpolicyagent.org/policy", "rego"), "p.rego", POLICY.to_owned());
    let items = [data("one"), data("other"), policy];
    write_list(dir, "maps.json", &items)
}

struct World {
    work: tempfile::TempDir,
    manifests: tempfile::TempDir,
    hub: Hub,
    opa: Opa,
    agent: Agent,
}

impl World {
    async fn start(delivery: Delivery) -> anyhow::Result<Self> {
        let assets = tokio::task::spawn_blocking(assets::folder).await??;
        let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
        let pod = |index| json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": format!("p{index}"), "namespace": "big" }, "text": "x".repeat(1000) });
        let pods: Vec<_> = (0..PODS).map(pod).collect();
        write_list(manifests.path(), "pods.json", &pods)?;
        write(manifests.path(), 0)?;
        let folder = manifests.path().display().to_string();
        let flags =
            ["--manifests", &folder, "--replicate", "v1/pods", "--fields", "auto", "--log-level", "error"];
        let hub = Hub::start(work.path(), &flags).await?;
        let address = Agent::address()?;
        let config = (delivery == Delivery::Bundle).then(|| Agent::opa_config(&address));
        let opa = Opa::start(&assets, work.path(), config.as_ref(), &[]).await?;
        let state = work.path().join("state").display().to_string();
        let flags = ["--state-dir", state.as_str()];
        let mut agent = Agent::start(work.path(), &address, &[&hub.url], &opa.url, delivery, &flags)?;
        agent.wait_in_step().await?;
        Ok(Self { work, manifests, hub, opa, agent })
    }

    async fn decides(&self, generation: usize) -> anyhow::Result<()> {
        for (rule, expected) in [("generation", json!(generation)), ("pods", json!(PODS))] {
            eventually(format!("{rule} is correct"), async || {
                let found = self.opa.decide(&format!("/count/{rule}"), &json!({})).await;
                equal(&found.map_err(|error| error.to_string())?, &expected)
            })
            .await?;
        }
        Ok(())
    }

    /// Kills everything and starts OPA and agent. Returns their start time.
    async fn restart_without_hub(&mut self) -> anyhow::Result<Instant> {
        self.hub.kill();
        self.agent.kill();
        self.opa.process = None;
        let started = Instant::now();
        self.agent.spawn()?;
        self.opa.restart().await?;
        Ok(started)
    }
}

async fn is_ready(agent: &Agent) -> anyhow::Result<()> {
    eventually("the agent is ready", async || match agent.readiness().await {
        Ok((true, _)) => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await
    .map(drop)
}

async fn check(delivery: Delivery) -> anyhow::Result<()> {
    let mut world = World::start(delivery).await?;
    world.decides(0).await?;
    for generation in 1..=3 {
        // Sent as frame after the archive.
        write(world.manifests.path(), generation)?;
        world.decides(generation).await?;
        tokio::time::sleep(SYNCED).await;
        let started = world.restart_without_hub().await?;
        world.decides(generation).await?;
        let took = started.elapsed();
        println!("{delivery:?}: decides again after {took:?}");
        assert!(took < DECIDES_MAX, "{took:?}");
        is_ready(&world.agent).await?;
        let done = world.agent.status().await?["done"].clone();
        assert_eq!((&done["snapshots"], &done["restores"]), (&json!(0), &json!(1)), "{done}");
        // The hub restarts with newer content.
        write(world.manifests.path(), generation + 10)?;
        world.hub.spawn()?;
        world.decides(generation + 10).await?;
        world.agent.wait_in_step().await?;
    }
    // Only OPA restarts, without a hub.
    tokio::time::sleep(SYNCED).await;
    world.hub.kill();
    world.opa.process = None;
    world.opa.restart().await?;
    world.decides(13).await?;
    // Only the agent restarts.
    world.agent.kill();
    world.agent.spawn()?;
    is_ready(&world.agent).await?;
    world.decides(13).await?;
    // Both restart after an interrupted load.
    world.agent.kill();
    world.opa.process = None;
    world.opa.restart().await?;
    let marker = opa_hub_loadtest::lab::http()?.put(format!("{}/v1/data/system/opahub/main", world.opa.url));
    marker.body("{\"revision\": null, \"dirs\": {\"/ns/one\": null}}").send().await?.error_for_status()?;
    world.agent.spawn()?;
    world.decides(13).await?;
    is_ready(&world.agent).await?;
    // A corrupt state is reported and removed.
    world.agent.kill();
    let file = world.work.path().join("state/main.redb");
    let bytes = std::fs::read(&file)?;
    std::fs::write(&file, bytes.iter().map(|byte| byte ^ 0x55).collect::<Vec<_>>())?;
    world.restart_without_hub().await?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(world.opa.decide("/count/pods", &json!({})).await?, Value::Null);
    let log = world.agent.process.as_ref().expect("the agent runs").log();
    assert!(log.contains("state is damaged, removing it"), "{log}");
    world.hub.spawn()?;
    world.decides(13).await?;
    tokio::time::sleep(SYNCED).await;
    world.restart_without_hub().await?;
    world.decides(13).await
}

#[tokio::test]
async fn opa_and_agent_restart_without_hub_with_rest() -> anyhow::Result<()> {
    check(Delivery::Rest).await
}

#[tokio::test]
async fn opa_and_agent_restart_without_hub_with_bundle() -> anyhow::Result<()> {
    check(Delivery::Bundle).await
}

/// Everything is killed during changes: the state is complete and recent.
#[tokio::test]
async fn state_is_complete_after_any_kill() -> anyhow::Result<()> {
    let mut world = World::start(Delivery::Rest).await?;
    let mut random = fastrand::Rng::with_seed(3);
    let mut generation = 0;
    for round in 0..6 {
        let before = generation;
        let until = Instant::now() + Duration::from_millis(random.u64(300..2500));
        while Instant::now() < until {
            generation += 1;
            write(world.manifests.path(), generation)?;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        world.restart_without_hub().await?;
        let found = eventually("OPA decides on one complete state", async || {
            let found = world.opa.decide("/count/generation", &json!({})).await;
            let found = found.map_err(|error| error.to_string())?.as_u64();
            found.and_then(|found| usize::try_from(found).ok()).ok_or_else(|| "undefined".to_owned())
        });
        let (found, _) = found.await.map_err(|error| error.context(format!("round {round}")))?;
        assert!(found >= before && found <= generation, "round {round}: {found} of {before} to {generation}");
        world.hub.spawn()?;
        world.decides(generation).await?;
        world.agent.wait_in_step().await?;
        tokio::time::sleep(SYNCED).await;
    }
    Ok(())
}
