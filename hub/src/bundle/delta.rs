//! OPA's own delta bundle, for who asks for it with `?delta=true`. OPA recompiles its live compiler while it applies
//! one, and decisions come out undefined meanwhile; the default is therefore a snapshot.

use opa_hub_proto::manifest::{MANIFEST_FILE, Manifest};
use opa_hub_proto::path::escape;
use opa_hub_proto::revision::Revision;
use serde::Serialize;
use serde_json::value::RawValue;

use super::archive::{Archive, Segment, push_file};
use super::edition::Part;
use super::frame::enclosing;
use super::log::{Log, SinceKey};
use super::snapshot::roots;
use super::view::View;

/// The file that makes a bundle a delta (OPA v1/bundle/bundle.go).
const PATCH_FILE: &str = "patch.json";
/// Operations of one delta: OPA scans all pending ones for each.
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

/// What leads from `from` to `view`; none where OPA needs a snapshot: the modules or the roots changed, the base is
/// unknown, there is too much of it, or nothing (an empty delta wipes everything the bundle owns).
pub fn encode(view: &View, log: &Log, from: Revision, bundle: &str) -> Option<Archive> {
    if from.modules != view.revision.modules {
        return None;
    }
    let since = log.data_since(from.data)?;
    let nothing = RawValue::from_string("{}".into()).ok()?;
    let mut ops = Vec::new();
    for (path, (existed, keys)) in &since.dirs {
        let dir = view.dirs.get(path);
        if *existed != dir.is_some() && enclosing(view, path).is_none() {
            return None;
        }
        let Some(dir) = dir else {
            if *existed {
                let kept = view.ensure.contains(path).then_some(&*nothing);
                let name = if kept.is_some() { "replace" } else { "remove" };
                ops.push(Op { name, path: path.to_string(), value: kept });
            }
            continue;
        };
        for (key, SinceKey { existed: was, .. }) in keys {
            let path = format!("{path}/{}", escape(key));
            match dir.get(key) {
                None if *was => ops.push(Op { name: "remove", path, value: None }),
                None => {}
                Some(entry) => {
                    let value: &RawValue = serde_json::from_slice(&entry.value).ok()?;
                    if *was {
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
        roots: roots(view, Part::Whole, bundle),
        rego_version: view.rego_version,
    };
    let mut tar = Vec::new();
    push_file(&mut tar, MANIFEST_FILE, &serde_json::to_vec(&manifest).ok()?);
    push_file(&mut tar, PATCH_FILE, &serde_json::to_vec(&Patch { data: ops }).ok()?);
    Some(Archive::new([Segment::new(&tar)]))
}

/// A new entry is written member by member: each upsert copies the whole of its parent, which is then the entry
/// itself instead of the directory (opa#6079).
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
