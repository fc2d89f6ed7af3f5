//! The ConfigMaps of policies: what each holds, what was accepted of it last, and what is being checked. One check is
//! under way at a time; what changes meanwhile waits for the next.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use opa_hub_proto::path::DirPath;

use super::modules::Module;
use super::settle::{Candidate, Candidates, Outcome, Refused, Texts};
use super::verdict::Fault;
use crate::model::ObjectKey;

/// See the module's text.
#[derive(Default)]
pub struct Policies {
    units: BTreeMap<ObjectKey, Unit>,
    /// Something changed that no check has seen.
    dirty: bool,
    checking: Option<Arc<Candidates>>,
}

#[derive(Default)]
struct Unit {
    wanted: Wanted,
    good: Option<Arc<Texts>>,
    /// What the last check said, and of which texts.
    told: Option<Told>,
}

#[derive(PartialEq)]
struct Told {
    of: Option<Arc<Texts>>,
    faults: Vec<Fault>,
    warnings: Vec<Fault>,
    /// The faults are not its own for certain: nothing is told before it had its chance.
    untried: bool,
}

#[derive(Default)]
enum Wanted {
    #[default]
    Gone,
    /// Nothing that could be checked.
    Unusable,
    Texts(Arc<Texts>),
}

/// What the check says of what a ConfigMap holds now.
pub enum Opinion<'a> {
    /// Not asked yet.
    Waiting,
    /// Accepted when `faults` is empty. `warnings` are about others' changes.
    Told {
        /// What was asked about.
        of: &'a Texts,
        /// Why it is refused.
        faults: &'a [Fault],
        /// Its tests that fail now.
        warnings: &'a [Fault],
    },
}

/// New modules by id, none for those that go.
pub type ModuleChanges = BTreeMap<String, Option<Arc<Module>>>;

/// What was accepted last of each ConfigMap.
pub type LastGood = BTreeMap<ObjectKey, Arc<Texts>>;

impl Policies {
    /// Takes what was accepted before a restart. It is checked with all the rest before anything is served.
    pub fn restore(&mut self, good: LastGood) {
        for (key, texts) in good {
            self.units.entry(key).or_default().good = Some(texts);
            self.dirty = true;
        }
    }

    /// The ConfigMap holds these texts.
    pub fn put(&mut self, key: &ObjectKey, texts: Texts) {
        let unit = self.units.entry(key.clone()).or_default();
        if matches!(&unit.wanted, Wanted::Texts(held) if **held == texts) {
            return;
        }
        // The one allocation is kept when a ConfigMap goes back to what was good.
        let texts = unit.good.clone().filter(|good| **good == texts).unwrap_or_else(|| Arc::new(texts));
        unit.wanted = Wanted::Texts(texts);
        self.dirty = true;
    }

    /// The ConfigMap holds something that cannot be checked: it keeps its last good texts.
    pub fn put_unusable(&mut self, key: &ObjectKey) {
        let unit = self.units.entry(key.clone()).or_default();
        self.dirty |= !matches!(unit.wanted, Wanted::Unusable);
        unit.wanted = Wanted::Unusable;
    }

    /// The ConfigMap is gone.
    pub fn remove(&mut self, key: &ObjectKey) {
        if let Some(unit) = self.units.get_mut(key) {
            unit.wanted = Wanted::Gone;
            self.dirty = true;
        }
    }

    /// What is to be checked now, if anything is.
    pub fn job(&mut self) -> Option<Arc<Candidates>> {
        if !self.dirty || self.checking.is_some() {
            return None;
        }
        self.dirty = false;
        let candidates = self.units.iter().map(|(key, unit)| {
            let wanted = match &unit.wanted {
                Wanted::Gone => None,
                Wanted::Unusable => unit.good.clone(),
                Wanted::Texts(texts) => Some(texts.clone()),
            };
            let refused = unit.told.as_ref().filter(|told| told.of == wanted && !told.faults.is_empty());
            let refused = refused.map(|told| if told.untried { Refused::Untried } else { Refused::Tried });
            (key.clone(), Candidate { good: unit.good.clone(), wanted, refused })
        });
        let candidates = Arc::new(candidates.collect());
        self.checking = Some(Arc::clone(&candidates));
        Some(candidates)
    }

