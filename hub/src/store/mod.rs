//! Cache of watched objects, shared by all bundles. A subscription queues changed keys and reads objects when it drains,
//! so a slow bundle uses bounded memory.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use opa_hub_proto::path::DirPath;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;

use crate::health::Health;
use crate::model::{
    ALLOCATION_BYTES, COMMIT_EVENTS_MAX, Change, Event, InputId, Object, ObjectKey, Replicated, Told,
    Version, WatchId, WatchSet, WatchSpec,
};

/// Time without contact after which a watch is stale.
pub const STALE_AFTER: Duration = Duration::from_secs(30);

/// Cache of watched objects.
pub struct Store {
    state: Mutex<State>,
    wanted: watch::Sender<BTreeMap<WatchId, WatchSpec>>,
    readiness: Health,
}

#[derive(Default)]
struct State {
    watches: BTreeMap<WatchId, WatchCache>,
    watches_created: usize,
    queues: BTreeMap<usize, ChangeQueue>,
    queues_created: usize,
}

/// Statistics of a watch.
#[derive(Default)]
pub struct Counters {
    /// Number of apply and delete events.
    pub events: AtomicU64,
    /// Number of objects.
    pub objects: AtomicU64,
    last_contact: Mutex<Option<Instant>>,
    /// Time of the last denial. `None` after other contact.
    denied_at: Mutex<Option<Instant>>,
}

/// Drained changes of a subscription.
pub struct ChangeBatch {
    /// Changes with current objects.
    pub changes: Vec<Change>,
    /// Versions reached, by watch. `None` if more changes are queued.
    pub all: Option<BTreeMap<InputId, Version>>,
    /// Upper bound of versions.
    pub newest: BTreeMap<InputId, Version>,
}

struct WatchCache {
    spec: WatchSpec,
    objects: HashMap<ObjectKey, Object>,
    /// Keys in the current list.
    list_keys: Option<HashSet<ObjectKey>>,
    /// Changes of the current list, applied at its end.
    list_updates: HashMap<ObjectKey, Object>,
    is_list_retry: bool,
    /// `None` before the first result.
    is_synced: Option<bool>,
    /// The last response was 403 or 404.
    is_denied: bool,
    version: Option<Version>,
    counters: Arc<Counters>,
    subscribers: Vec<(usize, InputId)>,
}

/// Deduplicating queue of one subscription.
#[derive(Default)]
struct ChangeQueue {
    watches: BTreeMap<InputId, (WatchId, Option<DirPath>)>,
    keys: VecDeque<(InputId, ObjectKey)>,
    queued: HashSet<(InputId, ObjectKey)>,
    notify: Arc<Notify>,
}

/// Watches of one bundle. Dropping unsubscribes.
pub struct Subscription {
    store: Arc<Store>,
    id: usize,
    notify: Arc<Notify>,
}

impl Store {
    /// Creates an empty store.
    pub fn new(readiness: Health) -> Self {
        Self { state: Mutex::default(), wanted: watch::Sender::default(), readiness }
    }

    /// Subscribes to the set of watches.
    pub fn wanted(&self) -> WatchSet {
        self.wanted.subscribe()
    }

    /// Applies events until the channel closes. Blocks its thread.
    pub fn run(&self, mut events: mpsc::Receiver<Told>) {
        let mut batch = Vec::new();
        while futures::executor::block_on(events.recv_many(&mut batch, COMMIT_EVENTS_MAX)) > 0 {
            batch.drain(..).for_each(|event| self.apply(event));
        }
    }

    /// Applies one event and notifies subscribers. A list takes effect at its end (I5).
    pub fn apply(&self, (id, event, version): Told) {
        let mut state = self.state();
        let State { watches, queues, .. } = &mut *state;
        let Some(cache) = watches.get_mut(&id) else { return };
        let is_end = matches!(event, Event::InitDone | Event::Failed);
        if event == Event::InitDone {
            self.readiness.for_watch(id).ready(&cache.spec.to_string());
        }
        let was_denied = cache.is_denied;
        let advances = cache.record_contact(&event, version) || cache.is_denied != was_denied;
        let changed = cache.apply(event);
        cache.counters.objects.store(cache.objects.len() as u64, Ordering::Relaxed);
        for (subscriber, feed) in &cache.subscribers {
            let Some(queue) = queues.get_mut(subscriber) else { continue };
            for key in &changed {
                queue.push(*feed, key);
            }
            if is_end || advances || !changed.is_empty() {
                queue.notify.notify_one();
            }
        }
    }

