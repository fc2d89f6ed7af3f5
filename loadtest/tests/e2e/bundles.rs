//! `Bundle` documents from a folder, a file and the cluster.

use std::path::Path;

use opa_hub_loadtest::cluster::{Cluster, POLICY};
use opa_hub_loadtest::eventually::{equal, eventually};
use opa_hub_loadtest::lab::{Agent, ControlPlane, Delivery, Hub, Opa, assets};
use serde_json::{Value, json};

use crate::world::{has_done, write_manifest};

fn document(name: &str, spec: &Value) -> Value {
    json!({ "apiVersion": "opahub.dev/v1alpha1", "kind": "Bundle", "metadata": { "name": name }, "spec": spec })
}

fn pod(namespace: &str, name: &str, team: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "spec": { "nodeName": "n" },
        "metadata": { "name": name, "namespace": namespace, "labels": { "team": team } },
    })
}

fn policies(name: &str, team: &str, text: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "ConfigMap", "data": { "p.rego": text },
        "metadata": { "name": name, "namespace": "opa", "labels": { "openpolicyagent.org/policy": "rego", "team": team } },
    })
}

/// Starts an OPA with an agent of `bundle`.
async fn follow(dir: &Path, hub: &Hub, bundle: &str) -> anyhow::Result<(Opa, Agent)> {
    let assets = tokio::task::spawn_blocking(assets::folder).await??;
    let opa = Opa::start(&assets, dir, None, &[]).await?;
    let address = Agent::address()?;
    let flags = ["--bundle", bundle];
    let mut agent = Agent::start(dir, &address, &[&hub.url], &opa.url, Delivery::Rest, &flags)?;
    agent.wait_in_step().await?;
    Ok((opa, agent))
}

async fn holds(opa: &Opa, path: &str, expected: &Value) -> anyhow::Result<()> {
    eventually(format!("data{path}"), async || {
        equal(&opa.data(path).await.map_err(|error| error.to_string())?, expected)
    })
    .await
    .map(drop)
}

/// Waits until a problem of `subject` contains `part`.
async fn has_problem(hub: &Hub, subject: &str, part: &str) -> anyhow::Result<()> {
    eventually(format!("a problem of {subject}"), async || {
        let bundles = hub.json("/v1/bundles").await.map_err(|error| error.to_string())?;
        let problems = bundles["problems"].as_array().cloned().unwrap_or_default();
        let is_it = |problem: &&Value| {
            let text = |field: &str| problem[field].as_str().unwrap_or_default().to_owned();
            text("subject").contains(subject) && text("message").contains(part)
        };
        problems.iter().find(is_it).map(drop).ok_or_else(|| bundles.to_string())
    })
    .await
    .map(drop)
}

const LABELS: &str = "package authz\nteam := data.kubernetes.pods[input.ns][input.pod].metadata.labels.team";

