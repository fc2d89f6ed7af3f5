//! The live objects of every feed. One writer turns events into changes: an object that came again unchanged is
//! silence, and what a list no longer names is removed.

use std::collections::{BTreeSet, HashMap, HashSet};

use bytes::Bytes;
use opa_hub_proto::path::DirPath;

use crate::model::{Change, Event, Feed, FeedId, Object, ObjectKey};

/// See the module's text.
pub struct Store {
    feeds: Vec<Live>,
}

#[derive(Default)]
struct Live {
    /// Where the objects lie, if they are replicated.
    place: Option<DirPath>,
    objects: HashMap<ObjectKey, Object>,
    /// Names that the list under way has given so far.
    listing: Option<HashSet<ObjectKey>>,
    listed: bool,
}

impl Store {
    /// An empty store for these feeds.
    pub fn new(feeds: &[Feed]) -> Self {
        Self {
            feeds: feeds
                .iter()
                .map(|feed| Live { place: feed.place().cloned(), ..Live::default() })
                .collect(),
        }
    }

    /// Takes one event and says what it changed. Objects that a list no longer names are removed at its end, not
    /// before: readers keep what they had (I5).
    pub fn apply(&mut self, id: FeedId, event: Event) -> Vec<Change> {
        if self.feeds.len() <= id.0 {
            self.feeds.resize_with(id.0 + 1, || Live { listed: true, ..Live::default() });
        }
        let live = &mut self.feeds[id.0];
        match event {
            Event::Unavailable => Vec::new(),
            Event::Open(feed) => {
                live.place = feed.place().cloned();
                Vec::new()
            }
            Event::Close => {
                let mut gone: Vec<_> = std::mem::take(live).objects.into_keys().collect();
                gone.sort_unstable();
                gone.into_iter().map(|key| Change::Remove(id, key)).collect()
            }
            Event::Init => {
                live.listing = Some(HashSet::new());
                Vec::new()
            }
            Event::Apply(mut object) => {
                if let Some(listing) = &mut live.listing {
                    listing.insert(object.key.clone());
                }
                if live.objects.get(&object.key).is_some_and(|held| held.json == object.json) {
                    return Vec::new();
                }
                // Made by a thread that decodes, where what stays lies scattered among what goes: with 30,000 pods that takes
                // the hub 40 MB more. This thread makes little that goes.
                if object.json.is_unique() {
                    object.json = Bytes::copy_from_slice(&object.json);
                }
                live.objects.insert(object.key.clone(), object.clone());
                vec![Change::Put(id, object)]
            }
            Event::Delete(key) => {
                if let Some(listing) = &mut live.listing {
                    listing.remove(&key);
                }
                live.objects.remove(&key).map(|_| Change::Remove(id, key)).into_iter().collect()
            }
            Event::InitDone => {
                live.listed = true;
                let Some(listed) = live.listing.take() else { return Vec::new() };
                let mut gone: Vec<_> =
                    live.objects.keys().filter(|key| !listed.contains(*key)).cloned().collect();
                gone.sort_unstable();
                live.objects.retain(|key, _| listed.contains(key));
                gone.into_iter().map(|key| Change::Remove(id, key)).collect()
            }
        }
    }

    /// Whether every feed was listed once.
    pub fn is_complete(&self) -> bool {
        self.feeds.iter().all(|live| live.listed)
    }

    /// All objects, in no order.
    pub fn objects(&self) -> Vec<(FeedId, Object)> {
        let of_feed = |(id, live): (usize, &Live)| {
            live.objects.values().map(move |object| (FeedId(id), object.clone())).collect::<Vec<_>>()
        };
        self.feeds.iter().enumerate().flat_map(of_feed).collect()
    }

    /// The objects of these feeds, in no order.
    pub fn objects_of(&self, feeds: &BTreeSet<FeedId>) -> Vec<(FeedId, Object)> {
        let of_feed = |id: &FeedId| {
            let live = self.feeds.get(id.0).into_iter().flat_map(|live| live.objects.values());
            live.map(|object| (*id, object.clone())).collect::<Vec<_>>()
        };
        feeds.iter().flat_map(of_feed).collect()
    }

    /// The replicated objects in no order, each with the place of its resource.
    pub fn replicated(&self) -> Vec<(DirPath, Object)> {
        let places = self.feeds.iter().filter_map(|live| Some((live.place.as_ref()?, live)));
        let of = |(place, live): (&DirPath, &Live)| {
            live.objects.values().map(|object| (place.clone(), object.clone())).collect::<Vec<_>>()
        };
        places.flat_map(of).collect()
    }

    /// How many objects the feed has.
    pub fn len(&self, id: FeedId) -> usize {
        self.feeds[id.0].objects.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Content, Resource, Scope};

    /// Runs a script of words (`[` a list begins, `]` it is complete, `a=1` an object, `-a` a delete) and compares
    /// what changed.
    fn check(script: &str, expected: &str) {
        let feed = Feed {
            resource: Resource::configmaps(),
            scope: Scope::Cluster,
            labels: Vec::new(),
            content: Content::Data,
        };
        let mut store = Store::new(&[feed]);
        let key = |name: &str| ObjectKey { namespace: "".into(), name: name.into() };
        let mut said = Vec::new();
        for word in script.split_whitespace() {
            let event = match word.split_once('=') {
                _ if word == "[" => Event::Init,
                _ if word == "]" => Event::InitDone,
                Some((name, value)) => Event::Apply(Object { key: key(name), json: value.to_owned().into() }),
                None => Event::Delete(key(word.trim_start_matches('-'))),
            };
            for change in store.apply(FeedId(0), event) {
                said.push(match change {
                    Change::Put(_, object) => {
                        format!("{}={}", object.key, String::from_utf8_lossy(&object.json))
                    }
                    Change::Remove(_, key) => format!("-{key}"),
                });
            }
        }
        assert_eq!(said.join(" "), expected, "{script}");
    }

    #[test]
    fn silence_and_relists() {
        check("[ a=1 b=1 ] a=1 a=2 -b -b", "a=1 b=1 a=2 -b");
        check("[ a=1 b=1 c=1 ] [ b=1 c=2 ]", "a=1 b=1 c=1 c=2 -a");
        check("[ a=1 ] [ [ a=1 ]", "a=1");
        check("[ a=1 ] [ ]", "a=1 -a");
        check("[ a=1 ] [ a=1 -a ]", "a=1 -a");
    }
}
