//! A hub of the fault test: failing watches, bundles over one store, and streams.

use std::collections::BTreeMap;
use std::sync::Arc;

use opa_hub::bundle::Bundle;
use opa_hub::bundle::registry::BundleRegistry;
use opa_hub::health::Health;
use opa_hub::model::WatchSet;
use opa_hub::model::{Event, Object, Version, WatchId};
use opa_hub::store::Store;

use super::World;
use super::document::Document;
use super::source::Kind;
use super::streams::Streams;
use super::written::Written;

/// Rounds that resolve all dependencies: document, watch, list, check, snapshot.
const SETTLE_ROUNDS: usize = 6;
/// Events of a failing watch.
const FAILS: [Event; 1] = [Event::Failed];
/// Events of an unknown resource.
const NOT_SERVED: [Event; 2] = [Event::Failed, Event::Denied];

pub(super) struct Hub {
    store: Arc<Store>,
    wanted: WatchSet,
    watches: BTreeMap<WatchId, Watching>,
    slots: BTreeMap<&'static str, Slot>,
    served: BundleRegistry,
    pub(super) streams: Streams,
}

/// A served bundle, and its pending replacement.
struct Slot {
    running: Written,
    next: Option<Written>,
}

impl Slot {
    fn all(&mut self) -> impl Iterator<Item = &mut Written> {
        std::iter::once(&mut self.running).chain(&mut self.next)
    }
}

struct Watching {
    kind: Kind,
    trouble: Trouble,
    /// Whether a new list is required.
    needs_list: bool,
    was_listed: bool,
    /// Epoch of its versions.
    epoch: usize,
    /// Version up to which events are complete.
    delivered: u64,
}

#[derive(PartialEq)]
enum Trouble {
    No,
    Silent,
    Failing,
}

impl Watching {
    /// Policies are served without failing watches; for services that would break I10.
    fn may_fail(&self) -> bool {
        self.was_listed || self.kind != Kind::Services
    }
}

impl Hub {
    pub(super) fn start(world: &mut World) -> Self {
        let store = Arc::new(Store::new(Health::default()));
        let mut hub = Self {
            wanted: store.wanted(),
            store,
            watches: BTreeMap::new(),
            slots: BTreeMap::new(),
            served: BundleRegistry::default(),
            streams: Streams::default(),
        };
        hub.reconcile(world);
        hub.follow_wanted(world);
        for id in hub.ids() {
            if world.rng.u8(..8) > 0 {
                hub.list(id, false, world);
            }
        }
        for written in hub.written() {
            written.commit(None);
            written.check(&mut world.seen);
        }
        hub
    }

    /// Reconciles bundles with the documents.
    pub(super) fn reconcile(&mut self, world: &mut World) {
        for document in world.documents.values() {
            let Some(slot) = self.slots.get_mut(document.name) else {
                let good = world.persisted.get(document.name).cloned().unwrap_or_default();
                let running = Written::start(*document, good, &self.store);
                self.served.serve(Arc::clone(running.bundle()));
                self.slots.insert(document.name, Slot { running, next: None });
                continue;
            };
            if slot.next.as_ref().unwrap_or(&slot.running).document == *document {
                continue;
            }
            slot.next = None;
            if slot.running.document != *document {
                // The persisted last good modules count only if nothing was checked yet.
                let persisted = || world.persisted.get(document.name).cloned().unwrap_or_default();
                let good = slot.running.good().unwrap_or_else(persisted);
                slot.next = Some(Written::start(*document, good, &self.store));
            }
        }
        for (name, _) in self.slots.extract_if(.., |name, _| !world.documents.contains_key(name)) {
            world.seen.add("bundles removed");
            self.served.withdraw(name);
        }
        for slot in self.slots.values_mut() {
            if slot.next.as_ref().is_some_and(Written::is_live)
                && let Some(next) = slot.next.take()
            {
                world.seen.add("bundles replaced");
                self.served.serve(Arc::clone(next.bundle()));
                slot.running = next;
            }
        }
    }

