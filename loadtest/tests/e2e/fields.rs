//! `--fields`: only selected fields are sent, other changes send nothing, and no policy decides on missing fields.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::Context as _;
use opa_hub_loadtest::eventually::{equal, eventually};
use opa_hub_loadtest::lab::{Agent, Delivery, Hub, Opa, assets};
use serde_json::{Value, json};

use crate::world::write_manifest;

#[tokio::test]
async fn only_selected_fields_are_sent() -> anyhow::Result<()> {
    let assets = tokio::task::spawn_blocking(assets::folder).await??;
    let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let pod = |name: &str, app: &str, phase: &str| {
        let manifest = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "labels": { "app": app } },
            "spec": { "containers": [{ "name": "c", "image": "i" }] }, "status": { "phase": phase },
        });
        write_manifest(manifests.path(), &format!("{name}.json"), &manifest)
    };
    pod("a", "web", "Pending")?;
    pod("b", "db", "Pending")?;
    let folder = manifests.path().display().to_string();
    let fields = "--fields=metadata.labels,spec.containers[*].image";
    let hub = Hub::start(work.path(), &["--manifests", &folder, "--replicate=v1/pods", fields]).await?;
    let opa = Opa::start(&assets, work.path(), None, &[]).await?;
    let mut agent =
        Agent::start(work.path(), &Agent::address()?, &[&hub.url], &opa.url, Delivery::Rest, &[])?;
    agent.wait_in_step().await?;
    let seen = |app: &str| -> Value {
        json!({ "metadata": { "labels": { "app": app } }, "spec": { "containers": [{ "image": "i" }] } })
    };
    let pods = |a: &str, b: &str| json!({ "default": { "a": seen(a), "b": seen(b) } });
    assert_eq!(opa.data("/kubernetes/pods").await?, pods("web", "db"));
    let before = hub.metric("opa_hub_view_changes_total").await?;
    // Only the second change is visible; by then the first was processed.
    pod("a", "web", "Running")?;
    eventually("the hub has seen the change", async || {
        equal(&hub.metric("opa_hub_source_events_total").await.map_err(|error| error.to_string())?, &3)
    })
    .await?;
    pod("b", "cache", "Running")?;
    eventually("the label reaches OPA", async || {
        equal(&opa.data("/kubernetes/pods").await.map_err(|error| error.to_string())?, &pods("web", "cache"))
    })
    .await?;
    assert_eq!(hub.metric("opa_hub_view_changes_total").await?, before + 1);
    Ok(())
}

/// Number of policy edits under query load.
const EDITS: u64 = 40;
const SEED: u64 = 10;
/// Readable fields of a pod, with their values.
const FIELDS: [(&str, &str); 4] = [
    ("metadata.labels.app", "web"),
    ("spec.containers[0].image", "i"),
    ("status.podIP", "10.0.0.1"),
    ("spec.nodeName", "n"),
];

/// Writes a policy that reads some fields of every pod, and is undefined if one is missing.
fn policy(dir: &Path, version: u64, reads: &[usize]) -> anyhow::Result<()> {
    let field = |index: &usize| format!("\"f{index}\": pod.{}", FIELDS[*index].0);
    let fields: Vec<_> = reads.iter().map(field).collect();
    let text = format!(
        "package t\nby_pod[name] := {{\"version\": {version}, {}}} if {{\n  some name, pod in data.kubernetes.pods[\"default\"]\n}}\n",
        fields.join(", ")
    );
    let manifest = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "data": { "t.rego": text },
        "metadata": { "name": "t", "namespace": "opa", "labels": { "openpolicyagent.org/policy": "rego" } },
    });
    write_manifest(dir, "policy.json", &manifest)
}

