//! What an object means to the bundle: a replicated object is one entry, a ConfigMap of data one directory, a
//! ConfigMap of policies its modules. A ConfigMap is accepted whole or not at all; refused, its last good content
//! stays. The layout is kube-mgmt's.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use opa_hub_proto::head::{ENTRY_BYTES_MAX, MODULES_BYTES_MAX};
use opa_hub_proto::path::{DirPath, is_segment};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::view::Batch;
use crate::config::{DIRECTORIES_MAX, JSON_DEPTH_MAX, PROBLEMS_MAX};
use crate::model::{Change, Content, Feed, FeedId, Object, ObjectKey, Problem};
use crate::policy::modules::{self, Module};
use crate::source::trim;

/// Why an object is refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
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
    /// More places than the head of an archive may list.
    #[error("the bundle already has {DIRECTORIES_MAX} directories")]
    TooManyDirectories,
}

/// Turns changes of objects into changes of a view.
pub struct Projection {
    feeds: Vec<Feed>,
    /// What of an object is in the view.
    accepted: HashMap<ObjectId, Accepted>,
    /// Entries by directory, with the ConfigMap that the directory belongs to.
    dirs: BTreeMap<DirPath, Place>,
    /// Modules by what their packages own.
    roots: BTreeMap<DirPath, usize>,
    /// Bytes of all modules.
    modules_bytes: usize,
    refused: BTreeMap<ObjectId, Refused>,
}

type ObjectId = (FeedId, ObjectKey);

#[derive(Default)]
struct Accepted {
    /// Keys of a ConfigMap of data, ids of modules.
    names: Vec<String>,
    /// What each module owns.
    roots: Vec<DirPath>,
    /// Bytes of the modules.
    bytes: usize,
}

struct Place {
    entries: usize,
    /// Whether a ConfigMap lies here, not a replicated resource.
    is_configmap: bool,
}

struct Refused {
    problem: Problem,
    /// What may be taken once something else goes.
    retry: Option<Object>,
}

#[derive(Deserialize)]
struct ConfigMap {
    data: Option<BTreeMap<String, String>>,
}

impl Projection {
    /// With nothing accepted yet.
    pub fn new(feeds: Vec<Feed>) -> Self {
        Self {
            feeds,
            accepted: HashMap::new(),
            dirs: BTreeMap::new(),
            roots: BTreeMap::new(),
            modules_bytes: 0,
            refused: BTreeMap::new(),
        }
    }

