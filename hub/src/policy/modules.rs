//! One Rego text: its syntax is checked so that a bad one reaches no bundle, and its package is read, which decides
//! what the bundle owns.

use std::num::NonZeroU32;

use opa_hub_proto::path::{DirPath, is_segment};
use opa_hub_proto::revision::Digest;
use regorus::unstable::{Expr, Parser, Source};

/// Columns that a line may have. OPA has no such bound; 1 MiB is more than a ConfigMap can hold.
const COLUMNS_MAX: NonZeroU32 = NonZeroU32::new(1 << 20).expect("not zero");

/// Brackets in brackets that a module may have. The parser tries each bracket as several things, one after the
/// other: at 12 it takes milliseconds, at 20 a minute, at 100,000 its stack.
const NESTING_MAX: usize = 12;

/// A module that parses.
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

/// Why a text is no module.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

/// Parses `text`, called `id` in errors.
pub fn parse(id: &str, text: &str) -> Result<Module, Error> {
    let fail = |error: &dyn std::fmt::Display| Error(error.to_string().trim().to_owned());
    let nesting = nesting(text);
    if nesting > NESTING_MAX {
        return Err(Error(format!(
            "{id}: brackets are nested {nesting} deep, more than {NESTING_MAX}: give inner ones a rule of their own"
        )));
    }
    let source = Source::from_contents(id.to_owned(), text.to_owned()).map_err(|error| fail(&error))?;
    let mut parser = Parser::new(&source).map_err(|error| fail(&error))?;
    parser.set_max_col(COLUMNS_MAX);
    parser.enable_rego_v1().map_err(|error| fail(&error))?;
    let module = parser.parse().map_err(|error| fail(&error))?;
    let mut segments = Vec::new();
    package(&module.package.refr, &mut segments).map_err(|error| fail(&error))?;
    let writable = segments.iter().map(String::as_str).take_while(|segment| is_segment(segment));
    let root = DirPath::new(writable).map_err(|_| {
        Error(format!("{id}: its package's first name must be of letters, digits, '.', '_' and '-'"))
    })?;
    Ok(Module { text: text.to_owned(), digest: Digest::of(text.as_bytes()), root })
}

/// How deep brackets are nested, leaving out texts and comments.
fn nesting(text: &str) -> usize {
    let (mut depth, mut deepest) = (0usize, 0);
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'[' | b'{' | b'(' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' | b')' => depth = depth.saturating_sub(1),
            b'#' => _ = bytes.find(|byte| *byte == b'\n'),
            b'`' => _ = bytes.find(|byte| *byte == b'`'),
            b'"' => {
                while let Some(byte) = bytes.next() {
                    match byte {
                        b'\\' => _ = bytes.next(),
                        b'"' | b'\n' => break,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    deepest
}

fn package(expr: &Expr, segments: &mut Vec<String>) -> Result<(), Error> {
    match expr {
        Expr::Var { span, .. } => segments.push(span.text().to_owned()),
        Expr::RefDot { refr, field, .. } => {
            package(refr, segments)?;
            segments.push(field.0.text().to_owned());
        }
        Expr::RefBrack { refr, index, .. } => {
            package(refr, segments)?;
            let Expr::String { value, .. } = &**index else {
                return Err(Error("its package holds something other than names and strings".into()));
            };
            segments.push(value.as_string().map_err(|error| Error(error.to_string()))?.to_string());
        }
        _ => return Err(Error("its package holds something other than names and strings".into())),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_become_roots() {
        for (text, root) in [
            ("package a", "a"),
            ("# c\npackage kubernetes.admission\n\ndeny contains 1 if { true }", "kubernetes/admission"),
            ("package a[\"b-c\"].d", "a/b-c/d"),
            ("package a[\"b/c\"].d", "a"),
            ("package system.authz\ndefault allow := false", "system/authz"),
        ] {
            assert_eq!(parse("m", text).unwrap().root.relative(), root, "{text}");
        }
        let long = format!("package a\nx := \"{}\"", "y".repeat(5000));
        assert_eq!(parse("m", &long).unwrap().root.as_str(), "/a");
    }

    #[test]
    fn errors_say_where() {
        for (bad, part) in
            [("", ""), ("package", ""), ("package a\nallow {", "2:"), ("package a\nx := := 1", "2:")]
        {
            let error = parse("opa/authz/p.rego", bad).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn i9_deep_nesting_is_an_error_and_takes_no_time() {
        for (open, close) in [("[", "]"), ("{", "}"), ("(", ")"), ("{\"a\":[", "]}"), ("f(", ")")] {
            for depth in [NESTING_MAX / 2 - 1, NESTING_MAX, NESTING_MAX + 1, 100_000] {
                let text = format!("package a\nx := {}1{}", open.repeat(depth), close.repeat(depth));
                assert_eq!(
                    parse("m", &text).is_ok(),
                    depth * open.matches(['[', '{', '(']).count() <= NESTING_MAX,
                    "{open}{depth}"
                );
            }
        }
    }

    #[test]
    fn brackets_in_texts_and_comments_do_not_nest() {
        for text in ["\"[[\\\"[\"", "`{{\n{{\"`", "1 # ((((\n# [", "[{}]"] {
            assert!(nesting(text) <= 2, "{text}");
        }
    }
}
