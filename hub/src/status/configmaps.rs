//! Writes verdicts as kube-mgmt's annotations and as Events, once per change, and only to the version that was checked.
//!
//! A ConfigMap of several bundles has one annotation: rejected, with the bundle's name, while one bundle rejects it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ConfigMap, ObjectReference};
use kube::api::{Patch, PatchParams};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::bundle::registry::BundleRegistry;
use crate::health::Health;
use crate::k8s::{FIELD_MANAGER, RequestError, WRITEBACK_TIMEOUT, report, while_leading, within};
use crate::model::ObjectKey;
use crate::policy::verdict::{NO_RETRIES, RETRIES, STATUS, Told, Verdict};

/// Minimum interval of rewriting a removed verdict.
pub const VERDICT_AGAIN: Duration = Duration::from_secs(60);
/// Interval of looking for removed verdicts.
pub const VERDICT_LOOK: Duration = Duration::from_secs(10);

const SUBJECT: &str = "verdicts";
const EVENTS: &str = "events";
/// The API server rejects more than 1 KiB.
const NOTE_BYTES_MAX: usize = 1000;

/// Writes one verdict per ConfigMap.
pub struct Writer {
    client: Client,
    recorder: Recorder,
    bundles: Arc<BundleRegistry>,
    readiness: Health,
    /// Last status and its time: limits writes against a client that removes the annotation.
    written: HashMap<ObjectKey, (String, Instant)>,
}

impl Writer {
    /// `identity` is the source of Events.
    pub fn new(client: Client, identity: String, bundles: Arc<BundleRegistry>, readiness: Health) -> Self {
        let reporter = Reporter { controller: FIELD_MANAGER.into(), instance: Some(identity) };
        let recorder = Recorder::new(client.clone(), reporter);
        Self { client, recorder, bundles, readiness, written: HashMap::new() }
    }

    /// Writes while this replica `leads`.
    pub async fn run(mut self, mut leads: watch::Receiver<bool>) {
        loop {
            if while_leading(&leads, Box::pin(self.write_outdated())).await.is_none() {
                // The leader reports failed writes.
                self.readiness.problem(SUBJECT, None);
                self.readiness.problem(EVENTS, None);
            }
            tokio::select! {
                () = self.bundles.verdicts.notified() => {}
                Ok(()) = leads.changed() => {}
                () = tokio::time::sleep(VERDICT_LOOK) => {}
            }
        }
    }

    async fn write_outdated(&mut self) {
        for (key, current, status) in self.outdated() {
            self.write(key, &current, status).await;
        }
    }

    fn outdated(&mut self) -> Vec<(ObjectKey, Told, String)> {
        let verdicts = self.verdicts();
        let written = &mut self.written;
        written.retain(|key, _| verdicts.contains_key(key));
        let outdated = verdicts.into_iter().filter_map(|(key, current)| {
            let status = current.verdict.status().to_string();
            let is_annotated = current.observed.status.as_deref() == Some(&*status)
                && current.observed.retries.as_deref() == Some(NO_RETRIES);
            let is_recent = written
                .get(&key)
                .is_some_and(|(last, time)| *last == status && time.elapsed() < VERDICT_AGAIN);
            (!is_annotated && !is_recent).then_some((key, current, status))
        });
        outdated.collect()
    }

    fn verdicts(&self) -> BTreeMap<ObjectKey, Told> {
        let mut verdicts: BTreeMap<ObjectKey, Vec<(String, Told)>> = BTreeMap::new();
        for bundle in self.bundles.list() {
            bundle.verdicts.with(|bundle_verdicts| {
                for (key, current) in bundle_verdicts.iter() {
                    verdicts.entry(key.clone()).or_default().push((bundle.name.clone(), current.clone()));
                }
            });
        }
        verdicts.into_iter().filter_map(|(key, by_bundle)| Some((key, merged(by_bundle)?))).collect()
    }

