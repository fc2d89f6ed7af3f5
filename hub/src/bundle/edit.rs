//! Edits: the members of an object that one change sets or removes. A frame carries them in place of the whole value,
//! so that a label on a pod of 10 KB costs a few hundred bytes on the wire, and as little work in OPA.

use std::collections::BTreeMap;
use std::sync::Arc;

use opa_hub_proto::patch::PatchWriter;
use opa_hub_proto::path::{DirPath, escape};
use serde_json::value::RawValue;

/// Minimum bytes of a value that is edited. A smaller one is replaced for about as many bytes.
const VALUE_BYTES_MIN: usize = 256;
/// Maximum bytes of an edit: the log holds one for each key of each commit.
const EDIT_BYTES_MAX: usize = 1024;
/// Maximum number of operations of an edit: the time that OPA takes for a patch grows with the square of their number.
const EDIT_OPS_MAX: usize = 8;
/// Maximum depth of a member. Each level reads its part of the value again.
const DEPTH_MAX: usize = 8;
/// Maximum number of operations that successive edits of one key make in a frame.
const KEY_OPS_MAX: usize = 16;

/// The operations that turn one value into the next.
pub struct Edit {
    ops: Vec<Op>,
    bytes: usize,
}

/// Sets a member, or removes it.
struct Op {
    /// From the value to the member, escaped, with a leading slash.
    path: Box<str>,
    /// JSON; `None` removes.
    value: Option<Box<str>>,
}

impl Edit {
    /// The edit that turns the JSON `old` into `new`. `None` where `new` by itself is as good.
    pub fn between(old: &[u8], new: &[u8]) -> Option<Self> {
        if new.len() < VALUE_BYTES_MIN {
            return None;
        }
        let mut edit = Self { ops: Vec::new(), bytes: 0 };
        edit.compare(&members(old)?, &members(new)?, &mut String::new(), DEPTH_MAX)?;
        (edit.bytes * 2 <= new.len()).then_some(edit)
    }

    /// Bytes of paths and values.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn compare(
        &mut self,
        old: &BTreeMap<String, &RawValue>,
        new: &BTreeMap<String, &RawValue>,
        at: &mut String,
        depth: usize,
    ) -> Option<()> {
        let end = at.len();
        let gone = old.keys().filter(|key| !new.contains_key(*key)).map(|key| (key, None));
        let rest = new.iter().map(|(key, value)| (key, Some(*value)));
        for (key, value) in gone.chain(rest) {
            let before = old.get(key).map(|value| value.get());
            if before == value.map(RawValue::get) {
                continue;
            }
            // OPA has no path to a member without a name.
            if key.is_empty() {
                return None;
            }
            at.push('/');
            at.push_str(&escape(key));
            let both = before.zip(value).filter(|_| depth > 1);
            let inner = both.and_then(|(before, value)| {
                Some((members(before.as_bytes())?, members(value.get().as_bytes())?))
            });
            match inner {
                Some((before, value)) => self.compare(&before, &value, at, depth - 1)?,
                None => self.push(at, value)?,
            }
            at.truncate(end);
        }
        Some(())
    }

    fn push(&mut self, path: &str, value: Option<&RawValue>) -> Option<()> {
        self.bytes += path.len() + value.map_or(0, |value| value.get().len());
        if self.bytes > EDIT_BYTES_MAX || self.ops.len() == EDIT_OPS_MAX {
            return None;
        }
        self.ops.push(Op { path: path.into(), value: value.map(|value| value.get().into()) });
        Some(())
    }
}

/// Whether these edits, one after the other, cost less than `value`, which they lead to.
pub fn are_worth(edits: &[Arc<Edit>], value: &[u8]) -> bool {
    edits.iter().map(|edit| edit.ops.len()).sum::<usize>() <= KEY_OPS_MAX
        && edits.iter().map(|edit| edit.bytes).sum::<usize>() * 2 <= value.len()
}

/// Writes edits of one entry of `dir`, the oldest first.
pub fn write(patch: &mut PatchWriter, dir: &DirPath, key: &str, edits: &[Arc<Edit>]) {
    for Op { path, value } in edits.iter().flat_map(|edit| &edit.ops) {
        patch.member(dir, key, path, value.as_deref().map(str::as_bytes));
    }
}

/// The members of a JSON object; `None` of anything else.
fn members(json: &[u8]) -> Option<BTreeMap<String, &RawValue>> {
    if json.first() == Some(&b'{') { serde_json::from_slice(json).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn object(random: &mut fastrand::Rng, depth: usize) -> Value {
        let names = ["a", "b~c", "d/e", "f%", "0", "-", "é"];
        let mut object = json!({});
        for name in names {
            object[name] = match random.u8(..8) {
                0 => continue,
                1 | 2 if depth > 0 => self::object(random, depth - 1),
                3 => json!([random.u8(..3), { "x": random.u8(..3) }]),
                4 => json!(null),
                5 => json!({}),
                _ => json!(random.u8(..3)),
            };
        }
        object
    }

    fn apply(value: &mut Value, edits: &[Arc<Edit>]) {
        let mut patch = PatchWriter::default();
        write(&mut patch, &"/d".parse().unwrap(), "k", edits);
        // OPA decodes percents, a JSON patch does not.
        let text = String::from_utf8(patch.into_array()).unwrap().replace("%25", "%");
        let mut data = json!({ "d": { "k": value } });
        let patch: json_patch::Patch = serde_json::from_str(&text).unwrap();
        json_patch::patch(&mut data, &patch).unwrap();
        *value = data["d"]["k"].take();
    }

    #[test]
    fn edits_lead_to_the_new_value_one_by_one_and_in_a_row() {
        let random = &mut fastrand::Rng::with_seed(1);
        let (mut edited, mut rows) = (0, 0);
        for _ in 0..20_000 {
            // What stays makes an edit worth it.
            let mut first = object(random, 3);
            first["rest"] = "x".repeat(2000).into();
            let mut last = first.clone();
            let mut edits = Vec::new();
            for _ in 0..3 {
                let mut next = last.clone();
                let (name, other) = (["a", "d/e", "f%", "0"][random.usize(..4)], object(random, 2));
                match random.u8(..3) {
                    0 => next[name] = other,
                    1 if next[name].is_object() => next[name]["b~c"] = other,
                    _ => _ = next.as_object_mut().unwrap().remove(name),
                }
                let text = |value: &Value| value.to_string().into_bytes();
                let Some(edit) = Edit::between(&text(&last), &text(&next)) else { break };
                let mut value = last.clone();
                let edit = Arc::new(edit);
                apply(&mut value, &[Arc::clone(&edit)]);
                assert!(value == next, "from {last}");
                edited += usize::from(!edit.ops.is_empty());
                last = next;
                edits.push(edit);
            }
            rows += usize::from(edits.len() == 3);
            apply(&mut first, &edits);
            assert!(first == last, "to {last}");
        }
        assert!(edited > 10_000 && rows > 5_000, "{edited} edits, {rows} rows");
    }

    #[test]
    fn values_are_replaced_where_an_edit_is_no_less() {
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
