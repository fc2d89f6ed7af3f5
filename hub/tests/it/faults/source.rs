//! The API server of the fault test: current objects, their history, and the content that a hub may serve.

use std::collections::BTreeMap;
use std::sync::Arc;

use fastrand::Rng;
use opa_hub::model::ObjectKey;
use serde_json::{Value, json};

use super::reads::{READABLE, READS};

/// Comment that the fake compiler rejects.
pub(super) const WRONG: &str = "# wrong";
/// Maximum age of a backup, in changes.
const BACKUP_AGE_MAX: u64 = 30;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Kind {
    PolicyRegistry,
    Data,
    Pods,
    Nodes,
    /// Replicated if policies read them.
    Services,
    /// Replicated if policies read them; at times unknown to the server.
    Jobs,
}

/// Object content; `None` if removed.
pub(super) type Content = Option<Arc<Value>>;

/// Namespace and name of a permanent service.
pub(super) const ALWAYS: [&str; 2] = ["ns0", "always"];

#[derive(Default)]
pub(super) struct Source {
    version: u64,
    has_no_jobs: bool,
    /// Number of restores. Versions of different epochs are not comparable.
    pub(super) epoch: usize,
    /// Changed objects by version.
    changes: BTreeMap<Kind, Vec<(u64, ObjectKey)>>,
    /// History of each object by version.
    objects: BTreeMap<Kind, BTreeMap<ObjectKey, Vec<(u64, Content)>>>,
    /// All good contents of each object, in any epoch.
    good: BTreeMap<(Kind, ObjectKey), Vec<Arc<Value>>>,
    last: Option<(Kind, ObjectKey)>,
}

impl Kind {
    pub(super) const ALL: [Self; 6] =
        [Self::PolicyRegistry, Self::Data, Self::Pods, Self::Nodes, Self::Services, Self::Jobs];
    pub(super) const AUTO: [Self; 2] = [Self::Services, Self::Jobs];

    pub(super) fn plural(self) -> &'static str {
        match self {
            Self::PolicyRegistry => "policies",
            Self::Data => "data",
            Self::Pods => "pods",
            Self::Nodes => "nodes",
            Self::Services => "services",
            Self::Jobs => "jobs",
        }
    }

    pub(super) fn of(plural: &str) -> Self {
        let found = Self::ALL.into_iter().find(|kind| kind.plural() == plural);
        found.unwrap_or_else(|| panic!("unknown resource {plural}"))
    }

    pub(super) fn position_name(self) -> &'static str {
        match self {
            Self::PolicyRegistry => "policies",
            Self::Data => "data",
            Self::Pods => "/kubernetes/pods",
            Self::Nodes => "/kubernetes/nodes",
            Self::Services => "/kubernetes/services",
            Self::Jobs => "/kubernetes/jobs",
        }
    }

    /// Whether replicated and namespaced.
    pub(super) fn is_scoped(self) -> bool {
        !matches!(self, Self::PolicyRegistry | Self::Data | Self::Nodes)
    }
}

impl Source {
    pub(super) fn new() -> Self {
        let mut source = Self::default();
        let [namespace, name] = ALWAYS.map(Into::into);
        source.put(Kind::Services, ObjectKey { namespace, name }, Some(Arc::new(json!({ "kind": "x" }))));
        source
    }

    pub(super) fn serves(&self, kind: Kind) -> bool {
        kind != Kind::Jobs || !self.has_no_jobs
    }

    pub(super) fn version(&self) -> u64 {
        self.version
    }

    /// Last contents of an object, for failure messages.
    pub(super) fn history(&self, kind: Kind, key: &ObjectKey) -> String {
        let history = &self.objects[&kind][key];
        format!("{:?}", &history[history.len().saturating_sub(4)..])
    }

    pub(super) fn objects_at(&self, kind: Kind, version: u64) -> Vec<(&ObjectKey, &Arc<Value>)> {
        let objects = self.objects.get(&kind).into_iter().flatten();
        objects.filter_map(|(key, history)| Some((key, content_at(history, version)?))).collect()
    }

    /// Changes after `version`, with their results.
    pub(super) fn since(&self, kind: Kind, version: u64) -> Vec<(u64, &ObjectKey, Option<&Arc<Value>>)> {
        let changes = self.changes.get(&kind).map(Vec::as_slice).unwrap_or_default();
        let new = &changes[changes.partition_point(|(changed_at, _)| *changed_at <= version)..];
        new.iter()
            .map(|(changed_at, key)| (*changed_at, key, content_at(&self.objects[&kind][key], *changed_at)))
            .collect()
    }

