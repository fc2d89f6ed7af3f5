//! What an agent posts when the hub does not know its revision: the digests of all it holds.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::path::DirPath;
use crate::revision::Digest;

/// Bytes of a request at most: 20,000 directories and 20,000 modules of 400 bytes.
pub const RECONCILE_BYTES_MAX: usize = 16 << 20;

/// Sets of policies that may decide at once: OPA activates each within seconds, or says why not.
pub const READS_MAX: usize = 8;

/// Bytes of what one set of policies reads: 20,000 places of 50 bytes.
pub const READS_BYTES_MAX: usize = 1 << 20;

/// The digests of what the sender holds. The answer is an archive of what differs. A hub ignores fields that it does not
/// know: agents are replaced before it or after it. What must not be ignored needs another path.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq, Default)]
pub struct Reconcile {
    /// By directory.
    pub dirs: BTreeMap<DirPath, Digest>,
    /// By module id; none: the sender takes its modules elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modules: Option<BTreeMap<String, Digest>>,
    /// What the modules read that may decide there, in the hub's words: until they are replaced they keep it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reads: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A10: hub and agent of different versions.
    #[test]
    fn fields_of_another_version_are_ignored() {
        let newer = r#"{"dirs":{},"modules":{},"from_the_future":[1]}"#;
        let expected = Reconcile { modules: Some(BTreeMap::new()), ..Reconcile::default() };
        assert_eq!(serde_json::from_str::<Reconcile>(newer).unwrap(), expected);
        assert_eq!(serde_json::from_str::<Reconcile>(r#"{"dirs":{}}"#).unwrap(), Reconcile::default());
    }
}
