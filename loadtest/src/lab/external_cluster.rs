//! Checks of an external cluster before any write.

use anyhow::{Context as _, ensure};
use kube::Client;
use serde_json::{Value, json};

/// First version with scheduling gates; older ones would schedule the pods.
const GATES_SINCE: (u32, u32) = (1, 27);

/// Verb, API group, resource.
const RIGHTS: [(&str, &str, &str); 16] = [
    ("create", "", "namespaces"),
    ("list", "", "namespaces"),
    ("delete", "", "namespaces"),
    ("create", "", "pods"),
    ("list", "", "pods"),
    ("watch", "", "pods"),
    ("patch", "", "pods"),
    ("delete", "", "pods"),
    ("patch", "", "pods/status"),
    ("create", "", "configmaps"),
    ("update", "", "configmaps"),
    ("list", "", "configmaps"),
    ("watch", "", "configmaps"),
    ("get", "coordination.k8s.io", "leases"),
    ("create", "coordination.k8s.io", "leases"),
    ("update", "coordination.k8s.io", "leases"),
];

pub(super) async fn check(client: &Client) -> anyhow::Result<String> {
    let version =
        client.apiserver_version().await.context("reading the cluster's version failed")?.git_version;
    ensure!(
        has_gates(&version),
        "checking the cluster failed: {version} has no scheduling gates and would run the pods; use Kubernetes 1.27 or newer"
    );
    let mut missing = Vec::new();
    for (verb, group, resource) in RIGHTS {
        let (name, subresource) = resource.split_once('/').unwrap_or((resource, ""));
        let attributes =
            json!({ "verb": verb, "group": group, "resource": name, "subresource": subresource });
        if !may(client, &json!({ "resourceAttributes": attributes })).await? {
            missing.push(format!("{verb} {resource}"));
        }
    }
    if !may(client, &json!({ "nonResourceAttributes": { "verb": "get", "path": "/metrics" } })).await? {
        missing.push("get /metrics".to_owned());
    }
    ensure!(
        missing.is_empty(),
        "checking rights failed: the user of the kubeconfig may not {}; grant that in all namespaces, as docs/load.md shows",
        missing.join(", ")
    );
    // The run's hub would serve these documents and overwrite their status.
    let documents = http::Request::get("/apis/opahub.dev/v1alpha1/bundles?limit=1").body(Vec::new())?;
    match client.request::<Value>(documents).await {
        Ok(list) => ensure!(
            list["items"].as_array().is_none_or(Vec::is_empty),
            "checking the cluster failed: it has documents of kind Bundle, which the run's hub would follow; use a user that may not list bundles.opahub.dev"
        ),
        Err(kube::Error::Api(status)) if matches!(status.code, 403 | 404) => {}
        Err(error) => return Err(error).context("listing Bundle documents failed"),
    }
    Ok(version)
}

async fn may(client: &Client, spec: &Value) -> anyhow::Result<bool> {
    const REVIEWS: &str = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
    let review =
        json!({ "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "spec": spec });
    let request = http::Request::post(REVIEWS).header("content-type", "application/json");
    let request = request.body(serde_json::to_vec(&review)?)?;
    let response: Value = client.request(request).await.context("checking rights failed")?;
    Ok(response["status"]["allowed"] == true)
}

/// Parses the text: some servers leave major and minor empty.
fn has_gates(version: &str) -> bool {
    let mut numbers = version.trim_start_matches('v').split('.').map_while(|part| part.parse().ok());
    (numbers.next(), numbers.next()) >= (Some(GATES_SINCE.0), Some(GATES_SINCE.1))
}

#[cfg(test)]
mod tests {
    use super::has_gates;

    #[test]
    fn versions_are_compared_by_number() {
        for version in ["v1.27.0", "v1.37.2", "v1.30.4-eks-a737599", "v2.0.0"] {
            assert!(has_gates(version), "{version}");
        }
        for version in ["v1.26.15", "v1.9.0", "", "unknown"] {
            assert!(!has_gates(version), "{version}");
        }
    }
}
