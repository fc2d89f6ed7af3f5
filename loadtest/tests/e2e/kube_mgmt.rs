//! Compatibility with kube-mgmt on real components, with each policy delivery.

use opa_hub_loadtest::cluster::{Cluster, DATA, POLICY};
use opa_hub_loadtest::eventually::{equal, eventually};
use opa_hub_loadtest::lab::{Agent, Delivery, Hub, Opa};
use serde_json::{Value, json};

use crate::world::{Way, World, consumer};

const TOKEN: &str = "the-agents-token";
/// Documented permissions of an agent.
const AUTHZ: &str = include_str!("../../../deploy/kubernetes/opa-authz.rego");

#[tokio::test]
async fn kube_mgmt_features_work_with_rest() -> anyhow::Result<()> {
    all(Way::Rest).await
}

#[tokio::test]
async fn kube_mgmt_features_work_with_bundle() -> anyhow::Result<()> {
    all(Way::Bundle).await
}

async fn all(way: Way) -> anyhow::Result<()> {
    let world = World::start(way, &["--enable-data"]).await?;
    world.cluster.namespace("opa").await?;
    defaults(&world).await?;
    several_files(&world).await?;
    odd_configmaps(&world).await?;
    custom_labels(&world).await?;
    protected_opa(&world).await?;
    replication(&world).await
}

/// Starts another hub, OPA and agent on the world's API server.
async fn another(world: &World, flags: &[&str]) -> anyhow::Result<(Hub, Opa, Option<Agent>)> {
    let kubeconfig = world.plane.kubeconfig.display().to_string();
    let flags: Vec<_> = ["--kubeconfig", &kubeconfig].iter().chain(flags).copied().collect();
    let hub = Hub::start(world.plane.dir.path(), &flags).await?;
    let (opa, agent) = consumer(world.way, &world.plane.assets, world.plane.dir.path(), &hub).await?;
    Ok((hub, opa, agent))
}

async fn decides(opa: &Opa, path: &str, input: Value, expected: Value) -> anyhow::Result<()> {
    eventually(format!("{path} for {input}"), async || {
        equal(&opa.decide(path, &input).await.map_err(|error| error.to_string())?, &expected)
    })
    .await
    .map(drop)
}

async fn has_annotations(cluster: &Cluster, name: &str, status: &str) -> anyhow::Result<Value> {
    let found = eventually(format!("ConfigMap {name} says {status}"), async || {
        let map = cluster.get_configmap("opa", name).await.map_err(|error| error.to_string())?;
        let annotations = map.metadata.annotations.unwrap_or_default();
        let text = annotations.get("openpolicyagent.org/kube-mgmt-status").map_or("null", String::as_str);
        let text: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let retries = annotations.get("openpolicyagent.org/kube-mgmt-retries").map(String::as_str);
        if text["status"] == status && retries == Some("0") {
            Ok(text)
        } else {
            Err(format!("{annotations:?}"))
        }
    });
    Ok(found.await?.0)
}

