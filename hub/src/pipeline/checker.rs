//! Check of policies, beside the writer: the accepted ones, and the data that they read.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use opa_hub_proto::path::DirPath;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{POLICIES, Said};
use crate::bundle::Bundle;
use crate::bundle::limit::Scales;
use crate::bundle::spec::Spec;
use crate::config::CHECK_RETRY;
use crate::model::ObjectKey;
use crate::policy::analyze::Reads;
use crate::policy::check::{self, Compiler, Modules};
use crate::policy::divide::RETRY_AFTER;
use crate::policy::reads::{Analyst, Found, Names};
use crate::policy::settle::{self, Candidate, Candidates, Outcome, Progress, Selection, Texts};
use crate::policy::verdict::Fault;
use crate::readiness::Readiness;
use crate::source::auto::{self, Auto};

/// Time after which a hub that starts serves the last good policies, while the changes since then are being checked.
const INTERIM_AFTER: Duration = Duration::from_secs(2);
/// Maximum time in which runs of the analysis begin to find out whether policies read too much, for one check.
const WEIGH_MAX: Duration = Duration::from_secs(30);
/// The same, to find out what accepted policies read. Edits wait so long; the rest is found beside them.
const ANALYSE_MAX: Duration = Duration::from_secs(15);
/// Pause between checks that publish what was found meanwhile.
const PUBLISH_AFTER: Duration = Duration::from_secs(60);
/// Name of the fields in [`Readiness`].
const FIELDS: &str = "--fields auto";

/// Checks policies until the writer is gone. Where the compiler fails and no change is the cause, all stays as it was,
/// and what is newest then is checked.
pub async fn check(
    compiler: Compiler,
    mut jobs: mpsc::UnboundedReceiver<Arc<Candidates>>,
    said: mpsc::Sender<Said>,
    mut auto: Option<Auto>,
    spec: Arc<Spec>,
    bundle: Arc<Bundle>,
    readiness: Readiness,
) {
    // Another document of the bundle may have asked for these.
    if auto.is_none() {
        readiness.problem(auto::SUBJECT, None);
    }
    if spec.fields.follows.is_nothing() {
        readiness.problem(FIELDS, None);
    }
    let mut is_first = true;
    let mut analyst = Analyst::new(ANALYSE_MAX);
    // The last answer with gaps, and a better one.
    let mut open: Option<(Question, Gaps)> = None;
    let mut improved: Option<(Question, Analysis)> = None;
    loop {
        let better = async {
            match &open {
                Some((question, gaps)) => question.ask_until_improved(gaps, &compiler, &mut analyst).await,
                None => std::future::pending().await,
            }
        };
        let candidates = tokio::select! {
            biased;
            candidates = jobs.recv() => candidates,
            better = better => {
                improved = open.take().map(|(question, _)| (question, better));
                if said.send(Said::Recheck).await.is_err() {
                    return;
                }
                continue;
            }
        };
        let Some(candidates) = candidates else { return };
        open = None;
        let started = Instant::now();
        analyst.allow(WEIGH_MAX);
        // What was good before a restart is served while what changed since takes long to check.
        let is_restart = std::mem::take(&mut is_first) && candidates.values().any(|unit| unit.good.is_some());
        let settled = tokio::select! {
            settled = settle(&compiler, &candidates, &spec, &bundle, &mut analyst) => settled,
            () = tokio::time::sleep(INTERIM_AFTER), if is_restart => {
                match settle(&compiler, &unchanged(&candidates), &spec, &bundle, &mut analyst).await {
                    Ok(good) if good.failure.is_none() => {
                        let open = Outcome::unsettled(&candidates).untried;
                        Ok(Outcome { untried: open, progress: Progress::Good, ..good })
                    }
                    _ => settle(&compiler, &candidates, &spec, &bundle, &mut analyst).await,
                }
            }
        };
        let (mut outcome, failure) = match settled {
            Ok(mut outcome) => {
                let failure = outcome.failure.take().map(|fault| fault.message);
                (outcome, failure)
            }
            Err(error) => (Outcome::unsettled(&candidates), Some(error.to_string())),
        };
        if let Some(error) = failure {
            tracing::warn!(error, "cannot check the policies");
            readiness.failing(POLICIES, &error);
            tokio::time::sleep(CHECK_RETRY).await;
            if said.send(Said::Checked { outcome, reads: None, resources: None }).await.is_err() {
                return;
            }
            continue;
        }
        readiness.problem(POLICIES, None);
        if let Compiler::Syntax(_) = compiler {
            for key in outcome.accepted.keys() {
                let warning = Fault::new("unchecked", "parsed, not compiled: the hub found no opa program");
                outcome.warnings.entry(key.clone()).or_default().push(warning);
            }
        }
        let took = started.elapsed();
        tracing::debug!(checks = outcome.checks, ?took, "checked the policies");
        let question = Question {
            accepted: outcome.accepted.clone(),
            path: auto.as_ref().map(|auto| auto.path().clone()),
            entrypoints: (!spec.fields.follows.is_nothing()).then(|| spec.fields.entrypoints.clone()),
        };
        analyst.allow(if outcome.progress == Progress::Good { INTERIM_AFTER } else { ANALYSE_MAX });
        let analysis = match improved.take() {
            Some((same, better)) if same.accepted == question.accepted => better,
            _ => question.ask(&compiler, &mut analyst).await,
        };
        // What policies read comes before them, and goes after them.
        let mut resources = None;
        if let (Some(auto), Some(names)) = (&mut auto, &analysis.names) {
            resources = auto.reads(names, &readiness);
            if let Some(resources) = &resources {
                auto.widen(resources, &said).await;
            }
        }
        let reads = analysis.found.as_ref().map(|found| read_by(found, &mut outcome, &readiness));
        open = Some((question, analysis.gaps()));
        let resources = auto.as_mut().zip(resources).map(|(auto, resources)| auto.narrow(&resources));
        if said.send(Said::Checked { outcome, reads, resources }).await.is_err() {
            return;
        }
    }
}

