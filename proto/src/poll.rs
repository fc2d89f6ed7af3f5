//! OPA's side of the bundle protocol: the headers that it sends and compares (OPA v1/download/download.go).

use std::time::Duration;

/// How OPA's User-Agent begins.
pub const OPA_AGENT: &str = "Open-Policy-Agent/";
/// The content type of a bundle. OPA keeps long polling only while it sees exactly this.
pub const BUNDLE_TYPE: &str = "application/vnd.openpolicyagent.bundles";

/// One element of `If-None-Match`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tag<'a> {
    /// As it was sent. A 304 carries it back: OPA would adopt any other without a check.
    pub raw: &'a str,
    /// Without quotes and without the mark of weakness that proxies add.
    pub opaque: &'a str,
}

/// The tags of `If-None-Match` (RFC 9110 §13.1.2), given all values of the header. Our own tags hold no comma.
pub fn entity_tags<'a>(values: impl IntoIterator<Item = &'a str>) -> Vec<Tag<'a>> {
    let raw =
        values.into_iter().flat_map(|value| value.split(',')).map(str::trim).filter(|raw| !raw.is_empty());
    raw.map(|raw| Tag { raw, opaque: raw.strip_prefix("W/").unwrap_or(raw).trim_matches('"') }).collect()
}

/// The patience that `Prefer: wait=N` grants (RFC 7240 §4.3), given all values of the header; `max` at most.
/// OPA writes it behind a semicolon.
pub fn wait<'a>(values: impl IntoIterator<Item = &'a str>, max: Duration) -> Duration {
    let mut parts = values.into_iter().flat_map(|value| value.split([',', ';'])).map(str::trim);
    let seconds = parts.find_map(|part| part.strip_prefix("wait=")?.trim().parse().ok());
    Duration::from_secs(seconds.unwrap_or(0)).min(max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_as_opa_and_proxies_send_them() {
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
    fn patience_as_opa_asks_for_it() {
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
