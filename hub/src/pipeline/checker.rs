//! Policy check, concurrent with the writer. Finds the data that policies read.
//!
//! An edit waits up to 15 s for analyses that begin and 30 s more to measure `maxBytes`. The rest is analysed next to
//! later edits.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use opa_hub_proto::path::DirPath;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::bundle::Bundle;
use crate::health::Health;
use crate::model::ObjectKey;
use crate::pipeline::auto_replication::{self, Auto};
use crate::pipeline::quota_check::QuotaCheck;
use crate::pipeline::{POLICIES, WriterCommand};
use crate::policy::candidate::{Candidate, Candidates, ModuleSet, Progress, Resolution, Selection};
use crate::policy::check::{self, Compiler, Modules};
use crate::policy::dataflow::ReadSet;
use crate::policy::divide::RETRY_AFTER;
use crate::policy::reads::{Analyst, Found, Names};
use crate::policy::resolve;
use crate::policy::verdict::Diagnostic;
use crate::spec::BundleSpec;

/// Pause after a failed OPA run.
pub(super) const CHECK_RETRY: Duration = Duration::from_secs(2);

/// Time after which a starting hub serves the last good policies.
const INTERIM_AFTER: Duration = Duration::from_secs(2);
/// Maximum time to start analyses that measure data.
const QUOTA_ANALYSIS_MAX: Duration = Duration::from_secs(30);
/// Maximum time that edits wait for the analysis.
const ANALYSIS_MAX: Duration = Duration::from_secs(15);
/// Time after which a better but incomplete analysis is published.
const PUBLISH_INTERVAL: Duration = Duration::from_secs(60);
const FIELDS: &str = "--fields auto";

fn warn_unchecked(outcome: &mut Resolution) {
    for key in outcome.accepted.keys() {
        let message = "parsed, not compiled: no opa program was found; set --opa-bin";
        outcome.warnings.entry(key.clone()).or_default().push(Diagnostic::new("unchecked", message));
    }
}

/// Checks policies until the writer stops, and retries if the compiler fails.
pub async fn check(
    compiler: Compiler,
    mut jobs: mpsc::UnboundedReceiver<Arc<Candidates>>,
    commands: mpsc::Sender<WriterCommand>,
    mut auto: Option<Auto>,
    spec: Arc<BundleSpec>,
    bundle: Arc<Bundle>,
    readiness: Health,
) {
    // Reported by an earlier document.
    if auto.is_none() {
        readiness.problem(auto_replication::SUBJECT, None);
    }
    if spec.fields.follows.is_nothing() {
        readiness.problem(FIELDS, None);
    }
    let mut is_first = true;
    let mut analyst = Analyst::new(ANALYSIS_MAX);
    let mut last: Option<(ReadsQuery, Gaps)> = None;
    let mut improved: Option<(ReadsQuery, Analysis)> = None;
    loop {
        let better = async {
            match &last {
                Some((query, gaps)) => query.run_until_improved(gaps, &compiler, &mut analyst).await,
                None => std::future::pending().await,
            }
        };
        let candidates = tokio::select! {
            biased;
            candidates = jobs.recv() => candidates,
            better = better => {
                improved = last.take().map(|(query, _)| (query, better));
                if commands.send(WriterCommand::Recheck).await.is_err() {
                    return;
                }
                continue;
            }
        };
        let Some(candidates) = candidates else { return };
        last = None;
        let started = Instant::now();
        analyst.allow(QUOTA_ANALYSIS_MAX);
        // A long check must not delay the last good policies.
        let is_restart = std::mem::take(&mut is_first) && candidates.values().any(|unit| unit.good.is_some());
        let resolved = tokio::select! {
            resolved = resolve(&compiler, &candidates, &spec, &bundle, &mut analyst) => resolved,
            () = tokio::time::sleep(INTERIM_AFTER), if is_restart => {
                match resolve(&compiler, &last_good_only(&candidates), &spec, &bundle, &mut analyst).await {
                    Ok(good) if good.failure.is_none() => {
                        let untried = Resolution::unsettled(&candidates).untried;
                        Ok(Resolution { untried, progress: Progress::Good, ..good })
                    }
                    _ => resolve(&compiler, &candidates, &spec, &bundle, &mut analyst).await,
                }
            }
        };
        let (mut outcome, failure) = match resolved {
            Ok(mut outcome) => {
                let failure = outcome.failure.take().map(|fault| fault.message);
                (outcome, failure)
            }
            Err(error) => (Resolution::unsettled(&candidates), Some(error.to_string())),
        };
        if let Some(error) = failure {
            tracing::warn!(bundle = bundle.name, error, "policy check failed, retrying");
            readiness.failing(POLICIES, &error);
            tokio::time::sleep(CHECK_RETRY).await;
            if commands
                .send(WriterCommand::ApplyCheck { outcome, reads: None, resources: None })
                .await
                .is_err()
            {
                return;
            }
            continue;
        }
        readiness.problem(POLICIES, None);
        if let Compiler::Syntax(_) = compiler {
            warn_unchecked(&mut outcome);
        }
        let elapsed = started.elapsed();
        tracing::debug!(bundle = bundle.name, checks = outcome.checks, ?elapsed, "policies checked");
        let query = ReadsQuery {
            accepted: outcome.accepted.clone(),
            path: auto.as_ref().map(|auto| auto.path().clone()),
            entrypoints: (!spec.fields.follows.is_nothing()).then(|| spec.fields.entrypoints.clone()),
        };
        analyst.allow(if outcome.progress == Progress::Good { INTERIM_AFTER } else { ANALYSIS_MAX });
        let analysis = match improved.take() {
            Some((previous, better)) if previous.accepted == query.accepted => better,
            _ => query.run(&compiler, &mut analyst).await,
        };
        // Resources are added before the policies that read them (I10).
        let mut resources = None;
        if let (Some(auto), Some(names)) = (&mut auto, &analysis.names) {
            resources = auto.reads(names, &readiness);
            if let Some(resources) = &resources {
                auto.widen(resources, &commands).await;
            }
        }
        let reads = analysis.found.as_ref().map(|found| report_reads(found, &mut outcome, &readiness));
        last = Some((query, analysis.gaps()));
        let resources = auto.as_mut().zip(resources).map(|(auto, resources)| auto.narrow(&resources));
        if commands.send(WriterCommand::ApplyCheck { outcome, reads, resources }).await.is_err() {
            return;
        }
    }
}

