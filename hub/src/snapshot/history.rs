//! Bounded history of changed keys and edits.
//!
//! Frames use the newest values: a slow client costs no memory. A queue for each client would copy values and, when
//! full, block or lose them.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use opa_hub_proto::path::DirPath;
use opa_hub_proto::revision::{Digest, Revision};

use crate::model::COMMIT_EVENTS_MAX;
use crate::snapshot::edit::Edit;
use crate::snapshot::{ChangeSet, ChangedKey};

/// Limits of one bundle. Tests lower them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BundleLimits {
    /// Maximum commits in the history: 40 s at 10 ms each.
    pub log_commits_max: usize,
    /// Maximum keys in the history: about 10 MB.
    pub log_keys_max: usize,
    /// Maximum bytes of edits in the history.
    pub log_edit_bytes_max: usize,
    /// Maximum events in one commit.
    pub commit_events_max: usize,
    /// Maximum directories in a snapshot. Archive headers contain their digests (8 MiB).
    pub directories_max: usize,
}

impl Default for BundleLimits {
    fn default() -> Self {
        Self {
            log_commits_max: 4096,
            log_keys_max: 1 << 16,
            log_edit_bytes_max: 8 << 20,
            commit_events_max: COMMIT_EVENTS_MAX,
            directories_max: 20_000,
        }
    }
}

/// Clones share the commits.
#[derive(Clone)]
pub struct History {
    commits: VecDeque<Arc<Commit>>,
    keys: usize,
    edit_bytes: usize,
    limits: BundleLimits,
}

pub(crate) struct Commit {
    before: Revision,
    pub(crate) changed: ChangeSet,
    /// Whether fields were removed that older modules read.
    pub(crate) narrows: bool,
    edit_bytes: usize,
}

#[derive(Default)]
pub(crate) struct ChangesSince {
    /// Whether fields were removed that older modules read.
    pub(crate) narrows: bool,
    /// By directory: whether it existed then, and its changed keys.
    pub(crate) dirs: BTreeMap<DirPath, (bool, BTreeMap<Arc<str>, SinceKey>)>,
}

pub(crate) struct SinceKey {
    pub(crate) existed: bool,
    /// Edits since then, oldest first; `None` if one is missing.
    pub(crate) edits: Option<Vec<Arc<Edit>>>,
}

impl History {
    /// An empty log.
    pub fn new(limits: BundleLimits) -> Self {
        Self { commits: VecDeque::new(), keys: 0, edit_bytes: 0, limits }
    }

    #[must_use]
    pub(crate) fn emptied(&self) -> Self {
        Self::new(self.limits)
    }

    /// Appends the step from `before`.
    pub fn push(&mut self, before: Revision, changed: ChangeSet, narrows: bool) {
        let edit_bytes = changed.edit_bytes();
        self.keys += changed.len();
        self.edit_bytes += edit_bytes;
        self.commits.push_back(Arc::new(Commit { before, changed, narrows, edit_bytes }));
        while self.commits.len() > self.limits.log_commits_max || self.keys > self.limits.log_keys_max {
            let Some(oldest) = self.commits.pop_front() else { break };
            self.keys -= oldest.changed.len();
            self.edit_bytes -= oldest.edit_bytes;
        }
        // Oldest edits only: frames then send values.
        let mut edited = self.commits.iter_mut().filter(|commit| commit.edit_bytes > 0);
        while self.edit_bytes > self.limits.log_edit_bytes_max {
            let Some(oldest) = edited.next() else { break };
            self.edit_bytes -= oldest.edit_bytes;
            let Commit { before, changed, narrows, .. } = &**oldest;
            let (before, narrows, changed) = (*before, *narrows, changed.without_edits());
            *oldest = Arc::new(Commit { before, changed, narrows, edit_bytes: 0 });
        }
    }

    pub(crate) fn memory(&self) -> usize {
        self.keys * size_of::<ChangedKey>() + self.edit_bytes + self.commits.len() * size_of::<Commit>()
    }

    /// The last commit, if it starts at `before`.
    pub(crate) fn last_from(&self, before: Revision) -> Option<&Commit> {
        self.commits.back().map(AsRef::as_ref).filter(|commit| commit.before == before)
    }

    /// Changes since `data`; `None` if unknown.
    pub(crate) fn data_since(&self, data: Digest) -> Option<ChangesSince> {
        let from = self.commits.iter().rposition(|commit| commit.before.data == data)?;
        let narrows = self.commits.range(from..).any(|commit| commit.narrows);
        let mut since = ChangesSince { narrows, ..ChangesSince::default() };
        for dir in self.commits.range(from..).flat_map(|commit| &commit.changed.dirs) {
            // The first commit of a key has its state then.
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

    /// Directories changed since `data`, with repetitions; `None` if unknown.
    pub(crate) fn dirs_since(&self, data: Digest) -> Option<impl Iterator<Item = &DirPath>> {
        let from = self.commits.iter().rposition(|commit| commit.before.data == data)?;
        let changed = self.commits.range(from..).flat_map(|commit| &commit.changed.dirs);
        Some(changed.map(|dir| &dir.path))
    }

    /// Number of key changes since `data`; 0 if unknown.
    pub(crate) fn data_keys_since(&self, data: Digest) -> usize {
        let from = self.commits.iter().rposition(|commit| commit.before.data == data);
        from.map_or(0, |from| self.commits.range(from..).map(|commit| commit.changed.len()).sum())
    }

    /// Ids of modules changed since `modules`; `None` if unknown.
    pub(crate) fn modules_since(&self, modules: Digest) -> Option<Vec<&str>> {
        let from = self.commits.iter().rposition(|commit| commit.before.modules == modules)?;
        let changed = self.commits.range(from..).flat_map(|commit| &commit.changed.modules);
        let mut ids: Vec<_> = changed.map(String::as_str).collect();
        ids.sort_unstable();
        ids.dedup();
        Some(ids)
    }
}
