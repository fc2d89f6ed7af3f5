//! The plain values that pass between the stages: feeds, objects, events, changes.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use bytes::Bytes;
use opa_hub_proto::path::{DirPath, is_segment};

/// ConfigMaps with policies, as kube-mgmt marks them …
pub const POLICY_LABEL: (&str, &str) = ("openpolicyagent.org/policy", "rego");
/// … and those with data.
pub const DATA_LABEL: (&str, &str) = ("openpolicyagent.org/data", "opa");

/// A resource as kube-mgmt's flags name it, `[group/]version/plural`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Resource {
    /// API group; empty for the core group.
    pub group: String,
    /// API version.
    pub version: String,
    /// Plural name, e.g. `pods`: the name under which it is replicated.
    pub plural: String,
}

/// Which objects of a resource a feed selects, decided by the API server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Scope {
    /// Objects that belong to no namespace.
    Cluster,
    /// Every namespace but these.
    Namespaces {
        /// Namespaces left out.
        ignored: Vec<String>,
    },
    /// One namespace.
    Namespace(String),
}

/// What the objects of a feed are to the bundle.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Content {
    /// ConfigMaps whose keys are Rego modules.
    Policies,
    /// ConfigMaps whose keys are JSON objects.
    Data,
    /// Objects replicated below this path, e.g. `/kubernetes/pods`.
    Resource(DirPath),
    /// Documents that say which bundles there are.
    Bundles,
}

/// One watch: a resource, which of its objects, and what they are for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Feed {
    /// The watched resource.
    pub resource: Resource,
    /// Which of its objects.
    pub scope: Scope,
    /// Labels that an object must have.
    pub labels: Vec<LabelTerm>,
    /// What the objects are to the bundle.
    pub content: Content,
}

/// A condition on one label.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LabelTerm {
    /// The label's name.
    pub label: String,
    /// What of it.
    pub is: Condition,
}

/// What a label must be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Condition {
    /// One of these.
    In(Vec<String>),
    /// None of these, or not there.
    NotIn(Vec<String>),
    /// There.
    Exists,
    /// Not there.
    DoesNotExist,
}

/// A feed by its place in its bundle.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FeedId(pub usize);

/// A watch of the hub. Feeds that select alike, of whichever bundle, share one. No number is given twice.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct WatchId(pub usize);

/// An object's name within its feed.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ObjectKey {
    /// Empty for objects that belong to no namespace.
    pub namespace: Arc<str>,
    /// The object's name.
    pub name: Arc<str>,
}

/// One Kubernetes object or manifest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Object {
    /// Its name.
    pub key: ObjectKey,
    /// The trimmed object as JSON without insignificant white space, see [`crate::source::trim`].
    pub json: Bytes,
}

/// How far a watch is: all that happened up to then was said. Comparable within one resource (KEP-5504).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Version(pub u64);

/// What a source says of one watch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// A list begins: what it does not name before `InitDone` no longer exists.
    Init,
    /// The object exists, with this content.
    Apply(Object),
    /// The object is gone.
    Delete(ObjectKey),
    /// The list is complete.
    InitDone,
    /// It cannot be had now: who can do without need not wait.
    Unavailable,
    /// The source answered that there is none of it, or none for the hub: the source is there, what it sent before
    /// grows stale.
    Refused,
    /// Nothing is new.
    Quiet,
}

/// What an event changed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    /// The object is new or has new content.
    Put(FeedId, Object),
    /// The object is gone.
    Remove(FeedId, ObjectKey),
}

/// The replicated objects that there are.
#[derive(Default)]
pub struct Replicated {
    /// Whole, each with the place of its resource.
    pub objects: Vec<(DirPath, Object)>,
    /// Places of all resources.
    pub places: BTreeSet<DirPath>,
}

/// Something refused, in words for the person who can mend it.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
pub struct Problem {
    /// What was refused: `ConfigMap opa/authz`, `deploy/demo/roles.yaml`, `pods`.
    pub subject: String,
    /// Why, and what to do.
    pub message: String,
}

