//! HTTP headers of OPA's bundle protocol (OPA v1/download/download.go).

use std::time::Duration;

/// Prefix of OPA's User-Agent.
pub const OPA_AGENT: &str = "Open-Policy-Agent/";
/// Content type that OPA's long polling requires.
pub const BUNDLE_TYPE: &str = "application/vnd.openpolicyagent.bundles";

/// One element of `If-None-Match`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tag<'a> {
    /// Unparsed. A 304 must repeat it: OPA adopts any other.
    pub raw: &'a str,
    /// Without quotes and weakness mark.
    pub opaque: &'a str,
}

/// Parses all values of `If-None-Match` (RFC 9110 §13.1.2). Hub tags contain no comma.
pub fn entity_tags<'a>(values: impl IntoIterator<Item = &'a str>) -> Vec<Tag<'a>> {
    let raw =
        values.into_iter().flat_map(|value| value.split(',')).map(str::trim).filter(|raw| !raw.is_empty());
    raw.map(|raw| Tag { raw, opaque: raw.strip_prefix("W/").unwrap_or(raw).trim_matches('"') }).collect()
}

/// Parses `wait=N` from `Prefer` (RFC 7240 §4.3), capped at `max`. OPA separates by semicolon.
pub fn wait<'a>(values: impl IntoIterator<Item = &'a str>, max: Duration) -> Duration {
    let mut parts = values.into_iter().flat_map(|value| value.split([',', ';'])).map(str::trim);
    let seconds = parts.find_map(|part| part.strip_prefix("wait=")?.trim().parse().ok());
    Duration::from_secs(seconds.unwrap_or(0)).min(max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entity_tags_accept_opa_and_proxy_forms() {
        for (values, expected) in [
            (&["\"a\""][..], &["a"][..]),
            (&["W/\"a\", \"b\",c"], &["a", "b", "c"]),
            (&["\"a\"", "\"b\""], &["a", "b"]),
            (&["", " , "], &[]),
        ] {
            let opaque: Vec<_> = entity_tags(values.iter().copied()).iter().map(|tag| tag.opaque).collect();
            assert_eq!(opaque, expected);
        }
    }

    #[test]
    fn wait_parses_prefer_header() {
        let max = Duration::from_secs(300);
        for (value, seconds) in [
            ("modes=snapshot,delta;wait=30", 30),
            ("wait=5", 5),
            ("modes=snapshot,delta", 0),
            ("wait=x", 0),
            ("wait=99999999", 300),
        ] {
            assert_eq!(wait([value], max).as_secs(), seconds, "{value}");
        }
        assert_eq!(wait([], max), Duration::ZERO);
    }
}
