//! Desired, last good and checked modules of all policy ConfigMaps. Changes during a check wait for the next.
//!
//! Rejected modules own no package. They join a later check only if their paths are free and all modules fit into 16
//! MiB.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use opa_hub_proto::head::MODULES_BYTES_MAX;
use opa_hub_proto::path::DirPath;

use crate::model::ObjectKey;
use crate::policy::candidate::{Candidate, Candidates, ModuleSet, Rejection, Resolution};
use crate::policy::modules::Module;
use crate::policy::verdict::Diagnostic;

#[derive(Default)]
pub(crate) struct PolicyRegistry {
    configmaps: BTreeMap<ObjectKey, PolicyConfigMap>,
    needs_check: bool,
    checking: Option<Arc<Candidates>>,
    /// Number of modules by package, excluding rejected ones.
    roots: BTreeMap<DirPath, usize>,
    /// Whether the last check excluded rejected modules.
    has_excluded: bool,
    /// Bytes of rejected modules in the current check.
    reserved: usize,
    /// Bytes of modules: per ConfigMap the larger of desired and last good.
    bytes: usize,
}

#[derive(Default)]
struct PolicyConfigMap {
    desired: Desired,
    good: Option<Arc<ModuleSet>>,
    result: Option<CheckResult>,
}

#[derive(PartialEq)]
struct CheckResult {
    checked: Option<Arc<ModuleSet>>,
    faults: Vec<Diagnostic>,
    warnings: Vec<Diagnostic>,
    /// Whether the result is inconclusive.
    untried: bool,
    costly: bool,
}

#[derive(Default)]
enum Desired {
    #[default]
    Deleted,
    /// Nothing that can be checked.
    Unusable,
    ModuleSet(Arc<ModuleSet>),
}

pub(crate) enum Opinion<'a> {
    Waiting,
    /// Accepted if `faults` is empty.
    Told {
        of: &'a ModuleSet,
        faults: &'a [Diagnostic],
        warnings: &'a [Diagnostic],
    },
}

/// Modules by id; `None` if removed.
pub(crate) type ModuleChanges = BTreeMap<String, Option<Arc<Module>>>;

/// Last good modules by ConfigMap.
pub type LastGood = BTreeMap<ObjectKey, Arc<ModuleSet>>;

impl PolicyRegistry {
    /// Restores last good modules, which must be checked before use.
    pub(crate) fn restore(&mut self, good: LastGood) {
        for (key, texts) in good {
            self.change(&key, |configmap| configmap.good = Some(texts));
            self.needs_check = true;
        }
    }

    /// Changes a ConfigMap and updates the totals.
    fn change<T>(&mut self, key: &ObjectKey, change: impl FnOnce(&mut PolicyConfigMap) -> T) -> T {
        let configmap = self.configmaps.entry(key.clone()).or_default();
        let before = configmap.demand();
        let changed = change(configmap);
        let after = configmap.demand();
        if before != after {
            self.bytes = self.bytes - bytes(&before) + bytes(&after);
            add_roots(&mut self.roots, &after);
            remove_roots(&mut self.roots, &before);
        }
        changed
    }

    pub(crate) fn put(&mut self, key: &ObjectKey, texts: ModuleSet) {
        let is_new = self.change(key, |configmap| {
            if matches!(&configmap.desired, Desired::ModuleSet(current) if **current == texts) {
                return false;
            }
            // Reverting to the last good modules reuses their memory.
            let texts =
                configmap.good.clone().filter(|good| **good == texts).unwrap_or_else(|| Arc::new(texts));
            configmap.desired = Desired::ModuleSet(texts);
            true
        });
        self.needs_check |= is_new;
    }

    /// The ConfigMap cannot be checked: the last good modules remain.
    pub(crate) fn put_unusable(&mut self, key: &ObjectKey) {
        let before =
            self.change(key, |configmap| std::mem::replace(&mut configmap.desired, Desired::Unusable));
        self.needs_check |= !matches!(before, Desired::Unusable);
    }

    pub(crate) fn remove(&mut self, key: &ObjectKey) {
        if self.configmaps.contains_key(key) {
            self.change(key, |configmap| configmap.desired = Desired::Deleted);
            self.needs_check = true;
        }
    }

