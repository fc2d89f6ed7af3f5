//! What of the objects of each replicated resource travels, by the resource's place. As text it goes to agents, which
//! give it back: until their modules are replaced they keep what those read (I10).

use std::collections::BTreeMap;

use opa_hub_proto::path::DirPath;
use serde::{Deserialize, Serialize};

use super::fields::Fields;
use crate::policy::analyze::Reads;

/// See the module's text.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Kept {
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    places: BTreeMap<DirPath, Fields>,
    /// Of resources that are not named.
    #[serde(default)]
    others: Fields,
}

/// Whether the objects of a resource belong to no namespace; none: not known yet.
pub type IsClusterScoped = Option<bool>;

impl Kept {
    /// What is read of these resources.
    pub fn of_reads(reads: &Reads, resources: impl IntoIterator<Item = (DirPath, IsClusterScoped)>) -> Self {
        let of = |(place, scope): (DirPath, IsClusterScoped)| {
            let depths: &[usize] = match scope {
                Some(true) => &[1],
                Some(false) => &[2],
                None => &[1, 2],
            };
            let mut fields = Fields::default();
            for depth in depths {
                fields.join(&read_of(reads, &place, *depth));
            }
            (place, fields)
        };
        Self { places: resources.into_iter().map(of).collect(), others: Fields::default() }
    }

    /// These fields of the resources at these places, and of others.
    pub fn new(places: BTreeMap<DirPath, Fields>, others: Fields) -> Self {
        Self { places, others }
    }

    /// Whether everything is kept.
    pub fn is_all(&self) -> bool {
        self.others.is_all() && self.places.values().all(Fields::is_all)
    }

    /// The same of every resource.
    pub fn alike(fields: Fields) -> Self {
        Self { places: BTreeMap::new(), others: fields }
    }

    /// What is kept of the resource at `place`.
    pub fn of(&self, place: &DirPath) -> &Fields {
        self.places.get(place).unwrap_or(&self.others)
    }

    /// Names the resource at `place`, of which the same is kept as of those that are not named.
    pub fn name(&mut self, place: &DirPath) {
        if !self.places.contains_key(place) {
            self.places.insert(place.clone(), self.others.clone());
        }
    }

    /// Names the resource at `place` no longer.
    pub fn forget(&mut self, place: &DirPath) {
        self.places.remove(place);
    }

    /// The resources that are named.
    pub fn places(&self) -> impl Iterator<Item = &DirPath> {
        self.places.keys()
    }

    /// Keeps what `other` keeps too.
    pub fn join(&mut self, other: &Self) {
        for place in other.places.keys().filter(|place| !self.places.contains_key(*place)).collect::<Vec<_>>()
        {
            self.places.insert(place.clone(), self.others.clone());
        }
        self.places.iter_mut().for_each(|(place, fields)| fields.join(other.of(place)));
        self.others.join(&other.others);
    }

    /// Keeps these fields of every resource too.
    pub fn join_alike(&mut self, fields: &Fields) {
        self.join(&Self::alike(fields.clone()));
    }

    /// Whether whoever reads what `other` keeps finds it here.
    pub fn includes(&self, other: &Self) -> bool {
        let places = self.places.keys().chain(other.places.keys());
        self.others.includes(&other.others)
            && places.into_iter().all(|place| self.of(place).includes(other.of(place)))
    }

    /// As agents are told.
    pub fn to_text(&self) -> String {
        serde_json::to_string(self).expect("places and names are text")
    }

    /// What an agent was told.
    pub fn parse(text: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text)
    }
}

/// Fields that are read of objects that lie `depth` names below `place`.
fn read_of(reads: &Reads, place: &DirPath, depth: usize) -> Fields {
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
    fn what_includes_what() {
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
