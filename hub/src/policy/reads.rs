//! The data that policies read, by the analysis of OPA's plan of them. Where the plan of all decisions cannot be had or
//! analysed, fewer are planned together: what one package does costs no other one its precision. A decision that cannot
//! be analysed alone reads whole what it names.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use opa_hub_proto::path::DirPath;
use tokio::time::Instant;

use super::analyze::{self, Extent, Reads, Step};
use super::check::{self, Compiler, Modules};
use super::plan::Site;

/// Maximum time in which groups of decisions are divided. A group that is left then reads whole what it names.
const DIVIDE_MAX: Duration = Duration::from_secs(10);
/// Maximum number of plans that are made for one set of policies.
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

/// The data that these modules read for `entrypoints`, or for all of their packages where there are none; `None` without
/// a real OPA.
pub async fn reads(
    compiler: &Compiler,
    modules: &Modules<'_>,
    entrypoints: &[DirPath],
) -> Result<Option<Found>, check::Error> {
    if modules.is_empty() {
        return Ok(Some(Found::default()));
    }
    let packages = modules.values().map(|module| &module.root).filter(|_| entrypoints.is_empty());
    let decisions: BTreeSet<&DirPath> = packages.chain(entrypoints).collect();
    let mut found = Found::default();
    let mut groups = vec![decisions.into_iter().collect::<Vec<_>>()];
    let (until, mut plans) = (Instant::now() + DIVIDE_MAX, 0);
    while let Some(group) = groups.pop() {
        let may_plan = plans == 0 || plans < PLANS_MAX && Instant::now() < until;
        plans += 1;
        let mut reason = "too many other policies cannot be analysed either".to_owned();
        if may_plan {
            match analyse(compiler, modules, &group).await {
                Ok(None) => return Ok(None),
                Ok(Some(reads)) => {
                    found.reads.join(reads);
                    continue;
                }
                // Nothing that a module holds makes OPA impossible to run.
                Err(Error::Plan(error @ (check::Error::Run(_) | check::Error::Write(_)))) => {
                    return Err(error);
                }
                Err(error) => reason = error.to_string(),
            }
        }
        if let (true, [_, _, ..]) = (may_plan, &group[..]) {
            let (one, other) = group.split_at(group.len() / 2);
            groups.extend([other.to_vec(), one.to_vec()]);
            continue;
        }
        found.reads.join(named(compiler, modules, &group).await);
        found.opaque.extend(group.into_iter().map(|decision| (decision.clone(), reason.clone())));
    }
    Ok(Some(found))
}

async fn analyse(
    compiler: &Compiler,
    modules: &Modules<'_>,
    decisions: &[&DirPath],
) -> Result<Option<Reads>, Error> {
    let Some(plan) = compiler.plan(modules, decisions).await? else { return Ok(None) };
    Ok(Some(analyze::reads(&plan)?))
}

/// What decisions read that cannot be analysed: all of what they name, and everything if that cannot be found either.
async fn named(compiler: &Compiler, modules: &Modules<'_>, decisions: &[&DirPath]) -> Reads {
    let sites: Vec<_> = modules
        .iter()
        .filter(|(_, module)| decisions.iter().any(|decision| decision.is_within(&module.root)))
        .map(|(id, module)| Site { file: (*id).clone(), row: module.package_row(), col: 1 })
        .collect();
    let paths = compiler.dependencies(modules, decisions).await.ok().flatten();
    let paths = paths.unwrap_or_else(|| vec![Vec::new()]).into_iter();
    let places = paths.map(|names| names.into_iter().map(|name| Step::Name(name.into())).collect());
    Reads::of(places.map(|place| (place, Extent::Whole)), &sites)
}