    /// Starts a check if needed. Rejected modules take part only if `may_own` allows their packages and
    /// [`MODULES_BYTES_MAX`] suffices.
    pub(crate) fn job(&mut self, may_own: impl Fn(&DirPath) -> bool) -> Option<Arc<Candidates>> {
        if !self.needs_check || self.checking.is_some() {
            return None;
        }
        (self.needs_check, self.has_excluded) = (false, false);
        let mut room = MODULES_BYTES_MAX.saturating_sub(self.bytes);
        let mut candidates = Candidates::new();
        for (key, configmap) in &self.configmaps {
            let mut wanted = match &configmap.desired {
                Desired::Deleted => None,
                Desired::Unusable => configmap.good.clone(),
                Desired::ModuleSet(texts) => Some(texts.clone()),
            };
            let refused = configmap.refusal();
            let is_tried = refused.is_some_and(|refused| refused != Rejection::Costly);
            if let (true, Some(texts)) = (is_tried, wanted.as_ref().filter(|_| wanted != configmap.good)) {
                let more =
                    texts.bytes().saturating_sub(configmap.good.as_ref().map_or(0, |good| good.bytes()));
                if more <= room && texts.modules.values().all(|module| may_own(&module.root)) {
                    (room, self.reserved) = (room - more, self.reserved + more);
                    add_roots(&mut self.roots, &[Some(texts.clone()), None]);
                } else {
                    self.has_excluded = true;
                    wanted.clone_from(&configmap.good);
                }
            }
            let refused = refused.filter(|_| wanted != configmap.good);
            candidates.insert(key.clone(), Candidate { good: configmap.good.clone(), wanted, refused });
        }
        let candidates = Arc::new(candidates);
        self.checking = Some(Arc::clone(&candidates));
        Some(candidates)
    }

    pub(crate) fn recheck(&mut self) {
        self.needs_check = true;
    }

    /// Requests a check of excluded modules.
    pub(crate) fn reconsider(&mut self) {
        self.needs_check |= self.has_excluded;
    }

    pub(crate) fn is_settled(&self) -> bool {
        !self.needs_check && self.checking.is_none()
    }

    /// Applies a check. Returns changed modules and the ConfigMaps with a new result.
    pub(crate) fn take(&mut self, outcome: Resolution) -> (ModuleChanges, BTreeSet<ObjectKey>) {
        let (mut changes, mut updated) = (ModuleChanges::new(), BTreeSet::new());
        let Some(candidates) = self.checking.take() else { return (changes, updated) };
        let bytes = self.bytes;
        let costly: BTreeSet<_> = outcome.costly().cloned().collect();
        let Resolution { mut accepted, mut faults, mut warnings, untried, .. } = outcome;
        self.needs_check |= !untried.is_empty();
        self.reserved = 0;
        let is_included =
            |candidate: &&Candidate| !matches!(candidate.refused, None | Some(Rejection::Costly));
        for candidate in candidates.values().filter(is_included) {
            remove_roots(&mut self.roots, &[candidate.wanted.clone(), None]);
        }
        for (key, candidate) in &*candidates {
            let good = accepted.remove(key);
            let configmap = &self.configmaps[key];
            if candidate.wanted == candidate.good
                && configmap.is_excluded(candidate)
                && good == configmap.good
            {
                continue;
            }
            // Inconclusive results preserve earlier faults.
            let before = configmap
                .result
                .as_ref()
                .filter(|result| result.checked == candidate.wanted && good != candidate.wanted);
            let before = before.map(|result| result.faults.clone());
            let result = CheckResult {
                checked: candidate.wanted.clone(),
                faults: faults.remove(key).or(before).unwrap_or_default(),
                warnings: warnings.remove(key).unwrap_or_default(),
                untried: untried.contains(key),
                costly: costly.contains(key) || candidate.refused == Some(Rejection::Costly),
            };
            if configmap.result.as_ref() != Some(&result) {
                updated.insert(key.clone());
            }
            let removed = configmap.good.iter().flat_map(|previous| previous.modules.keys());
            changes.extend(removed.map(|id| (id.clone(), None)));
            // Restored modules were not served yet.
            let new = good.iter().flat_map(|new| &new.modules);
            changes.extend(new.map(|(id, module)| (id.clone(), Some(Arc::clone(module)))));
            self.change(key, |configmap| (configmap.result, configmap.good) = (Some(result), good));
        }
        if self.bytes < bytes {
            self.reconsider();
        }
        self.configmaps.retain(|_, configmap| {
            configmap.good.is_some() || !matches!(configmap.desired, Desired::Deleted)
        });
        (changes, updated)
    }

