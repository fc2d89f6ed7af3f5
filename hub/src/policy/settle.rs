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

use tokio::time::Instant;

use super::modules::Module;
use super::verdict::Fault;
use crate::config::{CHECKS_MAX, CHECKS_MIN, SETTLE_MAX};
use crate::model::ObjectKey;

/// OPA's code for a syntax error.
const PARSE_ERROR: &str = "rego_parse_error";
/// Code of a failed test.
pub const TEST_FAILED: &str = "test_failed";
/// Code of tests that exceed their time limit.
pub const TESTS_TOO_LONG: &str = "tests_too_long";
/// Code of tests skipped for lack of time.
pub const TESTS_NOT_RUN: &str = "tests_not_run";
/// Code of a failed check. No location.
pub const CHECK_FAILED: &str = "check_failed";

/// Modules of one ConfigMap, by id.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Texts {
    /// Modules that are served.
    pub modules: BTreeMap<String, Arc<Module>>,
    /// Modules that are only tested.
    pub tests: BTreeMap<String, Arc<Module>>,
}

/// Last good and desired modules of one ConfigMap.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Candidate {
    /// Last good modules. `None` if there are none.
    pub good: Option<Arc<Texts>>,
    /// Desired modules. `None` if the ConfigMap was deleted.
    pub wanted: Option<Arc<Texts>>,
    /// Earlier rejection of `wanted`.
    pub refused: Option<Refused>,
}

/// Kind of rejection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refused {
    /// Inconclusive: first in the next check.
    Untried,
    /// Conclusive.
    Tried,
    /// OPA fails or tests time out: no retry until edited.
    Costly,
}

/// All policy ConfigMaps.
pub type Candidates = BTreeMap<ObjectKey, Candidate>;

/// Modules that are checked together.
pub type Selection<'a> = BTreeMap<&'a ObjectKey, Selected<'a>>;

/// Modules of one ConfigMap in a [`Selection`].
#[derive(Clone, Copy, Debug)]
pub struct Selected<'a> {
    /// Modules.
    pub texts: &'a Texts,
    /// Whether they are desired but not accepted.
    pub is_changed: bool,
}

/// Scope of an [`Outcome`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Progress {
    /// All candidates.
    #[default]
    All,
    /// Last good modules, which passed. Changes are deferred.
    Good,
    /// Nothing.
    Nothing,
}

/// Result of a search.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Accepted modules.
    pub accepted: BTreeMap<ObjectKey, Arc<Texts>>,
    /// Reasons of new rejections.
    pub faults: BTreeMap<ObjectKey, Vec<Fault>>,
    /// Inconclusive rejections.
    pub untried: BTreeSet<ObjectKey>,
    /// Failed tests of unchanged ConfigMaps.
    pub warnings: BTreeMap<ObjectKey, Vec<Fault>>,
    /// Number of checks.
    pub checks: usize,
    /// Failure of the last good modules.
    pub failure: Option<Box<Fault>>,
    /// Scope of the result.
    pub progress: Progress,
}

impl Outcome {
    /// Changes nothing and requests another check.
    pub fn unsettled(candidates: &Candidates) -> Self {
        let good =
            candidates.iter().filter_map(|(key, candidate)| Some((key.clone(), candidate.good.clone()?)));
        let is_open = |candidate: &Candidate| {
            candidate.wanted != candidate.good
                && !matches!(candidate.refused, Some(Refused::Tried | Refused::Costly))
        };
        let open = candidates.iter().filter(|(_, candidate)| is_open(candidate));
        let mut untried: BTreeSet<_> = open.map(|(key, _)| key.clone()).collect();
        if untried.is_empty() {
            // One key requests a check.
            untried.extend(candidates.keys().next().cloned());
        }
        Self { accepted: good.collect(), untried, progress: Progress::Nothing, ..Self::default() }
    }

    /// Returns those rejected as [`Refused::Costly`].
    pub fn costly(&self) -> impl Iterator<Item = &ObjectKey> {
        let refused = self.faults.iter().filter(|(key, _)| !self.untried.contains(*key));
        let costly = refused.filter(|(key, faults)| {
            let is_own = |fault: &Fault| fault.location.as_ref().is_some_and(|at| is_in(&at.file, key));
            faults.iter().any(|fault| match fault.code.as_str() {
                CHECK_FAILED => true,
                TESTS_TOO_LONG => is_own(fault),
                _ => false,
            })
        });
        costly.map(|(key, _)| key)
    }
}

