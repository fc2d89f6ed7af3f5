//! OPA's native delta bundles (`?delta=true`). Off by default: OPA recompiles while applying one, and
//! decisions are undefined.

use opa_hub_proto::manifest::{MANIFEST_FILE, Manifest};
use opa_hub_proto::path::escape;
use opa_hub_proto::revision::Revision;
use serde::Serialize;
use serde_json::value::RawValue;

use crate::snapshot::Snapshot;
use crate::snapshot::archive::{Archive, Segment, push_file};
use crate::snapshot::bundle_archive::ArchiveKind;
use crate::snapshot::bundle_archive::roots;
use crate::snapshot::frame::enclosing;
use crate::snapshot::history::{History, SinceKey};

/// Marks a delta (OPA v1/bundle/bundle.go).
const PATCH_FILE: &str = "patch.json";
/// Maximum operations of a delta: OPA scans all pending ones for each.
const OPS_MAX: usize = 1000;

#[derive(Serialize)]
struct Patch<'a> {
    data: Vec<Op<'a>>,
}

#[derive(Serialize)]
struct Op<'a> {
    #[serde(rename = "op")]
    name: &'static str,
    path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<&'a RawValue>,
}

/// Encodes the changes from `from` to `view`. `None` if OPA needs a snapshot, or nothing changed: an empty delta wipes
/// all roots.
pub(crate) fn encode(view: &Snapshot, log: &History, from: Revision, bundle: &str) -> Option<Archive> {
    if from.modules != view.revision.modules {
        return None;
    }
    let since = log.data_since(from.data)?;
    let empty = RawValue::from_string("{}".into()).ok()?;
    let mut ops = Vec::new();
    for (path, (existed, keys)) in &since.dirs {
        let dir = view.dirs.get(path);
        if *existed != dir.is_some() && enclosing(view, path).is_none() {
            return None;
        }
        let Some(dir) = dir else {
            if *existed {
                let value = view.ensure.contains(path).then_some(&*empty);
                let name = if value.is_some() { "replace" } else { "remove" };
                ops.push(Op { name, path: path.to_string(), value });
            }
            continue;
        };
        for (key, SinceKey { existed, .. }) in keys {
            let path = format!("{path}/{}", escape(key));
            match dir.get(key) {
                None if *existed => ops.push(Op { name: "remove", path, value: None }),
                None => {}
                Some(entry) => {
                    let value: &RawValue = serde_json::from_slice(&entry.value).ok()?;
                    if *existed {
                        ops.push(Op { name: "replace", path, value: Some(value) });
                    } else {
                        upsert(&path, value, &mut ops);
                    }
                }
            }
        }
        if ops.len() > OPS_MAX {
            return None;
        }
    }
    if ops.is_empty() {
        return None;
    }
    let manifest = Manifest {
        revision: view.revision.to_string(),
        roots: roots(view, ArchiveKind::Full, bundle),
        rego_version: view.rego_version,
    };
    let mut tar = Vec::new();
    push_file(&mut tar, MANIFEST_FILE, &serde_json::to_vec(&manifest).ok()?);
    push_file(&mut tar, PATCH_FILE, &serde_json::to_vec(&Patch { data: ops }).ok()?);
    Some(Archive::new([Segment::new(&tar)]))
}

/// Upserts each member of a new entry: OPA copies the parent each time, so this copies the entry, not the
/// directory (opa#6079).
fn upsert<'a>(path: &str, value: &'a RawValue, ops: &mut Vec<Op<'a>>) {
    let members: Option<std::collections::BTreeMap<String, &'a RawValue>> =
        serde_json::from_str(value.get()).ok();
    match members.filter(|members| !members.is_empty()) {
        None => ops.push(Op { name: "upsert", path: path.to_owned(), value: Some(value) }),
        Some(members) => ops.extend(members.into_iter().map(|(key, value)| Op {
            name: "upsert",
            path: format!("{path}/{}", escape(&key)),
            value: Some(value),
        })),
    }
}
