//! The first entry of an archive for agents: what the receiver holds once it applied the rest.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::path::DirPath;
use crate::revision::Digest;

/// The archive's entry that holds the [`Head`]. OPA ignores a file of this name.
pub const HEAD_FILE: &str = "opahub.json";

/// Bytes of a head at most: 20,000 directories of 400 bytes.
pub const HEAD_BYTES_MAX: usize = 8 << 20;

/// Bytes of one entry at most: the largest object that etcd takes is 1.5 MiB, of which JSON may write each byte in six.
pub const ENTRY_BYTES_MAX: usize = 10 << 20;

/// Bytes of all modules together: an agent holds them all while it puts them.
pub const MODULES_BYTES_MAX: usize = 16 << 20;

/// What a view holds in full, whether the archive carries all of it (a snapshot) or only what the receiver
/// lacked (reconcile). Directories and modules that a receiver has and a head has not are gone.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq, Default)]
pub struct Head {
    /// The data; none in an archive of policies only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<DataHead>,
    /// The digest of each module's text, by id; none in an archive of data only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modules: Option<BTreeMap<String, Digest>>,
    /// Of the modules of the view, which are all that may decide on its data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modules_digest: Option<Digest>,
    /// What of replicated objects these modules read, in the hub's words; none: objects come whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reads: Option<String>,
    /// The version of Rego that the modules are in, if the hub was given one: it is part of their digest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rego_version: Option<u8>,
}

/// The data part of a [`Head`].
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq, Default)]
pub struct DataHead {
    /// The digest of each directory.
    pub dirs: BTreeMap<DirPath, Digest>,
    /// Maps that exist even while nothing is in them: one for each replicated resource.
    pub ensure: Vec<DirPath>,
}
