//! One bundle of a hub: its writer and a fake checker.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::Arc;

use opa_hub::bundle::Bundle;
use opa_hub::model::{Content, NamespaceSelector, Resource, WatchSpec};
use opa_hub::pipeline::WriterCommand;
use opa_hub::policy::candidate::{Candidates, Resolution, Selection};
use opa_hub::policy::dataflow::ReadSet;
use opa_hub::policy::registry::LastGood;
use opa_hub::policy::resolve::settle;
use opa_hub::policy::verdict::{Diagnostic, Location};
use opa_hub::store::Store;
use opa_hub_proto::path::DirPath;
use opa_hub_proto::revision::Revision;
use tokio::sync::oneshot;

use super::document::Document;
use super::source::{Kind, WRONG};
use super::{Seen, World, reads};
use crate::invariants::Writer;

pub(super) struct Written {
    pub(super) document: Document,
    writer: Writer,
    job: Option<Arc<Candidates>>,
    pub(super) fails: bool,
    /// Whether the analysis fails.
    pub(super) plan_fails: bool,
    /// Whether the last analysis failed.
    reads_all: bool,
    /// Kinds replicated because policies read them.
    auto: BTreeSet<Kind>,
    /// Accepted outcome, until its resources are available.
    opening: Option<(Resolution, oneshot::Receiver<()>)>,
}

impl Written {
    pub(super) fn start(document: Document, good: LastGood, store: &Arc<Store>) -> Self {
        let writer = Writer::with_store(&document.spec(), Arc::clone(store), good);
        Self {
            document,
            writer,
            job: None,
            fails: false,
            plan_fails: false,
            reads_all: false,
            auto: BTreeSet::new(),
            opening: None,
        }
    }

    pub(super) fn bundle(&self) -> &Arc<Bundle> {
        &self.writer.bundle
    }

    /// Last good modules; `None` before the first check.
    pub(super) fn good(&self) -> Option<LastGood> {
        self.writer.ends.good.borrow().clone()
    }

    pub(super) fn is_live(&self) -> bool {
        self.bundle().head().borrow().is_some()
    }

    fn revision(&self) -> Option<Revision> {
        self.bundle().head().borrow().as_ref().map(|head| head.view.revision)
    }

    /// Publishes up to `most` pending changes; `None` for the default limit.
    pub(super) fn commit(&mut self, most: Option<usize>) {
        match most {
            Some(most) => self.writer.pipeline.commit_some(most),
            None => self.writer.pipeline.commit(),
        }
    }

    /// Removes fields of older policies, though agents may not have replaced those.
    pub(super) fn narrow(&mut self, seen: &mut Seen) {
        let before = self.revision();
        self.writer.pipeline.narrow();
        seen.add_if(self.revision() != before, "field removals");
        self.commit(None);
    }

    /// Advances the check. Returns whether anything changed.
    pub(super) fn check(&mut self, seen: &mut Seen) -> bool {
        if let Some((outcome, mut settled)) = self.opening.take() {
            if matches!(settled.try_recv(), Err(oneshot::error::TryRecvError::Empty)) {
                self.opening = Some((outcome, settled));
                return false;
            }
            self.accept(outcome, seen);
            return true;
        }
        self.job = self.job.take().or_else(|| self.writer.ends.jobs.try_recv().ok());
        if self.job.is_none() && self.reads_all && !self.plan_fails {
            seen.add("rechecks");
            self.writer.pipeline.hear(WriterCommand::Recheck);
            self.commit(None);
            self.job = self.writer.ends.jobs.try_recv().ok();
        }
        if self.fails {
            seen.add_if(self.job.is_some(), "checks without a compiler");
            return false;
        }
        let Some(candidates) = self.job.take() else { return false };
        let check = async |selection: &Selection| Ok::<_, Infallible>(faults(selection));
        let Ok(outcome) = futures::executor::block_on(settle(&candidates, check));
        seen.add_if(!outcome.faults.is_empty(), "rejected policies");
        let new = &self.replicated_for(&outcome) - &self.auto;
        if new.is_empty() {
            self.accept(outcome, seen);
        } else {
            self.open(&new, outcome, seen);
        }
        true
    }

