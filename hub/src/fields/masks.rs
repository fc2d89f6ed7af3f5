//! Field masks by resource. Agents return them as text, so that a hub serves the fields that their modules read (I10).

use std::collections::BTreeMap;

use opa_hub_proto::path::DirPath;
use serde::{Deserialize, Serialize};

use crate::fields::mask::Fields;
use crate::policy::dataflow::Reads;

/// Field mask of each resource.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Kept {
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    places: BTreeMap<DirPath, Fields>,
    /// Mask of other resources.
    #[serde(default)]
    others: Fields,
}

/// Whether a resource is cluster-scoped. `None` if unknown.
pub type IsClusterScoped = Option<bool>;

impl Kept {
    /// Masks of the fields that policies read.
    pub fn of_reads(reads: &Reads, resources: impl IntoIterator<Item = (DirPath, IsClusterScoped)>) -> Self {
        let mask = |(place, scope): (DirPath, IsClusterScoped)| {
            let depths: &[usize] = match scope {
                Some(true) => &[1],
                Some(false) => &[2],
                None => &[1, 2],
            };
            let mut fields = Fields::default();
            for depth in depths {
                fields.join(&fields_read(reads, &place, *depth));
            }
            (place, fields)
        };
        Self { places: resources.into_iter().map(mask).collect(), others: Fields::default() }
    }

    /// Masks of named and other resources.
    pub fn new(places: BTreeMap<DirPath, Fields>, others: Fields) -> Self {
        Self { places, others }
    }

    /// Whether all fields are included.
    pub fn is_all(&self) -> bool {
        self.others.is_all() && self.places.values().all(Fields::is_all)
    }

    /// One mask for all resources.
    pub(crate) fn alike(fields: Fields) -> Self {
        Self { places: BTreeMap::new(), others: fields }
    }

    /// Mask of the resource at `place`.
    pub fn of(&self, place: &DirPath) -> &Fields {
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
    pub(crate) fn join_alike(&mut self, fields: &Fields) {
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
fn fields_read(reads: &Reads, place: &DirPath, depth: usize) -> Fields {
    let mut fields = Fields::default();
    for (path, extent, _) in reads.of_objects(place, depth) {
        fields.insert(&path, extent);
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(paths: &[&str]) -> Kept {
        let fields = Fields::parse(paths.iter().copied()).unwrap();
        Kept {
            places: BTreeMap::from([("/kubernetes/pods".parse().unwrap(), fields)]),
            others: Fields::default(),
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
            assert_eq!(Kept::parse(&wide.to_text()).unwrap(), wide);
            wide.join(&narrow);
            assert!(wide.includes(&narrow));
            assert!(wide.includes(&Kept::default()) && Kept::alike(Fields::all()).includes(&wide));
        }
    }
}