    /// Whether all that is known was checked.
    pub fn is_settled(&self) -> bool {
        !self.dirty && self.checking.is_none()
    }

    /// Takes what came of the check under way: which modules that changes, and of which ConfigMaps something new was
    /// said.
    pub fn take(&mut self, outcome: Outcome) -> (ModuleChanges, BTreeSet<ObjectKey>) {
        let (mut changes, mut news) = (ModuleChanges::new(), BTreeSet::new());
        let Some(candidates) = self.checking.take() else { return (changes, news) };
        let Outcome { mut accepted, mut faults, mut warnings, untried, .. } = outcome;
        self.dirty |= !untried.is_empty();
        for (key, candidate) in &*candidates {
            let unit = self.units.get_mut(key).expect("what is checked is kept");
            let good = accepted.remove(key);
            // What had no chance this time keeps what was said of it.
            let before =
                unit.told.as_ref().filter(|told| told.of == candidate.wanted && good != candidate.wanted);
            let before = before.map(|told| told.faults.clone());
            let told = Told {
                of: candidate.wanted.clone(),
                faults: faults.remove(key).or(before).unwrap_or_default(),
                warnings: warnings.remove(key).unwrap_or_default(),
                untried: untried.contains(key),
            };
            if unit.told.as_ref() != Some(&told) {
                news.insert(key.clone());
            }
            unit.told = Some(told);
            let gone = unit.good.iter().flat_map(|old| old.modules.keys());
            changes.extend(gone.map(|id| (id.clone(), None)));
            // All of them: what was restored is not served yet.
            let new = good.iter().flat_map(|new| &new.modules);
            changes.extend(new.map(|(id, module)| (id.clone(), Some(Arc::clone(module)))));
            unit.good = good;
        }
        self.units.retain(|_, unit| unit.good.is_some() || !matches!(unit.wanted, Wanted::Gone));
        (changes, news)
    }

    /// What was said of the ConfigMap as it is now; none when there is no such ConfigMap.
    pub fn opinion(&self, key: &ObjectKey) -> Option<Opinion<'_>> {
        let unit = self.units.get(key)?;
        let of = match &unit.wanted {
            Wanted::Gone => return None,
            Wanted::Unusable => return Some(Opinion::Waiting),
            Wanted::Texts(texts) => texts,
        };
        Some(match &unit.told {
            Some(told) if told.of.as_ref() == Some(of) && !told.untried => {
                Opinion::Told { of, faults: &told.faults, warnings: &told.warnings }
            }
            _ => Opinion::Waiting,
        })
    }

    /// The ConfigMaps of which the last check refused something, and why.
    pub fn refused(&self) -> impl Iterator<Item = (&ObjectKey, &[Fault])> {
        let told = self.units.iter().filter_map(|(key, unit)| Some((key, unit.told.as_ref()?)));
        let told = told.filter(|(_, told)| !told.untried && !told.faults.is_empty());
        told.map(|(key, told)| (key, told.faults.as_slice()))
    }

    /// What was accepted last.
    pub fn last_good(&self) -> LastGood {
        let good = self.units.iter().filter_map(|(key, unit)| Some((key.clone(), unit.good.clone()?)));
        good.collect()
    }

    /// The packages that are served or may be soon, with what each owns.
    pub fn roots(&self) -> impl Iterator<Item = (&DirPath, &Module)> {
        let checking = self.checking.iter().flat_map(|candidates| candidates.values());
        let checking = checking.filter_map(|candidate| candidate.wanted.as_ref());
        let texts = self.units.values().flat_map(|unit| unit.wanted.texts().into_iter().chain(&unit.good));
        let modules = texts.chain(checking).flat_map(|texts| texts.modules.values());
        modules.map(|module| (&module.root, &**module))
    }

    /// Bytes of all texts but those of `key`, of each ConfigMap the larger of what it holds and what is good.
    pub fn bytes_beside(&self, key: &ObjectKey) -> usize {
        let units = self.units.iter().filter(|(other, _)| *other != key);
        units
            .map(|(_, unit)| {
                let held = unit.wanted.texts().into_iter().chain(&unit.good);
                held.map(|texts| texts.bytes()).max().unwrap_or(0)
            })
            .sum()
    }
}