    /// Content that may be served at `version`: the object, or any good content if rejected.
    pub(super) fn allowed(&self, kind: Kind, version: u64) -> BTreeMap<&ObjectKey, Vec<Content>> {
        let mut allowed = BTreeMap::new();
        for (key, value) in self.objects_at(kind, version) {
            let contents: Vec<Content> = if is_good(kind, value) {
                vec![Some(Arc::clone(value))]
            } else {
                let good = self.good.get(&(kind, key.clone())).into_iter().flatten();
                good.cloned().map(Some).chain([None]).collect()
            };
            allowed.insert(key, contents);
        }
        allowed
    }

    /// Whether `unit` was good content of the object at any time.
    pub(super) fn was(&self, kind: Kind, key: &ObjectKey, unit: &Value) -> bool {
        let mut good = self.good.get(&(kind, key.clone())).into_iter().flatten();
        good.any(|value| served(kind, value) == *unit)
    }

    pub(super) fn is_good(&self) -> bool {
        Kind::ALL
            .into_iter()
            .all(|kind| self.objects_at(kind, self.version).iter().all(|(_, value)| is_good(kind, value)))
    }

    fn put(&mut self, kind: Kind, key: ObjectKey, content: Content) {
        self.version += 1;
        if let Some(value) = content.as_ref().filter(|value| is_good(kind, value)) {
            self.good.entry((kind, key.clone())).or_default().push(Arc::clone(value));
        }
        self.changes.entry(kind).or_default().push((self.version, key.clone()));
        let history = self.objects.entry(kind).or_default().entry(key).or_default();
        history.push((self.version, content));
    }

    pub(super) fn change(&mut self, rng: &mut Rng) {
        // Restores earlier content.
        let last = self.last.clone().filter(|(kind, _)| self.serves(*kind));
        if let (Some((kind, key)), 0..90) = (last, rng.u8(..)) {
            let history = &self.objects[&kind][&key];
            let before = history.len().checked_sub(2).and_then(|index| history[index].1.clone());
            return self.put(kind, key, before);
        }
        let (kind, names) = match rng.u8(..12) {
            0..2 => (Kind::PolicyRegistry, 4),
            2..5 => (Kind::Data, 5),
            5..9 => (Kind::Pods, 8),
            9 => (Kind::Nodes, 6),
            10 => (Kind::Services, 4),
            _ => (Kind::Jobs, 4),
        };
        if !self.serves(kind) {
            return;
        }
        let (namespace, name) = (rng.u8(..3), rng.u8(..names));
        let content = rng.bool().then(|| match kind {
            Kind::PolicyRegistry => policies(name, rng),
            Kind::Data => data(rng),
            _ => object(rng),
        });
        let key = key(kind, namespace, name);
        self.last = Some((kind, key.clone()));
        self.put(kind, key, content.map(Arc::new));
    }

    /// Adds or removes the jobs resource with all its objects.
    pub(super) fn toggle_jobs(&mut self) {
        self.has_no_jobs = !self.has_no_jobs;
        self.remove_all(Kind::Jobs);
    }

    fn remove_all(&mut self, kind: Kind) {
        let all = self.objects_at(kind, self.version).into_iter().map(|(key, _)| key.clone());
        for key in all.collect::<Vec<_>>() {
            self.put(kind, key, None);
        }
    }

    /// Adds or removes data at the path of jobs.
    pub(super) fn toggle_place_of_jobs(&mut self) {
        let key = place_of_jobs();
        let is_there = self.objects_at(Kind::Data, self.version).iter().any(|(other, _)| **other == key);
        let data = json!({ "data": { "k0": "{\"x\": 1}" } });
        self.put(Kind::Data, key, (!is_there).then(|| Arc::new(data)));
    }

    /// Serves all resources, without path conflicts.
    pub(super) fn end_faults(&mut self) {
        self.has_no_jobs = false;
        self.put(Kind::Data, place_of_jobs(), None);
    }

    /// Users fix rejected objects.
    pub(super) fn fix_rejected(&mut self) {
        for kind in Kind::ALL {
            let all = self.objects_at(kind, self.version).into_iter();
            let refused = all.filter(|(_, value)| !is_good(kind, value)).map(|(key, _)| key.clone());
            for key in refused.collect::<Vec<_>>() {
                self.put(kind, key, None);
            }
        }
    }

