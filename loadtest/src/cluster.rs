//! Kubernetes objects that the lab creates and reads.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod};
use kube::api::{DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams};
use kube::core::{PartialObjectMeta, WatchEvent};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::eventually::within;
use crate::lab::process::Usage;
use crate::pods;

/// Label of policy ConfigMaps.
pub const POLICY: (&str, &str) = ("openpolicyagent.org/policy", "rego");
/// Label of data ConfigMaps.
pub const DATA: (&str, &str) = ("openpolicyagent.org/data", "opa");

const STATUS: &str = "openpolicyagent.org/kube-mgmt-status";
const RUN_LABEL: &str = "opahub.dev/load";

const ACCOUNT_TIMEOUT: Duration = Duration::from_secs(10);
/// The cluster waits 30 s for pods alone.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(600);
const REMOVAL_POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Whether the error is an API server response with this status code.
pub fn has_code(error: &anyhow::Error, code: u16) -> bool {
    matches!(error.downcast_ref(), Some(kube::Error::Api(status)) if status.code == code)
}

/// Counter of pod changes.
pub struct PodEvents {
    count: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl PodEvents {
    /// Number of changes so far.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}

impl Drop for PodEvents {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Client for the lab's objects.
#[derive(Clone)]
pub struct Cluster {
    /// Client with the rights that the calls need.
    pub client: Client,
}

impl Cluster {
    /// Posts an object to its collection, e.g. `/api/v1/pods`.
    pub async fn create(&self, collection: &str, object: &Value) -> anyhow::Result<()> {
        let request = http::Request::post(collection).header("content-type", "application/json");
        self.client.request::<Value>(request.body(serde_json::to_vec(object)?)?).await?;
        Ok(())
    }

    /// Merge-patches an object.
    pub async fn merge(&self, object: &str, patch: &Value) -> anyhow::Result<()> {
        let request = http::Request::patch(object).header("content-type", "application/merge-patch+json");
        self.client.request::<Value>(request.body(serde_json::to_vec(patch)?)?).await?;
        Ok(())
    }

    /// Grants a user cluster-wide `rules` by a ClusterRole and binding `name`.
    pub async fn grant(&self, name: &str, user: &str, rules: &[Value]) -> anyhow::Result<()> {
        const RBAC: &str = "/apis/rbac.authorization.k8s.io/v1";
        let role = json!({ "metadata": { "name": name }, "rules": rules });
        self.create(&format!("{RBAC}/clusterroles"), &role).await?;
        let binding = json!({
            "metadata": { "name": name },
            "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name },
            "subjects": [{ "kind": "User", "name": user }],
        });
        self.create(&format!("{RBAC}/clusterrolebindings"), &binding).await
    }

    /// Defines the custom resource `widgets.example.com`.
    pub async fn widgets(&self) -> anyhow::Result<()> {
        let definition = json!({
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": { "name": "widgets.example.com" },
            "spec": {
                "group": "example.com", "scope": "Namespaced",
                "names": { "plural": "widgets", "singular": "widget", "kind": "Widget" },
                "versions": [{
                    "name": "v1", "served": true, "storage": true,
                    "schema": { "openAPIV3Schema": { "type": "object", "x-kubernetes-preserve-unknown-fields": true } },
                }],
            },
        });
        self.create("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", &definition).await
    }

    /// Creates a namespace, if absent.
    pub async fn namespace(&self, name: &str) -> anyhow::Result<()> {
        let labels = pods::external_prefix().map(|prefix| BTreeMap::from([(RUN_LABEL.to_owned(), prefix)]));
        let namespace = Namespace {
            metadata: ObjectMeta { name: Some(name.into()), labels, ..Default::default() },
            ..Default::default()
        };
        match Api::all(self.client.clone()).create(&PostParams::default(), &namespace).await {
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
            other => Ok(other.map(drop)?),
        }
    }

    /// Posts a pod; retries while its namespace lacks the default service account.
    pub async fn create_pod(&self, namespace: &str, pod: &Value) -> anyhow::Result<()> {
        let until = Instant::now() + ACCOUNT_TIMEOUT;
        loop {
            match self.create(&format!("/api/v1/namespaces/{namespace}/pods"), pod).await {
                Err(error) if Instant::now() < until && has_code(&error, 403) => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                posted => return posted,
            }
        }
    }

    /// Removes the run's namespaces and waits for their end.
    pub async fn remove_run_namespaces(&self, prefix: &str) -> anyhow::Result<()> {
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        let params = ListParams::default().labels(&format!("{RUN_LABEL}={prefix}"));
        for namespace in namespaces.list(&params).await? {
            if namespace.metadata.deletion_timestamp.is_none() {
                let name = namespace.metadata.name.unwrap_or_default();
                namespaces.delete(&name, &DeleteParams::default()).await?;
            }
        }
        let is_removed = async || {
            let left = namespaces.list(&params).await.map_err(|error| error.to_string())?.items.len();
            if left == 0 {
                return Ok(());
            }
            tokio::time::sleep(REMOVAL_POLL_INTERVAL).await;
            Err(format!("{left} are left"))
        };
        let removed =
            within(REMOVAL_TIMEOUT, "namespaces of the run are removed", is_removed).await.map(drop);
        removed.with_context(|| {
            format!("cleaning up failed; repeat it with `kubectl delete namespaces -l {RUN_LABEL}`")
        })
    }

    /// Creates or replaces a ConfigMap.
    pub async fn configmap(
        &self,
        namespace: &str,
        name: &str,
        label: Option<(&str, &str)>,
        data: &[(&str, &str)],
    ) -> anyhow::Result<()> {
        let to_owned = |(key, value): (&str, &str)| (key.to_owned(), value.to_owned());
        let configmap = ConfigMap {
            metadata: ObjectMeta {
                name: Some(name.into()),
                labels: label.map(|label| BTreeMap::from([to_owned(label)])),
                ..Default::default()
            },
            data: Some(data.iter().copied().map(to_owned).collect()),
            ..Default::default()
        };
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), namespace);
        match api.create(&PostParams::default(), &configmap).await {
            Err(kube::Error::Api(status)) if status.code == 409 => {
                api.replace(name, &PostParams::default(), &configmap).await?;
                Ok(())
            }
            other => Ok(other.map(drop)?),
        }
    }

    /// Deletes a ConfigMap.
    pub async fn delete_configmap(&self, namespace: &str, name: &str) -> anyhow::Result<()> {
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), namespace);
        api.delete(name, &DeleteParams::default()).await?;
        Ok(())
    }

    /// Creates a pod with these labels.
    pub async fn pod(&self, namespace: &str, name: &str, labels: &[(&str, &str)]) -> anyhow::Result<()> {
        let labels: BTreeMap<_, _> = labels.iter().copied().collect();
        let pod: Pod = serde_json::from_value(json!({
            "metadata": { "name": name, "labels": labels },
            "spec": { "containers": [{ "name": "main", "image": "registry.local/app:1.0", "args": ["--level=1.50"] }] },
        }))?;
        Api::namespaced(self.client.clone(), namespace).create(&PostParams::default(), &pod).await?;
        Ok(())
    }

    /// Sets labels of a pod.
    pub async fn label_pod(
        &self,
        namespace: &str,
        name: &str,
        labels: &[(&str, &str)],
    ) -> anyhow::Result<()> {
        let labels: BTreeMap<_, _> = labels.iter().copied().collect();
        let patch = Patch::Merge(json!({ "metadata": { "labels": labels } }));
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        api.patch(name, &PatchParams::default(), &patch).await?;
        Ok(())
    }

    /// Deletes a pod without grace period.
    pub async fn delete_pod(&self, namespace: &str, name: &str) -> anyhow::Result<()> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        api.delete(name, &DeleteParams::default().grace_period(0)).await?;
        Ok(())
    }

    /// Reads a ConfigMap.
    pub async fn get_configmap(&self, namespace: &str, name: &str) -> anyhow::Result<ConfigMap> {
        Ok(Api::namespaced(self.client.clone(), namespace).get(name).await?)
    }

    /// Verdict annotation of a ConfigMap; `Null` if absent.
    pub async fn status(&self, namespace: &str, name: &str) -> anyhow::Result<Value> {
        let annotations = self.get_configmap(namespace, name).await?.metadata.annotations.unwrap_or_default();
        Ok(annotations.get(STATUS).map_or(Ok(Value::Null), |status| serde_json::from_str(status))?)
    }

    /// Type, reason and note of each Event about a ConfigMap.
    pub async fn events(&self, namespace: &str, name: &str) -> anyhow::Result<Vec<String>> {
        let request = http::Request::get(format!("/apis/events.k8s.io/v1/namespaces/{namespace}/events"));
        let list: Value = self.client.request(request.body(Vec::new())?).await?;
        let is_about = |event: &&Value| event["regarding"]["name"] == name;
        let text = |event: &Value, field: &str| event[field].as_str().unwrap_or_default().to_owned();
        let events = list["items"].as_array().into_iter().flatten().filter(is_about);
        Ok(events.map(|e| [text(e, "type"), text(e, "reason"), text(e, "note")].join(" ")).collect())
    }

    async fn metrics(&self) -> anyhow::Result<String> {
        Ok(self.client.request_text(http::Request::get("/metrics").body(Vec::new())?).await?)
    }

    /// Start time, CPU and memory of the API server, from its metrics.
    pub async fn server_usage(&self) -> anyhow::Result<(String, Usage)> {
        let text = self.metrics().await?;
        let value = |name: &str| {
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            value.with_context(|| format!("reading metrics failed: the API server has no {name}"))
        };
        // The value may be written as `1.2e+06`.
        let memory: f64 = value("process_resident_memory_bytes")?.parse()?;
        let rss: u64 = format!("{memory:.0}").parse()?;
        let cpu = Duration::try_from_secs_f64(value("process_cpu_seconds_total")?.parse()?)?;
        let started = value("process_start_time_seconds")?.to_owned();
        Ok((started, Usage { rss, peak: rss, cpu, children: Duration::ZERO, kernel: 0 }))
    }

    /// Sum of a metric over samples with these labels; 0 without any.
    pub async fn metric(&self, name: &str, labels: &[(&str, &str)]) -> anyhow::Result<u64> {
        let text = self.metrics().await?;
        anyhow::ensure!(
            text.contains(&format!("# TYPE {name} ")),
            "reading metrics failed: the API server has no {name}"
        );
        let labels: Vec<_> = labels.iter().map(|(label, value)| format!("{label}=\"{value}\"")).collect();
        let samples = text.lines().filter(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with('{'))
                && labels.iter().all(|label| line.contains(label))
        });
        let sum: f64 = samples.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum();
        Ok(format!("{sum:.0}").parse()?)
    }

    /// Counts pod changes from now on; `show` receives added and modified pods.
    pub async fn count_pod_events(
        &self,
        show: impl Fn(&ObjectMeta) + Send + 'static,
    ) -> anyhow::Result<PodEvents> {
        const PODS: &str = "/api/v1/pods";
        let request = http::Request::get(format!("{PODS}?limit=1")).body(Vec::new())?;
        let list: Value = self.client.request(request).await?;
        let version = list["metadata"]["resourceVersion"]
            .as_str()
            .context("listing pods failed: no resourceVersion")?;
        let watch = format!("{PODS}?watch=1&resourceVersion={version}");
        let request = http::Request::get(watch).body(Vec::new())?;
        let mut events = Box::pin(self.client.request_events::<PartialObjectMeta<Pod>>(request).await?);
        let count = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&count);
        let task = tokio::spawn(async move {
            while let Some(Ok(event)) = events.next().await {
                // A deletion sends two events: its beginning and its end.
                let is_deletion_start =
                    matches!(&event, WatchEvent::Modified(pod) if pod.metadata.deletion_timestamp.is_some());
                counted.fetch_add(u64::from(!is_deletion_start), Ordering::Relaxed);
                if let WatchEvent::Added(pod) | WatchEvent::Modified(pod) = &event {
                    show(&pod.metadata);
                }
            }
        });
        Ok(PodEvents { count, task })
    }

    /// Pods as expected at `data.kubernetes.pods`.
    pub async fn pods(&self, ignored: &[&str]) -> anyhow::Result<Value> {
        let request = http::Request::get("/api/v1/pods").body(Vec::new())?;
        let list: Value = self.client.request(request).await?;
        let mut pods = json!({});
        for mut pod in list["items"].as_array().cloned().unwrap_or_default() {
            let text =
                |pod: &Value, field: &str| pod["metadata"][field].as_str().unwrap_or_default().to_owned();
            let (namespace, name) = (text(&pod, "namespace"), text(&pod, "name"));
            if ignored.contains(&namespace.as_str()) {
                continue;
            }
            if let Some(metadata) = pod["metadata"].as_object_mut() {
                metadata.remove("managedFields");
            }
            pod["kind"] = "Pod".into();
            pod["apiVersion"] = "v1".into();
            pods[namespace][name] = pod;
        }
        Ok(pods)
    }
}
