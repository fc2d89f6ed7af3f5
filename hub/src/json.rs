//! Raw JSON maps and compaction.

use std::borrow::Cow;
use std::fmt;

use opa_hub_proto::patch::push_json_string;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// Maximum depth of JSON. OPA rejects bundles with 10,000 levels.
pub(crate) const JSON_DEPTH_MAX: usize = 1000;

/// Unparsed members of a JSON object, in order.
pub(crate) struct Members<'a>(pub(crate) Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members<'de>, A::Error> {
                let mut members = Vec::with_capacity(map.size_hint().unwrap_or(8));
                while let Some((key, value)) = map.next_entry::<BorrowedKey<'de>, &RawValue>()? {
                    members.push((key.0, value));
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

/// A key, borrowed unless escaped.
#[derive(Deserialize)]
pub(crate) struct BorrowedKey<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'a> Members<'a> {
    pub(crate) fn text(&self, key: &str) -> Option<Cow<'a, str>> {
        let value = self.0.iter().find(|(name, _)| name == key)?.1;
        serde_json::from_str::<BorrowedKey<'a>>(value.get()).ok().map(|text| text.0)
    }
}

pub(crate) fn write_key(out: &mut Vec<u8>, key: &str) {
    if out.last() != Some(&b'{') {
        out.push(b',');
    }
    push_json_string(out, key);
    out.push(b':');
}

/// Appends valid `json` without white space between tokens. Returns its depth.
pub(crate) fn push_compact(out: &mut Vec<u8>, json: &str) -> usize {
    let (mut depth, mut deepest) = (0, 0);
    let mut in_string = false;
    let mut escaped = false;
    let mut copied = 0;
    let bytes = json.as_bytes();
    for (index, byte) in bytes.iter().enumerate() {
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
        } else {
            match byte {
                b'"' => in_string = true,
                b'{' | b'[' => {
                    depth += 1;
                    deepest = deepest.max(depth);
                }
                b'}' | b']' => depth -= 1,
                b' ' | b'\n' | b'\r' | b'\t' => {
                    out.extend_from_slice(&bytes[copied..index]);
                    copied = index + 1;
                }
                _ => {}
            }
        }
    }
    out.extend_from_slice(&bytes[copied..]);
    deepest
}
