//! Decides which policy ConfigMaps to accept when they do not all compile together.
//!
//! An unchanged ConfigMap is never rejected because of another one's change. Changes named by errors revert
//! first. If errors name only unchanged ConfigMaps, the offending change is searched for. Earlier rejections
//! are retried last.
//!
//! If OPA itself fails ([`CHECK_FAILED`]), the offender is rejected until edited. Only this search can reach
//! [`SETTLE_MAX`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::model::ObjectKey;
use crate::policy::candidate::{
    CHECK_FAILED, Candidates, ModuleSet, PARSE_ERROR, Rejection, Resolution, Selected, Selection,
    TESTS_NOT_RUN, is_of_tests,
};
use crate::policy::verdict::Diagnostic;

/// Maximum checks of one search for offenders: 1 s with a hundred modules.
pub const CHECKS_MAX: usize = 32;
/// Minimum checks of one search, which decide at least one ConfigMap.
pub const CHECKS_MIN: usize = 6;
/// Time after which a search starts no check, [`CHECKS_MIN`] aside. A failing check takes `CHECK_MAX`.
pub const SETTLE_MAX: Duration = Duration::from_secs(60);

/// Accepts as many of `candidates` as pass together. `check` returns faults; its error ends the search.
pub async fn settle<E>(
    candidates: &Candidates,
    check: impl AsyncFnMut(&Selection) -> Result<Vec<Diagnostic>, E>,
) -> Result<Resolution, E> {
    let resolver = Resolver {
        candidates,
        evicted: BTreeSet::new(),
        check_cache: BTreeMap::new(),
        outcome: Resolution::default(),
        deadline: Instant::now() + SETTLE_MAX,
        check,
    };
    match resolver.run().await {
        Ok(outcome) => Ok(outcome),
        Err(Stop::Check(error)) => Err(error),
        Err(Stop::Good(failure)) => {
            Ok(Resolution { failure: Some(Box::new(failure)), ..Resolution::unsettled(candidates) })
        }
    }
}

enum Stop<E> {
    Check(E),
    /// The last good modules fail.
    Good(Diagnostic),
}

type Keys<'a> = BTreeSet<&'a ObjectKey>;

struct Resolver<'a, C> {
    candidates: &'a Candidates,
    /// Last good modules that no longer compile.
    evicted: Keys<'a>,
    /// Check results by changed ConfigMaps.
    check_cache: BTreeMap<Keys<'a>, Vec<Diagnostic>>,
    outcome: Resolution,
    deadline: Instant,
    check: C,
}

impl<'a, E, C: AsyncFnMut(&Selection) -> Result<Vec<Diagnostic>, E>> Resolver<'a, C> {
    async fn run(mut self) -> Result<Resolution, Stop<E>> {
        let changed = self.candidates.iter().filter(|(_, candidate)| {
            candidate.wanted != candidate.good && candidate.refused != Some(Rejection::Costly)
        });
        let (old, new): (Vec<_>, Vec<_>) = changed.partition(|(_, candidate)| candidate.refused.is_some());
        let mut old: Vec<_> = old.into_iter().map(|(key, _)| key).collect();
        // Stable sort: ties are in name order.
        old.sort_by_key(|key| self.candidates[*key].refused != Some(Rejection::Unattributed));
        let new: Keys = new.into_iter().map(|(key, _)| key).collect();
        let all: Keys = new.iter().copied().chain(old.iter().copied()).collect();
        let faults = self.faults(&all).await?;
        let mut pending = all.clone();
        if !passes(&faults, &all) {
            pending = new.clone();
            let mut deferred = self.drop_failing(&mut pending).await?;
            deferred.extend(old);
            self.retry_deferred(&mut pending, deferred).await?;
        }
        for fault in self.faults(&pending).await? {
            if let Some(key) = configmap_of(&fault, self.candidates) {
                self.outcome.warnings.entry(key.clone()).or_default().push(fault);
            }
        }
        self.outcome.accepted =
            self.selected(&pending).map(|(key, texts)| (key.clone(), texts.clone())).collect();
        Ok(self.outcome)
    }