    /// `None` if there is no such ConfigMap.
    pub(crate) fn opinion(&self, key: &ObjectKey) -> Option<Opinion<'_>> {
        let configmap = self.configmaps.get(key)?;
        let of = match &configmap.desired {
            Desired::Deleted => return None,
            Desired::Unusable => return Some(Opinion::Waiting),
            Desired::ModuleSet(texts) => texts,
        };
        Some(match &configmap.result {
            Some(result) if result.checked.as_ref() == Some(of) && !result.untried => {
                Opinion::Told { of, faults: &result.faults, warnings: &result.warnings }
            }
            _ => Opinion::Waiting,
        })
    }

    /// Returns rejected ConfigMaps with their faults.
    pub(crate) fn refused(&self) -> impl Iterator<Item = (&ObjectKey, &[Diagnostic])> {
        let result =
            self.configmaps.iter().filter_map(|(key, configmap)| Some((key, configmap.result.as_ref()?)));
        let result = result.filter(|(_, result)| !result.untried && !result.faults.is_empty());
        result.map(|(key, result)| (key, result.faults.as_slice()))
    }

    pub(crate) fn last_good(&self) -> LastGood {
        let good = self
            .configmaps
            .iter()
            .filter_map(|(key, configmap)| Some((key.clone(), configmap.good.clone()?)));
        good.collect()
    }

    pub(crate) fn roots(&self) -> &BTreeMap<DirPath, usize> {
        &self.roots
    }

    /// Returns the bytes of served and checked modules, except those of `key`.
    pub(crate) fn bytes_beside(&self, key: &ObjectKey) -> usize {
        self.reserved + self.bytes
            - self.configmaps.get(key).map_or(0, |configmap| bytes(&configmap.demand()))
    }
}

/// Last good modules and those that may be accepted.
type Demand = [Option<Arc<ModuleSet>>; 2];

fn bytes(demand: &Demand) -> usize {
    demand.iter().flatten().map(|texts| texts.bytes()).max().unwrap_or(0)
}

fn roots_of(demand: &Demand) -> impl Iterator<Item = &DirPath> {
    demand.iter().flatten().flat_map(|texts| texts.modules.values()).map(|module| &module.root)
}

fn add_roots(roots: &mut BTreeMap<DirPath, usize>, demand: &Demand) {
    for root in roots_of(demand) {
        *roots.entry(root.clone()).or_default() += 1;
    }
}

fn remove_roots(roots: &mut BTreeMap<DirPath, usize>, demand: &Demand) {
    for root in roots_of(demand) {
        let count = roots.get_mut(root).expect("owned roots are counted");
        *count -= 1;
        if *count == 0 {
            roots.remove(root);
        }
    }
}

impl PolicyConfigMap {
    fn demand(&self) -> Demand {
        let desired = self.desired.texts().filter(|_| self.refusal().is_none());
        [self.good.clone(), desired.cloned()]
    }

    fn refusal(&self) -> Option<Rejection> {
        let result = self.result.as_ref().filter(|result| result.checked.as_ref() == self.desired.texts())?;
        let refused = match result {
            CheckResult { untried: true, .. } => Rejection::Unattributed,
            CheckResult { costly: true, .. } => Rejection::Costly,
            _ => Rejection::Confirmed,
        };
        (!result.faults.is_empty()).then_some(refused)
    }

    /// Whether the check excluded the rejected modules.
    fn is_excluded(&self, candidate: &Candidate) -> bool {
        self.refusal().is_some() && self.desired.texts() != candidate.wanted.as_ref()
    }
}

impl Desired {
    fn texts(&self) -> Option<&Arc<ModuleSet>> {
        match self {
            Self::ModuleSet(texts) => Some(texts),
            Self::Deleted | Self::Unusable => None,
        }
    }
}

