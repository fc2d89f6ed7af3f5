//! Checks the syntax of one module with regorus.
//!
//! regorus rejects syntax newer than itself, such as string interpolation.

use std::num::NonZeroU32;

use regorus::unstable::{Parser, Source};

use crate::policy::check::Dialect;
use crate::policy::verdict::{Diagnostic, Location};

/// Maximum columns; 1 MiB exceeds any ConfigMap.
const COLUMNS_MAX: NonZeroU32 = NonZeroU32::new(1 << 20).expect("not zero");

/// Maximum bracket depth. Parsing takes milliseconds at 12, a minute at 20, and overflows the stack at
/// 100,000.
const NESTING_MAX: usize = 12;

pub(super) fn first_error(id: &str, text: &str, dialect: Dialect) -> Option<Diagnostic> {
    let depth = bracket_depth(text);
    let message = if depth > NESTING_MAX {
        format!(
            "parsing failed: brackets are nested {depth} deep, more than {NESTING_MAX}; move inner ones into other rules"
        )
    } else {
        parse(id, text, dialect).err()?
    };
    let (row, col) = location_in(&message, id).unwrap_or((1, 0));
    let location = Location { file: id.to_owned(), row, col };
    Some(Diagnostic { location: Some(location), ..Diagnostic::new("rego_parse_error", message) })
}

fn parse(id: &str, text: &str, dialect: Dialect) -> Result<(), String> {
    let message = |error: &dyn std::fmt::Display| error.to_string().trim().to_owned();
    let source = Source::from_contents(id.to_owned(), text.to_owned()).map_err(|error| message(&error))?;
    let mut parser = Parser::new(&source).map_err(|error| message(&error))?;
    parser.set_max_col(COLUMNS_MAX);
    if dialect != Dialect::V0 {
        parser.enable_rego_v1().map_err(|error| message(&error))?;
    }
    parser.parse().map(drop).map_err(|error| message(&error))
}

/// Extracts row and column from an error message.
fn location_in(message: &str, id: &str) -> Option<(u64, u64)> {
    let mut numbers = message.split_once(id)?.1.strip_prefix(':')?.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Returns the bracket depth outside strings and comments.
fn bracket_depth(text: &str) -> usize {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn errors_have_locations() {
        for (bad, row) in [("", 1), ("package a\nallow {", 2), ("package a\nx := := 1", 2)] {
            let location = first_error("opa/authz/p.rego", bad, Dialect::Default).unwrap().location.unwrap();
            assert_eq!((location.file.as_str(), location.row), ("opa/authz/p.rego", row), "{bad}");
        }
        let long = format!("package a\nx := \"{}\"", "y".repeat(5000));
        assert_eq!(first_error("m", &long, Dialect::V1), None);
        let v0 = "package a\nallow { true }";
        assert_eq!(first_error("m", v0, Dialect::V0), None);
        assert!(first_error("m", v0, Dialect::Default).is_some());
    }

    #[test]
    fn i9_deep_nesting_is_an_error_and_takes_no_time() {
        for (open, close) in [("[", "]"), ("{", "}"), ("(", ")"), ("{\"a\":[", "]}"), ("f(", ")")] {
            for depth in [NESTING_MAX / 2 - 1, NESTING_MAX, NESTING_MAX + 1, 100_000] {
                let text = format!("package a\nx := {}1{}", open.repeat(depth), close.repeat(depth));
                assert_eq!(
                    first_error("m", &text, Dialect::Default).is_none(),
                    depth * open.matches(['[', '{', '(']).count() <= NESTING_MAX,
                    "{open}{depth}"
                );
            }
        }
    }

    #[test]
    fn brackets_in_texts_and_comments_do_not_nest() {
        for text in ["\"[[\\\"[\"", "`{{\n{{\"`", "1 # ((((\n# [", "[{}]"] {
            assert!(bracket_depth(text) <= 2, "{text}");
        }
    }

    proptest! {
        /// I9: input is arbitrary.
        #[test]
        fn i9_random_texts_do_not_panic(text in "(package a\n)?[a-z\"`.\\[\\]{}()\\\\#:=\n ]{0,40}") {
            let _ = first_error("m", &text, Dialect::Default);
        }
    }
}
