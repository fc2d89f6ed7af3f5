//! Small load runs, with expected counts on any machine.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::Api;
use kube::api::{DeleteParams, ListParams};
use opa_hub_loadtest::cluster::Cluster;
use opa_hub_loadtest::eventually::{equal, eventually};
use opa_hub_loadtest::lab::ControlPlane;
use serde_json::{Value, json};

/// Results of a scenario's run.
struct Results(Value);

impl Results {
    async fn collect(args: &[&str]) -> anyhow::Result<Self> {
        let out = tempfile::tempdir()?;
        let mut command = Command::new(env!("CARGO_BIN_EXE_opa-hub-loadtest"));
        command.args(args).arg("--out").arg(out.path());
        let ran = tokio::task::spawn_blocking(move || command.output()).await??;
        ensure!(ran.status.success(), "{args:?}: {}", String::from_utf8_lossy(&ran.stderr));
        let file = |kind: &str| out.path().join(format!("{}.{kind}", args[0]));
        // Redrawing the results gives the same page.
        let drawn = std::fs::read(file("md"))?;
        std::fs::remove_file(file("md"))?;
        let mut report = Command::new(env!("CARGO_BIN_EXE_opa-hub-loadtest"));
        report.arg("report").arg(out.path());
        // The exit code is ignored: timing goals may be missed.
        let output = tokio::task::spawn_blocking(move || report.output()).await??.stdout;
        ensure!(std::fs::read(file("md"))? == drawn);
        ensure!(
            std::fs::read(out.path().join("README.md"))?.len() + 1 == output.len(),
            "the goals are printed"
        );
        Ok(Self(serde_json::from_slice(&std::fs::read(file("json"))?)?))
    }

    fn figure(&self, who: &str, name: &str) -> anyhow::Result<f64> {
        let run = self.0["runs"][0].as_array().context("a run")?;
        let entry =
            run.iter().find(|entry| entry["who"] == who).with_context(|| format!("no results of {who}"))?;
        let figures = entry["figures"].as_array().context("figures")?;
        let figure = figures.iter().find(|figure| figure["name"] == name);
        figure.with_context(|| format!("no {name} in {entry}"))?["value"].as_f64().context("a number")
    }

    fn check(&self, who: &str, name: &str, expected: f64) -> anyhow::Result<()> {
        let found = self.figure(who, name)?;
        ensure!((found - expected).abs() < f64::EPSILON, "{name} of {who}: {found}, not {expected}");
        Ok(())
    }
}

/// I4, and bytes: one encode per change, slightly larger than the pod.
#[tokio::test]
async fn fanout() -> anyhow::Result<()> {
    let results =
        Results::collect(&["fanout", "--agents", "100", "--rounds", "3", "--sustained-seconds", "1"]).await?;
    results.check("opa-hub", "frames encoded a change", 1.0)?;
    results.check("opa-hub", "witnesses that hold something else in the end", 0.0)?;
    let bytes = results.figure("opa-hub", "bytes an agent and change")?;
    ensure!(bytes < 700.0, "{bytes} bytes for a pod of 300");
    Ok(())
}

/// Slow clients stay connected, lose nothing, and get fewer frames than changes.
#[tokio::test]
async fn slow() -> anyhow::Result<()> {
    let results = Results::collect(&["slow", "--agents", "200", "--rate", "100", "--seconds", "3"]).await?;
    let slow = "1 % stalled, 1 % trickling";
    results.check(slow, "streams that ended", 0.0)?;
    results.check(slow, "witnesses that hold something else in the end", 0.0)?;
    let (sent, changes) = (
        results.figure(slow, "frames that a stalled agent was sent")?,
        results.figure(slow, "changes that there were")?,
    );
    ensure!(sent < changes / 2.0, "{sent} frames for {changes} changes");
    Ok(())
}

/// Fail-over, by closed socket or timeout, and restarts need no archive. A reconcile response is encoded once.
#[tokio::test]
async fn failover() -> anyhow::Result<()> {
    let results = Results::collect(&["failover", "--agents", "200", "--pods", "20", "--opas", "1"]).await?;
    let (other, same, silent) =
        ("another replica", "the same hub, restarted", "another replica, packets dropped");
    for who in [other, same, silent] {
        results.check(who, "real agents that loaded their OPA anew", 0.0)?;
        results.check(who, "witnesses that hold something else in the end", 0.0)?;
    }
    for who in [other, silent] {
        results.check(who, "agents that had to reconcile", 0.0)?;
    }
    // Only a timeout reveals the cut.
    let silence =
        results.figure(silent, "from the fault until every agent has a change made right after it")?;
    ensure!(silence > 5000.0, "left after {silence} ms");
    results.check(same, "agents that had to reconcile", 200.0)?;
    // The real agent's response differs, since it has policies.
    ensure!(results.figure(same, "answers to those encoded")? <= 3.0);
    Ok(())
}

