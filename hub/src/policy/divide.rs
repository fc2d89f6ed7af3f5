//! Splits decisions that OPA cannot process together, so that one cannot spoil the others.
//!
//! `opa deps` takes over a minute for 30,000 definitions of one rule.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use opa_hub_proto::path::DirPath;
use opa_hub_proto::revision::{Digest, modules_digest};
use tokio::time::Instant;

use crate::policy::check::{self, Modules};
use crate::policy::dataflow;
use crate::policy::modules::Module;

/// Maximum number of runs per call: finds three failures among a thousand packages.
const RUNS_MAX: usize = 64;
/// Delay before a retry, since a busy machine may be the cause. Doubles with each failure.
pub const RETRY_AFTER: Duration = Duration::from_secs(600);
/// Maximum number of doublings of [`RETRY_AFTER`]: 21 hours.
const DOUBLINGS_MAX: u32 = 7;
/// Number of results, beyond twice those used, that triggers eviction.
const UNUSED_MAX: usize = 16;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Opa(#[from] check::Error),
    #[error(transparent)]
    Analysis(#[from] dataflow::TooComplex),
}

/// Cache of results, so that calls resume.
pub(crate) struct Divider<T> {
    /// Digest of all modules.
    all_digest: Option<Digest>,
    found: Vec<(BTreeSet<DirPath>, T)>,
    /// Decisions that failed alone.
    failed: BTreeMap<DirPath, Failure>,
    /// Disjoint groups without a result yet.
    groups: Vec<BTreeSet<DirPath>>,
}

struct Failure {
    /// Digest of the decision's own modules.
    own_digest: Digest,
    all_digest: Digest,
    reason: String,
    failed_at: Instant,
    earlier_failures: u32,
}

impl Failure {
    fn is_old(&self, all_digest: Digest) -> bool {
        // Another module may have been the cause.
        let doublings =
            if self.all_digest == all_digest { self.earlier_failures.min(DOUBLINGS_MAX) } else { 0 };
        self.failed_at.elapsed() >= RETRY_AFTER * 2_u32.pow(doublings)
    }
}

pub(crate) struct Divided<'a, T> {
    pub found: Vec<&'a (BTreeSet<DirPath>, T)>,
    /// Decisions that failed, with the reason.
    pub failed: BTreeMap<DirPath, String>,
    /// Decisions left for the next call.
    pub left: BTreeSet<DirPath>,
}

impl<T> Default for Divider<T> {
    fn default() -> Self {
        Self { all_digest: None, found: Vec::new(), failed: BTreeMap::new(), groups: Vec::new() }
    }
}

impl<T> Divider<T> {
    /// Runs `work` on all decisions, then on halves of failing groups, until `deadline`. `None` without a real
    /// OPA. Fails on transient errors only. Cancelling loses one run at most.
    pub(crate) async fn divide(
        &mut self,
        modules: &Modules<'_>,
        decisions: &BTreeSet<&DirPath>,
        deadline: Instant,
        mut work: impl AsyncFnMut(&[&DirPath]) -> Result<Option<T>, Error>,
    ) -> Result<Option<Divided<'_, T>>, check::Error> {
        let all_digest = digest(modules.iter().map(|(id, module)| (*id, &***module)));
        if self.all_digest.replace(all_digest) != Some(all_digest) {
            self.found.clear();
        }
        // Selections of the same policies alternate.
        let is_known = |decision: &DirPath| {
            decisions.contains(decision) || modules_of(modules, decision).next().is_some()
        };
        self.failed.retain(|decision, failure| !failure.is_old(all_digest) || is_known(decision));
        self.groups.retain(|group| group.iter().any(is_known));

        let mut pending = decisions.clone();
        let mut used = vec![false; self.found.len()];
        for ((group, _), is_used) in self.found.iter().zip(&mut used) {
            *is_used = group.iter().all(|decision| pending.contains(decision));
            if *is_used {
                pending.retain(|decision| !group.contains(*decision));
            }
        }
        let mut divided = Divided { found: Vec::new(), failed: BTreeMap::new(), left: BTreeSet::new() };
        pending.retain(|decision| {
            let failure = self.failed.get(*decision).filter(|failure| !failure.is_old(all_digest));
            let failure =
                failure.filter(|failure| failure.own_digest == digest(modules_of(modules, decision)));
            let reason = failure.map(|failure| ((*decision).clone(), failure.reason.clone()));
            let is_pending = reason.is_none();
            divided.failed.extend(reason);
            is_pending
        });
        let new =
            pending.iter().filter(|decision| !self.groups.iter().any(|group| group.contains(**decision)));
        // Earlier failures must not fail a group.
        let (retries, others): (Vec<&DirPath>, Vec<_>) =
            new.partition(|decision| self.failed.contains_key(**decision));
        self.groups.insert(0, others.into_iter().cloned().collect());
        self.groups.extend(retries.into_iter().map(|decision| BTreeSet::from([decision.clone()])));

