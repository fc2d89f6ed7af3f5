//! A reference client on plain JSON values, standing for an agent and its OPA.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;

use flate2::read::GzDecoder;
use opa_hub_proto::frame::{DELTA_EVENT, Delta, FRAME_BYTES_MAX, POLICY_EVENT, Policy};
use opa_hub_proto::head::{HEAD_FILE, Head};
use opa_hub_proto::manifest::{DATA_FILE, module_id};
use opa_hub_proto::path::DirPath;
use opa_hub_proto::position::{Judge, Lag, Position};
use opa_hub_proto::reconcile::Reconcile;
use opa_hub_proto::revision::{Digest, Revision, data_digest, modules_digest};
use opa_hub_proto::sse::{Decoder, Message};
use serde_json::{Map, Value, json};

#[derive(Debug, PartialEq)]
pub(crate) enum Refused {
    NotHeld,
    Lags(Lag),
}

#[derive(Clone, Debug, PartialEq, Default)]
pub(crate) struct AppliedState {
    pub(crate) data: Value,
    pub(crate) modules: BTreeMap<String, String>,
    dirs: BTreeMap<DirPath, Digest>,
    ensure: Vec<DirPath>,
    rego_version: Option<u8>,
    reads: Vec<String>,
    pub(crate) position: Position,
    /// Complete up to this position, and exactly at it if equal to `position`.
    pub(crate) proven: Position,
    pub(crate) judge: Judge,
}

impl AppliedState {
    pub(crate) fn empty() -> Self {
        Self { data: json!({}), ..Self::default() }
    }

    pub(crate) fn revision(&self) -> Revision {
        let modules = self.modules.iter().map(|(id, text)| (id.as_str(), Digest::of(text.as_bytes())));
        Revision {
            modules: modules_digest(modules, self.rego_version),
            data: data_digest(self.dirs.iter().map(|(path, digest)| (path, *digest)), &self.ensure),
        }
    }

    pub(crate) fn reconcile(&self) -> Reconcile {
        let modules = self.modules.iter().map(|(id, text)| (id.clone(), Digest::of(text.as_bytes())));
        Reconcile { dirs: self.dirs.clone(), modules: Some(modules.collect()), reads: self.reads.clone() }
    }

    /// Applies an archive, full or from reconcile.
    pub(crate) fn archive(&mut self, bytes: &[u8]) {
        self.archive_by_halves(bytes, |_| {});
    }

    /// Like `archive`, with a callback between data and modules.
    pub(crate) fn archive_by_halves(&mut self, bytes: &[u8], between: impl FnOnce(&Self)) {
        let (mut modules, mut dirs) = (BTreeMap::new(), Vec::new());
        let mut tar = tar::Archive::new(GzDecoder::new(bytes));
        let mut head = Head::default();
        for entry in tar.entries().unwrap() {
            let mut entry = entry.unwrap();
            let path = entry.path().unwrap().to_str().unwrap().to_owned();
            let mut content = String::new();
            entry.read_to_string(&mut content).unwrap();
            if path == HEAD_FILE {
                head = serde_json::from_str(&content).unwrap();
            } else if let Some(id) = module_id(&path) {
                modules.insert(id.to_owned(), content);
            } else if let Some(dir) = path.strip_suffix(DATA_FILE) {
                let value: Value = serde_json::from_str(&content).unwrap();
                dirs.push((format!("/{}", dir.trim_end_matches('/')), value));
            }
        }
        if let Some(data) = head.data {
            // Inner directories first: new ones may be above or below.
            for gone in self.dirs.keys().rev().filter(|dir| !data.dirs.contains_key(*dir)) {
                remove(&mut self.data, gone);
            }
            for (dir, value) in dirs {
                *place(&mut self.data, &dir) = value;
            }
            (self.dirs, self.ensure) = (data.dirs, data.ensure);
        }
        between(self);
        self.modules.extend(modules);
        if let Some(modules) = head.modules {
            self.modules.retain(|id, _| modules.contains_key(id));
            self.reads = head.reads.into_iter().collect();
            self.rego_version = head.rego_version;
        }
    }

    /// Applies events with RFC 6902 semantics.
    pub(crate) fn events(&mut self, bytes: &[u8]) {
        let mut decoder = Decoder::new(FRAME_BYTES_MAX);
        decoder.push(bytes);
        while let Some(message) = decoder.next().unwrap() {
            assert_eq!(self.apply(message), Ok(()));
        }
    }

