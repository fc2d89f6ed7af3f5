//! Field masks by resource. Agents return them as text, so that a hub serves the fields that their modules read (I10).

use std::collections::BTreeMap;

use opa_hub_proto::path::DirPath;
use serde::{Deserialize, Serialize};

use crate::fields::mask::FieldMask;
use crate::policy::dataflow::ReadSet;

/// Field mask of each resource.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct FieldMasks {
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    places: BTreeMap<DirPath, FieldMask>,
    /// Mask of other resources.
    #[serde(default)]
    others: FieldMask,
}

/// Whether a resource is cluster-scoped. `None` if unknown.
pub type IsClusterScoped = Option<bool>;

impl FieldMasks {
    /// Masks of the fields that policies read.
    pub fn of_reads(
        reads: &ReadSet,
        resources: impl IntoIterator<Item = (DirPath, IsClusterScoped)>,
    ) -> Self {
        let mask = |(place, scope): (DirPath, IsClusterScoped)| {
            let depths: &[usize] = match scope {
                Some(true) => &[1],
                Some(false) => &[2],
                None => &[1, 2],
            };
            let mut fields = FieldMask::default();
            for depth in depths {
                fields.join(&fields_read(reads, &place, *depth));
            }
            (place, fields)
        };
        Self { places: resources.into_iter().map(mask).collect(), others: FieldMask::default() }
    }

    /// Masks of named and other resources.
    pub fn new(places: BTreeMap<DirPath, FieldMask>, others: FieldMask) -> Self {
        Self { places, others }
    }

    /// Whether all fields are included.
    pub fn is_all(&self) -> bool {
        self.others.is_all() && self.places.values().all(FieldMask::is_all)
    }

    /// One mask for all resources.
    pub(crate) fn alike(fields: FieldMask) -> Self {
        Self { places: BTreeMap::new(), others: fields }
    }

    /// Mask of the resource at `place`.
    pub fn of(&self, place: &DirPath) -> &FieldMask {
        self.places.get(place).unwrap_or(&self.others)
    }

    /// Adds a resource with the default mask.
    pub(crate) fn name(&mut self, place: &DirPath) {
        if !self.places.contains_key(place) {
            self.places.insert(place.clone(), self.others.clone());
        }
    }

    pub(crate) fn forget(&mut self, place: &DirPath) {
        self.places.remove(place);
    }

    /// Named resources.
    pub fn places(&self) -> impl Iterator<Item = &DirPath> {
        self.places.keys()
    }

    /// Adds the fields of `other`.
    pub fn join(&mut self, other: &Self) {
        for place in other.places.keys().filter(|place| !self.places.contains_key(*place)).collect::<Vec<_>>()
        {
            self.places.insert(place.clone(), self.others.clone());
        }
        self.places.iter_mut().for_each(|(place, fields)| fields.join(other.of(place)));
        self.others.join(&other.others);
    }

    /// Adds these fields to all resources.
    pub(crate) fn join_alike(&mut self, fields: &FieldMask) {
        self.join(&Self::alike(fields.clone()));
    }

    /// Whether all fields of `other` are included.
    pub(crate) fn includes(&self, other: &Self) -> bool {
        let places = self.places.keys().chain(other.places.keys());
        self.others.includes(&other.others)
            && places.into_iter().all(|place| self.of(place).includes(other.of(place)))
    }

    pub(crate) fn to_text(&self) -> String {
        serde_json::to_string(self).expect("places and names are text")
    }

    /// Parses an agent's text.
    pub fn parse(text: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text)
    }
}

/// Fields that are read of objects `depth` names below `place`.
fn fields_read(reads: &ReadSet, place: &DirPath, depth: usize) -> FieldMask {
    let mut fields = FieldMask::default();
    for (path, extent, _) in reads.of_objects(place, depth) {
        fields.insert(&path, extent);
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(paths: &[&str]) -> FieldMasks {
        let fields = FieldMask::parse(paths.iter().copied()).unwrap();
        FieldMasks {
            places: BTreeMap::from([("/kubernetes/pods".parse().unwrap(), fields)]),
            others: FieldMask::default(),
        }
    }

    #[test]
    fn masks_include_narrower_masks() {
        for (wide, narrow, expected) in [
            (&["a.b"][..], &["a.b"][..], true),
            (&["a"], &["a.b.c", "a[*].d"], true),
            (&["a.b"], &["a"], false),
            (&["a[*].b"], &["a.x.b"], true),
            (&["a.x.b"], &["a[*].b"], false),
            (&["a.x.b", "a[*].c"], &["a.x.b", "a.x.c", "a.y.c"], true),
            (&["a"], &[], true),
            (&[], &["a"], false),
        ] {
            let (mut wide, narrow) = (kept(wide), kept(narrow));
            assert_eq!(wide.includes(&narrow), expected, "{wide:?} {narrow:?}");
            assert_eq!(FieldMasks::parse(&wide.to_text()).unwrap(), wide);
            wide.join(&narrow);
            assert!(wide.includes(&narrow));
            assert!(
                wide.includes(&FieldMasks::default()) && FieldMasks::alike(FieldMask::all()).includes(&wide)
            );
        }
    }
}
