//! Parsing and validation of a single ConfigMap.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use opa_hub_proto::head::ENTRY_BYTES_MAX;
use opa_hub_proto::path::DirPath;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::json::JSON_DEPTH_MAX;
use crate::policy::modules;

/// An object is rejected before any check.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("invalid object: {0}")]
    NotAnObjectAtAll(serde_json::Error),
    #[error("data is not a map of strings: {0}")]
    NotAConfigMap(serde_json::Error),
    #[error("{0:?} is not a valid path segment below data; use letters, digits, '.', '_' and '-'")]
    Name(String),
    #[error("key {key} is not JSON: {source}")]
    NotJson { key: String, source: serde_json::Error },
    #[error("key {0} is not a JSON object; wrap the value as {{\"…\": …}}")]
    NotAnObject(String),
    #[error("key {0} is nested deeper than {JSON_DEPTH_MAX} levels")]
    TooDeep(String),
    #[error("key {key} is not a Rego module: {source}")]
    Module { key: String, source: modules::Error },
    /// Two owners for one path. A package at data would make OPA reject every later write.
    #[error("data{place} conflicts with {owner}; rename one of them")]
    ChangeBatch { place: DirPath, owner: String },
    #[error("{subject} has {bytes} bytes; the maximum for {scope} is {max}")]
    TooLarge { subject: String, bytes: usize, max: usize, scope: &'static str },
    #[error(
        "data size limit exceeded: the data would be larger than {max} bytes (maxBytes), and {heaviest} has {megabytes} MB; \
         select fewer objects or fields, or raise the limit"
    )]
    OverLimit { grows: usize, max: usize, heaviest: String, megabytes: usize },
    /// An archive header lists all directories.
    #[error("directory limit reached: the bundle has {0} directories")]
    TooManyDirectories(usize),
}

impl Error {
    /// Error code, as in OPA.
    pub(super) fn code(&self) -> &'static str {
        match self {
            Self::NotAConfigMap(_) | Self::NotAnObjectAtAll(_) | Self::Name(_) => "invalid_object",
            Self::NotJson { .. } | Self::NotAnObject(_) | Self::TooDeep(_) => "invalid_data",
            Self::Module { .. } => "rego_parse_error",
            Self::ChangeBatch { .. } => "path_conflict",
            Self::TooLarge { .. } | Self::TooManyDirectories(_) => "too_large",
            Self::OverLimit { .. } => "over_limit",
        }
    }

    /// Whether a retry may succeed once other objects are removed.
    pub(super) fn may_pass(&self) -> bool {
        matches!(
            self,
            Self::ChangeBatch { .. }
                | Self::TooManyDirectories(_)
                | Self::TooLarge { .. }
                | Self::OverLimit { .. }
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
    Err(Error::TooLarge { subject: name.to_owned(), bytes, max: ENTRY_BYTES_MAX, scope: "one entry" })
}

pub(super) fn data_value(key: &str, text: &str) -> Result<Bytes, Error> {
    let json: &RawValue =
        serde_json::from_str(text).map_err(|source| Error::NotJson { key: key.to_owned(), source })?;
    if !json.get().starts_with('{') {
        return Err(Error::NotAnObject(key.to_owned()));
    }
    let mut value = Vec::with_capacity(text.len());
    if crate::json::push_compact(&mut value, json.get()) > JSON_DEPTH_MAX {
        return Err(Error::TooDeep(key.to_owned()));
    }
    Ok(value.into())
}