    /// Creates a subscription without watches.
    pub fn subscribe(self: &Arc<Self>) -> Subscription {
        let mut state = self.state();
        state.queues_created += 1;
        let id = state.queues_created;
        let queue = ChangeQueue::default();
        let notify = Arc::clone(&queue.notify);
        state.queues.insert(id, queue);
        Subscription { store: Arc::clone(self), id, notify }
    }

    /// Bytes of objects and of queues.
    pub fn memory(&self) -> (usize, usize) {
        let state = self.state();
        let key_bytes = |key: &ObjectKey| key.namespace.len() + key.name.len() + 2 * ALLOCATION_BYTES;
        let objects = state.watches.values().map(|cache| {
            let maps = [&cache.objects, &cache.list_updates];
            let maps = maps.map(|map| {
                let bytes =
                    map.values().map(|object| object.json.len() + ALLOCATION_BYTES + key_bytes(&object.key));
                bytes.sum::<usize>() + map.capacity() * size_of::<(ObjectKey, Object)>()
            });
            let list_keys = cache.list_keys.as_ref().map_or(0, HashSet::capacity);
            maps.into_iter().sum::<usize>() + list_keys * size_of::<ObjectKey>()
        });
        let queues = state.queues.values().map(|queue| {
            (queue.keys.capacity() + queue.queued.capacity()) * size_of::<(InputId, ObjectKey)>()
        });
        (objects.sum(), queues.sum())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unsubscribe_watch(&self, state: &mut State, subscriber: usize, feed: InputId, id: WatchId) {
        let Some(cache) = state.watches.get_mut(&id) else { return };
        cache.subscribers.retain(|other| *other != (subscriber, feed));
        if cache.subscribers.is_empty() {
            let name = cache.spec.to_string();
            state.watches.remove(&id);
            self.wanted.send_modify(|wanted| _ = wanted.remove(&id));
            let readiness = self.readiness.for_watch(id);
            readiness.ready(&name);
            readiness.problem(&name, None);
        }
    }
}

impl State {
    /// If the source has versions, a watch neither listed nor denied is at 0.
    fn versions(&self, subscriber: usize) -> BTreeMap<InputId, Version> {
        let unlisted = self.watches.values().find_map(|cache| cache.version).map(|_| Version(0));
        let version = |watch| {
            let cache: &WatchCache = self.watches.get(watch)?;
            cache.version.or_else(|| unlisted.filter(|_| !cache.is_denied))
        };
        let watches = self.queues.get(&subscriber).into_iter().flat_map(|queue| &queue.watches);
        watches.filter_map(|(id, (watch, _))| Some((*id, version(watch)?))).collect()
    }
}

impl WatchCache {
    fn new(spec: WatchSpec) -> Self {
        let counters = Counters { last_contact: Mutex::new(Some(Instant::now())), ..Counters::default() };
        Self {
            spec,
            objects: HashMap::new(),
            list_keys: None,
            list_updates: HashMap::new(),
            is_list_retry: false,
            is_synced: None,
            is_denied: false,
            version: None,
            counters: Arc::new(counters),
            subscribers: Vec::new(),
        }
    }

    fn is_listed(&self) -> bool {
        self.is_synced == Some(true)
    }

    /// Returns whether the version advanced. Lists advance at their end.
    fn record_contact(&mut self, event: &Event, version: Option<Version>) -> bool {
        if matches!(event, Event::Init | Event::Failed) {
            return false;
        }
        self.is_denied = *event == Event::Denied;
        *self.counters.denied_at.lock().unwrap_or_else(PoisonError::into_inner) =
            self.is_denied.then(Instant::now);
        let mut last_contact = self.counters.last_contact.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_denied {
            // Nothing becomes stale without objects.
            *last_contact = last_contact.filter(|_| self.is_listed());
            return false;
        }
        let is_in_list = self.list_keys.is_some() && *event != Event::InitDone;
        if is_in_list && self.is_list_retry {
            // Incomplete lists prove nothing.
            return false;
        }
        *last_contact = Some(Instant::now());
        drop(last_contact);
        let advances = !is_in_list && version.is_some() && version != self.version;
        if advances {
            self.version = version;
        }
        advances
    }

