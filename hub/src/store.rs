//! The live objects of every watch, once for all bundles, which subscribe. Events become changes: an object that came
//! again unchanged is silence, and what a list no longer names is removed. A subscriber is told which objects changed,
//! and looks here what they are: however slow it is, nothing queues up behind it.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use opa_hub_proto::path::DirPath;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;

use crate::config::{COMMIT_EVENTS_MAX, STALE_AFTER};
use crate::model::{Change, Content, Event, Feed, FeedId, Object, ObjectKey, Replicated, Version, WatchId};
use crate::readiness::Readiness;
use crate::source::Told;

/// Bytes that the allocator and a reference count take for each allocation.
pub const ALLOCATION_BYTES: usize = 32;

/// The watches that somebody needs now, each as the first of its feeds says it.
pub type Wanted = watch::Receiver<BTreeMap<WatchId, Feed>>;

/// See the module's text.
pub struct Store {
    state: Mutex<State>,
    wanted: watch::Sender<BTreeMap<WatchId, Feed>>,
    readiness: Readiness,
}

#[derive(Default)]
struct State {
    watches: BTreeMap<WatchId, Live>,
    watches_ever: usize,
    inboxes: BTreeMap<usize, Inbox>,
    inboxes_ever: usize,
}

/// What a watch told.
#[derive(Default)]
pub struct Counters {
    /// Objects that it said exist, changed or are gone.
    pub events: AtomicU64,
    /// Objects that exist.
    pub objects: AtomicU64,
    heard: Mutex<Option<Instant>>,
    /// When it said no, if nothing else was heard since.
    refused: Mutex<Option<Instant>>,
}

/// What changed for a subscriber.
pub struct Taken {
    /// Each object as it is now.
    pub changes: Vec<Change>,
    /// How far each feed is with that, where its source can tell; none: there is more to take.
    pub all: Option<BTreeMap<FeedId, Version>>,
    /// How new the newest of it may be.
    pub newest: BTreeMap<FeedId, Version>,
}

/// One watch.
struct Live {
    feed: Feed,
    objects: HashMap<ObjectKey, Object>,
    /// Names that the list under way has given so far.
    listing: Option<HashSet<ObjectKey>>,
    /// What the list under way changed so far: taken at its end, since half of it is as of no version.
    staged: HashMap<ObjectKey, Object>,
    /// The list under way repeats one that broke off.
    repeats_list: bool,
    /// Whether a list is complete; `None` before the first one is, or has failed.
    listed: Option<bool>,
    /// The last word was that there is none of it, or none for us.
    denied: bool,
    /// How far it is.
    version: Option<Version>,
    counters: Arc<Counters>,
    /// Whose feeds it serves.
    readers: Vec<(usize, FeedId)>,
}

/// What a subscriber has still to look at.
#[derive(Default)]
struct Inbox {
    feeds: BTreeMap<FeedId, (WatchId, Option<DirPath>)>,
    changed: VecDeque<(FeedId, ObjectKey)>,
    /// The same, to name each once.
    waiting: HashSet<(FeedId, ObjectKey)>,
    news: Arc<Notify>,
}

/// Some watches as one bundle sees them. Those that nobody else needs end with it.
pub struct Subscription {
    store: Arc<Store>,
    id: usize,
    news: Arc<Notify>,
}

impl Store {
    /// An empty store.
    pub fn new(readiness: Readiness) -> Self {
        Self { state: Mutex::default(), wanted: watch::Sender::default(), readiness }
    }

    /// What is wanted, from now on.
    pub fn wanted(&self) -> Wanted {
        self.wanted.subscribe()
    }

    /// Takes events until the sources are gone. Blocks its thread.
    pub fn run(&self, mut events: mpsc::Receiver<Told>) {
        let mut waiting = Vec::new();
        while futures::executor::block_on(events.recv_many(&mut waiting, COMMIT_EVENTS_MAX)) > 0 {
            waiting.drain(..).for_each(|told| self.apply(told));
        }
    }

