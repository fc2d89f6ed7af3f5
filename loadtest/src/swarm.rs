//! Thousands of simulated agents, which verify every frame's digest. Some are verifiers: they store the content too,
//! to compare with the source.

mod agent;
mod content;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use opa_hub_loadtest::pods;
use opa_hub_proto::head::DataHead;
use opa_hub_proto::position::{POSITION_HEADER, Position};
use opa_hub_proto::revision::Revision;
use serde_json::{Value, json};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use self::agent::Agent;
use self::content::{Digests, apply_archive, digest};
use crate::histogram::Histogram;

const OPENING_MAX: usize = 256;
const VERIFIERS: usize = 20;

/// Whole objects, for [`Swarm::mismatches`].
pub(crate) const WHOLE: &[&str] = &[""];
const SETTLE: Duration = Duration::from_secs(5);
const COMPARE_INTERVAL: Duration = Duration::from_millis(50);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Pace {
    Steady,
    Trickling,
    /// Reads nothing until [`Swarm::wake`].
    Stalled,
}

pub(crate) struct Swarm {
    shared: Arc<Shared>,
    agents: JoinSet<anyhow::Result<()>>,
}

struct Shared {
    start: Arc<Start>,
    hubs: Vec<SocketAddr>,
    due: Schedule,
    newest: Vec<AtomicU64>,
    delays: Mutex<Arc<Histogram>>,
    contents: BTreeMap<usize, Mutex<Value>>,
    opening: Semaphore,
    is_awake: watch::Sender<bool>,
    counts: Counts,
    last_error: Mutex<String>,
}

pub(crate) struct Start {
    pub(crate) revision: Revision,
    pub(crate) data: DataHead,
    pub(crate) position: Position,
    /// Serialised field masks.
    pub(crate) reads: Option<String>,
    pub(crate) content: Value,
}

/// Due times of changes, numbered from 1. Delays at the source count as the server's.
#[derive(Clone)]
pub(crate) struct Schedule {
    due: Arc<Mutex<Vec<Instant>>>,
    /// Only multiples are measured: other changes may overtake each other.
    every: u64,
}

#[derive(Default)]
pub(crate) struct Counts {
    pub(crate) open: AtomicUsize,
    pub(crate) frames: AtomicU64,
    pub(crate) operations: AtomicU64,
    pub(crate) stalled_frames: AtomicU64,
    pub(crate) bytes: AtomicU64,
    pub(crate) reconciles: AtomicU64,
    pub(crate) ended: AtomicU64,
    pub(crate) rejected: AtomicU64,
}

impl Default for Schedule {
    fn default() -> Self {
        Self::sampling(1)
    }
}

impl Schedule {
    pub(crate) fn sampling(every: u64) -> Self {
        Self { due: Arc::default(), every }
    }

    pub(crate) fn push(&self, due_at: Instant) -> u64 {
        let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        due.push(due_at);
        due.len() as u64
    }

    pub(crate) fn len(&self) -> u64 {
        self.due.lock().unwrap_or_else(PoisonError::into_inner).len() as u64
    }

    pub(crate) fn due_at(&self, number: u64) -> Option<Instant> {
        let index = usize::try_from(number.checked_sub(1)?).ok()?;
        self.due.lock().unwrap_or_else(PoisonError::into_inner).get(index).copied()
    }

    fn record_delays(&self, from: u64, to: u64, now: Instant, delays: &Histogram) {
        let due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        for number in (from + 1..=to).filter(|number| number.is_multiple_of(self.every)) {
            // Iterating over all changes would take time that grows with a run.
            let due = usize::try_from(number - 1).ok().and_then(|index| due.get(index));
            due.inspect(|due| delays.record(now.saturating_duration_since(**due)));
        }
    }
}

impl Start {
    pub(crate) async fn fetch(hub: &str) -> anyhow::Result<Self> {
        let http = opa_hub_loadtest::lab::http()?;
        let response = http.get(format!("{hub}/bundles/main/data")).send().await?.error_for_status()?;
        let position = response.headers().get(POSITION_HEADER).and_then(|position| position.to_str().ok());
        let position = position.and_then(|position| position.parse().ok()).unwrap_or_default();
        let mut content = json!({});
        let Digests { data, modules, reads } = apply_archive(&response.bytes().await?, &mut content)?;
        let revision = Revision {
            data: digest(&data),
            modules: modules.context("reading the archive failed: no digest of the modules")?,
        };
        Ok(Self { revision, data, position, reads, content })
    }
}

