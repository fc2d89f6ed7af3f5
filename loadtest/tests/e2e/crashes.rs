//! Agents killed at any byte of a change, and OPAs that hang or crash during a load. In the end, OPA has exactly the
//! hub's content.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use opa_hub_loadtest::eventually::{PATIENCE, equal, eventually};
use opa_hub_loadtest::lab::blackhole_proxy::BlackholeProxy;
use opa_hub_loadtest::lab::{Agent, Delivery, Hub, Opa, assets};
use serde_json::{Value, json};

use crate::proxy::{Direction, Proxy, Then};
use crate::world::{wake, write_manifest};

/// More than one PATCH, so that changes are partial at times.
const PODS: usize = 600;
/// Number of kill points, spread over the bytes of requests and responses.
const CUTS: usize = 12;
/// Step between kill points with `bundle` delivery, where OPA polls only once a second.
const BUNDLE_CUTS: usize = 3;
/// About a third of a load's request bytes.
const LOAD_BYTES: usize = 20_000;

/// Modules and directories by name.
struct State {
    modules: &'static [(&'static str, u8)],
    roles: &'static [(&'static str, u8)],
    pods: &'static [(&'static str, usize, u8)],
}

const BEFORE: State = State {
    modules: &[("a", 1), ("gone", 1), ("changed", 1)],
    roles: &[("stays", 1), ("returns", 1)],
    pods: &[("big", PODS, 1), ("leaves", 2, 1)],
};
const DURING: State = State {
    modules: &[("a", 1), ("new", 1), ("changed", 2)],
    roles: &[("stays", 1), ("comes", 1)],
    pods: &[("big", PODS, 2), ("visits", 2, 1)],
};
/// Reverts all changes: only the crash distinguishes this from `BEFORE`.
const AFTER: State = State {
    modules: &[("a", 1), ("gone", 1), ("changed", 1)],
    roles: &[("stays", 1), ("returns", 1)],
    pods: &[("big", PODS, 3), ("leaves", 2, 1)],
};

fn write(dir: &Path, state: &State) -> anyhow::Result<()> {
    let configmap = |name: &str, label: (&str, &str), key: &str, text: String| {
        json!({
            "apiVersion": "v1", "kind": "ConfigMap", "data": { key: text },
            "metadata": { "name": name, "namespace": "ns", "labels": { label.0: label.1 } },
        })
    };
    let modules = state.modules.iter().map(|(name, value)| {
        configmap(
            name,
            ("openpolicyagent.org/policy", "rego"),
            "m.rego",
            format!("package {name}\nx := {value}"),
        )
    });
    let roles = state.roles.iter().map(|(name, value)| {
        configmap(name, ("openpolicyagent.org/data", "opa"), "k", json!({ "value": value }).to_string())
    });
    let pods = state
        .pods
        .iter()
        .flat_map(|(namespace, count, value)| (0..*count).map(move |index| pod(namespace, index, *value)));
    let list = json!({ "apiVersion": "v1", "kind": "List", "items": modules.chain(roles).chain(pods).collect::<Value>() });
    write_manifest(dir, "all.json", &list)
}

fn pod(namespace: &str, index: usize, value: u8) -> Value {
    let metadata = json!({ "name": format!("p{index}"), "namespace": namespace });
    json!({ "kind": "Pod", "apiVersion": "v1", "metadata": metadata, "value": value })
}

/// Expected content: `ns`, `kubernetes.pods`, modules.
fn expected(state: &State) -> (Value, Value, Vec<String>) {
    let roles: BTreeMap<_, _> =
        state.roles.iter().map(|(name, value)| (*name, json!({ "k": { "value": value } }))).collect();
    let pods: BTreeMap<_, BTreeMap<_, _>> = state
        .pods
        .iter()
        .map(|(namespace, count, value)| {
            (
                *namespace,
                (0..*count).map(|index| (format!("p{index}"), pod(namespace, index, *value))).collect(),
            )
        })
        .collect();
    let mut modules: Vec<_> = state.modules.iter().map(|(name, _)| format!("ns/{name}/m.rego")).collect();
    modules.sort_unstable();
    (json!(roles), json!(pods), modules)
}

