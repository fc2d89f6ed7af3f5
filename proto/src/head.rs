//! Archive header for agents.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::path::DirPath;
use crate::revision::Digest;

/// Name of the header entry. OPA ignores such a file.
pub const HEAD_FILE: &str = "opahub.json";

/// Maximum header size, in bytes: 20,000 directories of 400 bytes.
pub const HEAD_BYTES_MAX: usize = 8 << 20;

/// Maximum entry size, in bytes. etcd allows 1.5 MiB; JSON escapes a byte as six.
pub const ENTRY_BYTES_MAX: usize = 10 << 20;

/// Maximum total module size, in bytes. Agents buffer them.
pub const MODULES_BYTES_MAX: usize = 16 << 20;

/// Inventory of a snapshot; the receiver removes everything else. A reconcile archive omits unchanged entries.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq, Default)]
pub struct Head {
    /// Data inventory; `None` in a policy archive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<DataHead>,
    /// Digests by module id; `None` in a data archive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modules: Option<BTreeMap<String, Digest>>,
    /// Digest of the only modules that may evaluate this data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modules_digest: Option<Digest>,
    /// Field masks of the modules; `None` if unpruned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reads: Option<String>,
    /// Configured Rego version, part of the digest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rego_version: Option<u8>,
}

/// Inventory of the data.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq, Default)]
pub struct DataHead {
    /// Digests by directory.
    pub dirs: BTreeMap<DirPath, Digest>,
    /// Maps that may be empty, one per replicated resource.
    pub ensure: Vec<DirPath>,
}
