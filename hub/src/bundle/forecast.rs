//! What replicated objects cost: by resource, by namespace, by field, and in the memory of each OPA.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use opa_hub_proto::path::DirPath;
use serde::Serialize;

use super::fields::Fields;
use super::kept::IsClusterScoped;
use crate::policy::analyze::{Extent, Reads, Step};
use crate::policy::plan::Site;
use crate::source::trim::Members;

/// Objects of a resource whose fields are weighed: one in so many that there are no more than these.
const SAMPLE: usize = 1000;
/// Fields that are shown of a resource, the heaviest first.
const FIELDS_SHOWN: usize = 50;

/// An empty OPA 1.22 …
const OPA_BYTES: u64 = 40 << 20;
/// … and what each byte of JSON, times a hundred, and each entry adds to what it keeps resident. `opa-hub-loadtest
/// memory` shows it beside what a real one takes.
const OPA_PERCENT_OF_JSON: u64 = 620;
const OPA_BYTES_AN_ENTRY: u64 = 1000;

/// A replicated resource.
#[derive(Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct Resource {
    /// Its path below `data`.
    pub path: String,
    /// How many objects.
    pub objects: usize,
    /// Bytes of JSON that the source gave.
    pub whole_bytes: usize,
    /// Bytes of JSON that travel.
    pub json_bytes: usize,
    /// The same by namespace.
    pub namespaces: BTreeMap<String, usize>,
    /// What makes these bytes, the heaviest first.
    pub fields: Vec<Field>,
}

/// A field of the objects of a resource.
#[derive(Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct Field {
    /// `spec.containers[*].image`; `…` behind what travels with all that is below it.
    pub path: String,
    /// Bytes that would go without it, estimated from a sample.
    pub json_bytes: usize,
    /// Who reads it: `namespace/configmap/key:row:col`.
    pub readers: Vec<String>,
}

/// One object: its namespace, the bytes that the source gave, and what travels.
pub struct Sample {
    /// Empty: it belongs to none.
    pub namespace: Arc<str>,
    /// As the source gave it.
    pub whole_bytes: usize,
    /// As it travels.
    pub kept: Bytes,
}

/// Bytes that an OPA needs for so much data.
pub fn opa_bytes(json_bytes: usize, entries: usize) -> u64 {
    OPA_BYTES + json_bytes as u64 * OPA_PERCENT_OF_JSON / 100 + entries as u64 * OPA_BYTES_AN_ENTRY
}

/// What the resource at `place` costs while `fields` of its `objects` travel, because `reads` says so.
pub fn resource(
    place: &DirPath,
    scope: IsClusterScoped,
    fields: &Fields,
    reads: Option<&Reads>,
    objects: &[Sample],
) -> Resource {
    let mut namespaces = BTreeMap::new();
    for object in objects {
        *namespaces.entry(object.namespace.to_string()).or_default() += object.kept.len();
    }
    let sampled: Vec<_> = objects.iter().step_by(objects.len().div_ceil(SAMPLE).max(1)).collect();
    let paths = if fields.is_all() { outline(&sampled) } else { fields.paths() };
    let readers = reads.map(|reads| readers(reads, place, scope)).unwrap_or_default();
    let weigh = |(steps, extent): (Vec<Step>, Extent)| {
        let mut only = Fields::default();
        only.insert(&steps, extent);
        let bytes: usize = sampled.iter().map(|object| weight(&only, &object.kept)).sum();
        let path = only.to_string().trim_end().to_owned();
        let readers = readers.get(&steps).or_else(|| readers.get(&Vec::new()));
        let readers = readers.into_iter().flatten().map(ToString::to_string).collect();
        Field { path, json_bytes: bytes * objects.len() / sampled.len().max(1), readers }
    };
    let mut fields: Vec<_> = paths.into_iter().map(weigh).collect();
    fields.sort_by(|one, other| (other.json_bytes, &one.path).cmp(&(one.json_bytes, &other.path)));
    fields.truncate(FIELDS_SHOWN);
    Resource {
        path: place.relative().to_owned(),
        objects: objects.len(),
        whole_bytes: objects.iter().map(|object| object.whole_bytes).sum(),
        json_bytes: objects.iter().map(|object| object.kept.len()).sum(),
        namespaces,
        fields,
    }
}

fn weight(fields: &Fields, object: &Bytes) -> usize {
    // Both hold the braces.
    fields.cut_object(object).map_or(0, |cut| cut.len().saturating_sub(2))
}

/// The fields of whole objects, two names deep.
fn outline(objects: &[&Sample]) -> Vec<(Vec<Step>, Extent)> {
    fn members(json: &str) -> Vec<(String, &str)> {
        let members = serde_json::from_str::<Members>(json).map(|members| members.0).unwrap_or_default();
        members.into_iter().map(|(name, value)| (name.into_owned(), value.get())).collect()
    }
    let mut found = BTreeSet::new();
    for text in objects.iter().filter_map(|object| std::str::from_utf8(&object.kept).ok()) {
        for (name, value) in members(text) {
            let name = Step::Name(name.into());
            let below =
                members(value).into_iter().map(|(below, _)| vec![name.clone(), Step::Name(below.into())]);
            let below: Vec<_> = below.collect();
            found.extend(if below.is_empty() { vec![vec![name]] } else { below });
        }
    }
    found.into_iter().map(|steps| (steps, Extent::Whole)).collect()
}

/// Who reads what of the objects of a resource; those who read objects whole, or all of them, at no steps.
pub fn readers(
    reads: &Reads,
    place: &DirPath,
    scope: IsClusterScoped,
) -> BTreeMap<Vec<Step>, BTreeSet<Site>> {
    let depth = if scope == Some(true) { 1 } else { 2 };
    let mut readers: BTreeMap<Vec<Step>, BTreeSet<Site>> = BTreeMap::new();
    for (path, extent, sites) in reads.of_objects(place, depth) {
        if !path.is_empty() || extent == Extent::Whole {
            readers.entry(path).or_default().extend(sites.iter().cloned());
        }
    }
    readers
}
