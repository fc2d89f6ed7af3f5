//! Division of decisions that OPA cannot work on together. What one package does costs no other one its precision.

use std::collections::{BTreeMap, BTreeSet};
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
/// Time after which a decision that failed is tried again: a machine that was busy may have failed it. It doubles with
/// each failure, [`DOUBLINGS_MAX`] times at most.
pub const RETRY_AFTER: Duration = Duration::from_secs(600);
/// Maximum number of doublings of [`RETRY_AFTER`]: 21 hours, so that a lasting failure costs next to nothing.
const DOUBLINGS_MAX: u32 = 7;
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
    /// Groups without a result yet, each apart from all others: the call that divides them is under way, was dropped,
    /// or had no time left.
    groups: Vec<BTreeSet<DirPath>>,
}

struct Failure {
    /// Digest of the decision's own modules.
    digest: Digest,
    reason: String,
    at: Instant,
    /// Number of failures before this one.
    before: u32,
}

impl Failure {
    fn is_old(&self) -> bool {
        self.at.elapsed() >= RETRY_AFTER * 2_u32.pow(self.before.min(DOUBLINGS_MAX))
    }
}

/// Result of all decisions.
pub struct Divided<'a, T> {
    /// Groups that succeeded.
    pub found: Vec<(Vec<&'a DirPath>, T)>,
    /// Decisions that failed, with the reason.
    pub failed: BTreeMap<&'a DirPath, String>,
    /// Whether decisions are among the failed ones because the time or the runs were spent. Another call goes on there.
    pub is_partial: bool,
}

impl Divider {
    /// Runs `work` on these decisions together, and on parts of them where that fails. `None` without a real OPA. An
    /// error is no decision's doing. A call that is dropped loses one run.
    pub async fn divide<'a, T>(
        &mut self,
        modules: &Modules<'_>,
        decisions: BTreeSet<&'a DirPath>,
        mut work: impl AsyncFnMut(&[&'a DirPath]) -> Result<Option<T>, Error>,
    ) -> Result<Option<Divided<'a, T>>, check::Error> {
        // Other selections of the same policies lack some of them.
        let is_there = |decision: &DirPath| modules.values().any(|module| decision.is_within(&module.root));
        self.failed.retain(|decision, failure| !failure.is_old() || is_there(decision));
        self.groups.retain(|group| group.iter().any(is_there));
        let mut divided = Divided { found: Vec::new(), failed: BTreeMap::new(), is_partial: false };
        let (mut open, mut others, mut again) = (BTreeSet::new(), BTreeSet::new(), Vec::new());
        for decision in decisions {
            let failure = self.failed.get(decision);
            if let Some(failure) = failure
                && failure.digest == own_digest(modules, decision)
                && !failure.is_old()
            {
                divided.failed.insert(decision, failure.reason.clone());
                continue;
            }
            open.insert(decision);
            let is_grouped = self.groups.iter().any(|group| group.contains(decision));
            match failure {
                _ if is_grouped => {}
                // It does not fail the others with it once more.
                Some(_) => again.push(BTreeSet::from([decision.clone()])),
                None => _ = others.insert(decision.clone()),
            }
        }
        self.groups.insert(0, others);
        self.groups.extend(again);
        let (mut until, mut runs, mut at) = (None, 0, 0);
        // Level by level, so that good halves are found before the time is over.
        while let Some(group) = self.groups.get(at) {
            let group: Vec<_> = open.iter().copied().filter(|decision| group.contains(*decision)).collect();
            if group.is_empty() {
                at += 1;
                continue;
            }
            if runs >= RUNS_MAX || until.is_some_and(|until| Instant::now() >= until) {
                divided.is_partial = true;
                divided.failed.extend(group.into_iter().map(|decision| (decision, SPENT.to_owned())));
                at += 1;
                continue;
            }
            runs += 1;
            let result = match work(&group).await {
                Err(Error::Opa(error)) if error.is_transient() => return Err(error),
                result => result,
            };
            self.groups.remove(at);
            match result {
                Ok(None) => return Ok(None),
                Ok(Some(found)) => {
                    self.failed.retain(|decision, _| !group.contains(&decision));
                    divided.found.push((group, found));
                }
                Err(error) => {
                    until.get_or_insert_with(|| Instant::now() + DIVIDE_MAX);
                    if let [decision] = group[..] {
                        let reason = error.to_string();
                        let digest = own_digest(modules, decision);
                        let last = self.failed.get(decision).filter(|last| last.digest == digest);
                        let before = last.map_or(0, |last| last.before.saturating_add(1));
                        let failure = Failure { digest, reason: reason.clone(), at: Instant::now(), before };
                        self.failed.insert(decision.clone(), failure);
                        divided.failed.insert(decision, reason);
                    } else {
                        self.groups.extend(halves(modules, group));
                    }
                }
            }
        }
        Ok(Some(divided))
    }
}

