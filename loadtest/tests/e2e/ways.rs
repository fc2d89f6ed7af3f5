//! One script for each way of delivery: edits, labels, ignored namespaces, kills, restarts, churn.

use std::time::{Duration, Instant};

use opa_hub_loadtest::cluster::{DATA, POLICY};
use opa_hub_loadtest::eventually::{equal, eventually};
use serde_json::{Value, json};

use crate::world::{Way, World};

const FLAGS: [&str; 4] = ["--replicate", "v1/pods", "--replicate-ignore-namespaces", "ignored"];
const CHURN: Duration = Duration::from_secs(30);

fn allow(user: &str) -> String {
    format!("package authz\n\ndefault allow := false\n\nallow if input.user == \"{user}\"\n")
}

#[tokio::test]
async fn direct_from_the_bundle_url() -> anyhow::Result<()> {
    everything(Way::Direct).await
}

#[tokio::test]
async fn agent_with_rest() -> anyhow::Result<()> {
    everything(Way::Rest).await
}

#[tokio::test]
async fn agent_with_bundle() -> anyhow::Result<()> {
    everything(Way::Bundle).await
}

async fn everything(way: Way) -> anyhow::Result<()> {
    let mut world = World::start(way, &FLAGS).await?;
    for namespace in ["opa", "ignored"] {
        world.cluster.namespace(namespace).await?;
    }
    policies(&world).await?;
    data(&world).await?;
    pods(&world).await?;
    opa_killed(&mut world).await?;
    if way != Way::Direct {
        agent_killed(&mut world).await?;
    }
    hub_restarted(&mut world).await?;
    apiserver_restarted(&mut world).await?;
    churn(&world).await
}

async fn policies(world: &World) -> anyhow::Result<()> {
    let cluster = &world.cluster;
    let (bob, alice) = (json!({ "user": "bob" }), json!({ "user": "alice" }));
    cluster.configmap("opa", "authz", Some(POLICY), &[("allow.rego", &allow("alice"))]).await?;
    world.decides("/authz/allow", alice.clone(), json!(true)).await?;
    world.decides("/authz/allow", bob.clone(), json!(false)).await?;
    cluster.configmap("opa", "authz", Some(POLICY), &[("allow.rego", &allow("bob"))]).await?;
    world.decides("/authz/allow", bob.clone(), json!(true)).await?;
    world.decides("/authz/allow", alice, json!(false)).await?;
    cluster
        .configmap(
            "opa",
            "more",
            Some(POLICY),
            &[("a.rego", "package a\np := 1"), ("b.rego", "package b\np := data.a.p")],
        )
        .await?;
    world.has_modules(&["opa/authz/allow.rego", "opa/more/a.rego", "opa/more/b.rego"]).await?;
    world.decides("/b/p", json!({}), json!(1)).await?;
    // An unparseable text is not served: the last good one remains.
    cluster.configmap("opa", "more", Some(POLICY), &[("a.rego", "package a\np := {")]).await?;
    cluster.configmap("opa", "authz", Some(POLICY), &[("allow.rego", &allow("carol"))]).await?;
    world.decides("/authz/allow", json!({ "user": "carol" }), json!(true)).await?;
    world.decides("/b/p", json!({}), json!(1)).await?;
    let bundle = world.hub.json("/v1/bundles/main").await?;
    assert!(
        bundle["problems"][0]["message"].as_str().is_some_and(|text| text.contains("a.rego")),
        "{bundle}"
    );
    // Removing and restoring a label removes and restores the module.
    cluster.configmap("opa", "authz", None, &[("allow.rego", &allow("bob"))]).await?;
    world.decides("/authz/allow", bob.clone(), Value::Null).await?;
    cluster.configmap("opa", "authz", Some(POLICY), &[("allow.rego", &allow("bob"))]).await?;
    world.decides("/authz/allow", bob, json!(true)).await?;
    cluster.delete_configmap("opa", "more").await?;
    world.has_modules(&["opa/authz/allow.rego"]).await
}

