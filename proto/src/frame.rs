//! Frames, the events of the delta stream.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::path::DirPath;
use crate::position::Position;
use crate::revision::{Digest, Revision};

/// Maximum frame size, in bytes. Agents buffer frames; larger changes need reconcile, which streams.
pub const FRAME_BYTES_MAX: usize = 4 << 20;

/// Changed data.
#[derive(Serialize, Deserialize, Debug)]
pub struct Delta<'a> {
    /// Data digest before the frame.
    pub from: Digest,
    /// Data digest after the frame.
    pub to: Digest,
    /// Position up to which the result is complete.
    #[serde(default, skip_serializing_if = "Position::is_empty")]
    pub position: Position,
    /// Newest position contained; `None` if equal to `position`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub newest: Option<Position>,
    /// New unreplicated directories, to create with parents before the patch.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ensure: Vec<DirPath>,
    /// Digests of changed directories; `None` if removed.
    pub dirs: BTreeMap<DirPath, Option<Digest>>,
    /// Whether fields are removed that older modules read; replace those first.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub narrows: bool,
    /// Number of operations.
    pub ops: usize,
    /// RFC 6902 operations. Last, so that agents splice without parsing.
    #[serde(borrow)]
    pub patch: &'a RawValue,
}

/// Changed modules.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Modules digest before the frame.
    pub from: Digest,
    /// Modules digest after the frame.
    pub to: Digest,
    /// Position up to which the result is complete.
    #[serde(default, skip_serializing_if = "Position::is_empty")]
    pub position: Position,
    /// Newest position contained; `None` if equal to `position`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub newest: Option<Position>,
    /// Module texts by id.
    pub put: BTreeMap<String, String>,
    /// Removed module ids.
    pub remove: Vec<String>,
    /// Field masks of the new modules; `None` if unpruned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reads: Option<String>,
}

impl Delta<'_> {
    /// Agent's position after this frame.
    #[must_use]
    pub fn after(&self, before: &Position) -> Position {
        self.newest.as_ref().unwrap_or(&self.position).clone().after(before)
    }
}

impl Policy {
    /// Agent's position after this frame.
    #[must_use]
    pub fn after(&self, before: &Position) -> Position {
        self.newest.as_ref().unwrap_or(&self.position).clone().after(before)
    }
}

/// Event name of a [`Delta`].
pub const DELTA_EVENT: &str = "delta";
/// Event name of a [`Policy`].
pub const POLICY_EVENT: &str = "policy";

/// Appends an event that leads to `revision`. `json` must be one line.
pub fn write_event(out: &mut Vec<u8>, revision: Revision, event: &str, json: &[u8]) {
    debug_assert!(!json.contains(&b'\n'), "a line feed would end the event's data");
    out.extend_from_slice(format!("id: {revision}\nevent: {event}\ndata: ").as_bytes());
    out.extend_from_slice(json);
    out.extend_from_slice(b"\n\n");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// I9.
        #[test]
        fn i9_random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = serde_json::from_slice::<Delta>(&bytes);
            let _ = serde_json::from_slice::<Policy>(&bytes);
        }

        /// I9.
        #[test]
        fn i9_damaged_frames_never_panic(offset in 0usize..200, byte in any::<u8>()) {
            let digest = Digest::of(b"x");
            let patch = RawValue::from_string(r#"[{"op":"remove","path":"/a/b/c"}]"#.into()).unwrap();
            let delta = Delta {
                from: digest, to: digest, position: Position::default(), newest: None, ensure: vec!["/a".parse().unwrap()],
                dirs: BTreeMap::from([("/a/b".parse().unwrap(), Some(digest))]), narrows: false, ops: 1, patch: &patch,
            };
            let mut bytes = serde_json::to_vec(&delta).unwrap();
            let offset = offset % bytes.len();
            bytes[offset] = byte;
            let _ = serde_json::from_slice::<Delta>(&bytes);
        }
    }
}
