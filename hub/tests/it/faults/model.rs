//! Expected content of the fault test, computed from the source's objects.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use opa_hub::bundle::{Bundle, CachedSnapshot};
use opa_hub::model::ObjectKey;
use opa_hub::snapshot::Snapshot;
use opa_hub::snapshot::bundle_archive::ArchiveKind;
use serde_json::{Map, Value};

use super::document::{Document, FIELDS};
use super::limits::{self, LIMITED};
use super::reads::{cut, lines, paths};
use super::source::{Kind, Source, place_of_jobs, served};
use super::written::opened;
use crate::fold::AppliedState;

/// Served content by object.
pub(super) type Units = BTreeMap<(Kind, ObjectKey), Value>;

/// Expected view of a client.
pub(super) struct Asked {
    pub(super) document: Document,
    pub(super) namespace: Option<&'static str>,
    /// Kinds replicated because policies read them.
    pub(super) opened: BTreeSet<Kind>,
    /// Client and position, for failure messages.
    pub(super) context: String,
}

pub(super) fn units_of(view: &Snapshot) -> Units {
    let dirs = view.dirs.iter().map(|(path, dir)| {
        let mut json = Vec::new();
        dir.write_json(&mut json);
        (path.as_str().to_owned(), serde_json::from_slice::<Map<_, _>>(&json).unwrap())
    });
    let modules = view.modules.iter().map(|(id, module)| (id.as_str(), module.text.as_str()));
    units(dirs.collect(), modules)
}

pub(super) fn units_held(applied: &AppliedState) -> Units {
    units(applied.entries(), applied.modules.iter().map(|(id, text)| (id.as_str(), text.as_str())))
}

fn units<'a>(
    dirs: BTreeMap<String, Map<String, Value>>,
    modules: impl Iterator<Item = (&'a str, &'a str)>,
) -> Units {
    let key = |namespace: &str, name: &str| ObjectKey { namespace: namespace.into(), name: name.into() };
    let mut units = Units::new();
    for (dir, entries) in dirs {
        let path: Vec<_> = dir.split('/').skip(1).collect();
        let (kind, namespace) = match path[..] {
            ["kubernetes", "nodes"] => (Kind::Nodes, ""),
            ["kubernetes", plural, namespace] => (Kind::of(plural), namespace),
            [namespace, name] => {
                units.insert((Kind::Data, key(namespace, name)), Value::Object(entries));
                continue;
            }
            _ => panic!("unexpected directory {dir}"),
        };
        units.extend(entries.into_iter().map(|(name, value)| ((kind, key(namespace, &name)), value)));
    }
    for (id, text) in modules {
        let path: Vec<_> = id.split('/').collect();
        let [namespace, name, file] = path[..] else { panic!("{id} has no ConfigMap") };
        let unit = units.entry((Kind::PolicyRegistry, key(namespace, name))).or_insert(Value::Null);
        unit[file] = text.into();
    }
    units
}

impl Asked {
    pub(super) fn new(document: Document, namespace: Option<&'static str>, bundle: &Bundle) -> Self {
        Self { document, namespace, opened: opened(bundle), context: String::new() }
    }

    fn sees(&self, kind: Kind, key: &ObjectKey) -> bool {
        if Kind::AUTO.contains(&kind) && !self.opened.contains(&kind) {
            return false;
        }
        let namespace = self.namespace.filter(|_| self.document.is_scoped && kind.is_scoped());
        namespace.is_none_or(|namespace| *key.namespace == *namespace)
    }

    /// Compares `units` with the source by kind at the given versions; kinds without version are skipped. Of pruned pods
    /// only the fields that policies read are compared, unless the hub `is_quiet`: then no others exist.
    pub(super) fn check(
        &self,
        source: &Source,
        units: &Units,
        is_quiet: bool,
        version_at: impl Fn(Kind) -> Option<u64>,
    ) {
        let read = paths(&lines_of(units));
        let is_cut = |kind: Kind| self.document.name == FIELDS && kind == Kind::Pods;
        for kind in Kind::ALL {
            let Some(version) = version_at(kind) else { continue };
            let mut allowed = source.allowed(kind, version);
            // The first owner has the path.
            let is_disputed = |key: &ObjectKey| self.document.is_auto && !is_quiet && *key == place_of_jobs();
            allowed.retain(|key, _| !is_disputed(key));
            for (_, key) in units.keys().filter(|(other, key)| *other == kind && !is_disputed(key)) {
                assert!(
                    allowed.contains_key(key) && self.sees(kind, key),
                    "{self}: {kind:?} {key} is served"
                );
            }
            for (key, allowed) in allowed.into_iter().filter(|(key, _)| self.sees(kind, key)) {
                let found = units.get(&(kind, key.clone()));
                let is_wider = is_cut(kind) && !is_quiet;
                let found = found.map(|unit| if is_wider { cut(unit, &read) } else { unit.clone() });
                let expected = allowed.iter().map(|content| {
                    let unit = served(kind, content.as_ref()?);
                    Some(match self.document.fields {
                        _ if !is_cut(kind) => unit,
                        _ if !is_quiet => cut(&unit, &read),
                        None => unit,
                        Some(fields) => cut(&unit, &[&read[..], &given(fields)[..]].concat()),
                    })
                });
                let expected: Vec<_> = expected.collect();
                assert!(
                    expected.contains(&found),
                    "{self}: {kind:?} {key} is {found:?}, not one of {expected:?} at {version}: {}",
                    source.history(kind, key)
                );
            }
        }
    }

