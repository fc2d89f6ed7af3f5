//! What an OPA says that it holds: `data.system.opahub.<bundle>`, written in the transaction that made it true.

use std::collections::BTreeMap;

use opa_hub_proto::frame::Delta;
use opa_hub_proto::patch::PatchWriter;
use opa_hub_proto::path::DirPath;
use opa_hub_proto::position::Position;
use opa_hub_proto::reconcile::READS_MAX;
use opa_hub_proto::revision::{Digest, Revision, data_digest, modules_digest};
use serde::{Deserialize, Serialize};

/// See the module's text. What has no digest is in flux: it is given anew, or removed, at the next reconcile. Whatever
/// may be in OPA because of us is named, or it could never be removed.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq, Default)]
pub struct Marker {
    /// What OPA holds, while that is one revision: none while a change is half done.
    pub revision: Option<Revision>,
    /// The digest of each directory.
    #[serde(default)]
    pub dirs: BTreeMap<DirPath, Option<Digest>>,
    /// The digest of each module that the agent put, none while it is put or removed; empty when OPA loads its
    /// policies as a bundle.
    #[serde(default)]
    pub modules: BTreeMap<String, Option<Digest>>,
    /// Maps that exist even while they are empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ensure: Vec<DirPath>,
    /// The version of Rego that is part of the modules' digest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rego_version: Option<u8>,
    /// How far the hub had heard that gave this.
    #[serde(default, skip_serializing_if = "Position::is_empty")]
    pub position: Position,
    /// What the modules read that may decide, newest last, in the hub's words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reads: Vec<String>,
}

/// The key of a marker below which the session that may write to OPA has its name.
pub const WRITER: &str = "writer";

/// Where the markers of all bundles are.
pub const MARKERS: &str = "/system/opahub";

impl Marker {
    /// Where the marker of `bundle` is.
    pub fn path(bundle: &str) -> DirPath {
        format!("{MARKERS}/{bundle}").parse().expect("a bundle's name is a segment")
    }

    /// The names in a marker that does not parse, of another version, say: what they name may lie in OPA because of us.
    /// `None` where there are none.
    pub fn of_names(json: &serde_json::Value) -> Option<Self> {
        let keys = |part: &str| json[part].as_object().into_iter().flat_map(|names| names.keys());
        let dirs = keys("dirs").filter_map(|dir| Some((dir.parse().ok()?, None))).collect();
        let modules = keys("modules").map(|id| (id.clone(), None)).collect();
        let marker = Self { dirs, modules, ..Self::default() };
        (marker != Self::default()).then_some(marker)
    }

    /// The directories that are surely there.
    pub fn dirs(&self) -> impl Iterator<Item = (&DirPath, Digest)> {
        self.dirs.iter().filter_map(|(path, digest)| Some((path, (*digest)?)))
    }

    /// The digest of these directories and maps.
    pub fn data_digest(&self) -> Digest {
        data_digest(self.dirs(), &self.ensure)
    }

    /// The modules that are surely there.
    pub fn modules(&self) -> impl Iterator<Item = (&str, Digest)> {
        self.modules.iter().filter_map(|(id, digest)| Some((id.as_str(), (*digest)?)))
    }

    /// The digest of these modules.
    pub fn modules_digest(&self) -> Digest {
        modules_digest(self.modules(), self.rego_version)
    }

    /// From now on modules may decide that read this.
    pub fn may_read(&mut self, reads: Option<String>) {
        if let Some(reads) = reads {
            self.reads.retain(|held| *held != reads);
            self.reads.push(reads);
            let surplus = self.reads.len().saturating_sub(READS_MAX);
            self.reads.drain(..surplus);
        }
    }

    /// From now on no modules decide but the newest.
    pub fn only_newest(&mut self) {
        let surplus = self.reads.len().saturating_sub(1);
        self.reads.drain(..surplus);
    }

    /// Writes the whole marker, in a session of this name.
    pub fn write(&self, patch: &mut PatchWriter, bundle: &str, writer: &str) {
        #[derive(Serialize)]
        struct Written<'a> {
            #[serde(flatten)]
            marker: &'a Marker,
            writer: BTreeMap<&'a str, bool>,
        }
        let written = Written { marker: self, writer: BTreeMap::from([(writer, true)]) };
        let json = serde_json::to_vec(&written).expect("a marker has text keys only");
        patch.add_dir(&Self::path(bundle), &json);
    }

    /// Writes what `delta` changes, which makes `revision` as of `position`.
    pub fn write_delta(
        &self,
        patch: &mut PatchWriter,
        bundle: &str,
        delta: &Delta,
        revision: Revision,
        position: &Position,
    ) {
        let marker = Self::path(bundle);
        let place = marker.join("dirs").expect("a segment");
        for (dir, digest) in &delta.dirs {
            match digest {
                Some(digest) => patch.add(&place, dir.as_str(), quoted(digest).as_bytes()),
                None if self.dirs.contains_key(dir) => patch.remove(&place, dir.as_str()),
                None => {}
            }
        }
        if !position.is_empty() {
            patch.add(&marker, "position", position.to_string().as_bytes());
        }
        patch.add(&marker, "revision", quoted(&revision).as_bytes());
    }

    /// Records the directories that `delta` changes.
    pub fn take_dirs(&mut self, delta: &Delta) {
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
    fn names_of_what_may_be_there_are_kept() {
        let json =
            json!({ "revision": 5, "dirs": { "/a/b": 7, "no path": null }, "modules": { "x/y.rego": [] } });
        let marker = Marker::of_names(&json).unwrap();
        assert!(marker.dirs.into_iter().eq([("/a/b".parse().unwrap(), None)]));
        assert!(marker.modules.into_iter().eq([("x/y.rego".to_owned(), None)]));
        for json in [json!({ "revision": 5 }), json!([]), json!(null), json!({ "dirs": [], "modules": "x" })]
        {
            assert_eq!(Marker::of_names(&json), None, "{json}");
        }
    }
}