    /// Returns the bundle served to this namespace, and its document.
    pub(super) fn part(&self, name: &str, namespace: &str) -> Option<(Arc<Bundle>, Document)> {
        let whole = self.served.get(name)?;
        let part = whole.of(Some(namespace)).unwrap();
        let heads = [&whole, &part].map(|bundle| bundle.head().borrow().clone());
        if let [Some(of_whole), Some(of_part)] = heads {
            for (path, dir) in of_part.view.dirs.iter() {
                let same = of_whole.view.dirs.get(path).map(|dir| dir.digest);
                assert_eq!(
                    same,
                    Some(dir.digest),
                    "{name} {namespace}: {path} differs from the whole bundle: part {} newest {}, whole {} newest {}, position {}",
                    of_part.view.revision,
                    of_part.newest(),
                    of_whole.view.revision,
                    of_whole.newest(),
                    whole.position()
                );
            }
        }
        Some((part, self.slots[name].running.document))
    }

    pub(super) fn bundles(&self) -> impl Iterator<Item = &Written> {
        self.slots.values().map(|slot| &slot.running)
    }

    /// All bundles, including replacements.
    fn written(&mut self) -> impl Iterator<Item = &mut Written> {
        self.slots.values_mut().flat_map(Slot::all)
    }

    pub(super) fn written_of(&mut self, name: &str) -> Option<&mut Written> {
        self.slots.get_mut(name).map(|slot| &mut slot.running)
    }

    /// Bundles remove fields that only older policies read.
    pub(super) fn narrow(&mut self, world: &mut World) {
        for written in self.written() {
            written.narrow(&mut world.seen);
        }
    }

    pub(super) fn any(&mut self, world: &mut World) -> &mut Written {
        let index = world.rng.usize(..self.written().count());
        self.written().nth(index).unwrap()
    }

    fn ids(&self) -> Vec<WatchId> {
        self.watches.keys().copied().collect()
    }

    /// Adds and removes watches for the bundles.
    fn follow_wanted(&mut self, world: &World) {
        let wanted = self.wanted.borrow().clone();
        self.watches.retain(|id, _| wanted.contains_key(id));
        for (id, feed) in wanted {
            self.watches.entry(id).or_insert_with(|| Watching {
                kind: Kind::of(&feed.resource.plural),
                trouble: Trouble::No,
                needs_list: true,
                was_listed: false,
                epoch: world.source.epoch,
                delivered: 0,
            });
        }
    }

    /// Receives some pending events and publishes some of them.
    pub(super) fn receive(&mut self, world: &mut World) {
        self.follow_wanted(world);
        for id in self.ids() {
            self.receive_from(id, world);
        }
        self.commit(world);
    }

    fn receive_from(&mut self, id: WatchId, world: &mut World) {
        let watching = self.watches.get_mut(&id).expect("watch exists");
        if watching.trouble != Trouble::No && world.rng.u8(..6) > 0 {
            if watching.trouble == Trouble::Failing && watching.may_fail() {
                for event in FAILS {
                    self.store.apply((id, event, None));
                }
            }
            return;
        }
        // A failure requires a list; after silence all events arrive at once.
        let trouble = std::mem::replace(&mut watching.trouble, Trouble::No);
        watching.needs_list |= trouble == Trouble::Failing;
        let is_served = world.source.serves(watching.kind);
        if watching.needs_list || watching.epoch != world.source.epoch || !is_served {
            // A restored server does not know the requested version, and sends nothing.
            if world.rng.bool() {
                self.list(id, false, world);
            }
            return;
        }
        let most = if trouble == Trouble::Silent { usize::MAX } else { world.rng.usize(..8) };
        let bookmarks = world.rng.u8(..8) == 0;
        self.send_events(id, most, bookmarks, world);
    }

    /// Receives some events, and possibly a bookmark at the end.
    fn send_events(&mut self, id: WatchId, most: usize, bookmarks: bool, world: &World) {
        let watching = self.watches.get_mut(&id).expect("watch exists");
        let new = world.source.since(watching.kind, watching.delivered);
        let is_all = new.len() <= most;
        for (version, key, value) in new.into_iter().take(most) {
            let event = match value {
                Some(value) => Event::Apply(Object { key: key.clone(), json: value.to_string().into() }),
                None => Event::Delete(key.clone()),
            };
            self.store.apply((id, event, Some(Version(version))));
            watching.delivered = version;
        }
        if is_all && bookmarks {
            watching.delivered = world.source.version();
            self.store.apply((id, Event::Bookmark, Some(Version(watching.delivered))));
        }
    }

