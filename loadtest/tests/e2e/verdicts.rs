//! Reported verdicts, their cost for the API server, and last good modules across restarts.

use std::process::Command;

use anyhow::Context as _;
use opa_hub_loadtest::cluster::{Cluster, DATA, POLICY};
use opa_hub_loadtest::eventually::{equal, eventually};
use opa_hub_loadtest::lab::apiserver::PLAIN_USER;
use opa_hub_loadtest::lab::{Agent, ControlPlane, Delivery, Hub, Opa, assets};
use serde_json::{Value, json};

use crate::world::write_manifest;

const AGENTS: usize = 10;
const GOOD: &str = "package shop\n\nallow := data.lib.one";
const UNCOMPILABLE: &str = "package shop\n\nallow := data.lib.no_such_function(1)";

async fn decides(opa: &Opa, path: &str, expected: Value) -> anyhow::Result<()> {
    eventually(format!("{path} on {}", opa.url), async || {
        equal(&opa.decide(path, &json!({})).await.map_err(|error| error.to_string())?, &expected)
    })
    .await
    .map(drop)
}

async fn has_status(cluster: &Cluster, name: &str, expected: &str) -> anyhow::Result<Value> {
    let status = eventually(format!("ConfigMap {name} says {expected}"), async || {
        let status = cluster.status("opa", name).await.map_err(|error| error.to_string())?;
        if status["status"] == expected { Ok(status) } else { Err(status.to_string()) }
    });
    Ok(status.await?.0)
}

async fn has_event(cluster: &Cluster, name: &str, expected: &str) -> anyhow::Result<()> {
    eventually(format!("an Event on {name}: {expected}"), async || {
        let events = cluster.events("opa", name).await.map_err(|error| error.to_string())?;
        if events.iter().any(|event| event.contains(expected)) { Ok(()) } else { Err(format!("{events:?}")) }
    })
    .await
    .map(drop)
}

/// Number of ConfigMap writes, except by the test and for last good modules.
async fn writes(cluster: &Cluster) -> anyhow::Result<u64> {
    cluster.metric("apiserver_request_total", &[("resource", "configmaps"), ("verb", "PATCH")]).await
}

async fn watches(cluster: &Cluster) -> anyhow::Result<u64> {
    cluster.metric("apiserver_longrunning_requests", &[("verb", "WATCH")]).await
}

/// Ten OPAs on two replicas cause at most one write per edit, and no additional watch.
#[tokio::test]
async fn writes_per_edit_are_independent_of_agents() -> anyhow::Result<()> {
    let plane = ControlPlane::start().await?;
    let cluster = Cluster { client: plane.client().await? };
    cluster.namespace("opa").await?;
    cluster.configmap("opa", "lib", Some(POLICY), &[("lib.rego", "package lib\n\none := 1")]).await?;
    cluster.configmap("opa", "shop", Some(POLICY), &[("shop.rego", GOOD)]).await?;
    let kubeconfig = plane.kubeconfig.display().to_string();
    let flags = ["--kubeconfig", &kubeconfig, "--replicate", "v1/pods"];
    let dir = plane.dir.path();
    let hubs = [Hub::start(dir, &flags).await?, Hub::start(dir, &flags).await?];
    for name in ["lib", "shop"] {
        has_status(&cluster, name, "ok").await?;
    }
    assert_eq!(writes(&cluster).await?, 2, "one write per ConfigMap");
    let alone = watches(&cluster).await?;

    let urls = hubs.each_ref().map(|hub| hub.url.as_str());
    let (mut opas, mut agents) = (Vec::new(), Vec::new());
    for index in 0..AGENTS {
        let delivery = if index % 2 == 0 { Delivery::Rest } else { Delivery::Bundle };
        let address = Agent::address()?;
        let config = (delivery == Delivery::Bundle).then(|| Agent::opa_config(&address));
        let opa = Opa::start(&plane.assets, dir, config.as_ref(), &[]).await?;
        agents.push(Agent::start(dir, &address, &urls, &opa.url, delivery, &[])?);
        opas.push(opa);
    }
    for agent in &mut agents {
        agent.wait_in_step().await?;
    }
    assert_eq!(watches(&cluster).await?, alone, "agents open no watches");

    // A valid edit changes no verdict.
    cluster.configmap("opa", "lib", Some(POLICY), &[("lib.rego", "package lib\n\none := 2")]).await?;
    for opa in &opas {
        decides(opa, "/shop/allow", json!(2)).await?;
    }
    // The replaced ConfigMap's annotations are rewritten once.
    has_status(&cluster, "lib", "ok").await?;
    assert_eq!(writes(&cluster).await?, 3);

    // An invalid edit is not served, and reported once with OPA's location.
    cluster.configmap("opa", "shop", Some(POLICY), &[("shop.rego", UNCOMPILABLE)]).await?;
    let status = has_status(&cluster, "shop", "error").await?;
    let error = json!({
        "code": "rego_type_error", "message": "undefined function data.lib.no_such_function",
        "location": { "file": "opa/shop/shop.rego", "row": 3, "col": 10 },
    });
    assert_eq!(status["error"]["errors"], json!([error]));
    has_event(&cluster, "shop", "Warning Refused opa/shop/shop.rego:3:10: rego_type_error: undefined")
        .await?;
    for hub in &hubs {
        eventually("the metric", async || {
            equal(&hub.metric("opa_hub_verdict_errors").await.map_err(|error| error.to_string())?, &1)
        })
        .await?;
        let verdicts = &hub.json("/v1/bundles/main").await?["verdicts"];
        assert_eq!(verdicts["opa/shop"], status, "all verdicts are equal");
    }
    cluster.configmap("opa", "lib", Some(POLICY), &[("lib.rego", "package lib\n\none := 3")]).await?;
    for opa in &opas {
        decides(opa, "/shop/allow", json!(3)).await?;
    }
    has_status(&cluster, "lib", "ok").await?;
    assert_eq!(writes(&cluster).await?, 5);

    // The fix is reported once.
    cluster.configmap("opa", "shop", Some(POLICY), &[("shop.rego", GOOD)]).await?;
    has_status(&cluster, "shop", "ok").await?;
    cluster.configmap("opa", "shop", Some(POLICY), &[("shop.rego", "")]).await?;
    has_status(&cluster, "shop", "error").await?;
    assert_eq!(writes(&cluster).await?, 7);
    assert_eq!(watches(&cluster).await?, alone);
    Ok(())
}

