//! Positions: the fully observed `resourceVersion` of each watch. Versions of one resource are comparable across API
//! servers (KEP-5504).
//!
//! Quiet watches rarely report progress, so an older position matters only where content differs.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::path::DirPath;

/// Position header of requests and responses.
pub const POSITION_HEADER: &str = "opahub-position";

/// Maximum size, in bytes: 800 watches of 80 bytes. Longer positions are omitted.
pub const POSITION_BYTES_MAX: usize = 64 << 10;

/// Resource versions by watch name; empty for folders.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq, Default)]
#[serde(transparent)]
pub struct Position(BTreeMap<String, u64>);

/// Outdated watch.
#[derive(Debug, PartialEq, Eq)]
pub struct Lag {
    /// Watch name.
    pub name: String,
    /// Current version.
    pub here: u64,
    /// Required version.
    pub there: u64,
}

impl fmt::Display for Lag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is at {}, behind {}", self.name, self.here, self.there)
    }
}

/// Invalid position.
#[derive(Debug, thiserror::Error)]
pub enum Invalid {
    /// Over [`POSITION_BYTES_MAX`].
    #[error("position too long: {0} bytes, maximum {POSITION_BYTES_MAX}")]
    TooLong(usize),
    /// Malformed JSON.
    #[error("invalid position: {0}")]
    Json(#[from] serde_json::Error),
}

/// Rejects frames older than the stream's start or earlier frames. Only complete positions count, since a divided change
/// completes with its last frame.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Judge(Position);

/// Range of positions.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Bounds {
    /// Complete up to this position.
    pub all: Position,
    /// Newest position contained.
    pub newest: Position,
}

impl Position {
    /// Whether empty.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Records `version`; the lowest of watches with equal names wins.
    pub fn heard(&mut self, name: String, version: u64) {
        let lowest = self.0.entry(name).or_insert(version);
        *lowest = (*lowest).min(version);
    }

    /// Version of `name`.
    pub fn of(&self, name: &str) -> Option<u64> {
        self.0.get(name).copied()
    }

    /// Whether any version is older than in `other`.
    pub fn is_behind(&self, other: &Self) -> bool {
        self.behind(other).next().is_some()
    }

    /// Returns a watch older than `required` whose content is among the changed `dirs` and `modules`.
    pub fn lag<'a>(
        &self,
        required: &Self,
        dirs: impl Iterator<Item = &'a DirPath>,
        modules: bool,
    ) -> Option<Lag> {
        let behind: Vec<_> = self.behind(required).collect();
        if behind.is_empty() {
            return None;
        }
        let mut replicated = Replicated::new(self.0.keys().chain(required.0.keys()));
        let mut data = false;
        for dir in dirs {
            match replicated.changes_at(dir) {
                Some(changes) => *changes = true,
                None => data = true,
            }
        }
        let mut changes = |name: &str| match content(name) {
            "policies" => modules,
            "data" => data,
            _ => root(name).is_none_or(|root| replicated.changes_at(&root).is_some_and(|changes| *changes)),
        };
        let (name, current, newer) = behind.into_iter().find(|(name, ..)| changes(name))?;
        Some(Lag { name: name.clone(), here: current, there: newer })
    }

    /// Raises versions to `before`, whose content is equal where this is older.
    #[must_use]
    pub fn after(mut self, before: &Self) -> Self {
        for (name, version) in &mut self.0 {
            *version = (*version).max(before.of(name).unwrap_or(0));
        }
        self
    }

    /// Missing watches are behind only if policies are, which determine watches.
    fn behind<'a>(&self, other: &'a Self) -> impl Iterator<Item = (&'a String, u64, u64)> {
        let policies =
            |(name, newer): (&String, &u64)| content(name) == "policies" && self.of(name) < Some(*newer);
        let with_missing = !self.is_empty() && other.0.iter().any(policies);
        let all = other.0.iter().map(|(name, newer)| (name, self.of(name), *newer));
        let known = all.filter(move |(_, current, _)| with_missing || current.is_some());
        known
            .map(|(name, current, newer)| (name, current.unwrap_or(0), newer))
            .filter(|(_, current, newer)| current < newer)
    }
}

fn content(name: &str) -> &str {
    name.split_once(' ').map_or(name, |(content, _)| content)
}

fn root(name: &str) -> Option<DirPath> {
    content(name).parse().ok()
}

/// Outermost roots of replicated objects, with a change flag. Binary search bounds the cost of a request.
struct Replicated(Vec<(String, bool)>);

