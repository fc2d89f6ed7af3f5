//! Deterministic pods of about 10 KB, as an API server serves them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// Pods per namespace.
pub const PODS_PER_NAMESPACE: usize = 300;

const APPS: [&str; 8] = ["orders", "catalog", "cart", "payment", "search", "mail", "report", "gateway"];

static EXTERNAL_PREFIX: Mutex<Option<String>> = Mutex::new(None);

/// Makes pods for an external cluster, where no controller may act on them.
pub fn use_external_cluster(prefix: String) {
    *EXTERNAL_PREFIX.lock().unwrap_or_else(PoisonError::into_inner) = Some(prefix);
}

/// Namespace prefix in an external cluster; `None` in the lab's.
pub fn external_prefix() -> Option<String> {
    EXTERNAL_PREFIX.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Prefix of the pods' namespaces.
pub fn prefix() -> String {
    external_prefix().unwrap_or_else(|| "team".to_owned())
}

/// Entries of the run's namespaces.
pub fn entries_of_run(by_namespace: &Value) -> BTreeMap<&str, &Value> {
    let prefix = prefix();
    let all = by_namespace.as_object().into_iter().flatten();
    let entries = all.filter(|(namespace, _)| namespace.starts_with(&prefix));
    entries.map(|(namespace, value)| (namespace.as_str(), value)).collect()
}

/// Number of a pod, from 0.
#[derive(Clone, Copy, Debug)]
pub struct Nth(pub usize);

impl Nth {
    /// Namespace, shared by [`PODS_PER_NAMESPACE`] pods.
    pub fn namespace(self) -> String {
        format!("{}-{:03}", prefix(), self.0 / PODS_PER_NAMESPACE)
    }

    /// Pod name.
    pub fn name(self) -> String {
        format!("{}-{}-{:05}", self.app(), self.hash(), self.0)
    }

    /// Application name, one of eight.
    pub fn app(self) -> &'static str {
        APPS[self.0 % APPS.len()]
    }

    fn hash(self) -> String {
        digest("template", self.0 / 10)[..9].to_owned()
    }

    /// Pod IP.
    pub fn address(self) -> String {
        // RFC 2544 reserves 198.18.0.0/15 for benchmarks.
        let (first, second) = match external_prefix() {
            Some(_) => (198, 18 + self.0 / 65536 % 2),
            None => (10, 64 + self.0 / 65536 % 64),
        };
        format!("{first}.{second}.{}.{}", self.0 / 256 % 256, self.0 % 256)
    }

    /// The pod as a controller creates it.
    pub fn posted(self) -> Value {
        let (app, hash) = (self.app(), self.hash());
        let mut pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": self.name(), "generateName": format!("{app}-{hash}-"), "namespace": self.namespace(),
                "labels": {
                    "app": app, "app.kubernetes.io/instance": format!("{app}-main"),
                    "app.kubernetes.io/version": "2.14.3", "pod-template-hash": hash,
                    "team": self.namespace(), "tier": if self.0.is_multiple_of(2) { "front" } else { "back" },
                },
                "annotations": {
                    "checksum/config": digest("config", self.0 / 10),
                    "prometheus.io/path": "/metrics", "prometheus.io/port": "9090", "prometheus.io/scrape": "true",
                    "sidecar.istio.io/status": "{\"initContainers\":[\"istio-init\"],\"containers\":[\"istio-proxy\"],\"volumes\":[\"istio-envoy\",\"istio-data\",\"istio-podinfo\",\"istiod-ca-cert\"],\"revision\":\"default\"}",
                },
                "ownerReferences": [{
                    "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": format!("{app}-{hash}"),
                    "uid": uid("owner", self.0 / 10),
                    "controller": true, "blockOwnerDeletion": true,
                }],
            },
            "spec": {
                "serviceAccountName": app, "restartPolicy": "Always", "dnsPolicy": "ClusterFirst",
                "schedulerName": "default-scheduler", "terminationGracePeriodSeconds": 30,
                "securityContext": { "runAsNonRoot": true, "fsGroup": 1000 },
                "containers": [self.container(app, 8080), self.container("proxy", 15090)],
                "tolerations": [
                    { "key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300 },
                    { "key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300 },
                ],
                "volumes": [
                    { "name": "config", "configMap": { "name": format!("{app}-config"), "defaultMode": 420 } },
                    { "name": "tls", "secret": { "secretName": format!("{app}-tls"), "defaultMode": 420 } },
                    { "name": "tmp", "emptyDir": {} },
                    { "name": "token", "projected": { "defaultMode": 420, "sources": [
                        { "serviceAccountToken": { "expirationSeconds": 3607, "path": "token" } },
                        { "configMap": { "name": "kube-root-ca.crt", "items": [{ "key": "ca.crt", "path": "ca.crt" }] } },
                        { "downwardAPI": { "items": [{ "path": "namespace", "fieldRef": { "apiVersion": "v1", "fieldPath": "metadata.namespace" } }] } },
                    ] } },
                ],
            },
        });
        if external_prefix().is_some() {
            // Neither owner nor account exists there.
            pod["metadata"].as_object_mut().and_then(|metadata| metadata.remove("ownerReferences"));
            pod["spec"]["serviceAccountName"] = json!("default");
            pod["spec"]["automountServiceAccountToken"] = json!(false);
            pod["spec"]["schedulingGates"] = json!([{ "name": "opahub.dev/load" }]);
            // Required by the Pod Security Standard "restricted".
            pod["spec"]["securityContext"]["seccompProfile"] = json!({ "type": "RuntimeDefault" });
        }
        pod
    }

    fn container(self, name: &str, port: u16) -> Value {
        let upper = name.to_uppercase();
        let env = (0..14).map(|index| json!({ "name": format!("{upper}_SETTING_{index}"), "value": format!("http://{name}-{index}.{}.svc.cluster.local:8080", self.namespace()) }));
        let probe = |path: &str| json!({ "httpGet": { "path": path, "port": port, "scheme": "HTTP" }, "initialDelaySeconds": 5, "timeoutSeconds": 2, "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3 });
        json!({
            "name": name, "image": format!("registry.example.com/shop/{name}:2.14.{}", self.0 % 7),
            "imagePullPolicy": "IfNotPresent", "args": ["--config=/etc/config/app.yaml", "--log-level=info"],
            "ports": [{ "name": "http", "containerPort": port, "protocol": "TCP" }],
            "env": env.collect::<Value>(),
            "resources": { "limits": { "cpu": "500m", "memory": "512Mi" }, "requests": { "cpu": "100m", "memory": "128Mi" } },
            "livenessProbe": probe("/livez"), "readinessProbe": probe("/readyz"),
            "securityContext": { "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": { "drop": ["ALL"] } },
            "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File",
            "volumeMounts": [
                { "name": "config", "mountPath": "/etc/config", "readOnly": true },
                { "name": "tls", "mountPath": "/etc/tls", "readOnly": true },
                { "name": "tmp", "mountPath": "/tmp" },
                { "name": "token", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "readOnly": true },
            ],
        })
    }

    /// Status from the kubelet.
    pub fn status(self) -> Value {
        let time = "2026-11-20T08:15:30Z";
        let condition = |kind: &&str| json!({ "type": kind, "status": "True", "lastProbeTime": null, "lastTransitionTime": time });
        let container = |name: &str| {
            json!({
                "name": name, "image": format!("registry.example.com/shop/{name}:2.14.{}", self.0 % 7),
                "imageID": format!("registry.example.com/shop/{name}@sha256:{}", digest(name, self.0 % 7)),
                "containerID": format!("containerd://{}", digest(name, self.0)), "ready": true, "started": true,
                "restartCount": 0, "lastState": {}, "state": { "running": { "startedAt": time } },
            })
        };
        let host = match external_prefix() {
            // RFC 5737: documentation address.
            Some(_) => "192.0.2.1".to_owned(),
            None => format!("192.168.{}.{}", self.0 / 100 / 250, self.0 / 100 % 250),
        };
        let conditions =
            ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"];
        json!({
            "phase": "Running", "qosClass": "Burstable", "startTime": time,
            "hostIP": host,
            "podIP": self.address(), "podIPs": [{ "ip": self.address() }],
            "conditions": conditions.iter().map(condition).collect::<Value>(),
            "containerStatuses": [container(self.app()), container("proxy")],
        })
    }

    /// Name of the node.
    pub fn node(self) -> String {
        format!("node-{:03}", self.0 / 100)
    }

    /// The complete pod, as the API server serves it.
    pub fn served(self) -> Value {
        let mut pod = self.posted();
        pod["metadata"]["uid"] = json!(uid("pod", self.0));
        pod["metadata"]["resourceVersion"] = json!((1000 + self.0 * 3).to_string());
        pod["metadata"]["creationTimestamp"] = json!("2026-11-20T08:15:28Z");
        pod["metadata"]["managedFields"] = json!([
            managed("kube-controller-manager", &pod["metadata"], None),
            managed("kube-controller-manager", &pod["spec"], None),
            managed("kubelet", &self.status(), Some("status")),
        ]);
        pod["spec"]["nodeName"] = json!(self.node());
        pod["spec"]["enableServiceLinks"] = json!(true);
        pod["spec"]["preemptionPolicy"] = json!("PreemptLowerPriority");
        pod["spec"]["priority"] = json!(0);
        pod["status"] = self.status();
        pod
    }
}

/// Random, so pods compress realistically.
fn digest(seed: &str, number: usize) -> String {
    let hash = Sha256::digest(format!("{seed} {number}"));
    hash.iter().fold(String::new(), |mut text, byte| {
        _ = write!(text, "{byte:02x}");
        text
    })
}

fn uid(seed: &str, number: usize) -> String {
    let hash = digest(seed, number);
    [&hash[..8], &hash[8..12], &hash[12..16], &hash[16..20], &hash[20..32]].join("-")
}

fn managed(manager: &str, owned: &Value, subresource: Option<&str>) -> Value {
    fn fields(value: &Value) -> Value {
        match value {
            Value::Object(map) => {
                map.iter().map(|(key, value)| (format!("f:{key}"), fields(value))).collect()
            }
            _ => json!({}),
        }
    }
    let mut entry = json!({
        "manager": manager, "operation": "Update", "apiVersion": "v1", "time": "2026-11-20T08:15:30Z",
        "fieldsType": "FieldsV1", "fieldsV1": fields(owned),
    });
    if let Some(subresource) = subresource {
        entry["subresource"] = json!(subresource);
    }
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_about_ten_kilobytes() {
        let bytes = Nth(7).served().to_string().len();
        assert!((9_000..11_000).contains(&bytes), "{bytes}");
    }
}