    /// Compares all kinds with the current source, for a quiet hub. Returns the number of objects omitted by a limit.
    pub(super) fn check_all(&self, source: &Source, units: &Units) -> usize {
        let lines = lines_of(units);
        let reads = |kind: Kind| self.document.is_auto && lines.contains(kind.plural());
        assert_eq!(self.opened.contains(&Kind::Services), reads(Kind::Services), "{self}: services are read");
        // Other data may own the path.
        assert!(!self.opened.contains(&Kind::Jobs) || reads(Kind::Jobs), "{self}: no policy reads jobs");
        let is_limited = |kind: Kind| self.document.is_limited() && LIMITED.contains(&kind);
        self.check(source, units, true, |kind| (!is_limited(kind)).then_some(source.version()));
        if self.document.is_limited() { limits::check(&self.document, source, units) } else { 0 }
    }

    /// Checks that every archive and reconcile response produces the snapshot, also from the content of `others`.
    pub(super) async fn check_archives(
        &self,
        source: &Source,
        head: &Arc<CachedSnapshot>,
        others: &[AppliedState],
    ) {
        let expected = units_of(&head.view);
        let mut whole = AppliedState::empty();
        for part in [ArchiveKind::Policy, ArchiveKind::Data] {
            // Data and policy archives together.
            let bytes = archive(head, part).await;
            whole.archive(&bytes);
        }
        assert_eq!(units_held(&whole), expected, "{self}: data and policy archives equal the full one");
        let mut whole = AppliedState::empty();
        let bytes = archive(head, ArchiveKind::Full).await;
        whole.archive(&bytes);
        assert_eq!((units_held(&whole), whole.revision()), (expected, head.view.revision), "{self}");
        self.check_all(source, &units_held(&whole));
        for applied in others {
            let mut applied = applied.clone();
            for _ in 0..RECONCILES_MAX {
                if applied.revision() != head.view.revision {
                    let bytes = answer(head, &applied).await;
                    applied.archive(&bytes);
                }
            }
            assert_eq!(applied.revision(), head.view.revision, "{self}: reconcile response");
            assert_eq!(units_held(&applied), units_held(&whole), "{self}: reconcile response");
        }
    }
}

/// Read annotations of the policies.
fn lines_of(units: &Units) -> BTreeSet<&str> {
    let policies = units.iter().filter(|((kind, _), _)| *kind == Kind::PolicyRegistry);
    let texts = policies.flat_map(|(_, texts)| texts.as_object().into_iter().flat_map(Map::values));
    lines(texts.filter_map(Value::as_str))
}

/// Paths of these fields.
fn given<'a>(fields: &[&'a str]) -> Vec<Vec<&'a str>> {
    fields.iter().map(|field| field.split('.').chain(["!"]).collect()).collect()
}

/// Maximum number of responses: one may contain fields of older policies.
pub(super) const RECONCILES_MAX: usize = 2;

pub(super) async fn archive(head: &Arc<CachedSnapshot>, part: ArchiveKind) -> Vec<u8> {
    in_no_time(head.archive(part)).await.pieces.concat()
}

pub(super) async fn answer(head: &Arc<CachedSnapshot>, applied: &AppliedState) -> Vec<u8> {
    in_no_time(head.reconcile(applied.reconcile())).await.unwrap().0.pieces.concat()
}

/// Yields after which all ready tasks have run.
const YIELDS: usize = 8;

/// Awaits blocking work without advancing the paused clock. Other tasks run until idle, so that a seed is reproducible.
async fn in_no_time<T>(work: impl Future<Output = T>) -> T {
    let (done, busy) = std::sync::mpsc::channel::<()>();
    let busy = tokio::task::spawn_blocking(move || _ = busy.recv());
    let result = work.await;
    drop(done);
    busy.await.unwrap();
    let_others_run().await;
    result
}

pub(super) async fn let_others_run() {
    for _ in 0..YIELDS {
        tokio::task::yield_now().await;
    }
}

impl std::fmt::Display for Asked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}{}", self.document.name, self.namespace.unwrap_or_default(), self.context)
    }
}
