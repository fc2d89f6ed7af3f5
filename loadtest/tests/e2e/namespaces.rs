//! `--replicate-scope namespace`: agents get only their namespace's objects.

use opa_hub_loadtest::eventually::{equal, eventually};
use opa_hub_loadtest::lab::{Agent, Delivery, Hub, Opa, assets};
use serde_json::{Value, json};

use crate::world::{has_done, write_manifest};

#[tokio::test]
async fn agents_get_only_their_namespace() -> anyhow::Result<()> {
    let assets = tokio::task::spawn_blocking(assets::folder).await??;
    let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let put = |kind: &str, namespace: &str, name: &str, value: u64| {
        let manifest = json!({
            "apiVersion": "v1", "kind": kind, "metadata": { "name": name, "namespace": namespace }, "value": value,
        });
        write_manifest(manifests.path(), &format!("{namespace}-{name}.json"), &manifest)
    };
    for namespace in ["a", "b"] {
        put("Pod", namespace, "p", 0)?;
    }
    put("Node", "", "n", 0)?;
    let folder = manifests.path().display().to_string();
    let flags = ["--manifests", &folder, "--replicate=v1/pods", "--replicate-cluster=v1/nodes"];
    let flags: Vec<_> = flags.into_iter().chain(["--replicate-scope=namespace"]).collect();
    let mut hub = Hub::start(work.path(), &flags).await?;
    let mut agents = Vec::new();
    for (namespace, delivery) in [("a", Delivery::Rest), ("b", Delivery::Bundle), ("empty", Delivery::Rest)] {
        let address = Agent::address()?;
        let config = (delivery == Delivery::Bundle).then(|| Agent::opa_config(&address));
        let opa = Opa::start(&assets, work.path(), config.as_ref(), &[]).await?;
        let flags = ["--namespace", namespace];
        let mut agent = Agent::start(work.path(), &address, &[&hub.url], &opa.url, delivery, &flags)?;
        agent.wait_in_step().await?;
        agents.push((namespace, opa, agent));
    }
    let pod = |namespace: &str, value: u64| json!({ "kind": "Pod", "apiVersion": "v1", "metadata": { "name": "p", "namespace": namespace }, "value": value });
    let hold = async |values: [u64; 2]| {
        for (namespace, opa, _) in &agents {
            let expected: Value = match *namespace {
                "a" => json!({ "a": { "p": pod("a", values[0]) } }),
                "b" => json!({ "b": { "p": pod("b", values[1]) } }),
                _ => json!({}),
            };
            eventually(format!("the pods of {namespace}"), async || {
                equal(&opa.data("/kubernetes/pods").await.map_err(|error| error.to_string())?, &expected)
            })
            .await?;
            assert_eq!(opa.data("/kubernetes/nodes/n/value").await?, json!(0), "nodes are cluster-scoped");
        }
        anyhow::Ok(())
    };
    hold([0, 0]).await?;
    put("Pod", "a", "p", 1)?;
    hold([1, 0]).await?;
    // Other namespaces keep their revision.
    for ((_, _, agent), frames) in agents.iter().zip([1, 0, 0]) {
        has_done(agent, json!({ "frames": frames, "reconciles": 0, "snapshots": 1 })).await?;
    }
    hub.kill();
    put("Pod", "b", "p", 2)?;
    hub.spawn()?;
    hub.wait_ready().await?;
    hold([1, 2]).await?;
    assert_eq!(hub.metric("opa_hub_snapshots_served_total").await?, 0, "agents with content reconcile");
    // Requests without a namespace are rejected with a remedy.
    let answer = hub.json("/bundles/main").await?;
    assert!(answer["error"].as_str().is_some_and(|error| error.contains("?namespace=")), "{answer}");
    Ok(())
}