async fn data(world: &World) -> anyhow::Result<()> {
    let cluster = &world.cluster;
    let roles = r#"{ "admin": ["read", "write"], "level": 1.50 }"#;
    cluster.configmap("opa", "roles", Some(DATA), &[("roles.json", roles), ("more", "{}")]).await?;
    let expected: Value = serde_json::from_str(roles)?;
    world.holds("/opa/roles", json!({ "roles.json": expected })).await?;
    cluster.configmap("opa", "roles", Some(DATA), &[("roles.json", "[]")]).await?;
    cluster.configmap("opa", "other", Some(DATA), &[("x", r#"{"a": 1}"#)]).await?;
    world.holds("/opa/other/x/a", json!(1)).await?;
    world.holds("/opa/roles", json!({ "roles.json": expected })).await?;
    cluster.configmap("opa", "roles", Some(DATA), &[("other.json", r#"{"b": 2}"#)]).await?;
    world.holds("/opa/roles", json!({ "other.json": { "b": 2 } })).await?;
    cluster.delete_configmap("opa", "roles").await?;
    world.holds("/opa", json!({ "other": { "x": { "a": 1 } } })).await
}

async fn pods(world: &World) -> anyhow::Result<()> {
    let cluster = &world.cluster;
    // Without objects there is an empty map, as with kube-mgmt.
    eventually("an empty map", async || {
        equal(&world.opa.data("/kubernetes/pods").await.map_err(|error| error.to_string())?, &json!({}))
    })
    .await?;
    for name in ["web-1", "web-2"] {
        cluster.pod("opa", name, &[("app", "web")]).await?;
        cluster.pod("ignored", name, &[("app", "web")]).await?;
    }
    world.mirrors_pods(&["ignored"]).await?;
    cluster.label_pod("opa", "web-1", &[("tier", "front")]).await?;
    world.mirrors_pods(&["ignored"]).await?;
    cluster.delete_pod("opa", "web-1").await?;
    world.mirrors_pods(&["ignored"]).await?;
    cluster.delete_pod("opa", "web-2").await?;
    world.mirrors_pods(&["ignored"]).await?;
    cluster.pod("opa", "web-1", &[]).await?;
    world.mirrors_pods(&["ignored"]).await
}

async fn opa_killed(world: &mut World) -> anyhow::Result<()> {
    world.opa.process = None;
    world.opa.restart().await?;
    world.decides("/authz/allow", json!({ "user": "bob" }), json!(true)).await?;
    world.mirrors_pods(&["ignored"]).await?;
    if let Some(agent) = &mut world.agent {
        agent.wait_in_step().await?;
    }
    Ok(())
}

async fn agent_killed(world: &mut World) -> anyhow::Result<()> {
    let Some(agent) = &mut world.agent else { return Ok(()) };
    agent.kill();
    world.cluster.pod("opa", "while-the-agent-was-away", &[]).await?;
    world.cluster.configmap("opa", "authz", Some(POLICY), &[("allow.rego", &allow("dora"))]).await?;
    agent.spawn()?;
    agent.wait_in_step().await?;
    world.decides("/authz/allow", json!({ "user": "dora" }), json!(true)).await?;
    world.mirrors_pods(&["ignored"]).await?;
    let done = &world.agent.as_ref().expect("agent exists").status().await?["done"];
    assert_eq!(
        (&done["snapshots"], &done["reconciles"]),
        (&json!(0), &json!(0)),
        "agent resumed from OPA's marker"
    );
    Ok(())
}

async fn hub_restarted(world: &mut World) -> anyhow::Result<()> {
    world.hub.kill();
    world.cluster.pod("opa", "while-the-hub-was-away", &[]).await?;
    world.cluster.delete_pod("opa", "web-1").await?;
    world.cluster.configmap("opa", "authz", Some(POLICY), &[("allow.rego", &allow("erin"))]).await?;
    world.hub.spawn()?;
    world.hub.wait_ready().await?;
    world.decides("/authz/allow", json!({ "user": "erin" }), json!(true)).await?;
    world.mirrors_pods(&["ignored"]).await?;
    if world.way == Way::Direct {
        return Ok(());
    }
    let text = reqwest::get(format!("{}/metrics", world.hub.url)).await?.text().await?;
    let count =
        |sample: &str| text.lines().find_map(|line| line.strip_prefix(sample)?.trim().parse::<u64>().ok());
    for part in ["whole", "data"] {
        let sample = format!("opa_hub_snapshots_served_total{{bundle=\"main\",part=\"{part}\"}}");
        assert_eq!(count(&sample), Some(0), "no snapshot is served after a restart\n{text}");
    }
    assert_eq!(world.hub.metric("opa_hub_reconciles_total").await?, 1);
    eventually("the stream follows the reconcile", async || {
        equal(&world.hub.metric("opa_hub_agents").await.map_err(|error| error.to_string())?, &1)
    })
    .await
    .map(drop)
}

async fn apiserver_restarted(world: &mut World) -> anyhow::Result<()> {
    world.plane.stop_apiserver();
    // Content remains during a source outage.
    world.decides("/authz/allow", json!({ "user": "erin" }), json!(true)).await?;
    world.plane.start_apiserver().await?;
    world.cluster.pod("opa", "after-the-api-server-was-away", &[]).await?;
    world.cluster.configmap("opa", "authz", Some(POLICY), &[("allow.rego", &allow("frank"))]).await?;
    world.decides("/authz/allow", json!({ "user": "frank" }), json!(true)).await?;
    world.mirrors_pods(&["ignored"]).await
}

/// After half a minute of pod churn, OPA has exactly the API server's pods.
async fn churn(world: &World) -> anyhow::Result<()> {
    let mut random = fastrand::Rng::with_seed(7);
    let mut live: Vec<String> = Vec::new();
    let until = Instant::now() + CHURN;
    let mut count = 0;
    while Instant::now() < until {
        count += 1;
        match random.u8(0..4) {
            0 | 1 if live.len() < 40 => {
                let name = format!("churn-{count}");
                world.cluster.pod("default", &name, &[("round", "0")]).await?;
                live.push(name);
            }
            2 if !live.is_empty() => {
                let name = live.swap_remove(random.usize(..live.len()));
                world.cluster.delete_pod("default", &name).await?;
            }
            _ if !live.is_empty() => {
                let name = &live[random.usize(..live.len())];
                world.cluster.label_pod("default", name, &[("round", &count.to_string())]).await?;
            }
            _ => {}
        }
    }
    assert!(!live.is_empty() && count > 100, "{count} changes in {} s", CHURN.as_secs());
    world.mirrors_pods(&["ignored"]).await
}
