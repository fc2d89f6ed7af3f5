//! Folder sources, without a cluster: escaped names, large directories, all ways of delivery.

use opa_hub_loadtest::eventually::{equal, eventually};
use opa_hub_loadtest::lab::{Hub, Opa, assets};
use serde_json::{Map, Value, json};

use crate::world::{Way, consumer, write_list};

const FLAGS: [&str; 4] =
    ["--replicate", "v1/pods", "--replicate-cluster", "rbac.authorization.k8s.io/v1/clusterroles"];
const ODD_NAMES: [&str; 6] = ["system:a", "50%", "a/b~c", "~1", "\"quoted\"", "ü.-_"];

/// Enough pods for several PATCHes of one directory.
const PODS: usize = 1500;

fn roles(generation: usize) -> Vec<Value> {
    let role = |name: &&str| json!({ "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": { "name": name }, "generation": generation });
    ODD_NAMES.iter().skip(generation % 3).map(role).collect()
}

fn pods(count: usize, generation: usize) -> Vec<Value> {
    let text = "x".repeat(1000);
    let pod = |index| json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": format!("p{index}"), "namespace": "big" }, "text": text, "generation": generation });
    (0..count).map(pod).collect()
}

fn by_name(objects: Vec<Value>) -> Value {
    let named = objects
        .into_iter()
        .map(|object| (object["metadata"]["name"].as_str().unwrap_or_default().to_owned(), object));
    Value::Object(named.collect::<Map<_, _>>())
}

async fn check(way: Way) -> anyhow::Result<()> {
    let assets = tokio::task::spawn_blocking(assets::folder).await??;
    let work = tempfile::tempdir()?;
    let manifests = tempfile::tempdir()?;
    let folder = manifests.path().display().to_string();
    write_list(manifests.path(), "roles.json", &roles(0))?;
    write_list(manifests.path(), "pods.json", &pods(PODS, 0))?;
    let flags: Vec<_> = ["--manifests", &folder].into_iter().chain(FLAGS).collect();
    let hub = Hub::start(work.path(), &flags).await?;
    let (mut opa, mut agent) = consumer(way, &assets, work.path(), &hub).await?;
    let holds = async |opa: &Opa, path: &str, expected: &Value| {
        eventually(format!("{way:?}: data at {path}"), async || {
            equal(&opa.data(path).await.map_err(|error| error.to_string())?, expected)
        })
        .await
    };
    let (roles_path, pods_path) = ("/kubernetes/clusterroles", "/kubernetes/pods/big");
    // Changes all, one, to few, to many, to none, and back.
    for generation in 0..6 {
        let count = [PODS, PODS, 3, PODS, 0, 1][generation];
        write_list(manifests.path(), "roles.json", &roles(generation))?;
        let mut objects = pods(count, if generation < 2 { 0 } else { generation });
        if generation == 1 {
            objects[7]["text"] = json!("changed");
        }
        write_list(manifests.path(), "pods.json", &objects)?;
        holds(&opa, roles_path, &by_name(roles(generation))).await?;
        let expected = if count == 0 { Value::Null } else { by_name(objects) };
        holds(&opa, pods_path, &expected).await?;
        if generation == 3 {
            opa.process = None;
            opa.restart().await?;
            holds(&opa, pods_path, &expected).await?;
        }
        if let Some(agent) = &mut agent {
            agent.wait_in_step().await?;
        }
    }
    // A cluster-scoped resource without objects is an empty map.
    write_list(manifests.path(), "roles.json", &[])?;
    holds(&opa, roles_path, &json!({})).await?;
    Ok(())
}

#[tokio::test]
async fn direct() -> anyhow::Result<()> {
    check(Way::Direct).await
}

#[tokio::test]
async fn agent_with_rest() -> anyhow::Result<()> {
    check(Way::Rest).await
}

#[tokio::test]
async fn agent_with_bundle() -> anyhow::Result<()> {
    check(Way::Bundle).await
}

/// One edit replaces a package by data at its path; another reverts this.
async fn data_and_package_swap_a_path(way: Way) -> anyhow::Result<()> {
    let assets = tokio::task::spawn_blocking(assets::folder).await??;
    let work = tempfile::tempdir()?;
    let manifests = tempfile::tempdir()?;
    let configmap = |namespace: &str, label: (&str, &str), key: &str, text: &str| {
        json!({
            "apiVersion": "v1", "kind": "ConfigMap", "data": { key: text },
            "metadata": { "name": "roles", "namespace": namespace, "labels": { label.0: label.1 } },
        })
    };
    let package =
        configmap("policies", ("openpolicyagent.org/policy", "rego"), "m.rego", "package team.roles\nk := 1");
    let moved =
        configmap("policies", ("openpolicyagent.org/policy", "rego"), "m.rego", "package elsewhere\nk := 1");
    let data = configmap("team", ("openpolicyagent.org/data", "opa"), "k", "{\"a\": 2}");
    write_list(manifests.path(), "a.json", std::slice::from_ref(&package))?;
    let hub = Hub::start(work.path(), &["--manifests", &manifests.path().display().to_string()]).await?;
    let (opa, _agent) = consumer(way, &assets, work.path(), &hub).await?;
    let steps: [(&[Value], Value); 5] = [
        (std::slice::from_ref(&package), json!(1)),
        (std::slice::from_ref(&data), json!({ "a": 2 })),
        (std::slice::from_ref(&package), json!(1)),
        (&[moved, data.clone()], json!({ "a": 2 })),
        (std::slice::from_ref(&package), json!(1)),
    ];
    for (step, (objects, expected)) in steps.iter().enumerate() {
        write_list(manifests.path(), "a.json", objects)?;
        eventually(format!("{way:?}: step {step}"), async || {
            equal(&opa.data("/team/roles/k").await.map_err(|error| error.to_string())?, expected)
        })
        .await?;
    }
    Ok(())
}

#[tokio::test]
async fn data_and_package_swap_a_path_with_rest() -> anyhow::Result<()> {
    data_and_package_swap_a_path(Way::Rest).await
}

#[tokio::test]
async fn data_and_package_swap_a_path_with_bundle() -> anyhow::Result<()> {
    data_and_package_swap_a_path(Way::Bundle).await
}