/// Without write permission, the hub warns once and still serves the policies.
#[tokio::test]
async fn hub_without_write_permission_warns_once() -> anyhow::Result<()> {
    let plane = ControlPlane::start().await?;
    let kubeconfig = plane.plain_kubeconfig.as_ref().context("the lab has a user without permissions")?;
    let cluster = Cluster { client: plane.client().await? };
    cluster.namespace("opa").await?;
    let leases = json!({ "apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["*"] });
    let reads = json!({ "apiGroups": [""], "resources": ["configmaps"], "verbs": ["list", "watch"] });
    cluster.grant("hub", PLAIN_USER, &[leases, reads]).await?;
    let kubeconfig = kubeconfig.display().to_string();
    let hub = Hub::start(plane.dir.path(), &["--kubeconfig", &kubeconfig]).await?;
    for round in 0..5 {
        let text = format!("package shop\n\nround := {round}");
        cluster.configmap("opa", "shop", Some(POLICY), &[("shop.rego", &text)]).await?;
        cluster
            .configmap("opa", "data", Some(DATA), &[("round.json", &format!("{{\"n\": {round}}}"))])
            .await?;
    }
    eventually("the hub reports the missing permission", async || {
        let ready = hub.json("/readyz").await.map_err(|error| error.to_string())?;
        let problems = ready["problems"].to_string();
        let lacks =
            ["grant the hub the verb patch on configmaps", "grant the hub the verbs get, create, patch"];
        if lacks.iter().all(|lack| problems.contains(lack)) { Ok(()) } else { Err(problems) }
    })
    .await?;
    eventually("the last edit is served", async || {
        let bundle = hub.json("/v1/bundles/main").await.map_err(|error| error.to_string())?;
        equal(&bundle["verdicts"]["opa/shop"], &json!({ "status": "ok" }))
    })
    .await?;
    let tried = hub.metric("opa_hub_verdict_writes_total").await?;
    assert!((1..=2).contains(&tried), "one attempt per ConfigMap, not per edit: {tried}");
    let log = hub.process.as_ref().map(opa_hub_loadtest::lab::process::Process::log).unwrap_or_default();
    assert_eq!(log.matches("grant the hub the verb patch").count(), 1, "{log}");
    Ok(())
}

/// I6: restarted and new hubs serve the last good text, in a cluster.
#[tokio::test]
async fn i6_last_good_text_survives_restarts_in_a_cluster() -> anyhow::Result<()> {
    let plane = ControlPlane::start().await?;
    let cluster = Cluster { client: plane.client().await? };
    cluster.namespace("opa").await?;
    cluster.configmap("opa", "lib", Some(POLICY), &[("lib.rego", "package lib\n\none := 1")]).await?;
    cluster.configmap("opa", "shop", Some(POLICY), &[("shop.rego", GOOD)]).await?;
    let kubeconfig = plane.kubeconfig.display().to_string();
    let flags = ["--kubeconfig", &kubeconfig];
    let mut hub = Hub::start(plane.dir.path(), &flags).await?;
    let served = hub.json("/v1/bundles/main").await?["revision"].clone();
    eventually("the last good policies are stored", async || {
        cluster.get_configmap("default", "opa-hub-main").await.map(drop)
    })
    .await?;
    // An invalid module, and a removed dependency.
    cluster.configmap("opa", "shop", Some(POLICY), &[("shop.rego", UNCOMPILABLE)]).await?;
    has_status(&cluster, "shop", "error").await?;
    hub.kill();
    // Another change without a running hub.
    cluster.configmap("opa", "shop", Some(POLICY), &[("shop.rego", "package")]).await?;
    hub.spawn()?;
    hub.wait_ready().await?;
    let fresh = Hub::start(plane.dir.path(), &flags).await?;
    for hub in [&hub, &fresh] {
        let bundle = hub.json("/v1/bundles/main").await?;
        assert_eq!(bundle["revision"], served, "{bundle}");
        assert_eq!(bundle["verdicts"]["opa/shop"]["status"], "error", "{bundle}");
    }
    // Both serve the fixed text.
    cluster.configmap("opa", "shop", Some(POLICY), &[("shop.rego", "package shop\n\nallow := 7")]).await?;
    for hub in [&hub, &fresh] {
        eventually("the fixed text is served", async || {
            let bundle = hub.json("/v1/bundles/main").await.map_err(|error| error.to_string())?;
            if bundle["revision"] == served { Err(bundle.to_string()) } else { Ok(()) }
        })
        .await?;
    }
    Ok(())
}

/// I6: restarted hubs serve the last good text, from a folder with `--state-dir`.
#[tokio::test]
async fn i6_last_good_text_survives_restarts_in_a_folder() -> anyhow::Result<()> {
    tokio::task::spawn_blocking(assets::folder).await??;
    let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let write = |text: &str| {
        let manifest = json!({
            "apiVersion": "v1", "kind": "ConfigMap", "data": { "p.rego": text },
            "metadata": { "name": "m", "namespace": "ns", "labels": { "openpolicyagent.org/policy": "rego" } },
        });
        write_manifest(manifests.path(), "m.json", &manifest)
    };
    write("package p\n\nx := 1")?;
    let (folder, state) = (manifests.path().display().to_string(), work.path().join("state"));
    let flags = ["--manifests", &folder, "--state-dir", &state.display().to_string()];
    let mut hub = Hub::start(work.path(), &flags).await?;
    let served = hub.json("/v1/bundles/main").await?["revision"].clone();
    eventually("the last good policies are stored", async || {
        std::fs::metadata(state.join("main.last-good.json.gz"))
    })
    .await?;
    hub.kill();
    write("package p\n\nx := data.p.f(1)")?;
    hub.spawn()?;
    hub.wait_ready().await?;
    let bundle = hub.json("/v1/bundles/main").await?;
    assert_eq!(bundle["revision"], served, "{bundle}");
    // A corrupt state is reported and ignored.
    hub.kill();
    std::fs::write(state.join("main.last-good.json.gz"), "{}")?;
    hub.spawn()?;
    hub.wait_ready().await?;
    let bundle = hub.json("/v1/bundles/main").await?;
    assert_eq!(bundle["counts"]["modules"], 0, "{bundle}");
    Ok(())
}

/// A real API server accepts `deploy/kubernetes`, and its permissions suffice for the hub.
#[tokio::test]
async fn manifest_permissions_suffice() -> anyhow::Result<()> {
    let plane = ControlPlane::start().await?;
    let kubeconfig = plane.plain_kubeconfig.as_ref().context("the lab has a user without permissions")?;
    let cluster = Cluster { client: plane.client().await? };
    for namespace in ["opa", "shop"] {
        cluster.namespace(namespace).await?;
    }
    let manifests = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/kubernetes");
    for file in ["hub.yaml", "sidecar-before.yaml", "sidecar-after.yaml"] {
        let mut kubectl = Command::new(plane.assets.join("kubectl"));
        kubectl.arg("--kubeconfig").arg(&plane.kubeconfig).args([
            "apply",
            "-f",
            &format!("{manifests}/{file}"),
        ]);
        let output = tokio::task::spawn_blocking(move || kubectl.output()).await??;
        assert!(output.status.success(), "{file}: {}", String::from_utf8_lossy(&output.stderr));
    }
    let user = json!([{ "kind": "User", "name": PLAIN_USER }]);
    let rbac = "/apis/rbac.authorization.k8s.io/v1";
    let binding = |kind: &str| {
        json!({
            "metadata": { "name": "user" }, "subjects": user,
            "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": "opa-hub" },
        })
    };
    cluster.create(&format!("{rbac}/clusterrolebindings"), &binding("ClusterRole")).await?;
    cluster.create(&format!("{rbac}/namespaces/opa-hub/rolebindings"), &binding("Role")).await?;
    let kubeconfig = kubeconfig.display().to_string();
    let flags = ["--kubeconfig", &kubeconfig, "--namespace=opa-hub", "--replicate=v1/pods"];
    let hub = Hub::start(plane.dir.path(), &flags).await?;
    cluster.configmap("opa", "shop", Some(POLICY), &[("shop.rego", "package shop\n\nallow := true")]).await?;
    has_status(&cluster, "shop", "ok").await?;
    cluster.configmap("opa", "shop", Some(POLICY), &[("shop.rego", "package")]).await?;
    has_event(&cluster, "shop", "Warning Refused").await?;
    eventually("the last good policies are stored", async || {
        cluster.get_configmap("opa-hub", "opa-hub-main").await.map(drop)
    })
    .await?;
    assert_eq!(hub.json("/readyz").await?["problems"], json!([]));
    Ok(())
}
