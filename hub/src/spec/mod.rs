//! Bundle specifications, from flags or documents of kind `Bundle`.

use std::collections::{BTreeMap, BTreeSet};

use opa_hub_proto::path::{DirPath, is_segment};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;

use crate::fields::mask::{FieldMask, InvalidField};
use crate::fields::masks::FieldMasks;
use crate::model::{
    Condition, Content, DATA_LABEL, InvalidResource, LabelTerm, NamespaceSelector, Object, POLICY_LABEL,
    Resource, WatchSpec,
};
use crate::policy::check::Dialect;
use crate::snapshot::history::BundleLimits;

pub(crate) const API_VERSION: &str = "opahub.dev/v1alpha1";

/// Specification of a bundle.
#[derive(Clone, PartialEq, Debug)]
pub struct BundleSpec {
    /// Bundle name.
    pub name: String,
    /// WatchStatuses.
    pub feeds: Vec<WatchSpec>,
    /// Replication of resources that policies read, if enabled.
    pub auto: Option<AutoReplication>,
    /// Resources served by namespace, if enabled.
    pub scoped: Option<NamespaceScoping>,
    /// Served fields.
    pub fields: Selection,
    /// Rego version.
    pub dialect: Dialect,
    /// Label of ConfigMaps whose tests run.
    pub test_label: Option<String>,
    /// Maximum size of the data as JSON, in bytes.
    pub max_bytes: Option<usize>,
    /// History and batch limits.
    pub limits: BundleLimits,
}

/// Replication of resources that policies read.
#[derive(Clone, PartialEq, Debug)]
pub struct AutoReplication {
    /// Parent path.
    pub path: DirPath,
    /// Ignored namespaces.
    pub ignored: Vec<String>,
}

/// Resources that are served by namespace.
#[derive(Clone, PartialEq, Debug)]
pub struct NamespaceScoping {
    /// Parent path of the resources.
    pub root: DirPath,
    /// Resources served to all namespaces.
    pub whole: BTreeSet<DirPath>,
}

/// Selection of served fields.
#[derive(Clone, PartialEq, Debug)]
pub struct Selection {
    /// Explicit fields.
    pub given: FieldMasks,
    /// Resources with automatic fields.
    pub follows: AutoFields,
    /// Decisions such as `authz/allow` that automatic fields are for; empty for all rules.
    pub entrypoints: Vec<DirPath>,
}

/// Resources with automatic fields.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct AutoFields {
    /// Named resources.
    pub places: BTreeSet<DirPath>,
    /// Whether unnamed resources have automatic fields.
    pub others: bool,
}

impl AutoFields {
    /// Whether no resource has automatic fields.
    pub(crate) fn is_nothing(&self) -> bool {
        self.places.is_empty() && !self.others
    }
}

impl Selection {
    /// Whether the resource at `place` has automatic fields.
    pub(crate) fn follows(&self, place: &DirPath, is_named: bool) -> bool {
        if is_named { self.follows.places.contains(place) } else { self.follows.others }
    }
}

