//! Resources that policies read and no flag names: feeds that come with the first policy that reads them and go with
//! the last.

use std::collections::BTreeSet;

use opa_hub_proto::path::{DirPath, is_segment};
use tokio::sync::{mpsc, oneshot};

use crate::bundle::spec::AutoReplication;
use crate::config::{AUTO_FEEDS_MAX, AUTO_LIST_MAX};
use crate::model::{Content, Feed, Resource, Scope};
use crate::pipeline::Said;
use crate::policy::check::{Compiler, Modules};
use crate::policy::reads::{Analyst, Names};
use crate::readiness::Readiness;

/// What [`Readiness`] calls it.
pub const SUBJECT: &str = "--replicate-auto";

/// See the module's text.
pub struct Auto {
    path: DirPath,
    scope: Scope,
    /// Resources that the spec names, and that are always there.
    given: BTreeSet<String>,
    /// Those that are there because of policies.
    held: BTreeSet<String>,
}

impl Auto {
    /// As `replication` says, beside the `feeds` that the spec names.
    pub fn new(replication: AutoReplication, feeds: &[Feed]) -> Self {
        let given = feeds.iter().filter(|feed| feed.place().is_some());
        Self {
            path: replication.path,
            scope: Scope::Namespaces { ignored: replication.ignored },
            given: given.map(|feed| feed.resource.plural.clone()).collect(),
            held: BTreeSet::new(),
        }
    }

    /// The resources that `modules` read; `None` when that cannot be found now, which is a problem of the bundle. While
    /// some package's are unknown, no resource goes.
    pub async fn reads(
        &self,
        compiler: &Compiler,
        analyst: &mut Analyst,
        modules: &Modules<'_>,
        readiness: &Readiness,
    ) -> Option<BTreeSet<String>> {
        let (problem, reads) = match analyst.names(compiler, modules, &self.path).await {
            Err(error) => (Some(error.to_string()), None),
            Ok(None) => (Some("it needs a real OPA: give --opa-bin".into()), None),
            Ok(Some(Names { mut names, is_dynamic, unknown })) => {
                let place = self.path.relative().replace('/', ".");
                names.retain(|name| is_segment(name) && !self.given.contains(name));
                let many = names.len() > AUTO_FEEDS_MAX;
                let problem = if many {
                    Some(format!("policies read {} resources, more than {AUTO_FEEDS_MAX}", names.len()))
                } else if is_dynamic {
                    Some(format!(
                        "a policy reads data.{place} by names that only an input decides: give --replicate for those"
                    ))
                } else {
                    unknown.first_key_value().map(|(package, reason)| {
                        format!(
                            "the resources that data{package} reads cannot be found: {reason}; give --replicate for those"
                        )
                    })
                };
                // Those that are there stay before others come, and while not all are known none goes.
                let (there, new): (Vec<_>, Vec<_>) =
                    names.into_iter().partition(|name| self.held.contains(name));
                let mut reads: BTreeSet<_> = there.into_iter().collect();
                if !unknown.is_empty() {
                    reads.extend(self.held.iter().cloned());
                }
                let room = AUTO_FEEDS_MAX.saturating_sub(reads.len());
                reads.extend(new.into_iter().take(room));
                (problem, Some(reads))
            }
        };
        if let Some(problem) = problem.as_ref().filter(|problem| readiness.is_news(SUBJECT, problem)) {
            tracing::warn!("{SUBJECT}: {problem}");
        }
        readiness.problem(SUBJECT, problem);
        reads
    }

    /// Asks for these resources too, and waits until they are there, or cannot be had now.
    pub async fn widen(&mut self, reads: &BTreeSet<String>, say: &mpsc::Sender<Said>) {
        let new: Vec<_> = reads.difference(&self.held).cloned().collect();
        if new.is_empty() {
            return;
        }
        let feed = |name: &String| {
            tracing::info!(resource = name, "a policy reads it: replicating it");
            Feed {
                resource: Resource::named(name),
                scope: self.scope.clone(),
                labels: Vec::new(),
                content: Content::Resource(self.place(name)),
            }
        };
        let (settled, until) = oneshot::channel();
        _ = say.send(Said::Opened { feeds: new.iter().map(feed).collect(), settled }).await;
        self.held.extend(new);
        if tokio::time::timeout(AUTO_LIST_MAX, until).await.is_err() {
            tracing::warn!("what policies read is not listed yet: going on without it");
        }
    }

    /// Gives up whatever is not among these. Returns the places of those that stay.
    pub fn narrow(&mut self, reads: &BTreeSet<String>) -> BTreeSet<DirPath> {
        for name in self.held.difference(reads) {
            tracing::info!(resource = name, "resource is no longer read, dropping it");
        }
        self.held.clone_from(reads);
        self.held.iter().map(|name| self.place(name)).collect()
    }

    fn place(&self, name: &str) -> DirPath {
        self.path.join(name).expect("a name that was read is a segment")
    }
}