    /// What is refused now, the first [`PROBLEMS_MAX`] of it, in a stable order.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> + Clone {
        self.refused.values().map(|refused| &refused.problem).take(PROBLEMS_MAX)
    }

    /// Adds to `batch` what `change` does to the view. What was refused for want of a place is tried again when one
    /// may have become free.
    pub fn apply(&mut self, change: Change, batch: &mut Batch) {
        let owned = (self.dirs.len(), self.roots.len(), self.modules_bytes);
        self.take(change, batch);
        if self.dirs.len() < owned.0 || self.roots.len() < owned.1 || self.modules_bytes < owned.2 {
            let again =
                self.refused.iter().filter_map(|((feed, _), refused)| Some((*feed, refused.retry.clone()?)));
            for (feed, object) in again.collect::<Vec<_>>() {
                self.take(Change::Put(feed, object), batch);
            }
        }
    }

    fn take(&mut self, change: Change, batch: &mut Batch) {
        let (id, object) = match change {
            Change::Put(feed, object) => ((feed, object.key.clone()), Some(object)),
            Change::Remove(feed, key) => ((feed, key), None),
        };
        if object.is_none() && !self.accepted.contains_key(&id) {
            self.refused.remove(&id);
            return;
        }
        let content = self.feeds[id.0.0].content.clone();
        let result = match &content {
            Content::Resource(prefix) => self.resource(&id, prefix, object.as_ref(), batch),
            Content::Data => self.data(&id, object.as_ref(), batch),
            Content::Policies => self.policies(&id, object.as_ref(), batch),
        };
        match result {
            Ok(()) => _ = self.refused.remove(&id),
            Err(error) => {
                let kind = match content {
                    Content::Resource(_) => self.feeds[id.0.0].resource.to_string(),
                    _ => "ConfigMap".into(),
                };
                let problem = Problem { subject: format!("{kind} {}", id.1), message: error.to_string() };
                tracing::warn!(subject = problem.subject, error = problem.message, "refused");
                let retry = object.filter(|_| {
                    matches!(error, Error::Taken { .. } | Error::TooManyDirectories | Error::TooLarge { .. })
                });
                self.refused.insert(id, Refused { problem, retry });
            }
        }
    }

    fn resource(
        &mut self,
        id: &ObjectId,
        prefix: &DirPath,
        object: Option<&Object>,
        batch: &mut Batch,
    ) -> Result<(), Error> {
        let key = &id.1;
        let dir = match &*key.namespace {
            "" => prefix.clone(),
            namespace => prefix.join(namespace).map_err(|_| Error::Name(namespace.into()))?,
        };
        let Some(object) = object else {
            self.accepted.remove(id);
            self.leave(&dir);
            batch.entry(&dir, &key.name, None);
            return Ok(());
        };
        check_entry(&key.name, object.json.len())?;
        if !self.accepted.contains_key(id) {
            self.enter(&dir, false)?;
            self.accepted.insert(id.clone(), Accepted::default());
        }
        batch.entry(&dir, &key.name, Some(object.json.clone()));
        Ok(())
    }

    fn data(&mut self, id: &ObjectId, object: Option<&Object>, batch: &mut Batch) -> Result<(), Error> {
        let dir = DirPath::new([&*id.1.namespace, &*id.1.name]).map_err(|_| Error::Name(id.1.to_string()))?;
        let mut values = BTreeMap::new();
        for (key, text) in object.map(texts).transpose()?.unwrap_or_default() {
            let value = data_value(&key, &text)?;
            check_entry(&key, value.len())?;
            values.insert(key, value);
        }
        if !values.is_empty() && !self.accepted.contains_key(id) {
            self.check_place(&dir)?;
            self.enter(&dir, true)?;
        }
        let names = values.keys().cloned().collect();
        let old = if values.is_empty() {
            self.accepted.remove(id).inspect(|_| self.leave(&dir))
        } else {
            self.accepted.insert(id.clone(), Accepted { names, ..Accepted::default() })
        };
        for gone in old.into_iter().flat_map(|old| old.names).filter(|key| !values.contains_key(key)) {
            batch.entry(&dir, &gone, None);
        }
        for (key, value) in values {
            batch.entry(&dir, &key, Some(value));
        }
        Ok(())
    }

    fn policies(&mut self, id: &ObjectId, object: Option<&Object>, batch: &mut Batch) -> Result<(), Error> {
        let key = &id.1;
        if !is_segment(&key.namespace) || !is_segment(&key.name) {
            return Err(Error::Name(key.to_string()));
        }
        let mut parsed: BTreeMap<String, Arc<Module>> = BTreeMap::new();
        for (name, text) in object.map(texts).transpose()?.unwrap_or_default() {
            let module_id = format!("{key}/{name}");
            let module =
                modules::parse(&module_id, &text).map_err(|source| Error::Module { key: name, source })?;
            self.check_root(&module.root)?;
            parsed.insert(module_id, Arc::new(module));
        }
        let new = Accepted {
            names: parsed.keys().cloned().collect(),
            roots: parsed.values().map(|module| module.root.clone()).collect(),
            bytes: parsed.values().map(|module| module.text.len()).sum(),
        };
        let bytes = self.modules_bytes + new.bytes - self.accepted.get(id).map_or(0, |old| old.bytes);
        if bytes > MODULES_BYTES_MAX {
            return Err(Error::TooLarge {
                what: "the bundle with it".into(),
                bytes,
                max: MODULES_BYTES_MAX,
                whose: "all modules together",
            });
        }
        self.modules_bytes = bytes;
        for root in &new.roots {
            *self.roots.entry(root.clone()).or_default() += 1;
        }
        let old = match object {
            None => self.accepted.remove(id),
            Some(_) => self.accepted.insert(id.clone(), new),
        };
        let old = old.unwrap_or_default();
        for root in &old.roots {
            self.roots.entry(root.clone()).and_modify(|count| *count -= 1);
        }
        self.roots.retain(|_, count| *count > 0);
        for gone in old.names.into_iter().filter(|id| !parsed.contains_key(id)) {
            batch.modules.insert(gone, None);
        }
        batch.modules.extend(parsed.into_iter().map(|(id, module)| (id, Some(module))));
        Ok(())
    }

    /// Whether data of a ConfigMap may lie at `dir`.
    fn check_place(&self, dir: &DirPath) -> Result<(), Error> {
        let roots =
            self.roots.keys().map(|root| (root, format!("package {}", root.relative().replace('/', "."))));
        check_disjoint(dir, self.replicated().chain(reserved([&OPAHUB, &SYSTEM])).chain(roots))
    }

    /// Whether a package may own `root`: nothing that data lies in, above or below. `package system` is OPA's own
    /// entry point, and is let pass beside the marker: as modules, not as a bundle.
    fn check_root(&self, root: &DirPath) -> Result<(), Error> {
        let configmaps = self.dirs.iter().filter(|(_, place)| place.is_configmap);
        let configmaps = configmaps.map(|(dir, _)| (dir, format!("ConfigMap {}", dir.relative())));
        let reserved = reserved([&OPAHUB, &MARKERS]).filter(|_| root.as_str() != "/system");
        check_disjoint(root, self.replicated().chain(reserved).chain(configmaps))
    }

    fn replicated(&self) -> impl Iterator<Item = (&DirPath, String)> {
        self.feeds.iter().filter_map(|feed| match &feed.content {
            Content::Resource(prefix) => Some((prefix, format!("--replicate {}", feed.resource))),
            _ => None,
        })
    }

    fn enter(&mut self, dir: &DirPath, is_configmap: bool) -> Result<(), Error> {
        if self.dirs.len() >= DIRECTORIES_MAX && !self.dirs.contains_key(dir) {
            return Err(Error::TooManyDirectories);
        }
        self.dirs.entry(dir.clone()).or_insert(Place { entries: 0, is_configmap }).entries += 1;
        Ok(())
    }

    fn leave(&mut self, dir: &DirPath) {
        if let Some(place) = self.dirs.get_mut(dir) {
            place.entries -= 1;
            if place.entries == 0 {
                self.dirs.remove(dir);
            }
        }
    }
}

