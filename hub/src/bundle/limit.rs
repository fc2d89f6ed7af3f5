//! Size limit of a bundle's data (`maxBytes`). Objects that would exceed it are left out or stay unchanged.

use std::collections::BTreeMap;

use opa_hub_proto::path::DirPath;

use super::edition::Bundle;
use super::fields::Fields;
use super::kept::Kept;
use super::spec::Spec;
use super::view::within;
use crate::model::{FeedId, Object};
use crate::policy::analyze::Reads;

/// Quotes, colon and comma.
const AROUND_ENTRY: usize = 4;

pub(crate) struct Limit {
    max: Option<usize>,
    pub(super) bytes: usize,
    by_feed: BTreeMap<FeedId, usize>,
    /// Whether growth beyond the maximum is accepted.
    pub(crate) is_lax: bool,
}

/// The data would exceed the limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Over {
    pub(crate) max: usize,
    /// Feed with most data, which has `bytes`.
    pub(crate) heaviest: FeedId,
    pub(crate) bytes: usize,
}

pub(crate) fn entry_bytes(key: &str, value: usize) -> usize {
    key.len() + value + AROUND_ENTRY
}

impl Limit {
    pub(crate) fn new(max: Option<usize>) -> Self {
        Self { max, bytes: 0, by_feed: BTreeMap::new(), is_lax: false }
    }

    pub(crate) fn bytes_of(&self, feed: FeedId) -> usize {
        self.by_feed.get(&feed).copied().unwrap_or_default()
    }

    pub(crate) fn has_room(&self, grows: usize) -> bool {
        self.max.is_none_or(|max| self.bytes + grows <= max)
    }

    /// Accounts for an object that changes from `old` to `new` bytes.
    pub(crate) fn change(&mut self, feed: FeedId, old: usize, new: usize) -> Result<(), Over> {
        let bytes = self.bytes - old + new;
        if let Some(max) = self.max.filter(|max| bytes > *max && new > old && !self.is_lax) {
            let heaviest = self.by_feed.iter().max_by_key(|(_, bytes)| **bytes);
            let (heaviest, bytes) = heaviest.map_or((feed, new), |(feed, bytes)| (*feed, *bytes));
            return Err(Over { max, heaviest, bytes });
        }
        self.bytes = bytes;
        let feed_bytes = self.by_feed.entry(feed).or_default();
        *feed_bytes = *feed_bytes - old + new;
        Ok(())
    }
}

/// Measures the data that policies would need, before they are accepted.
pub(crate) struct Scales<'a> {
    spec: &'a Spec,
    max: usize,
    /// Bytes of data that is not replicated.
    not_replicated: usize,
    objects: Vec<(DirPath, Object)>,
    measured: Vec<(Kept, usize)>,
}

impl<'a> Scales<'a> {
    /// Returns `None` if policies do not affect the size.
    pub(crate) fn new(spec: &'a Spec, bundle: &Bundle) -> Option<Self> {
        let max = spec.max_bytes.filter(|_| !spec.fields.follows.is_nothing())?;
        let objects = bundle.objects();
        let edition = bundle.head().borrow().clone();
        let not_replicated = edition.map_or(0, |edition| {
            let view = &edition.view;
            let replicated = view.ensure.iter().flat_map(|place| within(&view.dirs, place));
            view.json_bytes() - replicated.map(|(_, dir)| dir.json_bytes()).sum::<usize>()
        });
        Some(Self { spec, max, not_replicated, objects, measured: Vec::new() })
    }

    pub(crate) fn weigh(&mut self, reads: &Reads) -> usize {
        let mut places: BTreeMap<&DirPath, bool> = BTreeMap::new();
        for (place, object) in &self.objects {
            *places.entry(place).or_insert(true) &= object.key.namespace.is_empty();
        }
        let is_named = |place: &DirPath| self.spec.feeds.iter().any(|feed| feed.place() == Some(place));
        let follows = places.iter().filter(|(place, _)| self.spec.fields.follows(place, is_named(place)));
        let follows = follows.map(|(place, is_cluster)| ((*place).clone(), Some(*is_cluster)));
        let mut kept = Kept::of_reads(reads, follows);
        kept.join(&self.spec.fields.given);
        if let Some((_, bytes)) = self.measured.iter().find(|(measured, _)| *measured == kept) {
            return *bytes;
        }
        let measure = |fields: &Fields, object: &Object| {
            let bytes = fields.cut_object(&object.json).map_or(0, |cut| cut.len());
            entry_bytes(&object.key.name, bytes)
        };
        let objects: usize = self.objects.iter().map(|(place, object)| measure(kept.of(place), object)).sum();
        let bytes = self.not_replicated + objects;
        self.measured.push((kept, bytes));
        bytes
    }

    pub(crate) fn fits(&self, bytes: usize) -> bool {
        bytes <= self.max
    }

    /// Error for policies that increase the data from `before` to `bytes`, beyond the limit.
    pub(crate) fn fault(&self, bytes: usize, before: usize) -> Option<String> {
        (bytes > before).then(|| {
            format!(
                "data size limit exceeded: with the fields that the policy reads, the data has {bytes} bytes (now {before}), \
                 more than the limit of {}; read fewer fields (list them with opa-hub fields) or raise maxBytes",
                self.max
            )
        })
    }
}