struct ReadsQuery {
    accepted: BTreeMap<ObjectKey, Arc<ModuleSet>>,
    /// Path of auto-replicated resources.
    path: Option<DirPath>,
    /// `None` if fields do not follow policies.
    entrypoints: Option<Vec<DirPath>>,
}

type QueryResult<T> = Result<Option<T>, check::Error>;

/// Results of a [`ReadsQuery`]; `None` if not requested.
struct Analysis {
    names: Option<QueryResult<Names>>,
    found: Option<QueryResult<Found>>,
}

#[derive(Default)]
struct Gaps {
    /// Whether OPA did not run.
    has_failed: bool,
    timed_out: BTreeSet<(ArchiveKind, DirPath)>,
    failed: BTreeSet<(ArchiveKind, DirPath)>,
}

#[derive(PartialEq, Eq, PartialOrd, Ord, Debug)]
enum ArchiveKind {
    /// Names below the path.
    Names,
    FieldMask,
    /// Data that a failed decision names.
    Data,
}

impl ReadsQuery {
    async fn run(&self, compiler: &Compiler, analyst: &mut Analyst) -> Analysis {
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

    /// Repeats the query until a result fills some of these gaps.
    async fn run_until_improved(&self, first: &Gaps, compiler: &Compiler, analyst: &mut Analyst) -> Analysis {
        let since = Instant::now();
        let mut pause = first.pause(Duration::ZERO);
        loop {
            tokio::time::sleep(pause).await;
            let started = Instant::now();
            analyst.allow(ANALYSIS_MAX);
            let analysis = self.run(compiler, analyst).await;
            let gaps = analysis.gaps();
            let is_due = gaps.timed_out.is_empty() || since.elapsed() >= PUBLISH_INTERVAL;
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
            gaps.timed_out.extend(names.left.iter().map(|package| (ArchiveKind::Names, package.clone())));
            gaps.failed.extend(names.unknown.keys().map(|package| (ArchiveKind::Names, package.clone())));
        }
        if let Some(Ok(Some(found))) = &self.found {
            gaps.timed_out
                .extend(found.left.iter().map(|decision| (ArchiveKind::FieldMask, decision.clone())));
            gaps.failed
                .extend(found.opaque.keys().map(|decision| (ArchiveKind::FieldMask, decision.clone())));
            gaps.failed.extend(found.unnamed.iter().map(|decision| (ArchiveKind::Data, decision.clone())));
        }
        gaps
    }
}

impl Gaps {
    fn is_better_than(&self, first: &Self) -> bool {
        let is_open = |gap| self.timed_out.contains(gap) || self.failed.contains(gap);
        let is_filled = |gap| !is_open(gap);
        // A failure with enough time is a result.
        let is_decided = |gap| !self.timed_out.contains(gap);
        !self.has_failed
            && (first.has_failed
                || first.timed_out.iter().any(is_decided)
                || first.failed.iter().any(is_filled))
    }