impl Replicated {
    fn new<'a>(names: impl Iterator<Item = &'a String>) -> Self {
        let mut roots: Vec<_> = names.filter_map(|name| root(name)).map(|root| sort_key(&root)).collect();
        roots.sort_unstable();
        roots.dedup_by(|inner, outer| is_below(inner, outer));
        Self(roots.into_iter().map(|root| (root, false)).collect())
    }

    fn changes_at(&mut self, dir: &DirPath) -> Option<&mut bool> {
        let dir = sort_key(dir);
        let next = self.0.partition_point(|(root, _)| *root <= dir);
        let (root, changes) = self.0.get_mut(next.checked_sub(1)?)?;
        is_below(&dir, root).then_some(changes)
    }
}

/// Sorts directories after their parent: the separator is lower than segment bytes.
fn sort_key(dir: &DirPath) -> String {
    dir.as_str().replace('/', "\0")
}

fn is_below(inner: &str, outer: &str) -> bool {
    inner.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || rest.starts_with('\0'))
}

impl Bounds {
    /// Advances to `position` with unchanged content. Returns whether the source rolled back, which invalidates earlier
    /// positions.
    pub fn advance(&mut self, position: &Position) -> bool {
        self.newest = position.clone().after(&self.newest);
        let mut rolled_back = false;
        for (name, version) in &position.0 {
            if self.all.of(name).is_some_and(|all| *version < all) {
                rolled_back = true;
                self.all.0.insert(name.clone(), *version);
                self.newest.0.insert(name.clone(), *version);
            }
        }
        rolled_back
    }
}

impl Judge {
    /// Starts at a stream's position.
    pub fn new(start: Position) -> Self {
        Self(start)
    }

    /// Accepts a frame that changes `dirs` and `modules`.
    pub fn pass<'a>(
        &mut self,
        position: &Position,
        dirs: impl Iterator<Item = &'a DirPath>,
        modules: bool,
    ) -> Result<(), Lag> {
        if let Some(lag) = position.lag(&self.0, dirs, modules) {
            return Err(lag);
        }
        self.0 = position.clone().after(&self.0);
        Ok(())
    }
}