async fn holds(opa: &Opa, state: &State) -> Result<(), String> {
    let (roles, pods, modules) = expected(state);
    let text = |error: anyhow::Error| error.to_string();
    let found = opa.modules().await.map_err(text)?;
    // OPA prefixes module ids with the bundle's name.
    let found: Vec<_> = found.iter().map(|id| id.strip_prefix("main/").unwrap_or(id).to_owned()).collect();
    equal(&found, &modules)?;
    for (name, value) in state.modules {
        equal(&opa.data(&format!("/{name}/x")).await.map_err(text)?, &json!(value))?;
    }
    equal(&opa.data("/ns").await.map_err(text)?, &roles)?;
    has_pods(opa, &pods).await
}

async fn has_pods(opa: &Opa, pods: &Value) -> Result<(), String> {
    let found = opa.data("/kubernetes/pods").await.map_err(|error| error.to_string())?;
    // Keeps the message short.
    if found == *pods {
        Ok(())
    } else {
        Err(format!(
            "pods differ, namespaces {:?}",
            found.as_object().map(|map| map.keys().cloned().collect::<Vec<_>>())
        ))
    }
}

/// Kills the agent during a load if `from_empty`, else during a frame, or a reconcile if `hub_restarts`.
async fn check(from_empty: bool, hub_restarts: bool, delivery: Delivery) -> anyhow::Result<()> {
    let assets = tokio::task::spawn_blocking(assets::folder).await??;
    let work = tempfile::tempdir()?;
    let manifests = tempfile::tempdir()?;
    let dir = manifests.path();
    write(dir, &BEFORE)?;
    let mut hub =
        Hub::start(work.path(), &["--manifests", &dir.display().to_string(), "--replicate", "v1/pods"])
            .await?;
    let revision = async |hub: &Hub| anyhow::Ok(hub.json("/v1/bundles/main").await?["revision"].clone());
    // The first round runs uninterrupted, to measure the change.
    let mut whole = [0; 2];
    for cut in (0..=CUTS).step_by(if delivery == Delivery::Bundle { BUNDLE_CUTS } else { 1 }) {
        let address = Agent::address()?;
        let config = (delivery == Delivery::Bundle).then(|| Agent::opa_config(&address));
        let opa = Opa::start(&assets, work.path(), config.as_ref(), &[]).await?;
        let start =
            |hub: &Hub, opa: &str| Agent::start(work.path(), &address, &[&hub.url], opa, delivery, &[]);
        if !from_empty {
            let mut agent = start(&hub, &opa.url)?;
            agent.wait_in_step().await?;
            holds(&opa, &BEFORE)
                .await
                .map_err(|error| anyhow::anyhow!("at the start of round {cut}: {error}"))?;
        }
        let before = revision(&hub).await?;
        if hub_restarts {
            hub.kill();
        }
        write(dir, &DURING)?;
        if hub_restarts {
            hub.spawn()?;
            hub.wait_ready().await?;
        }
        let changed = async || {
            if revision(&hub).await.is_ok_and(|now| now != before) { Ok(()) } else { Err("not yet") }
        };
        eventually("the hub has applied the change", changed).await?;
        let directions = [Direction::Requests, Direction::Answers];
        let index = cut % 2;
        let bytes = whole[index] * cut / (CUTS + 1);
        let proxy = Proxy::start(&opa.url).await?;
        if cut > 0 {
            proxy.stop_after(directions[index], bytes, Then::Break);
        }
        let mut agent = start(&hub, &proxy.url)?;
        let dies = async || {
            if proxy.has_stopped() || holds(&opa, &DURING).await.is_ok() { Ok(()) } else { Err("not yet") }
        };
        eventually("the agent reaches the kill point", dies).await?;
        if cut == 0 {
            whole = directions.map(|direction| proxy.forwarded(direction));
        }
        agent.kill();
        drop(proxy);
        write(dir, &AFTER)?;
        // Policies are checked concurrently and published later.
        let modules = |revision: &Value| {
            revision.as_str().and_then(|text| text.split_once('-')).map(|(modules, _)| modules.to_owned())
        };
        eventually("the hub has the earlier policies", async || {
            let now = revision(&hub).await.map_err(|error| error.to_string())?;
            equal(&modules(&now), &modules(&before))
        })
        .await?;
        let mut agent = start(&hub, &opa.url)?;
        let place = format!("cut at {bytes} of {} bytes of {:?}", whole[index], directions[index]);
        eventually(&place, async || holds(&opa, &AFTER).await).await?;
        agent.wait_in_step().await?;
        holds(&opa, &AFTER).await.map_err(|error| anyhow::anyhow!("{place}: {error}"))?;
        drop(agent);
        write(dir, &BEFORE)?;
        let after = revision(&hub).await?;
        let back =
            async || if revision(&hub).await.is_ok_and(|now| now != after) { Ok(()) } else { Err("not yet") };
        eventually(format!("initial content within {} s", PATIENCE.as_secs()), back).await?;
    }
    Ok(())
}

