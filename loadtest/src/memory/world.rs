//! Pods and ten policies, in a folder or on an API server.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use futures::{StreamExt as _, TryStreamExt as _};
use opa_hub_loadtest::cluster::{Cluster, POLICY};
use opa_hub_loadtest::lab::{ControlPlane, assets};
use opa_hub_loadtest::pods::{self, Nth, PODS_PER_NAMESPACE};
use serde_json::{Value, json};

use super::SourceKind;

const NAMESPACE: &str = "opa";
const FILL_REQUESTS: usize = 16;
const PROGRESS_PODS: usize = 5000;

const POLICIES: [(&str, &str); 10] = [
    ("account", include_str!("../../policies/account.rego")),
    ("address", include_str!("../../policies/address.rego")),
    ("caller", include_str!("../../policies/caller.rego")),
    ("images", include_str!("../../policies/images.rego")),
    ("labels", include_str!("../../policies/labels.rego")),
    ("orphan", include_str!("../../policies/orphan.rego")),
    ("owner", include_str!("../../policies/owner.rego")),
    ("registry", include_str!("../../policies/registry.rego")),
    ("same-account", include_str!("../../policies/same_account.rego")),
    ("tier", include_str!("../../policies/tier.rego")),
];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stage {
    Posted,
    Bound,
    Started,
    Ready,
    Gone,
}

pub(super) struct World {
    pub(super) assets: PathBuf,
    pub(super) hub_flags: Vec<String>,
    pub(super) pods: usize,
    backend: Backend,
}

enum Backend {
    Folder { work: tempfile::TempDir, manifests: tempfile::TempDir },
    Cluster { plane: Box<ControlPlane>, cluster: Cluster },
}

impl World {
    pub(super) async fn new(kind: SourceKind, pods: usize) -> anyhow::Result<Self> {
        let assets = tokio::task::spawn_blocking(assets::folder).await??;
        let (backend, source) = match kind {
            SourceKind::Folder => {
                let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
                let all: Vec<_> = (0..pods).map(Nth).collect();
                for (index, nths) in all.chunks(PODS_PER_NAMESPACE).enumerate() {
                    let items: Vec<_> = nths.iter().map(|nth| nth.served()).collect();
                    write(manifests.path(), &format!("pods-{index:03}.json"), &list(&items))?;
                }
                let flag = ["--manifests".to_owned(), manifests.path().display().to_string()];
                (Backend::Folder { work, manifests }, flag)
            }
            SourceKind::Cluster => {
                let plane = ControlPlane::start().await?;
                let cluster = Cluster { client: plane.client().await? };
                fill(&cluster, pods).await?;
                let flag = ["--kubeconfig".to_owned(), plane.kubeconfig.display().to_string()];
                (Backend::Cluster { plane: Box::new(plane), cluster }, flag)
            }
        };
        let flags = ["--replicate=v1/pods".to_owned(), "--log-level=debug".to_owned()];
        let hub_flags = source.into_iter().chain(flags).collect();
        let world = Self { assets, hub_flags, pods, backend };
        world.policies("").await?;
        Ok(world)
    }

    pub(super) fn dir(&self) -> &Path {
        match &self.backend {
            Backend::Folder { work, .. } => work.path(),
            Backend::Cluster { plane, .. } => plane.dir.path(),
        }
    }

    pub(super) async fn length(&self, url: &str) -> anyhow::Result<u64> {
        reqwest::get(url)
            .await?
            .error_for_status()?
            .content_length()
            .context("reading a response failed: no content-length")
    }

    pub(super) async fn reset_policies(&self) -> anyhow::Result<()> {
        self.policies("").await
    }

    /// The edited policy reads the node name too, and returns `word` with it.
    pub(super) async fn edit_policy(&self, word: &str) -> anyhow::Result<()> {
        let rule = format!(
            "\nnode := [\"{word}\", data.kubernetes.pods[input.namespace][input.pod].spec.nodeName]\n"
        );
        self.policies(&rule).await
    }

    async fn policies(&self, more: &str) -> anyhow::Result<()> {
        let edited = |name: &str, text: &str| {
            if name == "address" { format!("{text}{more}") } else { text.to_owned() }
        };
        match &self.backend {
            Backend::Folder { manifests, .. } => {
                let configmap = |(name, text): &(&str, &str)| {
                    json!({
                        "apiVersion": "v1", "kind": "ConfigMap", "data": { format!("{name}.rego"): edited(name, text) },
                        "metadata": { "name": name, "namespace": NAMESPACE, "labels": { POLICY.0: POLICY.1 } },
                    })
                };
                let all: Vec<_> = POLICIES.iter().map(configmap).collect();
                write(manifests.path(), "policies.json", &list(&all))
            }
            Backend::Cluster { cluster, .. } => {
                cluster.namespace(NAMESPACE).await?;
                for (name, text) in POLICIES {
                    let (key, text) = (format!("{name}.rego"), edited(name, text));
                    cluster.configmap(NAMESPACE, name, Some(POLICY), &[(&key, &text)]).await?;
                }
                Ok(())
            }
        }
    }

