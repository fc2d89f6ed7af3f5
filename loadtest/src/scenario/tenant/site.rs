//! Access to the API server and the hub.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context as _;
use opa_hub_loadtest::cluster::Cluster;
use opa_hub_loadtest::eventually::within;
use reqwest::Client;
use serde_json::Value;

use super::attack::VOLLEY_PAUSE;
use super::objects::{A, ATTACK, Put, cluster_put, policy_of_a};
use super::work::LATE_MAX;

pub(super) const REQUEST_MAX: Duration = Duration::from_secs(10);
/// Two runs of OPA that time out, and a third.
const SETTLE_MAX: Duration = Duration::from_secs(90);

#[derive(Clone)]
pub(super) struct Site {
    pub(super) cluster: Cluster,
    pub(super) hub: String,
    pub(super) process: u32,
    pub(super) http: Client,
    /// If not, A's writes load only the API server.
    pub(super) is_selected: bool,
}

impl Site {
    pub(super) async fn bundle_of_a(&self) -> anyhow::Result<Value> {
        get(&self.http, &format!("{}/v1/bundles/{A}", self.hub)).await
    }

    pub(super) async fn put(&self, mut put: Put) -> anyhow::Result<()> {
        if !self.is_selected {
            put.labels.retain(|label| *label == ATTACK);
        }
        cluster_put(&self.cluster, put).await
    }

    pub(super) async fn wait_a_served(&self) -> anyhow::Result<()> {
        let digest = async || {
            let bundle = self.bundle_of_a().await.map_err(|error| error.to_string())?;
            let modules = bundle["modules"].as_array().cloned().unwrap_or_default();
            let is_base = |module: &Value| module["package"] == "base";
            let digest = modules.into_iter().find(is_base).map(|mut module| module["digest"].take());
            digest
                .ok_or_else(|| format!("the bundle of A lacks its policy; problems: {}", bundle["problems"]))
        };
        let (before, _) = within(LATE_MAX, "the bundle of A", async || digest().await).await?;
        cluster_put(&self.cluster, policy_of_a(fastrand::u64(1..))).await?;
        within(SETTLE_MAX, "an edit of A after the attack", async || {
            if digest().await? != before {
                return Ok(());
            }
            tokio::time::sleep(VOLLEY_PAUSE).await;
            Err("A's edit is not served".to_owned())
        })
        .await
        .map(drop)
    }

    /// True too if the hub cannot check A's policies.
    pub(super) async fn has_verdict(&self, name: &str) -> bool {
        let Ok(bundle) = self.bundle_of_a().await else { return false };
        let problems = bundle["problems"].as_array().into_iter().flatten();
        let mut subjects = problems.filter_map(|problem| problem["subject"].as_str());
        let is_check = |subject: &str| {
            subject.contains(A)
                && ["policies checked", "--fields auto"].iter().any(|part| subject.contains(part))
        };
        !bundle["verdicts"][format!("{A}/{name}")].is_null() || subjects.any(is_check)
    }
}

pub(super) async fn get(http: &Client, url: &str) -> anyhow::Result<Value> {
    let response = http.get(url).timeout(REQUEST_MAX).send().await?;
    Ok(serde_json::from_slice(&response.bytes().await?)?)
}

pub(super) async fn in_time<T>(
    what: &str,
    limit: Duration,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    let done = tokio::time::timeout(limit, work).await;
    done.with_context(|| format!("timed out after {} s: {what}", limit.as_secs()))?
}

/// Process ids and commands of the hub's OPA processes.
pub(super) fn runs_of_opa(hub: u32) -> BTreeMap<u32, String> {
    let threads = std::fs::read_dir(format!("/proc/{hub}/task")).into_iter().flatten().flatten();
    let children = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    let ids: Vec<u32> = children
        .flat_map(|ids| ids.split_whitespace().filter_map(|id| id.parse().ok()).collect::<Vec<_>>())
        .collect();
    let command = |id: u32| {
        let line = std::fs::read(format!("/proc/{id}/cmdline")).ok()?;
        let command = line.split(|byte| *byte == 0).nth(1)?;
        Some((id, String::from_utf8_lossy(command).into_owned()))
    };
    ids.into_iter().filter_map(command).collect()
}
