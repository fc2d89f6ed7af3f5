//! What the fault test's bundles are made of.

use std::collections::{BTreeMap, BTreeSet};

use fastrand::Rng;
use opa_hub::bundle::fields::Fields;
use opa_hub::bundle::kept::Kept;
use opa_hub::bundle::spec::{AutoReplication, Scoped, Spec};
use opa_hub_proto::path::DirPath;

use crate::invariants;

/// What a document asks for.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Document {
    pub(super) name: &'static str,
    /// Readers get the objects of one namespace.
    pub(super) is_scoped: bool,
    /// Fields of pods that are served beside those that policies read; none: pods are served whole.
    pub(super) fields: Option<&'static [&'static str]>,
    /// It holds what its policies read, too.
    pub(super) is_auto: bool,
    /// Bytes that its data may have.
    pub(super) max_bytes: Option<usize>,
    /// Directories that its data may have.
    pub(super) max_directories: Option<usize>,
    /// A few changes take it beyond what a commit takes, and what its log remembers.
    pub(super) is_small: bool,
}

/// The bundle that may be given out by namespace.
const SPACES: &str = "spaces";
/// The bundle whose pods may be cut.
pub(super) const FIELDS: &str = "fields";
/// The bundle that is replicated as policies read.
pub(super) const AUTO: &str = "auto";

/// The bundle that may leave out what is too large.
const LIMIT: &str = "limit";
/// Bytes of about as much data as there is.
const MAX_BYTES: usize = 2500;
/// The bundle that may leave out whole directories.
const FEW: &str = "few";
/// Some less than there are.
const MAX_DIRECTORIES: usize = 10;
/// What a small bundle takes at a time, and remembers.
const SMALL_COMMIT: usize = 5;
const SMALL_LOG: usize = 8;
const SMALL_LOG_KEYS: usize = 24;
/// Objects that there may be of all kinds together, each of which may have changed.
const OBJECTS_MAX: usize = 120;

const NO_FIELDS: &[&str] = &[];
const IMAGES: &[&str] = &["spec.image"];

/// All of everything.
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
    /// Those that there are at the start.
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

    /// Another one of this name.
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

    /// Whether it may hold less than there is.
    pub(super) fn is_limited(&self) -> bool {
        self.max_bytes.is_some() || self.max_directories.is_some()
    }

    /// Commits after which nothing is left to take.
    pub(super) fn commits(&self) -> usize {
        if self.is_small { OBJECTS_MAX / SMALL_COMMIT } else { 2 }
    }

    pub(super) fn spec(&self) -> Spec {
        let mut spec = Spec::of_feeds(self.name, invariants::feeds());
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
            spec.scoped = Some(Scoped { root, whole: BTreeSet::new() });
        }
        if let Some(fields) = self.fields {
            let pods: DirPath = "/kubernetes/pods".parse().unwrap();
            let fields = Fields::parse(fields.iter().copied()).unwrap();
            spec.fields.given = Kept::new(BTreeMap::from([(pods.clone(), fields)]), Fields::all());
            spec.fields.follows.places.insert(pods);
        }
        spec
    }
}
