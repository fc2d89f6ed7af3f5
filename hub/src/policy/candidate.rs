//! Modules of ConfigMaps under check, and the result.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;

use crate::model::ObjectKey;
use crate::policy::modules::Module;
use crate::policy::resolve::is_from;
use crate::policy::verdict::Diagnostic;
pub(crate) const PARSE_ERROR: &str = "rego_parse_error";

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
pub struct ModuleSet {
    /// Modules that are served.
    pub modules: BTreeMap<String, Arc<Module>>,
    /// Modules that are only tested.
    pub tests: BTreeMap<String, Arc<Module>>,
}

/// Last good and desired modules of one ConfigMap.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Candidate {
    /// Last good modules. `None` if there are none.
    pub good: Option<Arc<ModuleSet>>,
    /// Desired modules. `None` if the ConfigMap was deleted.
    pub wanted: Option<Arc<ModuleSet>>,
    /// Earlier rejection of `wanted`.
    pub refused: Option<Rejection>,
}

/// Kind of rejection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rejection {
    /// Inconclusive, so first in the next check.
    Unattributed,
    /// Checked conclusively.
    Confirmed,
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
    pub texts: &'a ModuleSet,
    /// Whether they are desired but not accepted.
    pub is_changed: bool,
}

/// Scope of an [`Resolution`].
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
pub struct Resolution {
    /// Accepted modules.
    pub accepted: BTreeMap<ObjectKey, Arc<ModuleSet>>,
    /// Reasons of new rejections.
    pub faults: BTreeMap<ObjectKey, Vec<Diagnostic>>,
    /// Inconclusive rejections.
    pub untried: BTreeSet<ObjectKey>,
    /// Failed tests of unchanged ConfigMaps.
    pub warnings: BTreeMap<ObjectKey, Vec<Diagnostic>>,
    /// Number of checks.
    pub checks: usize,
    /// Failure of the last good modules.
    pub failure: Option<Box<Diagnostic>>,
    /// Scope of the result.
    pub progress: Progress,
}

impl Resolution {
    /// Changes nothing and requests another check.
    pub fn unsettled(candidates: &Candidates) -> Self {
        let good =
            candidates.iter().filter_map(|(key, candidate)| Some((key.clone(), candidate.good.clone()?)));
        let is_pending = |candidate: &Candidate| {
            candidate.wanted != candidate.good
                && !matches!(candidate.refused, Some(Rejection::Confirmed | Rejection::Costly))
        };
        let pending = candidates.iter().filter(|(_, candidate)| is_pending(candidate));
        let mut untried: BTreeSet<_> = pending.map(|(key, _)| key.clone()).collect();
        if untried.is_empty() {
            // One key requests a check.
            untried.extend(candidates.keys().next().cloned());
        }
        Self { accepted: good.collect(), untried, progress: Progress::Nothing, ..Self::default() }
    }

    /// Returns those rejected as [`Rejection::Costly`].
    pub fn costly(&self) -> impl Iterator<Item = &ObjectKey> {
        let refused = self.faults.iter().filter(|(key, _)| !self.untried.contains(*key));
        let costly = refused.filter(|(key, faults)| {
            let is_own = |fault: &Diagnostic| {
                fault.location.as_ref().is_some_and(|location| is_from(&location.file, key))
            };
            faults.iter().any(|fault| match fault.code.as_str() {
                CHECK_FAILED => true,
                TESTS_TOO_LONG => is_own(fault),
                _ => false,
            })
        });
        costly.map(|(key, _)| key)
    }
}

/// Whether a test, not a module, is at fault.
pub fn is_of_tests(fault: &Diagnostic) -> bool {
    [TEST_FAILED, TESTS_TOO_LONG, TESTS_NOT_RUN].contains(&fault.code.as_str())
}