impl Wanted {
    fn texts(&self) -> Option<&Arc<Texts>> {
        match self {
            Self::Texts(texts) => Some(texts),
            Self::Gone | Self::Unusable => None,
        }
    }
}

impl Texts {
    /// Bytes of all of them.
    pub fn bytes(&self) -> usize {
        self.modules.values().chain(self.tests.values()).map(|module| module.text.len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> ObjectKey {
        ObjectKey { namespace: "ns".into(), name: name.into() }
    }

    fn texts(text: &str) -> Texts {
        let module = Arc::new(Module::read(&format!("package a\n{text}")).unwrap());
        Texts { modules: BTreeMap::from([("ns/a/m".to_owned(), module)]), ..Texts::default() }
    }

    fn accept_all(candidates: &Candidates) -> Outcome {
        let accepted = candidates.iter().filter_map(|(key, unit)| Some((key.clone(), unit.wanted.clone()?)));
        Outcome { accepted: accepted.collect(), ..Outcome::default() }
    }

    #[test]
    fn what_changes_during_a_check_waits_for_the_next() {
        let mut policies = Policies::default();
        assert!(policies.is_settled() && policies.job().is_none());
        policies.put(&key("a"), texts("1"));
        let first = policies.job().unwrap();
        policies.put(&key("a"), texts("2"));
        assert!(policies.job().is_none(), "one at a time");
        let (changes, _) = policies.take(accept_all(&first));
        assert_eq!(changes["ns/a/m"].as_ref().unwrap().text, "package a\n1");
        assert!(matches!(policies.opinion(&key("a")), Some(Opinion::Waiting)), "nothing was said of 2");
        let second = policies.job().unwrap();
        policies.take(accept_all(&second));
        assert!(matches!(policies.opinion(&key("a")), Some(Opinion::Told { faults: [], .. })));
        policies.put(&key("a"), texts("2"));
        assert!(policies.is_settled(), "the same again is silence");
        policies.put_unusable(&key("a"));
        let third = policies.job().unwrap();
        let (changes, _) = policies.take(accept_all(&third));
        assert_eq!(changes["ns/a/m"].as_ref().unwrap().text, "package a\n2", "the last good stays");
        policies.remove(&key("a"));
        let fourth = policies.job().unwrap();
        assert_eq!(policies.take(accept_all(&fourth)).0, ModuleChanges::from([("ns/a/m".into(), None)]));
        assert!(policies.opinion(&key("a")).is_none());
    }

    #[test]
    fn what_was_good_before_a_restart_is_checked_first() {
        let mut policies = Policies::default();
        policies.restore(LastGood::from([(key("a"), Arc::new(texts("1")))]));
        policies.put(&key("a"), texts("2"));
        let job = policies.job().unwrap();
        assert_eq!(job[&key("a")].good.as_deref(), Some(&texts("1")));
        let good = job[&key("a")].good.clone().unwrap();
        let outcome = Outcome { accepted: BTreeMap::from([(key("a"), good)]), ..Outcome::default() };
        let (changes, _) = policies.take(outcome);
        // It was not served yet, so it must come as a change.
        assert_eq!(changes.len(), 1, "{changes:?}");
    }
}
