//! What is read of one ConfigMap by itself, and why it is refused.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use opa_hub_proto::head::ENTRY_BYTES_MAX;
use opa_hub_proto::path::DirPath;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::config::JSON_DEPTH_MAX;
use crate::policy::modules;
use crate::source::trim;

/// Why an object is refused before any check.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// An object whose text is none.
    #[error("it is no object: {0}")]
    NotAnObjectAtAll(serde_json::Error),
    /// A ConfigMap that is none.
    #[error("its data is no map of strings: {0}")]
    NotAConfigMap(serde_json::Error),
    /// A name that cannot be a place below `data`.
    #[error("{0:?} cannot be part of a path below data: use letters, digits, '.', '_' and '-'")]
    Name(String),
    /// A data key that does not parse.
    #[error("key {key} is not JSON: {source}")]
    NotJson {
        /// The key.
        key: String,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A data key that is a list, a number, a string.
    #[error("key {0} is not a JSON object: wrap the value as {{\"…\": …}}")]
    NotAnObject(String),
    /// A data key that OPA would refuse to read.
    #[error("key {0} is nested deeper than {JSON_DEPTH_MAX} levels")]
    TooDeep(String),
    /// A key whose text is no Rego module.
    #[error("key {key} is not a Rego module: {source}")]
    Module {
        /// The key.
        key: String,
        /// Where and why.
        source: modules::Error,
    },
    /// Two sources for one path, or a package where data lies: OPA would refuse every later write of data.
    #[error("it would own data{place}, which {owner} owns already: rename one of them")]
    Taken {
        /// What it would own.
        place: DirPath,
        /// Who owns that, or something above or below it.
        owner: String,
    },
    /// More than an agent takes.
    #[error("{what} has {bytes} bytes, more than the {max} that {whose} may have")]
    TooLarge {
        /// The key, or the object.
        what: String,
        /// Its size.
        bytes: usize,
        /// The bound.
        max: usize,
        /// What the bound is for.
        whose: &'static str,
    },
    /// More than the bundle may hold.
    #[error(
        "left as it was: with it the data would be larger than the limit of {max} bytes (maxBytes), and {heaviest} has \
         {megabytes} MB of it; select fewer objects or fields, or raise the limit"
    )]
    OverLimit {
        /// Bytes by which the data would grow.
        grows: usize,
        /// The limit.
        max: usize,
        /// Who has most of it.
        heaviest: String,
        /// How much, rounded down.
        megabytes: usize,
    },
    /// More places than the head of an archive may list.
    #[error("the bundle already has {0} directories")]
    TooManyDirectories(usize),
}

impl Error {
    /// As OPA would call it.
    pub(super) fn code(&self) -> &'static str {
        match self {
            Self::NotAConfigMap(_) | Self::NotAnObjectAtAll(_) | Self::Name(_) => "invalid_object",
            Self::NotJson { .. } | Self::NotAnObject(_) | Self::TooDeep(_) => "invalid_data",
            Self::Module { .. } => "rego_parse_error",
            Self::Taken { .. } => "path_conflict",
            Self::TooLarge { .. } | Self::TooManyDirectories(_) => "too_large",
            Self::OverLimit { .. } => "over_limit",
        }
    }

    /// Whether it may be taken once something else goes.
    pub(super) fn may_pass(&self) -> bool {
        matches!(
            self,
            Self::Taken { .. } | Self::TooManyDirectories(_) | Self::TooLarge { .. } | Self::OverLimit { .. }
        )
    }
}

#[derive(Deserialize)]
pub(super) struct ConfigMap {
    #[serde(default)]
    pub(super) metadata: Metadata,
    pub(super) data: Option<BTreeMap<String, String>>,
    #[serde(rename = "binaryData")]
    binary_data: Option<HashMap<String, String>>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase")]
pub(super) struct Metadata {
    pub(super) resource_version: Option<String>,
    pub(super) labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
}

impl Metadata {
    pub(super) fn annotation(&self, name: &str) -> Option<String> {
        self.annotations.as_ref()?.get(name).cloned()
    }
}

impl ConfigMap {
    pub(super) fn warnings(&self) -> Vec<String> {
        let mut keys: Vec<_> = self.binary_data.iter().flatten().map(|(key, _)| key.as_str()).collect();
        keys.sort_unstable();
        let ignored = format!("binaryData is ignored, only data is read: {}", keys.join(", "));
        if keys.is_empty() { Vec::new() } else { vec![ignored] }
    }
}

pub(super) fn check_entry(name: &str, bytes: usize) -> Result<(), Error> {
    if bytes <= ENTRY_BYTES_MAX {
        return Ok(());
    }
    Err(Error::TooLarge { what: name.to_owned(), bytes, max: ENTRY_BYTES_MAX, whose: "one entry" })
}

pub(super) fn data_value(key: &str, text: &str) -> Result<Bytes, Error> {
    let json: &RawValue =
        serde_json::from_str(text).map_err(|source| Error::NotJson { key: key.to_owned(), source })?;
    if !json.get().starts_with('{') {
        return Err(Error::NotAnObject(key.to_owned()));
    }
    let mut value = Vec::with_capacity(text.len());
    if trim::push_compact(&mut value, json.get()) > JSON_DEPTH_MAX {
        return Err(Error::TooDeep(key.to_owned()));
    }
    Ok(value.into())
}