    /// Takes one event. What a list changed is told at its end, not before: readers keep what they had (I5). What nobody
    /// wants any more is passed over.
    pub fn apply(&self, (id, event, version): Told) {
        let mut state = self.state();
        let State { watches, inboxes, .. } = &mut *state;
        let Some(live) = watches.get_mut(&id) else { return };
        let is_end = matches!(event, Event::InitDone | Event::Unavailable);
        if event == Event::InitDone {
            self.readiness.for_watch(id).ready(&live.feed.to_string());
        }
        let denied = live.denied;
        let advances = live.hear(&event, version) || live.denied != denied;
        let changed = live.take(event);
        live.counters.objects.store(live.objects.len() as u64, Ordering::Relaxed);
        for (reader, feed) in &live.readers {
            let Some(inbox) = inboxes.get_mut(reader) else { continue };
            for key in &changed {
                inbox.tell(*feed, key);
            }
            if is_end || advances || !changed.is_empty() {
                inbox.news.notify_one();
            }
        }
    }

    /// A subscriber of nothing yet.
    pub fn subscribe(self: &Arc<Self>) -> Subscription {
        let mut state = self.state();
        state.inboxes_ever += 1;
        let id = state.inboxes_ever;
        let inbox = Inbox::default();
        let news = Arc::clone(&inbox.news);
        state.inboxes.insert(id, inbox);
        Subscription { store: Arc::clone(self), id, news }
    }

    /// Bytes of the objects of all watches, and of the queues of all subscribers.
    pub fn memory(&self) -> (usize, usize) {
        let state = self.state();
        let text = |key: &ObjectKey| key.namespace.len() + key.name.len() + 2 * ALLOCATION_BYTES;
        let objects = state.watches.values().map(|live| {
            let maps = [&live.objects, &live.staged];
            let maps = maps.map(|map| {
                let all = map.values().map(|object| object.json.len() + ALLOCATION_BYTES + text(&object.key));
                all.sum::<usize>() + map.capacity() * size_of::<(ObjectKey, Object)>()
            });
            let listing = live.listing.as_ref().map_or(0, HashSet::capacity);
            maps.into_iter().sum::<usize>() + listing * size_of::<ObjectKey>()
        });
        let queues = state.inboxes.values().map(|inbox| {
            (inbox.changed.capacity() + inbox.waiting.capacity()) * size_of::<(FeedId, ObjectKey)>()
        });
        (objects.sum(), queues.sum())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leave(&self, state: &mut State, reader: usize, feed: FeedId, id: WatchId) {
        let Some(live) = state.watches.get_mut(&id) else { return };
        live.readers.retain(|held| *held != (reader, feed));
        if live.readers.is_empty() {
            let name = live.feed.to_string();
            state.watches.remove(&id);
            self.wanted.send_modify(|wanted| _ = wanted.remove(&id));
            let readiness = self.readiness.for_watch(id);
            readiness.ready(&name);
            readiness.problem(&name, None);
        }
    }
}

impl State {
    /// Of the feeds of a subscriber. Where the source has versions at all, nothing was heard yet of a feed that has none,
    /// unless there is none of it, or none for us.
    fn versions(&self, reader: usize) -> BTreeMap<FeedId, Version> {
        let nothing = self.watches.values().find_map(|live| live.version).map(|_| Version(0));
        let live = |watch| {
            let live: &Live = self.watches.get(watch)?;
            live.version.or_else(|| nothing.filter(|_| !live.denied))
        };
        let feeds = self.inboxes.get(&reader).into_iter().flat_map(|inbox| &inbox.feeds);
        feeds.filter_map(|(id, (watch, _))| Some((*id, live(watch)?))).collect()
    }
}

impl Live {
    /// Silence counts from here.
    fn new(feed: Feed) -> Self {
        let counters = Counters { heard: Mutex::new(Some(Instant::now())), ..Counters::default() };
        Self {
            feed,
            objects: HashMap::new(),
            listing: None,
            staged: HashMap::new(),
            repeats_list: false,
            listed: None,
            denied: false,
            version: None,
            counters: Arc::new(counters),
            readers: Vec::new(),
        }
    }

    fn is_listed(&self) -> bool {
        self.listed == Some(true)
    }

