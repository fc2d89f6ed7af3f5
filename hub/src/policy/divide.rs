//! Division of decisions that OPA cannot work on together. What one package does costs no other one its precision.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use opa_hub_proto::path::DirPath;
use opa_hub_proto::revision::{Digest, modules_digest};
use tokio::time::Instant;

use super::analyze;
use super::check::{self, Modules};
use super::modules::Module;

/// Maximum time in which groups of decisions are divided. Data goes on meanwhile, and other edits of policies wait.
const DIVIDE_MAX: Duration = Duration::from_secs(30);
/// Maximum number of runs for one set of policies: enough to find three failing ones among a thousand packages.
const RUNS_MAX: usize = 64;
/// Time after which the next edit tries a decision again that failed: a machine that was busy may have failed it.
pub const RETRY_AFTER: Duration = Duration::from_secs(600);
/// Reason of decisions that are left when the time or the runs are spent.
const SPENT: &str = "too many other policies cannot be analysed either";

/// Failure of one group.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Failure of a run of OPA.
    #[error(transparent)]
    Opa(#[from] check::Error),
    /// Failure of the analysis of its plan.
    #[error(transparent)]
    Analysis(#[from] analyze::TooComplex),
}

/// Memory of decisions that failed.
#[derive(Default)]
pub struct Divider {
    /// Decisions that failed alone.
    failed: BTreeMap<DirPath, Failure>,
    /// Groups that were still to be divided when the time was over. They are divided further the next time, apart from
    /// all others.
    suspects: Vec<BTreeSet<DirPath>>,
}

struct Failure {
    /// Digest of the decision's own modules.
    digest: Digest,
    reason: String,
    at: Instant,
}

impl Failure {
    fn is_old(&self) -> bool {
        self.at.elapsed() >= RETRY_AFTER
    }
}

/// Result of all decisions.
pub struct Divided<'a, T> {
    /// Groups that succeeded.
    pub found: Vec<(Vec<&'a DirPath>, T)>,
    /// Decisions that failed, with the reason.
    pub failed: BTreeMap<&'a DirPath, String>,
}

impl Divider {
    /// Whether each decision succeeded or failed by itself, so that another call would find the same.
    pub fn is_done(&self) -> bool {
        self.suspects.is_empty()
    }

    /// Runs `work` on these decisions together, and on parts of them where that fails. `None` without a real OPA. An
    /// error is no decision's doing.
    pub async fn divide<'a, T>(
        &mut self,
        modules: &Modules<'_>,
        decisions: BTreeSet<&'a DirPath>,
        mut work: impl AsyncFnMut(&[&'a DirPath]) -> Result<Option<T>, Error>,
    ) -> Result<Option<Divided<'a, T>>, check::Error> {
        // Other selections of the same policies lack some of them.
        let is_there = |decision: &DirPath| modules.values().any(|module| decision.is_within(&module.root));
        self.failed.retain(|decision, failure| !failure.is_old() || is_there(decision));
        let mut divided = Divided { found: Vec::new(), failed: BTreeMap::new() };
        let (mut others, mut again) = (Vec::new(), Vec::new());
        for decision in decisions {
            match self.failed.get(decision) {
                Some(failure) if failure.digest == own_digest(modules, decision) && !failure.is_old() => {
                    divided.failed.insert(decision, failure.reason.clone());
                }
                // It does not fail the others with it once more.
                Some(_) => again.push(vec![decision]),
                None => others.push(decision),
            }
        }
        let mut groups = VecDeque::new();
        for suspects in std::mem::take(&mut self.suspects) {
            let (group, rest) = others.into_iter().partition(|decision| suspects.contains(*decision));
            groups.push_back(group);
            others = rest;
        }
        groups.push_front(others);
        groups.extend(again);
        groups.retain(|group: &Vec<_>| !group.is_empty());
        let (mut until, mut runs) = (None, 0);
        // Level by level, so that good halves are found before the time is over.
        while let Some(group) = groups.pop_front() {
            if runs >= RUNS_MAX || until.is_some_and(|until| Instant::now() >= until) {
                self.suspects.push(group.iter().map(|decision| (*decision).clone()).collect());
                divided.failed.extend(group.into_iter().map(|decision| (decision, SPENT.to_owned())));
                continue;
            }
            runs += 1;
            match work(&group).await {
                Ok(None) => return Ok(None),
                Ok(Some(found)) => {
                    self.failed.retain(|decision, _| !group.contains(&decision));
                    divided.found.push((group, found));
                }
                Err(Error::Opa(error)) if error.is_transient() => return Err(error),
                Err(error) => {
                    until.get_or_insert_with(|| Instant::now() + DIVIDE_MAX);
                    if let [decision] = group[..] {
                        let reason = error.to_string();
                        let digest = own_digest(modules, decision);
                        let failure = Failure { digest, reason: reason.clone(), at: Instant::now() };
                        self.failed.insert(decision.clone(), failure);
                        divided.failed.insert(decision, reason);
                    } else {
                        groups.extend(halves(modules, group));
                    }
                }
            }
        }
        Ok(Some(divided))
    }
}

/// The large decisions, which have half of the group's text, and the small ones; one at least of each.
fn halves<'a>(modules: &Modules<'_>, group: Vec<&'a DirPath>) -> [Vec<&'a DirPath>; 2] {
    let bytes = |decision| own(modules, decision).map(|(_, module)| module.text.len()).sum::<usize>();
    let mut group: Vec<_> = group.into_iter().map(|decision| (bytes(decision), decision)).collect();
    group.sort_by_key(|(bytes, _)| std::cmp::Reverse(*bytes));
    let all: usize = group.iter().map(|(bytes, _)| bytes).sum();
    let before = group.iter().scan(0, |sum, (bytes, _)| Some(std::mem::replace(sum, *sum + bytes)));
    let large = before.take_while(|before| before * 2 < all).count().clamp(1, group.len() - 1);
    let small = group.split_off(large);
    [group, small].map(|half| half.into_iter().map(|(_, decision)| decision).collect())
}

fn own_digest(modules: &Modules<'_>, decision: &DirPath) -> Digest {
    modules_digest(own(modules, decision).map(|(id, module)| (id.as_str(), module.digest)), None)
}

/// The modules of a decision's package, and of packages below it.
fn own<'a>(modules: &'a Modules<'_>, decision: &DirPath) -> impl Iterator<Item = (&'a String, &'a Module)> {
    let is_own = |module: &Module| decision.is_within(&module.root) || module.root.is_within(decision);
    modules.iter().filter(move |(_, module)| is_own(module)).map(|(id, module)| (*id, &***module))
}
