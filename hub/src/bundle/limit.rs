//! How large the data of a bundle may become (`maxBytes`). What would make it larger is left out, or stays as it was.

use std::collections::BTreeMap;

use opa_hub_proto::path::DirPath;

use super::edition::Bundle;
use super::fields::Fields;
use super::kept::Kept;
use super::spec::Spec;
use super::view::within;
use crate::model::{FeedId, Object};
use crate::policy::analyze::Reads;

/// Bytes around a key and its value: quotes, colon, comma.
const AROUND_ENTRY: usize = 4;

/// What there is, against what there may be.
pub struct Limit {
    max: Option<usize>,
    bytes: usize,
    of_feeds: BTreeMap<FeedId, usize>,
    /// Whether more than that is taken too, for what is there already.
    pub is_lax: bool,
}

/// The data would be larger than it may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Over {
    /// The limit.
    pub max: usize,
    /// Who has most of it …
    pub heaviest: FeedId,
    /// … and how much.
    pub bytes: usize,
}

/// Bytes of an entry as a member of its directory.
pub fn entry_bytes(key: &str, value: usize) -> usize {
    key.len() + value + AROUND_ENTRY
}

impl Limit {
    /// Of nothing yet.
    pub fn new(max: Option<usize>) -> Self {
        Self { max, bytes: 0, of_feeds: BTreeMap::new(), is_lax: false }
    }

    /// What there is.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// What there is of `feed`.
    pub fn bytes_of(&self, feed: FeedId) -> usize {
        self.of_feeds.get(&feed).copied().unwrap_or_default()
    }

    /// Whether the data may grow by so many bytes.
    pub fn has_room(&self, grows: usize) -> bool {
        self.max.is_none_or(|max| self.bytes + grows <= max)
    }

    /// An object of `feed` has `new` bytes from now on in place of `old`, unless that is more than there may be.
    pub fn change(&mut self, feed: FeedId, old: usize, new: usize) -> Result<(), Over> {
        let bytes = self.bytes - old + new;
        if let Some(max) = self.max.filter(|max| bytes > *max && new > old && !self.is_lax) {
            let heaviest = self.of_feeds.iter().max_by_key(|(_, bytes)| **bytes);
            let (heaviest, bytes) = heaviest.map_or((feed, new), |(feed, bytes)| (*feed, *bytes));
            return Err(Over { max, heaviest, bytes });
        }
        self.bytes = bytes;
        let of_feed = self.of_feeds.entry(feed).or_default();
        *of_feed = *of_feed - old + new;
        Ok(())
    }
}

/// Weighs what policies would make of the objects, before they are accepted.
pub struct Scales<'a> {
    spec: &'a Spec,
    max: usize,
    /// Of data that is not replicated.
    beside: usize,
    objects: Vec<(DirPath, Object)>,
    weighed: Vec<(Kept, usize)>,
}

impl<'a> Scales<'a> {
    /// For the objects that there are now; none where policies make no difference.
    pub fn new(spec: &'a Spec, bundle: &Bundle) -> Option<Self> {
        let max = spec.max_bytes.filter(|_| !spec.fields.follows.is_nothing())?;
        let objects = bundle.objects();
        let edition = bundle.head().borrow().clone();
        let beside = edition.map_or(0, |edition| {
            let view = &edition.view;
            let replicated = view.ensure.iter().flat_map(|place| within(&view.dirs, place));
            view.json_bytes() - replicated.map(|(_, dir)| dir.json_bytes()).sum::<usize>()
        });
        Some(Self { spec, max, beside, objects, weighed: Vec::new() })
    }

    /// Bytes of the data for policies that read this.
    pub fn weigh(&mut self, reads: &Reads) -> usize {
        let mut places: BTreeMap<&DirPath, bool> = BTreeMap::new();
        for (place, object) in &self.objects {
            *places.entry(place).or_insert(true) &= object.key.namespace.is_empty();
        }
        let is_named = |place: &DirPath| self.spec.feeds.iter().any(|feed| feed.place() == Some(place));
        let follows = places.iter().filter(|(place, _)| self.spec.fields.follows(place, is_named(place)));
        let follows = follows.map(|(place, is_cluster)| ((*place).clone(), Some(*is_cluster)));
        let mut kept = Kept::of_reads(reads, follows);
        kept.join(&self.spec.fields.given);
        if let Some((_, bytes)) = self.weighed.iter().find(|(weighed, _)| *weighed == kept) {
            return *bytes;
        }
        let weigh = |fields: &Fields, object: &Object| {
            let bytes = fields.cut_object(&object.json).map_or(0, |cut| cut.len());
            entry_bytes(&object.key.name, bytes)
        };
        let objects: usize = self.objects.iter().map(|(place, object)| weigh(kept.of(place), object)).sum();
        let bytes = self.beside + objects;
        self.weighed.push((kept, bytes));
        bytes
    }

    /// Whether the data may have so many bytes.
    pub fn fits(&self, bytes: usize) -> bool {
        bytes <= self.max
    }

    /// What is wrong with policies that make the data so large that it does not [fit](Self::fits), where those before made
    /// it `before`.
    pub fn fault(&self, bytes: usize, before: usize) -> Option<String> {
        (bytes > before).then(|| {
            format!(
                "with what it reads of replicated objects the data would have {bytes} bytes ({before} without it), more \
                 than the limit of {}: read fewer fields (opa-hub fields shows them), or raise maxBytes",
                self.max
            )
        })
    }
}