    /// Applies an event, unless its `from` differs (I3) or its position regresses.
    pub(crate) fn apply(&mut self, message: Message) -> Result<(), Refused> {
        let Message::Event { id, event, data } = message else { return Ok(()) };
        let event_revision: Revision = id.parse().unwrap();
        match event.as_str() {
            DELTA_EVENT => {
                let delta: Delta = serde_json::from_slice(&data).unwrap();
                if delta.from != self.revision().data || event_revision.modules != self.revision().modules {
                    return Err(Refused::NotHeld);
                }
                self.judge.pass(&delta.position, delta.dirs.keys(), false).map_err(Refused::Lags)?;
                self.delta(&delta);
            }
            POLICY_EVENT => {
                let policy: Policy = serde_json::from_slice(&data).unwrap();
                if policy.from != self.revision().modules || event_revision.data != self.revision().data {
                    return Err(Refused::NotHeld);
                }
                self.judge.pass(&policy.position, std::iter::empty(), true).map_err(Refused::Lags)?;
                self.position = policy.after(&self.position);
                self.proven = policy.position.clone().after(&self.proven);
                self.modules.retain(|id, _| !policy.remove.contains(id));
                self.modules.extend(policy.put);
                self.reads = policy.reads.into_iter().collect();
                assert_eq!(policy.to, self.revision().modules);
            }
            other => panic!("unknown event {other}"),
        }
        assert_eq!(event_revision, self.revision(), "event id is the revision after the event");
        Ok(())
    }

    fn delta(&mut self, delta: &Delta) {
        for dir in &delta.ensure {
            let place = place(&mut self.data, dir.as_str());
            if place.is_null() {
                *place = json!({});
            }
        }
        // OPA also decodes percent signs in paths. No scripted value contains "%25".
        let patch: json_patch::Patch = serde_json::from_str(&delta.patch.get().replace("%25", "%")).unwrap();
        assert_eq!(patch.0.len(), delta.ops);
        assert!(!patch.0.is_empty(), "event without operations");
        // OPA applies a second operation on a path to the data before the patch.
        let paths: BTreeSet<_> = patch.0.iter().map(|op| op.path().to_string()).collect();
        assert_eq!(paths.len(), patch.0.len(), "two operations on a path: {}", delta.patch);
        json_patch::patch(&mut self.data, &patch).unwrap_or_else(|error| {
            panic!("{error}: {} onto {} with {:?}", delta.patch, self.data, self.dirs)
        });
        for (dir, digest) in &delta.dirs {
            match digest {
                Some(digest) => _ = self.dirs.insert(dir.clone(), *digest),
                None => _ = self.dirs.remove(dir),
            }
        }
        self.position = delta.after(&self.position);
        self.proven = delta.position.clone().after(&self.proven);
        assert_eq!(delta.to, self.revision().data);
    }

    /// Returns the entries of each directory. All other data is empty maps.
    pub(crate) fn entries(&self) -> BTreeMap<String, Map<String, Value>> {
        let mut entries = BTreeMap::new();
        let mut rebuilt = json!({});
        for dir in self.dirs.keys() {
            let is_inner = self.dirs.keys().any(|outer| outer != dir && dir.is_within(outer));
            assert!(!is_inner, "{dir} is nested in another directory");
            let found = self.data.pointer(dir.as_str()).and_then(Value::as_object);
            let found = found.unwrap_or_else(|| panic!("{dir} has a digest but no map"));
            *place(&mut rebuilt, dir.as_str()) = found.clone().into();
            entries.insert(dir.as_str().to_owned(), found.clone());
        }
        assert_eq!(prune(rebuilt), self.content(), "all content has a digest");
        entries
    }

    /// Returns the data without empty maps.
    pub(crate) fn content(&self) -> Value {
        prune(self.data.clone())
    }
}

fn place<'a>(data: &'a mut Value, pointer: &str) -> &'a mut Value {
    pointer.split('/').skip(1).fold(data, |value, segment| &mut value[segment])
}

fn remove(data: &mut Value, dir: &DirPath) {
    let (parent, name) = dir.as_str().rsplit_once('/').unwrap();
    place(data, parent).as_object_mut().unwrap().remove(name).unwrap();
}

fn prune(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let map = map.into_iter().map(|(key, value)| (key, prune(value)));
            let map: serde_json::Map<_, _> = map.filter(|(_, value)| !value.is_null()).collect();
            if map.is_empty() { Value::Null } else { map.into() }
        }
        other => other,
    }
}