    /// Whether it is further now. A list is not, before its end.
    fn hear(&mut self, event: &Event, version: Option<Version>) -> bool {
        if matches!(event, Event::Init | Event::Unavailable) {
            return false;
        }
        let is_refused = *event == Event::Refused;
        self.denied = is_refused;
        *self.counters.refused.lock().unwrap_or_else(PoisonError::into_inner) = is_refused.then(Instant::now);
        let mut heard = self.counters.heard.lock().unwrap_or_else(PoisonError::into_inner);
        if is_refused {
            // What was never given grows no older.
            *heard = heard.filter(|_| self.is_listed());
            return false;
        }
        let lists = self.listing.is_some() && *event != Event::InitDone;
        if lists && self.repeats_list {
            // A list that breaks off again and again changes nothing.
            return false;
        }
        *heard = Some(Instant::now());
        drop(heard);
        let advances = !lists && version.is_some() && version != self.version;
        if advances {
            self.version = version;
        }
        advances
    }

    /// The objects of which something changed.
    fn take(&mut self, event: Event) -> Vec<ObjectKey> {
        if matches!(event, Event::Apply(_) | Event::Delete(_)) {
            self.counters.events.fetch_add(1, Ordering::Relaxed);
        }
        match event {
            Event::Unavailable => {
                self.listed.get_or_insert(false);
                self.repeats_list |= self.listing.is_some();
                // The next list begins anew.
                (self.listing, self.staged) = (None, HashMap::new());
                Vec::new()
            }
            Event::Quiet | Event::Refused => Vec::new(),
            Event::Init => {
                self.repeats_list |= self.listing.is_some();
                (self.listing, self.staged) = (Some(HashSet::new()), HashMap::new());
                Vec::new()
            }
            Event::Apply(mut object) => {
                let key = object.key.clone();
                let held = self.staged.get(&key).or_else(|| self.objects.get(&key));
                let is_same = held.is_some_and(|held| held.json == object.json);
                let listing = self.listing.as_mut().map(|listing| listing.insert(key.clone()));
                if is_same {
                    return Vec::new();
                }
                // Made by a thread that decodes, where what stays lies scattered among what goes: with 30,000 pods that
                // takes the hub 40 MB more. This thread makes little that goes.
                if object.json.is_unique() {
                    object.json = Bytes::copy_from_slice(&object.json);
                }
                if listing.is_some() {
                    self.staged.insert(key, object);
                    return Vec::new();
                }
                self.objects.insert(key.clone(), object);
                vec![key]
            }
            Event::Delete(key) => {
                if let Some(listing) = &mut self.listing {
                    listing.remove(&key);
                    self.staged.remove(&key);
                    return Vec::new();
                }
                self.objects.remove(&key).map(|_| key).into_iter().collect()
            }
            Event::InitDone => {
                (self.listed, self.repeats_list) = (Some(true), false);
                let Some(listed) = self.listing.take() else { return Vec::new() };
                let staged = std::mem::take(&mut self.staged);
                let gone = self.objects.keys().filter(|key| !listed.contains(*key));
                let mut changed: Vec<_> = staged.keys().chain(gone).cloned().collect();
                changed.sort_unstable();
                self.objects.retain(|key, _| listed.contains(key));
                if self.objects.is_empty() {
                    self.objects = staged;
                } else {
                    self.objects.extend(staged);
                }
                changed
            }
        }
    }
}

impl Counters {
    /// For how long nothing was heard, where that is too long to trust what was heard before.
    pub fn stale(&self) -> Option<Duration> {
        let heard = *self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.map(|heard| heard.elapsed()).filter(|silent| *silent > STALE_AFTER)
    }

    /// Whether that is because the source says no, again and again. So it does to every replica.
    pub fn is_refused(&self) -> bool {
        let refused = *self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        refused.is_some_and(|refused| refused.elapsed() < STALE_AFTER)
    }
}

impl Inbox {
    fn tell(&mut self, feed: FeedId, key: &ObjectKey) {
        if self.waiting.insert((feed, key.clone())) {
            self.changed.push_back((feed, key.clone()));
        }
    }
}

impl Subscription {
    /// Takes what `feed` selects as its feed `id`.
    pub fn open(&self, id: FeedId, feed: &Feed) -> Arc<Counters> {
        let mut state = self.store.state();
        let State { watches, watches_ever, inboxes, .. } = &mut *state;
        let held = watches.iter().find(|(_, live)| live.feed.selects_as(feed)).map(|(id, _)| *id);
        let watch = held.unwrap_or_else(|| {
            *watches_ever += 1;
            WatchId(*watches_ever - 1)
        });
        let live = watches.entry(watch).or_insert_with(|| Live::new(feed.clone()));
        live.readers.push((self.id, id));
        if let Some(inbox) = inboxes.get_mut(&self.id) {
            inbox.feeds.insert(id, (watch, feed.place().cloned()));
            let mut keys: Vec<_> = live.objects.keys().collect();
            keys.sort_unstable();
            for key in keys {
                inbox.tell(id, key);
            }
            inbox.news.notify_one();
        }
        if held.is_none() {
            self.store.wanted.send_modify(|wanted| _ = wanted.insert(watch, feed.clone()));
        }
        Arc::clone(&live.counters)
    }

