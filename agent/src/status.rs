//! Sync status for `/readyz`, `/v1/status` and `/metrics`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use opa_hub_proto::revision::{Digest, Revision};
use serde::Serialize;
use tokio::time::Instant;

use crate::config::Delivery;

/// Status of the agent.
#[derive(Clone)]
pub struct Status(Arc<Mutex<SyncState>>);

pub(crate) struct SyncState {
    delivery: Delivery,
    unready_after: Option<Duration>,
    /// Whether OPA has had complete content since its start.
    is_loaded: bool,
    /// `None` while in sync with the source.
    out_of_sync_since: Option<Instant>,
    /// Latest revision from the hub.
    pub(crate) target: Option<Revision>,
    /// `None` while unknown or incomplete.
    pub(crate) applied: Option<Revision>,
    /// Modules that OPA reports as activated.
    pub(crate) activated: Option<Digest>,
    pub(crate) hub: HubStatus,
    pub(crate) problems: Problems,
    pub(crate) counters: Counters,
}

pub(crate) struct HubStatus {
    /// `None` while a stream is open.
    pub(crate) disconnected_since: Option<Instant>,
    /// Time of the first unfulfilled announcement.
    pub(crate) pending_since: Option<Instant>,
    /// Start and reason, as the hub reports.
    pub(crate) stale: Option<(Instant, String)>,
}

#[derive(Default)]
pub(crate) struct Problems {
    /// OPA's messages by module id.
    pub(crate) rejected_modules: BTreeMap<String, String>,
    pub(crate) failure: Option<String>,
    pub(crate) notice: Option<String>,
}

#[derive(Serialize, Clone, Copy, Default)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Counters {
    pub(crate) frames: u64,
    /// Loads from a hub.
    pub(crate) snapshots: u64,
    /// Repairs by digests.
    pub(crate) reconciles: u64,
    /// Loads from disk.
    pub(crate) restores: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Detail {
    /// Names and messages.
    Full,
    /// Counts only, for the cluster.
    Counts,
}

/// Body of `/v1/status` and `/readyz?verbose`.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Report {
    pub(crate) ready: bool,
    #[serde(rename = "because")]
    pub(crate) reasons: Vec<String>,
    #[serde(rename = "inStep")]
    in_sync: bool,
    /// Reasons for being behind the source.
    behind: Vec<String>,
    notices: Vec<String>,
    #[serde(rename = "said")]
    target_revision: Option<Revision>,
    #[serde(rename = "held")]
    applied_revision: Option<Revision>,
    #[serde(rename = "done")]
    counters: Counters,
}

impl Status {
    /// Creates the status of a disconnected agent.
    pub fn new(delivery: Delivery, unready_after: Option<Duration>) -> Self {
        let hub = HubStatus { disconnected_since: Some(Instant::now()), pending_since: None, stale: None };
        Self(Arc::new(Mutex::new(SyncState {
            delivery,
            unready_after,
            is_loaded: false,
            out_of_sync_since: Some(Instant::now()),
            target: None,
            applied: None,
            activated: None,
            hub,
            problems: Problems::default(),
            counters: Counters::default(),
        })))
    }

    pub(crate) fn with<T>(&self, f: impl FnOnce(&mut SyncState) -> T) -> T {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let result = f(&mut state);
        state.is_loaded |= state.is_in_sync();
        state.out_of_sync_since = match state.out_of_sync_since {
            _ if !state.is_behind_source() => None,
            since => since.or_else(|| Some(Instant::now())),
        };
        result
    }

    pub(crate) fn metrics(&self) -> String {
        self.with(|state| state.metrics())
    }

    pub(crate) fn report(&self, detail: Detail) -> Report {
        self.with(|state| {
            let reasons = state.unready_reasons();
            Report {
                ready: reasons.is_empty(),
                reasons,
                in_sync: state.is_in_sync(),
                behind: state.behind_reasons(detail),
                notices: state.problems.notice.iter().cloned().collect(),
                target_revision: state.target,
                applied_revision: state.applied,
                counters: state.counters,
            }
        })
    }
}

impl SyncState {
    pub(crate) fn reset_opa(&mut self) {
        (self.is_loaded, self.applied, self.activated) = (false, None, None);
    }

    fn is_activated(&self) -> bool {
        self.delivery == Delivery::Rest || self.activated == self.target.map(|target| target.modules)
    }

    fn is_in_sync(&self) -> bool {
        let is_applied = self.applied.is_some() && self.applied == self.target;
        let is_complete = self.hub.pending_since.is_none() && self.problems.rejected_modules.is_empty();
        is_applied && is_complete && self.is_activated()
    }

    /// Whether OPA may lack content of the source.
    fn is_behind_source(&self) -> bool {
        let HubStatus { disconnected_since, pending_since, stale } = &self.hub;
        let is_current = disconnected_since.is_none() && pending_since.is_none() && stale.is_none();
        !self.is_in_sync() || !is_current
    }

