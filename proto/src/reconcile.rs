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

/// The digests of what the sender holds. The answer is an archive of what differs.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq, Default)]
#[serde(deny_unknown_fields)]
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
