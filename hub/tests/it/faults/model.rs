//! What the fault test expects, computed from the source's objects alone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use opa_hub::bundle::view::View;
use opa_hub::bundle::{Bundle, Edition, Part};
use opa_hub::model::ObjectKey;
use serde_json::{Map, Value};

use super::document::{Document, FIELDS};
use super::limits::{self, LIMITED};
use super::reads::{cut, lines, paths};
use super::source::{Kind, Source, place_of_jobs, served};
use super::written::opened;
use crate::fold::Held;

/// What is served of each object.
pub(super) type Units = BTreeMap<(Kind, ObjectKey), Value>;

/// What is served to whom.
pub(super) struct Asked {
    pub(super) document: Document,
    pub(super) namespace: Option<&'static str>,
    /// What is replicated because policies read it.
    pub(super) opened: BTreeSet<Kind>,
    /// Who asks, and as of when, for the message of a failure.
    pub(super) context: String,
}

/// What an edition holds.
pub(super) fn units_of(view: &View) -> Units {
    let dirs = view.dirs.iter().map(|(path, dir)| {
        let mut json = Vec::new();
        dir.write_json(&mut json);
        (path.as_str().to_owned(), serde_json::from_slice::<Map<_, _>>(&json).unwrap())
    });
    let modules = view.modules.iter().map(|(id, module)| (id.as_str(), module.text.as_str()));
    units(dirs.collect(), modules)
}

/// What an agent holds.
pub(super) fn units_held(held: &Held) -> Units {
    units(held.entries(), held.modules.iter().map(|(id, text)| (id.as_str(), text.as_str())))
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
            _ => panic!("nothing lies at {dir}"),
        };
        units.extend(entries.into_iter().map(|(name, value)| ((kind, key(namespace, &name)), value)));
    }
    for (id, text) in modules {
        let path: Vec<_> = id.split('/').collect();
        let [namespace, name, file] = path[..] else { panic!("no ConfigMap gave {id}") };
        let unit = units.entry((Kind::Policies, key(namespace, name))).or_insert(Value::Null);
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

    /// Compares `units` with what the source had of each kind at that version; where there is none they are not looked at.
    /// Of pods that are cut only what their policies read is compared, unless the hub `is_quiet`: then nothing else is
    /// there.
    pub(super) fn check(
        &self,
        source: &Source,
        units: &Units,
        is_quiet: bool,
        at: impl Fn(Kind) -> Option<u64>,
    ) {
        let read = paths(&lines_of(units));
        let is_cut = |kind: Kind| self.document.name == FIELDS && kind == Kind::Pods;
        for kind in Kind::ALL {
            let Some(version) = at(kind) else { continue };
            let mut allowed = source.allowed(kind, version);
            // Who comes first has the place.
            let is_disputed = |key: &ObjectKey| self.document.is_auto && !is_quiet && *key == place_of_jobs();
            allowed.retain(|key, _| !is_disputed(key));
            for (_, key) in units.keys().filter(|(of, key)| *of == kind && !is_disputed(key)) {
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
                    "{self}: {kind:?} {key} is {found:?}, not one of {expected:?} as of {version}: {}",
                    source.history(kind, key)
                );
            }
        }
    }

    /// The same of all kinds as of now, where the hub is quiet. Returns how many objects a limit left out.
    pub(super) fn check_all(&self, source: &Source, units: &Units) -> usize {
        let lines = lines_of(units);
        let reads = |kind: Kind| self.document.is_auto && lines.contains(kind.plural());
        assert_eq!(self.opened.contains(&Kind::Services), reads(Kind::Services), "{self}: services are read");
        // Something else may have been in their place.
        assert!(!self.opened.contains(&Kind::Jobs) || reads(Kind::Jobs), "{self}: nobody reads jobs");
        let is_limited = |kind: Kind| self.document.is_limited() && LIMITED.contains(&kind);
        self.check(source, units, true, |kind| (!is_limited(kind)).then_some(source.version()));
        if self.document.is_limited() { limits::check(&self.document, source, units) } else { 0 }
    }

    /// Every archive of an edition, and every answer to reconcile, makes its view. `others` hold something.
    pub(super) async fn check_archives(&self, source: &Source, head: &Arc<Edition>, others: &[Held]) {
        let expected = units_of(&head.view);
        let mut whole = Held::empty();
        for part in [Part::Policy, Part::Data] {
            // Each by itself, one beside the other.
            let bytes = archive(head, part).await;
            whole.archive(&bytes);
        }
        assert_eq!(units_held(&whole), expected, "{self}: the parts make the whole");
        let mut whole = Held::empty();
        let bytes = archive(head, Part::Whole).await;
        whole.archive(&bytes);
        assert_eq!((units_held(&whole), whole.revision()), (expected, head.view.revision), "{self}");
        self.check_all(source, &units_held(&whole));
        for held in others {
            let mut held = held.clone();
            for _ in 0..RECONCILES_MAX {
                if held.revision() != head.view.revision {
                    let bytes = answer(head, &held).await;
                    held.archive(&bytes);
                }
            }
            assert_eq!(held.revision(), head.view.revision, "{self}: an answer to reconcile");
            assert_eq!(units_held(&held), units_held(&whole), "{self}: an answer to reconcile");
        }
    }
}

/// What the policies among these read.
fn lines_of(units: &Units) -> BTreeSet<&str> {
    let policies = units.iter().filter(|((kind, _), _)| *kind == Kind::Policies);
    let texts = policies.flat_map(|(_, texts)| texts.as_object().into_iter().flat_map(Map::values));
    lines(texts.filter_map(Value::as_str))
}

/// All that lies at these.
fn given<'a>(fields: &[&'a str]) -> Vec<Vec<&'a str>> {
    fields.iter().map(|field| field.split('.').chain(["!"]).collect()).collect()
}

/// Answers that are needed at most: one may hold what older policies read, too.
pub(super) const RECONCILES_MAX: usize = 2;

pub(super) async fn archive(head: &Arc<Edition>, part: Part) -> Vec<u8> {
    in_no_time(head.archive(part)).await.pieces.concat()
}

pub(super) async fn answer(head: &Arc<Edition>, held: &Held) -> Vec<u8> {
    in_no_time(head.reconcile(held.reconcile())).await.unwrap().0.pieces.concat()
}

/// Yields after which all tasks that could go on have done so.
const YIELDS: usize = 8;

/// Awaits work on other threads in no time: a paused clock stands while a thread for blocking work is busy. Other tasks go
/// on until they wait, however long the work takes, so that a seed always does the same.
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