/// The API server serves one hub's watches, for any number of agents.
#[tokio::test]
async fn churn() -> anyhow::Result<()> {
    let args = ["churn", "--pods", "20", "--opas", "2", "--agents", "50", "--rate", "10", "--seconds", "3"];
    let results = Results::collect(&args).await?;
    results.check("opa-hub and many agents", "watches on the API server", 3.0)?;
    for who in ["opa-hub and many agents", "opa-hub, fields auto, and many agents"] {
        results.check(who, "witnesses that hold something else in the end", 0.0)?;
    }
    results.figure("opa-hub, package kubernetes.admission", "change to decision, p99")?;
    results.check("watches", "watches on the API server", 50.0)
}

/// Any number of changes is one frame in bounded PATCHes, or one reconcile beyond the history.
#[tokio::test]
async fn catchup() -> anyhow::Result<()> {
    let results = Results::collect(&["catchup", "--changes", "3000", "--pods", "5000"]).await?;
    results.check("opa-hub", "frames", 1.0)?;
    results.check("opa-hub", "reconciles", 0.0)?;
    let (operations, patches) =
        (results.figure("opa-hub", "operations in it")?, results.figure("opa-hub", "PATCHes")?);
    ensure!(patches >= operations / 500.0, "{patches} PATCHes for {operations} operations");
    // 40 % of the pods change.
    results.check("opa-hub", "operations in it", 2000.0)?;
    for who in ["opa-hub, changes spread", "opa-hub, pods of 10 KB"] {
        let (frames, repairs) = (results.figure(who, "frames")?, results.figure(who, "reconciles")?);
        ensure!(
            (frames - 1.0).abs() < f64::EPSILON || (repairs - 1.0).abs() < f64::EPSILON,
            "{who}: {frames}, {repairs}"
        );
    }
    Ok(())
}

/// New agents share an archive; restarted ones need none.
#[tokio::test]
async fn start_and_restart() -> anyhow::Result<()> {
    let args = ["start", "--pods", "20", "--opas", "2", "--joins", "50", "--small-pods", "500"];
    Results::collect(&args).await?.check("opa-hub", "snapshots encoded for all that join", 1.0)?;
    let results = Results::collect(&["restart", "--pods", "20", "--opas", "2"]).await?;
    for (who, loaded) in [("the hub", 0.0), ("the agents", 0.0), ("the OPAs", 2.0), ("the API server", 0.0)] {
        results.check(who, "OPAs that were loaded anew", loaded)?;
    }
    Ok(())
}

#[tokio::test]
async fn soak() -> anyhow::Result<()> {
    let results = Results::collect(&["soak", "--agents", "50", "--rate", "100", "--seconds", "10"]).await?;
    results.check("opa-hub", "witnesses that hold something else in the end", 0.0)?;
    results.check("opa-hub", "streams that ended", 0.0)
}

/// The hub survives every attack; the other tenant's edits and requests succeed.
#[tokio::test]
async fn tenant() -> anyhow::Result<()> {
    let results = Results::collect(&["tenant", "--seconds", "2"]).await?;
    let (calm, whole) = ("no attack", "the whole run");
    for figure in [
        "of these never seen",
        "times that the hub had to be started again",
        "differences from B's expected content at the end",
    ] {
        results.check(whole, figure, 0.0)?;
    }
    let asked = results.figure(calm, "edits and requests of B")?;
    ensure!(asked > 0.0, "B did nothing");
    for entry in results.0["runs"][0].as_array().context("a run")? {
        let who = entry["who"].as_str().context("a name")?;
        if who == whole {
            continue;
        }
        // Equal to the number without an attack.
        results.check(who, "edits and requests of B", asked)?;
        results.check(who, "of these never seen", 0.0)?;
        if who != calm {
            ensure!(results.figure(who, "of these with a trace in the hub")? > 0.0, "{who} left no trace");
        }
    }
    Ok(())
}

