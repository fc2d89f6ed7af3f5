//! A small realistic cluster: objects, some of them unusual, and inputs.

use opa_hub::fields::mask::FieldMask;
use opa_hub::fields::masks::FieldMasks;
use opa_hub_loadtest::pods::Nth;
use opa_hub_proto::path::DirPath;
use serde_json::{Value, json};

/// Resources, and whether they are cluster-scoped.
pub(crate) const RESOURCES: [(&str, bool); 4] =
    [("pods", false), ("services", false), ("nodes", true), ("namespaces", true)];
/// Number of applications, assigned round-robin.
const APPS: usize = 8;
const TIME: &str = "2026-11-20T08:00:00Z";

/// Returns a resource's path below `data`.
pub(crate) fn place(resource: &str) -> DirPath {
    format!("/kubernetes/{resource}").parse().unwrap()
}

pub(crate) fn lived_in(random: &mut fastrand::Rng) -> (Value, Vec<Value>) {
    let (mut kubernetes, mut inputs) = (json!({}), Vec::new());
    for nth in (0..12).chain(300..304).map(Nth) {
        let mut pod = nth.served();
        // The hub omits them.
        pod["metadata"].as_object_mut().unwrap().remove("managedFields");
        match random.u8(..6) {
            0 => pod["metadata"]["labels"] = json!({ "app": "Odd", "team": 1 }),
            1 => pod["spec"]["containers"][0]["securityContext"] = json!({ "privileged": true }),
            2 => pod["spec"]["initContainers"] = json!([{ "name": "init", "image": "other/init:latest" }]),
            3 => pod["status"] = json!({ "phase": "Pending", "podIP": Nth(0).address() }),
            4 => _ = pod["metadata"].as_object_mut().unwrap().remove("ownerReferences"),
            _ => pod["spec"]["containers"][1]["resources"]["limits"] = json!({ "cpu": "2", "memory": "1Gi" }),
        }
        kubernetes["pods"][nth.namespace()][nth.name()] = pod;
        for asked in 0..3 {
            inputs.push(input(nth, Nth(random.usize(..12)), asked));
        }
    }
    for (index, nth) in [Nth(0), Nth(300)].into_iter().enumerate() {
        kubernetes["nodes"][nth.node()] = node(&nth.node(), index);
        kubernetes["namespaces"][nth.namespace()] = namespace(&nth.namespace(), index);
        for app in 0..APPS {
            let name = Nth(app).app();
            kubernetes["services"][nth.namespace()][name] =
                service(name, &nth.namespace(), index * APPS + app);
        }
    }
    (kubernetes, inputs)
}