impl ModuleSet {
    /// Returns the size of the source, in bytes.
    pub fn bytes(&self) -> usize {
        self.modules.values().chain(self.tests.values()).map(|module| module.text.len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn anywhere(_: &DirPath) -> bool {
        true
    }

    fn key(name: &str) -> ObjectKey {
        ObjectKey { namespace: "ns".into(), name: name.into() }
    }

    fn texts(text: &str) -> ModuleSet {
        let module = Arc::new(Module::read(&format!("package a\n{text}")).unwrap());
        ModuleSet { modules: BTreeMap::from([("ns/a/m".to_owned(), module)]), ..ModuleSet::default() }
    }

    fn accept_all(candidates: &Candidates) -> Resolution {
        let accepted =
            candidates.iter().filter_map(|(key, candidate)| Some((key.clone(), candidate.wanted.clone()?)));
        Resolution { accepted: accepted.collect(), ..Resolution::default() }
    }

    #[test]
    fn changes_during_a_check_wait_for_the_next() {
        let mut policies = PolicyRegistry::default();
        assert!(policies.is_settled() && policies.job(anywhere).is_none());
        policies.put(&key("a"), texts("1"));
        let first = policies.job(anywhere).unwrap();
        policies.put(&key("a"), texts("2"));
        assert!(policies.job(anywhere).is_none(), "one at a time");
        let (changes, _) = policies.take(accept_all(&first));
        assert_eq!(changes["ns/a/m"].as_ref().unwrap().text, "package a\n1");
        assert!(matches!(policies.opinion(&key("a")), Some(Opinion::Waiting)), "2 was not checked");
        let second = policies.job(anywhere).unwrap();
        policies.take(accept_all(&second));
        assert!(matches!(policies.opinion(&key("a")), Some(Opinion::Told { faults: [], .. })));
        policies.put(&key("a"), texts("2"));
        assert!(policies.is_settled(), "equal modules need no check");
        policies.put_unusable(&key("a"));
        let third = policies.job(anywhere).unwrap();
        let (changes, _) = policies.take(accept_all(&third));
        assert_eq!(changes["ns/a/m"].as_ref().unwrap().text, "package a\n2", "last good modules remain");
        policies.remove(&key("a"));
        let fourth = policies.job(anywhere).unwrap();
        assert_eq!(policies.take(accept_all(&fourth)).0, ModuleChanges::from([("ns/a/m".into(), None)]));
        assert!(policies.opinion(&key("a")).is_none());
    }

    #[test]
    fn restored_modules_are_checked_first() {
        let mut policies = PolicyRegistry::default();
        policies.restore(LastGood::from([(key("a"), Arc::new(texts("1")))]));
        policies.put(&key("a"), texts("2"));
        let job = policies.job(anywhere).unwrap();
        assert_eq!(job[&key("a")].good.as_deref(), Some(&texts("1")));
        let good = job[&key("a")].good.clone().unwrap();
        let outcome = Resolution { accepted: BTreeMap::from([(key("a"), good)]), ..Resolution::default() };
        let (changes, _) = policies.take(outcome);
        assert_eq!(changes.len(), 1, "{changes:?}");
    }

    fn module(package: &str, bytes: usize) -> ModuleSet {
        let text = format!("package {package}\n# {}", "x".repeat(bytes));
        let module = Arc::new(Module::read(&text).unwrap());
        ModuleSet { modules: BTreeMap::from([(format!("ns/{package}/m"), module)]), ..ModuleSet::default() }
    }

    fn reject(candidates: &Candidates, name: &str) -> Resolution {
        let accepted = candidates.iter().filter_map(|(key, candidate)| {
            let texts = if *key.name == *name { &candidate.good } else { &candidate.wanted };
            Some((key.clone(), texts.clone()?))
        });
        let faults = BTreeMap::from([(key(name), vec![Diagnostic::new("x", "x")])]);
        Resolution { accepted: accepted.collect(), faults, ..Resolution::default() }
    }

    #[test]
    fn rejected_modules_own_nothing_and_need_no_room() {
        let root: DirPath = "/shop".parse().unwrap();
        let mut policies = PolicyRegistry::default();
        policies.put(&key("a"), module("shop", MODULES_BYTES_MAX / 2 + 1));
        assert!(policies.roots().contains_key(&root));
        let job = policies.job(anywhere).unwrap();
        assert!(policies.roots().contains_key(&root), "still in the check");
        policies.take(reject(&job, "a"));
        assert!(policies.roots().is_empty() && policies.bytes_beside(&key("b")) == 0);
        // Excluded for package or size: rejection remains.
        for (may_own, bytes) in [(false, 1), (true, MODULES_BYTES_MAX / 2 + 1)] {
            policies.put(&key("b"), module("other", bytes));
            let job = policies.job(|_| may_own).unwrap();
            assert_eq!(job[&key("a")], Candidate::default());
            policies.take(accept_all(&job));
            assert_eq!(policies.refused().map(|(key, _)| &*key.name).collect::<Vec<_>>(), ["a"]);
            assert_eq!(policies.roots().keys().map(DirPath::as_str).collect::<Vec<_>>(), ["/other"]);
        }
        policies.put(&key("b"), module("other", 1));
        let job = policies.job(anywhere).unwrap();
        assert_eq!(job[&key("a")], Candidate::default(), "the larger module is still served");
        policies.take(accept_all(&job));
        let job = policies.job(anywhere).unwrap();
        assert!(job[&key("a")].wanted.is_some() && policies.roots().len() == 2);
        policies.take(accept_all(&job));
        assert_eq!(policies.roots().len(), 2);
        policies.remove(&key("a"));
        let job = policies.job(anywhere).unwrap();
        policies.take(accept_all(&job));
        assert_eq!(policies.roots().keys().map(DirPath::as_str).collect::<Vec<_>>(), ["/other"]);
    }
}
