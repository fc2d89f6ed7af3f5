//! Objects on the API server: ConfigMaps, pods, namespaces.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod};
use kube::api::{DeleteParams, ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::{Value, json};

/// The label that marks policies.
pub const POLICY: (&str, &str) = ("openpolicyagent.org/policy", "rego");
/// The label that marks data.
pub const DATA: (&str, &str) = ("openpolicyagent.org/data", "opa");

/// Writes objects.
#[derive(Clone)]
pub struct Cluster {
    /// With the rights to do so.
    pub client: Client,
}

impl Cluster {
    /// Posts any object to its collection, e.g. `/api/v1/pods`.
    pub async fn create(&self, collection: &str, object: &Value) -> anyhow::Result<()> {
        let request = http::Request::post(collection).header("content-type", "application/json");
        self.client.request::<Value>(request.body(serde_json::to_vec(object)?)?).await?;
        Ok(())
    }

    /// Makes a namespace, unless it is there.
    pub async fn namespace(&self, name: &str) -> anyhow::Result<()> {
        let namespace = Namespace {
            metadata: ObjectMeta { name: Some(name.into()), ..Default::default() },
            ..Default::default()
        };
        match Api::all(self.client.clone()).create(&PostParams::default(), &namespace).await {
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
            other => Ok(other.map(drop)?),
        }
    }

    /// Makes or replaces a ConfigMap.
    pub async fn configmap(
        &self,
        namespace: &str,
        name: &str,
        label: Option<(&str, &str)>,
        data: &[(&str, &str)],
    ) -> anyhow::Result<()> {
        let own = |(key, value): (&str, &str)| (key.to_owned(), value.to_owned());
        let configmap = ConfigMap {
            metadata: ObjectMeta {
                name: Some(name.into()),
                labels: label.map(|label| BTreeMap::from([own(label)])),
                ..Default::default()
            },
            data: Some(data.iter().copied().map(own).collect()),
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

    /// Removes a ConfigMap.
    pub async fn delete_configmap(&self, namespace: &str, name: &str) -> anyhow::Result<()> {
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), namespace);
        api.delete(name, &DeleteParams::default()).await?;
        Ok(())
    }

    /// Makes a pod with these labels.
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

    /// Removes a pod at once.
    pub async fn delete_pod(&self, namespace: &str, name: &str) -> anyhow::Result<()> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        api.delete(name, &DeleteParams::default().grace_period(0)).await?;
        Ok(())
    }

    /// All pods as they should lie at `data.kubernetes.pods`: by namespace and name, without managedFields.
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
