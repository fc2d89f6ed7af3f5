//! Random valid and invalid edits of interdependent policies while OPAs are queried.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use opa_hub_loadtest::cluster::{Cluster, POLICY};
use opa_hub_loadtest::eventually::{equal, eventually};
use opa_hub_loadtest::lab::process::Process;
use opa_hub_loadtest::lab::{Agent, ControlPlane, Delivery, Hub, Opa, assets};
use serde_json::{Value, json};

use crate::world::{Way, consumer, write_manifest};

const CONFIGMAPS: usize = 20;
const EDITS: usize = 200;
const SEED: u64 = 11;

/// Unedited policy; valid edits of its library never change its decision.
const UNTOUCHED: &str = "package untouched\n\nallow if data.lib.f(1) == 2";
const LIBRARY: [&str; 5] = [
    "package lib\n\nf(x) := x + 1",
    "package lib\n\n# The same in other words.\nf(y) := 1 + y",
    "package lib\n\ng(x) := x + 1",
    "package lib\n\nf(x) := x + ",
    "package lib\n\nf(x, y) := x + y",
];

/// Returns a valid policy that calls another one.
fn valid(index: usize, other: usize, value: usize) -> String {
    let call = if index == 0 { String::new() } else { format!("\n\nv := data.p{other}.f({value})") };
    format!("package p{index}\n\nf(x) := x + {value}{call}")
}

/// Returns a policy that is invalid or breaks its callers.
fn broken(index: usize, other: usize, kind: u8) -> String {
    match kind {
        0 => format!("package p{index}\n\nf(x) := x +"),
        1 => format!("package p{index}\n\nf(x) := x\n\nv := data.p{other}.no_such(1)"),
        2 => format!("package p{index}\n\ng(x) := x"),
        3 => format!("package p{index}\n\nf(x, y) := x + y"),
        4 => format!("package p{other}\n\nf := {index}"),
        _ => "no module at all".into(),
    }
}

/// Returns module texts by id, without the bundle's name.
async fn texts(opa: &Opa) -> anyhow::Result<BTreeMap<String, String>> {
    let texts = opa.texts().await?;
    Ok(texts
        .into_iter()
        .map(|(id, text)| (id.strip_prefix("main/").unwrap_or(&id).to_owned(), text))
        .collect())
}

fn compiles(program: &Path, texts: &BTreeMap<String, String>) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    for (index, text) in texts.values().enumerate() {
        std::fs::write(dir.path().join(format!("{index}.rego")), text)?;
    }
    let output = Command::new(program).arg("check").arg(dir.path()).output()?;
    anyhow::ensure!(output.status.success(), "OPA has modules that do not compile: {texts:#?}");
    Ok(())
}

async fn edit_at_random(cluster: &Cluster, random: &mut fastrand::Rng, edit: usize) -> anyhow::Result<()> {
    let index = random.usize(..CONFIGMAPS);
    let (name, other) = (format!("c{index:02}"), random.usize(..index.max(1)));
    let write = |text: String| {
        let (cluster, name) = (cluster.clone(), name.clone());
        async move { cluster.configmap("opa", &name, Some(POLICY), &[("m.rego", &text)]).await }
    };
    match random.u8(..10) {
        0 => _ = cluster.delete_configmap("opa", &name).await,
        1 => {
            let text = LIBRARY[random.usize(..LIBRARY.len())];
            cluster.configmap("opa", "lib", Some(POLICY), &[("l.rego", text)]).await?;
        }
        2 => _ = cluster.delete_configmap("opa", "lib").await,
        3..6 => write(broken(index, other, random.u8(..6))).await?,
        _ => write(valid(index, other, edit)).await?,
    }
    Ok(())
}