/// Returns one of three inputs about two pods.
fn input(nth: Nth, other: Nth, asked: usize) -> Value {
    let reference = |nth: Nth| json!({ "namespace": nth.namespace(), "name": nth.name() });
    let (namespace, app) = (other.namespace(), other.app());
    let selectors = [
        json!({ "app": app }),
        json!({ "tier": "front" }),
        json!({ "app": nth.app(), "team": nth.namespace() }),
    ];
    let pick = |values: [&'static str; 3]| values[asked];
    let ports = [8080, 80, 15090];
    json!({
        "namespace": nth.namespace(), "pod": nth.name(), "source": other.address(), "destination": nth.address(),
        "from": reference(nth), "to": reference(other), "node": nth.node(), "account": app, "index": asked,
        "role": pick(["read", "write", "reader"]),
        "registry": pick(["other/", "registry.example.com/", "registry.example.com/"]),
        "key": pick(["app", "team", "tier"]), "field": pick(["nodeName", "schedulerName", "serviceAccountName"]),
        "spiffe": format!("spiffe://cluster.local/ns/{namespace}/sa/{app}"),
        "port": ports[asked], "cidr": pick(["10.64.0.0/29", "10.64.0.8/30", "10.64.1.0/24"]),
        "now": pick(["2026-11-20T08:45:00Z", "2026-11-20T10:00:00Z", "2026-11-22T00:00:00Z"]),
        "selector": selectors[asked],
    })
}

fn metadata(name: &str, index: usize, labels: &Value) -> Value {
    json!({
        "name": name, "uid": format!("0d8a3c5e-6f1b-4c2a-9e7d-{index:012}"), "resourceVersion": (900 + index).to_string(),
        "creationTimestamp": TIME, "labels": labels,
    })
}

fn node(name: &str, index: usize) -> Value {
    let pick = |values: [&'static str; 2]| values[index];
    let labels = json!({
        "kubernetes.io/arch": "amd64", "kubernetes.io/hostname": name, "kubernetes.io/os": "linux",
        "node.kubernetes.io/instance-type": "m6i.2xlarge", "topology.kubernetes.io/region": "eu-1",
        "topology.kubernetes.io/zone": pick(["eu-1a", "eu-1b"]),
    });
    let taints = [
        json!([{ "key": "dedicated", "value": "shop", "effect": "NoSchedule" }]),
        json!([{ "key": "node.kubernetes.io/unreachable", "effect": "NoExecute", "timeAdded": TIME }]),
    ];
    let size = json!({
        "cpu": pick(["8", "1500m"]), "ephemeral-storage": "101430960Ki", "hugepages-2Mi": "0",
        "memory": pick(["32Gi", "2Gi"]), "pods": "110",
    });
    let condition = |kind: &str, status: &str| {
        json!({
            "type": kind, "status": status, "reason": format!("Kubelet{kind}"), "lastHeartbeatTime": TIME,
            "lastTransitionTime": TIME, "message": format!("kubelet reports {kind}"),
        })
    };
    let image = |app: &str| {
        let image = format!("registry.example.com/shop/{app}");
        json!({ "names": [format!("{image}@sha256:{}", "0123456789abcdef".repeat(4)), format!("{image}:2.14.0")], "sizeBytes": 51_234_567 })
    };
    json!({
        "apiVersion": "v1", "kind": "Node", "metadata": metadata(name, index, &labels),
        "spec": {
            "podCIDR": format!("10.64.{index}.0/24"), "podCIDRs": [format!("10.64.{index}.0/24")],
            "providerID": format!("cloud:///eu-1/{name}"), "taints": taints[index],
        },
        "status": {
            "addresses": [{ "type": "InternalIP", "address": format!("192.168.0.{index}") }, { "type": "Hostname", "address": name }],
            "allocatable": size, "capacity": size,
            "conditions": [
                condition("MemoryPressure", "False"), condition("DiskPressure", "False"),
                condition("PIDPressure", "False"), condition("Ready", pick(["True", "Unknown"])),
            ],
            "daemonEndpoints": { "kubeletEndpoint": { "Port": 10250 } },
            "images": (0..APPS).map(|app| image(Nth(app).app())).collect::<Value>(),
            "nodeInfo": {
                "architecture": "amd64", "containerRuntimeVersion": "containerd://2.1.4", "kernelVersion": "6.12.0",
                "kubeletVersion": pick(["v1.34.1", "v1.33.4"]), "operatingSystem": "linux", "osImage": "Linux",
            },
        },
    })
}

fn namespace(name: &str, index: usize) -> Value {
    let pick = |values: [&'static str; 2]| values[index];
    let labels = json!({
        "kubernetes.io/metadata.name": name, "environment": pick(["production", "staging"]),
        "pod-security.kubernetes.io/enforce": pick(["restricted", "baseline"]),
    });
    json!({
        "apiVersion": "v1", "kind": "Namespace", "metadata": metadata(name, index, &labels),
        "spec": { "finalizers": ["kubernetes"] }, "status": { "phase": "Active" },
    })
}

fn service(app: &str, namespace: &str, index: usize) -> Value {
    let mut metadata = metadata(app, index, &json!({ "app": app }));
    metadata["namespace"] = json!(namespace);
    let address = format!("10.96.1.{index}");
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": metadata, "status": { "loadBalancer": {} },
        "spec": {
            "type": "ClusterIP", "clusterIP": address, "clusterIPs": [address], "internalTrafficPolicy": "Cluster",
            "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack", "sessionAffinity": "None", "selector": { "app": app },
            "ports": [
                { "name": "web", "port": 80, "targetPort": "http", "protocol": "TCP" },
                { "name": "proxy", "port": 15090, "targetPort": 15090, "protocol": "TCP" },
            ],
        },
    })
}

fn members(value: &mut Value) -> impl Iterator<Item = &mut Value> {
    value.as_object_mut().unwrap().values_mut()
}

pub(crate) fn objects<'a>(
    kubernetes: &'a mut Value,
    resource: &str,
    is_cluster_scoped: bool,
) -> Vec<&'a mut Value> {
    let names = members(&mut kubernetes[resource]);
    if is_cluster_scoped { names.collect() } else { names.flat_map(members).collect() }
}

/// Prunes an object to these fields.
pub(crate) fn cut(fields: &FieldMask, object: &Value) -> Value {
    let mut out = Vec::new();
    fields.cut(&object.to_string(), &mut out).unwrap();
    serde_json::from_slice(&out).unwrap()
}

/// Prunes every object to its resource's fields.
pub(crate) fn cut_all(kubernetes: &Value, masks: &FieldMasks) -> Value {
    let mut less = kubernetes.clone();
    for (resource, is_cluster_scoped) in RESOURCES {
        for object in objects(&mut less, resource, is_cluster_scoped) {
            *object = cut(masks.of(&place(resource)), object);
        }
    }
    less
}