/// Accepts as many of `candidates` as pass together. `check` returns faults; its error ends the search.
pub async fn settle<E>(
    candidates: &Candidates,
    check: impl AsyncFnMut(&Selection) -> Result<Vec<Fault>, E>,
) -> Result<Outcome, E> {
    let settling = Settling {
        candidates,
        dropped: BTreeSet::new(),
        said: BTreeMap::new(),
        outcome: Outcome::default(),
        until: Instant::now() + SETTLE_MAX,
        check,
    };
    match settling.run().await {
        Ok(outcome) => Ok(outcome),
        Err(Stop::Check(error)) => Err(error),
        Err(Stop::Good(failure)) => {
            Ok(Outcome { failure: Some(Box::new(failure)), ..Outcome::unsettled(candidates) })
        }
    }
}

enum Stop<E> {
    Check(E),
    /// The last good modules fail.
    Good(Fault),
}

type Keys<'a> = BTreeSet<&'a ObjectKey>;

struct Settling<'a, C> {
    candidates: &'a Candidates,
    /// Last good modules that no longer compile.
    dropped: Keys<'a>,
    /// Check results by changed ConfigMaps.
    said: BTreeMap<Keys<'a>, Vec<Fault>>,
    outcome: Outcome,
    /// Deadline.
    until: Instant,
    check: C,
}

impl<'a, E, C: AsyncFnMut(&Selection) -> Result<Vec<Fault>, E>> Settling<'a, C> {
    async fn run(mut self) -> Result<Outcome, Stop<E>> {
        let changed = self.candidates.iter().filter(|(_, candidate)| {
            candidate.wanted != candidate.good && candidate.refused != Some(Refused::Costly)
        });
        let (old, new): (Vec<_>, Vec<_>) = changed.partition(|(_, candidate)| candidate.refused.is_some());
        let mut old: Vec<_> = old.into_iter().map(|(key, _)| key).collect();
        // Stable: else in name order.
        old.sort_by_key(|key| self.candidates[*key].refused != Some(Refused::Untried));
        let new: Keys = new.into_iter().map(|(key, _)| key).collect();
        let all: Keys = new.iter().copied().chain(old.iter().copied()).collect();
        let faults = self.faults(&all).await?;
        let mut open = all.clone();
        if !passes(&faults, &all) {
            open = new.clone();
            let mut again = self.narrow(&mut open).await?;
            again.extend(old);
            self.second_chance(&mut open, again).await?;
        }
        for fault in self.faults(&open).await? {
            if let Some(key) = owner(&fault, self.candidates) {
                self.outcome.warnings.entry(key.clone()).or_default().push(fault);
            }
        }
        self.outcome.accepted = self.chosen(&open).map(|(key, texts)| (key.clone(), texts.clone())).collect();
        Ok(self.outcome)
    }

