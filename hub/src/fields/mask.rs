//! Field masks: the parts of objects that are served.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use opa_hub_proto::patch::push_json_string;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::json::Members;
use crate::policy::dataflow::{ReadDepth, Segment};

/// Tree of fields. Values in the tree retain their type, scalars their content.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct FieldMask {
    /// Includes all fields below.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    whole: bool,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    names: BTreeMap<Arc<str>, FieldMask>,
    /// Mask of every member or element, in addition.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    any: Option<Box<FieldMask>>,
}

/// Invalid field path.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{0:?} names no field; write names and dots, [*] for every element, [\"…\"] for other names, e.g. spec.containers[*].image"
)]
pub struct InvalidField(String);

impl FieldMask {
    /// Mask of these paths and all below.
    pub fn parse<'a>(paths: impl IntoIterator<Item = &'a str>) -> Result<Self, InvalidField> {
        let mut fields = Self::default();
        for path in paths {
            fields.insert(&steps(path).ok_or_else(|| InvalidField(path.to_owned()))?, ReadDepth::Whole);
        }
        Ok(fields)
    }

    /// Mask of all fields.
    pub fn all() -> Self {
        Self { whole: true, ..Self::default() }
    }

    /// Whether all fields are included.
    pub fn is_all(&self) -> bool {
        self.whole
    }

    /// Adds the field at `steps`.
    pub fn insert(&mut self, steps: &[Segment], extent: ReadDepth) {
        if self.whole {
            return;
        }
        let Some((first, rest)) = steps.split_first() else {
            if extent == ReadDepth::Whole {
                *self = Self::all();
            }
            return;
        };
        match first {
            Segment::Key(name) => self.names.entry(name.clone()).or_default().insert(rest, extent),
            Segment::Wildcard => self.any.get_or_insert_default().insert(rest, extent),
        }
    }

    /// Whether all fields of `other` are included.
    pub(crate) fn includes(&self, other: &Self) -> bool {
        let has =
            |(name, fields): (&Arc<str>, &Self)| self.child(name).is_some_and(|mask| mask.includes(fields));
        let any = |fields: &Self| self.any.as_ref().is_some_and(|mask| mask.includes(fields));
        self.whole || !other.whole && other.names.iter().all(has) && other.any.as_deref().is_none_or(any)
    }

    /// Adds the fields of `other`.
    pub fn join(&mut self, other: &Self) {
        if self.whole {
            return;
        }
        if other.whole {
            *self = Self::all();
            return;
        }
        for (name, fields) in &other.names {
            self.names.entry(name.clone()).or_default().join(fields);
        }
        if let Some(any) = &other.any {
            self.any.get_or_insert_default().join(any);
        }
    }

    /// Paths of the leaves.
    pub fn paths(&self) -> Vec<(Vec<Segment>, ReadDepth)> {
        fn collect(fields: &FieldMask, path: &mut Vec<Segment>, out: &mut Vec<(Vec<Segment>, ReadDepth)>) {
            if fields.whole {
                out.push((path.clone(), ReadDepth::Whole));
            } else if fields.names.is_empty() && fields.any.is_none() && !path.is_empty() {
                out.push((path.clone(), ReadDepth::Shallow));
            }
            let names = fields.names.iter().map(|(name, below)| (Segment::Key(name.clone()), below));
            for (step, below) in names.chain(fields.any.iter().map(|below| (Segment::Wildcard, &**below))) {
                path.push(step);
                collect(below, path, out);
                path.pop();
            }
        }
        let mut paths = Vec::new();
        collect(self, &mut Vec::new(), &mut paths);
        paths
    }

    fn child(&self, name: &str) -> Option<Self> {
        match (self.names.get(name), &self.any) {
            (None, None) => None,
            (Some(fields), None) => Some(fields.clone()),
            (None, Some(any)) => Some((**any).clone()),
            (Some(fields), Some(any)) => {
                let mut union = fields.clone();
                union.join(any);
                Some(union)
            }
        }
    }

    /// Joint mask of all members: an index may be anything.
    fn element(&self) -> Self {
        let mut fields = Self::default();
        self.names.values().chain(self.any.as_deref()).for_each(|other| fields.join(other));
        fields
    }

    /// Prunes an object.
    pub(crate) fn cut_object(&self, json: &Bytes) -> Result<Bytes, serde_json::Error> {
        if self.whole {
            return Ok(json.clone());
        }
        let mut cut = Vec::new();
        self.cut(std::str::from_utf8(json).expect("objects come as text"), &mut cut)?;
        Ok(Bytes::copy_from_slice(&cut))
    }

    /// Appends `json`, which has no insignificant white space, pruned.
    pub fn cut(&self, json: &str, out: &mut Vec<u8>) -> Result<(), serde_json::Error> {
        match json.as_bytes().first() {
            _ if self.whole => out.extend_from_slice(json.as_bytes()),
            Some(b'{') => {
                out.push(b'{');
                let empty = out.len();
                for (name, value) in &serde_json::from_str::<Members>(json)?.0 {
                    let Some(fields) = self.child(name.as_ref()) else { continue };
                    if out.len() > empty {
                        out.push(b',');
                    }
                    push_json_string(out, name);
                    out.push(b':');
                    fields.cut(value.get(), out)?;
                }
                out.push(b'}');
            }
            Some(b'[') => {
                out.push(b'[');
                if !self.names.is_empty() || self.any.is_some() {
                    let fields = self.element();
                    for (index, value) in serde_json::from_str::<Vec<&RawValue>>(json)?.iter().enumerate() {
                        if index > 0 {
                            out.push(b',');
                        }
                        fields.cut(value.get(), out)?;
                    }
                }
                out.push(b']');
            }
            _ => out.extend_from_slice(json.as_bytes()),
        }
        Ok(())
    }
}