/// Where agents keep their state in OPA.
static MARKERS: LazyLock<DirPath> = LazyLock::new(|| "/system/opahub".parse().expect("a path"));
/// What OPA keeps of itself below data, bundles among it.
static SYSTEM: LazyLock<DirPath> = LazyLock::new(|| "/system".parse().expect("a path"));
/// What the bundles own that own nothing of use.
static OPAHUB: LazyLock<DirPath> = LazyLock::new(|| "/opahub".parse().expect("a path"));

fn reserved<'a, const N: usize>(
    places: [&'static LazyLock<DirPath>; N],
) -> impl Iterator<Item = (&'a DirPath, String)> {
    places.into_iter().map(|place| (&**place, "opa-hub or OPA itself".to_owned()))
}

fn check_disjoint<'a>(
    place: &DirPath,
    mut owners: impl Iterator<Item = (&'a DirPath, String)>,
) -> Result<(), Error> {
    match owners.find(|(other, _)| place.is_within(other) || other.is_within(place)) {
        None => Ok(()),
        Some((_, owner)) => Err(Error::Taken { place: place.clone(), owner }),
    }
}

fn check_entry(name: &str, bytes: usize) -> Result<(), Error> {
    if bytes <= ENTRY_BYTES_MAX {
        return Ok(());
    }
    Err(Error::TooLarge { what: name.to_owned(), bytes, max: ENTRY_BYTES_MAX, whose: "one entry" })
}

