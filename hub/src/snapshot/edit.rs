//! Edits: members that a change sets or removes. Frames carry them instead of whole values.

use std::collections::BTreeMap;
use std::sync::Arc;

use opa_hub_proto::path::escape;
use serde_json::value::RawValue;

use crate::model::ALLOCATION_BYTES;

/// Minimum bytes of an edited value: an edit of less saves nothing.
const VALUE_BYTES_MIN: usize = 256;
/// Maximum bytes of an edit: the log has one for each key of each commit.
const EDIT_BYTES_MAX: usize = 1024;
/// Maximum operations of an edit: OPA's time grows with their square.
const EDIT_OPS_MAX: usize = 8;
/// Maximum depth of a member: each level parses its value again.
const DEPTH_MAX: usize = 8;
/// Maximum keys of a commit with edits: new masks and lists change more.
pub(crate) const EDITED_KEYS_MAX: usize = 64;

/// Operations from one value to the next.
pub struct Edit {
    ops: Vec<Op>,
    bytes: usize,
}

struct Op {
    /// Escaped path below the value.
    path: Box<str>,
    /// JSON; `None` removes.
    value: Option<Box<str>>,
    existed: bool,
}

impl Edit {
    /// Edit from `old` to `new`; `None` if `new` is as small.
    pub fn between(old: &[u8], new: &[u8]) -> Option<Self> {
        if new.len() < VALUE_BYTES_MIN {
            return None;
        }
        let mut edit = Self { ops: Vec::new(), bytes: 0 };
        edit.compare(&members(old)?, &members(new)?, &mut String::new(), DEPTH_MAX)?;
        (edit.bytes * 2 <= new.len()).then_some(edit)
    }

    pub(crate) fn memory(&self) -> usize {
        size_of::<Self>() + self.bytes + self.ops.len() * (size_of::<Op>() + 2 * ALLOCATION_BYTES)
    }

    fn compare(
        &mut self,
        old: &BTreeMap<String, &RawValue>,
        new: &BTreeMap<String, &RawValue>,
        path: &mut String,
        depth: usize,
    ) -> Option<()> {
        let end = path.len();
        let removed = old.keys().filter(|key| !new.contains_key(*key)).map(|key| (key, None));
        let present = new.iter().map(|(key, value)| (key, Some(*value)));
        for (key, value) in removed.chain(present) {
            let before = old.get(key).map(|value| value.get());
            if before == value.map(RawValue::get) {
                continue;
            }
            // OPA has no path to an empty name.
            if key.is_empty() {
                return None;
            }
            path.push('/');
            path.push_str(&escape(key));
            let pair = before.zip(value).filter(|_| depth > 1);
            let inner = pair.and_then(|(before, value)| {
                Some((members(before.as_bytes())?, members(value.get().as_bytes())?))
            });
            match inner {
                Some((before, value)) => self.compare(&before, &value, path, depth - 1)?,
                None => self.push(path, value, before.is_some())?,
            }
            path.truncate(end);
        }
        Some(())
    }

    fn push(&mut self, path: &str, value: Option<&RawValue>, existed: bool) -> Option<()> {
        self.bytes += path.len() + value.map_or(0, |value| value.get().len());
        if self.bytes > EDIT_BYTES_MAX || self.ops.len() == EDIT_OPS_MAX {
            return None;
        }
        self.ops.push(Op { path: path.into(), value: value.map(|value| value.get().into()), existed });
        Some(())
    }
}

/// Merges edits that lead to `value`, one operation for each path: OPA evaluates a second one against the data before
/// the patch (v1/storage/inmem/txn.go). `None` if `value` is as small.
pub fn merge<'a>(edits: &'a [Arc<Edit>], value: &[u8]) -> Option<Vec<(&'a str, Option<&'a str>)>> {
    let mut merged: Vec<(&Op, bool)> = Vec::new();
    for op in edits.iter().flat_map(|edit| &edit.ops) {
        let mut existed = op.existed;
        merged.retain(|(earlier, was)| match earlier.path.strip_prefix(&*op.path) {
            Some("") => {
                existed = *was;
                false
            }
            below => !below.is_some_and(|below| below.starts_with('/')),
        });
        if op.value.is_some() || existed {
            merged.push((op, existed));
        }
    }
    let ops: Vec<_> = merged.into_iter().map(|(op, _)| (&*op.path, op.value.as_deref())).collect();
    let bytes: usize = ops.iter().map(|(path, value)| path.len() + value.map_or(0, str::len)).sum();
    (bytes * 2 <= value.len()).then_some(ops)
}

fn members(json: &[u8]) -> Option<BTreeMap<String, &RawValue>> {
    if json.first() == Some(&b'{') { serde_json::from_slice(json).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn edit_is_none_if_the_value_is_as_small() {
        let long = "x".repeat(300);
        let many: Value =
            (0..9).map(|nth| (nth.to_string(), json!(1))).collect::<serde_json::Map<_, _>>().into();
        for (old, new) in [
            (json!({ "a": 1 }), json!({ "a": 2 })),
            (json!([1, &long]), json!([2, &long])),
            (json!({ "rest": &long, "a": 1 }), json!({ "rest": &long[1..], "a": 1 })),
            (json!({ "rest": &long, "": 1 }), json!({ "rest": &long, "": 2 })),
            (json!({ "rest": &long }), json!({ "rest": &long, "m": many, "n": &long })),
            (json!(&long), json!({ "rest": &long })),
        ] {
            assert!(Edit::between(old.to_string().as_bytes(), new.to_string().as_bytes()).is_none(), "{old}");
        }
        let mut more = json!({ "rest": &long });
        (0..9).for_each(|nth: usize| more[nth.to_string()] = 1.into());
        let rest = json!({ "rest": &long }).to_string();
        assert!(Edit::between(rest.as_bytes(), more.to_string().as_bytes()).is_none(), "nine operations");
    }
}
