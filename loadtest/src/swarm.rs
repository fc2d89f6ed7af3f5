//! Thousands of agents in one process, from many loopback addresses, by the protocol of real ones: each holds the
//! digests of its directories, resumes, reconciles and fails over, and counts a change as delivered when the digest
//! over those that a frame leaves is the one that the hub promised, as real agents do. Some are witnesses: they hold
//! what OPA would, so that it can be compared with what the source has.

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

/// Connections that are opened at a time.
const OPENING: usize = 256;
/// Witnesses of a swarm.
const WITNESSES: usize = 20;

/// Whole objects, for [`Swarm::astray`].
pub(crate) const WHOLE: &[&str] = &[""];
/// Maximum time until the witnesses have what is under way.
const SETTLE: Duration = Duration::from_secs(5);
/// Pause between two comparisons meanwhile.
const COMPARE: Duration = Duration::from_millis(50);

/// How an agent reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Pace {
    /// All that comes, as it comes.
    Steady,
    /// A few bytes now and then.
    Trickling,
    /// Nothing, until the swarm is told to wake.
    Stalled,
}

/// See the module's text.
pub(crate) struct Swarm {
    shared: Arc<Shared>,
    agents: JoinSet<anyhow::Result<()>>,
}

struct Shared {
    start: Arc<Start>,
    hubs: Vec<SocketAddr>,
    /// When the change of each number was due.
    due: Schedule,
    /// The last change that each agent has.
    held: Vec<AtomicU64>,
    delays: Mutex<Arc<Histogram>>,
    /// What those hold who are witnesses.
    contents: BTreeMap<usize, Mutex<Value>>,
    opening: Semaphore,
    is_awake: watch::Sender<bool>,
    counts: Counts,
    /// What went wrong at somebody's last try.
    trouble: Mutex<String>,
}

/// What agents hold at the start.
pub(crate) struct Start {
    pub(crate) revision: Revision,
    pub(crate) data: DataHead,
    pub(crate) position: Position,
    /// What policies read of it, in the hub's words.
    pub(crate) reads: Option<String>,
    pub(crate) content: Value,
}

/// When changes are due, which are numbered from 1. What is late at the source counts as the server's delay.
#[derive(Clone)]
pub(crate) struct Schedule {
    due: Arc<Mutex<Vec<Instant>>>,
    /// Of each so many one is looked for: where one change may pass another, of those none does.
    every: u64,
}

/// What the agents did.
#[derive(Default)]
pub(crate) struct Counts {
    pub(crate) open: AtomicUsize,
    pub(crate) frames: AtomicU64,
    /// Operations in those.
    pub(crate) operations: AtomicU64,
    /// Those of agents that stalled.
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
    /// One of each so many is looked for.
    pub(crate) fn of_each(every: u64) -> Self {
        Self { due: Arc::default(), every }
    }

    /// The next change is due then. Says its number.
    pub(crate) fn push(&self, at: Instant) -> u64 {
        let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        due.push(at);
        due.len() as u64
    }

    /// How many there are.
    pub(crate) fn len(&self) -> u64 {
        self.due.lock().unwrap_or_else(PoisonError::into_inner).len() as u64
    }

    /// When the change `number` was due.
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
    /// What `hub` serves now.
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
    /// Opens a stream for each agent at the first of the hubs, some of them with these paces, and waits until all are
    /// open.
    pub(crate) async fn open(
        start: Arc<Start>,
        hubs: Vec<SocketAddr>,
        due: Schedule,
        count: usize,
        paces: &[(Pace, usize)],
    ) -> anyhow::Result<Self> {
        let witnesses = (0..count).step_by((count / WITNESSES).max(1));
        let shared = Arc::new(Shared {
            contents: witnesses.map(|at| (at, Mutex::new(start.content.clone()))).collect(),
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
        // Whoever comes back later comes as fast as real ones do.
        swarm.shared.opening.add_permits(count);
        Ok(swarm)
    }

    /// What the agents did so far.
    pub(crate) fn counts(&self) -> &Counts {
        &self.shared.counts
    }

    /// Delays are counted anew; what was counted so far.
    pub(crate) fn take_delays(&self) -> Arc<Histogram> {
        let mut delays = self.shared.delays.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut delays, Arc::new(Histogram::new()))
    }

    /// Number of witnesses that do not hold the source's pods, by namespace and name, as far as the run made them: each
    /// pod is a part of the source's, with all that is at these JSON pointers.
    pub(crate) fn astray(&self, source: &Value, fields: &[&str]) -> usize {
        let source = pods::own(source);
        let is_right = |held: &Value, source: &Value| {
            fields.iter().all(|field| held.pointer(field) == source.pointer(field)) && is_part(held, source)
        };
        let holds = |content: &Mutex<Value>| {
            let content = content.lock().unwrap_or_else(PoisonError::into_inner);
            let held = pods::own(&content["kubernetes"]["pods"]);
            held.keys().eq(source.keys())
                && held.values().zip(source.values()).all(|(held, source)| is_alike(held, source, is_right))
        };
        self.shared.contents.values().filter(|content| !holds(content)).count()
    }

    /// Number of witnesses that are [astray](Self::astray) once what is under way has arrived.
    pub(crate) async fn settle(&self, source: &Value, fields: &[&str]) -> usize {
        let until = Instant::now() + SETTLE;
        loop {
            let astray = self.astray(source, fields);
            if astray == 0 || Instant::now() > until {
                return astray;
            }
            tokio::time::sleep(COMPARE).await;
        }
    }

    /// How many of the agents from `first` on have the change `number`.
    pub(crate) fn at(&self, number: u64, first: usize) -> usize {
        self.shared.held.iter().skip(first).filter(|held| held.load(Relaxed) >= number).count()
    }

    /// Waits until the agents from `first` on have the change `number`.
    pub(crate) async fn reach(&mut self, number: u64, first: usize) -> anyhow::Result<()> {
        let what = format!("every agent has change {number}");
        let has = |shared: &Shared| shared.held.iter().skip(first).all(|held| held.load(Relaxed) >= number);
        self.until(&what, has).await
    }

    /// Stalled and trickling agents read on as others do.
    pub(crate) fn wake(&self) {
        self.shared.is_awake.send_replace(true);
    }

    /// Fails when an agent met what none must meet.
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

/// Returns true if two maps have the same keys, with values that `is_right`.
fn is_alike(held: &Value, source: &Value, is_right: impl Fn(&Value, &Value) -> bool) -> bool {
    let (Some(held), Some(source)) = (held.as_object(), source.as_object()) else { return false };
    held.len() == source.len()
        && held.iter().all(|(key, held)| source.get(key).is_some_and(|source| is_right(held, source)))
}

/// Returns true if `held` is `source`, with members of objects left out.
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
