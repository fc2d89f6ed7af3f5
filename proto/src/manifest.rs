//! OPA's bundle manifest and file names (OPA v1/bundle/bundle.go).

use serde::{Deserialize, Serialize};

/// Name of the manifest file.
pub const MANIFEST_FILE: &str = ".manifest";
/// Name of data files; the folder is the path below `data`.
pub const DATA_FILE: &str = "data.json";
/// Suffix of ids without `.rego`, which OPA would ignore.
const MODULE_FILE: &str = "module.rego";

/// A bundle's manifest.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Revision in OPA's logs.
    pub revision: String,
    /// Exclusively owned paths below `data`.
    pub roots: Vec<String>,
    /// Rego version, 0 or 1; `None` for OPA's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rego_version: Option<u8>,
}

/// File name of module `<namespace>/<configmap>/<key>`.
pub fn module_file(id: &str) -> String {
    if is_rego(id) { id.to_owned() } else { format!("{id}/{MODULE_FILE}") }
}

/// Inverse of [`module_file`]; `None` for other files.
pub fn module_id(file: &str) -> Option<&str> {
    match file.strip_suffix(MODULE_FILE).and_then(|id| id.strip_suffix('/')) {
        Some(id) if id.matches('/').count() == 2 => Some(id),
        _ => is_rego(file).then_some(file),
    }
}

fn is_rego(name: &str) -> bool {
    // OPA compares case-sensitively.
    name.strip_suffix(".rego").is_some()
}

/// Sorts the roots and drops nested ones. OPA rejects overlapping roots.
pub fn distinct_roots(roots: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut roots: Vec<String> = roots.into_iter().collect();
    // Sorting by segment puts nested roots after their parent.
    roots.sort_unstable_by(|a, b| a.split('/').cmp(b.split('/')));
    let mut distinct: Vec<String> = Vec::with_capacity(roots.len());
    for root in roots {
        let covered = distinct.last().is_some_and(|last| {
            root.strip_prefix(last.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        });
        if !covered {
            distinct.push(root);
        }
    }
    distinct
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn module_ids_round_trip_through_files() {
        for (id, file) in [
            ("opa/authz/policy.rego", "opa/authz/policy.rego"),
            ("opa/authz/policy", "opa/authz/policy/module.rego"),
            ("opa/authz/module.rego", "opa/authz/module.rego"),
            ("opa/authz/patch.json", "opa/authz/patch.json/module.rego"),
        ] {
            assert_eq!(module_file(id), file);
            assert_eq!(module_id(file), Some(id));
        }
        assert_eq!(module_id("kubernetes/pods/data.json"), None);
    }

    #[test]
    fn distinct_roots_do_not_overlap() {
        let roots = ["a/b", "b", "a-b", "a/b/c", "b", "ab"].map(str::to_owned);
        assert_eq!(distinct_roots(roots), ["a/b", "a-b", "ab", "b"]);
    }
}
