//! A Rego module and its package.
//!
//! The hub parses the package line itself, since it determines the bundle's roots.

use std::collections::BTreeSet;

use opa_hub_proto::path::{DirPath, is_segment};
use opa_hub_proto::revision::Digest;

/// A module with a valid package.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Module {
    /// Source.
    pub text: String,
    /// Digest of the source.
    pub digest: Digest,
    /// Bundle root: `/kubernetes/admission`. Shorter than the package if a segment is invalid.
    pub root: DirPath,
}

/// Invalid package declaration.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The declaration is missing.
    #[error("parsing the package failed: no declaration; begin the module with \"package name\"")]
    NoPackage,
    /// The declaration is incomplete.
    #[error(
        "parsing the package failed: incomplete name; write names and dots, e.g. \"package shop.orders\""
    )]
    BadPackage,
    /// No bundle root can be written.
    #[error("package rejected: invalid first name {0:?}; use letters, digits, '.', '_' and '-'")]
    Unwritable(String),
    /// OPA's wildcard: the bundle would own all roots.
    #[error("package rejected: OPA refuses bundles with the name \"_\"; use another name")]
    Wildcard,
}

impl Module {
    /// Parses the package declaration.
    pub fn read(text: &str) -> Result<Self, Error> {
        let segments = package(text)?;
        if segments.iter().any(|segment| segment == "_") {
            return Err(Error::Wildcard);
        }
        let writable = segments.iter().map(String::as_str).take_while(|segment| is_segment(segment));
        let root = DirPath::new(writable).map_err(|_| Error::Unwritable(segments[0].clone()))?;
        Ok(Self { text: text.to_owned(), digest: Digest::of(text.as_bytes()), root })
    }

    /// Returns the root as a package: `kubernetes.admission`.
    pub fn package(&self) -> String {
        self.root.relative().replace('/', ".")
    }

    /// Returns the package as OPA's reference: `.kubernetes["shop-1"]`.
    pub(crate) fn reference(&self) -> String {
        let is_word = |name: &str| {
            name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
                && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        };
        let step = |name: &String| {
            if is_word(name) {
                format!(".{name}")
            } else {
                format!("[{}]", serde_json::Value::from(name.as_str()))
            }
        };
        package(&self.text).unwrap_or_default().iter().map(step).collect()
    }

    /// Returns the declaration's row, from 1.
    pub(crate) fn package_row(&self) -> u64 {
        let is_package = |line: &str| line.trim_start_matches('\u{feff}').trim_start().starts_with("package");
        let rows_above = self.text.lines().take_while(|line| !is_package(line)).count();
        rows_above as u64 + 1
    }

    /// Returns proper prefixes of the package.
    pub(crate) fn paths_above(&self) -> impl Iterator<Item = Vec<String>> {
        let package = package(&self.text).unwrap_or_default();
        (0..package.len()).map(move |len| package[..len].to_vec())
    }

    /// Returns paths below `data` in the source, cut at the first dynamic name, with imports resolved. `None`
    /// if there are template strings.
    pub(crate) fn data_paths(&self) -> Option<BTreeSet<Vec<String>>> {
        let mut imports = vec![("data".to_owned(), Vec::new())];
        let mut paths = BTreeSet::new();
        let (mut rest, mut before, mut is_import) = (self.text.as_str(), ' ', false);
        while let Some(c) = rest.chars().next() {
            let len = match c {
                '$' => return None,
                '#' => rest.find('\n').unwrap_or(rest.len()),
                // Malformed Rego.
                '"' | '`' => rest.len() - quoted(rest).ok()?.1.len(),
                c if is_name_char(c) => rest.find(|c| !is_name_char(c)).unwrap_or(rest.len()),
                c => c.len_utf8(),
            };
            let (token, mut after) = rest.split_at(len);
            let import = imports.iter().find(|(name, _)| name == token && before != '.');
            if let Some((_, path)) = import {
                let mut path = path.clone();
                if token == "data" || !is_import {
                    after = constant_steps(after, &mut path);
                }
                if is_import && let Some(last) = path.last() {
                    let (name, rest) = alias(after).unwrap_or((last, after));
                    after = rest;
                    imports.push((name.to_owned(), path));
                } else {
                    paths.insert(path);
                }
            }
            is_import = if c.is_whitespace() { is_import } else { token == "import" && before != '.' };
            (rest, before) = (after, c);
        }
        Some(paths)
    }
}