/// I6: OPA's modules always compile, decisions of an unedited policy never change, and finally each OPA has exactly the
/// accepted modules.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i6_random_edits_never_break_what_is_served() -> anyhow::Result<()> {
    let plane = ControlPlane::start().await?;
    let cluster = Cluster { client: plane.client().await? };
    cluster.namespace("opa").await?;
    cluster.configmap("opa", "untouched", Some(POLICY), &[("u.rego", UNTOUCHED)]).await?;
    cluster.configmap("opa", "lib", Some(POLICY), &[("l.rego", LIBRARY[0])]).await?;
    for index in 0..CONFIGMAPS {
        let text = valid(index, index.saturating_sub(1), 1);
        cluster.configmap("opa", &format!("c{index:02}"), Some(POLICY), &[("m.rego", &text)]).await?;
    }
    let kubeconfig = plane.kubeconfig.display().to_string();
    let hub = Hub::start(plane.dir.path(), &["--kubeconfig", &kubeconfig]).await?;
    let mut opas = Vec::new();
    for way in [Way::Rest, Way::Bundle] {
        let (opa, agent) = consumer(way, &plane.assets, plane.dir.path(), &hub).await?;
        eventually("the first policies", async || {
            equal(
                &opa.decide("/untouched/allow", &json!({})).await.map_err(|error| error.to_string())?,
                &json!(true),
            )
        })
        .await?;
        opas.push((Arc::new(opa), agent));
    }

    let (stop, looks) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let mut watchers = tokio::task::JoinSet::new();
    for (opa, _) in &opas {
        let (opa, stop, looks) = (opa.clone(), stop.clone(), looks.clone());
        let program = plane.assets.join("opa");
        watchers.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                compiles(&program, &texts(&opa).await?)?;
                for _ in 0..20 {
                    let allowed = opa.decide("/untouched/allow", &json!({})).await?;
                    anyhow::ensure!(allowed == json!(true), "unedited policy decides {allowed}");
                    looks.fetch_add(1, Ordering::Relaxed);
                }
            }
            Ok(())
        });
    }

    let mut random = fastrand::Rng::with_seed(SEED);
    for edit in 0..EDITS {
        edit_at_random(&cluster, &mut random, edit).await?;
        // The hub receives single edits and bursts.
        if edit % 4 == 0 {
            cluster
                .configmap(
                    "opa",
                    "last",
                    Some(POLICY),
                    &[("l.rego", &format!("package last\n\nx := {edit}"))],
                )
                .await?;
            for (opa, _) in &opas {
                eventually("the edits are checked", async || {
                    let found = opa.decide("/last/x", &json!({})).await.map_err(|error| error.to_string())?;
                    equal(&found, &json!(edit))
                })
                .await?;
            }
        }
    }

    cluster.delete_configmap("opa", "last").await?;
    // Finally all are valid, each calling its predecessor.
    let mut expected = BTreeMap::from([("opa/untouched/u.rego".to_owned(), UNTOUCHED.to_owned())]);
    cluster.configmap("opa", "lib", Some(POLICY), &[("l.rego", LIBRARY[1])]).await?;
    expected.insert("opa/lib/l.rego".into(), LIBRARY[1].into());
    for index in 0..CONFIGMAPS {
        let text = valid(index, index.saturating_sub(1), 1000 + index);
        cluster.configmap("opa", &format!("c{index:02}"), Some(POLICY), &[("m.rego", &text)]).await?;
        expected.insert(format!("opa/c{index:02}/m.rego"), text);
    }
    for (opa, _) in &opas {
        eventually("the final policies", async || {
            equal(&texts(opa).await.map_err(|error| error.to_string())?, &expected)
        })
        .await?;
        assert_eq!(opa.decide("/p7/v", &json!({})).await?, json!(1007 + 1006));
    }
    stop.store(true, Ordering::Relaxed);
    while let Some(watcher) = watchers.join_next().await {
        watcher??;
    }
    assert!(looks.load(Ordering::Relaxed) > EDITS, "decisions were checked: {looks:?}");
    let bundle = hub.json("/v1/bundles/main").await?;
    assert_eq!(bundle["problems"], json!([]), "{bundle}");
    let log = hub.process.as_ref().map(Process::log).unwrap_or_default();
    assert!(log.matches("last good content stays").count() > CONFIGMAPS, "too few invalid edits\n{log}");
    Ok(())
}

