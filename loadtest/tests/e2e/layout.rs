//! A package next to replicated data, with REST delivery.

use opa_hub_loadtest::cluster::POLICY;
use opa_hub_loadtest::eventually::{equal, eventually};
use serde_json::json;

use crate::world::{Way, World};

/// The agent reports a remedy until the package is removed, also after a restart.
#[tokio::test]
async fn package_next_to_replicated_data_is_reported() -> anyhow::Result<()> {
    let mut world = World::start(Way::Rest, &["--replicate", "v1/pods"]).await?;
    world.cluster.namespace("opa").await?;
    has_notice(&world, false).await?;
    let policy = [("a.rego", "package kubernetes.admission\n\ndefault allow := false")];
    world.cluster.configmap("opa", "admission", Some(POLICY), &policy).await?;
    world.decides("/kubernetes/admission/allow", json!({}), json!(false)).await?;
    has_notice(&world, true).await?;
    if let Some(agent) = &mut world.agent {
        agent.spawn()?;
    }
    has_notice(&world, true).await?;
    world.cluster.delete_configmap("opa", "admission").await?;
    has_notice(&world, false).await
}

async fn has_notice(world: &World, expected: bool) -> anyhow::Result<()> {
    eventually("the agent's notice", async || {
        let agent = world.agent.as_ref().ok_or("no agent")?;
        let status = agent.status().await.map_err(|error| error.to_string())?;
        let notices = status["notices"].to_string();
        equal(&notices.contains("--policy-delivery bundle"), &expected)
            .map_err(|error| format!("{error}: {status}"))
    })
    .await
    .map(drop)
}
