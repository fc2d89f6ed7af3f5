//! What the agent knows of itself, for `/readyz` and for people.

use std::collections::BTreeMap;
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
    grace: Duration,
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
}

/// What `/readyz` and `/v1/status` show.
#[derive(Serialize)]
pub struct Report {
    /// Whether OPA holds what the hub last said, and the hub was heard lately.
    pub ready: bool,
    /// Why not.
    pub because: Vec<String>,
    /// What the hub last said.
    pub said: Option<Revision>,
    /// What OPA holds.
    pub held: Option<Revision>,
    /// What was done since the start.
    pub done: Done,
}

impl Status {
    /// Nothing is known yet.
    pub fn new(delivery: Delivery, grace: Duration) -> Self {
        Self(Arc::new(Mutex::new(State {
            delivery,
            grace,
            said: None,
            held: None,
            activated: None,
            unconnected: Some(Instant::now()),
            behind: None,
            stale: None,
            refused: BTreeMap::new(),
            failure: None,
            done: Done::default(),
        })))
    }

    /// Changes or reads it.
    pub fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What people and probes are shown.
    pub fn report(&self) -> Report {
        self.with(|state| {
            let because = state.unready();
            Report {
                ready: because.is_empty(),
                because,
                said: state.said,
                held: state.held,
                done: state.done,
            }
        })
    }
}

impl State {
    fn unready(&self) -> Vec<String> {
        let mut because = Vec::new();
        if self.held.is_none() || self.held != self.said {
            because.push("OPA does not hold what the hub last said".to_owned());
        }
        if self.delivery == Delivery::Bundle && self.activated != self.said.map(|said| said.modules) {
            because.push("OPA has not activated the policy bundle that the hub last said".to_owned());
        }
        let too_long = |since: Option<Instant>| Some(since?.elapsed()).filter(|time| *time > self.grace);
        if let Some(silent) = too_long(self.unconnected) {
            because.push(format!("no stream from the hub for {} s", silent.as_secs()));
        }
        if let Some(behind) = too_long(self.behind) {
            because.push(format!("the hub has more to say, for {} s", behind.as_secs()));
        }
        let stale = self.stale.as_ref().filter(|(since, _)| too_long(Some(*since)).is_some());
        because.extend(stale.map(|(_, words)| format!("what the hub says may be old: {words}")));
        because.extend(self.refused.iter().map(|(id, message)| format!("OPA refuses {id}: {message}")));
        if !because.is_empty() {
            because.extend(self.failure.clone());
        }
        because
    }
}
