//! Reconcile request, for revisions unknown to the hub.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::path::DirPath;
use crate::revision::Digest;

/// Maximum request size, in bytes: 20,000 directories and 20,000 modules of 400 bytes.
pub const RECONCILE_BYTES_MAX: usize = 16 << 20;

/// Maximum concurrent policy sets. OPA activates each within seconds.
pub const READS_MAX: usize = 8;

/// Maximum field masks of one set, in bytes: 20,000 paths of 50 bytes.
pub const READS_BYTES_MAX: usize = 1 << 20;

/// Digests of the sender's content. Hubs ignore unknown fields of newer agents; a mandatory field needs a new URL path.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq, Default)]
pub struct Reconcile {
    /// Digests by directory.
    pub dirs: BTreeMap<DirPath, Digest>,
    /// Digests by module id; `None` without module delivery.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modules: Option<BTreeMap<String, Digest>>,
    /// Field masks of the active modules, to retain until replacement.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reads: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_fields_are_ignored() {
        let newer = r#"{"dirs":{},"modules":{},"from_the_future":[1]}"#;
        let expected = Reconcile { modules: Some(BTreeMap::new()), ..Reconcile::default() };
        assert_eq!(serde_json::from_str::<Reconcile>(newer).unwrap(), expected);
        assert_eq!(serde_json::from_str::<Reconcile>(r#"{"dirs":{}}"#).unwrap(), Reconcile::default());
    }
}