    /// Whoever asks whether the hub is ready is told of those that were not listed yet.
    pub fn gate(&self) {
        let state = self.store.state();
        let feeds = state.inboxes.get(&self.id).into_iter().flat_map(|inbox| inbox.feeds.values());
        let watches = feeds.filter_map(|(id, _)| Some((*id, state.watches.get(id)?)));
        for (id, live) in watches.filter(|(_, live)| !live.is_listed()) {
            self.store.readiness.for_watch(id).pending(&live.feed.to_string(), "not listed yet");
        }
    }

    /// Gives up a feed, and all changes of it that were not taken.
    pub fn close(&self, id: FeedId) {
        let mut state = self.store.state();
        let Some(inbox) = state.inboxes.get_mut(&self.id) else { return };
        let Some((watch, _)) = inbox.feeds.remove(&id) else { return };
        inbox.changed.retain(|(feed, _)| *feed != id);
        inbox.waiting.retain(|(feed, _)| *feed != id);
        self.store.leave(&mut state, self.id, id, watch);
    }

    /// Waits until something may be new.
    pub async fn changed(&self) {
        self.news.notified().await;
    }

    /// What changed since the last call, so many at most.
    pub fn take(&self, max: usize) -> Taken {
        let mut state = self.store.state();
        let newest = state.versions(self.id);
        let State { watches, inboxes, .. } = &mut *state;
        let mut changes = Vec::new();
        let Some(inbox) = inboxes.get_mut(&self.id) else { return Taken { changes, all: None, newest } };
        while changes.len() < max {
            let Some(changed) = inbox.changed.pop_front() else {
                return Taken { changes, all: Some(newest.clone()), newest };
            };
            inbox.waiting.remove(&changed);
            let (feed, key) = changed;
            let live = inbox.feeds.get(&feed).and_then(|(watch, _)| watches.get(watch));
            changes.push(match live.and_then(|live| live.objects.get(&key)) {
                Some(object) => Change::Put(feed, object.clone()),
                None => Change::Remove(feed, key),
            });
        }
        inbox.news.notify_one();
        Taken { changes, all: None, newest }
    }

    /// How new the newest objects of each feed may be.
    pub fn newest(&self) -> BTreeMap<FeedId, Version> {
        self.store.state().versions(self.id)
    }

    /// Whether every feed was listed once.
    pub fn is_listed(&self) -> bool {
        self.all(Live::is_listed)
    }

    /// Whether every feed was listed, or cannot be had.
    pub fn is_settled(&self) -> bool {
        self.all(|live| live.listed.is_some())
    }

    fn all(&self, is: impl Fn(&Live) -> bool) -> bool {
        let state = self.store.state();
        let feeds = state.inboxes.get(&self.id).into_iter().flat_map(|inbox| inbox.feeds.values());
        feeds.into_iter().all(|(watch, _)| state.watches.get(watch).is_some_and(&is))
    }

    /// All objects, in no order; what changed until now is among them.
    pub fn start(&self) -> Vec<(FeedId, Object)> {
        let mut state = self.store.state();
        let State { watches, inboxes, .. } = &mut *state;
        let Some(inbox) = inboxes.get_mut(&self.id) else { return Vec::new() };
        (inbox.changed, inbox.waiting) = Default::default();
        let feeds = inbox.feeds.iter().filter_map(|(id, (watch, _))| Some((*id, watches.get(watch)?)));
        feeds.flat_map(|(id, live)| live.objects.values().map(move |object| (id, object.clone()))).collect()
    }

