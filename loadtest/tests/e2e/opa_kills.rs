//! OPA is killed repeatedly under query load: until all data is loaded, no decision is defined. The decision log contains
//! only these queries.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use opa_hub_loadtest::eventually::{equal, eventually};
use opa_hub_loadtest::lab::{Agent, Delivery, Hub, Opa, assets};
use serde_json::{Value, json};

use crate::world::{Way, consumer, write_list};

/// Number of pods, for a load of several requests.
const PODS: usize = 1500;
/// Default number of kills, set by `OPA_HUB_KILLS`.
const KILLS: usize = 6;
/// Query time of an OPA without a hub.
const WITHOUT_HUB: Duration = Duration::from_secs(2);

/// Rule defined on any data, and correct only on all data.
const POLICY: &str = "package count\n\npods := count([1 | some _, _ in data.kubernetes.pods.big])\n";

fn kills() -> usize {
    std::env::var("OPA_HUB_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(KILLS)
}

/// Decision counts.
#[derive(Default)]
struct Answers {
    right: AtomicUsize,
    undefined: AtomicUsize,
    wrong: AtomicUsize,
    stop: AtomicBool,
}

/// Queries without pause.
async fn ask(url: String, answers: Arc<Answers>) {
    let http = reqwest::Client::new();
    while !answers.stop.load(Ordering::Relaxed) {
        let answer = http.post(format!("{url}/v1/data/count/pods")).body("{\"input\":{}}").send().await;
        let Ok(answer) = answer else {
            tokio::task::yield_now().await;
            continue;
        };
        let Ok(body) = answer.bytes().await else { continue };
        let answer: Value = serde_json::from_slice(&body).unwrap_or_default();
        let count = match answer.get("result") {
            None => &answers.undefined,
            Some(count) if *count == json!(PODS) => &answers.right,
            Some(_) => &answers.wrong,
        };
        count.fetch_add(1, Ordering::Relaxed);
    }
}

async fn check(way: Way) -> anyhow::Result<()> {
    let assets = tokio::task::spawn_blocking(assets::folder).await??;
    let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let pod = |index| json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": format!("p{index}"), "namespace": "big" }, "text": "x".repeat(1000) });
    let policy = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "data": { "p.rego": POLICY },
        "metadata": { "name": "count", "namespace": "opa", "labels": { "openpolicyagent.org/policy": "rego" } },
    });
    let items: Vec<_> = (0..PODS).map(pod).chain([policy]).collect();
    write_list(manifests.path(), "all.json", &items)?;
    let folder = manifests.path().display().to_string();
    let mut hub =
        Hub::start(work.path(), &["--manifests", &folder, "--replicate", "v1/pods", "--log-level", "error"])
            .await?;
    let (mut opa, _agent) = consumer(way, &assets, work.path(), &hub).await?;
    let answers = Arc::new(Answers::default());
    let asking = tokio::spawn(ask(opa.url.clone(), Arc::clone(&answers)));
    let count = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
    let right_again = async |before: usize| {
        eventually("the decision is correct again", async || {
            equal(&(count(&answers.right) > before + 20), &true).map_err(|_| "not yet".to_owned())
        })
        .await
    };
    for index in 0..kills() {
        let is_up = index % 2 == 0;
        if !is_up {
            hub.kill();
        }
        opa.process = None;
        opa.restart().await?;
        let (right, undefined) = (count(&answers.right), count(&answers.undefined));
        if !is_up {
            tokio::time::sleep(WITHOUT_HUB).await;
            assert!(count(&answers.undefined) > undefined, "OPA was queried");
            assert_eq!(count(&answers.right), right, "{way:?}: OPA has no data");
            hub.spawn()?;
        }
        right_again(right).await?;
    }
    answers.stop.store(true, Ordering::Relaxed);
    asking.await?;
    println!("{way:?}: {} right, {} undefined", count(&answers.right), count(&answers.undefined));
    assert_eq!(count(&answers.wrong), 0, "{way:?}: decisions on partial data");
    Ok(())
}

#[tokio::test]
async fn i10_no_decision_on_partial_data_with_rest() -> anyhow::Result<()> {
    check(Way::Rest).await
}

#[tokio::test]
async fn i10_no_decision_on_partial_data_with_bundle() -> anyhow::Result<()> {
    check(Way::Bundle).await
}

/// Agents query no decisions.
#[tokio::test]
async fn decision_log_contains_no_agent_queries() -> anyhow::Result<()> {
    const IDLE: Duration = Duration::from_secs(3);
    let assets = tokio::task::spawn_blocking(assets::folder).await??;
    let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let hub = Hub::start(work.path(), &["--manifests", &manifests.path().display().to_string()]).await?;
    let config = json!({ "decision_logs": { "console": true } });
    let opa = Opa::start(&assets, work.path(), Some(&config), &[]).await?;
    let mut agent =
        Agent::start(work.path(), &Agent::address()?, &[&hub.url], &opa.url, Delivery::Rest, &[])?;
    agent.wait_in_step().await?;
    let decisions = || opa.process.as_ref().expect("OPA runs").log().matches("decision_id").count();
    let before = decisions();
    tokio::time::sleep(IDLE).await;
    assert_eq!(decisions(), before);
    opa.decide("/x", &json!({})).await?;
    eventually("the decision is logged", async || equal(&decisions(), &(before + 1))).await.map(drop)
}