    /// Receives a list. Unless `is_calm`, the list may end early, and parts may be published.
    fn list(&mut self, id: WatchId, is_calm: bool, world: &mut World) {
        let watching = &self.watches[&id];
        let (kind, version, may_fail) = (watching.kind, world.source.version(), watching.may_fail());
        if !world.source.serves(kind) {
            world.seen.add("unserved resources");
            for event in NOT_SERVED {
                self.store.apply((id, event, None));
            }
            self.watches.get_mut(&id).expect("watch exists").needs_list = true;
            return;
        }
        world.seen.add("lists");
        self.store.apply((id, Event::Init, None));
        let objects = world.source.objects_at(kind, version).into_iter();
        let objects = objects.map(|(key, value)| Object { key: key.clone(), json: value.to_string().into() });
        for object in objects.collect::<Vec<_>>() {
            if !is_calm && may_fail && world.rng.u8(..64) == 0 {
                world.seen.add("incomplete lists");
                for event in FAILS {
                    self.store.apply((id, event, None));
                }
                self.watches.get_mut(&id).expect("watch exists").needs_list = true;
                return;
            }
            self.store.apply((id, Event::Apply(object), None));
            if !is_calm && world.rng.u8(..16) == 0 {
                self.commit(world);
            }
        }
        self.store.apply((id, Event::InitDone, Some(Version(version))));
        let watching = self.watches.get_mut(&id).expect("watch exists");
        (watching.epoch, watching.delivered) = (world.source.epoch, version);
        (watching.needs_list, watching.was_listed) = (false, true);
    }

    /// Expires the version of a random watch.
    pub(super) fn list_any(&mut self, world: &mut World) {
        self.follow_wanted(world);
        if let Some(id) = world.rng.choice(self.ids()) {
            self.list(id, false, world);
            self.commit(world);
        }
    }

    /// Makes a random watch fail or stay silent.
    pub(super) fn trouble(&mut self, world: &mut World) {
        let Some(id) = world.rng.choice(self.ids()) else { return };
        let (what, trouble) = if world.rng.bool() {
            ("failing watches", Trouble::Failing)
        } else {
            ("silent watches", Trouble::Silent)
        };
        world.seen.add(what);
        self.watches.get_mut(&id).expect("watch exists").trouble = trouble;
    }

    /// Some bundles publish some changes.
    fn commit(&mut self, world: &mut World) {
        for written in self.written() {
            if world.rng.bool() {
                written.commit(world.rng.bool().then(|| world.rng.usize(1..4)));
            }
        }
    }

    /// Some checkers advance.
    pub(super) fn check(&mut self, world: &mut World) {
        for written in self.written() {
            if world.rng.bool() {
                written.check(&mut world.seen);
            }
            // The leader may not have seen this yet.
            if let Some(good) = written.good().filter(|_| world.rng.u8(..4) == 0) {
                world.persisted.insert(written.document.name, good);
            }
        }
    }

    /// Ends all faults.
    pub(super) fn settle(&mut self, world: &mut World) {
        for _ in 0..SETTLE_ROUNDS {
            self.reconcile(world);
            self.follow_wanted(world);
            for id in self.ids() {
                let watching = self.watches.get_mut(&id).expect("watch exists");
                let trouble = std::mem::replace(&mut watching.trouble, Trouble::No);
                let is_known = watching.epoch == world.source.epoch && !watching.needs_list;
                if is_known && trouble != Trouble::Failing {
                    self.send_events(id, usize::MAX, true, world);
                } else {
                    self.list(id, true, world);
                }
            }
            for written in self.written() {
                written.settle(world);
            }
        }
        for slot in self.slots.values() {
            slot.running.check_settled();
            assert!(slot.next.is_none(), "{} is replaced", slot.running.document.name);
        }
    }

    /// Checks that every stream is at the head of a served bundle.
    pub(super) fn check_streams(&self) {
        for stream in &self.streams.0 {
            let (name, namespace) = (stream.name, stream.namespace);
            let (part, _) = self.part(name, namespace).expect("removed bundles end their streams");
            assert_eq!(stream.id, part.id, "{name} {namespace}: replaced bundles end their streams");
            let head = part.head().borrow().clone().expect("bundle is live");
            assert_eq!(stream.applied, head.view.revision, "{name} {namespace}: stream is at the head");
        }
    }
}
