//! The plain values that pass between the stages: feeds, objects, events, changes.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use bytes::Bytes;
use opa_hub_proto::path::{DirPath, is_segment};

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
    /// Its value.
    pub value: String,
    /// Whether the label must have this value (true), or must not (false).
    pub equal: bool,
}

/// A feed by its place in [`Config::feeds`](crate::config::Config::feeds).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FeedId(pub usize);

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

/// What a source says of one feed.
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
    /// The feed, which the hub was not started with, begins.
    Open(Feed),
    /// The feed ends, and its objects with it.
    Close,
    /// The feed cannot be had now: nobody need wait for it.
    Unavailable,
}

/// What an event changed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    /// The object is new or has new content.
    Put(FeedId, Object),
    /// The object is gone.
    Remove(FeedId, ObjectKey),
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
        let terms = self
            .labels
            .iter()
            .map(|term| format!("{}{}{}", term.label, if term.equal { "=" } else { "!=" }, term.value));
        terms.collect::<Vec<_>>().join(",")
    }

    /// Where its objects lie, if they are replicated.
    pub fn place(&self) -> Option<&DirPath> {
        match &self.content {
            Content::Resource(place) => Some(place),
            Content::Policies | Content::Data => None,
        }
    }

    /// The field selector in the API server's syntax; empty: no condition.
    pub fn field_selector(&self) -> String {
        let Scope::Namespaces { ignored } = &self.scope else { return String::new() };
        ignored.iter().map(|ns| format!("metadata.namespace!={ns}")).collect::<Vec<_>>().join(",")
    }
}

impl fmt::Display for Feed {
    /// As the feed is called in messages: `policies (v1/configmaps in opa)`, `v1/pods`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.content {
            Content::Policies => write!(f, "policies ({}", self.resource)?,
            Content::Data => write!(f, "data ({}", self.resource)?,
            Content::Resource(_) => return self.resource.fmt(f),
        }
        if let Scope::Namespace(namespace) = &self.scope {
            write!(f, " in {namespace}")?;
        }
        f.write_str(")")
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
