//! Verdicts as annotations on their ConfigMaps, as kube-mgmt writes them, and as Kubernetes Events: once a change,
//! never because of its own write, never on a version that nobody judged.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use k8s_openapi::api::core::v1::{ConfigMap, ObjectReference};
use kube::api::{Patch, PatchParams};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::Instant;

use super::{RequestError, WRITER, while_leading, within};
use crate::bundles::Bundles;
use crate::config::{VERDICT_AGAIN, VERDICT_LOOK, WRITEBACK_TIMEOUT};
use crate::model::ObjectKey;
use crate::policy::verdict::{NO_RETRIES, RETRIES, STATUS, Told, Verdict};
use crate::readiness::Readiness;

/// What [`Readiness`] calls it.
const SUBJECT: &str = "verdicts";
/// The subject of failed Events.
const EVENTS: &str = "events";
/// Bytes of an Event's note: the API server refuses more than 1 KiB.
const NOTE_BYTES_MAX: usize = 1000;

/// Writes the verdicts of all bundles: one for each ConfigMap.
pub struct Writer {
    client: Client,
    recorder: Recorder,
    bundles: Arc<Bundles>,
    readiness: Readiness,
    /// What was written last, and when: whoever removes the annotation again and again is not fought.
    written: HashMap<ObjectKey, (String, Instant)>,
}

impl Writer {
    /// A writer that has written nothing.
    pub fn new(client: Client, identity: String, bundles: Arc<Bundles>, readiness: Readiness) -> Self {
        let reporter = Reporter { controller: WRITER.into(), instance: Some(identity) };
        let recorder = Recorder::new(client.clone(), reporter);
        Self { client, recorder, bundles, readiness, written: HashMap::new() }
    }

    /// Writes while this replica `leads`, for ever.
    pub async fn run(mut self, mut leads: watch::Receiver<bool>) {
        loop {
            if while_leading(&leads, Box::pin(self.write_due())).await.is_none() {
                // The leader reports what it cannot write.
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

    async fn write_due(&mut self) {
        for (key, told, status) in self.due() {
            self.write(key, &told, status).await;
        }
    }

    /// The ConfigMaps that do not say what is to be said of them.
    fn due(&mut self) -> Vec<(ObjectKey, Told, String)> {
        let verdicts = self.verdicts();
        let written = &mut self.written;
        written.retain(|key, _| verdicts.contains_key(key));
        let due = verdicts.into_iter().filter_map(|(key, told)| {
            let status = told.verdict.status().to_string();
            let says = told.observed.status.as_deref() == Some(&*status)
                && told.observed.retries.as_deref() == Some(NO_RETRIES);
            let just_said = written
                .get(&key)
                .is_some_and(|(said, when)| *said == status && when.elapsed() < VERDICT_AGAIN);
            (!says && !just_said).then_some((key, told, status))
        });
        due.collect()
    }

    /// What is to be said of each ConfigMap. Where several bundles hold it, it is refused while one of them refuses it,
    /// and the bundle is named; none while one has not seen the newest of it.
    fn verdicts(&self) -> BTreeMap<ObjectKey, Told> {
        let mut verdicts: BTreeMap<ObjectKey, Vec<(String, Told)>> = BTreeMap::new();
        for bundle in self.bundles.list() {
            bundle.verdicts.with(|told| {
                for (key, told) in told.iter() {
                    verdicts.entry(key.clone()).or_default().push((bundle.name.clone(), told.clone()));
                }
            });
        }
        verdicts.into_iter().filter_map(|(key, told)| Some((key, merged(told)?))).collect()
    }

    async fn write(&mut self, key: ObjectKey, told: &Told, status: String) {
        // With the version: if the ConfigMap changed meanwhile, there will be another verdict.
        let patch = json!({ "metadata": {
            "resourceVersion": told.observed.version,
            "annotations": { STATUS: status, RETRIES: NO_RETRIES },
        } });
        let configmaps: Api<ConfigMap> = Api::namespaced(self.client.clone(), &key.namespace);
        let params = PatchParams { field_manager: Some(WRITER.into()), ..PatchParams::default() };
        self.bundles.verdict_writes.fetch_add(1, Ordering::Relaxed);
        let patch = Patch::Merge(patch);
        match within(WRITEBACK_TIMEOUT, configmaps.patch_metadata(&key.name, &params, &patch)).await {
            Ok(metadata) => {
                self.readiness.problem(SUBJECT, None);
                self.tell(&key, told, metadata.metadata.uid).await;
            }
            Err(RequestError::Failed(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => return,
            Err(error) => {
                let because = if error.is_forbidden() {
                    format!(
                        "forbidden: grant the hub the verb patch on configmaps in namespace {}",
                        key.namespace
                    )
                } else {
                    format!("cannot write the verdict of ConfigMap {key}: {error}")
                };
                self.complain(SUBJECT, because);
            }
        }
        self.written.insert(key, (status, Instant::now()));
    }

    /// An Event for a ConfigMap that is refused, and for one that no longer is.
    async fn tell(&self, key: &ObjectKey, told: &Told, uid: Option<String>) {
        let refused = !told.verdict.faults.is_empty();
        let was_refused = told.observed.status.as_ref().is_some_and(|status| status.contains(r#""error""#));
        if !refused && !was_refused {
            return;
        }
        let mut note = if refused { told.verdict.message() } else { "accepted".into() };
        note.truncate(note.floor_char_boundary(NOTE_BYTES_MAX));
        let event = Event {
            type_: if refused { EventType::Warning } else { EventType::Normal },
            reason: if refused { "Refused" } else { "Accepted" }.into(),
            note: Some(note),
            action: "Check".into(),
            secondary: None,
        };
        let about = ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("ConfigMap".into()),
            name: Some(key.name.to_string()),
            namespace: Some(key.namespace.to_string()),
            uid,
            ..ObjectReference::default()
        };
        match within(WRITEBACK_TIMEOUT, self.recorder.publish(&event, &about)).await {
            Ok(()) => self.readiness.problem(EVENTS, None),
            Err(error) => {
                let because = "grant the hub the verbs create and patch on events.events.k8s.io";
                self.complain(EVENTS, format!("cannot write an Event: {error} ({because})"));
            }
        }
    }

    fn complain(&self, subject: &str, because: String) {
        if self.readiness.is_news(subject, &because) {
            tracing::warn!("{because}");
        }
        self.readiness.problem(subject, Some(because));
    }
}

fn merged(mut told: Vec<(String, Told)>) -> Option<Told> {
    if told.len() == 1 {
        return told.pop().map(|(_, told)| told);
    }
    let mut all = Told { observed: told.first()?.1.observed.clone(), verdict: Verdict::default() };
    for (bundle, Told { observed, verdict }) in told {
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
    use crate::policy::verdict::{Fault, Observed, Verdicts};
    use crate::writeback::fake_api::{check_ends_with_leadership, check_reports_and_retries};

    fn write(client: Client, leads: watch::Receiver<bool>, readiness: Readiness) {
        let verdict =
            Verdict { faults: vec![Fault::new("rego_parse_error", "unexpected")], ..Verdict::default() };
        let observed = Observed { version: Some("1".into()), ..Observed::default() };
        let key = ObjectKey { namespace: "opa".into(), name: "shop".into() };
        let bundles = Arc::new(Bundles::default());
        let mut bundle = Bundle::new("main".into(), None);
        bundle.verdicts = Verdicts::telling(Arc::clone(&bundles.verdicts));
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
