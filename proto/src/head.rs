//! Header of an agent's archive: the content after the archive is applied.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::path::DirPath;
use crate::revision::Digest;

/// Name of the header entry. OPA ignores such a file.
pub const HEAD_FILE: &str = "opahub.json";

/// Maximum header size, in bytes: 20,000 directories of 400 bytes.
pub const HEAD_BYTES_MAX: usize = 8 << 20;

/// Maximum entry size, in bytes. etcd's limit is 1.5 MiB; JSON escapes a byte as up to six.
pub const ENTRY_BYTES_MAX: usize = 10 << 20;

/// Maximum size of all modules, in bytes. An agent buffers them.
pub const MODULES_BYTES_MAX: usize = 16 << 20;

/// Complete inventory of a snapshot. A reconcile archive may omit entries that the receiver already has.
/// The receiver removes everything that is not listed.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq, Default)]
pub struct Head {
    /// `None` in a policy archive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<DataHead>,
    /// Text digests by module id; `None` in a data archive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modules: Option<BTreeMap<String, Digest>>,
    /// Digest of the modules that may evaluate this data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modules_digest: Option<Digest>,
    /// Serialised field masks of the modules; `None` if objects are unpruned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reads: Option<String>,
    /// Configured Rego version of the modules, part of their digest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rego_version: Option<u8>,
}

/// Data part of a [`Head`].
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq, Default)]
pub struct DataHead {
    /// Digests by directory.
    pub dirs: BTreeMap<DirPath, Digest>,
    /// Maps that exist even if empty: one per replicated resource.
    pub ensure: Vec<DirPath>,
}