    /// Removes changes from `pending` until the rest passes. Returns those that may still be good.
    async fn drop_failing(&mut self, pending: &mut Keys<'a>) -> Result<Vec<&'a ObjectKey>, Stop<E>> {
        let mut removed: Vec<Keys> = Vec::new();
        let mut is_certain = true;
        let mut is_proven = false;
        loop {
            let faults = self.faults(pending).await?;
            let (passes, failure) = (passes(&faults, pending), failure(&faults));
            if std::mem::take(&mut is_proven) && (passes || failure.is_some()) {
                // The offender is confirmed.
                removed.pop();
            }
            if passes {
                break;
            }
            if let Some(failure) = failure {
                let (offenders, is_found) = self.find_failing_change(pending, failure).await?;
                (is_certain, is_proven) = (false, is_found);
                self.reject(&offenders, &faults, |_| true);
                *pending = &*pending - &offenders;
                removed.push(offenders);
                continue;
            }
            let named: Keys =
                faults.iter().filter_map(|fault| configmap_of(fault, self.candidates)).collect();
            let mut offenders: Keys = pending.intersection(&named).copied().collect();
            is_certain = true;
            if offenders.is_empty() && !pending.is_empty() {
                offenders = self.find_offenders(pending).await?;
                is_certain = offenders.len() == 1;
                self.reject(&offenders, &faults, |_| true);
            } else if offenders.is_empty() {
                // Last good modules fail: OPA was replaced.
                let selected = self.selection(pending).into_keys().map(|key| self.key(key));
                offenders = selected.filter(|key| named.contains(key) || named.is_empty()).collect();
                self.reject(&offenders, &faults, |_| named.is_empty());
                self.evicted.extend(offenders);
                self.check_cache.clear();
                removed.push(Keys::new());
                continue;
            } else {
                self.reject(&offenders, &faults, |_| false);
            }
            *pending = &*pending - &offenders;
            removed.push(offenders);
        }
        if is_certain {
            removed.pop();
        }
        Ok(removed.into_iter().flatten().collect())
    }

    /// Adds those of `deferred` that pass now, first as a group.
    async fn retry_deferred(
        &mut self,
        pending: &mut Keys<'a>,
        deferred: Vec<&'a ObjectKey>,
    ) -> Result<(), Stop<E>> {
        let mut group: Keys = deferred.iter().copied().collect();
        let mut unparseable = Keys::new();
        while !group.is_empty() && !self.is_exhausted() {
            let more = &*pending | &group;
            let faults = self.faults(&more).await?;
            if passes(&faults, &more) {
                *pending = more;
                break;
            }
            let named: Keys =
                faults.iter().filter_map(|fault| configmap_of(fault, self.candidates)).collect();
            let offenders: Keys = group.intersection(&named).copied().collect();
            if offenders.is_empty() {
                break;
            }
            self.reject(&offenders, &faults, |_| false);
            // Syntax errors never depend on others.
            let is_unparseable = |key: &&ObjectKey| {
                let is_own = |fault: &&Diagnostic| configmap_of(fault, self.candidates) == Some(key);
                faults.iter().filter(is_own).any(|fault| fault.code == PARSE_ERROR)
            };
            unparseable.extend(offenders.iter().filter(|key| is_unparseable(key)));
            group = &group - &offenders;
        }
        let (mut tried, mut skipped) = (Keys::new(), Keys::new());
        for key in deferred.into_iter().filter(|key| !unparseable.contains(key)) {
            let mut more = pending.clone();
            more.insert(key);
            let is_known = pending.contains(key) || self.check_cache.contains_key(&more);
            if !is_known && self.is_exhausted() {
                skipped.insert(key);
                continue;
            }
            let faults = self.faults(&more).await?;
            if passes(&faults, &more) {
                self.outcome.faults.remove(key);
                if *pending != more {
                    *pending = more;
                    // Earlier ones may depend on it.
                    skipped.append(&mut tried);
                }
            } else if failure(&faults).is_none() {
                self.reject(&Keys::from([key]), &faults, |_| true);
                tried.insert(key);
            } else if self.is_exhausted() || !self.fails_again(&more).await? {
                skipped.insert(key);
            } else {
                self.reject(&Keys::from([key]), &faults, |_| true);
            }
        }
        let is_unchanged = pending.is_empty() && self.evicted.is_empty();
        skipped.retain(|key| !is_unchanged || self.candidates[*key].refused != Some(Rejection::Confirmed));
        self.outcome.untried = skipped.into_iter().cloned().collect();
        Ok(())
    }

    /// Returns the changes that break an unchanged ConfigMap: the only one without which the rest passes,
    /// else all that cannot be added in turn.
    async fn find_offenders(&mut self, pending: &Keys<'a>) -> Result<Keys<'a>, Stop<E>> {
        if pending.len() == 1 {
            return Ok(pending.clone());
        }
        for key in pending {
            let others: Keys = pending.iter().filter(|other| *other != key).copied().collect();
            if self.is_exhausted() {
                break;
            }
            let faults = self.faults(&others).await?;
            if passes(&faults, &others) {
                return Ok(Keys::from([*key]));
            }
        }
        let mut compatible = Keys::new();
        let mut rest = pending.clone();
        loop {
            let before = compatible.len();
            for key in rest.clone() {
                if !self.is_exhausted() && self.passes_with(&compatible, key).await? {
                    compatible.insert(key);
                    rest.remove(key);
                }
            }
            if rest.is_empty() || compatible.len() == before {
                return Ok(rest);
            }
        }
    }

    /// Returns the first change that makes OPA fail, and whether a second failure confirmed that. Empty if
    /// the failure is not reproducible; several if time ran out.
    async fn find_failing_change(
        &mut self,
        pending: &Keys<'a>,
        failure: &Diagnostic,
    ) -> Result<(Keys<'a>, bool), Stop<E>> {
        if self.fails(&Keys::new()).await? {
            return Err(Stop::Good(failure.clone()));
        }
        let order: Vec<_> = pending.iter().copied().collect();
        let first = |count: usize| -> Keys<'a> { order[..count].iter().copied().collect() };
        let (mut passing, mut failing) = (0, order.len());
        while failing - passing > 1 && !self.is_exhausted() {
            // Failures can take a hundred times as long.
            let next = passing + (failing - passing).div_ceil(4);
            if self.fails(&first(next)).await? {
                failing = next;
            } else {
                passing = next;
            }
        }
        let suspects: Keys = order[passing..failing].iter().copied().collect();
        if suspects.len() > 1 || self.is_exhausted() {
            return Ok((suspects, false));
        }
        let fails = self.fails_again(&first(failing)).await?;
        Ok(if fails { (suspects, true) } else { (Keys::new(), false) })
    }

    async fn fails(&mut self, pending: &Keys<'a>) -> Result<bool, Stop<E>> {
        Ok(failure(&self.faults(pending).await?).is_some())
    }

    async fn fails_again(&mut self, pending: &Keys<'a>) -> Result<bool, Stop<E>> {
        self.check_cache.remove(pending);
        let fails = self.fails(pending).await?;
        if !fails {
            // Earlier failures may be irreproducible too.
            self.check_cache.retain(|_, faults| failure(faults).is_none());
        }
        Ok(fails)
    }

    fn is_exhausted(&self) -> bool {
        let checks = self.outcome.checks;
        checks >= CHECKS_MAX || (checks >= CHECKS_MIN && Instant::now() >= self.deadline)
    }

    async fn passes_with(&mut self, pending: &Keys<'a>, key: &'a ObjectKey) -> Result<bool, Stop<E>> {
        let mut more = pending.clone();
        more.insert(key);
        let faults = self.faults(&more).await?;
        Ok(passes(&faults, &more))
    }

    async fn faults(&mut self, pending: &Keys<'a>) -> Result<Vec<Diagnostic>, Stop<E>> {
        if let Some(faults) = self.check_cache.get(pending) {
            return Ok(faults.clone());
        }
        self.outcome.checks += 1;
        let selection = self.selection(pending);
        let faults = (self.check)(&selection).await.map_err(Stop::Check)?;
        self.check_cache.insert(pending.clone(), faults.clone());
        Ok(faults)
    }

    fn selected(&self, pending: &Keys<'a>) -> impl Iterator<Item = (&'a ObjectKey, &'a Arc<ModuleSet>)> {
        let candidates = self.candidates.iter().filter(|(key, _)| !self.evicted.contains(key));
        candidates.filter_map(|(key, candidate)| {
            let texts = if pending.contains(key) { &candidate.wanted } else { &candidate.good };
            Some((key, texts.as_ref()?))
        })
    }

    fn selection(&self, pending: &Keys<'a>) -> Selection<'a> {
        let selected = self.selected(pending);
        selected.map(|(key, texts)| (key, Selected { texts, is_changed: pending.contains(key) })).collect()
    }

    fn key(&self, key: &ObjectKey) -> &'a ObjectKey {
        self.candidates.get_key_value(key).expect("keys come from the candidates").0
    }

    /// Rejects `offenders` for their own faults and `is_related` ones.
    fn reject(
        &mut self,
        offenders: &Keys<'a>,
        faults: &[Diagnostic],
        is_related: impl Fn(&Diagnostic) -> bool,
    ) {
        for key in offenders {
            let reported = faults
                .iter()
                .filter(|fault| configmap_of(fault, self.candidates) == Some(key) || is_related(fault));
            let mut reported: Vec<_> = reported.cloned().collect();
            if self.candidates[*key].wanted.is_none() {
                reported.insert(
                    0,
                    Diagnostic::new(
                        "still_needed",
                        "ConfigMap deleted, but other policies need its modules; change those first",
                    ),
                );
            }
            self.outcome.faults.insert((*key).clone(), reported);
        }
    }
}

/// Whether only tests of unchanged ConfigMaps fail.
fn passes(faults: &[Diagnostic], pending: &Keys) -> bool {
    let is_in_pending = |fault: &Diagnostic| {
        fault.location.as_ref().is_some_and(|location| pending.iter().any(|key| is_from(&location.file, key)))
    };
    faults.iter().all(|fault| fault.code == TESTS_NOT_RUN || (is_of_tests(fault) && !is_in_pending(fault)))
}

fn failure(faults: &[Diagnostic]) -> Option<&Diagnostic> {
    faults.iter().find(|fault| fault.code == CHECK_FAILED)
}

fn configmap_of<'a>(fault: &Diagnostic, candidates: &'a Candidates) -> Option<&'a ObjectKey> {
    let (namespace, rest) = fault.location.as_ref()?.file.split_once('/')?;
    let (name, _) = rest.split_once('/')?;
    let key = ObjectKey { namespace: namespace.into(), name: name.into() };
    candidates.get_key_value(&key).map(|(key, _)| key)
}

