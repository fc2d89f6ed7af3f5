//! `--replicate-auto`: resources are replicated while any policy reads them.

use opa_hub_loadtest::cluster::{Cluster, POLICY};
use opa_hub_loadtest::eventually::{equal, eventually};
use opa_hub_loadtest::lab::{Hub, assets};
use serde_json::{Value, json};

use crate::world::{Way, World, write_manifest};

/// Number of open watches of a resource.
async fn watches(cluster: &Cluster, resource: &str) -> anyhow::Result<u64> {
    cluster.metric("apiserver_longrunning_requests", &[("verb", "WATCH"), ("resource", resource)]).await
}

async fn has_watches(cluster: &Cluster, resource: &str, expected: u64) -> anyhow::Result<()> {
    eventually(format!("watches of {resource}"), async || {
        equal(&watches(cluster, resource).await.map_err(|error| error.to_string())?, &expected)
    })
    .await
    .map(drop)
}

#[tokio::test]
async fn watches_follow_policies() -> anyhow::Result<()> {
    let world =
        World::start(Way::Rest, &["--replicate-auto", "--replicate-ignore-namespaces=ignored"]).await?;
    let cluster = &world.cluster;
    for namespace in ["opa", "ignored"] {
        cluster.namespace(namespace).await?;
        cluster.pod(namespace, "web", &[("app", "web")]).await?;
    }
    let before = watches(cluster, "pods").await?;

    // A new policy starts with all pods.
    let policy = "package pods\n\nimport data.kubernetes.pods as all_pods\n\nnames := {name | some ns; all_pods[ns][name]}";
    cluster.configmap("opa", "pods", Some(POLICY), &[("p.rego", policy)]).await?;
    world.decides("/pods/names", json!({}), json!(["web"])).await?;
    has_watches(cluster, "pods", before + 1).await?;
    world.holds("/kubernetes/pods/ignored", Value::Null).await?;
    cluster.pod("opa", "later", &[]).await?;
    world.decides("/pods/names", json!({}), json!(["later", "web"])).await?;

    // A second policy also reads a cluster-scoped resource; the watch ends with the last policy.
    let second = "package second\n\npod := data.kubernetes.pods.opa.web.kind\n\nns := data.kubernetes.namespaces.opa.kind";
    cluster.configmap("opa", "second", Some(POLICY), &[("s.rego", second)]).await?;
    world.decides("/second/ns", json!({}), json!("Namespace")).await?;
    cluster.delete_configmap("opa", "pods").await?;
    world.decides("/pods/names", json!({}), Value::Null).await?;
    world.decides("/second/pod", json!({}), json!("Pod")).await?;
    has_watches(cluster, "pods", before + 1).await?;
    cluster.configmap("opa", "second", Some(POLICY), &[("s.rego", "package second\n\npod := 1")]).await?;
    has_watches(cluster, "pods", before).await?;
    world.holds("/kubernetes", Value::Null).await?;

    // A missing resource is reported and blocks no policy.
    let widgets = "package widgets\n\nsize := data.kubernetes.widgets[\"default\"].w.size\n\nhere := true";
    cluster.configmap("opa", "widgets", Some(POLICY), &[("w.rego", widgets)]).await?;
    world.decides("/widgets/here", json!({}), json!(true)).await?;
    let problems = world.hub.json("/readyz").await?["problems"].to_string();
    assert!(problems.contains("does not serve widgets"), "{problems}");
    cluster.widgets().await?;
    let widget =
        json!({ "apiVersion": "example.com/v1", "kind": "Widget", "metadata": { "name": "w" }, "size": 1.5 });
    eventually("the widget is created", async || {
        cluster.create("/apis/example.com/v1/namespaces/default/widgets", &widget).await
    })
    .await?;
    world.decides("/widgets/size", json!({}), json!(1.5)).await?;

    // Resource names from input cannot be watched, which is reported.
    let dynamic = "package dynamic\n\nx := data.kubernetes[input.resource]";
    cluster.configmap("opa", "dynamic", Some(POLICY), &[("d.rego", dynamic)]).await?;
    eventually("the hub reports the dynamic read", async || {
        let problems =
            world.hub.json("/readyz").await.map_err(|error| error.to_string())?["problems"].to_string();
        if problems.contains("by names that depend on the input") { Ok(()) } else { Err(problems) }
    })
    .await
    .map(drop)
}

#[tokio::test]
async fn folder_replicates_what_policies_read() -> anyhow::Result<()> {
    tokio::task::spawn_blocking(assets::folder).await??;
    let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
    for (kind, name) in [("Pod", "p"), ("Service", "s"), ("Node", "n")] {
        let manifest = json!({ "apiVersion": "v1", "kind": kind, "metadata": { "name": name } });
        write_manifest(manifests.path(), &format!("{kind}.json"), &manifest)?;
    }
    let policy = |text: &str| {
        let manifest = json!({
            "apiVersion": "v1", "kind": "ConfigMap", "data": { "p.rego": text },
            "metadata": { "name": "m", "namespace": "ns", "labels": { POLICY.0: POLICY.1 } },
        });
        write_manifest(manifests.path(), "policy.json", &manifest)
    };
    // Rego v0, selected by flag.
    policy("package a\n\nx { data.kubernetes.pods[_]; data.kubernetes.nodes.n }")?;
    let folder = manifests.path().display().to_string();
    let hub =
        Hub::start(work.path(), &["--manifests", &folder, "--replicate-auto", "--v0-compatible"]).await?;
    let paths = async || {
        let bundle = hub.json("/v1/bundles/main").await.map_err(|error| error.to_string())?;
        let dirs = bundle["directories"].as_array().cloned().unwrap_or_default();
        Ok::<_, String>(dirs.into_iter().map(|dir| dir["path"].clone()).collect::<Vec<_>>())
    };
    assert_eq!(paths().await, Ok(vec![json!("/kubernetes/nodes"), json!("/kubernetes/pods/default")]));
    policy("package a\n\nx { data.kubernetes.services[_] }")?;
    eventually("services replace pods and nodes", async || {
        equal(&paths().await?, &vec![json!("/kubernetes/services/default")])
    })
    .await
    .map(drop)
}
