//! Watches of resources that policies read and no flag names.
//!
//! A package with unknown reads is a problem of the bundle; no resource is removed while it exists.

use std::collections::BTreeSet;
use std::time::Duration;

use opa_hub_proto::path::{DirPath, is_segment};
use tokio::sync::{mpsc, oneshot};

use crate::health::Health;
use crate::model::{Content, NamespaceSelector, Resource, WatchSpec};
use crate::pipeline::WriterCommand;
use crate::policy::check;
use crate::policy::reads::Names;
use crate::spec::AutoReplication;

/// Maximum automatically replicated resources, a watch each.
pub const AUTO_FEEDS_MAX: usize = 100;
/// Maximum wait of a policy for newly read resources.
pub const AUTO_LIST_MAX: Duration = Duration::from_secs(30);

/// Subject in [`Health`].
pub const SUBJECT: &str = "--replicate-auto";

/// Automatically replicated resources of one bundle.
pub struct Auto {
    path: DirPath,
    scope: NamespaceSelector,
    explicit: BTreeSet<String>,
    active: BTreeSet<String>,
}

impl Auto {
    /// Creates the set for a spec with these explicit `feeds`.
    pub fn new(replication: AutoReplication, feeds: &[WatchSpec]) -> Self {
        let explicit = feeds.iter().filter(|feed| feed.place().is_some());
        Self {
            path: replication.path,
            scope: NamespaceSelector::AllExcept { ignored: replication.ignored },
            explicit: explicit.map(|feed| feed.resource.plural.clone()).collect(),
            active: BTreeSet::new(),
        }
    }

    /// Path above all resources.
    pub fn path(&self) -> &DirPath {
        &self.path
    }

    /// Returns the resources among `names`, or `None` if unknown. Active ones stay while the analysis is incomplete.
    pub fn reads(
        &self,
        names: &Result<Option<Names>, check::Error>,
        readiness: &Health,
    ) -> Option<BTreeSet<String>> {
        let (problem, reads) = match names {
            Err(error) => (Some(error.to_string()), None),
            Ok(None) => (Some("finding resources needs OPA; set --opa-bin".into()), None),
            Ok(Some(Names { names, is_dynamic, unknown, left })) => {
                let path = self.path.relative().replace('/', ".");
                let is_resource = |name: &&String| is_segment(name) && !self.explicit.contains(*name);
                let names: Vec<_> = names.iter().filter(is_resource).cloned().collect();
                let problem = if names.len() > AUTO_FEEDS_MAX {
                    Some(format!(
                        "policies read {} resources, more than {AUTO_FEEDS_MAX}; name some with --replicate",
                        names.len()
                    ))
                } else if *is_dynamic {
                    Some(format!(
                        "a policy reads data.{path} by names that depend on the input; name the resources with --replicate"
                    ))
                } else if !left.is_empty() {
                    Some(format!("analysis continues: {} packages are left", left.len()))
                } else {
                    unknown.first_key_value().map(|(package, reason)| {
                        format!(
                            "the resources that data{package} reads cannot be found: {reason}; name them with --replicate"
                        )
                    })
                };
                // Active resources precede new ones.
                let (active, new): (Vec<_>, Vec<_>) =
                    names.into_iter().partition(|name| self.active.contains(name));
                let mut reads: BTreeSet<_> = active.into_iter().collect();
                if !unknown.is_empty() || !left.is_empty() {
                    reads.extend(self.active.iter().cloned());
                }
                let room = AUTO_FEEDS_MAX.saturating_sub(reads.len());
                reads.extend(new.into_iter().take(room));
                (problem, Some(reads))
            }
        };
        if let Some(reason) = problem.as_ref().filter(|reason| readiness.is_news(SUBJECT, reason)) {
            tracing::warn!(reason, "automatic replication is incomplete");
        }
        readiness.problem(SUBJECT, problem);
        reads
    }

    /// Adds watches and waits for their lists.
    pub async fn widen(&mut self, reads: &BTreeSet<String>, commands: &mpsc::Sender<WriterCommand>) {
        let new: Vec<_> = reads.difference(&self.active).cloned().collect();
        if new.is_empty() {
            return;
        }
        let feed = |name: &String| {
            tracing::info!(resource = name, "replicating resource that policies read");
            WatchSpec {
                resource: Resource::named(name),
                scope: self.scope.clone(),
                labels: Vec::new(),
                content: Content::Resource(self.data_path(name)),
            }
        };
        let (settled, listed) = oneshot::channel();
        _ = commands.send(WriterCommand::AddWatches { feeds: new.iter().map(feed).collect(), settled }).await;
        self.active.extend(new);
        if tokio::time::timeout(AUTO_LIST_MAX, listed).await.is_err() {
            tracing::warn!("resources not listed in time, continuing");
        }
    }

    /// Removes other watches. Returns remaining data paths.
    pub fn narrow(&mut self, reads: &BTreeSet<String>) -> BTreeSet<DirPath> {
        for name in self.active.difference(reads) {
            tracing::info!(resource = name, "dropping resource, no longer read");
        }
        self.active.clone_from(reads);
        self.active.iter().map(|name| self.data_path(name)).collect()
    }

    fn data_path(&self, name: &str) -> DirPath {
        self.path.join(name).expect("resource names are path segments")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn resources_stay_while_names_are_unknown_and_new_ones_fill_up() {
        let path: DirPath = "/kubernetes".parse().unwrap();
        let auto = |active: &[&str]| Auto {
            active: active.iter().map(ToString::to_string).collect(),
            ..Auto::new(AutoReplication { path: path.clone(), ignored: Vec::new() }, &[])
        };
        let known = |names: &[&str]| Names {
            names: names.iter().map(ToString::to_string).collect(),
            ..Names::default()
        };
        let unknown = |names| Names {
            unknown: BTreeMap::from([("/stuck".parse().unwrap(), "it is stuck".to_owned())]),
            ..known(names)
        };
        let left = |names| Names { left: BTreeSet::from(["/slow".parse().unwrap()]), ..known(names) };
        let many: Vec<_> = (0..=AUTO_FEEDS_MAX).map(|index| format!("r{index:03}")).collect();
        let many: Vec<_> = many.iter().map(String::as_str).collect();
        let cases = [
            (&[][..], known(&["pods", "not/a segment"]), &["pods"][..], None),
            (&["nodes"], known(&["pods"]), &["pods"], None),
            (
                &["nodes"],
                unknown(&["pods"]),
                &["nodes", "pods"],
                Some("data/stuck reads cannot be found: it is stuck"),
            ),
            (&["nodes"], left(&["pods"]), &["nodes", "pods"], Some("continues: 1 packages are left")),
            (&[], known(&many), &many[..AUTO_FEEDS_MAX], Some("policies read")),
            (&many[1..], known(&many), &many[1..], Some("policies read")),
            (&many[1..], unknown(&["pods"]), &many[1..], Some("it is stuck")),
        ];
        for (active, names, expected, problem) in cases {
            let readiness = Health::default();
            let reads = auto(active).reads(&Ok(Some(names)), &readiness).unwrap();
            assert!(reads.iter().eq(expected), "{reads:?}");
            let problems = readiness.problems();
            assert_eq!(problems.is_empty(), problem.is_none(), "{problems:?}");
            assert!(problem.is_none_or(|part| problems[0].message.contains(part)), "{problems:?}");
        }
    }
}
