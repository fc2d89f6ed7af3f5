//! How far a hub has heard its source: what Kubernetes calls `resourceVersion`, for each thing that it watches.
//! Versions of one resource can be compared, whichever API server said them (KEP-5504). Equal revisions need no equal
//! positions: time passes where nothing changes.
//!
//! A quiet watch says seldom how far it is: with nothing to tell, an API server says so once a watch. So a hub that has
//! heard less of something need not lag. It does where it would change that something at the reader.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::path::DirPath;

/// The header in which an agent says how far the hub had heard that gave it what it holds, and a hub with what it
/// gives.
pub const POSITION_HEADER: &str = "opahub-position";

/// Bytes of a position at most: 800 feeds of 80 bytes. A longer one is not sent.
pub const POSITION_BYTES_MAX: usize = 64 << 10;

/// See the module's text. Empty where the source has no versions, as a folder has none.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq, Default)]
#[serde(transparent)]
pub struct Position(BTreeMap<String, u64>);

/// What is older here than there.
#[derive(Debug, PartialEq, Eq)]
pub struct Lag {
    /// Its name in positions.
    pub name: String,
    /// How far it was heard here.
    pub here: u64,
    /// How far it was heard there.
    pub there: u64,
}

impl fmt::Display for Lag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} was heard up to {} only, {} is held", self.name, self.here, self.there)
    }
}

/// Why a text is no position.
#[derive(Debug, thiserror::Error)]
pub enum Invalid {
    /// More than [`POSITION_BYTES_MAX`].
    #[error("a position of {0} bytes")]
    TooLong(usize),
    /// Not a JSON object of numbers.
    #[error("not a position: {0}")]
    Json(#[from] serde_json::Error),
}

/// What the frames of one stream are judged by: none may be older than what was held when it was opened, or than what
/// those before it hold all of. The newest that those may hold does not count: parts of one change are as of before it, up
/// to the last.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Judge(Position);

/// Between what content lies.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Bounds {
    /// It holds all that happened before this …
    pub all: Position,
    /// … and nothing that happened after this.
    pub newest: Position,
}

impl Position {
    /// Nothing was heard.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Of `name` all was heard up to `version`; of several that share a name, what all of them have heard.
    pub fn heard(&mut self, name: String, version: u64) {
        let held = self.0.entry(name).or_insert(version);
        *held = (*held).min(version);
    }

    /// What was heard of `name`.
    pub fn of(&self, name: &str) -> Option<u64> {
        self.0.get(name).copied()
    }

    /// Whether something was heard of which `there` has heard more.
    pub fn is_behind(&self, there: &Self) -> bool {
        self.behind(there).next().is_some()
    }

    /// What would go back in time that was heard up to `there`, if these directories, and maybe the modules, changed to
    /// what they are here.
    pub fn lag<'a>(
        &self,
        there: &Self,
        dirs: impl Iterator<Item = &'a DirPath>,
        modules: bool,
    ) -> Option<Lag> {
        let behind: Vec<_> = self.behind(there).collect();
        if behind.is_empty() {
            return None;
        }
        let mut replicated = Replicated::new(self.0.keys().chain(there.0.keys()));
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
            _ => {
                place(name).is_none_or(|place| replicated.changes_at(&place).is_some_and(|changes| *changes))
            }
        };
        let (name, here, there) = behind.into_iter().find(|(name, ..)| changes(name))?;
        Some(Lag { name: name.clone(), here, there })
    }

    /// Of each thing the most that was heard here or `before`, which held the same of what was heard less of.
    #[must_use]
    pub fn after(mut self, before: &Self) -> Self {
        for (name, version) in &mut self.0 {
            *version = (*version).max(before.of(name).unwrap_or(0));
        }
        self
    }

    /// What is not watched here at all is not behind, where policies are not: those say what is.
    fn behind<'a>(&self, there: &'a Self) -> impl Iterator<Item = (&'a String, u64, u64)> {
        let policies =
            |(name, there): (&String, &u64)| content(name) == "policies" && self.of(name) < Some(*there);
        let any = !self.is_empty() && there.0.iter().any(policies);
        let all = there.0.iter().map(|(name, there)| (name, self.of(name), *there));
        let known = all.filter(move |(_, here, _)| any || here.is_some());
        known
            .map(|(name, here, there)| (name, here.unwrap_or(0), there))
            .filter(|(_, here, there)| here < there)
    }
}

/// Without the namespace that is watched.
fn content(name: &str) -> &str {
    name.split_once(' ').map_or(name, |(content, _)| content)
}

/// Where replicated objects of this name lie.
fn place(name: &str) -> Option<DirPath> {
    content(name).parse().ok()
}