/// Policy and data appear and disappear with their labels.
async fn defaults(world: &World) -> anyhow::Result<()> {
    let cluster = &world.cluster;
    assert_eq!(world.opa.data("").await?, json!({}), "unloaded OPA is empty");
    world.has_modules(&[]).await?;
    let policy = "package my_pkg\n\ndefault my_rule := false\n\nmy_rule if input.hello == \"world\"";
    cluster.configmap("opa", "policy-default", Some(POLICY), &[("test.rego", policy)]).await?;
    world.decides("/my_pkg/my_rule", json!({ "hello": "world" }), json!(true)).await?;
    world.decides("/my_pkg/my_rule", json!({ "hello": "you" }), json!(false)).await?;
    world.has_modules(&["opa/policy-default/test.rego"]).await?;
    assert_eq!(has_annotations(cluster, "policy-default", "ok").await?, json!({ "status": "ok" }));
    cluster.configmap("opa", "data-default", Some(DATA), &[("x.json", r#"{"inKey": "inValue"}"#)]).await?;
    world.holds("/opa/data-default/x.json/inKey", json!("inValue")).await?;
    assert_eq!(has_annotations(cluster, "data-default", "ok").await?, json!({ "status": "ok" }));
    cluster.configmap("opa", "data-default", Some(DATA), &[("x.json", "{")]).await?;
    let status = has_annotations(cluster, "data-default", "error").await?;
    assert!(
        status["error"]["errors"][0]["message"].as_str().is_some_and(|text| text.contains("x.json")),
        "{status}"
    );

    // Both labels mean data; no label means ignored.
    cluster.configmap("opa", "neither", None, &[("x.rego", "package neither\n\nx := 1")]).await?;
    cluster.configmap("opa", "policy-default", None, &[("test.rego", policy)]).await?;
    world.decides("/my_pkg/my_rule", json!({}), Value::Null).await?;
    cluster.configmap("opa", "policy-default", Some(POLICY), &[("test.rego", policy)]).await?;
    world.decides("/my_pkg/my_rule", json!({}), json!(false)).await?;
    cluster.delete_configmap("opa", "policy-default").await?;
    cluster.delete_configmap("opa", "data-default").await?;
    world.has_modules(&[]).await?;
    world.holds("/opa", Value::Null).await?;
    assert_eq!(world.opa.data("/neither").await?, Value::Null);
    Ok(())
}

/// ConfigMaps with several files, one of which fails.
async fn several_files(world: &World) -> anyhow::Result<()> {
    let cluster = &world.cluster;
    let rule = "package multi\n\nimport data.multi_b\n\nrule := multi_b.value";
    let files = [("a.rego", rule), ("b.rego", "package multi_b\n\nvalue := 1")];
    cluster.configmap("opa", "multi", Some(POLICY), &files).await?;
    world.has_modules(&["opa/multi/a.rego", "opa/multi/b.rego"]).await?;
    world.decides("/multi/rule", json!({}), json!(1)).await?;
    has_annotations(cluster, "multi", "ok").await?;
    let failing = [("a.rego", "package multi_c\n\nx := 1"), ("b.rego", "package multi_d\n\ny := {")];
    cluster.configmap("opa", "multi-fail", Some(POLICY), &failing).await?;
    let status = has_annotations(cluster, "multi-fail", "error").await?;
    let error = &status["error"]["errors"][0];
    assert_eq!(
        (&error["code"], &error["location"]["file"]),
        (&json!("rego_parse_error"), &json!("opa/multi-fail/b.rego"))
    );
    world.has_modules(&["opa/multi/a.rego", "opa/multi/b.rego"]).await?;
    for name in ["multi", "multi-fail"] {
        cluster.delete_configmap("opa", name).await?;
    }
    world.has_modules(&[]).await
}

/// Names with dots, many keys, nearly 1 MiB, and binary keys.
async fn odd_configmaps(world: &World) -> anyhow::Result<()> {
    let cluster = &world.cluster;
    let big = format!("{{\"text\": \"{}\"}}", "x".repeat(1_000_000));
    cluster.configmap("opa", "big.data.v1", Some(DATA), &[("a.b-c_d", &big)]).await?;
    world.holds("/opa/big.data.v1/a.b-c_d/text", json!("x".repeat(1_000_000))).await?;
    let texts: Vec<_> =
        (0..200).map(|n| (format!("k{n:03}"), format!("package many.p{n}\n\nv := {n}"))).collect();
    let keys: Vec<_> = texts.iter().map(|(key, text)| (key.as_str(), text.as_str())).collect();
    cluster.configmap("opa", "many.keys", Some(POLICY), &keys).await?;
    world.decides("/many/p199/v", json!({}), json!(199)).await?;
    if world.way == Way::Rest {
        let ids: Vec<_> = texts.iter().map(|(key, _)| format!("opa/many.keys/{key}")).collect();
        world.has_modules(&ids.iter().map(String::as_str).collect::<Vec<_>>()).await?;
    }
    let binary = json!({
        "metadata": { "name": "binary", "labels": { POLICY.0: POLICY.1 } },
        "data": { "a.rego": "package binary\n\nx := 1" }, "binaryData": { "b.rego": "AAEC" },
    });
    cluster.create("/api/v1/namespaces/opa/configmaps", &binary).await?;
    world.decides("/binary/x", json!({}), json!(1)).await?;
    let status = has_annotations(cluster, "binary", "ok").await?;
    assert!(
        status["warnings"][0].as_str().is_some_and(|text| text.contains("binaryData is ignored")),
        "{status}"
    );
    for name in ["big.data.v1", "many.keys", "binary"] {
        cluster.delete_configmap("opa", name).await?;
    }
    world.has_modules(&[]).await
}

async fn custom_labels(world: &World) -> anyhow::Result<()> {
    let flags = [
        "--policy-label=qweqwe",
        "--policy-value=1",
        "--data-label=asdasd",
        "--data-value=2",
        "--namespaces=labels",
    ];
    let (_hub, opa, _agent) = another(world, &flags).await?;
    let cluster = &world.cluster;
    cluster.namespace("labels").await?;
    cluster
        .configmap("labels", "policy", Some(("qweqwe", "1")), &[("t.rego", "package labels_t\n\nx := 1")])
        .await?;
    cluster.configmap("labels", "data", Some(("asdasd", "2")), &[("d", r#"{"a": 1}"#)]).await?;
    cluster.configmap("labels", "default", Some(POLICY), &[("t.rego", "package labels_d\n\nx := 1")]).await?;
    cluster
        .configmap("opa", "elsewhere", Some(("qweqwe", "1")), &[("t.rego", "package labels_e\n\nx := 1")])
        .await?;
    decides(&opa, "/labels_t/x", json!({}), json!(1)).await?;
    decides(&opa, "/labels/data/d/a", json!({}), json!(1)).await?;
    for undefined in ["/labels_d/x", "/labels_e/x"] {
        assert_eq!(opa.decide(undefined, &json!({})).await?, Value::Null);
    }
    world.cluster.delete_configmap("labels", "default").await?;
    Ok(())
}

/// An OPA that requires the agent's token for writes.
async fn protected_opa(world: &World) -> anyhow::Result<()> {
    let (plane, dir) = (&world.plane, world.plane.dir.path());
    // The test also reads modules.
    let authz = AUTHZ.replace("opa.runtime().env.AGENT_TOKEN", &format!("{TOKEN:?}"));
    let authz = format!(
        "{authz}\nallow if {{\n\tinput.method == \"GET\"\n\tinput.path == [\"v1\", \"policies\"]\n}}\n"
    );
    std::fs::write(dir.join("authz.rego"), authz)?;
    std::fs::write(dir.join("token"), format!("{TOKEN}\n"))?;
    let authz = dir.join("authz.rego").display().to_string();
    let delivery = if world.way == Way::Rest { Delivery::Rest } else { Delivery::Bundle };
    let address = Agent::address()?;
    let config = (delivery == Delivery::Bundle).then(|| Agent::opa_config(&address));
    let flags = ["--authentication=token", "--authorization=basic", authz.as_str()];
    let opa = Opa::start(&plane.assets, dir, config.as_ref(), &flags).await?;
    let token = dir.join("token").display().to_string();
    let start = |flags: &[&str]| Agent::start(dir, &address, &[&world.hub.url], &opa.url, delivery, flags);
    let stranger = start(&[])?;
    eventually("OPA rejects an agent without a token", async || {
        let status = stranger.status().await.map_err(|error| error.to_string())?.to_string();
        if status.contains("401") { Ok(()) } else { Err(status) }
    })
    .await?;
    drop(stranger);
    let mut agent = start(&["--opa-auth-token-file", &token])?;
    agent.wait_in_step().await?;
    let policy = [("p.rego", "package protected\n\nx := 1")];
    world.cluster.configmap("opa", "protected", Some(POLICY), &policy).await?;
    decides(&opa, "/protected/x", json!({}), json!(1)).await?;
    let ours = if delivery == Delivery::Rest { "opa/protected/p.rego" } else { "main/opa/protected/p.rego" };
    let modules = opa.modules().await?;
    assert!(modules.len() == 2 && modules.iter().any(|id| id == ours), "{modules:?}");
    world.cluster.delete_configmap("opa", "protected").await?;
    decides(&opa, "/protected/x", json!({}), Value::Null).await
}

/// Namespaced and cluster-scoped resources, ignored ones, unusual names, deletes.
async fn replication(world: &World) -> anyhow::Result<()> {
    let cluster = &world.cluster;
    let flags = [
        "--replicate=v1/configmaps",
        "--replicate=v1/pods,networking.k8s.io/v1/ingresses",
        "--replicate-cluster=v1/namespaces",
        "--replicate-cluster=rbac.authorization.k8s.io/v1/clusterroles",
        "--replicate-path=/some/path",
        "--replicate-ignore-namespaces=kube-system,ignored",
        "--enable-policies=false",
    ];
    for namespace in ["seen", "ignored"] {
        cluster.namespace(namespace).await?;
    }
    let (_hub, opa, _agent) = another(world, &flags).await?;
    decides(&opa, "/some/path/ingresses", json!({}), json!({})).await?;
    for namespace in ["seen", "ignored"] {
        cluster.configmap(namespace, "dotted.name-1", None, &[("k", "v")]).await?;
        cluster.pod(namespace, "pod", &[("app", "a")]).await?;
    }
    let role = json!({ "metadata": { "name": "system:odd:role" }, "rules": [] });
    cluster.create("/apis/rbac.authorization.k8s.io/v1/clusterroles", &role).await?;
    decides(&opa, "/some/path/configmaps/seen/dotted.name-1/data/k", json!({}), json!("v")).await?;
    decides(&opa, "/some/path/pods/seen/pod/metadata/labels/app", json!({}), json!("a")).await?;
    decides(&opa, "/some/path/namespaces/ignored/kind", json!({}), json!("Namespace")).await?;
    decides(&opa, "/some/path/clusterroles/system:odd:role/kind", json!({}), json!("ClusterRole")).await?;
    assert_eq!(opa.data("/some/path/pods/ignored").await?, Value::Null);
    assert_eq!(opa.data("/some/path/configmaps/ignored").await?, Value::Null);
    cluster.delete_pod("seen", "pod").await?;
    decides(&opa, "/some/path/pods/seen/pod", json!({}), Value::Null).await?;
    decides(&opa, "/some/path/pods", json!({}), json!({})).await
}