    /// Removes changes from `open` until the rest passes. Returns those that may still be good.
    async fn narrow(&mut self, open: &mut Keys<'a>) -> Result<Vec<&'a ObjectKey>, Stop<E>> {
        let mut gave_way: Vec<Keys> = Vec::new();
        let mut is_certain = true;
        let mut is_proven = false;
        loop {
            let faults = self.faults(open).await?;
            let (passes, failure) = (passes(&faults, open), failure(&faults));
            if std::mem::take(&mut is_proven) && (passes || failure.is_some()) {
                // The offender is confirmed.
                gave_way.pop();
            }
            if passes {
                break;
            }
            if let Some(failure) = failure {
                let (guilty, is_found) = self.killers(open, failure).await?;
                (is_certain, is_proven) = (false, is_found);
                self.refuse(&guilty, &faults, |_| true);
                *open = &*open - &guilty;
                gave_way.push(guilty);
                continue;
            }
            let named: Keys = faults.iter().filter_map(|fault| owner(fault, self.candidates)).collect();
            let mut guilty: Keys = open.intersection(&named).copied().collect();
            is_certain = true;
            if guilty.is_empty() && !open.is_empty() {
                guilty = self.culprits(open).await?;
                is_certain = guilty.len() == 1;
                self.refuse(&guilty, &faults, |_| true);
            } else if guilty.is_empty() {
                // Last good modules fail: OPA was replaced.
                let selected = self.selection(open).into_keys().map(|key| self.key(key));
                guilty = selected.filter(|key| named.contains(key) || named.is_empty()).collect();
                self.refuse(&guilty, &faults, |_| named.is_empty());
                self.dropped.extend(guilty);
                self.said.clear();
                gave_way.push(Keys::new());
                continue;
            } else {
                self.refuse(&guilty, &faults, |_| false);
            }
            *open = &*open - &guilty;
            gave_way.push(guilty);
        }
        if is_certain {
            gave_way.pop();
        }
        Ok(gave_way.into_iter().flatten().collect())
    }

    /// Adds those of `again` that pass now, first as a group.
    async fn second_chance(&mut self, open: &mut Keys<'a>, again: Vec<&'a ObjectKey>) -> Result<(), Stop<E>> {
        let mut group: Keys = again.iter().copied().collect();
        let mut hopeless = Keys::new();
        while !group.is_empty() && !self.is_spent() {
            let more = &*open | &group;
            let faults = self.faults(&more).await?;
            if passes(&faults, &more) {
                *open = more;
                break;
            }
            let named: Keys = faults.iter().filter_map(|fault| owner(fault, self.candidates)).collect();
            let guilty: Keys = group.intersection(&named).copied().collect();
            if guilty.is_empty() {
                break;
            }
            self.refuse(&guilty, &faults, |_| false);
            // Syntax errors never depend on others.
            let unparsed = |key: &&ObjectKey| {
                let own = faults.iter().filter(|fault| owner(fault, self.candidates) == Some(key));
                own.into_iter().any(|fault| fault.code == PARSE_ERROR)
            };
            hopeless.extend(guilty.iter().filter(|key| unparsed(key)));
            group = &group - &guilty;
        }
        let (mut tried, mut unreached) = (Keys::new(), Keys::new());
        for key in again.into_iter().filter(|key| !hopeless.contains(key)) {
            let mut more = open.clone();
            more.insert(key);
            let is_known = open.contains(key) || self.said.contains_key(&more);
            if !is_known && self.is_spent() {
                unreached.insert(key);
                continue;
            }
            let faults = self.faults(&more).await?;
            if passes(&faults, &more) {
                self.outcome.faults.remove(key);
                if *open != more {
                    *open = more;
                    // Earlier ones may depend on it.
                    unreached.append(&mut tried);
                }
            } else if failure(&faults).is_none() {
                self.refuse(&Keys::from([key]), &faults, |_| true);
                tried.insert(key);
            } else if self.is_spent() || !self.fails_again(&more).await? {
                unreached.insert(key);
            } else {
                self.refuse(&Keys::from([key]), &faults, |_| true);
            }
        }
        let is_same = open.is_empty() && self.dropped.is_empty();
        unreached.retain(|key| !is_same || self.candidates[*key].refused != Some(Refused::Tried));
        self.outcome.untried = unreached.into_iter().cloned().collect();
        Ok(())
    }

    /// Returns the changes that break an unchanged ConfigMap: the only one without which the rest passes,
    /// else all that cannot be added in turn.
    async fn culprits(&mut self, open: &Keys<'a>) -> Result<Keys<'a>, Stop<E>> {
        if open.len() == 1 {
            return Ok(open.clone());
        }
        for key in open {
            let others: Keys = open.iter().filter(|other| *other != key).copied().collect();
            if self.is_spent() {
                break;
            }
            let faults = self.faults(&others).await?;
            if passes(&faults, &others) {
                return Ok(Keys::from([*key]));
            }
        }
        let mut kept = Keys::new();
        let mut left = open.clone();
        loop {
            let before = kept.len();
            for key in left.clone() {
                if !self.is_spent() && self.passes_with(&kept, key).await? {
                    kept.insert(key);
                    left.remove(key);
                }
            }
            if left.is_empty() || kept.len() == before {
                return Ok(left);
            }
        }
    }

    /// Returns the first change that makes OPA fail, and whether a second failure confirmed that. Empty if
    /// the failure is not reproducible; several if time ran out.
    async fn killers(&mut self, open: &Keys<'a>, failure: &Fault) -> Result<(Keys<'a>, bool), Stop<E>> {
        if self.fails(&Keys::new()).await? {
            return Err(Stop::Good(failure.clone()));
        }
        let order: Vec<_> = open.iter().copied().collect();
        let first = |count: usize| -> Keys<'a> { order[..count].iter().copied().collect() };
        let (mut passing, mut failing) = (0, order.len());
        while failing - passing > 1 && !self.is_spent() {
            // Failures can take a hundred times as long.
            let next = passing + (failing - passing).div_ceil(4);
            if self.fails(&first(next)).await? {
                failing = next;
            } else {
                passing = next;
            }
        }
        let suspects: Keys = order[passing..failing].iter().copied().collect();
        if suspects.len() > 1 || self.is_spent() {
            return Ok((suspects, false));
        }
        let fails = self.fails_again(&first(failing)).await?;
        Ok(if fails { (suspects, true) } else { (Keys::new(), false) })
    }

    async fn fails(&mut self, open: &Keys<'a>) -> Result<bool, Stop<E>> {
        Ok(failure(&self.faults(open).await?).is_some())
    }

    /// Repeats a failed check.
    async fn fails_again(&mut self, open: &Keys<'a>) -> Result<bool, Stop<E>> {
        self.said.remove(open);
        let fails = self.fails(open).await?;
        if !fails {
            // Earlier failures may be irreproducible too.
            self.said.retain(|_, faults| failure(faults).is_none());
        }
        Ok(fails)
    }

    /// Whether the search must end.
    fn is_spent(&self) -> bool {
        let checks = self.outcome.checks;
        checks >= CHECKS_MAX || (checks >= CHECKS_MIN && Instant::now() >= self.until)
    }

    async fn passes_with(&mut self, open: &Keys<'a>, key: &'a ObjectKey) -> Result<bool, Stop<E>> {
        let mut more = open.clone();
        more.insert(key);
        let faults = self.faults(&more).await?;
        Ok(passes(&faults, &more))
    }

    async fn faults(&mut self, open: &Keys<'a>) -> Result<Vec<Fault>, Stop<E>> {
        if let Some(said) = self.said.get(open) {
            return Ok(said.clone());
        }
        self.outcome.checks += 1;
        let selection = self.selection(open);
        let faults = (self.check)(&selection).await.map_err(Stop::Check)?;
        self.said.insert(open.clone(), faults.clone());
        Ok(faults)
    }

    fn chosen(&self, open: &Keys<'a>) -> impl Iterator<Item = (&'a ObjectKey, &'a Arc<Texts>)> {
        let candidates = self.candidates.iter().filter(|(key, _)| !self.dropped.contains(key));
        candidates.filter_map(|(key, candidate)| {
            let texts = if open.contains(key) { &candidate.wanted } else { &candidate.good };
            Some((key, texts.as_ref()?))
        })
    }

    fn selection(&self, open: &Keys<'a>) -> Selection<'a> {
        let chosen = self.chosen(open);
        chosen.map(|(key, texts)| (key, Selected { texts, is_changed: open.contains(key) })).collect()
    }

    fn key(&self, key: &ObjectKey) -> &'a ObjectKey {
        self.candidates.get_key_value(key).expect("keys come from the candidates").0
    }

    /// Rejects `guilty` for their own faults and those matching `also`.
    fn refuse(&mut self, guilty: &Keys<'a>, faults: &[Fault], also: impl Fn(&Fault) -> bool) {
        for key in guilty {
            let told =
                faults.iter().filter(|fault| owner(fault, self.candidates) == Some(key) || also(fault));
            let mut told: Vec<_> = told.cloned().collect();
            if self.candidates[*key].wanted.is_none() {
                told.insert(
                    0,
                    Fault::new(
                        "still_needed",
                        "ConfigMap deleted, but other policies need its modules; change those first",
                    ),
                );
            }
            self.outcome.faults.insert((*key).clone(), told);
        }
    }
}

/// Whether only tests of unchanged ConfigMaps fail.
fn passes(faults: &[Fault], open: &Keys) -> bool {
    let is_in_open = |fault: &Fault| {
        fault.location.as_ref().is_some_and(|location| open.iter().any(|key| is_in(&location.file, key)))
    };
    faults.iter().all(|fault| fault.code == TESTS_NOT_RUN || (is_of_tests(fault) && !is_in_open(fault)))
}

/// Whether a test, not a module, is at fault.
pub fn is_of_tests(fault: &Fault) -> bool {
    [TEST_FAILED, TESTS_TOO_LONG, TESTS_NOT_RUN].contains(&fault.code.as_str())
}

fn failure(faults: &[Fault]) -> Option<&Fault> {
    faults.iter().find(|fault| fault.code == CHECK_FAILED)
}

fn owner<'a>(fault: &Fault, candidates: &'a Candidates) -> Option<&'a ObjectKey> {
    let (namespace, rest) = fault.location.as_ref()?.file.split_once('/')?;
    let (name, _) = rest.split_once('/')?;
    let key = ObjectKey { namespace: namespace.into(), name: name.into() };
    candidates.get_key_value(&key).map(|(key, _)| key)
}