#[tokio::test]
async fn bundles_of_folder_and_file_are_independent() -> anyhow::Result<()> {
    let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let put = |file: &str, manifest: &Value| write_manifest(manifests.path(), file, manifest);
    put("p.json", &pod("a", "p", "red"))?;
    put("q.json", &pod("b", "q", "blue"))?;
    put("red.json", &policies("red", "red", LABELS))?;
    put("blue.json", &policies("blue", "blue", "package other\nx := 1"))?;
    let of_team = |team: &str| json!({ "labelSelector": { "matchLabels": { "team": team } } });
    put(
        "bundle-red.json",
        &document(
            "red",
            &json!({ "policies": of_team("red"), "replicate": [{ "resource": "v1/pods", "fields": "auto" }] }),
        ),
    )?;
    let file = work.path().join("bundles.json");
    let blue = |namespace: &str| {
        let pods = json!({ "resource": "v1/pods", "namespaces": [namespace], "fields": ["spec.nodeName"] });
        document("blue", &json!({ "policies": of_team("blue"), "replicate": [pods] }))
    };
    write_manifest(work.path(), "bundles.json", &blue("b"))?;
    let (folder, config) = (manifests.path().display().to_string(), file.display().to_string());
    let flags =
        ["--manifests", &folder, "--config", &config, "--enable-policies=false", "--enable-data=false"];
    let mut hub = Hub::start(work.path(), &flags).await?;
    let (red, red_agent) = follow(work.path(), &hub, "red").await?;
    let (blue_opa, blue_agent) = follow(work.path(), &hub, "blue").await?;
    let labels = |team: &str| json!({ "metadata": { "labels": { "team": team } } });
    holds(&red, "/kubernetes/pods", &json!({ "a": { "p": labels("red") }, "b": { "q": labels("blue") } }))
        .await?;
    holds(&blue_opa, "/kubernetes/pods", &json!({ "b": { "q": { "spec": { "nodeName": "n" } } } })).await?;
    assert_eq!((red.data("/other").await?, blue_opa.data("/authz").await?), (Value::Null, Value::Null));
    let input = json!({ "ns": "a", "pod": "p" });
    assert_eq!(red.decide("/authz/team", &input).await?, json!("red"));

    // An invalid policy or document does not affect other bundles.
    put("blue.json", &policies("blue", "blue", "package other\nx :="))?;
    put("p.json", &pod("a", "p", "green"))?;
    holds(&red, "/kubernetes/pods/a/p", &labels("green")).await?;
    put("bundle-red.json", &document("red", &json!({ "policies": { "namespace": "opa" } })))?;
    has_problem(&hub, "Bundle red", "spec.policies.namespace: unknown field `namespace`").await?;
    put("p.json", &pod("a", "p", "red"))?;
    holds(&red, "/kubernetes/pods/a/p", &labels("red")).await?;

    // An edited document takes effect; streams of other bundles stay open.
    write_manifest(work.path(), "bundles.json", &blue("a"))?;
    holds(&blue_opa, "/kubernetes/pods", &json!({ "a": { "p": { "spec": { "nodeName": "n" } } } })).await?;
    assert_eq!(blue_opa.data("/other/x").await?, json!(1), "last good policy is retained");
    has_done(&red_agent, json!({ "frames": 2, "reconciles": 0, "snapshots": 1 })).await?;
    has_done(&blue_agent, json!({ "frames": 0, "reconciles": 1, "snapshots": 1 })).await?;
    put("bundle-red.json", &document("red", &json!({ "policies": of_team("red") })))?;
    eventually("the pods are removed", async || {
        equal(&red.data("/kubernetes/pods/a").await.map_err(|error| error.to_string())?, &Value::Null)
    })
    .await?;

    // A duplicate name, and a removal.
    put("bundle-blue.json", &document("blue", &json!({ "data": {} })))?;
    has_problem(&hub, "Bundle blue", "a bundle of this name is given").await?;
    std::fs::remove_file(manifests.path().join("bundle-red.json"))?;
    eventually("red is removed", async || {
        let answer = hub.json("/v1/bundles/red").await.map_err(|error| error.to_string())?;
        if answer["error"].is_string() { Ok(()) } else { Err(answer.to_string()) }
    })
    .await?;
    assert_eq!(red.decide("/authz/team", &input).await?, Value::Null, "OPA has no pods");

    hub.kill();
    hub.spawn()?;
    hub.wait_ready().await?;
    let bundles = hub.json("/v1/bundles").await?;
    let names: Vec<_> =
        bundles["bundles"].as_array().into_iter().flatten().map(|bundle| &bundle["name"]).collect();
    assert_eq!(names, ["blue"]);
    Ok(())
}

#[tokio::test]
async fn objects_and_policies_over_a_limit_are_rejected() -> anyhow::Result<()> {
    let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let put = |file: &str, manifest: &Value| write_manifest(manifests.path(), file, manifest);
    for index in 0..5 {
        put(&format!("p{index}.json"), &pod("a", &format!("p{index}"), "red"))?;
    }
    put("red.json", &policies("red", "red", LABELS))?;
    let folder = manifests.path().display().to_string();
    let flags = ["--manifests", &folder, "--replicate=v1/pods", "--fields=auto", "--max-bytes=300"];
    let hub = Hub::start(work.path(), &flags).await?;
    let (opa, _agent) = follow(work.path(), &hub, "main").await?;
    let count = async |expected: u64| {
        eventually(format!("{expected} pods"), async || {
            let pods = opa.data("/kubernetes/pods/a").await.map_err(|error| error.to_string())?;
            equal(&json!(pods.as_object().map_or(0, serde_json::Map::len)), &json!(expected))
        })
        .await
        .map(drop)
    };
    count(5).await?;
    // A policy that reads too much.
    put(
        "wide.json",
        &policies("wide", "red", "package wide\nx contains pod if some pod in data.kubernetes.pods.a"),
    )?;
    let verdict = async || {
        let bundle = hub.json("/v1/bundles/main").await.map_err(|error| error.to_string())?;
        let verdict =
            bundle["verdicts"]["opa/wide"]["error"]["errors"][0]["message"].as_str().unwrap_or_default();
        if verdict.contains("more than the limit of 300") { Ok(()) } else { Err(bundle.to_string()) }
    };
    eventually("the wide policy is rejected", verdict).await?;
    // Too many objects.
    put("p5.json", &pod("a", "p5", "red"))?;
    count(6).await?;
    put("p6.json", &pod("a", "p6", "red"))?;
    let refused = async |expected: &[&str]| {
        eventually(format!("{expected:?} are omitted"), async || {
            let bundle = hub.json("/v1/bundles/main").await.map_err(|error| error.to_string())?;
            let problems = bundle["problems"].as_array().cloned().unwrap_or_default();
            let subjects: Vec<_> = problems
                .iter()
                .filter(|problem| {
                    problem["message"].as_str().is_some_and(|text| text.contains("v1/pods has 0 MB"))
                })
                .map(|problem| problem["subject"].clone())
                .collect();
            equal(&json!(subjects), &json!(expected))
        })
        .await
        .map(drop)
    };
    refused(&["v1/pods a/p6"]).await?;
    count(6).await?;
    std::fs::remove_file(manifests.path().join("p0.json"))?;
    refused(&[]).await?;
    count(6).await
}

