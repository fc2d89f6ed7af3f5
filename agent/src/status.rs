//! What the agent knows of itself, for `/readyz` and for people.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use opa_hub_proto::revision::{Digest, Revision};
use serde::Serialize;
use tokio::time::Instant;

use crate::config::Delivery;

/// Shared by the replica, which writes, and the local server, which reads.
#[derive(Clone)]
pub struct Status(Arc<Mutex<State>>);

/// See [`Status`].
pub struct State {
    delivery: Delivery,
    unready_after: Option<Duration>,
    /// Whether OPA has held one whole state since it started: it decides on that until it restarts.
    loaded: bool,
    /// Time since which OPA is not in step with the source; `None` while it is.
    apart: Option<Instant>,
    /// What the hub last said.
    pub said: Option<Revision>,
    /// What OPA held when it was asked last; none when it did not answer or holds less.
    pub held: Option<Revision>,
    /// The modules' digest of the policy bundle that OPA last said it has activated.
    pub activated: Option<Digest>,
    /// Since when there is no stream; none while there is one.
    pub unconnected: Option<Instant>,
    /// Since when the hub says that there is more than it has given.
    pub behind: Option<Instant>,
    /// Since when the hub has not heard its source, in its words.
    pub stale: Option<(Instant, String)>,
    /// Modules that OPA refuses, with its words.
    pub refused: BTreeMap<String, String>,
    /// The failure that is being waited out.
    pub failure: Option<String>,
    /// What an operator should know although nothing fails.
    pub notice: Option<String>,
    /// What was done since the start.
    pub done: Done,
}

/// What was done since the start.
#[derive(Serialize, Clone, Copy, Default)]
#[serde(rename_all = "camelCase")]
pub struct Done {
    /// Events applied.
    pub frames: u64,
    /// Times that an OPA without a marker was loaded.
    pub snapshots: u64,
    /// Times that an OPA was repaired by digests.
    pub reconciles: u64,
    /// Times that an OPA without a marker was loaded from the last good state on disk.
    pub restores: u64,
}

/// How much a report shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Detail {
    /// Names of modules, and the words of OPA and of the hub.
    Full,
    /// Counts instead, for a listener that the whole cluster may reach.
    Counts,
}

/// What `/v1/status` and `/readyz?verbose` show.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// Whether OPA decides on one whole state, and is not out of step for longer than it may be.
    pub ready: bool,
    /// Reasons why it is not.
    pub because: Vec<String>,
    /// Whether OPA holds what the hub last said.
    pub in_step: bool,
    /// Reasons why OPA may not hold what the source has.
    pub behind: Vec<String>,
    /// What an operator should know although nothing fails.
    pub notices: Vec<String>,
    /// What the hub last said.
    pub said: Option<Revision>,
    /// What OPA holds.
    pub held: Option<Revision>,
    /// What was done since the start.
    pub done: Done,
}

impl Status {
    /// Nothing is known yet.
    pub fn new(delivery: Delivery, unready_after: Option<Duration>) -> Self {
        Self(Arc::new(Mutex::new(State {
            delivery,
            unready_after,
            loaded: false,
            apart: Some(Instant::now()),
            said: None,
            held: None,
            activated: None,
            unconnected: Some(Instant::now()),
            behind: None,
            stale: None,
            refused: BTreeMap::new(),
            failure: None,
            notice: None,
            done: Done::default(),
        })))
    }

    /// Changes or reads it.
    pub fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let result = f(&mut state);
        state.loaded |= state.is_in_step();
        state.apart = match state.apart {
            _ if !state.is_behind() => None,
            since => since.or_else(|| Some(Instant::now())),
        };
        result
    }

    /// Metrics in the text format of Prometheus.
    pub fn metrics(&self) -> String {
        self.with(|state| state.metrics())
    }

    /// What people and probes are shown.
    pub fn report(&self, detail: Detail) -> Report {
        self.with(|state| {
            let because = state.unready();
            Report {
                ready: because.is_empty(),
                because,
                in_step: state.is_in_step(),
                behind: state.behind(detail),
                notices: state.notice.iter().cloned().collect(),
                said: state.said,
                held: state.held,
                done: state.done,
            }
        })
    }
}

impl State {
    /// OPA restarted: it holds nothing.
    pub fn lost(&mut self) {
        (self.loaded, self.held, self.activated) = (false, None, None);
    }

    /// Modules that OPA should have activated and has not.
    fn is_activated(&self) -> bool {
        self.delivery == Delivery::Rest || self.activated == self.said.map(|said| said.modules)
    }

    fn is_in_step(&self) -> bool {
        let is_held = self.held.is_some() && self.held == self.said;
        is_held && self.behind.is_none() && self.refused.is_empty() && self.is_activated()
    }