    fn unready_reasons(&self) -> Vec<String> {
        if !self.is_loaded {
            return vec!["OPA is not loaded".to_owned()];
        }
        let elapsed = self.out_of_sync_since.map(|since| since.elapsed());
        let elapsed = elapsed.filter(|elapsed| self.unready_after.is_some_and(|after| *elapsed >= after));
        elapsed.map(|elapsed| format!("OPA is out of step for {} s", elapsed.as_secs())).into_iter().collect()
    }

    fn behind_reasons(&self, detail: Detail) -> Vec<String> {
        let mut reasons = Vec::new();
        if self.applied.is_none() || self.applied != self.target {
            reasons.push("OPA has not applied the hub's latest revision".to_owned());
        }
        if !self.is_activated() {
            reasons.push("OPA has not activated the latest policy bundle".to_owned());
        }
        let seconds = |since: Instant| since.elapsed().as_secs();
        if let Some(since) = self.hub.disconnected_since {
            reasons.push(format!("no stream from the hub for {} s", seconds(since)));
        }
        if let Some(since) = self.hub.pending_since {
            reasons.push(format!("a change announced by the hub is pending for {} s", seconds(since)));
        }
        if let Some((since, reason)) = &self.hub.stale {
            let reason = if detail == Detail::Full { format!(": {reason}") } else { String::new() };
            reasons.push(format!("the hub's data may be stale for {} s{reason}", seconds(*since)));
        }
        let rejected = &self.problems.rejected_modules;
        if detail == Detail::Counts {
            let count = rejected.len();
            reasons.extend((count > 0).then(|| format!("OPA rejected modules: {count}")));
            return reasons;
        }
        reasons.extend(rejected.iter().map(|(id, message)| format!("OPA rejected {id}: {message}")));
        if !reasons.is_empty() {
            reasons.extend(self.problems.failure.clone());
        }
        reasons
    }

    fn metrics(&self) -> String {
        let age = |since: Option<Instant>| since.map_or(0.0, |since| since.elapsed().as_secs_f64());
        let flag = |value: bool| f64::from(u8::from(value));
        let Counters { frames, snapshots, reconciles, restores } = self.counters;
        let stale_since = self.hub.stale.as_ref().map(|(since, _)| *since);
        let rejected = self.problems.rejected_modules.len() as f64;
        let gauges = [
            ("ready", "Whether OPA decides on complete content", flag(self.unready_reasons().is_empty())),
            ("in_step", "Whether OPA has applied the hub's latest revision", flag(self.is_in_sync())),
            (
                "out_of_step_seconds",
                "Seconds since OPA had the source's content",
                age(self.out_of_sync_since),
            ),
            (
                "disconnected_seconds",
                "Seconds since a stream from a hub was open",
                age(self.hub.disconnected_since),
            ),
            ("stale_seconds", "Seconds since the hub lost its source", age(stale_since)),
            ("refused_modules", "Number of modules rejected by OPA", rejected),
        ];
        let counters = [
            ("frames", "Total frames applied", frames),
            ("snapshots", "Total loads of OPA from a hub", snapshots),
            ("reconciles", "Total repairs of OPA by digests", reconciles),
            ("restores", "Total loads of OPA from disk", restores),
        ];
        let mut text = String::new();
        for (name, help, value) in gauges {
            let name = format!("opa_hub_agent_{name}");
            _ = writeln!(text, "# HELP {name} {help}.\n# TYPE {name} gauge\n{name} {value}");
        }
        for (name, help, value) in counters {
            let name = format!("opa_hub_agent_{name}_total");
            _ = writeln!(text, "# HELP {name} {help}.\n# TYPE {name} counter\n{name} {value}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A19: `: wait` announces a change.
    #[test]
    fn announced_change_is_out_of_sync() {
        let status = Status::new(Delivery::Rest, None);
        let digest = Digest::of(b"x");
        let revision = Some(Revision { modules: digest, data: digest });
        status.with(|state| {
            (state.target, state.applied, state.hub.disconnected_since) = (revision, revision, None);
        });
        assert!(status.report(Detail::Full).in_sync);
        status.with(|state| state.hub.pending_since = Some(Instant::now()));
        let report = status.report(Detail::Full);
        assert!(report.ready && !report.in_sync);
        status.with(|state| state.hub.pending_since = None);
        assert!(status.report(Detail::Full).in_sync);
    }

    #[test]
    fn counts_contain_no_names_and_no_messages() {
        let status = Status::new(Delivery::Rest, None);
        status.with(|state| {
            state
                .problems
                .rejected_modules
                .insert("shop/authz/a.rego".to_owned(), "rego_parse_error in secret.rego".to_owned());
            state.problems.failure = Some("OPA rejected PUT /v1/policies/shop".to_owned());
            state.hub.stale = Some((Instant::now(), "v1/pods: forbidden".to_owned()));
        });
        let behind = |detail| status.report(detail).behind.join("\n");
        let (full, counts) = (behind(Detail::Full), behind(Detail::Counts));
        for part in ["shop/authz/a.rego", "secret.rego", "/v1/policies/shop", "forbidden"] {
            assert!(full.contains(part) && !counts.contains(part), "{part}: {full}, {counts}");
        }
        assert!(counts.contains("OPA rejected modules: 1"), "{counts}");
    }
}
