//! Checks of limited bundles. The omitted objects depend on event order, but no more than necessary are omitted.

use std::collections::BTreeSet;

use opa_hub::model::ObjectKey;
use serde_json::Value;

use super::document::Document;
use super::model::Units;
use super::source::{Kind, Source, served};

/// Limited kinds, in retry order.
pub(super) const LIMITED: [Kind; 3] = [Kind::Data, Kind::Pods, Kind::Nodes];
/// Bytes per entry besides key and value: quotes, colon, comma.
const AROUND_ENTRY: usize = 4;

/// Checks that the limit is kept, served objects existed at some version, and omitted ones would not fit. Returns the
/// number of outdated objects.
pub(super) fn check(document: &Document, source: &Source, units: &Units) -> usize {
    let of_kind = |((kind, key), value): (&(Kind, ObjectKey), &Value)| bytes(*kind, key, value);
    let limited = units.iter().filter(|((kind, _), _)| LIMITED.contains(kind));
    let dirs: BTreeSet<_> = limited.clone().map(|((kind, key), _)| dir(*kind, key)).collect();
    let held_bytes: usize = limited.map(of_kind).sum();
    let max_bytes = document.max_bytes.unwrap_or(usize::MAX);
    let max_dirs = document.max_directories.unwrap_or(usize::MAX);
    assert!(held_bytes <= max_bytes && dirs.len() <= max_dirs, "{held_bytes} bytes in {dirs:?}");
    let mut left_out = 0;
    for kind in LIMITED {
        let allowed = source.allowed(kind, source.version());
        for (_, key) in units.keys().filter(|(other, _)| *other == kind) {
            assert!(allowed.contains_key(key), "{kind:?} {key} is served");
        }
        for (key, contents) in allowed {
            let applied = units.get(&(kind, key.clone()));
            let newest = contents.iter().flatten().map(|value| served(kind, value));
            let newest: Vec<_> = newest.collect();
            let is_newest = |applied: &Value| newest.contains(applied);
            if applied.map_or(contents.contains(&None), is_newest) {
                continue;
            }
            left_out += 1;
            assert!(
                applied.is_none_or(|applied| source.was(kind, key, applied)),
                "{kind:?} {key} was never {applied:?}"
            );
            let old = applied.map_or(0, |applied| bytes(kind, key, applied));
            let has_no_room = held_bytes - old + bytes(kind, key, &newest[0]) > max_bytes;
            let has_no_dir = applied.is_none() && dirs.len() == max_dirs && !dirs.contains(&dir(kind, key));
            assert!(
                has_no_room || has_no_dir,
                "{kind:?} {key} would fit: {held_bytes} of {max_bytes} bytes, {old} its own, in {dirs:?}"
            );
        }
    }
    left_out
}

/// Directory of an object: per ConfigMap, or per kind and namespace.
fn dir(kind: Kind, key: &ObjectKey) -> (Kind, ObjectKey) {
    let key = key.clone();
    let name = if kind == Kind::Data { key.name } else { "".into() };
    (kind, ObjectKey { namespace: key.namespace, name })
}

/// Bytes counted for an object.
fn bytes(kind: Kind, key: &ObjectKey, value: &Value) -> usize {
    let entry = |name: &str, value: &Value| name.len() + value.to_string().len() + AROUND_ENTRY;
    match value {
        Value::Object(entries) if kind == Kind::Data => {
            entries.iter().map(|(name, value)| entry(name, value)).sum()
        }
        _ => entry(&key.name, value),
    }
}