    pub(super) async fn label(&self, nth: Nth, team: &str) -> anyhow::Result<()> {
        match &self.backend {
            Backend::Folder { manifests, .. } => {
                // A separate file avoids rewriting the large one.
                let first = "pods-000.json";
                let hot = format!("hot-{}.json", nth.0);
                if !manifests.path().join(&hot).exists() {
                    let others = (0..PODS_PER_NAMESPACE.min(self.pods)).filter(|number| *number != nth.0);
                    let others: Vec<_> = others.map(|number| Nth(number).served()).collect();
                    write(manifests.path(), first, &list(&others))?;
                }
                let mut pod = nth.served();
                pod["metadata"]["labels"]["team"] = json!(team);
                write(manifests.path(), &hot, &pod)
            }
            Backend::Cluster { cluster, .. } => {
                cluster.label_pod(&nth.namespace(), &nth.name(), &[("team", team)]).await
            }
        }
    }

    pub(super) async fn put(&self, nth: Nth, stage: Stage) -> anyhow::Result<()> {
        match &self.backend {
            Backend::Folder { manifests, .. } => {
                let file = format!("rollout-{}.json", nth.0);
                if stage == Stage::Gone {
                    return Ok(std::fs::remove_file(manifests.path().join(file))?);
                }
                let mut pod = nth.served();
                if stage == Stage::Posted {
                    pod["spec"].as_object_mut().context("the pod has no spec")?.remove("nodeName");
                }
                pod["status"] = status(nth, stage);
                write(manifests.path(), &file, &pod)
            }
            Backend::Cluster { cluster, .. } => put_on_cluster(cluster, nth, stage).await,
        }
    }
}

fn status(nth: Nth, stage: Stage) -> Value {
    let mut status = nth.status();
    match stage {
        Stage::Posted | Stage::Gone => return json!({ "phase": "Pending" }),
        Stage::Bound => {
            return json!({ "phase": "Pending", "conditions": [{ "type": "PodScheduled", "status": "True" }] });
        }
        Stage::Started => {
            for condition in status["conditions"].as_array_mut().into_iter().flatten() {
                if condition["type"] == "Ready" || condition["type"] == "ContainersReady" {
                    condition["status"] = json!("False");
                }
            }
        }
        Stage::Ready => {}
    }
    status
}

async fn put_on_cluster(cluster: &Cluster, nth: Nth, stage: Stage) -> anyhow::Result<()> {
    let (namespace, name) = (nth.namespace(), nth.name());
    let pod = format!("/api/v1/namespaces/{namespace}/pods/{name}");
    match stage {
        Stage::Posted => {
            cluster.namespace(&namespace).await?;
            cluster.create_pod(&namespace, &nth.posted()).await
        }
        Stage::Bound if pods::external_prefix().is_some() => Ok(()),
        Stage::Bound => {
            let binding =
                json!({ "metadata": { "name": name }, "target": { "kind": "Node", "name": nth.node() } });
            cluster.create(&format!("{pod}/binding"), &binding).await
        }
        Stage::Started | Stage::Ready => {
            cluster.merge(&format!("{pod}/status"), &json!({ "status": status(nth, stage) })).await
        }
        Stage::Gone => cluster.delete_pod(&namespace, &name).await,
    }
}

pub(crate) async fn fill(cluster: &Cluster, pods: usize) -> anyhow::Result<()> {
    for first in (0..pods).step_by(PODS_PER_NAMESPACE) {
        cluster.namespace(&Nth(first).namespace()).await?;
    }
    let created = futures::stream::iter((0..pods).map(Nth)).map(|nth| async move {
        for stage in [Stage::Posted, Stage::Bound, Stage::Ready] {
            put_on_cluster(cluster, nth, stage).await?;
        }
        if nth.0 % PROGRESS_PODS == PROGRESS_PODS - 1 {
            eprintln!("  {} pods", nth.0 + 1);
        }
        anyhow::Ok(())
    });
    created.buffer_unordered(FILL_REQUESTS).try_collect::<()>().await
}

fn list(items: &[Value]) -> Value {
    json!({ "apiVersion": "v1", "kind": "List", "items": items })
}

/// Renames into place: the hub never reads a partial file.
fn write(dir: &Path, file: &str, content: &Value) -> anyhow::Result<()> {
    let draft = dir.join(".draft");
    std::fs::write(&draft, content.to_string())?;
    Ok(std::fs::rename(draft, dir.join(file))?)
}