    /// Returns the keys of changed objects.
    fn apply(&mut self, event: Event) -> Vec<ObjectKey> {
        if matches!(event, Event::Apply(_) | Event::Delete(_)) {
            self.counters.events.fetch_add(1, Ordering::Relaxed);
        }
        match event {
            Event::Failed => {
                self.is_synced.get_or_insert(false);
                self.is_list_retry |= self.list_keys.is_some();
                (self.list_keys, self.list_updates) = (None, HashMap::new());
                Vec::new()
            }
            Event::Bookmark | Event::Denied => Vec::new(),
            Event::Init => {
                self.is_list_retry |= self.list_keys.is_some();
                (self.list_keys, self.list_updates) = (Some(HashSet::new()), HashMap::new());
                Vec::new()
            }
            Event::Apply(mut object) => {
                let key = object.key.clone();
                let current = self.list_updates.get(&key).or_else(|| self.objects.get(&key));
                let is_unchanged = current.is_some_and(|current| current.json == object.json);
                let listed = self.list_keys.as_mut().map(|keys| keys.insert(key.clone()));
                if is_unchanged {
                    return Vec::new();
                }
                // Copying avoids fragmentation of decoding threads' heaps: 40 MB with 30,000 pods.
                if object.json.is_unique() {
                    object.json = Bytes::copy_from_slice(&object.json);
                }
                if listed.is_some() {
                    self.list_updates.insert(key, object);
                    return Vec::new();
                }
                self.objects.insert(key.clone(), object);
                vec![key]
            }
            Event::Delete(key) => {
                if let Some(keys) = &mut self.list_keys {
                    keys.remove(&key);
                    self.list_updates.remove(&key);
                    return Vec::new();
                }
                self.objects.remove(&key).map(|_| key).into_iter().collect()
            }
            Event::InitDone => {
                (self.is_synced, self.is_list_retry) = (Some(true), false);
                let Some(keys) = self.list_keys.take() else { return Vec::new() };
                let updates = std::mem::take(&mut self.list_updates);
                let removed = self.objects.keys().filter(|key| !keys.contains(*key));
                let mut changed: Vec<_> = updates.keys().chain(removed).cloned().collect();
                changed.sort_unstable();
                self.objects.retain(|key, _| keys.contains(key));
                if self.objects.is_empty() {
                    self.objects = updates;
                } else {
                    self.objects.extend(updates);
                }
                changed
            }
        }
    }
}

impl Counters {
    /// Time without contact. `None` unless stale.
    pub fn stale(&self) -> Option<Duration> {
        let last_contact = *self.last_contact.lock().unwrap_or_else(PoisonError::into_inner);
        last_contact.map(|contact| contact.elapsed()).filter(|silence| *silence > STALE_AFTER)
    }

    /// Whether the source keeps denying the watch, as for other replicas.
    pub fn is_refused(&self) -> bool {
        let denied_at = *self.denied_at.lock().unwrap_or_else(PoisonError::into_inner);
        denied_at.is_some_and(|denied_at| denied_at.elapsed() < STALE_AFTER)
    }
}

impl ChangeQueue {
    fn push(&mut self, feed: InputId, key: &ObjectKey) {
        if self.queued.insert((feed, key.clone())) {
            self.keys.push_back((feed, key.clone()));
        }
    }
}

impl Subscription {
    /// Subscribes to `feed` as `id`.
    pub fn open(&self, id: InputId, feed: &WatchSpec) -> Arc<Counters> {
        let mut state = self.store.state();
        let State { watches, watches_created, queues, .. } = &mut *state;
        let existing = watches.iter().find(|(_, cache)| cache.spec.selects_as(feed)).map(|(id, _)| *id);
        let watch = existing.unwrap_or_else(|| {
            *watches_created += 1;
            WatchId(*watches_created - 1)
        });
        let cache = watches.entry(watch).or_insert_with(|| WatchCache::new(feed.clone()));
        cache.subscribers.push((self.id, id));
        if let Some(queue) = queues.get_mut(&self.id) {
            queue.watches.insert(id, (watch, feed.place().cloned()));
            let mut keys: Vec<_> = cache.objects.keys().collect();
            keys.sort_unstable();
            for key in keys {
                queue.push(id, key);
            }
            queue.notify.notify_one();
        }
        if existing.is_none() {
            self.store.wanted.send_modify(|wanted| _ = wanted.insert(watch, feed.clone()));
        }
        Arc::clone(&cache.counters)
    }

    /// Makes readiness depend on unlisted watches.
    pub fn gate(&self) {
        let state = self.store.state();
        let ids = state.queues.get(&self.id).into_iter().flat_map(|queue| queue.watches.values());
        let watches = ids.filter_map(|(id, _)| Some((*id, state.watches.get(id)?)));
        for (id, cache) in watches.filter(|(_, cache)| !cache.is_listed()) {
            self.store.readiness.for_watch(id).pending(&cache.spec.to_string(), "not listed yet");
        }
    }

