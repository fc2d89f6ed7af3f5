//! Content digests and revisions.

use std::fmt;
use std::str::FromStr;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};

use crate::path::DirPath;

/// Digest size, in bytes. 128 bits resist collisions up to 2⁶⁴ contents at half of SHA-256's memory.
pub const DIGEST_BYTES: usize = 16;

/// Truncated SHA-256.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; DIGEST_BYTES]);

/// Identity of content, `<modules digest>-<data digest>`. The halves are independent, so an agent resumes between data
/// and modules of a change.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Revision {
    /// See [`modules_digest`].
    pub modules: Digest,
    /// See [`data_digest`].
    pub data: Digest,
}

/// Invalid digest or revision.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("invalid revision: expected {expected}")]
pub struct ParseError {
    expected: &'static str,
}

/// Unambiguous hash of byte strings.
#[derive(Default)]
pub struct Hasher(Sha256);

impl Hasher {
    /// Adds a length-prefixed byte string.
    pub fn part(&mut self, bytes: &[u8]) {
        self.0.update((bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }

    /// Returns the digest.
    pub fn finish(self) -> Digest {
        let sha256 = self.0.finalize();
        let mut digest = [0; DIGEST_BYTES];
        digest.copy_from_slice(&sha256[..DIGEST_BYTES]);
        Digest(digest)
    }
}

impl Digest {
    /// Hashes bytes.
    pub fn of(bytes: &[u8]) -> Self {
        let mut hasher = Hasher::default();
        hasher.part(bytes);
        hasher.finish()
    }

    /// Returns the raw bytes.
    pub fn as_bytes(&self) -> &[u8; DIGEST_BYTES] {
        &self.0
    }
}

/// Hashes data: directories sorted by path, and `ensure`, maps that may be empty.
pub fn data_digest<'a>(dirs: impl IntoIterator<Item = (&'a DirPath, Digest)>, ensure: &[DirPath]) -> Digest {
    let dirs = dirs.into_iter().map(|(path, digest)| (path.as_str(), digest));
    digest_of_named(dirs, ensure.iter().map(DirPath::as_str))
}

/// Hashes modules, sorted by id, and the configured Rego version.
pub fn modules_digest<'a>(
    modules: impl IntoIterator<Item = (&'a str, Digest)>,
    rego_version: Option<u8>,
) -> Digest {
    digest_of_named(modules, rego_version.map(|version| [version]))
}

fn digest_of_named<'a>(
    named: impl IntoIterator<Item = (&'a str, Digest)>,
    settings: impl IntoIterator<Item = impl AsRef<[u8]>>,
) -> Digest {
    let mut hasher = Hasher::default();
    for (name, digest) in named {
        hasher.part(name.as_bytes());
        hasher.part(digest.as_bytes());
    }
    for (index, setting) in settings.into_iter().enumerate() {
        if index == 0 {
            // Separator: no name is empty.
            hasher.part(&[]);
        }
        hasher.part(setting.as_ref());
    }
    hasher.finish()
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let error = ParseError { expected: "32 hexadecimal digits" };
        let digits: Option<Vec<u8>> =
            text.chars().map(|c| c.to_digit(16).and_then(|digit| u8::try_from(digit).ok())).collect();
        let Some(digits) = digits.filter(|digits| digits.len() == 2 * DIGEST_BYTES) else {
            return Err(error);
        };
        let mut bytes = [0; DIGEST_BYTES];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = pair[0] << 4 | pair[1];
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.modules, self.data)
    }
}

impl FromStr for Revision {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let error = ParseError { expected: "<modules digest>-<data digest>" };
        let (modules, data) = text.split_once('-').ok_or(error)?;
        Ok(Self { modules: modules.parse()?, data: data.parse()? })
    }
}

macro_rules! serde_as_text {
    ($name:ty) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(D::Error::custom)
            }
        }
    };
}

serde_as_text!(Digest);
serde_as_text!(Revision);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn revisions_round_trip() {
        let revision = Revision { modules: Digest::of(b"m"), data: Digest::of(b"d") };
        assert_eq!(revision.to_string().parse(), Ok(revision));
        for bad in ["", "-", "xyz", "\"a\"", &"g".repeat(32), &"é".repeat(16)] {
            assert!(bad.parse::<Revision>().is_err(), "{bad}");
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }

    #[test]
    fn digests_cover_settings() {
        let paths = ["/a", "/b"].map(|path| path.parse::<DirPath>().unwrap());
        let digest = Digest::of(b"x");
        let data = |dirs: &[DirPath], ensure: &[DirPath]| {
            data_digest(dirs.iter().map(|path| (path, digest)), ensure)
        };
        let all = [
            data(&[], &[]),
            data(&paths, &[]),
            data(&[], &paths),
            data(&[], &paths[..1]),
            data(&paths, &paths),
        ];
        let modules = [None, Some(0), Some(1)].map(|version| modules_digest([("m", digest)], version));
        let distinct: std::collections::BTreeSet<_> = all.iter().chain(&modules).collect();
        assert_eq!(distinct.len(), all.len() + modules.len());
    }

    #[test]
    fn hasher_separates_parts() {
        let digest = |parts: &[&str]| {
            let mut hasher = Hasher::default();
            for part in parts {
                hasher.part(part.as_bytes());
            }
            hasher.finish()
        };
        assert_ne!(digest(&["ab", "c"]), digest(&["a", "bc"]));
        assert_ne!(digest(&["a"]), digest(&["a", ""]));
    }
}