impl FromStr for Position {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        if text.len() > POSITION_BYTES_MAX {
            return Err(Invalid::TooLong(text.len()));
        }
        Ok(serde_json::from_str(text)?)
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&serde_json::to_string(self).map_err(|_| fmt::Error)?)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lag_ignores_unchanged_content() {
        let pods = "/kubernetes/pods/a";
        for (here, there, dirs, modules, expected) in [
            (r#"{"/kubernetes/pods":5}"#, r#"{"/kubernetes/pods":5}"#, vec![pods], false, None),
            (r#"{"/kubernetes/pods":4}"#, r#"{"/kubernetes/pods":5}"#, vec![], true, None),
            (r#"{"/kubernetes/pods":4}"#, r#"{"/kubernetes/pods":5}"#, vec!["/ns/m"], false, None),
            (
                r#"{"/kubernetes/pods":4}"#,
                r#"{"/kubernetes/pods":5}"#,
                vec![pods],
                false,
                Some(("/kubernetes/pods", 4, 5)),
            ),
            ("{}", r#"{"/kubernetes/pods in a":5,"policies":5}"#, vec![pods], true, None),
            (r#"{"policies":5}"#, r#"{"/kubernetes/pods":5,"policies":5}"#, vec![pods], false, None),
            (
                r#"{"policies":4}"#,
                r#"{"/kubernetes/pods in a":5,"policies":5}"#,
                vec![pods],
                false,
                Some(("/kubernetes/pods in a", 0, 5)),
            ),
            (r#"{"data":4}"#, r#"{"data":5,"/kubernetes/pods":1}"#, vec![], true, None),
            (r#"{"data":4,"/kubernetes/pods":1}"#, r#"{"data":5}"#, vec![pods], false, None),
            (r#"{"data":4}"#, r#"{"data":5}"#, vec!["/ns/m"], false, Some(("data", 4, 5))),
            (r#"{"policies":4}"#, r#"{"policies":5}"#, vec!["/ns/m"], false, None),
            (r#"{"policies":4}"#, r#"{"policies":5}"#, vec![], true, Some(("policies", 4, 5))),
        ] {
            let (here, there): (Position, Position) = (here.parse().unwrap(), there.parse().unwrap());
            let dirs: Vec<DirPath> = dirs.iter().map(|dir| dir.parse().unwrap()).collect();
            let lag = here.lag(&there, dirs.iter(), modules);
            let expected = expected.map(|(name, here, there)| Lag { name: name.to_owned(), here, there });
            assert_eq!(lag, expected, "{here} {there} {dirs:?} {modules}");
            let after = here.clone().after(&there);
            assert!(
                after.0.iter().all(|(name, max)| here.of(name) <= Some(*max) && there.of(name) <= Some(*max))
            );
        }
    }

    #[test]
    fn bounds_reset_after_a_rollback() {
        let position = |text: &str| text.parse::<Position>().unwrap();
        let bounds = Bounds { all: position(r#"{"a":5,"b":5}"#), newest: position(r#"{"a":7,"b":7}"#) };
        for (to, all, newest, went_back) in [
            (r#"{"a":6,"b":8}"#, r#"{"a":5,"b":5}"#, r#"{"a":7,"b":8}"#, false),
            (r#"{"a":4,"b":8}"#, r#"{"a":4,"b":5}"#, r#"{"a":4,"b":8}"#, true),
        ] {
            let mut moved = bounds.clone();
            assert_eq!(moved.advance(&position(to)), went_back);
            assert_eq!(moved, Bounds { all: position(all), newest: position(newest) }, "{to}");
        }
    }

    #[test]
    fn judge_compares_complete_positions() {
        let mut judge = Judge::new(r#"{"/kubernetes/pods":5,"data":3}"#.parse().unwrap());
        let pods: DirPath = "/kubernetes/pods/a".parse().unwrap();
        for (here, dirs, expected) in [
            (r#"{"/kubernetes/pods":4,"data":3}"#, vec![&pods], Some((4, 5))),
            // Two frames of one change.
            (r#"{"/kubernetes/pods":5,"data":3}"#, vec![&pods], None),
            (r#"{"/kubernetes/pods":5,"data":3}"#, vec![&pods], None),
            (r#"{"/kubernetes/pods":4,"data":4}"#, vec![], None),
            (r#"{"/kubernetes/pods":9,"data":4}"#, vec![&pods], None),
            (r#"{"/kubernetes/pods":8,"data":4}"#, vec![&pods], Some((8, 9))),
        ] {
            let result = judge.pass(&here.parse().unwrap(), dirs.into_iter(), false);
            assert_eq!(result.err().map(|lag| (lag.here, lag.there)), expected, "{here}");
        }
    }

    #[test]
    fn lag_finds_the_root_among_similar_names() {
        let here: Position =
            r#"{"/k/a":1,"/k/a-b":1,"/k/a.b":1,"/k/ab":1,"/k/a/x":1,"data":1}"#.parse().unwrap();
        let there: Position = r#"{"/k/a":2,"/k/a-b":2,"/k/a.b":2,"/k/ab":2,"data":2}"#.parse().unwrap();
        for (dir, expected) in [
            ("/k/a", "/k/a"),
            ("/k/a/ns", "/k/a"),
            ("/k/a/x/ns", "/k/a"),
            ("/k/a-b/ns", "/k/a-b"),
            ("/k/a.b/ns", "/k/a.b"),
            ("/k/ab/ns", "/k/ab"),
            ("/k/abc/ns", "data"),
            ("/k", "data"),
            ("/j/x", "data"),
        ] {
            let dir: DirPath = dir.parse().unwrap();
            let lag = here.lag(&there, std::iter::once(&dir), false);
            assert_eq!(lag.map(|lag| lag.name).as_deref(), Some(expected), "{dir}");
        }
    }

    /// One client must not block others.
    #[test]
    fn lag_is_fast_for_many_directories_and_names() {
        let position = |version| {
            let names = (0..800).map(|index| (format!("/kubernetes/example.com/resources{index}"), version));
            Position(names.collect())
        };
        let (here, there) = (position(1), position(2));
        let dirs: Vec<DirPath> =
            (0..20_000).map(|index| format!("/other/namespace-{index}/map").parse().unwrap()).collect();
        let measure = || {
            let started = std::time::Instant::now();
            assert_eq!(here.lag(&there, dirs.iter(), false), None);
            started.elapsed()
        };
        // Other tests run concurrently.
        let fastest = (0..5).map(|_| measure()).min().unwrap();
        assert!(fastest < std::time::Duration::from_millis(100), "{fastest:?}");
    }

    proptest! {
        /// I9.
        #[test]
        fn i9_random_text_never_panics(text in ".{0,64}") {
            let _ = text.parse::<Position>();
        }
    }
}
