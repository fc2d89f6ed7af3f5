//! The documents of one manifest file, and which feed selects them.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::bundle::spec::API_VERSION;
use crate::model::{Feed, Object, Scope};
use crate::source::trim;

/// One object of a file.
pub(super) struct Manifest {
    pub(super) kind: String,
    api_version: String,
    pub(super) object: Object,
    /// Which document of the file, from 1.
    pub(super) document: usize,
}

impl Manifest {
    /// Read anew each time: few feeds ask, of few kinds, and many objects keep many.
    fn labels(&self) -> BTreeMap<String, String> {
        let outline = serde_json::from_slice::<Outline>(&self.object.json);
        outline.ok().and_then(|outline| outline.metadata.labels).unwrap_or_default()
    }

    /// Whether it is a document of another version than this hub's.
    pub(super) fn is_unknown_bundle(&self) -> bool {
        let group = |version: &'_ str| version.split('/').next().map(ToOwned::to_owned);
        self.kind == "Bundle"
            && self.api_version != API_VERSION
            && group(&self.api_version) == group(API_VERSION)
    }

    fn kind(&self) -> Kind {
        let group = self.api_version.split_once('/').map_or("", |(group, _)| group);
        (group.to_owned(), self.kind.clone())
    }
}

impl std::fmt::Display for Manifest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.api_version, self.kind)
    }
}

/// The members of an object that say what it is.
#[derive(Deserialize)]
struct Outline<'a> {
    #[serde(default, rename = "apiVersion")]
    api_version: String,
    #[serde(default)]
    kind: String,
    #[serde(default)]
    metadata: Metadata,
    #[serde(borrow)]
    items: Option<Vec<&'a RawValue>>,
}

#[derive(Deserialize, Default)]
struct Metadata {
    labels: Option<BTreeMap<String, String>>,
}

/// The objects of a JSON file: one document after the other.
pub(super) fn parse_json(text: &str) -> Result<Vec<Manifest>, String> {
    let mut manifests = Vec::new();
    let documents = serde_json::Deserializer::from_str(text).into_iter::<&RawValue>();
    for (document, json) in (1..).zip(documents) {
        let json = json.map_err(|error| format!("document {document}: {error}"))?;
        flatten(json.get(), &Outer::default(), document, &mut manifests)?;
    }
    Ok(manifests)
}

/// The objects of a YAML file, whose documents are separated by lines that begin with `---`.
pub(super) fn parse_yaml(text: &str) -> Result<Vec<Manifest>, String> {
    let mut manifests = Vec::new();
    let mut start = 0;
    let mut document = 0;
    let line_ends = text.match_indices("\n---").map(|(at, _)| at + 1).chain([text.len()]);
    for end in line_ends {
        let part = text[start..end].strip_prefix("---").unwrap_or(&text[start..end]);
        start = end;
        if part.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#')) {
            continue;
        }
        document += 1;
        let wrap = |error: &dyn std::fmt::Display| format!("document {document}: {error}");
        // Below its first line the error shows the text, which may be anybody's secret.
        let first_line =
            |error: serde_saphyr::Error| wrap(&error.to_string().lines().next().unwrap_or_default());
        let value: Value = serde_saphyr::from_str(part).map_err(first_line)?;
        let json = serde_json::to_string(&value).map_err(|error| wrap(&error))?;
        flatten(&json, &Outer::default(), document, &mut manifests)?;
    }
    Ok(manifests)
}

/// What a list says of its items, which may not say it themselves.
#[derive(Default)]
struct Outer {
    is_list: bool,
    api_version: String,
    kind: String,
}

fn flatten(json: &str, outer: &Outer, document: usize, out: &mut Vec<Manifest>) -> Result<(), String> {
    let wrap = |error: &dyn std::fmt::Display| format!("document {document}: {error}");
    let mut outline: Outline = serde_json::from_str(json).map_err(|error| wrap(&error))?;
    if let (Some(items), Some(of)) = (&outline.items, outline.kind.strip_suffix("List")) {
        if outer.is_list {
            return Err(wrap(&"a list in a list; write its items into the outer one"));
        }
        let outer = match of {
            "" => Outer { is_list: true, ..Outer::default() },
            kind => Outer { is_list: true, api_version: outline.api_version.clone(), kind: kind.to_owned() },
        };
        return items.iter().try_for_each(|item| flatten(item.get(), &outer, document, out));
    }
    if outline.kind.is_empty() {
        outline.kind.clone_from(&outer.kind);
        outline.api_version.clone_from(&outer.api_version);
    }
    if outline.kind.is_empty() || outline.api_version.is_empty() {
        return Err(wrap(&"it has no kind or no apiVersion"));
    }
    let object = trim::object(json, &outline.api_version, &outline.kind).map_err(|error| wrap(&error))?;
    out.push(Manifest { kind: outline.kind, api_version: outline.api_version, object, document });
    Ok(())
}