    /// Unsubscribes from a watch.
    pub fn close(&self, id: InputId) {
        let mut state = self.store.state();
        let Some(queue) = state.queues.get_mut(&self.id) else { return };
        let Some((watch, _)) = queue.watches.remove(&id) else { return };
        queue.keys.retain(|(feed, _)| *feed != id);
        queue.queued.retain(|(feed, _)| *feed != id);
        self.store.unsubscribe_watch(&mut state, self.id, id, watch);
    }

    /// Waits for possible changes.
    pub async fn changed(&self) {
        self.notify.notified().await;
    }

    /// Drains up to `max` changes.
    pub fn take(&self, max: usize) -> ChangeBatch {
        let mut state = self.store.state();
        let newest = state.versions(self.id);
        let State { watches, queues, .. } = &mut *state;
        let mut changes = Vec::new();
        let Some(queue) = queues.get_mut(&self.id) else { return ChangeBatch { changes, all: None, newest } };
        while changes.len() < max {
            let Some(changed) = queue.keys.pop_front() else {
                return ChangeBatch { changes, all: Some(newest.clone()), newest };
            };
            queue.queued.remove(&changed);
            let (feed, key) = changed;
            let cache = queue.watches.get(&feed).and_then(|(watch, _)| watches.get(watch));
            changes.push(match cache.and_then(|cache| cache.objects.get(&key)) {
                Some(object) => Change::Put(feed, object.clone()),
                None => Change::Remove(feed, key),
            });
        }
        queue.notify.notify_one();
        ChangeBatch { changes, all: None, newest }
    }

    /// Upper bound of versions, by watch.
    pub fn newest(&self) -> BTreeMap<InputId, Version> {
        self.store.state().versions(self.id)
    }

    /// Whether every watch completed a list.
    pub fn is_listed(&self) -> bool {
        self.all_watches(WatchCache::is_listed)
    }

    /// Whether every watch completed or failed a list.
    pub fn is_settled(&self) -> bool {
        self.all_watches(|cache| cache.is_synced.is_some())
    }

    fn all_watches(&self, predicate: impl Fn(&WatchCache) -> bool) -> bool {
        let state = self.store.state();
        let mut watches = state.queues.get(&self.id).into_iter().flat_map(|queue| queue.watches.values());
        watches.all(|(watch, _)| state.watches.get(watch).is_some_and(&predicate))
    }

    /// Returns all objects, unordered, and clears the queue.
    pub fn start(&self) -> Vec<(InputId, Object)> {
        let mut state = self.store.state();
        let State { watches, queues, .. } = &mut *state;
        let Some(queue) = queues.get_mut(&self.id) else { return Vec::new() };
        (queue.keys, queue.queued) = Default::default();
        let caches = queue.watches.iter().filter_map(|(id, (watch, _))| Some((*id, watches.get(watch)?)));
        caches
            .flat_map(|(id, cache)| cache.objects.values().map(move |object| (id, object.clone())))
            .collect()
    }

    /// Objects of these watches, sorted, so that size limits are deterministic.
    pub fn objects_of(&self, feeds: &BTreeSet<InputId>) -> Vec<(InputId, Object)> {
        let state = self.store.state();
        let Some(queue) = state.queues.get(&self.id) else { return Vec::new() };
        let caches = feeds.iter().filter_map(|id| Some((*id, state.watches.get(&queue.watches.get(id)?.0)?)));
        let objects = |(id, cache): (InputId, &WatchCache)| {
            cache.objects.values().map(move |object| (id, object.clone())).collect::<Vec<_>>()
        };
        let mut objects: Vec<_> = caches.flat_map(objects).collect();
        objects.sort_unstable_by(|(id, one), (other_id, other)| (id, &one.key).cmp(&(other_id, &other.key)));
        objects
    }

    /// Returns a function that computes [`newest`](Self::newest).
    pub fn newest_by_feed(&self) -> impl Fn() -> BTreeMap<InputId, Version> + Send + Sync + 'static {
        let (store, subscriber) = (Arc::clone(&self.store), self.id);
        move || store.state().versions(subscriber)
    }

