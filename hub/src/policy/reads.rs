//! Finds the data that policies read. Decisions that cannot be planned together are split. A decision that
//! fails alone reads deeply all data it names.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use opa_hub_proto::path::DirPath;
use opa_hub_proto::revision::{Digest, modules_digest};
use tokio::time::{Duration, Instant};

use crate::policy::check::{self, Compiler, Dependencies, Modules};
use crate::policy::dataflow::{self, ReadDepth, ReadSet, Segment};
use crate::policy::divide::{self, Divided, Divider};
use crate::policy::modules::Module;
use crate::policy::plan::{Plan, Site};

/// Data that policies read.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Reads of all decisions.
    pub reads: ReadSet,
    /// Decisions that cannot be analysed, with the reason.
    pub opaque: BTreeMap<DirPath, String>,
    /// Decisions without known dependencies, which read everything.
    pub unnamed: BTreeSet<DirPath>,
    /// Decisions left for the next call.
    pub left: BTreeSet<DirPath>,
    /// Modules that no annotated entrypoint uses.
    pub unused: BTreeSet<String>,
}

/// Names that policies read below one path.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// Constant names.
    pub names: BTreeSet<String>,
    /// Whether some names are dynamic.
    pub is_dynamic: bool,
    /// Packages with unknown names, with the reason.
    pub unknown: BTreeMap<DirPath, String>,
    /// Packages left for the next call.
    pub left: BTreeSet<DirPath>,
}

/// Word in all entrypoint annotations.
const ENTRYPOINT: &str = "entrypoint";

/// Analyses one bundle's policies, with cached results.
pub struct Analyst {
    plans: Divider<ReadSet>,
    dependencies: Divider<Dependencies>,
    /// Last digest searched for annotations, and the result.
    annotated: Option<(Digest, Option<Found>)>,
    deadline: Instant,
}

impl Analyst {
    /// Creates an analyst with a time limit.
    pub fn new(time: Duration) -> Self {
        let (plans, dependencies) = (Divider::default(), Divider::default());
        Self { plans, dependencies, annotated: None, deadline: Instant::now() + time }
    }

    /// Restarts the time limit.
    pub fn allow(&mut self, time: Duration) {
        self.deadline = Instant::now() + time;
    }

    /// Whether the time is up.
    pub fn is_spent(&self) -> bool {
        Instant::now() >= self.deadline
    }

    /// Returns the data read by `entrypoints` and annotated entrypoints, else by all packages. `None` without
    /// a real OPA.
    pub async fn reads(
        &mut self,
        compiler: &Compiler,
        modules: &Modules<'_>,
        entrypoints: &[DirPath],
    ) -> Result<Option<Found>, check::Error> {
        if modules.is_empty() {
            return Ok(Some(Found::default()));
        }
        if entrypoints.is_empty()
            && let Some(found) = self.annotated(compiler, modules).await?
        {
            return Ok(Some(found));
        }
        let packages = modules.values().map(|module| &module.root).filter(|_| entrypoints.is_empty());
        let decisions = packages.chain(entrypoints).chain(queried_by_opa(modules)).collect();
        let analyse = async |group: &[&DirPath]| analyse(compiler, modules, group).await;
        let Some(planned) = self.plans.divide(modules, &decisions, self.deadline, analyse).await? else {
            return Ok(None);
        };
        let mut found = Found { opaque: planned.failed, left: planned.left, ..Found::default() };
        planned.found.into_iter().for_each(|(_, reads)| found.reads.join(reads.clone()));
        let is_complete = found.opaque.is_empty() && found.left.is_empty();
        // Annotated rules are part of every plan.
        let annotated = modules.values().filter(|module| !is_complete && module.text.contains(ENTRYPOINT));
        let unplanned = found.opaque.keys().chain(&found.left).chain(annotated.map(|module| &module.root));
        let unplanned = unplanned.collect();
        let named =
            dependencies(&mut self.dependencies, compiler, modules, &unplanned, self.deadline).await?;
        let Some(named) = named else { return Ok(None) };
        for (decisions, dependencies) in named.found {
            found.reads.join(dependency_reads(dependencies, modules, decisions));
        }
        let unnamed: BTreeSet<_> = named.failed.into_keys().chain(named.left.iter().cloned()).collect();
        if !unnamed.is_empty() {
            found.reads.join(deep_reads(vec![Vec::new()], modules, &unnamed));
        }
        found.unnamed = unnamed;
        found.left.extend(named.left);
        Ok(Some(found))
    }