/// Finalizes namespaces, since the lab has no controllers.
async fn remove_namespaces(cluster: Cluster) -> anyhow::Result<()> {
    loop {
        for mut namespace in
            Api::<Namespace>::all(cluster.client.clone()).list(&ListParams::default()).await?
        {
            if namespace.metadata.deletion_timestamp.is_none() {
                continue;
            }
            let name = namespace.metadata.name.clone().context("a namespace has a name")?;
            let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), &name);
            pods.delete_collection(&DeleteParams::default(), &ListParams::default()).await?;
            namespace.spec = None;
            let request = http::Request::put(format!("/api/v1/namespaces/{name}/finalize"))
                .header("content-type", "application/json");
            cluster.client.request::<Value>(request.body(serde_json::to_vec(&namespace)?)?).await?;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// In an external cluster with restricted and existing pods, runs succeed and always clean up. Missing permissions and
/// invalid arguments are reported.
#[tokio::test]
async fn external_cluster_is_cleaned_up() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let admission = dir.path().join("admission.json");
    let restricted = json!({
        "apiVersion": "pod-security.admission.config.k8s.io/v1", "kind": "PodSecurityConfiguration",
        "defaults": { "enforce": "restricted", "enforce-version": "latest" },
    });
    let plugins = json!({
        "apiVersion": "apiserver.config.k8s.io/v1", "kind": "AdmissionConfiguration",
        "plugins": [{ "name": "PodSecurity", "configuration": restricted }],
    });
    std::fs::write(&admission, plugins.to_string())?;
    let flag = format!("--admission-control-config-file={}", admission.display());
    let plane = ControlPlane::start_with(&[&flag]).await?;
    let cluster = Cluster { client: plane.client().await? };
    let labels = json!({ "pod-security.kubernetes.io/enforce": "privileged" });
    let other = json!({ "metadata": { "name": "other", "labels": labels } });
    cluster.create("/api/v1/namespaces", &other).await?;
    cluster.pod("other", "web", &[]).await?;
    let controller = tokio::spawn(remove_namespaces(cluster.clone()));
    let kubeconfig = plane.kubeconfig.display().to_string();
    let given = ["--create-pods", "--kubeconfig", &kubeconfig];
    let namespaces = async || -> anyhow::Result<Vec<String>> {
        let list = Api::<Namespace>::all(cluster.client.clone()).list(&ListParams::default()).await?;
        Ok(list.items.into_iter().filter_map(|namespace| namespace.metadata.name).collect())
    };
    let before = namespaces().await?;
    let args = ["churn", "--pods", "10", "--opas", "1", "--agents", "20", "--rate", "10", "--seconds", "2"];
    let results = Results::collect(&[&args[..], &given].concat()).await?;
    for who in ["opa-hub and many agents", "opa-hub, fields auto, and many agents"] {
        results.check(who, "witnesses that hold something else in the end", 0.0)?;
        results.figure(who, "API server CPU a change")?;
    }
    ensure!(namespaces().await? == before);

    let load = || {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_opa-hub-loadtest"));
        command.stderr(Stdio::null()).stdout(Stdio::null());
        command
    };
    let mut stopped = load().args(["failover", "--pods", "5000"]).args(given).spawn()?;
    eventually("the run creates pods", async || {
        let now = namespaces().await.map_err(|error| error.to_string())?;
        equal(&(now.len() > before.len()), &true)
    })
    .await?;
    let id = stopped.id().context("the run is active")?.to_string();
    ensure!(Command::new("kill").arg(id).status()?.success());
    ensure!(!stopped.wait().await?.success());
    ensure!(namespaces().await? == before);
    let plain = plane.plain_kubeconfig.as_ref().context("the lab has a user without permissions")?;
    let refused = load().args(["churn", "--create-pods", "--kubeconfig"]).arg(plain).output().await?;
    let words = String::from_utf8_lossy(&refused.stderr);
    ensure!(
        !refused.status.success() && words.contains("may not create namespaces, list namespaces"),
        "{words}"
    );
    for wrong in [
        &["fanout", "--create-pods", "--kubeconfig", &kubeconfig][..],
        &["churn", "--pods", "20", "--kubeconfig", &kubeconfig],
        &["slow", "--agents", "5"],
        &["churn", "--pods", "1"],
    ] {
        ensure!(!load().args(wrong).status().await?.success(), "{wrong:?}");
    }
    ensure!(!controller.is_finished(), "removing namespaces failed");
    Ok(())
}