/// Invalid document.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{0}")]
    Parse(#[from] serde_path_to_error::Error<serde_json::Error>),
    #[error("{0} is not supported; use apiVersion: {API_VERSION}, kind: Bundle")]
    Kind(String),
    #[error("{field}: {value:?} is {not}")]
    Value { field: String, value: String, not: &'static str },
    #[error("{field}: {source}")]
    Resource { field: String, source: InvalidResource },
    #[error("{field}: {source}")]
    FieldMask { field: String, source: InvalidField },
    #[error("{field}: {why}")]
    Both { field: String, why: String },
    #[error("spec: nothing selected; set policies, data, replicate or replicateAuto")]
    Nothing,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Document {
    api_version: String,
    kind: String,
    metadata: Metadata,
    spec: DocumentSpec,
    #[serde(rename = "status")]
    _status: Option<IgnoredAny>,
}

#[derive(Deserialize)]
struct Metadata {
    name: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct DocumentSpec {
    policies: Option<ConfigMaps>,
    data: Option<ConfigMaps>,
    #[serde(default)]
    replicate: Vec<Replicate>,
    replicate_auto: Option<ReplicateAuto>,
    #[serde(default = "kubernetes")]
    replicate_path: String,
    #[serde(default)]
    entrypoints: Vec<String>,
    max_bytes: Option<Value>,
    rego_version: Option<RegoVersion>,
    test_label: Option<String>,
}

fn kubernetes() -> String {
    "kubernetes".into()
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ConfigMaps {
    #[serde(default)]
    namespaces: Vec<String>,
    label_selector: Option<LabelSelector>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Replicate {
    resource: String,
    #[serde(default)]
    cluster_scoped: bool,
    #[serde(default)]
    namespaces: Vec<String>,
    #[serde(default)]
    ignore_namespaces: Vec<String>,
    #[serde(default)]
    label_selector: LabelSelector,
    #[serde(default)]
    scope: ReplicateScope,
    fields: Option<Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ReplicateAuto {
    #[serde(default)]
    ignore_namespaces: Vec<String>,
    #[serde(default)]
    scope: ReplicateScope,
    fields: Option<Value>,
}

#[derive(Deserialize, Default, PartialEq, Clone, Copy)]
enum ReplicateScope {
    #[default]
    Cluster,
    Namespace,
}

#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum RegoVersion {
    V0,
    V1,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct LabelSelector {
    #[serde(default)]
    match_labels: BTreeMap<String, String>,
    #[serde(default)]
    match_expressions: Vec<Requirement>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Requirement {
    key: String,
    operator: Operator,
    #[serde(default)]
    values: Vec<String>,
}

#[derive(Deserialize, Clone, Copy)]
enum Operator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
}

/// Explicit fields, and whether automatic fields are added.
type FieldsAndAuto = (FieldMask, bool);

impl BundleSpec {
    pub(crate) fn parse(object: &Object) -> Result<Self, Error> {
        let mut json = serde_json::Deserializer::from_slice(&object.json);
        let document: Document = serde_path_to_error::deserialize(&mut json)?;
        if document.api_version != API_VERSION || document.kind != "Bundle" {
            return Err(Error::Kind(format!("{} {}", document.api_version, document.kind)));
        }
        let Document { metadata: Metadata { name }, spec, .. } = document;
        check_text("metadata.name", &name, is_segment)?;
        let root = path("spec.replicatePath", &spec.replicate_path)?;
        let mut feeds = spec.configmap_feeds()?;
        let mut given = BTreeMap::new();
        let mut follows = AutoFields::default();
        let mut scoped = NamespaceScoping { root: root.clone(), whole: BTreeSet::new() };
        let mut is_scoped = false;
        for (index, entry) in spec.replicate.iter().enumerate() {
            let field = format!("spec.replicate[{index}]");
            let place = entry.feeds(&field, &root, &mut feeds)?;
            let (fields, is_auto) = fields(&format!("{field}.fields"), entry.fields.as_ref())?;
            given.insert(place.clone(), fields);
            if is_auto {
                follows.places.insert(place.clone());
            }
            if entry.scope == ReplicateScope::Namespace {
                is_scoped = true;
            } else {
                scoped.whole.insert(place);
            }
        }
        let mut others = FieldMask::all();
        let mut auto = None;
        if let Some(entry) = spec.replicate_auto {
            (others, follows.others) = fields("spec.replicateAuto.fields", entry.fields.as_ref())?;
            check_texts("spec.replicateAuto.ignoreNamespaces", &entry.ignore_namespaces)?;
            if is_scoped != (entry.scope == ReplicateScope::Namespace) && !spec.replicate.is_empty() {
                let why = "differs from the scope of entries in spec.replicate; use one scope, since policies may read any resource";
                return Err(Error::Both { field: "spec.replicateAuto.scope".into(), why: why.into() });
            }
            is_scoped = entry.scope == ReplicateScope::Namespace;
            auto = Some(AutoReplication { path: root, ignored: entry.ignore_namespaces });
        }
        if feeds.is_empty() && auto.is_none() {
            return Err(Error::Nothing);
        }
        let entrypoints: Vec<_> =
            (0..).zip(&spec.entrypoints).map(entrypoint_at).collect::<Result<_, _>>()?;
        if !entrypoints.is_empty() && follows.is_nothing() {
            let why = "no entry has fields: auto; set it, or remove entrypoints".into();
            return Err(Error::Both { field: "spec.entrypoints".into(), why });
        }
        if let Some(label) = &spec.test_label {
            check_text("spec.testLabel", label, is_label)?;
        }
        let dialect = match spec.rego_version {
            None => Dialect::Default,
            Some(RegoVersion::V0) => Dialect::V0,
            Some(RegoVersion::V1) => Dialect::V1,
        };
        Ok(Self {
            name,
            feeds,
            auto,
            scoped: is_scoped.then_some(scoped),
            fields: Selection { given: FieldMasks::new(given, others), follows, entrypoints },
            dialect,
            test_label: spec.test_label,
            max_bytes: spec.max_bytes.map(|value| max_bytes(&value)).transpose()?,
            limits: BundleLimits::default(),
        })
    }

    /// Specification of whole objects of these feeds.
    pub fn of_feeds(name: &str, feeds: Vec<WatchSpec>) -> Self {
        Self {
            name: name.into(),
            feeds,
            auto: None,
            scoped: None,
            fields: Selection {
                given: FieldMasks::alike(FieldMask::all()),
                follows: AutoFields::default(),
                entrypoints: Vec::new(),
            },
            dialect: Dialect::Default,
            test_label: None,
            max_bytes: None,
            limits: BundleLimits::default(),
        }
    }

    pub(crate) fn documents() -> WatchSpec {
        WatchSpec {
            resource: format!("{API_VERSION}/bundles").parse().expect("a resource"),
            scope: NamespaceSelector::ClusterScoped,
            labels: Vec::new(),
            content: Content::BundleRegistry,
        }
    }
}

impl DocumentSpec {
    fn configmap_feeds(&self) -> Result<Vec<WatchSpec>, Error> {
        let select = |configmaps: &ConfigMaps, field: &str, (label, value): (&str, &str)| {
            check_texts(&format!("spec.{field}.namespaces"), &configmaps.namespaces)?;
            let labels = match &configmaps.label_selector {
                Some(selector) => selector.terms(&format!("spec.{field}.labelSelector"))?,
                None => vec![LabelTerm { label: label.into(), is: Condition::In(vec![value.into()]) }],
            };
            Ok::<_, Error>((scopes(&configmaps.namespaces, &[]), labels))
        };
        let policies = self.policies.as_ref().map(|configmaps| select(configmaps, "policies", POLICY_LABEL));
        let data = self.data.as_ref().map(|configmaps| select(configmaps, "data", DATA_LABEL));
        let (mut policies, data) = (policies.transpose()?, data.transpose()?);
        // Data wins if both labels are set, as with flags.
        if let (Some((_, labels)), Some((_, data_labels))) = (&mut policies, &data)
            && let [LabelTerm { label, is: Condition::In(values) }] = &data_labels[..]
        {
            labels.push(LabelTerm { label: label.clone(), is: Condition::NotIn(values.clone()) });
        }
        let mut feeds = Vec::new();
        for (content, selected) in [(Content::PolicyRegistry, policies), (Content::Data, data)] {
            let Some((scopes, labels)) = selected else { continue };
            feeds.extend(configmap_feeds(&content, &labels, &scopes));
        }
        Ok(feeds)
    }
}

/// One feed for each scope.
pub(crate) fn configmap_feeds(
    content: &Content,
    labels: &[LabelTerm],
    scopes: &[NamespaceSelector],
) -> Vec<WatchSpec> {
    let feed = |scope: &NamespaceSelector| WatchSpec {
        resource: Resource::configmaps(),
        scope: scope.clone(),
        labels: labels.to_vec(),
        content: content.clone(),
    };
    scopes.iter().map(feed).collect()
}

/// Distinct `namespaces`, or all but `ignored`.
fn scopes(namespaces: &[String], ignored: &[String]) -> Vec<NamespaceSelector> {
    if namespaces.is_empty() {
        return vec![NamespaceSelector::AllExcept { ignored: ignored.to_vec() }];
    }
    let namespaces: BTreeSet<_> = namespaces.iter().collect();
    namespaces.into_iter().cloned().map(NamespaceSelector::Only).collect()
}

impl Replicate {
    /// Adds the feeds of the returned place.
    fn feeds(&self, prefix: &str, root: &DirPath, feeds: &mut Vec<WatchSpec>) -> Result<DirPath, Error> {
        let field = format!("{prefix}.resource");
        let resource: Resource =
            self.resource.parse().map_err(|source| Error::Resource { field: field.clone(), source })?;
        let place = root.join(&resource.plural).expect("a resource's name is a segment");
        if let Some(other) = feeds.iter().find(|feed| feed.place() == Some(&place)) {
            let why = format!(
                "{} is replicated to data.{} already; merge the two entries",
                other.resource,
                place.relative().replace('/', ".")
            );
            return Err(Error::Both { field, why });
        }
        check_texts(&format!("{prefix}.namespaces"), &self.namespaces)?;
        check_texts(&format!("{prefix}.ignoreNamespaces"), &self.ignore_namespaces)?;
        let names = !self.namespaces.is_empty();
        if names && !self.ignore_namespaces.is_empty()
            || self.cluster_scoped && (names || !self.ignore_namespaces.is_empty())
        {
            let why = "set only one of namespaces, ignoreNamespaces and clusterScoped".into();
            return Err(Error::Both { field: prefix.to_owned(), why });
        }
        let labels = self.label_selector.terms(&format!("{prefix}.labelSelector"))?;
        let scopes = if self.cluster_scoped {
            vec![NamespaceSelector::ClusterScoped]
        } else {
            scopes(&self.namespaces, &self.ignore_namespaces)
        };
        feeds.extend(scopes.into_iter().map(|scope| WatchSpec {
            resource: resource.clone(),
            scope,
            labels: labels.clone(),
            content: Content::Resource(place.clone()),
        }));
        Ok(place)
    }
}

impl LabelSelector {
    fn terms(&self, prefix: &str) -> Result<Vec<LabelTerm>, Error> {
        let mut terms = Vec::new();
        for (label, value) in &self.match_labels {
            check_text(&format!("{prefix}.matchLabels"), label, is_label)?;
            check_text(&format!("{prefix}.matchLabels"), value, is_label_value)?;
            terms.push(LabelTerm { label: label.clone(), is: Condition::In(vec![value.clone()]) });
        }
        for (index, Requirement { key, operator, values }) in self.match_expressions.iter().enumerate() {
            let prefix = format!("{prefix}.matchExpressions[{index}]");
            check_text(&format!("{prefix}.key"), key, is_label)?;
            for value in values {
                check_text(&format!("{prefix}.values"), value, is_label_value)?;
            }
            let takes_values = matches!(operator, Operator::In | Operator::NotIn);
            if takes_values == values.is_empty() {
                let why = "In and NotIn need values, Exists and DoesNotExist allow none".into();
                return Err(Error::Both { field: format!("{prefix}.values"), why });
            }
            let condition = match operator {
                Operator::In => Condition::In(values.clone()),
                Operator::NotIn => Condition::NotIn(values.clone()),
                Operator::Exists => Condition::Exists,
                Operator::DoesNotExist => Condition::DoesNotExist,
            };
            terms.push(LabelTerm { label: key.clone(), is: condition });
        }
        Ok(terms)
    }
}

fn fields(field: &str, value: Option<&Value>) -> Result<FieldsAndAuto, Error> {
    let paths = |paths: &[Value], is_auto| {
        let invalid = |value: &Value| Error::Value {
            field: field.into(),
            value: value.to_string(),
            not: "not a string",
        };
        let texts: Vec<_> =
            paths.iter().map(|path| path.as_str().ok_or_else(|| invalid(path))).collect::<Result<_, _>>()?;
        let fields = FieldMask::parse(texts);
        Ok((fields.map_err(|source| Error::FieldMask { field: field.into(), source })?, is_auto))
    };
    match value {
        None => Ok((FieldMask::all(), false)),
        Some(Value::String(word)) if word == "all" => Ok((FieldMask::all(), false)),
        Some(Value::String(word)) if word == "auto" => Ok((FieldMask::default(), true)),
        Some(Value::Array(list)) => paths(list, false),
        Some(Value::Object(object)) if object.len() == 1 && object.contains_key("include") => {
            paths(object["include"].as_array().map_or(&[], Vec::as_slice), true)
        }
        Some(other) => Err(Error::Value {
            field: field.into(),
            value: other.to_string(),
            not: "not valid; use all, auto, a list of paths, or {include: [paths]} for auto and these paths",
        }),
    }
}

/// Parses a decision such as `authz/allow`, `data.authz.allow` or `authz.allow`.
pub(crate) fn entrypoint(text: &str) -> Option<DirPath> {
    let names = text.trim_matches('/').replace('.', "/");
    let names = names.strip_prefix("data/").unwrap_or(&names);
    DirPath::new(names.split('/')).ok()
}

fn entrypoint_at((index, text): (usize, &String)) -> Result<DirPath, Error> {
    let not = "not a decision; write package and rule, e.g. authz/allow";
    let field = format!("spec.entrypoints[{index}]");
    entrypoint(text).ok_or_else(|| Error::Value { field, value: text.clone(), not })
}

/// Parses bytes with an optional Kubernetes suffix.
pub(crate) fn bytes(text: &str) -> Option<usize> {
    const SUFFIXES: [(&str, usize); 6] = [
        ("Ki", 1 << 10),
        ("Mi", 1 << 20),
        ("Gi", 1 << 30),
        ("k", 1_000),
        ("M", 1_000_000),
        ("G", 1_000_000_000),
    ];
    let (number, unit) = SUFFIXES
        .iter()
        .find_map(|(suffix, unit)| Some((text.strip_suffix(suffix)?, *unit)))
        .unwrap_or((text, 1));
    number.parse::<usize>().ok()?.checked_mul(unit).filter(|bytes| *bytes > 0)
}

fn max_bytes(value: &Value) -> Result<usize, Error> {
    let text = value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned);
    let not = "not a number of bytes; write e.g. 67108864 or 64Mi";
    bytes(&text).ok_or_else(|| Error::Value { field: "spec.maxBytes".into(), value: text, not })
}

fn path(field: &str, text: &str) -> Result<DirPath, Error> {
    let not = "not a path; write segments of letters, digits, '.', '_' and '-', separated by '/'";
    let value = |not| Error::Value { field: field.into(), value: text.into(), not };
    let path = DirPath::new(text.trim_matches('/').split('/')).map_err(|_| value(not))?;
    if is_reserved(&path) { Err(value("reserved for OPA or opa-hub; choose another path")) } else { Ok(path) }
}

/// Whether OPA or opa-hub stores own data there.
pub(crate) fn is_reserved(path: &DirPath) -> bool {
    matches!(path.relative().split('/').next(), Some("system" | "opahub"))
}

fn check_text(field: &str, value: &str, valid: impl Fn(&str) -> bool) -> Result<(), Error> {
    let not = "not valid";
    if valid(value) { Ok(()) } else { Err(Error::Value { field: field.into(), value: value.into(), not }) }
}

fn check_texts(field: &str, values: &[String]) -> Result<(), Error> {
    values.iter().try_for_each(|value| check_text(field, value, is_segment))
}

pub(crate) fn is_label(label: &str) -> bool {
    label.split('/').count() <= 2 && label.split('/').all(is_segment)
}

pub(crate) fn is_label_value(value: &str) -> bool {
    value.is_empty() || is_segment(value)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(spec: &Value) -> Result<BundleSpec, Error> {
        let json = json!({ "apiVersion": API_VERSION, "kind": "Bundle", "metadata": { "name": "b", "uid": "1" }, "spec": spec });
        let key = crate::model::ObjectKey { namespace: "".into(), name: "b".into() };
        BundleSpec::parse(&Object { key, json: json.to_string().into() })
    }

    fn check(spec: &Value, expected: &[&str]) {
        let found = match parse(spec) {
            Err(error) => vec![error.to_string()],
            Ok(spec) => {
                let feed = |feed: &WatchSpec| {
                    format!("{feed} [{}] [{}]", feed.label_selector(), feed.field_selector())
                };
                spec.feeds.iter().map(feed).collect()
            }
        };
        assert_eq!(found.len(), expected.len(), "{spec}: {found:?}");
        for (found, expected) in found.iter().zip(expected) {
            assert!(found.contains(expected), "{spec}: {found}");
        }
    }

    #[test]
    fn documents_select_feeds_and_fields() {
        let policies =
            "policies (v1/configmaps) [openpolicyagent.org/policy=rego,openpolicyagent.org/data!=opa] []";
        check(
            &json!({ "policies": {}, "data": {} }),
            &[policies, "data (v1/configmaps) [openpolicyagent.org/data=opa]"],
        );
        check(
            &json!({ "policies": { "namespaces": ["a", "b", "a"], "labelSelector": {
                "matchLabels": { "x": "y" },
                "matchExpressions": [
                    { "key": "team", "operator": "In", "values": ["p", "q"] }, { "key": "old", "operator": "DoesNotExist" },
                ],
            } } }),
            &[
                "policies (v1/configmaps in a with x=y,team in (p,q),!old) [x=y,team in (p,q),!old]",
                "policies (v1/configmaps in b with x=y,",
            ],
        );
        check(
            &json!({ "replicate": [
                { "resource": "v1/pods", "ignoreNamespaces": ["kube-system"], "labelSelector": { "matchLabels": { "a": "b" } } },
                { "resource": "v1/nodes", "clusterScoped": true },
                { "resource": "apps/v1/deployments", "namespaces": ["x", "y"] },
            ] }),
            &[
                "v1/pods outside kube-system with a=b [a=b] [metadata.namespace!=kube-system]",
                "v1/nodes",
                "deployments in x",
                "deployments in y",
            ],
        );
        let spec = parse(&json!({
            "replicate": [
                { "resource": "v1/pods", "fields": { "include": ["metadata.labels"] }, "scope": "Namespace" },
                { "resource": "v1/nodes", "clusterScoped": true, "fields": ["metadata.name"] },
            ],
            "entrypoints": ["data.authz.allow"], "maxBytes": "64Mi", "regoVersion": "v0",
        }))
        .unwrap();
        let pods: DirPath = "/kubernetes/pods".parse().unwrap();
        assert_eq!(spec.fields.entrypoints, ["/authz/allow".parse().unwrap()]);
        assert!(
            spec.fields.follows(&pods, true)
                && !spec.fields.follows(&"/kubernetes/nodes".parse().unwrap(), true)
        );
        assert_eq!(spec.fields.given.of(&pods), &FieldMask::parse(["metadata.labels"]).unwrap());
        assert_eq!((spec.max_bytes, spec.dialect), (Some(64 << 20), Dialect::V0));
        assert_eq!(spec.scoped.unwrap().whole, BTreeSet::from(["/kubernetes/nodes".parse().unwrap()]));
    }

    #[test]
    fn documented_example_parses() {
        let docs = include_str!("../../../docs/bundles.md");
        let (_, yaml) = docs.split_once("```yaml\n").unwrap();
        let (yaml, _) = yaml.split_once("```").unwrap();
        let document: Value = serde_saphyr::from_str(yaml).unwrap();
        check(
            &document["spec"],
            &[
                "policies (v1/configmaps in shop-policies)",
                "data (v1/configmaps with",
                "v1/pods outside kube-system",
                "ingresses in shop with tier in (front,edge)",
                "ingresses in shop-staging",
                "v1/nodes",
            ],
        );
    }

    #[test]
    fn errors_name_the_field() {
        for (spec, expected) in [
            (json!({}), "nothing selected"),
            (json!({ "policy": {} }), "spec.policy: unknown field `policy`"),
            (json!({ "policies": { "namespaces": "a" } }), "spec.policies.namespaces: invalid type"),
            (
                json!({ "policies": { "namespaces": ["a b"] } }),
                "spec.policies.namespaces: \"a b\" is not valid",
            ),
            (
                json!({ "replicate": [{ "resource": "pods" }] }),
                "spec.replicate[0].resource: \"pods\" names no resource",
            ),
            (
                json!({ "replicate": [{ "resource": "v1/pods", "scope": "Pod" }] }),
                "spec.replicate[0].scope: unknown variant",
            ),
            (
                json!({ "replicate": [{ "resource": "v1/pods", "fields": "some" }] }),
                "spec.replicate[0].fields: \"\\\"some\\\"\" is not valid; use all",
            ),
            (
                json!({ "replicate": [{ "resource": "v1/pods", "fields": ["a..b"] }] }),
                "spec.replicate[0].fields: \"a..b\" names no field",
            ),
            (
                json!({ "replicate": [{ "resource": "v1/pods" }, { "resource": "x/v1/pods" }] }),
                "spec.replicate[1].resource: v1/pods is replicated to data.kubernetes.pods",
            ),
            (
                json!({ "replicate": [{ "resource": "v1/pods", "namespaces": ["a"], "ignoreNamespaces": ["b"] }] }),
                "spec.replicate[0]: set only one of namespaces",
            ),
            (
                json!({ "data": { "labelSelector": { "matchExpressions": [{ "key": "a", "operator": "In" }] } } }),
                "spec.data.labelSelector.matchExpressions[0].values: In and NotIn",
            ),
            (json!({ "data": {}, "entrypoints": ["a/b"] }), "spec.entrypoints: no entry has"),
            (json!({ "data": {}, "maxBytes": "64MB" }), "spec.maxBytes: \"64MB\" is not a number of bytes"),
            (json!({ "data": {}, "maxBytes": -1 }), "spec.maxBytes"),
        ] {
            check(&spec, &[expected]);
        }
    }
}