    /// Analyses annotated entrypoints. `None` if there are none or that fails.
    async fn annotated(
        &mut self,
        compiler: &Compiler,
        modules: &Modules<'_>,
    ) -> Result<Option<Found>, check::Error> {
        if !modules.values().any(|module| module.text.contains(ENTRYPOINT)) {
            return Ok(None);
        }
        let all = modules_digest(modules.iter().map(|(id, module)| (id.as_str(), module.digest)), None);
        if let Some((digest, found)) = &self.annotated
            && *digest == all
        {
            return Ok(found.clone());
        }
        if self.is_spent() {
            return Ok(None);
        }
        let found = match compiler.plan(modules, &queried_by_opa(modules).collect::<Vec<_>>()).await {
            Ok(Some(planned)) if planned.is_annotated => {
                let unused = unused_modules(&planned.plan, modules);
                dataflow::reads(&planned.plan).ok().map(|reads| Found { reads, unused, ..Found::default() })
            }
            Ok(_) => None,
            Err(error) if error.is_transient() => return Err(error),
            // The machine may have been busy, so the next call retries.
            Err(_) => return Ok(None),
        };
        self.annotated = Some((all, found.clone()));
        Ok(found)
    }

    /// Returns the names read below `data.<root>`. `None` without a real OPA.
    pub async fn names(
        &mut self,
        compiler: &Compiler,
        modules: &Modules<'_>,
        root: &DirPath,
    ) -> Result<Option<Names>, check::Error> {
        let packages = modules.values().map(|module| &module.root).collect();
        let named = dependencies(&mut self.dependencies, compiler, modules, &packages, self.deadline).await?;
        let Some(named) = named else { return Ok(None) };
        let mut names = Names { unknown: named.failed, left: named.left, ..Names::default() };
        let root: Vec<_> = root.relative().split('/').collect();
        let found = named.found.into_iter().flat_map(|(_, dependencies)| dependencies.data.iter().cloned());
        // Unknown dependencies: names in the source, so that no policy decides before its data is present.
        let is_known = names.unknown.is_empty() && names.left.is_empty();
        let written = modules.values().filter(|_| !is_known).flat_map(|module| written_paths(module));
        for path in found.chain(hidden_paths(modules, |_| true)).chain(written) {
            // Such paths may read any name.
            let shared = path.len().min(root.len());
            if path[..shared] == root[..shared] {
                match path.into_iter().nth(root.len()) {
                    Some(name) => _ = names.names.insert(name),
                    None => names.is_dynamic = true,
                }
            }
        }
        Ok(Some(names))
    }
}

/// Returns packages that OPA queries itself (v1/runtime, v1/server).
fn queried_by_opa<'a>(modules: &'a Modules<'_>) -> impl Iterator<Item = &'a DirPath> {
    let roots = modules.values().map(|module| &module.root);
    roots.filter(|root| root.relative().split('/').next() == Some("system"))
}

