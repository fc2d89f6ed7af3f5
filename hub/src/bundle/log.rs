//! A bounded ring of what changed between two revisions: keys, and small edits of their values.
//!
//! A frame is computed from the head's values when somebody at an older revision asks, so a slow agent costs its
//! position and nothing else. A broadcast queue for each agent would hold every value once more and would have to
//! choose, when full, between waiting for the slowest and losing what it cannot hold.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use opa_hub_proto::path::DirPath;
use opa_hub_proto::revision::{Digest, Revision};

use super::edit::Edit;
use super::view::{Changed, ChangedKey};
use crate::config::BundleLimits;

/// See the module's text. Cloning copies pointers.
#[derive(Clone)]
pub struct Log {
    commits: VecDeque<Arc<Commit>>,
    keys: usize,
    edit_bytes: usize,
    limits: BundleLimits,
}

/// One step from a revision to the next.
pub struct Commit {
    before: Revision,
    /// What changed.
    pub changed: Changed,
    /// Whether it took fields that older modules read.
    pub narrows: bool,
    edit_bytes: usize,
}

/// Everything that changed since an older content, with how it was then.
#[derive(Default)]
pub struct Since {
    /// Whether fields went that older modules read.
    pub narrows: bool,
    /// Directories: whether each existed then, and the changed keys.
    pub dirs: BTreeMap<DirPath, (bool, BTreeMap<Arc<str>, SinceKey>)>,
}

/// A key that changed since an older content.
pub struct SinceKey {
    /// Whether it existed then.
    pub existed: bool,
    /// The edits that lead from the value then to the one now, the oldest first. `None` where one is missing.
    pub edits: Option<Vec<Arc<Edit>>>,
}

impl Log {
    /// A log of nothing yet.
    pub fn new(limits: BundleLimits) -> Self {
        Self { commits: VecDeque::new(), keys: 0, edit_bytes: 0, limits }
    }

    /// A log with the same bounds that remembers nothing.
    #[must_use]
    pub fn emptied(&self) -> Self {
        Self::new(self.limits)
    }

    /// Remembers that `changed` led from the revision `before` to the next, and whether it `narrows` what objects hold.
    pub fn push(&mut self, before: Revision, changed: Changed, narrows: bool) {
        let edit_bytes = changed.edit_bytes();
        self.keys += changed.len();
        self.edit_bytes += edit_bytes;
        self.commits.push_back(Arc::new(Commit { before, changed, narrows, edit_bytes }));
        while self.commits.len() > self.limits.log_commits_max || self.keys > self.limits.log_keys_max {
            let Some(oldest) = self.commits.pop_front() else { break };
            self.keys -= oldest.changed.len();
            self.edit_bytes -= oldest.edit_bytes;
        }
        // The keys of the oldest commits stay: values are sent for them.
        let mut edited = self.commits.iter_mut().filter(|commit| commit.edit_bytes > 0);
        while self.edit_bytes > self.limits.log_edit_bytes_max {
            let Some(oldest) = edited.next() else { break };
            self.edit_bytes -= oldest.edit_bytes;
            let Commit { before, changed, narrows, .. } = &**oldest;
            let (before, narrows, changed) = (*before, *narrows, changed.without_edits());
            *oldest = Arc::new(Commit { before, changed, narrows, edit_bytes: 0 });
        }
    }

    /// Bytes of all commits.
    pub fn memory(&self) -> usize {
        self.keys * size_of::<ChangedKey>() + self.edit_bytes + self.commits.len() * size_of::<Commit>()
    }

    /// The commit that led from `before` to the head; `None` if that is not remembered.
    pub fn last_from(&self, before: Revision) -> Option<&Commit> {
        self.commits.back().map(AsRef::as_ref).filter(|commit| commit.before == before)
    }

    /// The data that changed since the content was `data`; none when that is not remembered.
    pub fn data_since(&self, data: Digest) -> Option<Since> {
        let from = self.commits.iter().rposition(|commit| commit.before.data == data)?;
        let narrows = self.commits.range(from..).any(|commit| commit.narrows);
        let mut since = Since { narrows, ..Since::default() };
        for dir in self.commits.range(from..).flat_map(|commit| &commit.changed.dirs) {
            // The first commit of a key says how it was then.
            let (_, keys) = since.dirs.entry(dir.path.clone()).or_insert((dir.existed, BTreeMap::new()));
            for ChangedKey { key, existed, edit } in &dir.keys {
                let since = || SinceKey { existed: *existed, edits: Some(Vec::new()) };
                let since = keys.entry(Arc::clone(key)).or_insert_with(since);
                match (edit, &mut since.edits) {
                    (Some(edit), Some(edits)) => edits.push(Arc::clone(edit)),
                    _ => since.edits = None,
                }
            }
        }
        Some(since)
    }

    /// The directories that changed since the content was `data`, each as often as it did; none when that is not
    /// remembered.
    pub fn dirs_since(&self, data: Digest) -> Option<impl Iterator<Item = &DirPath>> {
        let from = self.commits.iter().rposition(|commit| commit.before.data == data)?;
        let changed = self.commits.range(from..).flat_map(|commit| &commit.changed.dirs);
        Some(changed.map(|dir| &dir.path))
    }

    /// How many keys changed since the content was `data`, each counted as often as it did; 0 when that is not
    /// remembered.
    pub fn data_keys_since(&self, data: Digest) -> usize {
        let from = self.commits.iter().rposition(|commit| commit.before.data == data);
        from.map_or(0, |from| self.commits.range(from..).map(|commit| commit.changed.len()).sum())
    }

    /// The ids of the modules that changed since they were `modules`; none when that is not remembered.
    pub fn modules_since(&self, modules: Digest) -> Option<Vec<&str>> {
        let from = self.commits.iter().rposition(|commit| commit.before.modules == modules)?;
        let changed = self.commits.range(from..).flat_map(|commit| &commit.changed.modules);
        let mut ids: Vec<_> = changed.map(String::as_str).collect();
        ids.sort_unstable();
        ids.dedup();
        Some(ids)
    }
}