    /// The objects of these feeds, by feed and name: which of them fit into a limit must not go by chance.
    pub fn objects_of(&self, feeds: &BTreeSet<FeedId>) -> Vec<(FeedId, Object)> {
        let state = self.store.state();
        let Some(inbox) = state.inboxes.get(&self.id) else { return Vec::new() };
        let watches = feeds.iter().filter_map(|id| Some((*id, state.watches.get(&inbox.feeds.get(id)?.0)?)));
        let objects = |(id, live): (FeedId, &Live)| {
            live.objects.values().map(move |object| (id, object.clone())).collect::<Vec<_>>()
        };
        let mut objects: Vec<_> = watches.flat_map(objects).collect();
        objects.sort_unstable_by(|(id, one), (other_id, other)| (id, &one.key).cmp(&(other_id, &other.key)));
        objects
    }

    /// Lists how new the newest objects of each feed may be.
    pub fn newest_by_feed(&self) -> impl Fn() -> BTreeMap<FeedId, Version> + Send + Sync + 'static {
        let (store, reader) = (Arc::clone(&self.store), self.id);
        move || store.state().versions(reader)
    }

    /// Lists the replicated objects, in no order; none once the subscription has ended.
    pub fn replicated(&self) -> impl Fn() -> Replicated + Send + Sync + 'static {
        let (store, reader) = (Arc::clone(&self.store), self.id);
        move || {
            let state = store.state();
            let feeds = state.inboxes.get(&reader).into_iter().flat_map(|inbox| inbox.feeds.values());
            let mut found = Replicated::default();
            for (watch, place) in feeds {
                let (Some(place), Some(live)) = (place, state.watches.get(watch)) else { continue };
                found.places.insert(place.clone());
                found.objects.extend(live.objects.values().map(|object| (place.clone(), object.clone())));
            }
            found
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut state = self.store.state();
        let feeds = state.inboxes.remove(&self.id).map(|inbox| inbox.feeds).unwrap_or_default();
        for (id, (watch, _)) in feeds {
            self.store.leave(&mut state, self.id, id, watch);
        }
    }
}