/// Question after the data that the accepted modules read.
struct Question {
    accepted: BTreeMap<ObjectKey, Arc<Texts>>,
    /// Path below which names are asked for, where resources follow the policies.
    path: Option<DirPath>,
    /// Decisions, where fields follow the policies.
    entrypoints: Option<Vec<DirPath>>,
}

type Answer<T> = Result<Option<T>, check::Error>;

/// Answer to a [`Question`]; `None` for what was not asked.
struct Analysis {
    names: Option<Answer<Names>>,
    found: Option<Answer<Found>>,
}

/// Parts of a question without an answer.
#[derive(Default)]
struct Gaps {
    /// Whether OPA could not be asked.
    has_failed: bool,
    /// Decisions for which the time was too short.
    left: BTreeSet<(Part, DirPath)>,
    /// Decisions that failed by themselves.
    unknown: BTreeSet<(Part, DirPath)>,
}

#[derive(PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Part {
    /// Names below the path.
    Names,
    /// Fields.
    Fields,
    /// Data that a decision with unknown fields names.
    Data,
}

impl Question {
    async fn ask(&self, compiler: &Compiler, analyst: &mut Analyst) -> Analysis {
        let modules = self.accepted.values().flat_map(|texts| &texts.modules).collect();
        let (mut names, mut found) = (None, None);
        if let Some(path) = &self.path {
            names = Some(analyst.names(compiler, &modules, path).await);
        }
        if let Some(entrypoints) = &self.entrypoints {
            found = Some(analyst.reads(compiler, &modules, entrypoints).await);
        }
        Analysis { names, found }
    }

    /// Asks again until an answer fills some of these gaps: soon where the time was too short, else later.
    async fn ask_until_improved(&self, first: &Gaps, compiler: &Compiler, analyst: &mut Analyst) -> Analysis {
        let since = Instant::now();
        let mut pause = first.pause(Duration::ZERO);
        loop {
            tokio::time::sleep(pause).await;
            let started = Instant::now();
            analyst.allow(ANALYSE_MAX);
            let analysis = self.ask(compiler, analyst).await;
            let gaps = analysis.gaps();
            let is_due = gaps.left.is_empty() || since.elapsed() >= PUBLISH_AFTER;
            if is_due && gaps.is_better_than(first) {
                return analysis;
            }
            pause = gaps.pause(started.elapsed());
        }
    }
}

