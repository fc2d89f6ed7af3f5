//! `--fields`: only what is asked for travels, and what does not show in it is silence.

use opa_hub_loadtest::eventually::{equal, eventually};
use opa_hub_loadtest::lab::{Agent, Delivery, Hub, Opa, assets};
use serde_json::{Value, json};

use crate::world::write_manifest;

#[tokio::test]
async fn only_these_fields_travel() -> anyhow::Result<()> {
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
    agent.wait_ready().await?;
    let seen = |app: &str| -> Value {
        json!({ "metadata": { "labels": { "app": app } }, "spec": { "containers": [{ "image": "i" }] } })
    };
    let pods = |a: &str, b: &str| json!({ "default": { "a": seen(a), "b": seen(b) } });
    assert_eq!(opa.data("/kubernetes/pods").await?, pods("web", "db"));
    let before = hub.metric("opa_hub_view_changes_total").await?;
    // The first change does not show, the second does: by then the first was seen too.
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
