//! How far a hub has heard its source: what Kubernetes calls `resourceVersion`, for each thing that it watches. Versions
//! of one resource can be compared, whichever API server said them (KEP-5504). Equal revisions need no equal positions: time
//! passes where nothing changes.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The header in which an agent says how far the hub had heard that gave it what it holds, and a hub with what it gives.
pub const POSITION_HEADER: &str = "opahub-position";

/// Bytes of a position at most: a hundred resources of 40 bytes fit into the head of a request.
pub const POSITION_BYTES_MAX: usize = 4 << 10;

/// See the module's text. Empty where the source has no versions, as a folder has none.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq, Default)]
#[serde(transparent)]
pub struct Position(BTreeMap<String, u64>);

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

    /// What is not heard yet of what `other` has heard: its name, and how far it is here and there.
    pub fn lacks<'a>(&self, other: &'a Self) -> Option<(&'a str, u64, u64)> {
        let behind = other.0.iter().map(|(name, there)| (name.as_str(), self.of(name).unwrap_or(0), *there));
        behind.into_iter().find(|(_, here, there)| here < there)
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
    fn who_has_heard_less_lacks_something() {
        for (here, there, lacks) in [
            ("{}", "{}", None),
            (r#"{"policies":7}"#, "{}", None),
            (r#"{"policies":7}"#, r#"{"policies":7}"#, None),
            (r#"{"policies":7}"#, r#"{"policies":8}"#, Some(("policies", 7, 8))),
            (r#"{"policies":9}"#, r#"{"/kubernetes/pods":1,"policies":8}"#, Some(("/kubernetes/pods", 0, 1))),
        ] {
            let (here, there): (Position, Position) = (here.parse().unwrap(), there.parse().unwrap());
            assert_eq!(here.lacks(&there), lacks);
            assert_eq!(there.to_string().parse::<Position>().unwrap(), there);
        }
    }

    proptest! {
        /// I9.
        #[test]
        fn i9_random_text_does_not_panic(text in ".{0,64}") {
            let _ = text.parse::<Position>();
        }
    }
}