    /// Returns a function that lists replicated objects, unordered.
    pub fn replicated(&self) -> impl Fn() -> Replicated + Send + Sync + 'static {
        let (store, subscriber) = (Arc::clone(&self.store), self.id);
        move || {
            let state = store.state();
            let watches = state.queues.get(&subscriber).into_iter().flat_map(|queue| queue.watches.values());
            let mut replicated = Replicated::default();
            for (watch, path) in watches {
                let (Some(path), Some(cache)) = (path, state.watches.get(watch)) else { continue };
                replicated.places.insert(path.clone());
                replicated
                    .objects
                    .extend(cache.objects.values().map(|object| (path.clone(), object.clone())));
            }
            replicated
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut state = self.store.state();
        let watches = state.queues.remove(&self.id).map(|queue| queue.watches).unwrap_or_default();
        for (id, (watch, _)) in watches {
            self.store.unsubscribe_watch(&mut state, self.id, id, watch);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Content;
    use crate::model::{NamespaceSelector, Resource};

    fn feed() -> WatchSpec {
        WatchSpec {
            resource: Resource::configmaps(),
            scope: NamespaceSelector::ClusterScoped,
            labels: Vec::new(),
            content: Content::Data,
        }
    }

    fn send(store: &Store, id: WatchId, script: &str) {
        let key = |name: &str| ObjectKey { namespace: "".into(), name: name.into() };
        for word in script.split_whitespace() {
            let event = match word.split_once('=') {
                _ if word == "[" => Event::Init,
                _ if word == "]" => Event::InitDone,
                Some((name, value)) => Event::Apply(Object { key: key(name), json: value.to_owned().into() }),
                None => Event::Delete(key(word.trim_start_matches('-'))),
            };
            store.apply((id, event, None));
        }
    }

    fn drain(subscription: &Subscription) -> String {
        let to_word = |change| match change {
            Change::Put(_, object) => format!("{}={}", object.key, String::from_utf8_lossy(&object.json)),
            Change::Remove(_, key) => format!("-{key}"),
        };
        subscription.take(usize::MAX).changes.into_iter().map(to_word).collect::<Vec<_>>().join(" ")
    }

    /// Runs a script: `[` Init, `]` InitDone, `a=1` Apply, `-a` Delete.
    fn check(script: &str, each: &str, at_end: &str) {
        let store = Arc::new(Store::new(Health::default()));
        let (one, other) = (store.subscribe(), store.subscribe());
        one.open(InputId(0), &feed());
        other.open(InputId(0), &feed());
        let mut changes = Vec::new();
        for word in script.split_whitespace() {
            send(&store, WatchId(0), word);
            changes.push(drain(&one));
        }
        changes.retain(|words| !words.is_empty());
        assert_eq!(changes.join(" "), each, "{script}");
        assert_eq!(drain(&other), at_end, "{script}");
    }

    #[test]
    fn lists_and_watches_yield_only_changes() {
        check("[ a=1 b=1 ] a=1 a=2 -b -b", "a=1 b=1 a=2 -b", "a=2 -b");
        check("[ a=1 b=1 c=1 ] [ b=1 c=2 ]", "a=1 b=1 c=1 -a c=2", "-a b=1 c=2");
        check("[ a=1 ] [ a=2 b=1", "a=1", "a=1");
        check("[ a=1 b=1 ] [ a=2 a=1 ]", "a=1 b=1 a=1 -b", "a=1 -b");
        check("[ a=1 b=1 ] [ a=1 b=2 -b ]", "a=1 b=1 -b", "a=1 -b");
        check("[ a=1 ] [ [ a=1 ]", "a=1", "a=1");
        check("[ a=1 ] [ ]", "a=1 -a", "-a");
        check("[ a=1 ] [ a=1 -a ]", "a=1 -a", "-a");
    }

    #[tokio::test(start_paused = true)]
    async fn denied_watch_becomes_stale_as_denied() {
        let store = Arc::new(Store::new(Health::default()));
        let one = store.subscribe();
        let counters = one.open(InputId(0), &feed());
        let step = STALE_AFTER / 2;
        for (event, is_stale, is_refused) in [
            (Event::InitDone, false, false),
            (Event::Denied, false, true),
            (Event::Denied, true, true),
            (Event::Failed, true, true),
            (Event::Failed, true, false),
            (Event::Bookmark, false, false),
        ] {
            tokio::time::advance(step).await;
            store.apply((WatchId(0), event.clone(), None));
            tokio::time::advance(Duration::from_secs(1)).await;
            assert_eq!(
                (counters.stale().is_some(), counters.is_refused()),
                (is_stale, is_refused),
                "{event:?}"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn unlisted_watch_is_stale_unless_denied() {
        let store = Arc::new(Store::new(Health::default()));
        let one = store.subscribe();
        let counters = one.open(InputId(0), &feed());
        tokio::time::advance(STALE_AFTER * 2).await;
        store.apply((WatchId(0), Event::Failed, None));
        assert!(counters.stale().is_some());
        store.apply((WatchId(0), Event::Denied, None));
        assert!(counters.stale().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn watch_with_incomplete_lists_becomes_stale() {
        let store = Arc::new(Store::new(Health::default()));
        let one = store.subscribe();
        let counters = one.open(InputId(0), &feed());
        let step = STALE_AFTER / 3 * 2;
        for (script, is_stale) in [
            ("[ a=1 ]", false),
            ("[ a=1", false),
            ("[ a=1 b=1", false),
            ("[ a=1", true),
            ("a=1", true),
            ("]", false),
        ] {
            tokio::time::advance(step).await;
            send(&store, WatchId(0), script);
            assert_eq!(counters.stale().is_some(), is_stale, "{script}");
        }
    }

    #[test]
    fn watches_of_one_name_have_separate_readiness() {
        let readiness = Health::default();
        let store = Arc::new(Store::new(readiness.clone()));
        let one = store.subscribe();
        let other = WatchSpec { scope: NamespaceSelector::AllExcept { ignored: Vec::new() }, ..feed() };
        let name = feed().to_string();
        assert_eq!(other.to_string(), name);
        one.open(InputId(0), &feed());
        one.open(InputId(1), &other);
        one.gate();
        let other_readiness = readiness.for_watch(WatchId(1));
        other_readiness.failing(&name, "forbidden");
        let pending = || readiness.pendings().into_values().collect::<Vec<_>>();
        assert_eq!(pending(), ["not listed yet; forbidden"]);
        store.apply((WatchId(0), Event::InitDone, None));
        assert_eq!(pending(), ["forbidden"]);
        one.close(InputId(0));
        assert_eq!(pending(), ["forbidden"]);
        store.apply((WatchId(1), Event::InitDone, None));
        assert!(pending().is_empty());
        one.open(InputId(2), &feed());
        other_readiness.failing(&name, "watch failed");
        one.close(InputId(2));
        assert_eq!(readiness.problems().len(), 1);
        one.close(InputId(1));
        assert!(readiness.problems().is_empty());
    }

    #[test]
    fn only_denied_watch_has_no_version() {
        let store = Arc::new(Store::new(Health::default()));
        let one = store.subscribe();
        one.open(InputId(0), &feed());
        one.open(InputId(1), &WatchSpec { scope: NamespaceSelector::Only("x".into()), ..feed() });
        store.apply((WatchId(0), Event::InitDone, Some(Version(5))));
        for (event, version, expected) in [
            (Event::Failed, None, Some(Version(0))),
            (Event::Denied, None, None),
            (Event::Failed, None, None),
            (Event::Init, None, None),
            (Event::InitDone, Some(Version(7)), Some(Version(7))),
            (Event::Failed, None, Some(Version(7))),
        ] {
            store.apply((WatchId(1), event.clone(), version));
            assert_eq!(one.newest().get(&InputId(1)).copied(), expected, "{event:?}");
        }
    }

    #[test]
    fn equal_selections_share_a_watch_until_the_last_closes() {
        let store = Arc::new(Store::new(Health::default()));
        let wanted = store.wanted();
        let watches = || wanted.borrow().keys().map(|id| id.0).collect::<Vec<_>>();
        let (one, other) = (store.subscribe(), store.subscribe());
        one.open(InputId(7), &feed());
        send(&store, WatchId(0), "[ a=1 ]");
        other.open(InputId(0), &WatchSpec { content: Content::PolicyRegistry, ..feed() });
        assert_eq!((watches(), drain(&other).as_str()), (vec![0], "a=1"));
        assert!(other.is_listed(), "the shared watch is listed");
        other.open(InputId(1), &WatchSpec { scope: NamespaceSelector::Only("x".into()), ..feed() });
        assert_eq!(watches(), [0, 1]);
        assert!(!other.is_listed() && one.is_listed());
        one.close(InputId(7));
        assert_eq!(watches(), [0, 1]);
        drop(other);
        assert!(watches().is_empty());
        one.open(InputId(8), &feed());
        assert_eq!(watches(), [2], "late events of a closed watch are ignored");
        send(&store, WatchId(0), "b=1");
        assert_eq!(drain(&one), "");
    }
}