/// The outermost places of replicated objects, each with whether it changes. Finding the place of a directory takes one
/// binary search, so that the work for a client's position and directories stays near-linear in their bytes.
struct Replicated(Vec<(String, bool)>);

impl Replicated {
    fn new<'a>(names: impl Iterator<Item = &'a String>) -> Self {
        let mut places: Vec<_> = names.filter_map(|name| place(name)).map(|place| sort_key(&place)).collect();
        places.sort_unstable();
        places.dedup_by(|inner, outer| is_below(inner, outer));
        Self(places.into_iter().map(|place| (place, false)).collect())
    }

    /// Whether the place that `dir` is in changes; none where it is in none.
    fn changes_at(&mut self, dir: &DirPath) -> Option<&mut bool> {
        let dir = sort_key(dir);
        let next = self.0.partition_point(|(place, _)| *place <= dir);
        let (place, changes) = self.0.get_mut(next.checked_sub(1)?)?;
        is_below(&dir, place).then_some(changes)
    }
}

/// Sorts a directory right behind the one that it is in: no segment holds a lower byte than this separator.
fn sort_key(dir: &DirPath) -> String {
    dir.as_str().replace('/', "\0")
}

/// Whether the directory of one key is that of the other or below it.
fn is_below(inner: &str, outer: &str) -> bool {
    inner.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || rest.starts_with('\0'))
}

impl Bounds {
    /// Moves the end to `position`, at which the content is the same. Whether the source went back: what was said of the
    /// content before is of another history then.
    pub fn advance(&mut self, position: &Position) -> bool {
        self.newest = position.clone().after(&self.newest);
        let mut went_back = false;
        for (name, version) in &position.0 {
            if self.all.of(name).is_some_and(|all| *version < all) {
                went_back = true;
                self.all.0.insert(name.clone(), *version);
                self.newest.0.insert(name.clone(), *version);
            }
        }
        went_back
    }
}

impl Judge {
    /// Of a stream that is opened as of `held`.
    pub fn new(held: Position) -> Self {
        Self(held)
    }

    /// Whether what is as of `position` and changes these directories, and maybe the modules, may be taken.
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
    /// As JSON, in ASCII where the names are.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&serde_json::to_string(self).map_err(|_| fmt::Error)?)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_what_differs_can_be_older() {
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
                after.0.iter().all(|(name, at)| here.of(name) <= Some(*at) && there.of(name) <= Some(*at))
            );
        }
    }

    #[test]
    fn content_is_of_one_history() {
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
    fn a_stream_is_judged_by_what_is_proven() {
        let mut judge = Judge::new(r#"{"/kubernetes/pods":5,"data":3}"#.parse().unwrap());
        let pods: DirPath = "/kubernetes/pods/a".parse().unwrap();
        for (here, dirs, expected) in [
            (r#"{"/kubernetes/pods":4,"data":3}"#, vec![&pods], Some((4, 5))),
            // Two parts of one change.
            (r#"{"/kubernetes/pods":5,"data":3}"#, vec![&pods], None),
            (r#"{"/kubernetes/pods":5,"data":3}"#, vec![&pods], None),
            (r#"{"/kubernetes/pods":4,"data":4}"#, vec![], None),
            (r#"{"/kubernetes/pods":9,"data":4}"#, vec![&pods], None),
            (r#"{"/kubernetes/pods":8,"data":4}"#, vec![&pods], Some((8, 9))),
        ] {
            let found = judge.pass(&here.parse().unwrap(), dirs.into_iter(), false);
            assert_eq!(found.err().map(|lag| (lag.here, lag.there)), expected, "{here}");
        }
    }

    #[test]
    fn a_place_is_found_beside_names_alike() {
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

    /// What one client sends costs a thread that serves others some milliseconds.
    #[test]
    fn many_directories_and_many_names_take_little_time() {
        let position = |version| {
            let names = (0..800).map(|at| (format!("/kubernetes/example.com/resources{at}"), version));
            Position(names.collect())
        };
        let (here, there) = (position(1), position(2));
        let dirs: Vec<DirPath> =
            (0..20_000).map(|at| format!("/other/namespace-{at}/map").parse().unwrap()).collect();
        let took = || {
            let started = std::time::Instant::now();
            assert_eq!(here.lag(&there, dirs.iter(), false), None);
            started.elapsed()
        };
        // The least of some, since other tests run meanwhile.
        let least = (0..5).map(|_| took()).min().unwrap();
        assert!(least < std::time::Duration::from_millis(100), "{least:?}");
    }

    proptest! {
        /// I9.
        #[test]
        fn i9_random_text_does_not_panic(text in ".{0,64}") {
            let _ = text.parse::<Position>();
        }
    }
}
