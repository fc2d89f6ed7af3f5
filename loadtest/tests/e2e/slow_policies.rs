//! Policy tests that are slow, or broken by another ConfigMap, with a real OPA.

use std::path::Path;
use std::time::Duration;

use opa_hub_loadtest::cluster::POLICY;
use opa_hub_loadtest::eventually::{eventually, within};
use opa_hub_loadtest::lab::{Hub, assets};
use serde_json::{Value, json};

use crate::world::write_manifest;

/// Maximum time to find slow tests: three runs of 30 s, two of them cancelled, and a margin.
const SEARCH: Duration = Duration::from_secs(300);

fn write(dir: &Path, name: &str, policy: &str, tests: &str) -> anyhow::Result<()> {
    let mut data = json!({ "p.rego": format!("package {name}\n\n{policy}") });
    let mut labels = json!({ POLICY.0: POLICY.1 });
    if !tests.is_empty() {
        data["p_test.rego"] = json!(format!("package {name}_test\n\n{tests}"));
        labels["run-tests"] = json!("true");
    }
    let metadata = json!({ "name": name, "namespace": "ns", "labels": labels });
    let manifest = json!({ "apiVersion": "v1", "kind": "ConfigMap", "data": data, "metadata": metadata });
    write_manifest(dir, &format!("{name}.json"), &manifest)
}

async fn hub(work: &Path, manifests: &Path) -> anyhow::Result<Hub> {
    tokio::task::spawn_blocking(assets::folder).await??;
    let folder = manifests.display().to_string();
    Hub::start(work, &["--manifests", &folder, "--test-label", "run-tests"]).await
}

async fn bundle(hub: &Hub) -> Result<Value, String> {
    hub.json("/v1/bundles/main").await.map_err(|error| error.to_string())
}

#[tokio::test]
async fn slow_tests_do_not_block_other_configmaps() -> anyhow::Result<()> {
    let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
    write(manifests.path(), "quick", "x := 1", "test_x if data.quick.x < 9")?;
    let hub = hub(work.path(), manifests.path()).await?;
    let first = hub.json("/v1/bundles/main").await?["revision"].clone();
    // Each runs into the limit of 5 s.
    let slow = "if { some i in numbers.range(1, 100000); some j in numbers.range(1, 100000); i + j < 0 }";
    let tests: Vec<_> = (0..20).map(|index| format!("test_{index} {slow}")).collect();
    write(manifests.path(), "slow", "x := 1", &tests.join("\n"))?;
    write(manifests.path(), "quick", "x := 2", "test_x if data.quick.x < 9")?;
    within(SEARCH, "the slow tests are rejected, the other edit is served", async || {
        let bundle = bundle(&hub).await?;
        let is_refused = bundle["verdicts"]["ns/slow"].to_string().contains("ns/slow/p_test.rego");
        if is_refused && bundle["revision"] != first { Ok(()) } else { Err(bundle.to_string()) }
    })
    .await?;
    let second = hub.json("/v1/bundles/main").await?["revision"].clone();
    write(manifests.path(), "quick", "x := 3", "test_x if data.quick.x < 9")?;
    eventually("the next edit is served", async || {
        let bundle = bundle(&hub).await?;
        if bundle["revision"] == second { Err(bundle.to_string()) } else { Ok(()) }
    })
    .await
    .map(drop)
}

#[tokio::test]
async fn broken_test_rejects_no_other_configmap() -> anyhow::Result<()> {
    let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
    write(manifests.path(), "lib", "helper(x) := x", "")?;
    write(manifests.path(), "user", "x := 1", "test_x if data.lib.helper(1) == 1")?;
    let hub = hub(work.path(), manifests.path()).await?;
    let first = hub.json("/v1/bundles/main").await?["revision"].clone();
    write(manifests.path(), "lib", "renamed(x) := x", "")?;
    eventually("the edit is served, with a warning for the test", async || {
        let bundle = bundle(&hub).await?;
        let warned = bundle["verdicts"]["ns/user"].to_string().contains("undefined function data.lib.helper");
        if warned && bundle["revision"] != first { Ok(()) } else { Err(bundle.to_string()) }
    })
    .await
    .map(drop)
}