pub(super) fn is_from(id: &str, key: &ObjectKey) -> bool {
    let rest = id.strip_prefix(&*key.namespace).and_then(|rest| rest.strip_prefix('/'));
    rest.and_then(|rest| rest.strip_prefix(&*key.name)).is_some_and(|rest| rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use crate::policy::candidate::CHECK_FAILED;
    use crate::policy::candidate::Candidate;
    use crate::policy::candidate::Candidates;
    use crate::policy::candidate::ModuleSet;
    use crate::policy::candidate::Rejection;
    use crate::policy::candidate::Resolution;
    use crate::policy::candidate::Selected;
    use crate::policy::candidate::Selection;
    use crate::policy::candidate::TEST_FAILED;
    use crate::policy::candidate::TESTS_TOO_LONG;
    use std::convert::Infallible;
    use std::time::Duration;

    use super::*;
    use crate::policy::check::CHECK_MAX;
    use crate::policy::modules::Module;
    use crate::policy::verdict::Location;

    /// Fake compiler: `name` defines once, `?name` requires, `!` is a syntax error, `T` a failing test,
    /// `LONG` a slow one. `KILL` fails the check, `SLOW` slowly.
    fn compile(selection: &Selection) -> Vec<Diagnostic> {
        let words = |tests: bool| {
            selection.iter().flat_map(move |(key, Selected { texts, .. })| {
                let modules = if tests { &texts.tests } else { &texts.modules };
                modules.values().flat_map(move |module| {
                    module.text.lines().skip(1).flat_map(str::split_whitespace).map(move |word| (*key, word))
                })
            })
        };
        let fault = |key: &ObjectKey, code: &str, word: &str| Diagnostic {
            location: Some(Location { file: format!("{key}/m"), row: 1, col: 1 }),
            ..Diagnostic::new(code, word)
        };
        let broken: Vec<_> = words(false)
            .filter(|(_, word)| *word == "!")
            .map(|(key, word)| fault(key, PARSE_ERROR, word))
            .collect();
        if !broken.is_empty() {
            return broken;
        }
        if let Some((_, word)) = words(false).find(|(_, word)| ["KILL", "SLOW"].contains(word)) {
            return vec![Diagnostic::new(CHECK_FAILED, word)];
        }
        let defined: Vec<_> = words(false).filter(|(_, word)| !word.starts_with('?')).collect();
        let mut faults = Vec::new();
        for (key, word) in words(false) {
            let count = |name: &str| defined.iter().filter(|(_, other)| *other == name).count();
            match word.strip_prefix('?') {
                Some(name) if count(name) == 0 => faults.push(fault(key, "undefined", word)),
                // OPA also reports only the first.
                None if count(word) > 1
                    && defined.iter().find(|(_, other)| *other == word) == Some(&(key, word)) =>
                {
                    faults.push(fault(key, "twice", word));
                }
                _ => {}
            }
        }
        if faults.is_empty() {
            faults.extend(words(true).filter_map(|(key, word)| match (word, word.strip_prefix('?')) {
                ("T", _) => Some(fault(key, TEST_FAILED, word)),
                ("LONG", _) => Some(fault(key, TESTS_TOO_LONG, word)),
                (_, Some(name)) if defined.iter().all(|(_, other)| *other != name) => {
                    Some(fault(key, TEST_FAILED, word))
                }
                _ => None,
            }));
        }
        faults
    }

    /// Runs in paused time; `SLOW` checks take the maximum.
    fn settle_once(
        candidates: &Candidates,
        mut compile: impl FnMut(&Selection) -> Vec<Diagnostic>,
    ) -> (Resolution, Duration) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        runtime.unwrap().block_on(async {
            let started = Instant::now();
            let Ok(outcome) = settle(candidates, async |selection: &Selection| {
                let faults = compile(selection);
                if faults.iter().any(|fault| fault.message == "SLOW") {
                    tokio::time::sleep(CHECK_MAX).await;
                }
                Ok::<_, Infallible>(faults)
            })
            .await;
            (outcome, started.elapsed())
        })
    }

    fn key(name: &str) -> ObjectKey {
        ObjectKey { namespace: "ns".into(), name: name.into() }
    }

    fn texts(words: &str) -> Option<Arc<ModuleSet>> {
        let (modules, tests) = words.split_once('/').unwrap_or((words, ""));
        let module = |words: &str| Arc::new(Module::read(&format!("package a\n{words}")).unwrap());
        let module_map = |words: &str, key: &str| BTreeMap::from([(key.to_owned(), module(words))]);
        (words != "-")
            .then(|| Arc::new(ModuleSet { modules: module_map(modules, "m"), tests: module_map(tests, "t") }))
    }

    /// Parses `name: good > wanted`: `-` is none, `~` rejected, `^` costly.
    fn candidates(script: &[&str]) -> Candidates {
        let candidate = |line: &&str| {
            let (name, states) = line.split_once(": ").unwrap();
            let (good, wanted) = states.split_once(" > ").unwrap_or((states, states));
            let refused = match wanted.as_bytes()[0] {
                b'~' => Some(Rejection::Confirmed),
                b'^' => Some(Rejection::Costly),
                _ => None,
            };
            let wanted = wanted.trim_start_matches(['~', '^']);
            (key(name), Candidate { good: texts(good), wanted: texts(wanted), refused })
        };
        script.iter().map(candidate).collect()
    }

    /// Checks `name=accepted` and the rejected names.
    fn check(script: &[&str], accepted: &[&str], refused: &[&str]) {
        let candidates = candidates(script);
        let wanted: Vec<_> = candidates.iter().map(|(key, c)| (key.clone(), c.wanted.clone())).collect();
        let found = settle_all(candidates);
        let expected: BTreeMap<_, _> = accepted
            .iter()
            .map(|line| line.split_once('=').unwrap())
            .map(|(name, words)| (key(name), texts(words).unwrap()))
            .collect();
        assert_eq!(found, expected, "{script:?}");
        let refusals = wanted.into_iter().filter(|(key, wanted)| found.get(key) != wanted.as_ref());
        let names: Vec<_> = refusals.map(|(key, _)| key.name.to_string()).collect();
        assert_eq!(names, refused, "{script:?}");
    }

    fn settle_all(mut candidates: Candidates) -> BTreeMap<ObjectKey, Arc<ModuleSet>> {
        let mut faults = BTreeSet::new();
        for _ in 0..candidates.len() + 2 {
            let (outcome, elapsed) = settle_once(&candidates, compile);
            assert!(outcome.checks <= CHECKS_MAX + candidates.len(), "{}", outcome.checks);
            assert!(elapsed <= SETTLE_MAX + 2 * CHECK_MAX, "{elapsed:?}");
            assert_eq!(outcome.failure, None);
            if outcome.untried.is_empty() {
                return outcome.accepted;
            }
            for (key, candidate) in &mut candidates {
                candidate.good = outcome.accepted.get(key).cloned();
                let is_costly = candidate.refused == Some(Rejection::Costly)
                    || outcome.costly().any(|costly| costly == key);
                let refused = if is_costly { Rejection::Costly } else { Rejection::Confirmed };
                let refused = if outcome.untried.contains(key) { Rejection::Unattributed } else { refused };
                candidate.refused = (candidate.good != candidate.wanted).then_some(refused);
                let is_named = outcome.faults.contains_key(key) || faults.contains(key);
                let is_explained = is_named || is_costly || candidate.refused.is_none();
                assert!(is_explained, "{key} was rejected without a fault");
                faults.extend(outcome.faults.get_key_value(key).map(|(key, _)| key.clone()));
            }
        }
        panic!("the search did not end");
    }

    #[test]
    fn compatible_changes_are_accepted() {
        check(&[], &[], &[]);
        check(&["a: - > x", "b: - > ?x"], &["a=x", "b=?x"], &[]);
        check(&["a: x > y", "b: ?x > ?y"], &["a=y", "b=?y"], &[]);
        check(&["a: x > -", "b: ?x > -"], &[], &[]);
    }

    #[test]
    fn errors_reject_the_named_changes() {
        check(&["a: x > !"], &["a=x"], &["a"]);
        check(&["a: - > !", "b: - > y"], &["b=y"], &["a"]);
        check(&["a: x > ! ?q", "b: y > ?q", "c: z > w"], &["a=x", "b=y", "c=w"], &["a", "b"]);
        check(&["a: - > ?x"], &[], &["a"]);
        check(&["a: - > ?x", "b: - > x"], &["a=?x", "b=x"], &[]);
        check(&["a: - > x", "b: - > x"], &["b=x"], &["a"]);
    }

    #[test]
    fn unchanged_configmaps_are_not_rejected() {
        check(&["a: x > y", "b: ?x"], &["a=x", "b=?x"], &["a"]);
        check(&["a: x > -", "b: ?x"], &["a=x", "b=?x"], &["a"]);
        check(&["a: x", "b: - > x"], &["a=x"], &["b"]);
        check(&["a: x > y", "b: ?x", "c: - > z", "d: - > ?z"], &["a=x", "b=?x", "c=z", "d=?z"], &["a"]);
        check(
            &["a: x > y", "b: ?x", "c: z > w", "d: ?z", "e: - > v"],
            &["a=x", "b=?x", "c=z", "d=?z", "e=v"],
            &["a", "c"],
        );
        check(&["a: x > -", "b: ?x > ?x k", "c: ?x"], &["a=x", "b=?x k", "c=?x"], &["a"]);
    }

    #[test]
    fn earlier_rejections_do_not_block_new_changes() {
        // An offender that blames others is rejected alone.
        check(&["a: x", "b: - > ~x", "c: - > y"], &["a=x", "c=y"], &["b"]);
        check(&["a: x", "b: - > ~x", "c: y > !"], &["a=x", "c=y"], &["b", "c"]);
        check(
            &["a: x", "b: - > ~x", "c: - > ~!", "d: - > ~?q", "e: - > q"],
            &["a=x", "d=?q", "e=q"],
            &["b", "c"],
        );
        // Interdependent changes next to a broken one.
        check(&["a: - > ~b0 ?a0", "b: - > ~a0 ?b0", "c: - > ~!"], &["a=b0 ?a0", "b=a0 ?b0"], &["c"]);
        check(&["a: x > ~y", "b: ?x", "c: - > y"], &["a=x", "b=?x", "c=y"], &["a"]);
    }

    #[test]
    fn tests_gate_their_own_configmap() {
        check(&["a: x/ > y/T"], &["a=x/"], &["a"]);
        check(&["a: x/T", "b: - > y"], &["a=x/T", "b=y"], &[]);
        // Tests that do not compile, or are slow.
        check(&["a: x > y", "b: z/?x"], &["a=y", "b=z/?x"], &[]);
        check(&["a: x/ > y/?q", "b: - > z"], &["a=x/", "b=z"], &["a"]);
        check(&["a: x/LONG", "b: y > z"], &["a=x/LONG", "b=z"], &[]);
        check(&["a: x/ > y/LONG", "b: - > z"], &["a=x/", "b=z"], &["a"]);
    }

    #[test]
    fn failing_checks_reject_only_the_offender() {
        for kill in ["KILL", "SLOW"] {
            let bad = |name: &str| format!("{name}: x{name} > {kill}");
            let [a, b] = [&bad("a"), &bad("b")];
            check(&[a, "b: - > y", "c: ?xa > ?xa z"], &["a=xa", "b=y", "c=?xa z"], &["a"]);
            check(&[a, b, "c: - > y"], &["a=xa", "b=xb", "c=y"], &["a", "b"]);
            check(&[a, "b: - > ~y", "c: - > ~!", "d: - > w"], &["a=xa", "b=y", "d=w"], &["a", "c"]);
            check(&[a, "b: y > !", "c: z > w"], &["a=xa", "b=y", "c=w"], &["a", "b"]);
            check(&["a: - > y", &format!("b: - > ~{kill}")], &["a=y"], &["b"]);
            // A deletion can fail too.
            check(&[a, "b: y > -", "c: ?y"], &["a=xa", "b=y", "c=?y"], &["a", "b"]);
            for count in [2, 7, 50] {
                for index in [0, count / 2, count - 1] {
                    let line = |n| {
                        if n == index { format!("c{n:02}: - > {kill}") } else { format!("c{n:02}: - > x{n}") }
                    };
                    let script: Vec<_> = (0..count).map(line).collect();
                    let expected: Vec<_> =
                        (0..count).filter(|n| *n != index).map(|n| format!("c{n:02}=x{n}")).collect();
                    let [script, expected] = [&script, &expected]
                        .map(|lines| lines.iter().map(String::as_str).collect::<Vec<_>>());
                    check(&script, &expected, &[&format!("c{index:02}")]);
                }
            }
        }
    }

    #[test]
    fn costly_rejections_do_not_slow_later_edits() {
        for script in [&["a: x > ^SLOW", "b: y > z"], &["a: x/ > ^y/LONG", "b: y > z"]] {
            let (outcome, elapsed) = settle_once(&candidates(script), compile);
            assert_eq!((outcome.checks, elapsed), (1, Duration::ZERO));
            assert_eq!(outcome.accepted[&key("b")], texts("z").unwrap());
            assert!(outcome.faults.is_empty() && outcome.untried.is_empty(), "{outcome:?}");
        }
        for (script, costly) in [("a: x > KILL", true), ("a: x/ > y/LONG", true), ("a: x/ > y/T", false)] {
            let (outcome, _) = settle_once(&candidates(&[script]), compile);
            assert_eq!(outcome.costly().eq([&key("a")]), costly, "{script}");
        }
    }

    #[test]
    fn irreproducible_failures_reject_nothing() {
        for failing in [&[1][..], &[1, 2], &[2], &[1, 3], &[1, 4]] {
            let mut checks = 0;
            let mut candidates = candidates(&["a: x > y", "b: - > z", "c: - > w"]);
            for _ in 0..3 {
                let (outcome, _) = settle_once(&candidates, |selection: &Selection| {
                    checks += 1;
                    let is_change = selection.values().any(|selected| selected.is_changed);
                    if failing.contains(&checks) && is_change {
                        return vec![Diagnostic::new(CHECK_FAILED, "chance")];
                    }
                    compile(selection)
                });
                assert_eq!(outcome.costly().count(), 0, "{failing:?}");
                for (key, candidate) in &mut candidates {
                    candidate.good = outcome.accepted.get(key).cloned();
                    candidate.refused = outcome.untried.contains(key).then_some(Rejection::Unattributed);
                }
            }
            assert!(candidates.values().all(|candidate| candidate.good == candidate.wanted), "{failing:?}");
        }
    }

    #[test]
    fn failing_last_good_modules_reject_nothing() {
        for (script, untried) in
            [(&["a: KILL", "b: x > y", "c: - > ~z"][..], "b"), (&["a: KILL", "b: x"], "a")]
        {
            let (outcome, _) = settle_once(&candidates(script), compile);
            assert!(outcome.failure.is_some() && outcome.faults.is_empty(), "{outcome:?}");
            let good = [("a", "KILL"), ("b", "x")].map(|(name, words)| (key(name), texts(words).unwrap()));
            assert_eq!(outcome.accepted, BTreeMap::from(good));
            assert_eq!(outcome.untried, BTreeSet::from([key(untried)]));
        }
        check(&["a: KILL > x", "b: - > y"], &["a=x", "b=y"], &[]);
    }

    #[test]
    fn another_opa_may_reject_last_good_modules() {
        check(&["a: x !", "b: y > z", "c: ?x"], &["b=z"], &["a", "c"]);
    }

    #[test]
    fn many_changes_are_bounded() {
        let lines = |line: fn(u32) -> String| (10..60).map(line).collect::<Vec<_>>();
        let script = [lines(|n| format!("c{n}: x{n} > y{n}")), lines(|n| format!("d{n}: ?x{n}"))].concat();
        let expected = [lines(|n| format!("c{n}=x{n}")), lines(|n| format!("d{n}=?x{n}"))].concat();
        let refused = lines(|n| format!("c{n}"));
        let [script, expected, refused] =
            [&script, &expected, &refused].map(|lines| lines.iter().map(String::as_str).collect::<Vec<_>>());
        check(&script, &expected, &refused);
    }
}
