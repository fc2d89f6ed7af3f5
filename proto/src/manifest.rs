//! A bundle's `.manifest` and the names of its files, as OPA reads them (OPA v1/bundle/bundle.go).

use serde::{Deserialize, Serialize};

/// The file that says what a bundle is.
pub const MANIFEST_FILE: &str = ".manifest";
/// The basename of a file whose content lands below `data` at the path of its folder.
pub const DATA_FILE: &str = "data.json";
/// The basename given to a module whose id does not end in `.rego`, which OPA would not read.
const MODULE_FILE: &str = "module.rego";

/// What OPA learns of a bundle.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Shown in OPA's status and decision logs.
    pub revision: String,
    /// The paths below `data` that the bundle owns; nobody else may write there.
    pub roots: Vec<String>,
    /// Which Rego its modules are in: 0 or 1; none: what the OPA that loads it takes by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rego_version: Option<u8>,
}

/// The bundle file of the module `id` (`<namespace>/<configmap>/<key>`).
pub fn module_file(id: &str) -> String {
    if is_rego(id) { id.to_owned() } else { format!("{id}/{MODULE_FILE}") }
}

/// The id of the module in `file`, if it holds one. The inverse of [`module_file`].
pub fn module_id(file: &str) -> Option<&str> {
    match file.strip_suffix(MODULE_FILE).and_then(|id| id.strip_suffix('/')) {
        Some(id) if id.matches('/').count() == 2 => Some(id),
        _ => is_rego(file).then_some(file),
    }
}

fn is_rego(name: &str) -> bool {
    // OPA compares the suffix as it is: `.REGO` is no module.
    name.strip_suffix(".rego").is_some()
}

/// The roots with those left out that another one covers, sorted. OPA refuses a manifest whose roots overlap.
pub fn distinct_roots(roots: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut roots: Vec<String> = roots.into_iter().collect();
    // By segments, so that `a`, `a/b` and `a-b` come in the order that lets one look back suffice.
    roots.sort_unstable_by(|a, b| a.split('/').cmp(b.split('/')));
    let mut kept: Vec<String> = Vec::with_capacity(roots.len());
    for root in roots {
        let covered = kept.last().is_some_and(|last| {
            root.strip_prefix(last.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        });
        if !covered {
            kept.push(root);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn module_files_and_ids() {
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
    fn roots_do_not_overlap() {
        let roots = ["a/b", "b", "a-b", "a/b/c", "b", "ab"].map(str::to_owned);
        assert_eq!(distinct_roots(roots), ["a/b", "a-b", "ab", "b"]);
    }
}
