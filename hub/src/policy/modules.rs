//! One Rego text and what its package owns. Whether the text is right is for the [compiler](super::check) to say; the
//! package is read here, since it decides what the bundle owns.

use opa_hub_proto::path::{DirPath, is_segment};
use opa_hub_proto::revision::Digest;

/// A text with a package.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Module {
    /// Its text as it came.
    pub text: String,
    /// The digest of the text.
    pub digest: Digest,
    /// What its package owns below `data`: `/kubernetes/admission`. Shorter than the package where a segment could
    /// not be written as a bundle root.
    pub root: DirPath,
}

/// Why a text has no package.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The text does not begin with one.
    #[error("package expected: begin the module with \"package name\"")]
    NoPackage,
    /// It begins with one that is not written to its end.
    #[error("the package's name breaks off: write names and dots, e.g. \"package shop.orders\"")]
    BadPackage,
    /// No bundle could own it.
    #[error("the package's first name must be of letters, digits, '.', '_' and '-', not {0:?}")]
    Unwritable(String),
    /// OPA takes this name for any name: a bundle with it claims all roots.
    #[error("the package cannot be named \"_\": OPA refuses a bundle with it; give it another name")]
    Wildcard,
}

impl Module {
    /// Reads the package at the beginning of `text`.
    pub fn read(text: &str) -> Result<Self, Error> {
        let segments = package(text)?;
        if segments.iter().any(|segment| segment == "_") {
            return Err(Error::Wildcard);
        }
        let writable = segments.iter().map(String::as_str).take_while(|segment| is_segment(segment));
        let root = DirPath::new(writable).map_err(|_| Error::Unwritable(segments[0].clone()))?;
        Ok(Self { text: text.to_owned(), digest: Digest::of(text.as_bytes()), root })
    }

    /// The package as the module names it: `kubernetes.admission`.
    pub fn package(&self) -> String {
        self.root.relative().replace('/', ".")
    }

    /// Row of the package's declaration, from 1.
    pub fn package_row(&self) -> u64 {
        let is_package = |line: &str| line.trim_start_matches('\u{feff}').trim_start().starts_with("package");
        let above = self.text.lines().take_while(|line| !is_package(line)).count();
        above as u64 + 1
    }

    /// Whether the text has `data` without a constant name below it, as in `data[input.kind]` or `walk(data)`. `opa deps`
    /// does not tell what such a term reads. True too for a template string: expressions in it are not looked at.
    pub fn names_all_data(&self) -> bool {
        let (mut rest, mut before) = (self.text.as_str(), ' ');
        while let Some(c) = rest.chars().next() {
            let len = match c {
                '$' => return true,
                '#' => rest.find('\n').unwrap_or(rest.len()),
                '"' | '`' => match quoted(rest) {
                    Ok((_, after)) => rest.len() - after.len(),
                    // No Rego: it is not looked at any further.
                    Err(_) => return true,
                },
                c if is_of_name(c) => rest.find(|c| !is_of_name(c)).unwrap_or(rest.len()),
                c => c.len_utf8(),
            };
            let (token, after) = rest.split_at(len);
            if token == "data" && before != '.' && !is_constant_step(after) {
                return true;
            }
            (rest, before) = (after, c);
        }
        false
    }
}

fn is_of_name(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Whether the text begins with `.name` or `["name"]`.
fn is_constant_step(text: &str) -> bool {
    match text.strip_prefix('[') {
        Some(index) => quoted(index).is_ok_and(|(_, after)| after.starts_with(']')),
        None => text.strip_prefix('.').is_some_and(|name| name.starts_with(is_of_name)),
    }
}

/// The names after the word `package`, as OPA's scanner takes them (OPA v1/ast/parser.go, `parsePackage`): only
/// comments and white space come before, and nothing stands between a name and what follows it.
fn package(text: &str) -> Result<Vec<String>, Error> {
    let mut rest = text.strip_prefix('\u{feff}').unwrap_or(text);
    loop {
        rest = rest.trim_start_matches(is_white);
        match rest.strip_prefix('#') {
            Some(comment) => rest = comment.split_once('\n').map_or("", |(_, after)| after),
            None => break,
        }
    }
    let after = rest.strip_prefix("package").filter(|after| after.starts_with(is_white));
    let (first, mut rest) = name(after.ok_or(Error::NoPackage)?.trim_start_matches(is_white))?;
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

fn is_white(c: char) -> bool {
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
    fn what_is_no_package() {
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
    fn data_without_a_constant_name() {
        for (body, expected) in [
            ("x := data.a.b", false),
            ("x := data[\"a\"][input.b]", false),
            ("x := data[`a`]", false),
            ("import data.a as b", false),
            ("x := input.data", false),
            ("x := \"data\" # data", false),
            ("x := `data \" data`", false),
            ("x := metadata[data_]", false),
            ("x := data[input.a]", true),
            ("x := data[\"a\" ]", true),
            ("walk(data, x)", true),
            ("import data as d", true),
            ("x := $\"{data}\"", true),
            ("x := \"\\\"\"; y := data[x]", true),
            ("x := data", true),
        ] {
            let module = Module::read(&format!("package m\n{body}")).unwrap();
            assert_eq!(module.names_all_data(), expected, "{body}");
        }
    }

    proptest! {
        /// I9: whatever a key holds, it is a module or none.
        #[test]
        fn i9_random_texts_do_not_panic(text in "(package )?[a-c\"`.\\[\\]\\\\#\n é]{0,24}") {
            let _ = Module::read(&text).map(|module| module.names_all_data());
        }
    }
}