#[tokio::test]
async fn bundles_of_the_cluster_report_their_status() -> anyhow::Result<()> {
    const BUNDLES: &str = "/apis/opahub.dev/v1alpha1/bundles";
    let plane = ControlPlane::start().await?;
    let cluster = Cluster { client: plane.client().await? };
    let kubeconfig = plane.kubeconfig.display().to_string();
    let mut hub = Hub::start(plane.dir.path(), &["--kubeconfig", &kubeconfig]).await?;
    let definition = include_str!("../../../deploy/kubernetes/bundles.yaml");
    let definition: Value = serde_saphyr::from_str(definition)?;
    cluster.create("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", &definition).await?;
    cluster.namespace("opa").await?;
    cluster.configmap("opa", "authz", Some(POLICY), &[("p.rego", LABELS)]).await?;
    cluster.pod("default", "p", &[("team", "red")]).await?;
    let pods = json!({ "resource": "v1/pods", "ignoreNamespaces": ["kube-system"], "fields": "auto" });
    let spec = json!({ "policies": { "namespaces": ["opa"] }, "replicate": [pods], "maxBytes": "64Mi" });
    eventually("the definition is served", async || {
        cluster.create(BUNDLES, &document("team", &spec)).await.map_err(|error| error.to_string())
    })
    .await?;
    eventually("the bundle is served", async || {
        let bundle = hub.json("/v1/bundles/team").await.map_err(|error| error.to_string())?;
        equal(&bundle["counts"]["entries"], &json!(1))
    })
    .await?;
    let (opa, _agent) = follow(plane.dir.path(), &hub, "team").await?;
    holds(&opa, "/kubernetes/pods/default/p", &json!({ "metadata": { "labels": { "team": "red" } } }))
        .await?;
    let conditions = async |expected: &[(&str, &str, &str)]| {
        eventually(format!("conditions {expected:?}"), async || {
            let request =
                http::Request::get(format!("{BUNDLES}/team")).body(Vec::new()).map_err(|e| e.to_string())?;
            let found: Value = cluster.client.request(request).await.map_err(|error| error.to_string())?;
            let conditions = found["status"]["conditions"].as_array().cloned().unwrap_or_default();
            let says = |(kind, status, part): &(&str, &str, &str)| {
                conditions.iter().any(|condition| {
                    condition["type"] == *kind
                        && condition["status"] == *status
                        && condition["message"].as_str().is_some_and(|message| message.contains(part))
                })
            };
            if expected.iter().all(says) { Ok(()) } else { Err(found["status"].to_string()) }
        })
        .await
        .map(drop)
    };
    conditions(&[("Accepted", "True", "")]).await?;
    // Accepted by the schema, rejected by the hub.
    let bad = json!({ "spec": { "replicate": [{ "resource": "v1/pods", "fields": "some" }] } });
    cluster.merge(&format!("{BUNDLES}/team"), &bad).await?;
    conditions(&[("Accepted", "False", "spec.replicate[0].fields")]).await?;
    cluster.label_pod("default", "p", &[("team", "blue")]).await?;
    holds(&opa, "/kubernetes/pods/default/p/metadata/labels/team", &json!("blue")).await?;
    // After a restart with an invalid document, the hub serves the rest.
    let good = json!({ "spec": { "replicate": [{ "resource": "v1/pods", "fields": ["metadata"] }] } });
    cluster.merge(&format!("{BUNDLES}/team"), &good).await?;
    conditions(&[("Accepted", "True", "")]).await?;
    hub.kill();
    cluster.label_pod("default", "p", &[("team", "green")]).await?;
    hub.spawn()?;
    hub.wait_ready().await?;
    holds(&opa, "/kubernetes/pods/default/p/metadata/labels/team", &json!("green")).await?;
    let refused = cluster.create(BUNDLES, &document("odd", &json!({ "data": { "namespaces": "a" } }))).await;
    assert!(
        refused.is_err_and(|error| error.to_string().contains("spec.data.namespaces")),
        "rejected by the schema"
    );
    Ok(())
}