    /// Kinds replicated for these policies.
    fn replicated_for(&self, outcome: &Resolution) -> BTreeSet<Kind> {
        let lines = lines(outcome);
        Kind::AUTO.into_iter().filter(|kind| self.document.is_auto && lines.contains(kind.plural())).collect()
    }

    /// Subscribes to newly read kinds.
    fn open(&mut self, new: &BTreeSet<Kind>, outcome: Resolution, seen: &mut Seen) {
        seen.add("watches opened");
        let (settled, until) = oneshot::channel();
        let feed = |kind: &Kind| WatchSpec {
            resource: Resource::named(kind.plural()),
            scope: NamespaceSelector::AllExcept { ignored: Vec::new() },
            labels: Vec::new(),
            content: Content::Resource(place(*kind)),
        };
        self.writer
            .pipeline
            .hear(WriterCommand::AddWatches { feeds: new.iter().map(feed).collect(), settled });
        self.commit(None);
        self.auto.extend(new);
        seen.add_if(new.iter().any(|kind| !opened(self.bundle()).contains(kind)), "path conflicts");
        self.opening = Some((outcome, until));
    }

    fn accept(&mut self, outcome: Resolution, seen: &mut Seen) {
        let replicated = self.replicated_for(&outcome);
        let lines = lines(&outcome);
        let is_cut = self.document.fields.is_some();
        self.reads_all = is_cut && self.plan_fails;
        seen.add_if(self.reads_all, "checks without a plan");
        let reads = if self.reads_all { ReadSet::everything() } else { reads::analyzed(&lines) };
        let reads = is_cut.then_some(reads);
        seen.add_if(!self.auto.is_subset(&replicated), "watches closed");
        self.auto = replicated;
        let resources = self.document.is_auto.then(|| self.auto.iter().map(|kind| place(*kind)).collect());
        self.writer.pipeline.hear(WriterCommand::ApplyCheck { outcome, reads, resources });
        self.commit(None);
    }

    /// Drains and checks everything.
    pub(super) fn settle(&mut self, world: &mut World) {
        (self.fails, self.plan_fails) = (false, false);
        for _ in 0..self.document.commits() {
            self.commit(None);
            while self.check(&mut world.seen) {}
        }
        self.narrow(&mut world.seen);
    }

    /// Checks that the bundle is live and idle.
    pub(super) fn check_settled(&self) {
        assert!(self.is_live(), "{} is not live", self.document.name);
        let is_idle = self.job.is_none() && self.opening.is_none();
        assert!(is_idle, "{} is idle", self.document.name);
        assert!(!self.reads_all, "{} has field masks", self.document.name);
    }
}

/// Kinds replicated because policies read them, without path conflicts.
pub(super) fn opened(bundle: &Bundle) -> BTreeSet<Kind> {
    let names: BTreeSet<_> = bundle.feeds.list().iter().map(|feed| feed.position_name.clone()).collect();
    Kind::AUTO.into_iter().filter(|kind| names.contains(kind.position_name())).collect()
}

fn place(kind: Kind) -> DirPath {
    kind.position_name().parse().unwrap()
}

/// Read lines of these policies.
fn lines(outcome: &Resolution) -> BTreeSet<&str> {
    let modules = outcome.accepted.values().flat_map(|texts| texts.modules.values());
    reads::lines(modules.map(|module| module.text.as_str()))
}

/// The fake checker's diagnostics.
fn faults(selection: &Selection) -> Vec<Diagnostic> {
    let modules = selection.values().flat_map(|selected| &selected.texts.modules);
    let wrong = modules.filter(|(_, module)| module.text.contains(WRONG));
    let fault = |id: &String| {
        let location = Location { file: id.clone(), row: 2, col: 1 };
        Diagnostic { location: Some(location), ..Diagnostic::new("rego_type_error", "wrong") }
    };
    wrong.map(|(id, _)| fault(id)).collect()
}