impl Swarm {
    pub(crate) async fn open(
        start: Arc<Start>,
        hubs: Vec<SocketAddr>,
        due: Schedule,
        count: usize,
        paces: &[(Pace, usize)],
    ) -> anyhow::Result<Self> {
        let verifiers = (0..count).step_by((count / VERIFIERS).max(1));
        let shared = Arc::new(Shared {
            contents: verifiers.map(|index| (index, Mutex::new(start.content.clone()))).collect(),
            start,
            hubs,
            due,
            newest: (0..count).map(|_| AtomicU64::new(0)).collect(),
            delays: Mutex::new(Arc::new(Histogram::new())),
            opening: Semaphore::new(OPENING_MAX),
            is_awake: watch::Sender::new(false),
            counts: Counts::default(),
            last_error: Mutex::default(),
        });
        let mut slow = paces.iter().flat_map(|(pace, count)| std::iter::repeat_n(*pace, *count));
        let mut agents = JoinSet::new();
        for index in 0..count {
            let pace = slow.next().unwrap_or(Pace::Steady);
            agents.spawn(Agent::run(Arc::clone(&shared), index, pace));
        }
        let mut swarm = Self { shared, agents };
        swarm.wait_until("every stream is open", |shared| shared.counts.open.load(Relaxed) == count).await?;
        // Backoff alone paces later connections.
        swarm.shared.opening.add_permits(count);
        Ok(swarm)
    }

    pub(crate) fn counts(&self) -> &Counts {
        &self.shared.counts
    }

    pub(crate) fn take_delays(&self) -> Arc<Histogram> {
        let mut delays = self.shared.delays.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut delays, Arc::new(Histogram::new()))
    }

    /// Number of verifiers whose pods are not subsets of the source's, or differ at these JSON pointers.
    pub(crate) fn mismatches(&self, source: &Value, fields: &[&str]) -> usize {
        let source = pods::entries_of_run(source);
        let matches = |found: &Value, source: &Value| {
            fields.iter().all(|field| found.pointer(field) == source.pointer(field))
                && is_subset(found, source)
        };
        let is_equal = |content: &Mutex<Value>| {
            let content = content.lock().unwrap_or_else(PoisonError::into_inner);
            let found = pods::entries_of_run(&content["kubernetes"]["pods"]);
            found.keys().eq(source.keys())
                && found
                    .values()
                    .zip(source.values())
                    .all(|(found, source)| has_matching_entries(found, source, matches))
        };
        self.shared.contents.values().filter(|content| !is_equal(content)).count()
    }

    /// Waits for pending changes first.
    pub(crate) async fn settled_mismatches(&self, source: &Value, fields: &[&str]) -> usize {
        let until = Instant::now() + SETTLE;
        loop {
            let mismatches = self.mismatches(source, fields);
            if mismatches == 0 || Instant::now() > until {
                return mismatches;
            }
            tokio::time::sleep(COMPARE_INTERVAL).await;
        }
    }

    pub(crate) fn count_with(&self, number: u64, first: usize) -> usize {
        self.shared.newest.iter().skip(first).filter(|newest| newest.load(Relaxed) >= number).count()
    }

    pub(crate) async fn reach(&mut self, number: u64, first: usize) -> anyhow::Result<()> {
        let what = format!("every agent has change {number}");
        let has =
            |shared: &Shared| shared.newest.iter().skip(first).all(|newest| newest.load(Relaxed) >= number);
        self.wait_until(&what, has).await
    }

    pub(crate) fn wake(&self) {
        self.shared.is_awake.send_replace(true);
    }

    pub(crate) fn check(&mut self) -> anyhow::Result<()> {
        match self.agents.try_join_next() {
            Some(ended) => ended?.context("an agent failed"),
            None => Ok(()),
        }
    }

    async fn wait_until(&mut self, what: &str, condition: impl Fn(&Shared) -> bool) -> anyhow::Result<()> {
        const PATIENCE: Duration = Duration::from_secs(120);
        let until = Instant::now() + PATIENCE;
        while !condition(&self.shared) {
            self.check()?;
            if Instant::now() > until {
                let last_error = self.shared.last_error.lock().unwrap_or_else(PoisonError::into_inner);
                bail!("timed out after {} s: {what}; last error: {last_error}", PATIENCE.as_secs());
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }
}

fn has_matching_entries(found: &Value, source: &Value, matches: impl Fn(&Value, &Value) -> bool) -> bool {
    let (Some(found), Some(source)) = (found.as_object(), source.as_object()) else { return false };
    found.len() == source.len()
        && found.iter().all(|(key, found)| source.get(key).is_some_and(|source| matches(found, source)))
}

/// Whether `found` is `source` with some object members left out.
fn is_subset(found: &Value, source: &Value) -> bool {
    match (found, source) {
        (Value::Object(found), Value::Object(source)) => {
            found.iter().all(|(key, found)| source.get(key).is_some_and(|source| is_subset(found, source)))
        }
        (Value::Array(found), Value::Array(source)) => {
            found.len() == source.len()
                && found.iter().zip(source).all(|(found, source)| is_subset(found, source))
        }
        _ => found == source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subsets_of_an_object_differ_from_stale_ones() {
        let source =
            json!({ "labels": { "app": "a", "round": "2" }, "images": [{ "name": "x", "image": "i" }] });
        for part in
            [json!({}), json!({ "labels": { "round": "2" } }), json!({ "images": [{ "image": "i" }] })]
        {
            assert!(is_subset(&part, &source), "{part}");
        }
        for other in [
            json!({ "labels": { "round": "1" } }),
            json!({ "labels": { "gone": "1" } }),
            json!({ "images": [] }),
            json!({ "labels": "2" }),
        ] {
            assert!(!is_subset(&other, &source), "{other}");
        }
    }
}
