//! Resources that policies read and no flag names: feeds that come with the first policy that reads them and go with
//! the last.

use std::collections::BTreeSet;

use opa_hub_proto::path::{DirPath, is_segment};
use tokio::sync::{mpsc, oneshot};

use crate::bundle::spec::AutoReplication;
use crate::config::{AUTO_FEEDS_MAX, AUTO_LIST_MAX};
use crate::model::{Content, Feed, Resource, Scope};
use crate::pipeline::Said;
use crate::policy::check;
use crate::policy::reads::Names;
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

    /// The path of all resources, without one's name.
    pub fn path(&self) -> &DirPath {
        &self.path
    }

    /// The resources among the names that policies read; `None` when those cannot be found now, which is a problem of
    /// the bundle. While some package's are unknown, no resource goes.
    pub fn reads(
        &self,
        names: &Result<Option<Names>, check::Error>,
        readiness: &Readiness,
    ) -> Option<BTreeSet<String>> {
        let (problem, reads) = match names {
            Err(error) => (Some(error.to_string()), None),
            Ok(None) => (Some("it needs a real OPA: give --opa-bin".into()), None),
            Ok(Some(Names { names, is_dynamic, unknown, left })) => {
                let place = self.path.relative().replace('/', ".");
                let is_resource = |name: &&String| is_segment(name) && !self.given.contains(*name);
                let names: Vec<_> = names.iter().filter(is_resource).cloned().collect();
                let many = names.len() > AUTO_FEEDS_MAX;
                let problem = if many {
                    Some(format!("policies read {} resources, more than {AUTO_FEEDS_MAX}", names.len()))
                } else if *is_dynamic {
                    Some(format!(
                        "a policy reads data.{place} by names that only an input decides: give --replicate for those"
                    ))
                } else if !left.is_empty() {
                    Some(format!("the analysis goes on: {} packages are left", left.len()))
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
                if !unknown.is_empty() || !left.is_empty() {
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn resources_stay_while_names_are_unknown_and_new_ones_find_room() {
        let path: DirPath = "/kubernetes".parse().unwrap();
        let auto = |held: &[&str]| Auto {
            held: held.iter().map(ToString::to_string).collect(),
            ..Auto::new(AutoReplication { path: path.clone(), ignored: Vec::new() }, &[])
        };
        let of = |names: &[&str]| Names {
            names: names.iter().map(ToString::to_string).collect(),
            ..Names::default()
        };
        let unknown = |names| Names {
            unknown: BTreeMap::from([("/stuck".parse().unwrap(), "it is stuck".to_owned())]),
            ..of(names)
        };
        let left = |names| Names { left: BTreeSet::from(["/slow".parse().unwrap()]), ..of(names) };
        let many: Vec<_> = (0..=AUTO_FEEDS_MAX).map(|at| format!("r{at:03}")).collect();
        let many: Vec<_> = many.iter().map(String::as_str).collect();
        let cases = [
            (&[][..], of(&["pods", "not/a segment"]), &["pods"][..], None),
            (&["nodes"], of(&["pods"]), &["pods"], None),
            (
                &["nodes"],
                unknown(&["pods"]),
                &["nodes", "pods"],
                Some("data/stuck reads cannot be found: it is stuck"),
            ),
            (&["nodes"], left(&["pods"]), &["nodes", "pods"], Some("goes on: 1 packages are left")),
            (&[], of(&many), &many[..AUTO_FEEDS_MAX], Some("policies read")),
            (&many[1..], of(&many), &many[1..], Some("policies read")),
            (&many[1..], unknown(&["pods"]), &many[1..], Some("it is stuck")),
        ];
        for (held, names, expected, problem) in cases {
            let readiness = Readiness::default();
            let reads = auto(held).reads(&Ok(Some(names)), &readiness).unwrap();
            assert!(reads.iter().eq(expected), "{reads:?}");
            let problems = readiness.problems();
            assert_eq!(problems.is_empty(), problem.is_none(), "{problems:?}");
            assert!(problem.is_none_or(|part| problems[0].message.contains(part)), "{problems:?}");
        }
    }
}
