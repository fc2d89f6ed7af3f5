//! `demo`: a walk through policies, edits, data and restarts, with times.

use std::time::{Duration, Instant};

use opa_hub_loadtest::cluster::{Cluster, DATA, POLICY};
use opa_hub_loadtest::eventually::{equal, eventually};
use opa_hub_loadtest::lab::process::program;
use opa_hub_loadtest::lab::{Agent, ControlPlane, Delivery, Hub, Opa, assets};
use serde_json::{Value, json};

const NAMESPACE: &str = "opa-policy";
const ONLY_ADMIN: &str = "package example\n\ndefault allow := false\n\nallow if input.user == \"admin\"\n";
const GUEST_TOO: &str = "package example\n\ndefault allow := false\n\nallow if input.user == \"admin\"\n\nallow if input.user == \"guest\"\n";
const UNCOMPILABLE: &str = "package example\n\nallow if data.roles.no_such_function(input.user)\n";
const ROLES: &str = r#"{"admin": ["read", "write"], "guest": ["read"]}"#;

const MODULES: usize = 100;

pub(crate) async fn run() -> anyhow::Result<()> {
    for name in ["opa-hub", "opa-hub-agent"] {
        program(name)?;
    }
    tokio::task::spawn_blocking(assets::folder).await??;
    let started = Instant::now();
    let plane = ControlPlane::start().await?;
    step("a control plane: etcd and kube-apiserver", &"up", Some(started.elapsed()));
    let cluster = Cluster { client: plane.client().await? };
    cluster.namespace(NAMESPACE).await?;

    let dir = plane.dir.path();
    let kubeconfig = plane.kubeconfig.display().to_string();
    let started = Instant::now();
    let hub =
        Hub::start(dir, &["--kubeconfig", &kubeconfig, "--namespaces", NAMESPACE, "--replicate", "v1/pods"])
            .await?;
    step("a hub, watching policies and data in opa-policy, and all pods", &hub.url, Some(started.elapsed()));
    let mut opa = Opa::start(&plane.assets, dir, None, &[]).await?;
    let address = Agent::address()?;
    let started = Instant::now();
    let mut agent = Agent::start(dir, &address, &[&hub.url], &opa.url, Delivery::Rest, &[])?;
    agent.wait_in_step().await?;
    step("an OPA, and an agent beside it", &"in step", Some(started.elapsed()));

    let started = Instant::now();
    cluster.configmap(NAMESPACE, "example", Some(POLICY), &[("policy.rego", ONLY_ADMIN)]).await?;
    decide(&opa, "admin", true).await?;
    step(
        "kubectl create configmap example, labelled as policy: allow for admin",
        &true,
        Some(started.elapsed()),
    );
    decide(&opa, "guest", false).await?;
    step("allow for guest", &false, None);

    let started = Instant::now();
    cluster.configmap(NAMESPACE, "example", Some(POLICY), &[("policy.rego", GUEST_TOO)]).await?;
    decide(&opa, "guest", true).await?;
    step("an edit that lets guest in: allow for guest", &true, Some(started.elapsed()));

    let started = Instant::now();
    cluster.configmap(NAMESPACE, "example", Some(POLICY), &[("policy.rego", UNCOMPILABLE)]).await?;
    let annotation = verdict(&cluster, "error").await?;
    step(
        "an edit that does not compile: kubectl get configmap example, its annotation",
        &annotation,
        Some(started.elapsed()),
    );
    decide(&opa, "guest", true).await?;
    step("allow for guest, as before", &true, None);

    let started = Instant::now();
    cluster.pod("default", "web-1", &[("app", "web")]).await?;
    let path = "/kubernetes/pods/default/web-1/metadata/labels";
    expect_data(&opa, path, &json!({ "app": "web" })).await?;
    step(
        "kubectl create pod web-1: data.kubernetes.pods.default[\"web-1\"].metadata.labels",
        &opa.data(path).await?,
        Some(started.elapsed()),
    );

    let started = Instant::now();
    cluster.configmap(NAMESPACE, "role-data", Some(DATA), &[("roles.json", ROLES)]).await?;
    let path = "/opa-policy/role-data/roles.json";
    expect_data(&opa, path, &serde_json::from_str(ROLES)?).await?;
    step(
        "kubectl create configmap role-data: data[\"opa-policy\"][\"role-data\"][\"roles.json\"]",
        &opa.data(path).await?,
        Some(started.elapsed()),
    );

    opa.process = None;
    step("kill -9 OPA", &"gone", None);
    opa.restart().await?;
    let started = Instant::now();
    decide(&opa, "guest", true).await?;
    expect_data(&opa, path, &serde_json::from_str(ROLES)?).await?;
    step("OPA is back, empty: policies and data again", &"all there", Some(started.elapsed()));

    let texts: Vec<_> =
        (0..MODULES).map(|n| (format!("{n}.rego"), format!("package many.p{n}\n\nx := {n}"))).collect();
    let keys: Vec<_> = texts.iter().map(|(key, text)| (key.as_str(), text.as_str())).collect();
    cluster.configmap(NAMESPACE, "many", Some(POLICY), &keys).await?;
    let count = async || hub.json("/v1/bundles/main").await.map(|bundle| bundle["counts"]["modules"].clone());
    eventually("the modules are served", async || {
        equal(&count().await.map_err(|error| error.to_string())?, &json!(MODULES + 1))
    })
    .await?;
    let before = hub.json("/v1/bundles/main").await?["revision"].clone();
    let started = Instant::now();
    cluster.configmap(NAMESPACE, "example", Some(POLICY), &[("policy.rego", ONLY_ADMIN)]).await?;
    eventually("the edit is accepted", async || {
        let bundle = hub.json("/v1/bundles/main").await.map_err(|error| error.to_string())?;
        if bundle["revision"] == before { Err("not yet") } else { Ok(()) }.map_err(str::to_owned)
    })
    .await?;
    step("an edit beside 100 modules, until it is checked and served", &"accepted", Some(started.elapsed()));
    println!("done");
    Ok(())
}

async fn verdict(cluster: &Cluster, expected: &str) -> anyhow::Result<Value> {
    let verdict = eventually("the verdict", async || {
        let status = cluster.status(NAMESPACE, "example").await.map_err(|error| error.to_string())?;
        if status["status"] == expected { Ok(status) } else { Err(status.to_string()) }
    });
    Ok(verdict.await?.0)
}

async fn decide(opa: &Opa, user: &str, expected: bool) -> anyhow::Result<()> {
    let input = json!({ "user": user });
    eventually(format!("allow for {user}"), async || {
        let found = opa.decide("/example/allow", &input).await.map_err(|error| error.to_string())?;
        equal(&found, &Value::Bool(expected))
    })
    .await?;
    Ok(())
}

async fn expect_data(opa: &Opa, path: &str, expected: &Value) -> anyhow::Result<()> {
    eventually(format!("data at {path}"), async || {
        let found = opa.data(path).await.map_err(|error| error.to_string())?;
        equal(&found, expected)
    })
    .await?;
    Ok(())
}

fn step(what: &str, result: &dyn std::fmt::Display, took: Option<Duration>) {
    let took = took.map(|took| format!(" ({:.0} ms)", took.as_secs_f64() * 1000.0)).unwrap_or_default();
    println!("{what}\n    → {result}{took}");
}