impl Analysis {
    fn gaps(&self) -> Gaps {
        let has_failed = matches!(self.names, Some(Err(_))) || matches!(self.found, Some(Err(_)));
        let mut gaps = Gaps { has_failed, ..Gaps::default() };
        if let Some(Ok(Some(names))) = &self.names {
            gaps.left.extend(names.left.iter().map(|package| (Part::Names, package.clone())));
            gaps.unknown.extend(names.unknown.keys().map(|package| (Part::Names, package.clone())));
        }
        if let Some(Ok(Some(found))) = &self.found {
            gaps.left.extend(found.left.iter().map(|decision| (Part::Fields, decision.clone())));
            gaps.unknown.extend(found.opaque.keys().map(|decision| (Part::Fields, decision.clone())));
            gaps.unknown.extend(found.unnamed.iter().map(|decision| (Part::Data, decision.clone())));
        }
        gaps
    }
}

impl Gaps {
    /// Whether something is known that was not.
    fn is_better_than(&self, first: &Self) -> bool {
        let is_open = |gap| self.left.contains(gap) || self.unknown.contains(gap);
        let is_filled = |gap| !is_open(gap);
        // A decision that failed once all of its time was given is known to fail.
        let is_decided = |gap| !self.left.contains(gap);
        !self.has_failed
            && (first.has_failed || first.left.iter().any(is_decided) || first.unknown.iter().any(is_filled))
    }

    /// Time until the question is asked again; `took`: the time of the last answer.
    fn pause(&self, took: Duration) -> Duration {
        if self.has_failed {
            CHECK_RETRY.max(took)
        } else if !self.left.is_empty() {
            // Others have the machine as long.
            took
        } else if self.unknown.is_empty() {
            Duration::MAX
        } else {
            RETRY_AFTER
        }
    }
}

/// The same candidates without any change.
fn unchanged(candidates: &Candidates) -> Candidates {
    let unchanged = candidates.iter().map(|(key, candidate)| {
        let good = candidate.good.clone();
        (key.clone(), Candidate { good: good.clone(), wanted: good, refused: None })
    });
    unchanged.collect()
}

/// Accepts as many candidates as compile together and keep the bundle within its size.
async fn settle(
    compiler: &Compiler,
    candidates: &Candidates,
    spec: &Spec,
    bundle: &Bundle,
    analyst: &mut Analyst,
) -> Result<Outcome, check::Error> {
    let entrypoints = &spec.fields.entrypoints[..];
    let scales = Scales::new(spec, bundle);
    let mut limits =
        scales.map(move |scales| Limits { scales, compiler, candidates, entrypoints, analyst, before: None });
    let check = async |selection: &Selection| {
        let mut faults = compiler.check(selection).await?;
        if let Some(limits) = &mut limits
            && faults.iter().all(settle::is_of_tests)
        {
            faults.extend(limits.check(selection).await?);
        }
        Ok(faults)
    };
    settle::settle(candidates, check).await
}

/// Policies that read more than the bundle may hold.
struct Limits<'a> {
    scales: Scales<'a>,
    compiler: &'a Compiler,
    candidates: &'a Candidates,
    entrypoints: &'a [DirPath],
    analyst: &'a mut Analyst,
    /// With what was good before.
    before: Option<usize>,
}

impl Limits<'_> {
    async fn check(&mut self, selection: &Selection<'_>) -> Result<Vec<Fault>, check::Error> {
        // What was good is not refused for what an analysis finds of it this time.
        if !selection.values().any(|selected| selected.is_changed) {
            return Ok(Vec::new());
        }
        let modules = selection.values().flat_map(|selected| &selected.texts.modules).collect();
        let Some(bytes) = self.weigh(&modules).await?.filter(|bytes| !self.scales.fits(*bytes)) else {
            return Ok(Vec::new());
        };
        let good = self.candidates.values().filter_map(|candidate| candidate.good.as_deref());
        if self.before.is_none() {
            self.before = self.weigh(&good.flat_map(|texts| &texts.modules).collect()).await?;
        }
        let fault = self.before.and_then(|before| self.scales.fault(bytes, before));
        Ok(fault.map(|message| Fault::new("over_limit", message)).into_iter().collect())
    }

    /// Bytes of the data for these modules; `None` where the time is over before they are known: no policy is refused
    /// for what is not known.
    async fn weigh(&mut self, modules: &Modules<'_>) -> Result<Option<usize>, check::Error> {
        loop {
            let found = self.analyst.reads(self.compiler, modules, self.entrypoints).await?;
            let is_known = found.as_ref().is_none_or(|found| found.left.is_empty());
            let bytes = self.scales.weigh(&found.map_or_else(Reads::everything, |found| found.reads));
            if is_known || self.scales.fits(bytes) {
                return Ok(Some(bytes));
            }
            if self.analyst.is_spent() {
                return Ok(None);
            }
        }
    }
}