    async fn write(&mut self, key: ObjectKey, current: &Told, status: String) {
        // A changed ConfigMap conflicts, and its next verdict is written.
        let patch = json!({ "metadata": {
            "resourceVersion": current.observed.version,
            "annotations": { STATUS: status, RETRIES: NO_RETRIES },
        } });
        let configmaps: Api<ConfigMap> = Api::namespaced(self.client.clone(), &key.namespace);
        let params = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
        self.bundles.verdict_writes.fetch_add(1, Ordering::Relaxed);
        let patch = Patch::Merge(patch);
        match within(WRITEBACK_TIMEOUT, configmaps.patch_metadata(&key.name, &params, &patch)).await {
            Ok(metadata) => {
                self.readiness.problem(SUBJECT, None);
                self.publish_event(&key, current, metadata.metadata.uid).await;
            }
            Err(RequestError::Failed(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => return,
            Err(error) => {
                let message = if error.is_forbidden() {
                    format!(
                        "writing verdicts failed: forbidden; \
                         grant the hub the verb patch on configmaps in namespace {}",
                        key.namespace
                    )
                } else {
                    format!("writing the verdict of ConfigMap {key} failed: {error}")
                };
                report(&self.readiness, SUBJECT, message);
            }
        }
        self.written.insert(key, (status, Instant::now()));
    }

    /// Publishes rejections, and the next acceptance.
    async fn publish_event(&self, key: &ObjectKey, current: &Told, uid: Option<String>) {
        let is_rejected = !current.verdict.faults.is_empty();
        let was_rejected =
            current.observed.status.as_ref().is_some_and(|status| status.contains(r#""error""#));
        if !is_rejected && !was_rejected {
            return;
        }
        let mut note = if is_rejected { current.verdict.message() } else { "accepted".into() };
        note.truncate(note.floor_char_boundary(NOTE_BYTES_MAX));
        let event = Event {
            type_: if is_rejected { EventType::Warning } else { EventType::Normal },
            reason: if is_rejected { "Refused" } else { "Accepted" }.into(),
            note: Some(note),
            action: "Check".into(),
            secondary: None,
        };
        let regarding = ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("ConfigMap".into()),
            name: Some(key.name.to_string()),
            namespace: Some(key.namespace.to_string()),
            uid,
            ..ObjectReference::default()
        };
        match within(WRITEBACK_TIMEOUT, self.recorder.publish(&event, &regarding)).await {
            Ok(()) => self.readiness.problem(EVENTS, None),
            Err(error) => {
                let message = format!(
                    "publishing an Event failed: {error}; \
                     grant the hub the verbs create and patch on events.events.k8s.io"
                );
                report(&self.readiness, EVENTS, message);
            }
        }
    }
}

/// Rejects what any bundle rejects. `None` while bundles have checked different versions.
fn merged(mut by_bundle: Vec<(String, Told)>) -> Option<Told> {
    if by_bundle.len() == 1 {
        return by_bundle.pop().map(|(_, current)| current);
    }
    let observed = by_bundle.first()?.1.observed.clone();
    let mut all = Told { observed, verdict: Verdict::default() };
    for (bundle, Told { observed, verdict }) in by_bundle {
        if observed != all.observed {
            return None;
        }
        all.verdict.faults.extend(verdict.faults.into_iter().map(|mut fault| {
            fault.message = format!("bundle {bundle}: {}", fault.message);
            fault
        }));
        all.verdict
            .warnings
            .extend(verdict.warnings.iter().map(|warning| format!("bundle {bundle}: {warning}")));
    }
    Some(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::Bundle;
    use crate::policy::verdict::{Diagnostic, Observed, VerdictBoard};
    use crate::status::fake_api::{check_ends_with_leadership, check_reports_and_retries};

    fn write(client: Client, leads: watch::Receiver<bool>, readiness: Health) {
        let verdict =
            Verdict { faults: vec![Diagnostic::new("rego_parse_error", "unexpected")], ..Verdict::default() };
        let observed = Observed { version: Some("1".into()), ..Observed::default() };
        let key = ObjectKey { namespace: "opa".into(), name: "shop".into() };
        let bundles = Arc::new(BundleRegistry::default());
        let mut bundle = Bundle::new("main".into(), None);
        bundle.verdicts = VerdictBoard::telling(Arc::clone(&bundles.verdicts));
        bundle.verdicts.take(vec![(key, Some(Told { observed, verdict }))]);
        bundles.serve(Arc::new(bundle));
        tokio::spawn(Writer::new(client, "a".into(), bundles, readiness).run(leads));
    }

    #[tokio::test(start_paused = true)]
    async fn no_verdict_or_event_is_written_after_the_lease_expired() {
        for resource in ["/configmaps", "/events"] {
            check_ends_with_leadership(resource, write).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_verdict_or_event_that_cannot_be_written_is_reported_and_retried() {
        for resource in ["/configmaps", "/events"] {
            check_reports_and_retries(resource, write).await;
        }
    }
}
