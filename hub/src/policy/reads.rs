//! The data that policies read, by the analysis of OPA's plan of them. Where the plan of all decisions cannot be had or
//! analysed, fewer are planned together: what one package does costs no other one its precision. A decision that cannot
//! be analysed alone reads whole what it names.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use opa_hub_proto::path::DirPath;
use opa_hub_proto::revision::{Digest, modules_digest};
use tokio::time::Instant;

use super::analyze::{self, Extent, Reads, Step};
use super::check::{self, Compiler, Dependencies, Modules};
use super::modules::Module;
use super::plan::Site;

/// Maximum time in which groups of decisions are divided. A group that is left then reads whole what it names.
/// Data goes on meanwhile, and what is found is remembered.
const DIVIDE_MAX: Duration = Duration::from_secs(60);
/// Maximum number of plans that are made for one set of policies: enough to find three among a thousand packages.
const PLANS_MAX: usize = 64;

/// The data that policies read.
#[derive(Debug, Default)]
pub struct Found {
    /// What they read.
    pub reads: Reads,
    /// Decisions that could not be analysed, with the reason.
    pub opaque: BTreeMap<DirPath, String>,
}

/// Why a group of decisions cannot be analysed.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Plan(#[from] check::Error),
    #[error(transparent)]
    Analysis(#[from] analyze::TooComplex),
}

/// Analyses the policies of one bundle, again and again.
#[derive(Default)]
pub struct Analyst {
    /// Decisions that cannot be analysed, with the digest of their modules, so that the next change of others does not
    /// pay for it again.
    opaque: BTreeMap<DirPath, (Digest, String)>,
    /// Groups that were still to be divided when the time was over. They are divided further the next time, apart from
    /// all others.
    suspects: Vec<BTreeSet<DirPath>>,
}

impl Analyst {
    /// The data that these modules read for `entrypoints`, or for all of their packages where there are none; `None`
    /// without a real OPA.
    pub async fn reads(
        &mut self,
        compiler: &Compiler,
        modules: &Modules<'_>,
        entrypoints: &[DirPath],
    ) -> Result<Option<Found>, check::Error> {
        if modules.is_empty() {
            return Ok(Some(Found::default()));
        }
        let packages = modules.values().map(|module| &module.root).filter(|_| entrypoints.is_empty());
        let decisions: BTreeSet<&DirPath> = packages.chain(entrypoints).collect();
        let is_known = |decision: &&DirPath| {
            self.opaque.get(*decision).is_some_and(|(digest, _)| *digest == own_digest(modules, decision))
        };
        let (known, open): (Vec<_>, Vec<_>) = decisions.into_iter().partition(is_known);
        let mut found = Found::default();
        for decision in known {
            let reason = self.opaque[decision].1.clone();
            found.add_opaque(compiler, modules, &[decision], &reason).await;
        }
        // Level by level, so that good halves are found before the time is over.
        let suspects = std::mem::take(&mut self.suspects);
        let is_suspect = |decision: &&DirPath| suspects.iter().any(|group| group.contains(*decision));
        let (_, others): (Vec<_>, Vec<_>) = open.iter().copied().partition(is_suspect);
        let mut groups = VecDeque::from([others]);
        groups.extend(
            suspects.iter().map(|group| open.iter().copied().filter(|one| group.contains(*one)).collect()),
        );
        groups.retain(|group: &Vec<_>| !group.is_empty());
        let mut until = None;
        let mut plans = 0;
        while let Some(group) = groups.pop_front() {
            let may_plan = plans < PLANS_MAX && until.is_none_or(|until| Instant::now() < until);
            let mut reason = "too many other policies cannot be analysed either".to_owned();
            if may_plan {
                plans += 1;
                match analyse(compiler, modules, &group).await {
                    Ok(None) => return Ok(None),
                    Ok(Some(reads)) => {
                        found.reads.join(reads);
                        continue;
                    }
                    // Nothing that a module holds makes OPA impossible to run.
                    Err(Error::Plan(error)) if error.is_transient() => return Err(error),
                    Err(error) => reason = error.to_string(),
                }
                until.get_or_insert_with(|| Instant::now() + DIVIDE_MAX);
                let [decision] = group[..] else {
                    let (one, other) = group.split_at(group.len() / 2);
                    groups.extend([one.to_vec(), other.to_vec()]);
                    continue;
                };
                self.opaque.insert(decision.clone(), (own_digest(modules, decision), reason.clone()));
            } else {
                self.suspects.push(group.iter().map(|decision| (*decision).clone()).collect());
            }
            found.add_opaque(compiler, modules, &group, &reason).await;
        }
        let is_there = |decision: &DirPath| modules.values().any(|module| decision.is_within(&module.root));
        self.opaque.retain(|decision, _| is_there(decision));
        Ok(Some(found))
    }
}

impl Found {
    async fn add_opaque(
        &mut self,
        compiler: &Compiler,
        modules: &Modules<'_>,
        decisions: &[&DirPath],
        reason: &str,
    ) {
        self.reads.join(named(compiler, modules, decisions).await);
        self.opaque.extend(decisions.iter().map(|decision| ((*decision).clone(), reason.to_owned())));
    }
}

/// The digest of the modules of a decision's package.
fn own_digest(modules: &Modules<'_>, decision: &DirPath) -> Digest {
    let own = modules.iter().filter(|(_, module)| decision.is_within(&module.root));
    modules_digest(own.map(|(id, module)| (id.as_str(), module.digest)), None)
}

async fn analyse(
    compiler: &Compiler,
    modules: &Modules<'_>,
    decisions: &[&DirPath],
) -> Result<Option<Reads>, Error> {
    let Some(planned) = compiler.plan(modules, decisions).await? else { return Ok(None) };
    Ok(Some(analyze::reads(&planned.plan)?))
}

/// What decisions read that cannot be analysed: all of what they name, and everything if that cannot be found either.
async fn named(compiler: &Compiler, modules: &Modules<'_>, decisions: &[&DirPath]) -> Reads {
    let sites: Vec<_> = modules
        .iter()
        .filter(|(_, module)| decisions.iter().any(|decision| decision.is_within(&module.root)))
        .map(|(id, module)| Site { file: (*id).clone(), row: module.package_row(), col: 1 })
        .collect();
    let everything = || vec![Vec::new()];
    let paths = match compiler.dependencies(modules, decisions).await {
        Ok(Some(Dependencies { data, rules })) => {
            // Rules lie in packages; the name of a rule may be dynamic, and a package longer than its root.
            let is_used = |module: &Module| {
                decisions.iter().any(|decision| meets(&module.root, decision.relative().split('/')))
                    || rules.iter().any(|rule| meets(&module.root, rule.iter().map(String::as_str)))
            };
            let is_any = modules.values().any(|module| is_used(module) && module.names_all_data());
            if is_any { everything() } else { data }
        }
        _ => everything(),
    };
    let places =
        paths.into_iter().map(|names| names.into_iter().map(|name| Step::Name(name.into())).collect());
    Reads::of(places.map(|place| (place, Extent::Whole)), &sites)
}

/// Whether one of the two paths begins with the other.
fn meets<'a>(root: &DirPath, path: impl Iterator<Item = &'a str>) -> bool {
    root.relative().split('/').zip(path).all(|(one, other)| one == other)
}
