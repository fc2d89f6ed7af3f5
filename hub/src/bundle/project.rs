//! What an object means to the bundle: a replicated object is one entry, a ConfigMap of data one directory, a
//! ConfigMap of policies its modules. A ConfigMap is accepted whole or not at all; refused, its last good content
//! stays. The layout is kube-mgmt's.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use bytes::Bytes;
use opa_hub_proto::path::{DirPath, is_segment};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::view::Batch;
use crate::config::DIRECTORIES_MAX;
use crate::model::{Change, Content, Feed, FeedId, Object, ObjectKey, Problem};
use crate::policy::modules::{self, Module};
use crate::source::trim;

/// Levels of a JSON value. Go's decoder, and so OPA, refuses 10,000, and with it the whole bundle.
const JSON_DEPTH_MAX: usize = 1000;

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
    /// Two sources for one path.
    #[error(
        "its data would lie at {0}, where something else is replicated: use another namespace or --replicate-path"
    )]
    PathTaken(DirPath),
    /// More places than the head of an archive may list.
    #[error("the bundle already has {DIRECTORIES_MAX} directories")]
    TooManyDirectories,
}

/// Turns changes of objects into changes of a view.
pub struct Projection {
    feeds: Vec<Feed>,
    /// Keys or module ids of the ConfigMap's accepted content.
    accepted: HashMap<(FeedId, ObjectKey), Vec<String>>,
    /// Entries by directory.
    entries: HashMap<DirPath, usize>,
    problems: BTreeMap<(FeedId, ObjectKey), Problem>,
}

#[derive(Deserialize)]
struct ConfigMap {
    data: Option<BTreeMap<String, String>>,
}

impl Projection {
    /// With nothing accepted yet.
    pub fn new(feeds: Vec<Feed>) -> Self {
        Self { feeds, accepted: HashMap::new(), entries: HashMap::new(), problems: BTreeMap::new() }
    }

