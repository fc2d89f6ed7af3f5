//! Size of the data under proposed policies.

use std::collections::BTreeMap;

use opa_hub_proto::path::DirPath;

use crate::bundle::Bundle;
use crate::fields::mask::FieldMask;
use crate::fields::masks::FieldMasks;
use crate::model::Object;
use crate::policy::dataflow::ReadSet;
use crate::projection::quota::entry_bytes;
use crate::snapshot::within;
use crate::spec::BundleSpec;

/// Measures the data that policies would need, before they are accepted.
pub(crate) struct QuotaCheck<'a> {
    spec: &'a BundleSpec,
    max: usize,
    /// Bytes of data that is not replicated.
    not_replicated: usize,
    objects: Vec<(DirPath, Object)>,
    measured: Vec<(FieldMasks, usize)>,
}

impl<'a> QuotaCheck<'a> {
    /// Returns `None` if policies do not affect the size.
    pub(crate) fn new(spec: &'a BundleSpec, bundle: &Bundle) -> Option<Self> {
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

    pub(crate) fn weigh(&mut self, reads: &ReadSet) -> usize {
        let mut places: BTreeMap<&DirPath, bool> = BTreeMap::new();
        for (place, object) in &self.objects {
            *places.entry(place).or_insert(true) &= object.key.namespace.is_empty();
        }
        let is_named = |place: &DirPath| self.spec.feeds.iter().any(|feed| feed.place() == Some(place));
        let follows = places.iter().filter(|(place, _)| self.spec.fields.follows(place, is_named(place)));
        let follows = follows.map(|(place, is_cluster)| ((*place).clone(), Some(*is_cluster)));
        let mut kept = FieldMasks::of_reads(reads, follows);
        kept.join(&self.spec.fields.given);
        if let Some((_, bytes)) = self.measured.iter().find(|(measured, _)| *measured == kept) {
            return *bytes;
        }
        let measure = |fields: &FieldMask, object: &Object| {
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
