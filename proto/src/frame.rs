//! One unit of the delta stream: what changed between two contents, as a server-sent event.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::path::DirPath;
use crate::position::Position;
use crate::revision::{Digest, Revision};

/// Bytes of one frame at most. An agent buffers a frame whole, so this bounds its memory; the hub lets an agent
/// whose frame would be larger reconcile, which streams.
pub const FRAME_BYTES_MAX: usize = 4 << 20;

/// The keys that changed between two data digests.
#[derive(Serialize, Deserialize, Debug)]
pub struct Delta<'a> {
    /// Data digest that the agent must hold.
    pub from: Digest,
    /// Data digest that it holds afterwards.
    pub to: Digest,
    /// What it leads to holds all that happened before this …
    #[serde(default, skip_serializing_if = "Position::is_empty")]
    pub position: Position,
    /// … and nothing that happened after this, if that is not the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub newest: Option<Position>,
    /// New directories outside the replicated resources: to be made, with their parents, before the patch.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ensure: Vec<DirPath>,
    /// Digests of the directories that the patch touches; none: the directory is gone.
    pub dirs: BTreeMap<DirPath, Option<Digest>>,
    /// Whether fields go that older modules read: those must be gone before.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub narrows: bool,
    /// How many operations `patch` holds.
    pub ops: usize,
    /// RFC 6902 `add` and `remove`, at most one a key. Last, so that whoever splices it need not parse it.
    #[serde(borrow)]
    pub patch: &'a RawValue,
}

/// The modules that changed between two module digests.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Modules digest that the agent must hold.
    pub from: Digest,
    /// Modules digest that it holds afterwards.
    pub to: Digest,
    /// What it leads to holds all that happened before this …
    #[serde(default, skip_serializing_if = "Position::is_empty")]
    pub position: Position,
    /// … and nothing that happened after this, if that is not the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub newest: Option<Position>,
    /// Texts to put, by module id.
    pub put: BTreeMap<String, String>,
    /// Ids to remove.
    pub remove: Vec<String>,
    /// What of replicated objects the modules read then, in the hub's words; none: objects come whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reads: Option<String>,
}

impl Delta<'_> {
    /// As of when an agent is that held what was as of `before` and takes this.
    #[must_use]
    pub fn after(&self, before: &Position) -> Position {
        self.newest.as_ref().unwrap_or(&self.position).clone().after(before)
    }
}

impl Policy {
    /// The same.
    #[must_use]
    pub fn after(&self, before: &Position) -> Position {
        self.newest.as_ref().unwrap_or(&self.position).clone().after(before)
    }
}

/// The name of the event that carries a [`Delta`].
pub const DELTA_EVENT: &str = "delta";
/// The name of the event that carries a [`Policy`].
pub const POLICY_EVENT: &str = "policy";

/// Writes an event: `held` is the revision that an agent holds once it applied it. `json` has no line feed.
pub fn write_event(out: &mut Vec<u8>, held: Revision, event: &str, json: &[u8]) {
    debug_assert!(!json.contains(&b'\n'), "a line feed would end the event's data");
    out.extend_from_slice(format!("id: {held}\nevent: {event}\ndata: ").as_bytes());
    out.extend_from_slice(json);
    out.extend_from_slice(b"\n\n");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// I9: no frame from outside panics the decoder.
        #[test]
        fn i9_random_bytes_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = serde_json::from_slice::<Delta>(&bytes);
            let _ = serde_json::from_slice::<Policy>(&bytes);
        }

        /// I9: nor does a frame that was damaged on its way.
        #[test]
        fn i9_damaged_frames_do_not_panic(at in 0usize..200, byte in any::<u8>()) {
            let digest = Digest::of(b"x");
            let patch = RawValue::from_string(r#"[{"op":"remove","path":"/a/b/c"}]"#.into()).unwrap();
            let delta = Delta {
                from: digest, to: digest, position: Position::default(), newest: None, ensure: vec!["/a".parse().unwrap()],
                dirs: BTreeMap::from([("/a/b".parse().unwrap(), Some(digest))]), narrows: false, ops: 1, patch: &patch,
            };
            let mut bytes = serde_json::to_vec(&delta).unwrap();
            let at = at % bytes.len();
            bytes[at] = byte;
            let _ = serde_json::from_slice::<Delta>(&bytes);
        }
    }
}