    /// What is refused now, in a stable order.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.problems.values()
    }

    /// Adds to `batch` what `change` does to the view.
    pub fn apply(&mut self, change: Change, batch: &mut Batch) {
        let (id, key, object) = match change {
            Change::Put(id, object) => (id, object.key.clone(), Some(object)),
            Change::Remove(id, key) => (id, key, None),
        };
        let content = self.feeds[id.0].content.clone();
        let result = match &content {
            Content::Resource(prefix) => self.resource(id, prefix, &key, object, batch),
            Content::Data => self.data(id, &key, object, batch),
            Content::Policies => self.policies(id, &key, object.as_ref(), batch),
        };
        match result {
            Ok(()) => _ = self.problems.remove(&(id, key)),
            Err(error) => {
                let kind = if matches!(content, Content::Resource(_)) {
                    self.feeds[id.0].resource.to_string()
                } else {
                    "ConfigMap".into()
                };
                let problem = Problem { subject: format!("{kind} {key}"), message: error.to_string() };
                tracing::warn!(subject = problem.subject, error = problem.message, "refused");
                self.problems.insert((id, key), problem);
            }
        }
    }

    fn resource(
        &mut self,
        id: FeedId,
        prefix: &DirPath,
        key: &ObjectKey,
        object: Option<Object>,
        batch: &mut Batch,
    ) -> Result<(), Error> {
        let dir = match &*key.namespace {
            "" => prefix.clone(),
            namespace => prefix.join(namespace).map_err(|_| Error::Name(namespace.into()))?,
        };
        let held = (id, key.clone());
        match object {
            None if self.accepted.remove(&held).is_some() => {
                self.leave(&dir);
                batch.entry(&dir, &key.name, None);
            }
            None => {}
            Some(object) => {
                if !self.accepted.contains_key(&held) {
                    self.enter(&dir)?;
                    self.accepted.insert(held, Vec::new());
                }
                batch.entry(&dir, &key.name, Some(object.json));
            }
        }
        Ok(())
    }

    fn data(
        &mut self,
        id: FeedId,
        key: &ObjectKey,
        object: Option<Object>,
        batch: &mut Batch,
    ) -> Result<(), Error> {
        let dir = DirPath::new([&*key.namespace, &*key.name]).map_err(|_| Error::Name(key.to_string()))?;
        let keys = match object {
            None => BTreeMap::new(),
            Some(object) => {
                self.check_free(&dir)?;
                let texts = texts(&object)?;
                let values = texts.into_iter().map(|(key, text)| Ok((data_value(&key, &text)?, key)));
                values.map(|pair| pair.map(|(value, key)| (key, value))).collect::<Result<_, Error>>()?
            }
        };
        let held = (id, key.clone());
        let new: Vec<String> = keys.keys().cloned().collect();
        if !new.is_empty() && !self.accepted.contains_key(&held) {
            self.enter(&dir)?;
        }
        let old = if new.is_empty() { self.accepted.remove(&held) } else { self.accepted.insert(held, new) };
        if keys.is_empty() && old.is_some() {
            self.leave(&dir);
        }
        for gone in old.into_iter().flatten().filter(|key| !keys.contains_key(key)) {
            batch.entry(&dir, &gone, None);
        }
        for (key, value) in keys {
            batch.entry(&dir, &key, Some(value));
        }
        Ok(())
    }

    fn policies(
        &mut self,
        id: FeedId,
        key: &ObjectKey,
        object: Option<&Object>,
        batch: &mut Batch,
    ) -> Result<(), Error> {
        if !is_segment(&key.namespace) || !is_segment(&key.name) {
            return Err(Error::Name(key.to_string()));
        }
        let mut parsed: BTreeMap<String, Arc<Module>> = BTreeMap::new();
        for (name, text) in object.map(texts).transpose()?.unwrap_or_default() {
            let module_id = format!("{key}/{name}");
            let module =
                modules::parse(&module_id, &text).map_err(|source| Error::Module { key: name, source })?;
            parsed.insert(module_id, Arc::new(module));
        }
        let ids = parsed.keys().cloned().collect();
        let old = match object {
            None => self.accepted.remove(&(id, key.clone())),
            Some(_) => self.accepted.insert((id, key.clone()), ids),
        };
        for gone in old.into_iter().flatten().filter(|id| !parsed.contains_key(id)) {
            batch.modules.insert(gone, None);
        }
        batch.modules.extend(parsed.into_iter().map(|(id, module)| (id, Some(module))));
        Ok(())
    }

    /// Whether data may lie at `dir`: below no replicated resource, and above none; nor where agents keep their state.
    fn check_free(&self, dir: &DirPath) -> Result<(), Error> {
        let taken = |prefix: &DirPath| dir.is_within(prefix) || prefix.is_within(dir);
        let replicated = self.feeds.iter().filter_map(|feed| match &feed.content {
            Content::Resource(prefix) => Some(prefix),
            _ => None,
        });
        let is_marker = dir.as_str().starts_with("/system/opahub");
        if is_marker || replicated.into_iter().any(taken) {
            return Err(Error::PathTaken(dir.clone()));
        }
        Ok(())
    }

    fn enter(&mut self, dir: &DirPath) -> Result<(), Error> {
        if self.entries.len() >= DIRECTORIES_MAX && !self.entries.contains_key(dir) {
            return Err(Error::TooManyDirectories);
        }
        *self.entries.entry(dir.clone()).or_default() += 1;
        Ok(())
    }

    fn leave(&mut self, dir: &DirPath) {
        if let Some(count) = self.entries.get_mut(dir) {
            *count -= 1;
            if *count == 0 {
                self.entries.remove(dir);
            }
        }
    }
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
                Change::Put(FeedId(feed), Object { key, version: None, json: json.into() })
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
        check(p, 1, "kubernetes/pods", Some(&[("x", "{}")]), &[], &["/kubernetes/pods"]);
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
}
