//! A cluster, a hub, and an OPA with one of three ways of delivery.

use std::path::Path;
use std::process::Command;

use opa_hub_loadtest::cluster::Cluster;
use opa_hub_loadtest::eventually::{equal, eventually};
use opa_hub_loadtest::lab::process::Process;
use opa_hub_loadtest::lab::{Agent, ControlPlane, Delivery, Hub, Opa};
use serde_json::{Value, json};

/// Delivery from hub to OPA.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Way {
    /// OPA's bundle client.
    Direct,
    /// An agent that writes policies by REST.
    Rest,
    /// An agent that serves the policies as a bundle.
    Bundle,
}

pub(crate) struct World {
    pub(crate) plane: ControlPlane,
    pub(crate) cluster: Cluster,
    pub(crate) hub: Hub,
    pub(crate) opa: Opa,
    pub(crate) agent: Option<Agent>,
    pub(crate) way: Way,
}

impl World {
    pub(crate) async fn start(way: Way, hub_flags: &[&str]) -> anyhow::Result<Self> {
        let plane = ControlPlane::start().await?;
        let cluster = Cluster { client: plane.client().await? };
        let dir = plane.dir.path();
        let kubeconfig = plane.kubeconfig.display().to_string();
        let flags: Vec<_> = ["--kubeconfig", &kubeconfig].iter().chain(hub_flags).copied().collect();
        let hub = Hub::start(dir, &flags).await?;
        let (opa, agent) = consumer(way, &plane.assets, dir, &hub).await?;
        Ok(Self { plane, cluster, hub, opa, agent, way })
    }

    /// Waits for a decision; `Null` if undefined.
    pub(crate) async fn decides(&self, path: &str, input: Value, expected: Value) -> anyhow::Result<()> {
        eventually(format!("{:?}: {path} for {input}", self.way), async || {
            let found = self.opa.decide(path, &input).await.map_err(|error| error.to_string())?;
            equal(&found, &expected)
        })
        .await
        .map(drop)
    }

    /// Waits for OPA's data, without empty maps.
    pub(crate) async fn holds(&self, path: &str, expected: Value) -> anyhow::Result<()> {
        eventually(format!("{:?}: data at {path}", self.way), async || {
            let found = self.opa.data(path).await.map_err(|error| error.to_string())?;
            equal(&without_empty_maps(found), &without_empty_maps(expected.clone()))
        })
        .await
        .map(drop)
    }

    /// Waits for exactly these modules, by kube-mgmt's ids.
    pub(crate) async fn has_modules(&self, expected: &[&str]) -> anyhow::Result<()> {
        eventually(format!("{:?}: modules", self.way), async || {
            let found = self.opa.modules().await.map_err(|error| error.to_string())?;
            // OPA prefixes module ids with the bundle's name.
            let found: Vec<_> = found.iter().map(|id| id.strip_prefix("main/").unwrap_or(id)).collect();
            equal(&found, &expected.to_vec())
        })
        .await
        .map(drop)
    }

    /// Waits until OPA has the API server's pods, byte for byte.
    pub(crate) async fn mirrors_pods(&self, ignored: &[&str]) -> anyhow::Result<()> {
        let pods = self.cluster.pods(ignored).await?;
        self.holds("/kubernetes/pods", pods).await
    }
}

/// Starts an OPA, with an agent if `way` needs one.
pub(crate) async fn consumer(
    way: Way,
    assets: &Path,
    dir: &Path,
    hub: &Hub,
) -> anyhow::Result<(Opa, Option<Agent>)> {
    if way == Way::Direct {
        return Ok((
            Opa::start(assets, dir, Some(&direct_config(&hub.url, "bundles/main")), &[]).await?,
            None,
        ));
    }
    let delivery = if way == Way::Rest { Delivery::Rest } else { Delivery::Bundle };
    let address = Agent::address()?;
    let config = (way == Way::Bundle).then(|| Agent::opa_config(&address));
    let opa = Opa::start(assets, dir, config.as_ref(), &[]).await?;
    let mut agent = Agent::start(dir, &address, &[&hub.url], &opa.url, delivery, &[])?;
    agent.wait_in_step().await?;
    Ok((opa, Some(agent)))
}

/// Configuration of an OPA without an agent.
pub(crate) fn direct_config(hub: &str, resource: &str) -> Value {
    let polling =
        json!({ "long_polling_timeout_seconds": 10, "min_delay_seconds": 1, "max_delay_seconds": 1 });
    json!({
        "services": { "hub": { "url": hub } },
        "bundles": { "main": { "service": "hub", "resource": resource, "polling": polling } },
    })
}

/// Reverts [`Process::suspend`].
pub(crate) fn wake(process: &Process) -> anyhow::Result<()> {
    let status = Command::new("kill").args(["-CONT", &process.id().to_string()]).status()?;
    anyhow::ensure!(status.success(), "waking a process failed: {status}");
    Ok(())
}

/// Waits for an agent's counters, which increase once OPA has the content.
pub(crate) async fn has_done(agent: &Agent, expected: Value) -> anyhow::Result<()> {
    eventually("the agent has counted", async || {
        let status = agent.status().await.map_err(|error| error.to_string())?;
        let mut found = status["done"].clone();
        found.as_object_mut().ok_or("no counts")?.retain(|name, _| expected.get(name).is_some());
        equal(&found, &expected)
    })
    .await
    .map(drop)
}

/// Writes a manifest atomically, as editors do.
pub(crate) fn write_manifest(dir: &Path, file: &str, content: &Value) -> anyhow::Result<()> {
    std::fs::write(dir.join(".draft"), content.to_string())?;
    Ok(std::fs::rename(dir.join(".draft"), dir.join(file))?)
}

pub(crate) fn write_list(dir: &Path, file: &str, objects: &[Value]) -> anyhow::Result<()> {
    write_manifest(dir, file, &json!({ "apiVersion": "v1", "kind": "List", "items": objects }))
}

pub(crate) fn without_empty_maps(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let map = map.into_iter().map(|(key, value)| (key, without_empty_maps(value)));
            let map: serde_json::Map<_, _> = map.filter(|(_, value)| !value.is_null()).collect();
            if map.is_empty() { Value::Null } else { Value::Object(map) }
        }
        other => other,
    }
}