fn texts(object: &Object) -> Result<BTreeMap<String, String>, Error> {
    let map: ConfigMap = serde_json::from_slice(&object.json).map_err(Error::NotAConfigMap)?;
    let texts = map.data.unwrap_or_default();
    match texts.keys().find(|key| !is_segment(key)) {
        Some(bad) => Err(Error::Name(bad.clone())),
        None => Ok(texts),
    }
}

fn data_value(key: &str, text: &str) -> Result<Bytes, Error> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Resource, Scope};

    fn feed(content: Content) -> Feed {
        let scope = Scope::Namespaces { ignored: Vec::new() };
        Feed { resource: Resource::configmaps(), scope, labels: Vec::new(), content }
    }

    fn projection() -> Projection {
        let pods = "/kubernetes/pods".parse().unwrap();
        Projection::new(vec![feed(Content::Policies), feed(Content::Data), feed(Content::Resource(pods))])
    }

    /// Applies a ConfigMap (`None`: its removal) and compares the batch, in words, and the refusals.
    fn check(
        projection: &mut Projection,
        feed: usize,
        name: &str,
        data: Option<&[(&str, &str)]>,
        expected: &[&str],
        refused: &[&str],
    ) {
        let (namespace, name) = name.split_once('/').unwrap();
        let key = ObjectKey { namespace: namespace.into(), name: name.into() };
        let change = match data {
            None => Change::Remove(FeedId(feed), key),
            Some(data) => {
                let data: BTreeMap<_, _> = data.iter().copied().collect();
                let json = serde_json::json!({ "data": data }).to_string();
                Change::Put(FeedId(feed), Object { key, json: json.into() })
            }
        };
        let mut batch = Batch::default();
        projection.apply(change, &mut batch);
        let sign = |some: bool| if some { '+' } else { '-' };
        let entries = batch.dirs.iter().flat_map(|(dir, keys)| {
            keys.iter().map(move |(key, value)| format!("{}{dir}/{key}", sign(value.is_some())))
        });
        let modules = batch.modules.iter().map(|(id, module)| format!("{}{id}", sign(module.is_some())));
        assert_eq!(entries.chain(modules).collect::<Vec<_>>(), expected);
        let problems: Vec<_> = projection.problems().collect();
        assert_eq!(problems.len(), refused.len(), "{problems:?}");
        for (problem, part) in problems.iter().zip(refused) {
            assert!(format!("{} {}", problem.subject, problem.message).contains(part), "{problem:?}");
        }
    }

    #[test]
    fn data_is_taken_whole_or_not_at_all() {
        let p = &mut projection();
        check(p, 1, "a/m", Some(&[("x", "{}"), ("y", r#"{"a": 1}"#)]), &["+/a/m/x", "+/a/m/y"], &[]);
        check(p, 1, "a/m", Some(&[("x", "{}"), ("y", "{")]), &[], &["ConfigMap a/m key y is not JSON"]);
        check(p, 1, "a/m", Some(&[("x", "[1]")]), &[], &["key x is not a JSON object"]);
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(1000), "]".repeat(1000));
        check(p, 1, "a/m", Some(&[("x", &deep)]), &[], &["nested deeper"]);
        check(p, 1, "a/m", Some(&[("x", "{}"), ("z", "{}")]), &["+/a/m/x", "-/a/m/y", "+/a/m/z"], &[]);
        check(p, 1, "a/m", None, &["-/a/m/x", "-/a/m/z"], &[]);
    }

    #[test]
    fn data_stays_clear_of_what_is_replicated() {
        let p = &mut projection();
        check(
            p,
            1,
            "kubernetes/pods",
            Some(&[("x", "{}")]),
            &[],
            &["--replicate v1/configmaps owns already"],
        );
        check(
            p,
            1,
            "kubernetes/other",
            Some(&[("x", "{}")]),
            &["+/kubernetes/other/x"],
            &["/kubernetes/pods"],
        );
        check(p, 1, "kubernetes/pods", None, &[], &[]);
        check(p, 2, "kubernetes/pods", Some(&[]), &["+/kubernetes/pods/kubernetes/pods"], &[]);
    }

    #[test]
    fn policies_are_taken_whole_or_not_at_all() {
        let p = &mut projection();
        check(p, 0, "a/m", Some(&[("x.rego", "package x")]), &["+a/m/x.rego"], &[]);
        let two = [("x.rego", "package x\np := 1"), ("y.rego", "package")];
        check(p, 0, "a/m", Some(&two), &[], &["ConfigMap a/m key y.rego is not a Rego module"]);
        check(p, 0, "a/m", Some(&[("y.rego", "package y")]), &["-a/m/x.rego", "+a/m/y.rego"], &[]);
        check(p, 0, "a/m", None, &["-a/m/y.rego"], &[]);
        check(p, 0, "a/m", Some(&[("x/y", "package x")]), &[], &["x/y"]);
    }

    #[test]
    fn packages_and_data_own_different_places() {
        let p = &mut projection();
        check(p, 0, "a/m", Some(&[("x", "package shop")]), &["+a/m/x"], &[]);
        check(p, 1, "shop/roles", Some(&[("x", "{}")]), &[], &["package shop owns already"]);
        // What was refused for want of a place gets it when it becomes free.
        check(p, 0, "a/m", None, &["+/shop/roles/x", "-a/m/x"], &[]);
        check(
            p,
            0,
            "a/m",
            Some(&[("x", "package shop.roles.y")]),
            &[],
            &["ConfigMap shop/roles owns already"],
        );
        check(p, 0, "a/m", Some(&[("x", "package shop.orders")]), &["+a/m/x"], &[]);
        check(p, 0, "b/m", Some(&[("x", "package kubernetes.admission")]), &["+b/m/x"], &[]);
        check(p, 0, "b/m", Some(&[("x", "package kubernetes.pods")]), &[], &["--replicate"]);
        check(p, 0, "b/m", Some(&[("x", "package system.opahub")]), &[], &["OPA itself owns already"]);
        check(p, 0, "b/m", Some(&[("x", "package system")]), &["+b/m/x"], &[]);
        check(p, 0, "b/m", Some(&[("x", "package system.authz")]), &["+b/m/x"], &[]);
        check(p, 1, "system/bundles", Some(&[("x", "{}")]), &[], &["OPA itself owns already"]);
    }

    #[test]
    fn entries_and_modules_are_bounded() {
        let p = &mut projection();
        let huge = format!("{{\"a\":\"{}\"}}", "x".repeat(ENTRY_BYTES_MAX));
        check(p, 1, "a/m", Some(&[("x", &huge)]), &[], &["more than the 10485760 that one entry may have"]);
        check(p, 1, "a/m", None, &[], &[]);
        // Two of these pass the bound of all modules, one does not.
        let text = format!("package a\n# {}", "x".repeat(MODULES_BYTES_MAX / 40));
        let names: Vec<_> = (10..35).map(|at| format!("k{at}")).collect();
        let keys: Vec<_> = names.iter().map(|name| (name.as_str(), text.as_str())).collect();
        let ids = |sign, configmap| {
            names.iter().map(|name| format!("{sign}a/{configmap}/{name}")).collect::<Vec<_>>()
        };
        let check_ids = |p: &mut Projection, name, data, expected: &[String], refused: &[&str]| {
            check(p, 0, name, data, &expected.iter().map(String::as_str).collect::<Vec<_>>(), refused);
        };
        check_ids(p, "a/1", Some(&keys), &ids('+', 1), &[]);
        check_ids(p, "a/2", Some(&keys), &[], &["all modules together"]);
        check_ids(p, "a/1", None, &[ids('-', 1), ids('+', 2)].concat(), &[]);
    }
}
