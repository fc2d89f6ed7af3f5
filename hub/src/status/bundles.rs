//! Conditions of `Bundle` documents: `Accepted` and `Complete`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::api::{ApiResource, DynamicObject, Patch, PatchParams};
use kube::{Api, Client};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::watch;

use crate::bundle::registry::BundleRegistry;
use crate::health::Health;
use crate::k8s::{FIELD_MANAGER, RequestError, WRITEBACK_TIMEOUT, report, while_leading, within};
use crate::manager::{DocumentStatuses, Opinion};
use crate::spec::API_VERSION;

/// Interval of document status updates.
pub const STATUS_LOOK: Duration = Duration::from_secs(10);
/// Maximum problems in a document status.
pub const STATUS_PROBLEMS_MAX: usize = 5;

const SUBJECT: &str = "bundle statuses";

#[derive(Deserialize)]
struct Document {
    metadata: Metadata,
    #[serde(default)]
    status: Status,
}

#[derive(Deserialize)]
struct Metadata {
    #[serde(default)]
    generation: i64,
}

#[derive(Deserialize, Default)]
struct Status {
    #[serde(default)]
    conditions: Vec<Condition>,
}

/// meta/v1 Condition.
#[derive(Serialize, Deserialize, Clone, Debug)]
#[serde(rename_all = "camelCase")]
struct Condition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
    #[serde(default)]
    observed_generation: i64,
    #[serde(default)]
    last_transition_time: String,
    reason: String,
    #[serde(default)]
    message: String,
}

/// Writes statuses while this replica `leads`.
pub async fn run(
    client: Client,
    bundles: Arc<BundleRegistry>,
    mut opinions: watch::Receiver<DocumentStatuses>,
    mut leads: watch::Receiver<bool>,
    readiness: Health,
) {
    let (group, version) = API_VERSION.split_once('/').expect("a group and a version");
    let resource = ApiResource {
        group: group.into(),
        version: version.into(),
        api_version: API_VERSION.into(),
        kind: "Bundle".into(),
        plural: "bundles".into(),
    };
    let documents: Api<DynamicObject> = Api::all_with(client, &resource);
    loop {
        let now = opinions.borrow_and_update().clone();
        let write_outdated = async {
            for (name, opinion) in now {
                if let Some(conditions) = outdated(&name, &opinion, &bundles) {
                    write(&documents, &name, &conditions, &readiness).await;
                }
            }
        };
        if while_leading(&leads, write_outdated).await.is_none() {
            // The leader reports failed writes.
            readiness.problem(SUBJECT, None);
        }
        tokio::select! {
            Ok(()) = opinions.changed() => {}
            Ok(()) = leads.changed() => {}
            () = tokio::time::sleep(STATUS_LOOK) => {}
        }
    }
}

/// `None` if the status is current.
fn outdated(
    name: &str,
    Opinion { object, error }: &Opinion,
    bundles: &BundleRegistry,
) -> Option<Vec<Condition>> {
    let document: Document = serde_json::from_slice(&object.json).ok()?;
    let condition = |kind: &str, status: bool, reason: &str, message: String| Condition {
        kind: kind.into(),
        status: if status { "True" } else { "False" }.into(),
        observed_generation: document.metadata.generation,
        last_transition_time: String::new(),
        reason: reason.into(),
        message,
    };
    let mut desired = vec![match error {
        None => condition("Accepted", true, "Accepted", String::new()),
        Some(error) => {
            condition("Accepted", false, "Invalid", format!("{error}; the last good document stays in use"))
        }
    }];
    if let Some(bundle) = bundles.get(name).filter(|bundle| bundle.head().borrow().is_some()) {
        let problems = bundle.problems();
        desired.push(if problems.is_empty() {
            condition("Complete", true, "Complete", String::new())
        } else {
            let first = problems.iter().take(STATUS_PROBLEMS_MAX);
            let mut messages: Vec<_> =
                first.map(|problem| format!("{}: {}", problem.subject, problem.message)).collect();
            if problems.len() > messages.len() {
                messages.push(format!("and {} more", problems.len() - messages.len()));
            }
            condition("Complete", false, "Refused", messages.join("; "))
        });
    }
    let current: BTreeMap<_, _> =
        document.status.conditions.iter().map(|condition| (&*condition.kind, condition)).collect();
    let is_current = |desired: &Condition| {
        current.get(&*desired.kind).is_some_and(|current| {
            (&current.status, &current.message, current.observed_generation)
                == (&desired.status, &desired.message, desired.observed_generation)
        })
    };
    if desired.iter().all(is_current) {
        return None;
    }
    let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    for desired in &mut desired {
        let unchanged = current.get(&*desired.kind).filter(|current| current.status == desired.status);
        desired.last_transition_time =
            unchanged.map_or_else(|| now.clone(), |current| current.last_transition_time.clone());
    }
    Some(desired)
}

async fn write(documents: &Api<DynamicObject>, name: &str, conditions: &[Condition], readiness: &Health) {
    let patch = json!({ "status": { "conditions": conditions } });
    let params = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
    let patch = Patch::Merge(patch);
    match within(WRITEBACK_TIMEOUT, documents.patch_status(name, &params, &patch)).await {
        Ok(_) => readiness.problem(SUBJECT, None),
        Err(RequestError::Failed(kube::Error::Api(status))) if status.code == 404 => {
            readiness.problem(SUBJECT, None);
        }
        Err(error) if error.is_forbidden() => {
            let message = "writing statuses failed: forbidden; \
                           grant the hub the verb patch on bundles.opahub.dev/status";
            report(readiness, SUBJECT, message.to_owned());
        }
        Err(error) => {
            report(readiness, SUBJECT, format!("writing the status of Bundle {name} failed: {error}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Object, ObjectKey};
    use crate::status::fake_api::{check_ends_with_leadership, check_reports_and_retries};

    fn write(client: Client, leads: watch::Receiver<bool>, readiness: Health) {
        let key = ObjectKey { namespace: "".into(), name: "main".into() };
        let json = r#"{"metadata":{"name":"main","generation":1}}"#.into();
        let opinion = Opinion { object: Object { key, json }, error: None };
        let (_, opinions) = watch::channel(DocumentStatuses::from([("main".to_owned(), opinion)]));
        tokio::spawn(run(client, Arc::default(), opinions, leads, readiness));
    }

    #[tokio::test(start_paused = true)]
    async fn no_status_is_written_after_the_lease_expired() {
        check_ends_with_leadership("/bundles", write).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_status_that_cannot_be_written_is_reported_and_retried() {
        check_reports_and_retries("/bundles", write).await;
    }
}