    /// Pause after a run of `elapsed`.
    fn pause(&self, elapsed: Duration) -> Duration {
        if self.has_failed {
            CHECK_RETRY.max(elapsed)
        } else if !self.timed_out.is_empty() {
            // The analysis uses at most half of the time.
            elapsed
        } else if self.failed.is_empty() {
            Duration::MAX
        } else {
            RETRY_AFTER
        }
    }
}

fn last_good_only(candidates: &Candidates) -> Candidates {
    let last_good = candidates.iter().map(|(key, candidate)| {
        let good = candidate.good.clone();
        (key.clone(), Candidate { good: good.clone(), wanted: good, refused: None })
    });
    last_good.collect()
}

async fn resolve(
    compiler: &Compiler,
    candidates: &Candidates,
    spec: &BundleSpec,
    bundle: &Bundle,
    analyst: &mut Analyst,
) -> Result<Resolution, check::Error> {
    let entrypoints = &spec.fields.entrypoints[..];
    let scales = QuotaCheck::new(spec, bundle);
    let mut size_check = scales.map(move |scales| SizeCheck {
        scales,
        compiler,
        candidates,
        entrypoints,
        analyst,
        last_good_bytes: None,
    });
    let check = async |selection: &Selection| {
        let mut faults = compiler.check(selection).await?;
        if let Some(size_check) = &mut size_check
            && faults.iter().all(crate::policy::candidate::is_of_tests)
        {
            faults.extend(size_check.check(selection).await?);
        }
        Ok(faults)
    };
    resolve::settle(candidates, check).await
}

/// Rejects policies whose reads make the data exceed `maxBytes`.
struct SizeCheck<'a> {
    scales: QuotaCheck<'a>,
    compiler: &'a Compiler,
    candidates: &'a Candidates,
    entrypoints: &'a [DirPath],
    analyst: &'a mut Analyst,
    last_good_bytes: Option<usize>,
}

impl SizeCheck<'_> {
    async fn check(&mut self, selection: &Selection<'_>) -> Result<Vec<Diagnostic>, check::Error> {
        // Another analysis must not reject last good policies.
        if !selection.values().any(|selected| selected.is_changed) {
            return Ok(Vec::new());
        }
        let modules = selection.values().flat_map(|selected| &selected.texts.modules).collect();
        let Some(bytes) = self.measure(&modules).await?.filter(|bytes| !self.scales.fits(*bytes)) else {
            return Ok(Vec::new());
        };
        let good = self.candidates.values().filter_map(|candidate| candidate.good.as_deref());
        if self.last_good_bytes.is_none() {
            self.last_good_bytes = self.measure(&good.flat_map(|texts| &texts.modules).collect()).await?;
        }
        let fault = self.last_good_bytes.and_then(|before| self.scales.fault(bytes, before));
        Ok(fault.map(|message| Diagnostic::new("over_limit", message)).into_iter().collect())
    }

    /// Bytes of the data; `None` on timeout, since an estimate must not reject policies.
    async fn measure(&mut self, modules: &Modules<'_>) -> Result<Option<usize>, check::Error> {
        loop {
            let found = self.analyst.reads(self.compiler, modules, self.entrypoints).await?;
            let is_known = found.as_ref().is_none_or(|found| found.left.is_empty());
            let bytes = self.scales.weigh(&found.map_or_else(ReadSet::everything, |found| found.reads));
            if is_known || self.scales.fits(bytes) {
                return Ok(Some(bytes));
            }
            if self.analyst.is_spent() {
                return Ok(None);
            }
        }
    }
}

/// Returns the read data: all if OPA did not run.
fn report_reads(
    found: &Result<Option<Found>, check::Error>,
    outcome: &mut Resolution,
    readiness: &Health,
) -> ReadSet {
    let problem = match found {
        Ok(Some(found)) => {
            let left = found.left.len();
            (left > 0).then(|| {
                format!("field analysis in progress: objects that {left} packages name are served whole")
            })
        }
        Ok(None) => Some(
            "field analysis failed: no opa program, so whole objects are served; set --opa-bin".to_owned(),
        ),
        Err(error) => Some(format!("field analysis failed: {error}; whole objects are served")),
    };
    if let Some(problem) = problem.as_ref().filter(|problem| readiness.is_news(FIELDS, problem)) {
        tracing::warn!(reason = problem, "field analysis incomplete");
    }
    readiness.problem(FIELDS, problem);
    let Ok(Some(found)) = found else { return ReadSet::everything() };
    for (decision, reason) in &found.opaque {
        for (key, texts) in &outcome.accepted {
            if texts.modules.values().any(|module| decision.is_within(&module.root)) {
                let message = format!(
                    "field analysis of data{decision} failed: {reason}; the objects that the decision names are served whole"
                );
                outcome
                    .warnings
                    .entry(key.clone())
                    .or_default()
                    .push(Diagnostic::new("fields_unknown", message));
            }
        }
    }
    for (key, texts) in &outcome.accepted {
        for id in texts.modules.keys().filter(|id| found.unused.contains(*id)) {
            let message = format!(
                "no entrypoint uses {id}: fields that only its rules read are not served; annotate queried rules with \
                 \"entrypoint: true\""
            );
            outcome
                .warnings
                .entry(key.clone())
                .or_default()
                .push(Diagnostic::new("not_an_entrypoint", message));
        }
    }
    found.reads.clone()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_improve_when_one_is_filled() {
        let fields = |packages: &[&str]| {
            packages
                .iter()
                .map(|package| (ArchiveKind::FieldMask, package.parse().unwrap()))
                .collect::<BTreeSet<_>>()
        };
        let gaps = |has_failed, timed_out: &[&str], failed: &[&str]| Gaps {
            has_failed,
            timed_out: fields(timed_out),
            failed: fields(failed),
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
            assert_eq!(second.is_better_than(&first), is_better, "{:?}, {:?}", first.failed, second.failed);
        }
    }
}