    pub(super) fn restore(&mut self, rng: &mut Rng) {
        let version = self.version.saturating_sub(rng.u64(1..=BACKUP_AGE_MAX)).max(1);
        for changes in self.changes.values_mut() {
            changes.retain(|(changed_at, _)| *changed_at <= version);
        }
        for history in self.objects.values_mut().flat_map(BTreeMap::values_mut) {
            history.retain(|(changed_at, _)| *changed_at <= version);
        }
        (self.version, self.last) = (version, None);
        self.epoch += 1;
        if self.has_no_jobs {
            self.remove_all(Kind::Jobs);
        }
    }
}

/// Data at the path of jobs.
pub(super) fn place_of_jobs() -> ObjectKey {
    ObjectKey { namespace: "kubernetes".into(), name: "jobs".into() }
}

fn content_at(history: &[(u64, Content)], version: u64) -> Option<&Arc<Value>> {
    let end = history.partition_point(|(changed_at, _)| *changed_at <= version);
    history[..end].last()?.1.as_ref()
}

fn key(kind: Kind, namespace: u8, name: u8) -> ObjectKey {
    let odd = if kind.is_scoped() || kind == Kind::Nodes { "~/%" } else { "" };
    let namespace = if kind == Kind::Nodes { String::new() } else { format!("ns{namespace}") };
    ObjectKey { namespace: namespace.into(), name: format!("o{name}{odd}").into() }
}

/// Random modules. One in eight ConfigMaps is rejected by the compiler or parser.
fn policies(name: u8, rng: &mut Rng) -> Value {
    let mut texts = BTreeMap::new();
    for index in 0..rng.u8(1..4) {
        texts.insert(format!("k{index}"), format!("package p{name}.q{index}\nx := {}", rng.u8(..3)));
    }
    if let Some(text) = texts.get_mut("k0").filter(|_| rng.bool()) {
        let line = READABLE[rng.usize(..READABLE.len())];
        *text = text.replace('\n', &format!("\n{READS}{line}\n"));
    }
    match rng.u8(..16) {
        0 => _ = texts.insert("k0".into(), format!("package p{name}.q0\n{WRONG}")),
        1 => _ = texts.insert("k0".into(), "package".into()),
        _ => {}
    }
    json!({ "data": texts })
}

/// Random entries. One in sixteen ConfigMaps is rejected.
fn data(rng: &mut Rng) -> Value {
    let mut texts = BTreeMap::new();
    for index in 0..rng.u8(1..4) {
        texts.insert(format!("k{index}"), format!("{{\"x\": {}}}", rng.u8(..3)));
    }
    if rng.u8(..16) == 0 {
        texts.insert("k0".into(), "[]".into());
    }
    json!({ "data": texts })
}

/// One object in eight is large; three in eight qualify for edits.
fn object(rng: &mut Rng) -> Value {
    let padding = match rng.u8(..8) {
        0 => rng.usize(..600),
        1..=3 => 300,
        _ => 0,
    };
    let mut labels = json!({ "app": rng.u8(..3), "tier": rng.u8(..3) });
    if rng.bool() {
        // Present at times.
        labels["flag"] = Value::Null;
    }
    json!({
        "kind": "x",
        "metadata": { "labels": labels },
        "padding": "x".repeat(padding),
        "round": rng.u16(..),
        "spec": { "image": rng.u8(..3), "size": { "cpu": rng.u8(..3) } },
        "text": "~1/%\n",
    })
}

fn texts(value: &Value) -> impl Iterator<Item = (&String, &str)> {
    let texts = value["data"].as_object().unwrap();
    texts.iter().map(|(file, text)| (file, text.as_str().unwrap()))
}

/// Whether a hub accepts the object, considered alone.
fn is_good(kind: Kind, value: &Value) -> bool {
    match kind {
        Kind::PolicyRegistry => {
            texts(value).all(|(_, text)| text.starts_with("package ") && !text.contains(WRONG))
        }
        Kind::Data => texts(value).all(|(_, text)| text.starts_with('{')),
        _ => true,
    }
}

/// Served content of an accepted object.
pub(super) fn served(kind: Kind, value: &Value) -> Value {
    match kind {
        Kind::PolicyRegistry => value["data"].clone(),
        Kind::Data => {
            let entries = texts(value).map(|(file, text)| (file.clone(), text.parse().unwrap()));
            Value::Object(entries.collect())
        }
        _ => value.clone(),
    }
}
