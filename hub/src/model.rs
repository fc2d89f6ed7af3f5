//! Plain values passed between stages.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use bytes::Bytes;
use opa_hub_proto::path::{DirPath, is_segment};
use tokio::sync::watch;

/// Maximum events in one commit: about 50 ms under load.
pub const COMMIT_EVENTS_MAX: usize = 4096;

/// Overhead of a counted allocation in bytes.
pub const ALLOCATION_BYTES: usize = 32;

/// Label of policy ConfigMaps, as in kube-mgmt.
pub const POLICY_LABEL: (&str, &str) = ("openpolicyagent.org/policy", "rego");
/// Label of data ConfigMaps, as in kube-mgmt.
pub const DATA_LABEL: (&str, &str) = ("openpolicyagent.org/data", "opa");

/// A resource, `[group/]version/plural`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Resource {
    /// API group, empty for the core group.
    pub group: String,
    /// API version, empty if unknown.
    pub version: String,
    /// Plural name, e.g. `pods`.
    pub plural: String,
}

/// Namespace selection of a watch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NamespaceSelector {
    /// Cluster-scoped objects.
    ClusterScoped,
    /// All namespaces except some.
    AllExcept {
        /// Excluded namespaces.
        ignored: Vec<String>,
    },
    /// One namespace.
    Only(String),
}

/// Purpose of watched objects.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Content {
    /// ConfigMaps with Rego modules.
    PolicyRegistry,
    /// ConfigMaps with JSON objects.
    Data,
    /// Objects replicated below this path.
    Resource(DirPath),
    /// `Bundle` documents.
    BundleRegistry,
}

/// Specification of a watch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WatchSpec {
    /// Watched resource.
    pub resource: Resource,
    /// Selected namespaces.
    pub scope: NamespaceSelector,
    /// Label requirements.
    pub labels: Vec<LabelTerm>,
    /// Purpose of the objects.
    pub content: Content,
}

/// A requirement on one label.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LabelTerm {
    /// Label name.
    pub label: String,
    /// Required values.
    pub is: Condition,
}

/// Operator and values of a label requirement.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Condition {
    /// One of these.
    In(Vec<String>),
    /// Not one of these, or missing.
    NotIn(Vec<String>),
    /// Present.
    Exists,
    /// Missing.
    DoesNotExist,
}

/// Index of a watch within a bundle.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct InputId(pub usize);

/// A watch, shared by bundles with equal selections. Never reused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct WatchId(pub usize);

/// Namespace and name of an object.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ObjectKey {
    /// Empty for cluster-scoped objects.
    pub namespace: Arc<str>,
    /// Object name.
    pub name: Arc<str>,
}

/// A Kubernetes object.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Object {
    /// Namespace and name.
    pub key: ObjectKey,
    /// Canonical JSON, see `source/normalize`.
    pub json: Bytes,
}

/// A resource version, comparable within a resource (KEP-5504).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Version(pub u64);

/// An event of one watch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// A list begins. Unlisted objects no longer exist.
    Init,
    /// The object exists.
    Apply(Object),
    /// The object was deleted.
    Delete(ObjectKey),
    /// The list is complete.
    InitDone,
    /// The watch is failing. Optional objects need no wait.
    Failed,
    /// The API server denied the request. Earlier objects become stale.
    Denied,
    /// Contact without a change.
    Bookmark,
}

/// A change of one object.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    /// New object or content.
    Put(InputId, Object),
    /// Removed object.
    Remove(InputId, ObjectKey),
}

/// All replicated objects.
#[derive(Default)]
pub struct Replicated {
    /// Full objects with data paths.
    pub objects: Vec<(DirPath, Object)>,
    /// Data paths.
    pub places: BTreeSet<DirPath>,
}

/// A rejected item.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
pub struct Problem {
    /// Rejected item, e.g. `ConfigMap opa/authz`.
    pub subject: String,
    /// Reason and remedy.
    pub message: String,
}

/// Failure to parse a resource.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} names no resource; write [group/]version/plural, e.g. v1/pods or apps/v1/deployments")]
pub struct InvalidResource(String);

impl Resource {
    /// The core resource `configmaps`.
    pub fn configmaps() -> Self {
        Self { group: String::new(), version: "v1".into(), plural: "configmaps".into() }
    }

    /// Resource of unknown group and version.
    pub fn named(plural: &str) -> Self {
        Self { group: String::new(), version: String::new(), plural: plural.into() }
    }

    /// Whether only the plural is known.
    pub fn is_named_only(&self) -> bool {
        self.version.is_empty()
    }

    /// `apiVersion` of the objects.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.clone() } else { format!("{}/{}", self.group, self.version) }
    }
}

impl FromStr for Resource {
    type Err = InvalidResource;

    fn from_str(text: &str) -> Result<Self, InvalidResource> {
        let parts: Vec<_> = text.split('/').collect();
        let (group, version, plural) = match parts[..] {
            [version, plural] => ("", version, plural),
            [group, version, plural] if is_segment(group) => (group, version, plural),
            _ => return Err(InvalidResource(text.to_owned())),
        };
        if !is_segment(version) || !is_segment(plural) {
            return Err(InvalidResource(text.to_owned()));
        }
        Ok(Self { group: group.into(), version: version.into(), plural: plural.into() })
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_named_only() {
            return f.write_str(&self.plural);
        }
        write!(f, "{}/{}", self.api_version(), self.plural)
    }
}

