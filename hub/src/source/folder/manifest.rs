//! Documents of a manifest file, and their selection by watches.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::model::{NamespaceSelector, Object, WatchSpec};
use crate::source::normalize;
use crate::spec::API_VERSION;

/// One object of a file.
pub(super) struct Manifest {
    pub(super) kind: String,
    api_version: String,
    pub(super) object: Object,
    /// Index in the file, from 1.
    pub(super) document: usize,
}

impl Manifest {
    /// Parsed on demand: few watches need labels.
    fn labels(&self) -> BTreeMap<String, String> {
        let header = serde_json::from_slice::<ObjectHeader>(&self.object.json);
        header.ok().and_then(|header| header.metadata.labels).unwrap_or_default()
    }

    pub(super) fn is_unknown_bundle(&self) -> bool {
        self.kind == "Bundle"
            && self.api_version != API_VERSION
            && self.api_version.split('/').next() == API_VERSION.split('/').next()
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

#[derive(Deserialize)]
struct ObjectHeader<'a> {
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

pub(super) fn parse_json(text: &str) -> Result<Vec<Manifest>, String> {
    let mut manifests = Vec::new();
    let documents = serde_json::Deserializer::from_str(text).into_iter::<&RawValue>();
    for (document, json) in (1..).zip(documents) {
        let json = json.map_err(|error| format!("document {document}: {error}"))?;
        flatten(json.get(), &ListHeader::default(), document, &mut manifests)?;
    }
    Ok(manifests)
}

pub(super) fn parse_yaml(text: &str) -> Result<Vec<Manifest>, String> {
    let mut manifests = Vec::new();
    let mut start = 0;
    let mut document = 0;
    let line_ends = text.match_indices("\n---").map(|(index, _)| index + 1).chain([text.len()]);
    for end in line_ends {
        let part = text[start..end].strip_prefix("---").unwrap_or(&text[start..end]);
        start = end;
        if part.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#')) {
            continue;
        }
        document += 1;
        let wrap = |error: &dyn std::fmt::Display| format!("document {document}: {error}");
        // Further lines quote the file, which may contain secrets.
        let first_line =
            |error: serde_saphyr::Error| wrap(&error.to_string().lines().next().unwrap_or_default());
        let value: Value = serde_saphyr::from_str(part).map_err(first_line)?;
        let json = serde_json::to_string(&value).map_err(|error| wrap(&error))?;
        flatten(&json, &ListHeader::default(), document, &mut manifests)?;
    }
    Ok(manifests)
}

/// Defaults for list items.
#[derive(Default)]
struct ListHeader {
    is_list: bool,
    api_version: String,
    kind: String,
}

fn flatten(json: &str, list: &ListHeader, document: usize, out: &mut Vec<Manifest>) -> Result<(), String> {
    let wrap = |error: &dyn std::fmt::Display| format!("document {document}: {error}");
    let mut header: ObjectHeader = serde_json::from_str(json).map_err(|error| wrap(&error))?;
    if let (Some(items), Some(item_kind)) = (&header.items, header.kind.strip_suffix("List")) {
        if list.is_list {
            return Err(wrap(&"a list contains a list; move its items to the outer list"));
        }
        let list = match item_kind {
            "" => ListHeader { is_list: true, ..ListHeader::default() },
            kind => {
                ListHeader { is_list: true, api_version: header.api_version.clone(), kind: kind.to_owned() }
            }
        };
        return items.iter().try_for_each(|item| flatten(item.get(), &list, document, out));
    }
    if header.kind.is_empty() {
        header.kind.clone_from(&list.kind);
        header.api_version.clone_from(&list.api_version);
    }
    if header.kind.is_empty() || header.api_version.is_empty() {
        return Err(wrap(&"kind or apiVersion is missing"));
    }
    let object = normalize::object(json, &header.api_version, &header.kind).map_err(|error| wrap(&error))?;
    out.push(Manifest { kind: header.kind, api_version: header.api_version, object, document });
    Ok(())
}

/// Built-in cluster-scoped kinds.
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

/// Plurals and scopes from CustomResourceDefinitions. Other plurals follow English rules.
pub(super) struct KindRegistry {
    plurals: HashMap<Kind, String>,
    cluster_scoped: HashSet<Kind>,
}

impl KindRegistry {
    pub(super) fn from_manifests<'a>(manifests: impl Iterator<Item = &'a Manifest>) -> Self {
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

    pub(super) fn is_cluster_scoped(&self, manifest: &Manifest) -> bool {
        CLUSTER_SCOPED.contains(&&*manifest.kind) || self.cluster_scoped.contains(&manifest.kind())
    }

    fn matches_resource(&self, feed: &WatchSpec, manifest: &Manifest) -> bool {
        let is_version = feed.resource.is_named_only() || manifest.api_version == feed.resource.api_version();
        is_version
            && match self.plurals.get(&manifest.kind()) {
                Some(plural) => *plural == feed.resource.plural,
                None => plural(&manifest.kind) == feed.resource.plural,
            }
    }

    /// Returns a predicate that selects as the API server would.
    pub(super) fn selection<'a>(&'a self, feed: &'a WatchSpec) -> impl FnMut(&Manifest) -> bool {
        // Neighbors usually have the same kind.
        let mut last: Option<(String, String, bool)> = None;
        move |manifest| {
            let has_same_kind = |(version, kind, _): &&(String, String, bool)| {
                *version == manifest.api_version && *kind == manifest.kind
            };
            let is_match = if let Some((.., is_match)) = last.as_ref().filter(has_same_kind) {
                *is_match
            } else {
                let is_match = self.matches_resource(feed, manifest);
                last = Some((manifest.api_version.clone(), manifest.kind.clone(), is_match));
                is_match
            };
            is_match && is_in_scope(&feed.scope, &manifest.object.key.namespace) && {
                let labels = if feed.labels.is_empty() { BTreeMap::new() } else { manifest.labels() };
                feed.labels.iter().all(|term| term.takes(labels.get(&term.label)))
            }
        }
    }
}

fn is_in_scope(scope: &NamespaceSelector, namespace: &str) -> bool {
    let namespace = if namespace.is_empty() { super::DEFAULT_NAMESPACE } else { namespace };
    match scope {
        NamespaceSelector::ClusterScoped => true,
        NamespaceSelector::AllExcept { ignored } => !ignored.iter().any(|ignored| ignored == namespace),
        NamespaceSelector::Only(only) => only == namespace,
    }
}

fn plural(kind: &str) -> String {
    let kind = kind.to_ascii_lowercase();
    let has_suffix = |suffixes: &[&str]| suffixes.iter().any(|suffix| kind.ends_with(suffix));
    match kind.strip_suffix('y') {
        _ if kind == "endpoints" => kind,
        Some(stem) if !has_suffix(&["ay", "ey", "iy", "oy", "uy"]) => format!("{stem}ies"),
        _ if has_suffix(&["s", "x", "z", "ch", "sh"]) => format!("{kind}es"),
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
