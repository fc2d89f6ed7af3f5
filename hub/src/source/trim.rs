//! Canonical JSON of an object: `kind` and `apiVersion` first (list items lack them), no white space, no
//! `managedFields`, no last-applied annotation: both change with each write. Key order and number text are preserved.

use std::borrow::Cow;
use std::fmt;

use bytes::Bytes;
use opa_hub_proto::patch::push_json_string;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::config::JSON_DEPTH_MAX;
use crate::model::{Object, ObjectKey};

const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Failure to normalize an object.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not a JSON object.
    #[error("not a JSON object: {0}")]
    Json(#[from] serde_json::Error),
    /// No name.
    #[error("metadata.name is missing")]
    NoName,
    /// Too deep for OPA.
    #[error("nested deeper than {JSON_DEPTH_MAX} levels")]
    TooDeep,
}

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
struct BorrowedKey<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'a> Members<'a> {
    fn text(&self, key: &str) -> Option<Cow<'a, str>> {
        let value = self.0.iter().find(|(name, _)| name == key)?.1;
        serde_json::from_str::<BorrowedKey<'a>>(value.get()).ok().map(|text| text.0)
    }
}

/// Normalizes `json`. `api_version` and `kind` are defaults.
pub fn object(json: &str, api_version: &str, kind: &str) -> Result<Object, Error> {
    let members: Members = serde_json::from_str(json)?;
    let metadata = members.0.iter().find(|(key, _)| key == "metadata").ok_or(Error::NoName)?.1;
    let metadata: Members = serde_json::from_str(metadata.get())?;
    let name = metadata.text("name").filter(|name| !name.is_empty()).ok_or(Error::NoName)?;
    let namespace = metadata.text("namespace").unwrap_or_default();
    let key = ObjectKey { namespace: namespace.into(), name: name.into() };

    let mut out = Vec::with_capacity(json.len());
    let mut deepest = 0;
    out.push(b'{');
    let text_or = |key: &str, default: &str| members.text(key).unwrap_or_else(|| default.to_owned().into());
    write_key(&mut out, "kind");
    push_json_string(&mut out, &text_or("kind", kind));
    write_key(&mut out, "apiVersion");
    push_json_string(&mut out, &text_or("apiVersion", api_version));
    for (key, value) in &members.0 {
        match key.as_ref() {
            "kind" | "apiVersion" => {}
            "metadata" => {
                write_key(&mut out, key);
                push_metadata(&mut out, &metadata)?;
            }
            _ => {
                write_key(&mut out, key);
                deepest = deepest.max(push_compact(&mut out, value.get()));
            }
        }
    }
    if deepest >= JSON_DEPTH_MAX {
        return Err(Error::TooDeep);
    }
    out.push(b'}');
    // Shrinking in place would fragment the heap.
    Ok(Object { key, json: Bytes::copy_from_slice(&out) })
}

fn push_metadata(out: &mut Vec<u8>, metadata: &Members) -> Result<(), Error> {
    out.push(b'{');
    for (key, value) in &metadata.0 {
        match key.as_ref() {
            "managedFields" => {}
            "annotations" if value.get().contains(LAST_APPLIED) => {
                let mut annotations: Members = serde_json::from_str(value.get())?;
                annotations.0.retain(|(name, _)| name != LAST_APPLIED);
                if !annotations.0.is_empty() {
                    write_key(out, key);
                    out.push(b'{');
                    for (name, value) in &annotations.0 {
                        write_key(out, name);
                        push_compact(out, value.get());
                    }
                    out.push(b'}');
                }
            }
            _ => {
                write_key(out, key);
                push_compact(out, value.get());
            }
        }
    }
    out.push(b'}');
    Ok(())
}

fn write_key(out: &mut Vec<u8>, key: &str) {
    if out.last() != Some(&b'{') {
        out.push(b',');
    }
    push_json_string(out, key);
    out.push(b':');
}

/// Appends valid `json` without white space between tokens. Returns its depth.
pub fn push_compact(out: &mut Vec<u8>, json: &str) -> usize {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn check(json: &str, expected: &str) {
        let object = object(json, "v1", "Pod").unwrap();
        assert_eq!(std::str::from_utf8(&object.json).unwrap(), expected);
    }

    #[test]
    fn listed_and_watched_objects_are_equal() {
        let expected = r#"{"kind":"Pod","apiVersion":"v1","metadata":{"name":"p"},"spec":{"x":1.50}}"#;
        check(r#"{"kind":"Pod","apiVersion":"v1","metadata":{"name":"p"},"spec":{"x":1.50}}"#, expected);
        check(r#"{ "metadata": {"name":"p"}, "spec":{"x": 1.50 } }"#, expected);
        check(
            "{\"apiVersion\":\"v1\",\n\t\"kind\":\"Pod\",\"metadata\":{\"name\":\"p\"},\"spec\":{\"x\":1.50}}",
            expected,
        );
    }

    #[test]
    fn drops_only_what_each_write_changes() {
        check(
            r#"{"metadata":{"managedFields":[{"a":1}],"name":"p","annotations":{"kubectl.kubernetes.io/last-applied-configuration":"{}","b":" c\" \\"}},"managedFields":1}"#,
            r#"{"kind":"Pod","apiVersion":"v1","metadata":{"name":"p","annotations":{"b":" c\" \\"}},"managedFields":1}"#,
        );
        check(
            r#"{"metadata":{"name":"p","annotations":{"kubectl.kubernetes.io/last-applied-configuration":"{}"}}}"#,
            r#"{"kind":"Pod","apiVersion":"v1","metadata":{"name":"p"}}"#,
        );
    }

    #[test]
    fn names() {
        let object = object(r#"{"metadata":{"name":"a\u0062","namespace":"n"}}"#, "v1", "Pod").unwrap();
        assert_eq!(object.key.to_string(), "n/ab");
        for bad in
            ["", "[]", "{}", r#"{"metadata":1}"#, r#"{"metadata":{"name":""}}"#, r#"{"metadata":{"name":1}}"#]
        {
            assert!(super::object(bad, "v1", "Pod").is_err(), "{bad}");
        }
    }
}