impl WatchSpec {
    /// Label selector in API syntax, possibly empty.
    pub fn label_selector(&self) -> String {
        self.labels.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
    }

    /// Whether one watch can serve both.
    pub fn selects_as(&self, other: &Self) -> bool {
        (&self.resource, &self.scope, &self.labels) == (&other.resource, &other.scope, &other.labels)
    }

    /// Name in positions, independent of labels and exclusions.
    pub fn position_name(&self) -> String {
        let content = match &self.content {
            Content::PolicyRegistry => "policies",
            Content::Data => "data",
            Content::BundleRegistry => "bundles",
            Content::Resource(place) => place.as_str(),
        };
        match &self.scope {
            NamespaceSelector::Only(namespace) => format!("{content} in {namespace}"),
            NamespaceSelector::ClusterScoped | NamespaceSelector::AllExcept { .. } => content.to_owned(),
        }
    }

    /// Data path. `None` unless replicated.
    pub fn place(&self) -> Option<&DirPath> {
        match &self.content {
            Content::Resource(place) => Some(place),
            Content::PolicyRegistry | Content::Data | Content::BundleRegistry => None,
        }
    }

    /// Field selector in API syntax, possibly empty.
    pub fn field_selector(&self) -> String {
        let NamespaceSelector::AllExcept { ignored } = &self.scope else { return String::new() };
        ignored.iter().map(|ns| format!("metadata.namespace!={ns}")).collect::<Vec<_>>().join(",")
    }
}

impl fmt::Display for WatchSpec {
    /// Example: `policies (v1/configmaps in opa)`. kube-mgmt's labels are omitted.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.content {
            Content::PolicyRegistry => f.write_str("policies (")?,
            Content::Data => f.write_str("data (")?,
            Content::Resource(_) | Content::BundleRegistry => {}
        }
        self.resource.fmt(f)?;
        match &self.scope {
            NamespaceSelector::Only(namespace) => write!(f, " in {namespace}")?,
            NamespaceSelector::AllExcept { ignored } if !ignored.is_empty() => {
                write!(f, " outside {}", ignored.join(","))?;
            }
            _ => {}
        }
        let default_label = match self.content {
            Content::PolicyRegistry => Some(POLICY_LABEL),
            Content::Data => Some(DATA_LABEL),
            Content::Resource(_) | Content::BundleRegistry => None,
        };
        let requires = |term: &LabelTerm, (label, value): (&str, &str), is_negated: bool| {
            term.label == label
                && match &term.is {
                    Condition::In(values) => !is_negated && values[..] == [value],
                    Condition::NotIn(values) => is_negated && values[..] == [value],
                    _ => false,
                }
        };
        let is_default = match (&self.labels[..], default_label) {
            ([], _) => true,
            ([first], Some(label)) => requires(first, label, false),
            ([first, second], Some(label)) => {
                requires(first, label, false) && requires(second, DATA_LABEL, true)
            }
            _ => false,
        };
        if !is_default {
            write!(f, " with {}", self.label_selector())?;
        }
        f.write_str(if default_label.is_some() { ")" } else { "" })
    }
}

impl LabelTerm {
    /// Whether a label matches. `None` is missing.
    pub fn takes(&self, value: Option<&String>) -> bool {
        match (&self.is, value) {
            (Condition::In(values), value) => value.is_some_and(|value| values.contains(value)),
            (Condition::NotIn(values), value) => value.is_none_or(|value| !values.contains(value)),
            (Condition::Exists, value) => value.is_some(),
            (Condition::DoesNotExist, value) => value.is_none(),
        }
    }
}

impl fmt::Display for LabelTerm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let label = &self.label;
        match &self.is {
            Condition::In(values) if values.len() == 1 => write!(f, "{label}={}", values[0]),
            Condition::NotIn(values) if values.len() == 1 => write!(f, "{label}!={}", values[0]),
            Condition::In(values) => write!(f, "{label} in ({})", values.join(",")),
            Condition::NotIn(values) => write!(f, "{label} notin ({})", values.join(",")),
            Condition::Exists => f.write_str(label),
            Condition::DoesNotExist => write!(f, "!{label}"),
        }
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            f.write_str(&self.name)
        } else {
            write!(f, "{}/{}", self.namespace, self.name)
        }
    }
}

pub(crate) fn directory(place: &DirPath, key: &ObjectKey) -> Option<DirPath> {
    if key.namespace.is_empty() { Some(place.clone()) } else { place.join(&key.namespace).ok() }
}

/// The set of subscribed watches.
pub type WatchSet = watch::Receiver<BTreeMap<WatchId, WatchSpec>>;

/// Whether a source may lack the resource.
pub fn is_optional(content: &Content) -> bool {
    *content == Content::BundleRegistry
}

/// An event with the watch's version after it, if known.
pub type Told = (WatchId, Event, Option<Version>);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resources_parse_as_kube_mgmt_writes_them() {
        for good in ["v1/pods", "apps/v1/deployments", "example.com/v1beta1/widgets"] {
            assert_eq!(good.parse::<Resource>().unwrap().to_string(), good);
        }
        for bad in ["", "pods", "/v1/pods", "a/b/c/d", "v1/", "v1/pod s"] {
            assert!(bad.parse::<Resource>().is_err(), "{bad}");
        }
    }
}
