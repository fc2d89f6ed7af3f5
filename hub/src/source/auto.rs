//! Resources that policies read and no flag names: feeds that come with the first policy that reads them and go with
//! the last.

use std::collections::{BTreeMap, BTreeSet};

use opa_hub_proto::path::{DirPath, is_segment};
use tokio::sync::watch;

use crate::config::{AUTO_FEEDS_MAX, AUTO_LIST_MAX};
use crate::model::{Content, Feed, FeedId, Resource, Scope};
use crate::policy::check::{Compiler, Modules};
use crate::readiness::Readiness;

/// What [`Readiness`] calls it.
const SUBJECT: &str = "--replicate-auto";

/// The feeds that are wanted now, for the source.
pub type Wanted = watch::Receiver<BTreeMap<FeedId, Feed>>;

/// See the module's text.
pub struct Auto {
    path: DirPath,
    scope: Scope,
    /// Resources that flags name, and that are always there.
    given: BTreeSet<String>,
    /// Every name that was ever wanted has its own id.
    ids: BTreeMap<String, FeedId>,
    first: usize,
    wanted: watch::Sender<BTreeMap<FeedId, Feed>>,
    settled: watch::Receiver<BTreeSet<FeedId>>,
}

impl Auto {
    /// Below `path`, leaving out the `ignored` namespaces, beside the feeds that flags name. `settled`: the feeds that
    /// nobody need wait for.
    pub fn new(
        path: DirPath,
        ignored: Vec<String>,
        feeds: &[Feed],
        settled: watch::Receiver<BTreeSet<FeedId>>,
    ) -> Self {
        let given = feeds.iter().filter(|feed| matches!(feed.content, Content::Resource(_)));
        Self {
            path,
            scope: Scope::Namespaces { ignored },
            given: given.map(|feed| feed.resource.plural.clone()).collect(),
            ids: BTreeMap::new(),
            first: feeds.len(),
            wanted: watch::Sender::default(),
            settled,
        }
    }

    /// What is wanted, from now on.
    pub fn wanted(&self) -> Wanted {
        self.wanted.subscribe()
    }

    /// The resources that `modules` read; none when that cannot be told now, which is said.
    pub async fn reads(
        &self,
        compiler: &Compiler,
        modules: &Modules<'_>,
        readiness: &Readiness,
    ) -> Option<BTreeSet<String>> {
        let root: Vec<_> = self.path.relative().split('/').collect();
        let (problem, reads) = match compiler.reads(modules, &root).await {
            Err(error) => (Some(error.to_string()), None),
            Ok(None) => (Some("it needs a real OPA: give --opa-bin".into()), None),
            Ok(Some(mut reads)) => {
                let place = self.path.relative().replace('/', ".");
                let dynamic = format!(
                    "a policy reads data.{place} by names that only an input decides: give --replicate for those"
                );
                let dynamic = reads.remove("*").then_some(dynamic);
                reads.retain(|name| is_segment(name) && !self.given.contains(name));
                let many = format!("policies read {} resources, more than {AUTO_FEEDS_MAX}", reads.len());
                let many = (reads.len() > AUTO_FEEDS_MAX).then_some(many);
                (many.or(dynamic), Some(reads.into_iter().take(AUTO_FEEDS_MAX).collect()))
            }
        };
        if let Some(problem) = problem.as_ref().filter(|problem| readiness.is_news(SUBJECT, problem)) {
            tracing::warn!("{SUBJECT}: {problem}");
        }
        readiness.problem(SUBJECT, problem);
        reads
    }

    /// Asks for these resources too, and waits until they are there, or cannot be had now.
    pub async fn widen(&mut self, reads: &BTreeSet<String>) {
        let mut asked = BTreeSet::new();
        let mut wanted = self.wanted.borrow().clone();
        for name in reads {
            let next = FeedId(self.first + self.ids.len());
            let id = *self.ids.entry(name.clone()).or_insert(next);
            if wanted.contains_key(&id) {
                continue;
            }
            let place = self.path.join(name).expect("a name that was read is a segment");
            tracing::info!(resource = name, "a policy reads it: replicating it");
            let feed = Feed {
                resource: Resource::named(name),
                scope: self.scope.clone(),
                labels: Vec::new(),
                content: Content::Resource(place),
            };
            wanted.insert(id, feed);
            asked.insert(id);
        }
        if asked.is_empty() {
            return;
        }
        self.wanted.send_replace(wanted);
        let settled = self.settled.wait_for(|settled| settled.is_superset(&asked));
        if tokio::time::timeout(AUTO_LIST_MAX, settled).await.is_err() {
            tracing::warn!("what policies read is not listed yet: going on without it");
        }
    }

    /// Gives up whatever is not among these.
    pub fn narrow(&mut self, reads: &BTreeSet<String>) {
        let ids: BTreeSet<_> = reads.iter().filter_map(|name| self.ids.get(name)).copied().collect();
        self.wanted.send_if_modified(|wanted| {
            let before = wanted.len();
            wanted.retain(|id, feed| {
                let kept = ids.contains(id);
                if !kept {
                    tracing::info!(resource = %feed.resource, "no policy reads it any more: dropping it");
                }
                kept
            });
            wanted.len() < before
        });
    }
}
