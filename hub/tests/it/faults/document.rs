//! Bundle specs of the fault test.

use std::collections::{BTreeMap, BTreeSet};

use fastrand::Rng;
use opa_hub::fields::mask::FieldMask;
use opa_hub::fields::masks::FieldMasks;
use opa_hub::spec::{AutoReplication, BundleSpec, NamespaceScoping};
use opa_hub_proto::path::DirPath;

use crate::invariants;

/// A bundle's options.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Document {
    pub(super) name: &'static str,
    /// Whether clients get one namespace's objects.
    pub(super) is_scoped: bool,
    /// Additional pod fields; `None` for whole pods.
    pub(super) fields: Option<&'static [&'static str]>,
    /// Whether resources that policies read are replicated.
    pub(super) is_auto: bool,
    pub(super) max_bytes: Option<usize>,
    pub(super) max_directories: Option<usize>,
    /// Whether a few changes exceed a commit and the history.
    pub(super) is_small: bool,
}

/// Bundle served by namespace.
const SPACES: &str = "spaces";
pub(super) const FIELDS: &str = "fields";
pub(super) const AUTO: &str = "auto";

const LIMIT: &str = "limit";
/// About the size of all data.
const MAX_BYTES: usize = 2500;
const FEW: &str = "few";
/// Slightly fewer than exist.
const MAX_DIRECTORIES: usize = 10;
const SMALL_COMMIT: usize = 5;
const SMALL_LOG: usize = 8;
const SMALL_LOG_KEYS: usize = 24;
/// Maximum number of objects of all kinds.
const OBJECTS_MAX: usize = 120;

const NO_FIELDS: &[&str] = &[];
const IMAGES: &[&str] = &["spec.image"];

const PLAIN: Document = Document {
    name: "main",
    is_scoped: false,
    fields: None,
    is_auto: false,
    max_bytes: None,
    max_directories: None,
    is_small: false,
};

impl Document {
    pub(super) fn all() -> Vec<Self> {
        vec![
            PLAIN,
            Self { name: SPACES, is_scoped: true, is_small: true, ..PLAIN },
            Self { name: FIELDS, fields: Some(NO_FIELDS), ..PLAIN },
            Self { name: AUTO, is_auto: true, ..PLAIN },
            Self { name: LIMIT, max_bytes: Some(MAX_BYTES), ..PLAIN },
            Self { name: FEW, max_directories: Some(MAX_DIRECTORIES), ..PLAIN },
        ]
    }

    pub(super) fn edited(self, rng: &mut Rng) -> Self {
        match self.name {
            SPACES | FIELDS | AUTO if rng.bool() => Self { is_small: !self.is_small, ..self },
            SPACES => Self { is_scoped: !self.is_scoped, ..self },
            FIELDS => {
                let fields = [None, Some(NO_FIELDS), Some(IMAGES)];
                Self { fields: fields[rng.usize(..fields.len())], ..self }
            }
            LIMIT => {
                let max_bytes = [None, Some(MAX_BYTES), Some(MAX_BYTES / 2)];
                Self { max_bytes: max_bytes[rng.usize(..max_bytes.len())], ..self }
            }
            FEW => {
                let max_directories = self.max_directories.xor(Some(MAX_DIRECTORIES));
                Self { max_directories, ..self }
            }
            _ => self,
        }
    }

    /// Whether objects may be omitted.
    pub(super) fn is_limited(&self) -> bool {
        self.max_bytes.is_some() || self.max_directories.is_some()
    }

    /// Number of commits that drain everything.
    pub(super) fn commits(&self) -> usize {
        if self.is_small { OBJECTS_MAX / SMALL_COMMIT } else { 2 }
    }

    pub(super) fn spec(&self) -> BundleSpec {
        let mut spec = BundleSpec::of_feeds(self.name, invariants::feeds());
        spec.max_bytes = self.max_bytes;
        if self.is_small {
            spec.limits.log_commits_max = SMALL_LOG;
            spec.limits.log_keys_max = SMALL_LOG_KEYS;
            spec.limits.commit_events_max = SMALL_COMMIT;
        }
        if let Some(max) = self.max_directories {
            spec.limits.directories_max = max;
        }
        if self.is_auto {
            let path = "/kubernetes".parse().unwrap();
            spec.auto = Some(AutoReplication { path, ignored: Vec::new() });
        }
        if self.is_scoped {
            let root = "/kubernetes".parse().unwrap();
            spec.scoped = Some(NamespaceScoping { root, whole: BTreeSet::new() });
        }
        if let Some(fields) = self.fields {
            let pods: DirPath = "/kubernetes/pods".parse().unwrap();
            let fields = FieldMask::parse(fields.iter().copied()).unwrap();
            spec.fields.given = FieldMasks::new(BTreeMap::from([(pods.clone(), fields)]), FieldMask::all());
            spec.fields.follows.places.insert(pods);
        }
        spec
    }
}