/// Queries until stopped. Each answer must be one version's complete decision. Returns the number of queries.
async fn query(opa: &Opa, stop: &AtomicBool, newest: &AtomicU64) -> anyhow::Result<u64> {
    let mut asked = 0;
    while !stop.load(Ordering::Relaxed) {
        let answer = opa.decide("/t/by_pod", &json!({})).await?;
        asked += 1;
        let pods = answer.as_object().filter(|pods| pods.len() == 2);
        let pods = pods.ok_or_else(|| anyhow::anyhow!("a pod is missing: {answer}"))?;
        for decision in pods.values() {
            let version = decision["version"].as_u64().unwrap_or(u64::MAX);
            anyhow::ensure!(version <= newest.load(Ordering::Relaxed), "unknown version: {answer}");
            for (index, (_, expected)) in FIELDS.iter().enumerate() {
                let found = decision.get(format!("f{index}"));
                anyhow::ensure!(found.is_none_or(|found| found == expected), "a wrong value: {answer}");
            }
        }
    }
    Ok(asked)
}

/// I10: policies change their fields under query load while hub and agents are killed.
async fn i10_no_policy_decides_on_less_than_it_reads(hubs: usize) -> anyhow::Result<()> {
    let assets = tokio::task::spawn_blocking(assets::folder).await??;
    let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let dir = manifests.path();
    for name in ["a", "b"] {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "labels": { "app": "web" } },
            "spec": { "containers": [{ "name": "c", "image": "i" }], "nodeName": "n", "hostIPC": false },
            "status": { "podIP": "10.0.0.1", "phase": "Running" },
        });
        write_manifest(dir, &format!("{name}.json"), &pod)?;
    }
    policy(dir, 0, &[0])?;
    let folder = dir.display().to_string();
    let flags = ["--manifests", &folder, "--replicate=v1/pods", "--fields=auto"];
    let mut hubs = futures::future::try_join_all((0..hubs).map(|_| Hub::start(work.path(), &flags))).await?;
    let urls: Vec<_> = hubs.iter().map(|hub| hub.url.clone()).collect();
    let urls: Vec<_> = urls.iter().map(String::as_str).collect();
    let (mut opas, mut agents) = (Vec::new(), Vec::new());
    for delivery in [Delivery::Rest, Delivery::Bundle] {
        let address = Agent::address()?;
        let config = (delivery == Delivery::Bundle).then(|| Agent::opa_config(&address));
        let opa = Opa::start(&assets, work.path(), config.as_ref(), &[]).await?;
        let mut agent = Agent::start(work.path(), &address, &urls, &opa.url, delivery, &[])?;
        agent.wait_in_step().await?;
        opas.push(opa);
        agents.push(agent);
    }
    let [rest, bundle] = &opas[..] else { anyhow::bail!("two OPAs") };
    let seen = json!({ "metadata": { "labels": { "app": "web" } } });
    assert_eq!(rest.data("/kubernetes/pods/default/a").await?, seen);
    let decides = async |opa: &Opa, version: u64| {
        eventually(format!("version {version} decides"), async || {
            let found = opa.decide("/t/by_pod/a/version", &json!({})).await.map_err(|e| e.to_string())?;
            equal(&found, &json!(version))
        })
        .await
        .map(drop)
    };
    decides(rest, 0).await?;
    decides(bundle, 0).await?;

    let (stop, newest) = (AtomicBool::new(false), AtomicU64::new(0));
    let edits = async {
        let random = &mut fastrand::Rng::with_seed(SEED);
        for version in 1..=EDITS {
            let mut reads: Vec<_> = (0..FIELDS.len()).filter(|_| random.bool()).collect();
            if reads.is_empty() {
                reads.push(random.usize(..FIELDS.len()));
            }
            let (hub_dies, agent_dies) = (random.u8(..4) == 0, random.u8(..4) == 0);
            let dying = random.usize(..2);
            let dying_hub = random.usize(..hubs.len());
            if hub_dies {
                hubs[dying_hub].kill();
            }
            if agent_dies {
                agents[dying].kill();
            }
            newest.store(version, Ordering::Relaxed);
            policy(dir, version, &reads)?;
            if hub_dies {
                hubs[dying_hub].spawn()?;
            }
            if agent_dies {
                agents[dying].spawn()?;
            }
            // At times the next edit precedes delivery of this one.
            if random.u8(..3) > 0 {
                decides(rest, version).await?;
                decides(bundle, version).await?;
            }
            if version % 10 == 0 {
                let expected = expected(&reads);
                for opa in [rest, bundle] {
                    eventually("unread fields are removed", async || {
                        let found =
                            opa.data("/kubernetes/pods/default/a").await.map_err(|e| e.to_string())?;
                        equal(&found, &expected)
                    })
                    .await?;
                }
            }
        }
        decides(rest, EDITS).await?;
        decides(bundle, EDITS).await?;
        stop.store(true, Ordering::Relaxed);
        anyhow::Ok(())
    };
    let (edits, first, second) = tokio::join!(
        async { edits.await.inspect_err(|_| stop.store(true, Ordering::Relaxed)) },
        async { query(rest, &stop, &newest).await.inspect_err(|_| stop.store(true, Ordering::Relaxed)) },
        async { query(bundle, &stop, &newest).await.inspect_err(|_| stop.store(true, Ordering::Relaxed)) },
    );
    println!("{} and {} decisions under {EDITS} edits", first?, second?);
    edits
}