/// Why a text names no resource.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} names no resource: write [group/]version/plural, e.g. v1/pods or apps/v1/deployments")]
pub struct InvalidResource(String);

impl Resource {
    /// The core resource `configmaps`.
    pub fn configmaps() -> Self {
        Self { group: String::new(), version: "v1".into(), plural: "configmaps".into() }
    }

    /// The resource of this name in whichever group serves it.
    pub fn named(plural: &str) -> Self {
        Self { group: String::new(), version: String::new(), plural: plural.into() }
    }

    /// Whether only its name is known.
    pub fn is_named_only(&self) -> bool {
        self.version.is_empty()
    }

    /// `apiVersion` as objects carry it.
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

impl Feed {
    /// The label selector in the API server's syntax; empty: no condition.
    pub fn label_selector(&self) -> String {
        self.labels.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
    }

    /// Whether one watch serves both.
    pub fn selects_as(&self, other: &Self) -> bool {
        (&self.resource, &self.scope, &self.labels) == (&other.resource, &other.scope, &other.labels)
    }

    /// What it is called in a position: the same, however it selects.
    pub fn position_name(&self) -> String {
        let content = match &self.content {
            Content::Policies => "policies",
            Content::Data => "data",
            Content::Bundles => "bundles",
            Content::Resource(place) => place.as_str(),
        };
        match &self.scope {
            Scope::Namespace(namespace) => format!("{content} in {namespace}"),
            Scope::Cluster | Scope::Namespaces { .. } => content.to_owned(),
        }
    }

    /// Where its objects lie, if they are replicated.
    pub fn place(&self) -> Option<&DirPath> {
        match &self.content {
            Content::Resource(place) => Some(place),
            Content::Policies | Content::Data | Content::Bundles => None,
        }
    }

    /// The field selector in the API server's syntax; empty: no condition.
    pub fn field_selector(&self) -> String {
        let Scope::Namespaces { ignored } = &self.scope else { return String::new() };
        ignored.iter().map(|ns| format!("metadata.namespace!={ns}")).collect::<Vec<_>>().join(",")
    }
}

impl fmt::Display for Feed {
    /// As the feed is called in messages: `policies (v1/configmaps in opa)`, `v1/pods`. What kube-mgmt selects by goes
    /// without saying.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.content {
            Content::Policies => f.write_str("policies (")?,
            Content::Data => f.write_str("data (")?,
            Content::Resource(_) | Content::Bundles => {}
        }
        self.resource.fmt(f)?;
        match &self.scope {
            Scope::Namespace(namespace) => write!(f, " in {namespace}")?,
            Scope::Namespaces { ignored } if !ignored.is_empty() => {
                write!(f, " outside {}", ignored.join(","))?;
            }
            _ => {}
        }
        let usual = match self.content {
            Content::Policies => Some(POLICY_LABEL),
            Content::Data => Some(DATA_LABEL),
            Content::Resource(_) | Content::Bundles => None,
        };
        let is = |term: &LabelTerm, (label, value): (&str, &str), not: bool| {
            term.label == label
                && match &term.is {
                    Condition::In(values) => !not && values[..] == [value],
                    Condition::NotIn(values) => not && values[..] == [value],
                    _ => false,
                }
        };
        let is_usual = match (&self.labels[..], usual) {
            ([], _) => true,
            ([first], Some(usual)) => is(first, usual, false),
            ([first, second], Some(usual)) => is(first, usual, false) && is(second, DATA_LABEL, true),
            _ => false,
        };
        if !is_usual {
            write!(f, " with {}", self.label_selector())?;
        }
        f.write_str(if usual.is_some() { ")" } else { "" })
    }
}

impl LabelTerm {
    /// Whether an object whose label has this value is meant.
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
    /// In the API server's syntax.
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