fn is_name_char(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Parses `as name`. Returns the name and the rest.
fn alias(text: &str) -> Option<(&str, &str)> {
    let is_blank = |c| c == ' ' || c == '\t';
    let name = text.trim_start_matches(is_blank).strip_prefix("as")?;
    let name = name.strip_prefix(is_blank)?.trim_start_matches(is_blank);
    Some(name.split_at(name.find(|c| !is_name_char(c)).unwrap_or(name.len())))
}

/// Parses `.name` and `["name"]` into `path`. Returns the rest.
fn constant_steps<'a>(mut text: &'a str, path: &mut Vec<String>) -> &'a str {
    loop {
        let (name, after) = if let Some(index) = text.strip_prefix('[') {
            let Ok((name, after)) = quoted(index) else { return text };
            let Some(after) = after.strip_prefix(']') else { return text };
            (name, after)
        } else {
            let name = text.strip_prefix('.').unwrap_or_default();
            let (name, after) = name.split_at(name.find(|c| !is_name_char(c)).unwrap_or(name.len()));
            (name.to_owned(), after)
        };
        if name.is_empty() {
            return text;
        }
        path.push(name);
        text = after;
    }
}

/// Parses like OPA (v1/ast/parser.go, `parsePackage`): comments and white space only precede the declaration.
fn package(text: &str) -> Result<Vec<String>, Error> {
    let mut rest = text.strip_prefix('\u{feff}').unwrap_or(text);
    loop {
        rest = rest.trim_start_matches(is_whitespace);
        match rest.strip_prefix('#') {
            Some(comment) => rest = comment.split_once('\n').map_or("", |(_, after)| after),
            None => break,
        }
    }
    let after = rest.strip_prefix("package").filter(|after| after.starts_with(is_whitespace));
    let (first, mut rest) = name(after.ok_or(Error::NoPackage)?.trim_start_matches(is_whitespace))?;
    let mut segments = vec![first];
    loop {
        let segment;
        if let Some(after) = rest.strip_prefix('.') {
            (segment, rest) = name(after)?;
        } else if let Some(after) = rest.strip_prefix('[') {
            (segment, rest) = quoted(after)?;
            rest = rest.strip_prefix(']').ok_or(Error::BadPackage)?;
        } else {
            return Ok(segments);
        }
        segments.push(segment);
    }
}

fn is_whitespace(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\r' | '\n')
}

fn name(text: &str) -> Result<(String, &str), Error> {
    let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(text.len());
    let (name, rest) = text.split_at(end);
    if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) {
        return Err(Error::BadPackage);
    }
    Ok((name.to_owned(), rest))
}

