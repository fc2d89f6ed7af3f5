//! Layout of the file.

use std::collections::BTreeMap;

use opa_hub_proto::path::DirPath;
use opa_hub_proto::position::Position;
use opa_hub_proto::revision::{Digest, Revision};
use redb::TableDefinition;
use serde::{Deserialize, Serialize};

use crate::archive::PolicyBundle;

/// JSON values by directory and key.
pub(super) const ENTRIES: TableDefinition<(&str, &str), &[u8]> = TableDefinition::new("entries");
pub(super) const DIRS: TableDefinition<&str, &str> = TableDefinition::new("dirs");
/// Modules by id.
pub(super) const MODULES: TableDefinition<&str, &str> = TableDefinition::new("modules");
pub(super) const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
pub(super) const HEAD: &str = "head";
pub(super) const BUNDLE: &str = "bundle";

/// Description of a complete state.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub struct Meta {
    /// Revision of the content.
    pub revision: Revision,
    /// Position of the content.
    #[serde(default, skip_serializing_if = "Position::is_empty")]
    pub position: Position,
    /// Maps that exist even while empty.
    pub ensure: Vec<DirPath>,
    /// Rego version, if set.
    pub rego_version: Option<u8>,
    /// Field mask of the modules.
    #[serde(rename = "reads")]
    pub field_mask: Option<String>,
    /// ETag of the policy bundle, if any.
    pub etag: Option<String>,
}

#[derive(Default)]
pub(crate) struct StateSummary {
    /// `None` before the first commit.
    pub(crate) meta: Option<Meta>,
    pub(crate) dirs: BTreeMap<DirPath, Digest>,
    pub(crate) modules: BTreeMap<String, Digest>,
    pub(crate) bundle: Option<PolicyBundle>,
}