        let (mut runs, mut index) = (0, 0);
        // Breadth first: good halves succeed early.
        while let Some(group) = self.groups.get(index) {
            let (group, others): (BTreeSet<_>, BTreeSet<_>) =
                group.iter().cloned().partition(|decision| pending.contains(decision));
            if group.is_empty() {
                index += 1;
                continue;
            }
            if runs >= RUNS_MAX || Instant::now() >= deadline {
                divided.left.extend(group);
                index += 1;
                continue;
            }
            runs += 1;
            let result = match work(&group.iter().collect::<Vec<_>>()).await {
                Err(Error::Opa(error)) if error.is_transient() => return Err(error),
                result => result,
            };
            if others.is_empty() {
                self.groups.remove(index);
            } else {
                self.groups[index] = others;
                index += 1;
            }
            match result {
                Ok(None) => return Ok(None),
                Ok(Some(found)) => {
                    self.failed.retain(|decision, _| !group.contains(decision));
                    self.found.push((group, found));
                    used.push(true);
                }
                Err(_) if group.len() > 1 => self.groups.extend(halves(modules, group)),
                Err(error) => {
                    for decision in group {
                        let own_digest = digest(modules_of(modules, &decision));
                        let last = self
                            .failed
                            .get(&decision)
                            .filter(|last| (last.own_digest, last.all_digest) == (own_digest, all_digest));
                        let earlier_failures = last.map_or(0, |last| last.earlier_failures.saturating_add(1));
                        let reason = error.to_string();
                        let failure = Failure {
                            own_digest,
                            all_digest,
                            reason: reason.clone(),
                            failed_at: Instant::now(),
                            earlier_failures,
                        };
                        self.failed.insert(decision.clone(), failure);
                        divided.failed.insert(decision, reason);
                    }
                }
            }
        }
        let count = used.iter().filter(|is_used| **is_used).count();
        if self.found.len() > 2 * count + UNUSED_MAX {
            let mut is_used = used.into_iter();
            self.found.retain(|_| is_used.next() == Some(true));
            used = vec![true; count];
        }
        divided
            .found
            .extend(self.found.iter().zip(used).filter(|(_, is_used)| *is_used).map(|(found, _)| found));
        Ok(Some(divided))
    }
}

/// Splits by half the source bytes, large decisions first.
fn halves(modules: &Modules<'_>, group: BTreeSet<DirPath>) -> [BTreeSet<DirPath>; 2] {
    let bytes = |decision: &DirPath| {
        modules_of(modules, decision).map(|(_, module)| module.text.len()).sum::<usize>()
    };
    let mut group: Vec<_> = group.into_iter().map(|decision| (bytes(&decision), decision)).collect();
    group.sort_by_key(|(bytes, _)| std::cmp::Reverse(*bytes));
    let all: usize = group.iter().map(|(bytes, _)| bytes).sum();
    let before = group.iter().scan(0, |sum, (bytes, _)| Some(std::mem::replace(sum, *sum + bytes)));
    let large = before.take_while(|before| before * 2 < all).count().clamp(1, group.len() - 1);
    let small = group.split_off(large);
    [group, small].map(|half| half.into_iter().map(|(_, decision)| decision).collect())
}

fn digest<'a>(modules: impl Iterator<Item = (&'a String, &'a Module)>) -> Digest {
    modules_digest(modules.map(|(id, module)| (id.as_str(), module.digest)), None)
}