    /// Whether OPA may not hold what the source has.
    fn is_behind(&self) -> bool {
        let since = [self.unconnected, self.behind, self.stale.as_ref().map(|(since, _)| *since)];
        !self.is_in_step() || since.iter().any(Option::is_some)
    }

    fn unready(&self) -> Vec<String> {
        if !self.loaded {
            return vec!["OPA is not loaded".to_owned()];
        }
        let apart = self.apart.map(|since| since.elapsed());
        let apart = apart.filter(|apart| self.unready_after.is_some_and(|after| *apart >= after));
        apart.map(|apart| format!("OPA is out of step for {} s", apart.as_secs())).into_iter().collect()
    }

    fn behind(&self, detail: Detail) -> Vec<String> {
        let mut behind = Vec::new();
        if self.held.is_none() || self.held != self.said {
            behind.push("OPA does not hold what the hub last said".to_owned());
        }
        if !self.is_activated() {
            behind.push("OPA has not activated the policy bundle that the hub last said".to_owned());
        }
        let seconds = |since: Instant| since.elapsed().as_secs();
        if let Some(since) = self.unconnected {
            behind.push(format!("no stream from the hub for {} s", seconds(since)));
        }
        if let Some(since) = self.behind {
            behind.push(format!("the hub has more to say, for {} s", seconds(since)));
        }
        if let Some((since, words)) = &self.stale {
            let words = if detail == Detail::Full { format!(": {words}") } else { String::new() };
            behind.push(format!("what the hub says may be old, for {} s{words}", seconds(*since)));
        }
        if detail == Detail::Counts {
            let refused = self.refused.len();
            behind.extend((refused > 0).then(|| format!("OPA refuses modules: {refused}")));
            return behind;
        }
        behind.extend(self.refused.iter().map(|(id, message)| format!("OPA refuses {id}: {message}")));
        if !behind.is_empty() {
            behind.extend(self.failure.clone());
        }
        behind
    }

    /// Metrics in the text format of Prometheus.
    fn metrics(&self) -> String {
        let age = |since: Option<Instant>| since.map_or(0.0, |since| since.elapsed().as_secs_f64());
        let Done { frames, snapshots, reconciles, restores } = self.done;
        let stale = self.stale.as_ref().map(|(since, _)| *since);
        let gauges = [
            (
                "ready",
                "Whether OPA decides on one whole state",
                f64::from(u8::from(self.unready().is_empty())),
            ),
            ("in_step", "Whether OPA holds what the hub last sent", f64::from(u8::from(self.is_in_step()))),
            ("out_of_step_seconds", "Time since OPA held what the source has", age(self.apart)),
            ("disconnected_seconds", "Time since there was a stream from a hub", age(self.unconnected)),
            ("stale_seconds", "Time since the hub lost its source", age(stale)),
            ("refused_modules", "Modules that OPA refuses", self.refused.len() as f64),
        ];
        let counters = [
            ("frames", "Frames applied", frames),
            ("snapshots", "Loads of an OPA that held nothing", snapshots),
            ("reconciles", "Repairs by digests", reconciles),
            ("restores", "Loads from the last good state on disk", restores),
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

    /// A19: `: wait` says that there is more.
    #[test]
    fn an_event_that_is_announced_is_not_in_step() {
        let status = Status::new(Delivery::Rest, None);
        let digest = Digest::of(b"x");
        let revision = Some(Revision { modules: digest, data: digest });
        status.with(|state| (state.said, state.held, state.unconnected) = (revision, revision, None));
        assert!(status.report(Detail::Full).in_step);
        status.with(|state| state.behind = Some(Instant::now()));
        let report = status.report(Detail::Full);
        assert!(report.ready && !report.in_step);
        status.with(|state| state.behind = None);
        assert!(status.report(Detail::Full).in_step);
    }

    #[test]
    fn counts_name_no_module_and_repeat_no_error() {
        let status = Status::new(Delivery::Rest, None);
        status.with(|state| {
            state
                .refused
                .insert("shop/authz/a.rego".to_owned(), "rego_parse_error in secret.rego".to_owned());
            state.failure = Some("OPA refuses PUT /v1/policies/shop".to_owned());
            state.stale = Some((Instant::now(), "v1/pods: forbidden".to_owned()));
        });
        let behind = |detail| status.report(detail).behind.join("\n");
        let (full, counts) = (behind(Detail::Full), behind(Detail::Counts));
        for part in ["shop/authz/a.rego", "secret.rego", "/v1/policies/shop", "forbidden"] {
            assert!(full.contains(part) && !counts.contains(part), "{part}: {full}, {counts}");
        }
        assert!(counts.contains("OPA refuses modules: 1"), "{counts}");
    }
}