#[tokio::test]
async fn kill_during_load_with_rest() -> anyhow::Result<()> {
    check(true, false, Delivery::Rest).await
}

#[tokio::test]
async fn kill_during_load_with_bundle() -> anyhow::Result<()> {
    check(true, false, Delivery::Bundle).await
}

#[tokio::test]
async fn kill_during_frame_with_rest() -> anyhow::Result<()> {
    check(false, false, Delivery::Rest).await
}

#[tokio::test]
async fn kill_during_frame_with_bundle() -> anyhow::Result<()> {
    check(false, false, Delivery::Bundle).await
}

#[tokio::test]
async fn kill_during_reconcile_with_rest() -> anyhow::Result<()> {
    check(false, true, Delivery::Rest).await
}

#[tokio::test]
async fn kill_during_reconcile_with_bundle() -> anyhow::Result<()> {
    check(false, true, Delivery::Bundle).await
}

/// OPA rejects delayed requests of a killed agent, which its successor does not expect.
async fn late_requests_are_rejected(delivery: Delivery) -> anyhow::Result<()> {
    let assets = tokio::task::spawn_blocking(assets::folder).await??;
    let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let write = |keys: &[&str]| {
        let data: serde_json::Map<_, _> = keys.iter().map(|key| ((*key).to_owned(), json!("{}"))).collect();
        let labels = json!({ "openpolicyagent.org/data": "opa" });
        let metadata = json!({ "name": "m", "namespace": "ns", "labels": labels });
        let configmap =
            json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data });
        write_manifest(manifests.path(), "m.json", &configmap)
    };
    write(&["a"])?;
    let hub = Hub::start(work.path(), &["--manifests", &manifests.path().display().to_string()]).await?;
    let address = Agent::address()?;
    let config = (delivery == Delivery::Bundle).then(|| Agent::opa_config(&address));
    let opa = Opa::start(&assets, work.path(), config.as_ref(), &[]).await?;
    let revision = async || anyhow::Ok(hub.json("/v1/bundles/main").await?["revision"].clone());
    let holds = async |expected: &[&str]| {
        eventually("OPA has the keys", async || {
            let found = opa.data("/ns/m").await.map_err(|error| error.to_string())?;
            let found: Vec<_> = found.as_object().into_iter().flatten().map(|(key, _)| key.clone()).collect();
            equal(&found, &expected.iter().map(ToString::to_string).collect())
        })
        .await
    };
    let start = |opa: &str| Agent::start(work.path(), &address, &[&hub.url], opa, delivery, &[]);
    for round in 0..5 {
        let address = opa.url.trim_start_matches("http://").to_owned();
        let valve = BlackholeProxy::with_prefix(address, b"PATCH").await?;
        let mut first = start(&format!("http://127.0.0.1:{}", valve.port))?;
        first.wait_in_step().await?;
        holds(&["a"]).await?;
        let before = revision().await?;
        valve.set_open(false);
        write(&["a", "late"])?;
        eventually("the agent receives the frame", async || {
            let status = first.status().await.map_err(|error| error.to_string())?;
            if status["said"] == status["held"] { Err(status.to_string()) } else { Ok(()) }
        })
        .await?;
        first.kill();
        write(&["a"])?;
        eventually("the hub has the earlier content", async || {
            equal(&revision().await.map_err(|error| error.to_string())?, &before)
        })
        .await?;
        let mut second = start(&opa.url)?;
        second.wait_in_step().await?;
        valve.set_open(true);
        write(&["a", "new"])?;
        holds(&["a", "new"]).await?;
        second.wait_in_step().await?;
        // Delayed requests have been processed by now.
        tokio::time::sleep(Duration::from_millis(200)).await;
        holds(&["a", "new"]).await?;
        write(&["a"])?;
        holds(&["a"]).await.map_err(|error| error.context(format!("round {round}")))?;
    }
    Ok(())
}

#[tokio::test]
async fn late_requests_with_rest() -> anyhow::Result<()> {
    late_requests_are_rejected(Delivery::Rest).await
}

#[tokio::test]
async fn late_requests_with_bundle() -> anyhow::Result<()> {
    late_requests_are_rejected(Delivery::Bundle).await
}