/// A name with one of these is written in brackets and quotes.
const QUOTED_CHARS: [char; 6] = ['.', '[', ']', '"', '*', ' '];

fn steps(path: &str) -> Option<Vec<Segment>> {
    let mut steps = Vec::new();
    let mut rest = path;
    while !rest.is_empty() {
        if let Some(after) = rest.strip_prefix("[*]") {
            steps.push(Segment::Wildcard);
            rest = after;
        } else if let Some(after) = rest.strip_prefix('[') {
            let mut texts = serde_json::Deserializer::from_str(after).into_iter::<String>();
            steps.push(Segment::Key(texts.next()?.ok()?.into()));
            rest = after[texts.byte_offset()..].strip_prefix(']')?;
        } else {
            let from = if steps.is_empty() { rest } else { rest.strip_prefix('.')? };
            let end = from.find(['.', '[']).unwrap_or(from.len());
            let (name, after) = from.split_at(end);
            if name.is_empty() || name.contains(QUOTED_CHARS) {
                return None;
            }
            steps.push(Segment::Key(name.into()));
            rest = after;
        }
    }
    (!steps.is_empty()).then_some(steps)
}

impl fmt::Display for FieldMask {
    /// One path per line, `…` if all fields below are included.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (steps, extent) in self.paths() {
            for (index, step) in steps.iter().enumerate() {
                match step {
                    Segment::Wildcard => f.write_str("[*]")?,
                    Segment::Key(name) if name.is_empty() || name.contains(QUOTED_CHARS) => {
                        write!(f, "[{}]", serde_json::Value::from(&**name))?;
                    }
                    Segment::Key(name) => write!(f, "{}{name}", if index == 0 { "" } else { "." })?,
                }
            }
            writeln!(f, "{}", if extent == ReadDepth::Whole { "…" } else { "" })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Paths are written `a.*.b`, with `!` at the end for all below.
    fn check(paths: &[&str], json: &str, expected: &str) {
        let mut fields = FieldMask::default();
        for path in paths {
            let (path, extent) = match path.strip_suffix('!') {
                Some(path) => (path, ReadDepth::Whole),
                None => (*path, ReadDepth::Shallow),
            };
            let step = |name: &str| if name == "*" { Segment::Wildcard } else { Segment::Key(name.into()) };
            fields.insert(
                &path.split('.').filter(|name| !name.is_empty()).map(step).collect::<Vec<_>>(),
                extent,
            );
        }
        let mut cut = Vec::new();
        fields.cut(json, &mut cut).unwrap();
        assert_eq!(String::from_utf8(cut).unwrap(), expected, "{paths:?}");
    }

    #[test]
    fn objects_are_pruned_to_fields() {
        let pod = r#"{"kind":"Pod","metadata":{"labels":{"app":"a","x":"1.50"},"name":"p"},"spec":{"c":[{"image":"i","n":1.50},{"n":2}]}}"#;
        check(&[], pod, "{}");
        check(&["!"], pod, pod);
        check(&["metadata.labels.app", "nope.nope"], pod, r#"{"metadata":{"labels":{"app":"a"}}}"#);
        check(
            &["metadata.labels!", "metadata.labels.app"],
            pod,
            r#"{"metadata":{"labels":{"app":"a","x":"1.50"}}}"#,
        );
        check(&["spec.c.*.image"], pod, r#"{"spec":{"c":[{"image":"i"},{}]}}"#);
        check(&["spec.c.0.n"], pod, r#"{"spec":{"c":[{"n":1.50},{"n":2}]}}"#);
        check(&["spec.c"], pod, r#"{"spec":{"c":[]}}"#);
        check(
            &["metadata.*", "metadata.labels.x"],
            pod,
            r#"{"metadata":{"labels":{"x":"1.50"},"name":"p"}}"#,
        );
        check(&["kind.deeper"], pod, r#"{"kind":"Pod"}"#);
    }

    #[test]
    fn printed_paths_parse() {
        let paths = ["metadata.labels", "spec.containers[*].image", "metadata.annotations[\"a/b\"].c"];
        let printed = FieldMask::parse(paths).unwrap().to_string();
        assert_eq!(printed, "metadata.annotations.a/b.c…\nmetadata.labels…\nspec.containers[*].image…\n");
        for bad in ["", ".", "a.", ".a", "a..b", "a[", "a[b]", "a[\"b\"", "a]", "a[*]b", "a b"] {
            assert_eq!(FieldMask::parse([bad]), Err(InvalidField(bad.into())), "{bad}");
        }
    }

    #[test]
    fn fields_print_as_paths() {
        let mut fields = FieldMask::default();
        let name = |name: &str| Segment::Key(name.into());
        fields.insert(&[name("spec"), name("c"), Segment::Wildcard, name("image")], ReadDepth::Shallow);
        fields.insert(&[name("metadata"), name("labels")], ReadDepth::Whole);
        assert_eq!(fields.to_string(), "metadata.labels…\nspec.c[*].image\n");
    }
}