/// The large decisions, which have half of the group's text, and the small ones; one at least of each.
fn halves(modules: &Modules<'_>, group: Vec<&DirPath>) -> [BTreeSet<DirPath>; 2] {
    let bytes = |decision| own(modules, decision).map(|(_, module)| module.text.len()).sum::<usize>();
    let mut group: Vec<_> = group.into_iter().map(|decision| (bytes(decision), decision)).collect();
    group.sort_by_key(|(bytes, _)| std::cmp::Reverse(*bytes));
    let all: usize = group.iter().map(|(bytes, _)| bytes).sum();
    let before = group.iter().scan(0, |sum, (bytes, _)| Some(std::mem::replace(sum, *sum + bytes)));
    let large = before.take_while(|before| before * 2 < all).count().clamp(1, group.len() - 1);
    let small = group.split_off(large);
    [group, small].map(|half| half.into_iter().map(|(_, decision)| decision.clone()).collect())
}

fn own_digest(modules: &Modules<'_>, decision: &DirPath) -> Digest {
    modules_digest(own(modules, decision).map(|(id, module)| (id.as_str(), module.digest)), None)
}

/// The modules of a decision's package, and of packages below it.
fn own<'a>(modules: &'a Modules<'_>, decision: &DirPath) -> impl Iterator<Item = (&'a String, &'a Module)> {
    let is_own = |module: &Module| decision.is_within(&module.root) || module.root.is_within(decision);
    modules.iter().filter(move |(_, module)| is_own(module)).map(|(id, module)| (*id, &***module))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// Divides packages of these names with these texts, of which those with `x` fail. Returns the groups of each run
    /// and the failed decisions.
    async fn divide(divider: &mut Divider, packages: &[(&str, &str)]) -> (Vec<String>, Vec<String>) {
        let texts = packages.iter().map(|(name, text)| {
            let module = Module::read(&format!("package {name}\n# {text}")).unwrap();
            ((*name).to_owned(), Arc::new(module))
        });
        let texts: Vec<_> = texts.collect();
        let modules: Modules = texts.iter().map(|(id, module)| (id, module)).collect();
        let decisions = modules.values().map(|module| &module.root).collect();
        let mut runs = Vec::new();
        let names = |group: &[&DirPath]| group.iter().map(|decision| decision.relative()).collect::<String>();
        let work = async |group: &[&DirPath]| {
            runs.push(names(group));
            let fails = |decision| own(&modules, decision).any(|(_, module)| module.text.contains('x'));
            let failure = check::Error::PlanTooLarge(1);
            if group.iter().any(|decision| fails(decision)) { Err(failure.into()) } else { Ok(Some(())) }
        };
        let divided = divider.divide(&modules, decisions, work).await.unwrap().unwrap();
        (runs, divided.failed.keys().map(|decision| decision.relative().to_owned()).collect())
    }

    async fn check(divider: &mut Divider, packages: &[(&str, &str)], runs: &[&str], failed: &[&str]) {
        let (found, failures) = divide(divider, packages).await;
        assert_eq!(
            (found, failures),
            (
                runs.iter().map(ToString::to_string).collect(),
                failed.iter().map(ToString::to_string).collect()
            ),
            "{packages:?}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn failures_are_remembered_until_the_modules_change_or_get_old() {
        let divider = &mut Divider::default();
        let before = [("a", "x"), ("b", ""), ("c", "")];
        check(divider, &before, &["abc", "ab", "c", "a", "b"], &["a"]).await;
        check(divider, &before, &["bc"], &["a"]).await;
        check(divider, &[("a", "xx"), ("b", ""), ("c", "")], &["bc", "a"], &["a"]).await;
        check(divider, &[("a", ""), ("b", ""), ("c", "")], &["bc", "a"], &[]).await;
        check(divider, &before, &["abc", "ab", "c", "a", "b"], &["a"]).await;
        for waits in 0..=DOUBLINGS_MAX + 2 {
            let wait = RETRY_AFTER * 2_u32.pow(waits.min(DOUBLINGS_MAX));
            tokio::time::advance(wait.checked_sub(Duration::from_secs(1)).unwrap()).await;
            check(divider, &before, &["bc"], &["a"]).await;
            tokio::time::advance(Duration::from_secs(1)).await;
            check(divider, &before, &["bc", "a"], &["a"]).await;
        }
        // Another selection of the policies does not forget it.
        check(divider, &before[1..], &["bc"], &[]).await;
        check(divider, &before, &["bc"], &["a"]).await;
    }

    #[tokio::test]
    async fn a_call_that_is_dropped_keeps_its_groups() {
        let mut divider = Divider::default();
        let module = |name: &str| Arc::new(Module::read(&format!("package {name}")).unwrap());
        let modules: Vec<_> = ["a", "b"].map(|name| (name.to_owned(), module(name))).into();
        let modules: Modules = modules.iter().map(|(id, module)| (id, module)).collect();
        let decisions = || modules.values().map(|module| &module.root).collect::<BTreeSet<_>>();
        let failure = || Error::from(check::Error::PlanTooLarge(1));
        let mut runs = 0;
        let hangs = async |_: &[&DirPath]| {
            runs += 1;
            if runs == 1 { Err::<Option<()>, _>(failure()) } else { std::future::pending().await }
        };
        let divide = divider.divide(&modules, decisions(), hangs);
        assert!(futures::FutureExt::now_or_never(divide).is_none());
        let mut groups = Vec::new();
        let work = async |group: &[&DirPath]| {
            groups.push(group.len());
            Ok(Some(()))
        };
        let divided = divider.divide(&modules, decisions(), work).await.unwrap().unwrap();
        assert!(divided.failed.is_empty() && !divided.is_partial);
        assert_eq!(groups, [1, 1], "the pair is known to fail");
    }
}
