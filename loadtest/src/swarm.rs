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
use self::content::{Digests, digest, take_archive};
use crate::histogram::Histogram;

const OPENING: usize = 256;
const VERIFIERS: usize = 20;

/// Whole objects, for [`Swarm::mismatches`].
pub(crate) const WHOLE: &[&str] = &[""];
const SETTLE: Duration = Duration::from_secs(5);
const COMPARE: Duration = Duration::from_millis(50);

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
    held: Vec<AtomicU64>,
    delays: Mutex<Arc<Histogram>>,
    contents: BTreeMap<usize, Mutex<Value>>,
    opening: Semaphore,
    is_awake: watch::Sender<bool>,
    counts: Counts,
    trouble: Mutex<String>,
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
    pub(crate) frames_of_stalled: AtomicU64,
    pub(crate) bytes: AtomicU64,
    pub(crate) reconciles: AtomicU64,
    pub(crate) ended: AtomicU64,
    pub(crate) refused: AtomicU64,
}

impl Default for Schedule {
    fn default() -> Self {
        Self::of_each(1)
    }
}

impl Schedule {
    pub(crate) fn of_each(every: u64) -> Self {
        Self { due: Arc::default(), every }
    }

    pub(crate) fn push(&self, at: Instant) -> u64 {
        let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        due.push(at);
        due.len() as u64
    }

    pub(crate) fn len(&self) -> u64 {
        self.due.lock().unwrap_or_else(PoisonError::into_inner).len() as u64
    }

    pub(crate) fn at(&self, number: u64) -> Option<Instant> {
        let at = usize::try_from(number.checked_sub(1)?).ok()?;
        self.due.lock().unwrap_or_else(PoisonError::into_inner).get(at).copied()
    }

    fn since(&self, from: u64, to: u64, now: Instant, delays: &Histogram) {
        let due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        for (number, due) in (1..=to).zip(&*due).skip(usize::try_from(from).unwrap_or(usize::MAX)) {
            if number.is_multiple_of(self.every) {
                delays.record(now.saturating_duration_since(*due));
            }
        }
    }
}

impl Start {
    pub(crate) async fn of(hub: &str) -> anyhow::Result<Self> {
        let http = opa_hub_loadtest::lab::http()?;
        let answer = http.get(format!("{hub}/bundles/main/data")).send().await?.error_for_status()?;
        let position = answer.headers().get(POSITION_HEADER).and_then(|position| position.to_str().ok());
        let position = position.and_then(|position| position.parse().ok()).unwrap_or_default();
        let mut content = json!({});
        let Digests { data, modules, reads } = take_archive(&answer.bytes().await?, &mut content)?;
        let revision = Revision { data: digest(&data), modules: modules.context("a digest of the modules")? };
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
            contents: verifiers.map(|at| (at, Mutex::new(start.content.clone()))).collect(),
            start,
            hubs,
            due,
            held: (0..count).map(|_| AtomicU64::new(0)).collect(),
            delays: Mutex::new(Arc::new(Histogram::new())),
            opening: Semaphore::new(OPENING),
            is_awake: watch::Sender::new(false),
            counts: Counts::default(),
            trouble: Mutex::default(),
        });
        let mut slow = paces.iter().flat_map(|(pace, count)| std::iter::repeat_n(*pace, *count));
        let mut agents = JoinSet::new();
        for at in 0..count {
            let pace = slow.next().unwrap_or(Pace::Steady);
            agents.spawn(Agent::run(Arc::clone(&shared), at, pace));
        }
        let mut swarm = Self { shared, agents };
        swarm.until("every stream is open", |shared| shared.counts.open.load(Relaxed) == count).await?;
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

    /// Number of verifiers whose pods are no part of the source's, or differ at these JSON pointers.
    pub(crate) fn mismatches(&self, source: &Value, fields: &[&str]) -> usize {
        let source = pods::entries_of_run(source);
        let is_right = |held: &Value, source: &Value| {
            fields.iter().all(|field| held.pointer(field) == source.pointer(field)) && is_part(held, source)
        };
        let holds = |content: &Mutex<Value>| {
            let content = content.lock().unwrap_or_else(PoisonError::into_inner);
            let held = pods::entries_of_run(&content["kubernetes"]["pods"]);
            held.keys().eq(source.keys())
                && held.values().zip(source.values()).all(|(held, source)| is_alike(held, source, is_right))
        };
        self.shared.contents.values().filter(|content| !holds(content)).count()
    }

    /// Waits for pending changes first.
    pub(crate) async fn settled_mismatches(&self, source: &Value, fields: &[&str]) -> usize {
        let until = Instant::now() + SETTLE;
        loop {
            let mismatches = self.mismatches(source, fields);
            if mismatches == 0 || Instant::now() > until {
                return mismatches;
            }
            tokio::time::sleep(COMPARE).await;
        }
    }

    pub(crate) fn at(&self, number: u64, first: usize) -> usize {
        self.shared.held.iter().skip(first).filter(|held| held.load(Relaxed) >= number).count()
    }

    pub(crate) async fn reach(&mut self, number: u64, first: usize) -> anyhow::Result<()> {
        let what = format!("every agent has change {number}");
        let has = |shared: &Shared| shared.held.iter().skip(first).all(|held| held.load(Relaxed) >= number);
        self.until(&what, has).await
    }

    pub(crate) fn wake(&self) {
        self.shared.is_awake.send_replace(true);
    }

    pub(crate) fn check(&mut self) -> anyhow::Result<()> {
        match self.agents.try_join_next() {
            Some(ended) => ended?.context("an agent gave up"),
            None => Ok(()),
        }
    }

    async fn until(&mut self, what: &str, is: impl Fn(&Shared) -> bool) -> anyhow::Result<()> {
        const PATIENCE: Duration = Duration::from_secs(120);
        let until = Instant::now() + PATIENCE;
        while !is(&self.shared) {
            self.check()?;
            if Instant::now() > until {
                let trouble = self.shared.trouble.lock().unwrap_or_else(PoisonError::into_inner);
                bail!("{what}: not within {} s, {trouble}", PATIENCE.as_secs());
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }
}

fn is_alike(held: &Value, source: &Value, is_right: impl Fn(&Value, &Value) -> bool) -> bool {
    let (Some(held), Some(source)) = (held.as_object(), source.as_object()) else { return false };
    held.len() == source.len()
        && held.iter().all(|(key, held)| source.get(key).is_some_and(|source| is_right(held, source)))
}

/// Whether `found` is `source` with some object members left out.
fn is_part(held: &Value, source: &Value) -> bool {
    match (held, source) {
        (Value::Object(held), Value::Object(source)) => {
            held.iter().all(|(key, held)| source.get(key).is_some_and(|source| is_part(held, source)))
        }
        (Value::Array(held), Value::Array(source)) => {
            held.len() == source.len() && held.iter().zip(source).all(|(held, source)| is_part(held, source))
        }
        _ => held == source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_an_object_are_told_from_stale_ones() {
        let source =
            json!({ "labels": { "app": "a", "round": "2" }, "images": [{ "name": "x", "image": "i" }] });
        for part in
            [json!({}), json!({ "labels": { "round": "2" } }), json!({ "images": [{ "image": "i" }] })]
        {
            assert!(is_part(&part, &source), "{part}");
        }
        for other in [
            json!({ "labels": { "round": "1" } }),
            json!({ "labels": { "gone": "1" } }),
            json!({ "images": [] }),
            json!({ "labels": "2" }),
        ] {
            assert!(!is_part(&other, &source), "{other}");
        }
    }
}