/// The data that the accepted modules read: all of it where OPA cannot be asked, which is a problem of the bundle. A
/// ConfigMap with a decision that cannot be analysed, or without a rule that an entrypoint uses, is warned.
fn read_by(
    found: &Result<Option<Found>, check::Error>,
    outcome: &mut Outcome,
    readiness: &Readiness,
) -> Reads {
    let problem = match found {
        Ok(Some(found)) => {
            let left = found.left.len();
            (left > 0)
                .then(|| format!("the analysis goes on: what {left} packages name travels whole until then"))
        }
        Ok(None) => Some("it needs a real OPA: give --opa-bin; until then whole objects travel".to_owned()),
        Err(error) => Some(format!("whole objects travel: {error}")),
    };
    if let Some(problem) = problem.as_ref().filter(|problem| readiness.is_news(FIELDS, problem)) {
        tracing::warn!("{FIELDS}: {problem}");
    }
    readiness.problem(FIELDS, problem);
    let Ok(Some(found)) = found else { return Reads::everything() };
    for (decision, reason) in &found.opaque {
        for (key, texts) in &outcome.accepted {
            if texts.modules.values().any(|module| decision.is_within(&module.root)) {
                let message = format!(
                    "the fields that data{decision} reads cannot be found, so objects that it names travel whole: {reason}"
                );
                outcome.warnings.entry(key.clone()).or_default().push(Fault::new("fields_unknown", message));
            }
        }
    }
    for (key, texts) in &outcome.accepted {
        for id in texts.modules.keys().filter(|id| found.unused.contains(*id)) {
            let message = format!(
                "no entrypoint uses {id}, so fields that only its rules read are left out; annotate the rules that are \
                 asked for with \"entrypoint: true\""
            );
            outcome.warnings.entry(key.clone()).or_default().push(Fault::new("not_an_entrypoint", message));
        }
    }
    found.reads.clone()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_better_answer_has_policies_checked_again() {
        let of = |packages: &[&str]| {
            packages.iter().map(|package| (Part::Fields, package.parse().unwrap())).collect::<BTreeSet<_>>()
        };
        let gaps = |has_failed, left: &[&str], unknown: &[&str]| Gaps {
            has_failed,
            left: of(left),
            unknown: of(unknown),
        };
        for (first, second, is_better) in [
            (gaps(true, &[], &[]), gaps(false, &[], &[]), true),
            (gaps(true, &[], &[]), gaps(false, &["/a"], &[]), true),
            (gaps(true, &[], &[]), gaps(true, &[], &[]), false),
            (gaps(false, &["/a", "/b"], &[]), gaps(false, &["/a", "/b"], &[]), false),
            (gaps(false, &["/a", "/b"], &[]), gaps(false, &["/a"], &[]), true),
            (gaps(false, &["/a"], &[]), gaps(false, &[], &["/a"]), true),
            (gaps(false, &["/a"], &[]), gaps(true, &[], &[]), false),
            (gaps(false, &[], &["/a"]), gaps(false, &[], &["/a"]), false),
            (gaps(false, &[], &["/a"]), gaps(false, &[], &["/a", "/b"]), false),
            (gaps(false, &[], &["/a"]), gaps(false, &["/a"], &[]), false),
            (gaps(false, &[], &["/a", "/b"]), gaps(false, &["/c"], &["/b"]), true),
        ] {
            assert_eq!(second.is_better_than(&first), is_better, "{:?}, {:?}", first.unknown, second.unknown);
        }
    }
}
