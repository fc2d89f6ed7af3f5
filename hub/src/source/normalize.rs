//! Canonical JSON of an object: `kind` and `apiVersion` first (list items lack them), no white space, no
//! `managedFields`, no last-applied annotation: both change with each write. Key order and number text are preserved.

use bytes::Bytes;
use opa_hub_proto::patch::push_json_string;

use crate::json::{JSON_DEPTH_MAX, Members, push_compact, write_key};
use crate::model::{Object, ObjectKey};

const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Failure to normalize an object.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
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

/// Normalizes `json`. `api_version` and `kind` are defaults.
pub(crate) fn object(json: &str, api_version: &str, kind: &str) -> Result<Object, Error> {
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