#[tokio::test(flavor = "multi_thread")]
async fn i10_policies_find_all_fields_with_one_hub() -> anyhow::Result<()> {
    i10_no_policy_decides_on_less_than_it_reads(1).await
}

#[tokio::test(flavor = "multi_thread")]
async fn i10_policies_find_all_fields_with_two_hubs() -> anyhow::Result<()> {
    i10_no_policy_decides_on_less_than_it_reads(2).await
}

/// Returns a pod with only the fields of `reads`.
fn expected(reads: &[usize]) -> Value {
    let mut pod = json!({});
    for index in reads {
        match index {
            0 => pod["metadata"] = json!({ "labels": { "app": "web" } }),
            1 => pod["spec"]["containers"] = json!([{ "image": "i" }]),
            2 => pod["status"] = json!({ "podIP": "10.0.0.1" }),
            _ => pod["spec"]["nodeName"] = json!("n"),
        }
    }
    pod
}

/// Whole-object replication is reported with its cost, and separate data and policy bundles are rejected.
#[tokio::test]
async fn sent_fields_and_their_cost_are_reported() -> anyhow::Result<()> {
    let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let dir = manifests.path();
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "a", "labels": { "app": "web" } },
        "spec": { "nodeName": "n" }, "status": { "podIP": "10.0.0.1" },
    });
    write_manifest(dir, "a.json", &pod)?;
    let folder = dir.display().to_string();
    let flags = ["--manifests", &folder, "--replicate=v1/pods", "--fields=auto,spec.nodeName"];
    let hub = Hub::start(work.path(), &flags).await?;
    // Without policies, nothing is read.
    let report = hub.json("/v1/bundles/main/fields").await?;
    let nothing_but = json!({ "spec": { "nodeName": "n" } }).to_string().len();
    assert_eq!(report["resources"][0]["jsonBytes"], json!(nothing_but), "{report}");
    policy(dir, 0, &[0, 2])?;
    eventually("the policy is served", async || {
        let bundle = hub.json("/v1/bundles/main").await.map_err(|error| error.to_string())?;
        equal(&bundle["counts"]["modules"], &json!(1))
    })
    .await?;
    let report = hub.json("/v1/bundles/main/fields").await?;
    let pods = &report["resources"][0];
    let fields = pods["fields"].as_array().into_iter().flatten();
    let fields: Vec<_> =
        fields.map(|field| (field["path"].as_str().unwrap_or_default(), &field["readers"])).collect();
    let expected = [
        ("metadata.labels.app…", &json!(["opa/t/t.rego:2:38"])),
        ("status.podIP…", &json!(["opa/t/t.rego:2:69"])),
        ("spec.nodeName…", &json!([])),
    ];
    assert_eq!(fields, expected, "{report}");
    let (whole, pruned) = (pods["wholeBytes"].as_u64(), pods["jsonBytes"].as_u64());
    assert!(pruned < whole && pruned > Some(0), "{report}");

    let apart = reqwest::Client::builder().user_agent("Open-Policy-Agent/1.22.2").build()?;
    let answer = apart.get(format!("{}/bundles/main/data", hub.url)).send().await?;
    assert_eq!(answer.status(), 409);
    assert!(answer.text().await?.contains("use bundles/main"));

    let text = "package t\nall := data.kubernetes.pods[input.namespace]\n";
    let manifest = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "data": { "t.rego": text },
        "metadata": { "name": "t", "namespace": "opa", "labels": { "openpolicyagent.org/policy": "rego" } },
    });
    write_manifest(dir, "policy.json", &manifest)?;
    eventually("the verdict names the line", async || {
        let bundle = hub.json("/v1/bundles/main").await.map_err(|error| error.to_string())?;
        let warning = bundle["verdicts"]["opa/t"]["warnings"][0].as_str().unwrap_or_default();
        let expected = [
            "opa/t/t.rego:2:1 reads whole objects of v1/pods",
            ": all := data.kubernetes.pods[input.namespace]",
        ];
        if expected.iter().all(|part| warning.contains(part)) {
            Ok(())
        } else {
            Err(bundle["verdicts"].to_string())
        }
    })
    .await?;
    let report = hub.json("/v1/bundles/main/fields").await?;
    assert_eq!(report["resources"][0]["jsonBytes"], report["resources"][0]["wholeBytes"]);
    Ok(())
}

