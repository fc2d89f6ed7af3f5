//! State of the agent in OPA: `data.system.opahub.<bundle>`, written in the transaction of the data.

use std::collections::BTreeMap;

use opa_hub_proto::frame::Delta;
use opa_hub_proto::patch::PatchWriter;
use opa_hub_proto::path::DirPath;
use opa_hub_proto::position::Position;
use opa_hub_proto::reconcile::READS_MAX;
use opa_hub_proto::revision::{Digest, Revision, data_digest, modules_digest};
use serde::{Deserialize, Serialize};

/// Digests of content, `None` while an entry changes. Names everything that the agent may have written, for removal.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq, Default)]
pub struct Marker {
    /// `None` while incomplete.
    pub revision: Option<Revision>,
    /// Digests of directories.
    #[serde(default)]
    pub dirs: BTreeMap<DirPath, Option<Digest>>,
    /// Empty with delivery as a bundle.
    #[serde(default)]
    pub modules: BTreeMap<String, Option<Digest>>,
    /// Maps that exist even while empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ensure: Vec<DirPath>,
    /// Part of the modules' digest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rego_version: Option<u8>,
    /// Position of the content.
    #[serde(default, skip_serializing_if = "Position::is_empty")]
    pub position: Position,
    /// Field masks of modules that may decide, newest last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[serde(rename = "reads")]
    pub field_masks: Vec<String>,
}

/// Key of the session that may write.
pub(super) const WRITER: &str = "writer";

pub(super) const MARKERS: &str = "/system/opahub";

impl Marker {
    pub(super) fn path(bundle: &str) -> DirPath {
        format!("{MARKERS}/{bundle}").parse().expect("bundle names are segments")
    }

    /// Returns the names in a marker of an unknown version.
    pub(super) fn from_names(json: &serde_json::Value) -> Option<Self> {
        let keys = |field: &str| json[field].as_object().into_iter().flat_map(|names| names.keys());
        let dirs = keys("dirs").filter_map(|dir| Some((dir.parse().ok()?, None))).collect();
        let modules = keys("modules").map(|id| (id.clone(), None)).collect();
        let marker = Self { dirs, modules, ..Self::default() };
        (marker != Self::default()).then_some(marker)
    }

    /// Complete directories.
    pub fn dirs(&self) -> impl Iterator<Item = (&DirPath, Digest)> {
        self.dirs.iter().filter_map(|(path, digest)| Some((path, (*digest)?)))
    }

    /// Digest of complete directories.
    pub fn data_digest(&self) -> Digest {
        data_digest(self.dirs(), &self.ensure)
    }

    pub(crate) fn modules(&self) -> impl Iterator<Item = (&str, Digest)> {
        self.modules.iter().filter_map(|(id, digest)| Some((id.as_str(), (*digest)?)))
    }

    /// Digest of complete modules.
    pub fn modules_digest(&self) -> Digest {
        modules_digest(self.modules(), self.rego_version)
    }

    /// Adds the mask of modules that may decide from now on.
    pub(crate) fn add_field_mask(&mut self, mask: Option<String>) {
        if let Some(mask) = mask {
            self.field_masks.retain(|known| *known != mask);
            self.field_masks.push(mask);
            let surplus = self.field_masks.len().saturating_sub(READS_MAX);
            self.field_masks.drain(..surplus);
        }
    }

    /// Called when older modules no longer decide.
    pub(crate) fn drop_old_field_masks(&mut self) {
        let surplus = self.field_masks.len().saturating_sub(1);
        self.field_masks.drain(..surplus);
    }

    pub(super) fn write(&self, patch: &mut PatchWriter, bundle: &str, writer: &str) {
        #[derive(Serialize)]
        struct Claimed<'a> {
            #[serde(flatten)]
            marker: &'a Marker,
            writer: BTreeMap<&'a str, bool>,
        }
        let claimed = Claimed { marker: self, writer: BTreeMap::from([(writer, true)]) };
        let json = serde_json::to_vec(&claimed).expect("a marker has string keys");
        patch.add_dir(&Self::path(bundle), &json);
    }

    /// Writes the changes of `delta`.
    pub(super) fn write_delta(
        &self,
        patch: &mut PatchWriter,
        bundle: &str,
        delta: &Delta,
        revision: Revision,
        position: &Position,
    ) {
        let marker = Self::path(bundle);
        let digests = marker.join("dirs").expect("constants are segments");
        for (dir, digest) in &delta.dirs {
            match digest {
                Some(digest) => patch.add(&digests, dir.as_str(), quoted(digest).as_bytes()),
                None if self.dirs.contains_key(dir) => patch.remove(&digests, dir.as_str()),
                None => {}
            }
        }
        if !position.is_empty() {
            patch.add(&marker, "position", position.to_string().as_bytes());
        }
        patch.add(&marker, "revision", quoted(&revision).as_bytes());
    }

    pub(super) fn apply_dirs(&mut self, delta: &Delta) {
        for (dir, digest) in &delta.dirs {
            match digest {
                Some(digest) => _ = self.dirs.insert(dir.clone(), Some(*digest)),
                None => _ = self.dirs.remove(dir),
            }
        }
    }
}

fn quoted(value: &impl std::fmt::Display) -> String {
    format!("\"{value}\"")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn names_of_unknown_markers_are_preserved() {
        let json =
            json!({ "revision": 5, "dirs": { "/a/b": 7, "no path": null }, "modules": { "x/y.rego": [] } });
        let marker = Marker::from_names(&json).unwrap();
        assert!(marker.dirs.into_iter().eq([("/a/b".parse().unwrap(), None)]));
        assert!(marker.modules.into_iter().eq([("x/y.rego".to_owned(), None)]));
        for json in [json!({ "revision": 5 }), json!([]), json!(null), json!({ "dirs": [], "modules": "x" })]
        {
            assert_eq!(Marker::from_names(&json), None, "{json}");
        }
    }
}