fn is_in(id: &str, key: &ObjectKey) -> bool {
    let rest = id.strip_prefix(&*key.namespace).and_then(|rest| rest.strip_prefix('/'));
    rest.and_then(|rest| rest.strip_prefix(&*key.name)).is_some_and(|rest| rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::time::Duration;

    use super::*;
    use crate::config::CHECK_MAX;
    use crate::policy::verdict::Location;

    /// Fake compiler: `name` defines once, `?name` requires, `!` is a syntax error, `T` a failing test,
    /// `LONG` a slow one. `KILL` fails the check, `SLOW` slowly.
    fn compile(selection: &Selection) -> Vec<Fault> {
        let words = |tests: bool| {
            selection.iter().flat_map(move |(key, Selected { texts, .. })| {
                let modules = if tests { &texts.tests } else { &texts.modules };
                modules.values().flat_map(move |module| {
                    module.text.lines().skip(1).flat_map(str::split_whitespace).map(move |word| (*key, word))
                })
            })
        };
        let fault = |key: &ObjectKey, code: &str, word: &str| Fault {
            location: Some(Location { file: format!("{key}/m"), row: 1, col: 1 }),
            ..Fault::new(code, word)
        };
        let broken: Vec<_> = words(false)
            .filter(|(_, word)| *word == "!")
            .map(|(key, word)| fault(key, PARSE_ERROR, word))
            .collect();
        if !broken.is_empty() {
            return broken;
        }
        if let Some((_, word)) = words(false).find(|(_, word)| ["KILL", "SLOW"].contains(word)) {
            return vec![Fault::new(CHECK_FAILED, word)];
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
        mut compile: impl FnMut(&Selection) -> Vec<Fault>,
    ) -> (Outcome, Duration) {
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

    fn texts(words: &str) -> Option<Arc<Texts>> {
        let (modules, tests) = words.split_once('/').unwrap_or((words, ""));
        let module = |words: &str| Arc::new(Module::read(&format!("package a\n{words}")).unwrap());
        let of = |words: &str, key: &str| BTreeMap::from([(key.to_owned(), module(words))]);
        (words != "-").then(|| Arc::new(Texts { modules: of(modules, "m"), tests: of(tests, "t") }))
    }

    /// Parses `name: good > wanted`: `-` is none, `~` rejected, `^` costly.
    fn candidates(script: &[&str]) -> Candidates {
        let candidate = |line: &&str| {
            let (name, states) = line.split_once(": ").unwrap();
            let (good, wanted) = states.split_once(" > ").unwrap_or((states, states));
            let refused = match wanted.as_bytes()[0] {
                b'~' => Some(Refused::Tried),
                b'^' => Some(Refused::Costly),
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

    fn settle_all(mut candidates: Candidates) -> BTreeMap<ObjectKey, Arc<Texts>> {
        let mut faults = BTreeSet::new();
        for _ in 0..candidates.len() + 2 {
            let (outcome, took) = settle_once(&candidates, compile);
            assert!(outcome.checks <= CHECKS_MAX + candidates.len(), "{}", outcome.checks);
            assert!(took <= SETTLE_MAX + 2 * CHECK_MAX, "{took:?}");
            assert_eq!(outcome.failure, None);
            if outcome.untried.is_empty() {
                return outcome.accepted;
            }
            for (key, candidate) in &mut candidates {
                candidate.good = outcome.accepted.get(key).cloned();
                let is_costly =
                    candidate.refused == Some(Refused::Costly) || outcome.costly().any(|it| it == key);
                let refused = if is_costly { Refused::Costly } else { Refused::Tried };
                let refused = if outcome.untried.contains(key) { Refused::Untried } else { refused };
                candidate.refused = (candidate.good != candidate.wanted).then_some(refused);
                let told = outcome.faults.contains_key(key) || faults.contains(key);
                let is_told = told || is_costly || candidate.refused.is_none();
                assert!(is_told, "{key} was rejected without a fault");
                faults.extend(outcome.faults.get_key_value(key).map(|(key, _)| key.clone()));
            }
        }
        panic!("the search did not end");
    }

    #[test]
    fn all_that_compiles_is_accepted() {
        check(&[], &[], &[]);
        check(&["a: - > x", "b: - > ?x"], &["a=x", "b=?x"], &[]);
        check(&["a: x > y", "b: ?x > ?y"], &["a=y", "b=?y"], &[]);
        check(&["a: x > -", "b: ?x > -"], &[], &[]);
    }

    #[test]
    fn what_an_error_names_gives_way() {
        check(&["a: x > !"], &["a=x"], &["a"]);
        check(&["a: - > !", "b: - > y"], &["b=y"], &["a"]);
        check(&["a: x > ! ?q", "b: y > ?q", "c: z > w"], &["a=x", "b=y", "c=w"], &["a", "b"]);
        check(&["a: - > ?x"], &[], &["a"]);
        check(&["a: - > ?x", "b: - > x"], &["a=?x", "b=x"], &[]);
        check(&["a: - > x", "b: - > x"], &["b=x"], &["a"]);
    }

    #[test]
    fn an_untouched_configmap_stays() {
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
    fn what_was_refused_before_stands_aside() {
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
    fn what_makes_the_check_fail_gives_way_alone() {
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
                for at in [0, count / 2, count - 1] {
                    let line = |n| {
                        if n == at { format!("c{n:02}: - > {kill}") } else { format!("c{n:02}: - > x{n}") }
                    };
                    let script: Vec<_> = (0..count).map(line).collect();
                    let kept: Vec<_> =
                        (0..count).filter(|n| *n != at).map(|n| format!("c{n:02}=x{n}")).collect();
                    let [script, kept] =
                        [&script, &kept].map(|lines| lines.iter().map(String::as_str).collect::<Vec<_>>());
                    check(&script, &kept, &[&format!("c{at:02}")]);
                }
            }
        }
    }

    #[test]
    fn what_made_the_check_fail_costs_later_edits_nothing() {
        for script in [&["a: x > ^SLOW", "b: y > z"], &["a: x/ > ^y/LONG", "b: y > z"]] {
            let (outcome, took) = settle_once(&candidates(script), compile);
            assert_eq!((outcome.checks, took), (1, Duration::ZERO));
            assert_eq!(outcome.accepted[&key("b")], texts("z").unwrap());
            assert!(outcome.faults.is_empty() && outcome.untried.is_empty(), "{outcome:?}");
        }
        for (script, costly) in [("a: x > KILL", true), ("a: x/ > y/LONG", true), ("a: x/ > y/T", false)] {
            let (outcome, _) = settle_once(&candidates(&[script]), compile);
            assert_eq!(outcome.costly().eq([&key("a")]), costly, "{script}");
        }
    }

    #[test]
    fn a_check_that_fails_by_chance_refuses_nothing() {
        for failing in [&[1][..], &[1, 2], &[2], &[1, 3], &[1, 4]] {
            let mut checks = 0;
            let mut candidates = candidates(&["a: x > y", "b: - > z", "c: - > w"]);
            for _ in 0..3 {
                let (outcome, _) = settle_once(&candidates, |selection: &Selection| {
                    checks += 1;
                    let is_change = selection.values().any(|selected| selected.is_changed);
                    if failing.contains(&checks) && is_change {
                        return vec![Fault::new(CHECK_FAILED, "chance")];
                    }
                    compile(selection)
                });
                assert_eq!(outcome.costly().count(), 0, "{failing:?}");
                for (key, candidate) in &mut candidates {
                    candidate.good = outcome.accepted.get(key).cloned();
                    candidate.refused = outcome.untried.contains(key).then_some(Refused::Untried);
                }
            }
            assert!(candidates.values().all(|candidate| candidate.good == candidate.wanted), "{failing:?}");
        }
    }

    #[test]
    fn nothing_is_settled_while_the_check_fails_without_changes() {
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
    fn another_opa_may_refuse_what_was_good() {
        check(&["a: x !", "b: y > z", "c: ?x"], &["b=z"], &["a", "c"]);
    }

    #[test]
    fn many_changes_at_once_are_bounded() {
        let lines = |line: fn(u32) -> String| (10..60).map(line).collect::<Vec<_>>();
        let script = [lines(|n| format!("c{n}: x{n} > y{n}")), lines(|n| format!("d{n}: ?x{n}"))].concat();
        let kept = [lines(|n| format!("c{n}=x{n}")), lines(|n| format!("d{n}=?x{n}"))].concat();
        let refused = lines(|n| format!("c{n}"));
        let [script, kept, refused] =
            [&script, &kept, &refused].map(|lines| lines.iter().map(String::as_str).collect::<Vec<_>>());
        check(&script, &kept, &refused);
    }
}