/// Rules swapped between two modules are delivered, although no order of single writes compiles.
#[tokio::test]
async fn modules_swapping_rules_are_delivered() -> anyhow::Result<()> {
    let assets = tokio::task::spawn_blocking(assets::folder).await??;
    let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let write = |a: &str, b: &str| {
        let manifest = json!({
            "apiVersion": "v1", "kind": "ConfigMap", "data": { "a.rego": a, "b.rego": b },
            "metadata": { "name": "m", "namespace": "ns", "labels": { POLICY.0: POLICY.1 } },
        });
        write_manifest(manifests.path(), "m.json", &manifest)
    };
    let (x, y) = ("package p\n\ndefault x := 1", "package p\n\ndefault y := 2");
    write(x, y)?;
    let hub = Hub::start(work.path(), &["--manifests", &manifests.path().display().to_string()]).await?;
    let opa = Opa::start(&assets, work.path(), None, &[]).await?;
    let foreign = reqwest::Client::builder().no_proxy().build()?;
    let policy =
        foreign.put(format!("{}/v1/policies/somebody/elses", opa.url)).body("package somebody\n\nx := 1");
    policy.send().await?.error_for_status()?;
    let mut agent =
        Agent::start(work.path(), &Agent::address()?, &[&hub.url], &opa.url, Delivery::Rest, &[])?;
    agent.wait_in_step().await?;
    let holds = async |a: &str, b: &str| {
        eventually("both modules", async || {
            let mut texts = opa.texts().await.map_err(|error| error.to_string())?;
            texts.remove("somebody/elses").ok_or("what the agent did not put is touched by nobody")?;
            let ids = ["ns/m/a.rego", "ns/m/b.rego"].map(str::to_owned);
            equal(&texts, &ids.into_iter().zip([a.to_owned(), b.to_owned()]).collect())
        })
        .await
    };
    holds(x, y).await?;
    write(y, x)?;
    holds(y, x).await?;
    agent.wait_in_step().await?;
    assert_eq!(agent.status().await?["behind"], json!([]), "nothing is rejected");
    // The marker matches OPA's content.
    let marker = opa.marker("main").await?;
    assert_eq!(marker["revision"], hub.json("/v1/bundles/main").await?["revision"]);
    assert!(
        marker["modules"].as_object().is_some_and(|modules| modules.values().all(Value::is_string)),
        "{marker}"
    );
    Ok(())
}

/// Tests of a labelled ConfigMap gate it, and are not served.
#[tokio::test]
async fn tests_gate_their_configmap() -> anyhow::Result<()> {
    tokio::task::spawn_blocking(assets::folder).await??;
    let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let write = |value: u8, test: &str| {
        let manifest = json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "data": { "p.rego": format!("package p\n\nx := {value}"), "p_test.rego": format!("package p_test\n\n{test}") },
            "metadata": { "name": "m", "namespace": "ns", "labels": { POLICY.0: POLICY.1, "run-tests": "true" } },
        });
        write_manifest(manifests.path(), "m.json", &manifest)
    };
    write(1, "test_x if data.p.x == 1")?;
    let folder = manifests.path().display().to_string();
    let hub = Hub::start(work.path(), &["--manifests", &folder, "--test-label", "run-tests"]).await?;
    let served = hub.json("/v1/bundles/main").await?;
    assert_eq!(served["counts"]["modules"], 1, "{served}");
    for (value, test, reason) in [
        (2, "test_x if data.p.x == 1", "test data.p_test.test_x failed"),
        (3, "test_x if data.p.x == ", "rego_parse_error"),
        (4, "test_x if data.p.f(1)", "undefined function data.p.f"),
        (5, "test_x if http.send({\"method\": \"get\", \"url\": \"http://127.0.0.1:1\"})", "test_x failed"),
    ] {
        write(value, test)?;
        eventually(format!("the policy is rejected: {reason}"), async || {
            let bundle = hub.json("/v1/bundles/main").await.map_err(|error| error.to_string())?;
            let verdict = bundle["verdicts"]["ns/m"].to_string();
            equal(&bundle["revision"], &served["revision"])?;
            if verdict.contains(reason) { Ok(()) } else { Err(verdict) }
        })
        .await?;
    }
    write(6, "test_x if data.p.x == 6")?;
    eventually("the policy is accepted", async || {
        let bundle = hub.json("/v1/bundles/main").await.map_err(|error| error.to_string())?;
        if bundle["revision"] == served["revision"] { Err(bundle.to_string()) } else { Ok(()) }
    })
    .await
    .map(drop)
}