/// Kubernetes' own kinds whose objects belong to no namespace.
const CLUSTER_SCOPED: [&str; 12] = [
    "APIService",
    "ClusterRole",
    "ClusterRoleBinding",
    "CustomResourceDefinition",
    "IngressClass",
    "MutatingWebhookConfiguration",
    "Namespace",
    "Node",
    "PersistentVolume",
    "PriorityClass",
    "StorageClass",
    "ValidatingWebhookConfiguration",
];

/// Group and kind.
type Kind = (String, String);

/// The plurals of kinds: from the CustomResourceDefinitions in the folder, else by English rules. Those too say which
/// kinds belong to no namespace.
pub(super) struct Kinds {
    plurals: HashMap<Kind, String>,
    cluster_scoped: HashSet<Kind>,
}

impl Kinds {
    /// What `manifests` define.
    pub(super) fn of<'a>(manifests: impl Iterator<Item = &'a Manifest>) -> Self {
        let mut kinds = Self { plurals: HashMap::new(), cluster_scoped: HashSet::new() };
        for definition in manifests.filter(|manifest| manifest.kind == "CustomResourceDefinition") {
            let Ok(json) = serde_json::from_slice::<Value>(&definition.object.json) else { continue };
            let text = |pointer: &str| Some(json.pointer(pointer)?.as_str()?.to_owned());
            let Some(kind) = text("/spec/group").zip(text("/spec/names/kind")) else { continue };
            if text("/spec/scope").is_some_and(|scope| scope == "Cluster") {
                kinds.cluster_scoped.insert(kind.clone());
            }
            kinds.plurals.extend(text("/spec/names/plural").map(|plural| (kind, plural)));
        }
        kinds
    }

    /// Whether `manifest` belongs to no namespace, whatever it says.
    pub(super) fn is_cluster_scoped(&self, manifest: &Manifest) -> bool {
        CLUSTER_SCOPED.contains(&&*manifest.kind) || self.cluster_scoped.contains(&manifest.kind())
    }

    /// Whether objects of this kind are what `feed` watches.
    fn is_of(&self, feed: &Feed, manifest: &Manifest) -> bool {
        let is_version = feed.resource.is_named_only() || manifest.api_version == feed.resource.api_version();
        is_version
            && match self.plurals.get(&manifest.kind()) {
                Some(plural) => *plural == feed.resource.plural,
                None => plural(&manifest.kind) == feed.resource.plural,
            }
    }

    /// Picks what `feed` selects, as the API server would, from manifests that it is asked about one after the other.
    pub(super) fn selection<'a>(&'a self, feed: &'a Feed) -> impl FnMut(&Manifest) -> bool {
        // Neighbours are mostly of one kind.
        let mut last: Option<(String, String, bool)> = None;
        move |manifest| {
            let same = |(version, kind, _): &&(String, String, bool)| {
                *version == manifest.api_version && *kind == manifest.kind
            };
            let is_of = if let Some((.., is_of)) = last.as_ref().filter(same) {
                *is_of
            } else {
                let is_of = self.is_of(feed, manifest);
                last = Some((manifest.api_version.clone(), manifest.kind.clone(), is_of));
                is_of
            };
            is_of && in_scope(&feed.scope, &manifest.object.key.namespace) && {
                let labels = if feed.labels.is_empty() { BTreeMap::new() } else { manifest.labels() };
                feed.labels.iter().all(|term| term.takes(labels.get(&term.label)))
            }
        }
    }
}

fn in_scope(scope: &Scope, namespace: &str) -> bool {
    let namespace = if namespace.is_empty() { super::DEFAULT_NAMESPACE } else { namespace };
    match scope {
        Scope::Cluster => true,
        Scope::Namespaces { ignored } => !ignored.iter().any(|ignored| ignored == namespace),
        Scope::Namespace(only) => only == namespace,
    }
}

/// The plural that Kubernetes' own kinds have.
fn plural(kind: &str) -> String {
    let kind = kind.to_ascii_lowercase();
    let ends = |suffixes: &[&str]| suffixes.iter().any(|suffix| kind.ends_with(suffix));
    match kind.strip_suffix('y') {
        _ if kind == "endpoints" => kind,
        Some(stem) if !ends(&["ay", "ey", "iy", "oy", "uy"]) => format!("{stem}ies"),
        _ if ends(&["s", "x", "z", "ch", "sh"]) => format!("{kind}es"),
        _ => format!("{kind}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plurals() {
        for (kind, expected) in [
            ("Pod", "pods"),
            ("NetworkPolicy", "networkpolicies"),
            ("Ingress", "ingresses"),
            ("Endpoints", "endpoints"),
            ("Gateway", "gateways"),
        ] {
            assert_eq!(plural(kind), expected);
        }
    }
}