fn quoted(text: &str) -> Result<(String, &str), Error> {
    if let Some(raw) = text.strip_prefix('`') {
        let (segment, rest) = raw.split_once('`').ok_or(Error::BadPackage)?;
        return Ok((segment.to_owned(), rest));
    }
    let mut strings = serde_json::Deserializer::from_str(text).into_iter::<String>();
    let segment = strings.next().and_then(Result::ok).ok_or(Error::BadPackage)?;
    Ok((segment, &text[strings.byte_offset()..]))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn packages_become_roots() {
        for (text, root) in [
            ("package a", "a"),
            (
                "\u{feff}# c\r\n\n \tpackage\n kubernetes.admission\n\ndeny contains 1 if { true }",
                "kubernetes/admission",
            ),
            ("package a[\"b-c\"].d", "a/b-c/d"),
            ("package a[`b-c`][\"\\u0064\"]", "a/b-c/d"),
            ("package a[\"b/c\"].d", "a"),
            ("package system.authz\ndefault allow := false", "system/authz"),
            ("package a.if import data.b", "a/if"),
            ("package a . b", "a"),
        ] {
            assert_eq!(Module::read(text).unwrap().root.relative(), root, "{text}");
        }
    }

    #[test]
    fn invalid_packages_are_rejected() {
        for (text, error) in [
            ("", Error::NoPackage),
            ("# package a", Error::NoPackage),
            ("packages", Error::NoPackage),
            ("package", Error::NoPackage),
            ("import data.a\npackage b", Error::NoPackage),
            ("package 1", Error::BadPackage),
            ("package é", Error::BadPackage),
            ("package a.", Error::BadPackage),
            ("package a[1]", Error::BadPackage),
            ("package a[\"b\"", Error::BadPackage),
            ("package _", Error::Wildcard),
            ("package a[\"_\"].b", Error::Wildcard),
        ] {
            assert_eq!(Module::read(text), Err(error), "{text}");
        }
    }

    #[test]
    fn paths_below_data() {
        for (body, expected) in [
            ("x := data.a.b", &["a.b"][..]),
            ("x := data[\"a\"][input.b]", &["a"]),
            ("x := data[`a`].b[\"c\"] + data.d", &["a.b.c", "d"]),
            ("import data.a as b", &[]),
            ("import data.a as b\nx := b[input.c] + b.d", &["a", "a.d"]),
            ("import data.a.b\nx := b.c + input.b", &["a.b.c"]),
            ("import data.a\nassign := a[input.b]", &["a"]),
            ("import data.x.a as a; y := a.b", &["x.a.b"]),
            ("import input.data\nimport rego.v1", &[]),
            ("x := input.data", &[]),
            ("x := \"data\" # data", &[]),
            ("x := `data \" data`", &[]),
            ("x := metadata[data_]", &[]),
            ("x := data[input.a]", &[""]),
            ("x := data[\"a\" ]", &[""]),
            ("walk(data, x)", &[""]),
            ("import data as d", &[""]),
            ("x := \"\\\"\"; y := data[x]", &[""]),
            ("x := data", &[""]),
        ] {
            let module = Module::read(&format!("package m\n{body}")).unwrap();
            let paths: Vec<_> = module.data_paths().unwrap().iter().map(|path| path.join(".")).collect();
            assert_eq!(paths, expected, "{body}");
        }
        assert_eq!(Module::read("package m\nx := $\"{data}\"").unwrap().data_paths(), None);
    }

    #[test]
    fn packages_are_written_as_references() {
        for (package, expected) in [
            ("a", ".a"),
            ("a.b_1", ".a.b_1"),
            ("a[\"b-c\"].d", ".a[\"b-c\"].d"),
            ("a[\"1b\"]", ".a[\"1b\"]"),
            ("a[`\"`]", ".a[\"\\\"\"]"),
        ] {
            assert_eq!(Module::read(&format!("package {package}")).unwrap().reference(), expected);
        }
    }

    #[test]
    fn paths_above_are_proper_prefixes() {
        let path = |text: &str| text.split_terminator('.').map(str::to_owned).collect::<Vec<_>>();
        for (package, above, expected) in [
            ("a.b", "", true),
            ("a.b", "a", true),
            ("a.b", "a.b", false),
            ("a.b", "b", false),
            ("a[\"b c\"]", "a", true),
        ] {
            let module = Module::read(&format!("package {package}")).unwrap();
            assert_eq!(module.paths_above().any(|found| found == path(above)), expected, "{package} {above}");
        }
    }

    proptest! {
        /// I9: input is arbitrary.
        #[test]
        fn i9_random_texts_do_not_panic(text in "(package )?[a-c\"`.\\[\\]\\\\#\n é]{0,24}") {
            let _ = Module::read(&text).map(|module| module.data_paths());
        }
    }
}
