//! Cost of replicated objects by resource, namespace and field, and in OPA's memory.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use opa_hub_proto::path::DirPath;
use serde::Serialize;

use crate::fields::mask::FieldMask;
use crate::fields::masks::IsClusterScoped;
use crate::json::Members;
use crate::policy::dataflow::{ReadDepth, ReadSet, Segment};
use crate::policy::plan::Site;

/// Maximum objects of a resource whose fields are measured.
const SAMPLE: usize = 1000;
const FIELDS_SHOWN: usize = 50;

/// OPA 1.22. `opa-hub-loadtest memory` compares with a real one.
const OPA_BYTES: u64 = 40 << 20;
const OPA_PERCENT_OF_JSON: u64 = 620;
const OPA_BYTES_PER_ENTRY: u64 = 1000;

#[derive(Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Resource {
    /// Path below `data`.
    pub(crate) path: String,
    pub(crate) objects: usize,
    /// Size at the source.
    pub(crate) whole_bytes: usize,
    /// Content as served.
    pub(crate) json_bytes: usize,
    /// Served bytes by namespace.
    pub(crate) namespaces: BTreeMap<String, usize>,
    /// Largest first.
    pub(crate) fields: Vec<Field>,
}

#[derive(Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Field {
    /// Ends with `…` if all fields below are included.
    pub(crate) path: String,
    /// Estimated from a sample.
    pub(crate) json_bytes: usize,
    /// `namespace/configmap/key:row:col`.
    pub(crate) readers: Vec<String>,
}

pub(crate) struct Sample {
    /// Empty if cluster-scoped.
    pub(crate) namespace: Arc<str>,
    /// Size at the source.
    pub(crate) whole_bytes: usize,
    /// Content as served.
    pub(crate) kept: Bytes,
}

/// Estimates the resident memory of an OPA with this data.
pub(crate) fn opa_bytes(json_bytes: usize, entries: usize) -> u64 {
    OPA_BYTES + json_bytes as u64 * OPA_PERCENT_OF_JSON / 100 + entries as u64 * OPA_BYTES_PER_ENTRY
}

/// Cost of the resource at `place` if `fields` are served, which follow from `reads`.
pub(crate) fn resource(
    place: &DirPath,
    scope: IsClusterScoped,
    fields: &FieldMask,
    reads: Option<&ReadSet>,
    objects: &[Sample],
) -> Resource {
    let mut namespaces = BTreeMap::new();
    for object in objects {
        *namespaces.entry(object.namespace.to_string()).or_default() += object.kept.len();
    }
    let sampled: Vec<_> = objects.iter().step_by(objects.len().div_ceil(SAMPLE).max(1)).collect();
    let paths = if fields.is_all() { top_level_fields(&sampled) } else { fields.paths() };
    let readers = reads.map(|reads| readers(reads, place, scope)).unwrap_or_default();
    let measure = |(steps, extent): (Vec<Segment>, ReadDepth)| {
        let mut only = FieldMask::default();
        only.insert(&steps, extent);
        let bytes: usize = sampled.iter().map(|object| size_of_fields(&only, &object.kept)).sum();
        let path = only.to_string().trim_end().to_owned();
        let readers = readers.get(&steps).or_else(|| readers.get(&Vec::new()));
        let readers = readers.into_iter().flatten().map(ToString::to_string).collect();
        Field { path, json_bytes: bytes * objects.len() / sampled.len().max(1), readers }
    };
    let mut fields: Vec<_> = paths.into_iter().map(measure).collect();
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

fn size_of_fields(fields: &FieldMask, object: &Bytes) -> usize {
    // Without the braces, which remain without the field.
    fields.cut_object(object).map_or(0, |cut| cut.len().saturating_sub(2))
}

/// Fields of unpruned objects, two levels deep.
fn top_level_fields(objects: &[&Sample]) -> Vec<(Vec<Segment>, ReadDepth)> {
    fn members(json: &str) -> Vec<(String, &str)> {
        let members = serde_json::from_str::<Members>(json).map(|members| members.0).unwrap_or_default();
        members.into_iter().map(|(name, value)| (name.into_owned(), value.get())).collect()
    }
    let mut found = BTreeSet::new();
    for text in objects.iter().filter_map(|object| std::str::from_utf8(&object.kept).ok()) {
        for (name, value) in members(text) {
            let name = Segment::Key(name.into());
            let below =
                members(value).into_iter().map(|(below, _)| vec![name.clone(), Segment::Key(below.into())]);
            let below: Vec<_> = below.collect();
            found.extend(if below.is_empty() { vec![vec![name]] } else { below });
        }
    }
    found.into_iter().map(|steps| (steps, ReadDepth::Whole)).collect()
}

/// Readers by field. Readers of whole objects have no steps.
pub(crate) fn readers(
    reads: &ReadSet,
    place: &DirPath,
    scope: IsClusterScoped,
) -> BTreeMap<Vec<Segment>, BTreeSet<Site>> {
    let depth = if scope == Some(true) { 1 } else { 2 };
    let mut readers: BTreeMap<Vec<Segment>, BTreeSet<Site>> = BTreeMap::new();
    for (path, extent, sites) in reads.of_objects(place, depth) {
        if !path.is_empty() || extent == ReadDepth::Whole {
            readers.entry(path).or_default().extend(sites.iter().cloned());
        }
    }
    readers
}