/// Returns modules of the decision's package, and above and below.
fn modules_of<'a>(
    modules: &'a Modules<'_>,
    decision: &DirPath,
) -> impl Iterator<Item = (&'a String, &'a Module)> {
    let is_related = |module: &Module| decision.is_within(&module.root) || module.root.is_within(decision);
    modules.iter().filter(move |(_, module)| is_related(module)).map(|(id, module)| (*id, &***module))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const DIVIDE_MAX: Duration = Duration::from_secs(30);

    /// Divides packages `(name, text)`. Groups fail with an `x` or more than three `y`. Returns runs, failed
    /// and remaining decisions.
    async fn divide(divider: &mut Divider<()>, packages: &[(&str, &str)]) -> [Vec<String>; 3] {
        let texts = packages.iter().map(|(name, text)| {
            let module = Module::read(&format!("package {name}\n# {text}")).unwrap();
            ((*name).to_owned(), Arc::new(module))
        });
        let texts: Vec<_> = texts.collect();
        let modules: Modules = texts.iter().map(|(id, module)| (id, module)).collect();
        let decisions = modules.values().map(|module| &module.root).collect();
        let mut runs = Vec::new();
        let work = async |group: &[&DirPath]| {
            runs.push(group.iter().map(|decision| decision.relative()).collect::<String>());
            tokio::time::sleep(Duration::from_secs(1)).await;
            let all = group.iter().flat_map(|decision| modules_of(&modules, decision));
            let all: String = all.map(|(_, module)| module.text.lines().last().unwrap()).collect();
            let fails = all.contains('x') || all.matches('y').count() > 3;
            if fails { Err(check::Error::PlanTooLarge(1).into()) } else { Ok(Some(())) }
        };
        let until = Instant::now() + DIVIDE_MAX;
        let divided = divider.divide(&modules, &decisions, until, work).await;
        let Divided { failed, left, .. } = divided.unwrap().unwrap();
        let names = |decision: &DirPath| decision.relative().to_owned();
        let (failed, left) = (failed.keys().map(names).collect(), left.iter().map(names).collect());
        [runs, failed, left]
    }

    async fn check(divider: &mut Divider<()>, packages: &[(&str, &str)], runs: &[&str], failed: &[&str]) {
        let expected =
            [runs, failed, &[]].map(|names| names.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(divide(divider, packages).await, expected, "{packages:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn failures_are_cached_until_modules_change_or_time_passes() {
        let divider = &mut Divider::default();
        let before = [("a", "x"), ("b", ""), ("c", "")];
        check(divider, &before, &["abc", "ab", "c", "a", "b"], &["a"]).await;
        check(divider, &before, &[], &["a"]).await;
        check(divider, &[("a", "xx"), ("b", ""), ("c", "")], &["bc", "a"], &["a"]).await;
        check(divider, &[("a", ""), ("b", ""), ("c", "")], &["bc", "a"], &[]).await;
        check(divider, &before, &["abc", "ab", "c", "a", "b"], &["a"]).await;
        for failures in 0..=DOUBLINGS_MAX + 2 {
            let wait = RETRY_AFTER * 2_u32.pow(failures.min(DOUBLINGS_MAX));
            tokio::time::advance(wait.checked_sub(Duration::from_secs(2)).unwrap()).await;
            check(divider, &before, &[], &["a"]).await;
            tokio::time::advance(Duration::from_secs(2)).await;
            check(divider, &before, &["a"], &["a"]).await;
        }
        check(divider, &before[1..], &["bc"], &[]).await;
        check(divider, &before, &["bc"], &["a"]).await;
        // Another package may be the cause.
        check(divider, &[("a", "x"), ("b", "new"), ("c", "")], &["bc"], &["a"]).await;
        tokio::time::advance(RETRY_AFTER).await;
        check(divider, &[("a", "x"), ("b", "new"), ("c", "")], &["a"], &["a"]).await;
    }

    /// Every call makes progress.
    #[tokio::test(start_paused = true)]
    async fn division_ends() {
        let names: Vec<_> = (0..200).map(|index| format!("p{index:03}")).collect();
        for bad in [0, 1, 40, 200] {
            let text = |index| if index < bad { "x" } else { "y" };
            let packages: Vec<_> =
                names.iter().enumerate().map(|(index, name)| (name.as_str(), text(index))).collect();
            let (divider, mut all) = (&mut Divider::default(), 0);
            loop {
                let started = Instant::now();
                let [runs, failed, left] = divide(divider, &packages).await;
                assert!(started.elapsed() <= DIVIDE_MAX);
                assert!(!runs.is_empty() && failed.len() <= bad);
                all += runs.len();
                if left.is_empty() {
                    assert_eq!(failed.len(), bad);
                    break;
                }
            }
            assert!(all < 2 * packages.len(), "{bad}: {all} runs");
            assert_eq!(divide(divider, &packages).await[0], [""; 0], "a repeated call runs nothing");
        }
    }

    #[tokio::test]
    async fn cancelled_and_partial_calls_keep_the_groups() {
        let mut divider = Divider::default();
        let module = |name: &str| Arc::new(Module::read(&format!("package {name}")).unwrap());
        let modules: Vec<_> = ["a.x", "b", "c"].map(|name| (name.to_owned(), module(name))).into();
        let modules: Modules = modules.iter().map(|(id, module)| (id, module)).collect();
        let decisions = ["a", "b", "c"].map(|name| DirPath::new([name]).unwrap());
        let mut runs = 0;
        let hangs = async |_: &[&DirPath]| {
            runs += 1;
            let failure = check::Error::PlanTooLarge(1);
            if runs == 1 { Err::<Option<()>, Error>(failure.into()) } else { std::future::pending().await }
        };
        let all = decisions.iter().collect();
        assert!(
            futures::FutureExt::now_or_never(divider.divide(
                &modules,
                &all,
                Instant::now() + DIVIDE_MAX,
                hangs
            ))
            .is_none()
        );
        for (decisions, expected) in
            [(&decisions[1..], [1, 1]), (&decisions[..], [1, 0]), (&decisions[..], [0, 0])]
        {
            let mut groups = Vec::new();
            let work = async |group: &[&DirPath]| {
                groups.push(group.len());
                Ok(Some(()))
            };
            let decisions = decisions.iter().collect();
            let until = Instant::now() + DIVIDE_MAX;
            let divided = divider.divide(&modules, &decisions, until, work).await.unwrap().unwrap();
            assert!(divided.failed.is_empty() && divided.left.is_empty());
            groups.resize(2, 0);
            assert_eq!(groups, expected, "no other groups are run");
        }
    }
}