/// Maximum memory of a policy's analysis, in bytes.
const ANALYSIS_BYTES_MAX: u64 = 64 << 20;

/// Returns a rule that selects one of six names per level below a node.
fn choosing(rule: &str, levels: usize) -> String {
    let names =
        |index: usize| ["a", "b", "c", "d", "e", "f"].map(|name| format!("x{index}.{name}")).join(", ");
    let lines = (0..levels).map(|index| format!("\tsome x{} in [{}]\n", index + 1, names(index)));
    let lines: String = lines.collect();
    format!("{rule} if {{\n\tx0 := data.kubernetes.nodes[\"{rule}\"]\n{lines}\tx{levels} == 1\n}}\n\n")
}

#[tokio::test]
async fn policy_analysis_uses_bounded_memory() -> anyhow::Result<()> {
    let texts = [
        "allow if data.kubernetes.nodes.n1.a == 1\n".to_owned(),
        // One value with 6¹² references, many values with few, and few values with the maximum.
        choosing("allow", 12),
        (0..2000).map(|index| choosing(&format!("r{index}"), 2)).collect(),
        (0..40).map(|index| choosing(&format!("r{index}"), 4)).collect(),
    ];
    let mut peaks = Vec::new();
    for text in texts {
        let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
        let policy = json!({
            "apiVersion": "v1", "kind": "ConfigMap", "data": { "p.rego": format!("package p\n\n{text}") },
            "metadata": { "name": "p", "namespace": "opa", "labels": { "openpolicyagent.org/policy": "rego" } },
        });
        write_manifest(manifests.path(), "p.json", &policy)?;
        let folder = manifests.path().display().to_string();
        let flags = ["--manifests", &folder, "--replicate-cluster=v1/nodes", "--fields=auto"];
        let hub = Hub::start(work.path(), &flags).await?;
        eventually("the policy is served", async || {
            let bundle = hub.json("/v1/bundles/main").await.map_err(|error| error.to_string())?;
            equal(&bundle["counts"]["modules"], &json!(1))
        })
        .await?;
        peaks.push(hub.process.as_ref().context("the hub runs")?.usage()?.peak);
    }
    let most = peaks.iter().max().context("four")?;
    assert!(most - peaks[0] <= ANALYSIS_BYTES_MAX, "{peaks:?}");
    Ok(())
}
