//! Size limit of a bundle's data (`maxBytes`). Objects that would exceed it are left out or stay unchanged.

use std::collections::BTreeMap;

use crate::model::InputId;

/// Quotes, colon and comma.
const AROUND_ENTRY: usize = 4;

pub(crate) struct SizeQuota {
    max: Option<usize>,
    pub(super) bytes: usize,
    by_feed: BTreeMap<InputId, usize>,
    /// Whether growth beyond the maximum is accepted.
    pub(crate) is_lax: bool,
}

/// The data would exceed the limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct QuotaExceeded {
    pub(crate) max: usize,
    /// Watch with most data, which has `bytes`.
    pub(crate) heaviest: InputId,
    pub(crate) bytes: usize,
}

pub(crate) fn entry_bytes(key: &str, value: usize) -> usize {
    key.len() + value + AROUND_ENTRY
}

impl SizeQuota {
    pub(crate) fn new(max: Option<usize>) -> Self {
        Self { max, bytes: 0, by_feed: BTreeMap::new(), is_lax: false }
    }

    pub(crate) fn bytes_of(&self, feed: InputId) -> usize {
        self.by_feed.get(&feed).copied().unwrap_or_default()
    }

    pub(crate) fn has_room(&self, grows: usize) -> bool {
        self.max.is_none_or(|max| self.bytes + grows <= max)
    }

    /// Accounts for an object that changes from `old` to `new` bytes.
    pub(crate) fn change(&mut self, feed: InputId, old: usize, new: usize) -> Result<(), QuotaExceeded> {
        let bytes = self.bytes - old + new;
        if let Some(max) = self.max.filter(|max| bytes > *max && new > old && !self.is_lax) {
            let heaviest = self.by_feed.iter().max_by_key(|(_, bytes)| **bytes);
            let (heaviest, bytes) = heaviest.map_or((feed, new), |(feed, bytes)| (*feed, *bytes));
            return Err(QuotaExceeded { max, heaviest, bytes });
        }
        self.bytes = bytes;
        let feed_bytes = self.by_feed.entry(feed).or_default();
        *feed_bytes = *feed_bytes - old + new;
        Ok(())
    }
}
