//! Objects of both tenants and of the attacks.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::Api;
use kube::api::{DeleteParams, ListParams, ObjectMeta, PostParams};
use opa_hub_loadtest::cluster::{Cluster, DATA, POLICY};
use serde_json::{Value, json};

use super::site::in_time;

pub(super) const A: &str = "tenant-a";
pub(super) const B: &str = "tenant-b";
/// A namespace of A's data, named like a package of A.
pub(super) const SEIZED: &str = "seized";
/// Removed after an attack.
pub(super) const ATTACK: (&str, &str) = ("tenant.example.com/attack", "true");
pub(super) const TESTS: (&str, &str) = ("tenant.example.com/tests", "true");
pub(super) const BUNDLES: &str = "/apis/opahub.dev/v1alpha1/bundles";
/// Five times the data of A's pods.
pub(super) const MAX_BYTES: &str = "64Mi";
/// 12 MB in total, which reconcile requests multiply.
pub(super) const HEAVY_PODS: usize = 60;
const HEAVY_BYTES: usize = 200_000;
pub(super) const POD: &str = "web";
pub(super) const SETTINGS: &str = "settings";

pub(super) const WRITE_MAX: Duration = Duration::from_secs(30);
/// Enough for a thousand ConfigMaps.
const CLEAN_MAX: Duration = Duration::from_secs(60);

const DEFINITIONS: usize = 30_000;
const SLOW_TESTS: usize = 14;
/// Each multiplies fields by six.
const LEVELS: usize = 12;

pub(super) struct Put {
    pub(super) namespace: &'static str,
    pub(super) name: String,
    pub(super) labels: Vec<(&'static str, &'static str)>,
    pub(super) data: BTreeMap<String, String>,
}

pub(super) async fn cluster_put(cluster: &Cluster, put: Put) -> anyhow::Result<()> {
    let Put { namespace, name, labels, data } = put;
    let to_owned = |(label, value): (&str, &str)| (label.to_owned(), value.to_owned());
    let labels: BTreeMap<String, String> = labels.into_iter().map(to_owned).collect();
    let configmap = ConfigMap {
        metadata: ObjectMeta { name: Some(name.clone()), labels: Some(labels), ..Default::default() },
        data: Some(data),
        ..Default::default()
    };
    let api: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), namespace);
    let params = PostParams::default();
    let write = async {
        match api.replace(&name, &params, &configmap).await {
            Err(kube::Error::Api(status)) if status.code == 404 => {
                drop(api.create(&params, &configmap).await?);
            }
            other => drop(other?),
        }
        anyhow::Ok(())
    };
    in_time("a write to the API server", WRITE_MAX, write).await
}

/// `null` removes the limit.
pub(super) async fn limit_a(cluster: &Cluster, limit: &Value) -> anyhow::Result<()> {
    let (object, patch) = (format!("{BUNDLES}/{A}"), json!({ "spec": { "maxBytes": limit } }));
    in_time("a write to the API server", WRITE_MAX, cluster.merge(&object, &patch)).await
}

/// Removes what an attack created and restores A's limit.
pub(super) async fn clean(cluster: &Cluster) -> anyhow::Result<()> {
    let attack_params = ListParams::default().labels(&format!("{}={}", ATTACK.0, ATTACK.1));
    for namespace in [A, SEIZED] {
        let api: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), namespace);
        let params = DeleteParams::default();
        let remove = async {
            drop(api.delete_collection(&params, &attack_params).await?);
            anyhow::Ok(())
        };
        in_time("the removal of an attack's ConfigMaps", CLEAN_MAX, remove).await?;
    }
    limit_a(cluster, &json!(MAX_BYTES)).await
}

pub(super) fn document(name: &str, spec: &Value) -> Value {
    json!({ "apiVersion": "opahub.dev/v1alpha1", "kind": "Bundle", "metadata": { "name": name }, "spec": spec })
}

pub(super) fn spec_of_a() -> Value {
    json!({
        "policies": { "namespaces": [A] }, "data": { "namespaces": [A, SEIZED] },
        "replicate": [{ "resource": "v1/pods", "namespaces": [A], "scope": "Namespace", "fields": "auto" }],
        "replicateAuto": { "scope": "Namespace", "fields": "auto" },
        "maxBytes": MAX_BYTES, "testLabel": TESTS.0,
    })
}

/// The annotation does not compress.
pub(super) fn heavy_pod(index: usize) -> Value {
    let ballast: String = std::iter::repeat_with(fastrand::alphanumeric).take(HEAVY_BYTES).collect();
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": format!("heavy-{index}"), "labels": { "team": A }, "annotations": { "ballast": ballast } },
        "spec": { "containers": [{ "name": "main", "image": "registry.local/app:1.0" }] },
    })
}

pub(super) fn policy(namespace: &'static str, name: &str, text: String) -> Put {
    let data = BTreeMap::from([("p.rego".to_owned(), text)]);
    Put { namespace, name: name.to_owned(), labels: vec![POLICY], data }
}

pub(super) fn policy_of_a(number: u64) -> Put {
    let text = format!(
        "package base\n\nround := \"{number}\"\n\n\
         teams contains pod.metadata.labels.team if some pod in data.kubernetes.pods[\"{A}\"]\n"
    );
    policy(A, "base", text)
}

pub(super) fn policy_of_b(number: u64) -> Put {
    let text = format!(
        "package shop\n\nrevision := \"{number}\"\n\n\
         rounds[name] := pod.metadata.labels.round if some name, pod in data.kubernetes.pods[\"{B}\"]\n"
    );
    policy(B, "shop", text)
}

pub(super) fn settings(number: u64) -> Put {
    let data = BTreeMap::from([("current".to_owned(), json!({ "setting": number.to_string() }).to_string())]);
    Put { namespace: B, name: SETTINGS.to_owned(), labels: vec![DATA], data }
}

/// Removed after the attack.
pub(super) fn attacking_policy(name: &str, step: u64, text: &str) -> Put {
    let mut put = policy(A, name, format!("# {step}\n{text}"));
    put.labels.push(ATTACK);
    put
}

pub(super) fn multiplying_fields() -> String {
    let mut text = format!(
        "package multiplying\n\ndeny contains x{LEVELS} if {{\n\tsome x0 in data.kubernetes.pods[\"{A}\"]\n"
    );
    for level in 1..=LEVELS {
        let previous = level - 1;
        _ = writeln!(
            text,
            "\tsome x{level} in [x{previous}.a, x{previous}.b, x{previous}.c, x{previous}.d, x{previous}.e, x{previous}.f]"
        );
    }
    text + "}\n"
}

/// Each runs into OPA's limit of 5 s per test.
pub(super) fn slow_tests() -> String {
    let mut text = "package slow_test\n".to_owned();
    for index in 0..SLOW_TESTS {
        _ = write!(
            text,
            "\ntest_{index} if {{\n\tpairs := [1 | some x in numbers.range(1, 10000); some y in numbers.range(1, 10000); x * y < {index}]\n\tcount(pairs) >= 0\n}}\n"
        );
    }
    text
}

pub(super) fn definitions() -> String {
    let mut text = "package definitions\n\n".to_owned();
    for index in 0..DEFINITIONS {
        _ = writeln!(text, "r := {{\"k{index}\": 0}} if input");
    }
    text
}

/// Short, so that many keys fit into one object.
pub(super) fn key(number: usize) -> String {
    const DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    [62 * 62, 62, 1].map(|unit| char::from(DIGITS[number / unit % 62])).iter().collect()
}