/// Whether a source may lack what `content` is made of without harm.
pub fn is_optional(content: &Content) -> bool {
    *content == Content::Bundles
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Resource, Scope};

    fn feed() -> Feed {
        Feed {
            resource: Resource::configmaps(),
            scope: Scope::Cluster,
            labels: Vec::new(),
            content: Content::Data,
        }
    }

    fn say(store: &Store, id: WatchId, script: &str) {
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

    fn heard(subscription: &Subscription) -> String {
        let said = |change| match change {
            Change::Put(_, object) => format!("{}={}", object.key, String::from_utf8_lossy(&object.json)),
            Change::Remove(_, key) => format!("-{key}"),
        };
        subscription.take(usize::MAX).changes.into_iter().map(said).collect::<Vec<_>>().join(" ")
    }

    /// Runs a script of words (`[` a list begins, `]` it is complete, `a=1` an object, `-a` a delete), taking what
    /// changed after each word or at the end, and compares it.
    fn check(script: &str, each: &str, at_end: &str) {
        let store = Arc::new(Store::new(Readiness::default()));
        let (one, other) = (store.subscribe(), store.subscribe());
        one.open(FeedId(0), &feed());
        other.open(FeedId(0), &feed());
        let mut said = Vec::new();
        for word in script.split_whitespace() {
            say(&store, WatchId(0), word);
            said.push(heard(&one));
        }
        said.retain(|said| !said.is_empty());
        assert_eq!(said.join(" "), each, "{script}");
        assert_eq!(heard(&other), at_end, "{script}");
    }

    #[test]
    fn silence_and_relists() {
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
    async fn who_says_no_is_not_silent() {
        let store = Arc::new(Store::new(Readiness::default()));
        let one = store.subscribe();
        let counters = one.open(FeedId(0), &feed());
        let step = STALE_AFTER / 2;
        for (event, is_stale, is_refused) in [
            (Event::InitDone, false, false),
            (Event::Refused, false, true),
            (Event::Refused, true, true),
            // Its last word is old, too.
            (Event::Unavailable, true, true),
            (Event::Unavailable, true, false),
            (Event::Quiet, false, false),
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
    async fn what_never_came_is_silent_unless_it_is_refused() {
        let store = Arc::new(Store::new(Readiness::default()));
        let one = store.subscribe();
        let counters = one.open(FeedId(0), &feed());
        tokio::time::advance(STALE_AFTER * 2).await;
        store.apply((WatchId(0), Event::Unavailable, None));
        assert!(counters.stale().is_some());
        store.apply((WatchId(0), Event::Refused, None));
        assert!(counters.stale().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_list_that_breaks_off_again_and_again_grows_stale() {
        let store = Arc::new(Store::new(Readiness::default()));
        let one = store.subscribe();
        let counters = one.open(FeedId(0), &feed());
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
            say(&store, WatchId(0), script);
            assert_eq!(counters.stale().is_some(), is_stale, "{script}");
        }
    }

    #[test]
    fn watches_of_one_name_become_ready_and_fail_one_by_one() {
        let readiness = Readiness::default();
        let store = Arc::new(Store::new(readiness.clone()));
        let one = store.subscribe();
        let other = Feed { scope: Scope::Namespaces { ignored: Vec::new() }, ..feed() };
        let name = feed().to_string();
        assert_eq!(other.to_string(), name);
        one.open(FeedId(0), &feed());
        one.open(FeedId(1), &other);
        one.gate();
        let of_other = readiness.for_watch(WatchId(1));
        of_other.failing(&name, "forbidden");
        let pending = || readiness.pendings().into_values().collect::<Vec<_>>();
        assert_eq!(pending(), ["not listed yet; forbidden"]);
        store.apply((WatchId(0), Event::InitDone, None));
        assert_eq!(pending(), ["forbidden"]);
        one.close(FeedId(0));
        assert_eq!(pending(), ["forbidden"]);
        store.apply((WatchId(1), Event::InitDone, None));
        assert!(pending().is_empty());
        one.open(FeedId(2), &feed());
        of_other.failing(&name, "the watch failed");
        one.close(FeedId(2));
        assert_eq!(readiness.problems().len(), 1);
        one.close(FeedId(1));
        assert!(readiness.problems().is_empty());
    }

    #[test]
    fn what_fails_is_not_taken_for_what_is_not_there() {
        let store = Arc::new(Store::new(Readiness::default()));
        let one = store.subscribe();
        one.open(FeedId(0), &feed());
        one.open(FeedId(1), &Feed { scope: Scope::Namespace("x".into()), ..feed() });
        store.apply((WatchId(0), Event::InitDone, Some(Version(5))));
        for (event, version, expected) in [
            (Event::Unavailable, None, Some(Version(0))),
            (Event::Refused, None, None),
            (Event::Unavailable, None, None),
            (Event::Init, None, None),
            (Event::InitDone, Some(Version(7)), Some(Version(7))),
            (Event::Unavailable, None, Some(Version(7))),
        ] {
            store.apply((WatchId(1), event.clone(), version));
            assert_eq!(one.newest().get(&FeedId(1)).copied(), expected, "{event:?}");
        }
    }

    #[test]
    fn who_selects_alike_shares_a_watch_which_ends_with_the_last() {
        let store = Arc::new(Store::new(Readiness::default()));
        let wanted = store.wanted();
        let watches = || wanted.borrow().keys().map(|id| id.0).collect::<Vec<_>>();
        let (one, other) = (store.subscribe(), store.subscribe());
        one.open(FeedId(7), &feed());
        say(&store, WatchId(0), "[ a=1 ]");
        other.open(FeedId(0), &Feed { content: Content::Policies, ..feed() });
        assert_eq!((watches(), heard(&other).as_str()), (vec![0], "a=1"));
        assert!(other.is_listed(), "it was, for the other");
        other.open(FeedId(1), &Feed { scope: Scope::Namespace("x".into()), ..feed() });
        assert_eq!(watches(), [0, 1]);
        assert!(!other.is_listed() && one.is_listed());
        one.close(FeedId(7));
        assert_eq!(watches(), [0, 1]);
        drop(other);
        assert!(watches().is_empty());
        one.open(FeedId(8), &feed());
        assert_eq!(watches(), [2], "what the old one still says is not taken for the new one's");
        say(&store, WatchId(0), "b=1");
        assert_eq!(heard(&one), "");
    }
}