/// Kills an agent after OPA has new data, before new policies.
#[tokio::test]
async fn kill_between_data_and_policies() -> anyhow::Result<()> {
    let assets = tokio::task::spawn_blocking(assets::folder).await??;
    let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let dir = manifests.path();
    write(dir, &BEFORE)?;
    let hub = Hub::start(work.path(), &["--manifests", &dir.display().to_string(), "--replicate", "v1/pods"])
        .await?;
    let valve = BlackholeProxy::with_prefix(
        hub.url.trim_start_matches("http://").to_owned(),
        b"GET /bundles/main/policy",
    )
    .await?;
    let through_valve = format!("http://127.0.0.1:{}", valve.port);
    let address = Agent::address()?;
    let opa = Opa::start(&assets, work.path(), Some(&Agent::opa_config(&address)), &[]).await?;
    let start = |hub: &str| Agent::start(work.path(), &address, &[hub], &opa.url, Delivery::Bundle, &[]);
    let mut is_first = true;
    for state in [&BEFORE, &DURING] {
        if is_first {
            valve.set_open(false);
        }
        let mut agent = start(&through_valve)?;
        if !is_first {
            agent.wait_in_step().await?;
            valve.set_open(false);
            write(dir, state)?;
        }
        let (_, pods, _) = expected(state);
        eventually("OPA has the data", async || has_pods(&opa, &pods).await).await?;
        eventually("the agent waits for the policies", async || {
            let status = agent.status().await.map_err(|error| error.to_string())?;
            if status["inStep"] == false { Ok(()) } else { Err(status.to_string()) }
        })
        .await?;
        let before = if is_first { Value::Null } else { json!(1) };
        assert_eq!(opa.data("/changed/x").await?, before, "policies are unchanged");
        agent.kill();
        let mut agent = start(&hub.url)?;
        agent.wait_in_step().await?;
        holds(&opa, state).await.map_err(anyhow::Error::msg)?;
        drop(agent);
        valve.set_open(true);
        is_first = false;
    }
    Ok(())
}

/// A fault of OPA during a load.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fault {
    Killed,
    Suspended,
    /// The agent restarts while OPA is suspended.
    SuspendedUnderTwo,
}

async fn opa_fails_in_its_load(delivery: Delivery) -> anyhow::Result<()> {
    let assets = tokio::task::spawn_blocking(assets::folder).await??;
    let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
    write(manifests.path(), &BEFORE)?;
    let folder = manifests.path().display().to_string();
    let hub = Hub::start(work.path(), &["--manifests", &folder, "--replicate", "v1/pods"]).await?;
    for fault in [Fault::Killed, Fault::Suspended, Fault::SuspendedUnderTwo] {
        let address = Agent::address()?;
        let config = (delivery == Delivery::Bundle).then(|| Agent::opa_config(&address));
        let mut opa = Opa::start(&assets, work.path(), config.as_ref(), &[]).await?;
        let proxy = Proxy::start(&opa.url).await?;
        proxy.stop_after(Direction::Requests, LOAD_BYTES, Then::Hold);
        let mut agent = Agent::start(work.path(), &address, &[&hub.url], &proxy.url, delivery, &[])?;
        proxy.wait_stopped().await?;
        let passes = async |bytes: usize| {
            eventually("requests reach OPA's socket", async || {
                if proxy.forwarded(Direction::Requests) > bytes { Ok(()) } else { Err("not yet") }
            })
            .await
        };
        if fault == Fault::Killed {
            opa.process = None;
            proxy.resume();
            opa.restart().await?;
        } else {
            let process = opa.process.as_ref().expect("OPA runs");
            process.suspend()?;
            proxy.resume();
            passes(LOAD_BYTES).await?;
            if fault == Fault::SuspendedUnderTwo {
                agent.kill();
                let bytes = proxy.forwarded(Direction::Requests);
                agent.spawn()?;
                passes(bytes).await?;
            }
            wake(process)?;
        }
        agent.wait_in_step().await?;
        holds(&opa, &BEFORE).await.map_err(|error| anyhow::anyhow!("{fault:?}: {error}"))?;
    }
    Ok(())
}

#[tokio::test]
async fn opa_fails_in_its_load_with_rest() -> anyhow::Result<()> {
    opa_fails_in_its_load(Delivery::Rest).await
}

#[tokio::test]
async fn opa_fails_in_its_load_with_bundle() -> anyhow::Result<()> {
    opa_fails_in_its_load(Delivery::Bundle).await
}