fn unused_modules(plan: &Plan, modules: &Modules<'_>) -> BTreeSet<String> {
    let functions = plan.functions();
    // Function names look like `g0.data.shop.allow`.
    let rules = functions.keys().filter_map(|name| Some(name.split_once(".data")?.1));
    let rules: BTreeSet<&str> = rules.collect();
    let has_rule = |package: &str| {
        ['.', '['].into_iter().any(|next| {
            let prefix = format!("{package}{next}");
            let from: (Bound<&str>, Bound<&str>) = (Bound::Included(&prefix), Bound::Unbounded);
            rules.range::<str, _>(from).next().is_some_and(|rule| rule.starts_with(&prefix))
        })
    };
    let unused = modules.iter().filter(|(_, module)| !has_rule(&module.reference()));
    unused.map(|(id, _)| (*id).clone()).collect()
}

/// All are unknown if this OPA omits some.
async fn dependencies<'a>(
    divider: &'a mut Divider<Dependencies>,
    compiler: &Compiler,
    modules: &Modules<'_>,
    decisions: &BTreeSet<&DirPath>,
    deadline: Instant,
) -> Result<Option<Divided<'a, Dependencies>>, check::Error> {
    if let Some(omission) = compiler.omission() {
        let failed = decisions.iter().map(|decision| ((*decision).clone(), omission.clone())).collect();
        return Ok(Some(Divided { found: Vec::new(), failed, left: BTreeSet::new() }));
    }
    let work = async |group: &[&DirPath]| Ok(compiler.dependencies(modules, group).await?);
    divider.divide(modules, decisions, deadline, work).await
}

async fn analyse(
    compiler: &Compiler,
    modules: &Modules<'_>,
    decisions: &[&DirPath],
) -> Result<Option<ReadSet>, divide::Error> {
    let Some(planned) = compiler.plan(modules, decisions).await? else { return Ok(None) };
    Ok(Some(dataflow::reads(&planned.plan)?))
}

/// Deep reads of all data that the decisions name.
fn dependency_reads(
    dependencies: &Dependencies,
    modules: &Modules<'_>,
    decisions: &BTreeSet<DirPath>,
) -> ReadSet {
    let Dependencies { data, rules } = dependencies;
    // Rule names may be dynamic, packages longer than roots.
    let is_used = |module: &Module| {
        decisions.iter().any(|decision| share_prefix(&module.root, decision.relative().split('/')))
            || rules.iter().any(|rule| share_prefix(&module.root, rule.iter().map(String::as_str)))
    };
    let hidden = hidden_paths(modules, is_used);
    deep_reads(data.iter().cloned().chain(hidden).collect(), modules, decisions)
}

/// Returns paths above packages, which `opa deps` omits (OPA v1/dependencies/deps.go, `base`).
fn hidden_paths(modules: &Modules<'_>, is_used: impl Fn(&Module) -> bool) -> BTreeSet<Vec<String>> {
    let used = modules.values().filter(|module| is_used(module));
    let mut paths: BTreeSet<_> = used.flat_map(|module| written_paths(module)).collect();
    let above: BTreeSet<_> = modules.values().flat_map(|module| module.paths_above()).collect();
    paths.retain(|path| above.contains(path));
    paths
}

fn written_paths(module: &Module) -> BTreeSet<Vec<String>> {
    module.data_paths().unwrap_or_else(|| BTreeSet::from([Vec::new()]))
}

/// Deep reads of `paths`, located in the modules of `decisions`.
fn deep_reads(paths: Vec<Vec<String>>, modules: &Modules<'_>, decisions: &BTreeSet<DirPath>) -> ReadSet {
    let sites: Vec<_> = modules
        .iter()
        .filter(|(_, module)| decisions.iter().any(|decision| decision.is_within(&module.root)))
        .map(|(id, module)| Site { file: (*id).clone(), row: module.package_row(), col: 1 })
        .collect();
    let places =
        paths.into_iter().map(|names| names.into_iter().map(|name| Segment::Key(name.into())).collect());
    ReadSet::of(places.map(|place| (place, ReadDepth::Whole)), &sites)
}

/// Whether one path is a prefix of the other.
fn share_prefix<'a>(root: &DirPath, path: impl Iterator<Item = &'a str>) -> bool {
    root.relative().split('/').zip(path).all(|(one, other)| one == other)
}
