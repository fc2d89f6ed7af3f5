//! Paths below OPA's `data`.

use std::borrow::{Borrow, Cow};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Path of the innermost map around entries, such as `/kubernetes/pods/default`.
///
/// Segments contain only `A-Z a-z 0-9 . _ -`, like Kubernetes names, so JSON pointers, URLs, tar paths and roots need no
/// escaping.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DirPath(Arc<str>);

/// Invalid [`DirPath`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "invalid directory path {path:?}: write /segment/segment…, each of letters, digits, '.', '_' and '-'"
)]
pub struct InvalidPath {
    path: String,
}

impl DirPath {
    /// Joins segments into a path.
    pub fn new<'a>(segments: impl IntoIterator<Item = &'a str>) -> Result<Self, InvalidPath> {
        let mut path = String::new();
        for segment in segments {
            path.push('/');
            path.push_str(segment);
        }
        path.parse()
    }

    /// Appends a segment.
    pub fn join(&self, segment: &str) -> Result<Self, InvalidPath> {
        format!("{self}/{segment}").parse()
    }

    /// Returns the JSON pointer.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Strips the leading slash, for roots and tar.
    pub fn relative(&self) -> &str {
        &self.0[1..]
    }

    /// Parent; `None` at the top.
    pub fn parent(&self) -> Option<Self> {
        let end = self.0.rfind('/')?;
        (end > 0).then(|| Self(self.0[..end].into()))
    }

    /// Whether this equals or is below `other`.
    pub fn is_within(&self, other: &Self) -> bool {
        self.0.strip_prefix(other.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }
}

/// Whether a [`DirPath`] may contain `segment`.
pub fn is_segment(segment: &str) -> bool {
    !matches!(segment, "" | "." | "..")
        && segment.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

/// Escapes a JSON pointer token (RFC 6901 §3), and `%`, which OPA decodes (v1/server/server.go, `readInputPatch`).
pub fn escape(key: &str) -> Cow<'_, str> {
    if !key.contains(['~', '/', '%']) {
        return Cow::Borrowed(key);
    }
    Cow::Owned(key.replace('~', "~0").replace('/', "~1").replace('%', "%25"))
}

/// Inverse of [`escape`].
pub fn unescape(token: &str) -> Cow<'_, str> {
    if !token.contains(['~', '%']) {
        return Cow::Borrowed(token);
    }
    Cow::Owned(token.replace("%25", "%").replace("~1", "/").replace("~0", "~"))
}

impl FromStr for DirPath {
    type Err = InvalidPath;

    fn from_str(path: &str) -> Result<Self, InvalidPath> {
        match path.strip_prefix('/') {
            Some(rest) if rest.split('/').all(is_segment) => Ok(Self(path.into())),
            _ => Err(InvalidPath { path: path.to_owned() }),
        }
    }
}

impl Borrow<str> for DirPath {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DirPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for DirPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for DirPath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for DirPath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_parse_and_nest() {
        let dir = DirPath::new(["kubernetes", "pods", "default"]).unwrap();
        assert_eq!(dir.as_str(), "/kubernetes/pods/default");
        assert_eq!(dir.parent().unwrap().relative(), "kubernetes/pods");
        assert_eq!(DirPath::new(["a"]).unwrap().parent(), None);
        assert!(dir.is_within(&dir.parent().unwrap()) && dir.is_within(&dir));
        assert!(!DirPath::new(["ab"]).unwrap().is_within(&DirPath::new(["a"]).unwrap()));
        for bad in ["", "/", "a", "/a/", "//a", "/a b", "/a/..", "/.", "/a%2f", "/ü"] {
            assert!(bad.parse::<DirPath>().is_err(), "{bad}");
        }
    }

    #[test]
    fn keys_are_escaped_as_opa_decodes_them() {
        for (key, token) in
            [("a.b", "a.b"), ("a/b", "a~1b"), ("~", "~0"), ("50%", "50%25"), ("~1/%", "~01~1%25")]
        {
            assert_eq!(escape(key), token);
        }
    }
}
