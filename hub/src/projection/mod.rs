//! Projects objects into entries and modules, with the layout of kube-mgmt. A ConfigMap is accepted as a whole;
//! otherwise its last good content stays.
//!
//! Data of the namespaces `system` and `opahub` would be inside OPA's own documents and is rejected. At startup last
//! good policies claim their paths first, then data, then new policies.

mod configmap;
pub(crate) mod quota;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::Bound;
use std::sync::{Arc, LazyLock};

use opa_hub_proto::head::MODULES_BYTES_MAX;
use opa_hub_proto::path::{DirPath, is_segment};

use crate::fields::cost;
use crate::fields::masks::{FieldMasks, IsClusterScoped};
use crate::model::{
    ALLOCATION_BYTES, Change, Content, InputId, NamespaceSelector, Object, ObjectKey, Problem, WatchSpec,
    directory,
};
use crate::policy::candidate::{Candidates, ModuleSet, Resolution};
use crate::policy::dataflow::ReadSet;
use crate::policy::modules::Module;
use crate::policy::plan::Site;
use crate::policy::registry::{LastGood, Opinion, PolicyRegistry};
use crate::policy::verdict::{Diagnostic, Observed, RETRIES, STATUS, Told, Verdict};
pub(crate) use crate::projection::configmap::Error;
use crate::projection::configmap::{ConfigMap, check_entry, data_value};
use crate::projection::quota::{QuotaExceeded, SizeQuota, entry_bytes};
use crate::snapshot::Batch;
use crate::spec::{BundleSpec, Selection};

/// Maximum problems listed.
pub const PROBLEMS_MAX: usize = 1000;

pub(crate) struct Projector {
    feeds: Vec<WatchSpec>,
    /// WatchStatuses that were closed or rejected.
    closed: BTreeSet<InputId>,
    /// Label of ConfigMaps with tests.
    test_label: Option<String>,
    fields: Selection,
    kept: FieldMasks,
    accepted: HashMap<ObjectId, ServedObject>,
    limit: SizeQuota,
    /// Rejected objects, with the bytes that each needs.
    over_limit: BTreeMap<ObjectId, usize>,
    /// Whether rejected objects may fit now.
    retry: bool,
    directories_max: usize,
    dirs: BTreeMap<DirPath, DirOwner>,
    policies: PolicyRegistry,
    /// Reads of whole objects despite automatic fields.
    whole_reads: Vec<(Site, InputId)>,
    refused: BTreeMap<ObjectId, RejectedObject>,
    configmaps: BTreeMap<ObjectKey, ConfigMapState>,
    /// ConfigMaps with a new verdict.
    news: BTreeSet<ObjectKey>,
}

/// Maximum bytes quoted in a warning.
const LINE_BYTES_MAX: usize = 120;

pub(crate) type ObjectId = (InputId, ObjectKey);

#[derive(Default)]
struct ServedObject {
    /// Keys of a data ConfigMap.
    keys: Vec<String>,
    bytes: usize,
}

struct DirOwner {
    entries: usize,
    is_configmap: bool,
}

struct RejectedObject {
    fault: Diagnostic,
    /// Object to retry once others are removed.
    retry: Option<Object>,
}

struct ConfigMapState {
    feed: InputId,
    observed: Observed,
    warnings: Vec<String>,
}

impl Projector {
    pub(crate) fn new(spec: &BundleSpec, kept: FieldMasks) -> Self {
        Self {
            feeds: spec.feeds.clone(),
            closed: BTreeSet::new(),
            test_label: spec.test_label.clone(),
            fields: spec.fields.clone(),
            kept,
            accepted: HashMap::new(),
            limit: SizeQuota::new(spec.max_bytes),
            over_limit: BTreeMap::new(),
            retry: false,
            directories_max: spec.limits.directories_max,
            dirs: BTreeMap::new(),
            policies: PolicyRegistry::default(),
            whole_reads: Vec::new(),
            refused: BTreeMap::new(),
            configmaps: BTreeMap::new(),
            news: BTreeSet::new(),
        }
    }

    /// Rejects a feed whose path is occupied.
    pub(crate) fn open(&mut self, id: InputId, feed: WatchSpec) -> Result<(), Error> {
        if let Content::Resource(prefix) = &feed.content {
            let free = check_disjoint(prefix, reserved([&OPAHUB, &SYSTEM]));
            let free = free
                .and_then(|()| check_configmaps(&self.dirs, prefix))
                .and_then(|()| self.check_packages(prefix));
            if let Err(error) = free {
                self.closed.insert(id);
                self.set_feed(id, feed);
                return Err(error);
            }
        }
        self.closed.remove(&id);
        self.set_feed(id, feed);
        // Warnings depend on replicated resources.
        self.news.extend(self.configmaps.keys().cloned());
        Ok(())
    }

    fn set_feed(&mut self, id: InputId, feed: WatchSpec) {
        match self.feeds.get_mut(id.0) {
            Some(old) => *old = feed,
            None => self.feeds.push(feed),
        }
    }

    pub(crate) fn close(&mut self, id: InputId, batch: &mut Batch) {
        let known = self.accepted.keys().chain(self.refused.keys()).filter(|(feed, _)| *feed == id);
        for (feed, key) in known.cloned().collect::<BTreeSet<_>>() {
            self.apply_change(Change::Remove(feed, key), batch);
        }
        self.closed.insert(id);
        self.policies.reconsider();
        self.retry = true;
    }

    /// Removes objects that are not in `live`.
    pub(crate) fn remove_others(
        &mut self,
        feeds: &BTreeSet<InputId>,
        live: &HashSet<ObjectId>,
        batch: &mut Batch,
    ) {
        let known = self.accepted.keys().filter(|id| feeds.contains(&id.0) && !live.contains(*id));
        for (feed, key) in known.cloned().collect::<BTreeSet<_>>() {
            self.apply(Change::Remove(feed, key), batch);
        }
    }

    pub(crate) fn is_closed(&self, id: InputId) -> bool {
        self.closed.contains(&id)
    }

    pub(crate) fn memory(&self) -> usize {
        let refused = self.refused.len() + self.over_limit.len() + self.configmaps.len();
        self.accepted.capacity() * size_of::<(ObjectId, ServedObject)>()
            + refused * (size_of::<(ObjectId, RejectedObject)>() + ALLOCATION_BYTES)
    }

    /// Restores the policies after a restart.
    pub(crate) fn restore(&mut self, good: LastGood) {
        self.policies.restore(good);
    }

    /// Replaces the masks. Returns the feeds to apply again.
    pub(crate) fn keep(&mut self, kept: FieldMasks) -> BTreeSet<InputId> {
        let before = std::mem::replace(&mut self.kept, kept);
        let differs = |place: &DirPath| before.of(place) != self.kept.of(place);
        self.places().filter(|(_, place, _)| differs(place)).map(|(id, ..)| id).collect()
    }

    /// Records reads of whole objects for warnings.
    pub(crate) fn read_by(&mut self, reads: &ReadSet, kept: &FieldMasks) {
        let whole = self.following().filter(|(_, place, _)| kept.of(place).is_all());
        let whole_reads = whole.flat_map(|(id, place, scope)| {
            let sites = cost::readers(reads, place, scope).remove(&Vec::new()).unwrap_or_default();
            sites.into_iter().map(move |site| (site, id))
        });
        self.whole_reads = whole_reads.collect();
        self.news.extend(self.configmaps.keys().cloned());
    }

    pub(crate) fn kept_for(&self, reads: &ReadSet) -> FieldMasks {
        let places = self.following().map(|(_, place, scope)| (place.clone(), scope));
        let mut kept = FieldMasks::of_reads(reads, places);
        kept.join(&self.fields.given);
        kept
    }

    fn following(&self) -> impl Iterator<Item = (InputId, &DirPath, IsClusterScoped)> {
        let follows =
            |id: InputId, place| self.fields.follows(place, !self.feeds[id.0].resource.is_named_only());
        self.places().filter(move |(id, place, _)| follows(*id, place))
    }

    pub(crate) fn kept(&self) -> &FieldMasks {
        &self.kept
    }

    pub(crate) fn places(&self) -> impl Iterator<Item = (InputId, &DirPath, IsClusterScoped)> {
        let open = self.feeds.iter().enumerate().map(|(id, feed)| (InputId(id), feed));
        open.filter(|(id, _)| !self.closed.contains(id)).filter_map(|(id, feed)| {
            let scope =
                (!feed.resource.is_named_only()).then_some(feed.scope == NamespaceSelector::ClusterScoped);
            Some((id, feed.place()?, scope))
        })
    }

    pub(crate) fn job(&mut self) -> Option<Arc<Candidates>> {
        let (feeds, closed, dirs) = (&self.feeds, &self.closed, &self.dirs);
        self.policies.job(|root| check_root(feeds, closed, dirs, root).is_ok())
    }

    /// Schedules a check of all policies. Results stay until then.
    pub(crate) fn recheck(&mut self) {
        self.policies.recheck();
    }

    pub(crate) fn is_settled(&self) -> bool {
        self.policies.is_settled()
    }

    pub(crate) fn last_good(&self) -> LastGood {
        self.policies.last_good()
    }

    pub(crate) fn take_outcome(&mut self, outcome: Resolution, batch: &mut Batch) {
        let (changes, news) = self.policies.take(outcome);
        for (key, faults) in self.policies.refused().filter(|(key, _)| news.contains(*key)) {
            let verdict = Verdict { faults: faults.to_vec(), warnings: Vec::new() };
            tracing::warn!(configmap = %key, error = verdict.message(), "ConfigMap rejected, last good content stays");
        }
        batch.modules.extend(changes);
        self.news.extend(news);
        self.retry = true;
    }

    /// In stable order, up to [`PROBLEMS_MAX`].
    pub(crate) fn problems(&self) -> Vec<Problem> {
        let refused = self.refused.iter().map(|(id, refused)| Problem {
            subject: self.subject(id),
            message: refused.fault.message.clone(),
        });
        let unchecked = |key: &&ObjectKey| {
            self.configmaps
                .get(*key)
                .is_none_or(|known| !self.refused.contains_key(&(known.feed, (*key).clone())))
        };
        let policies =
            self.policies.refused().filter(|(key, _)| unchecked(key)).map(|(key, faults)| Problem {
                subject: format!("ConfigMap {key}"),
                message: Verdict { faults: faults.to_vec(), warnings: Vec::new() }.message(),
            });
        refused.chain(policies).take(PROBLEMS_MAX).collect()
    }

    /// New verdicts; `None` if the ConfigMap is removed or unchecked.
    pub(crate) fn told(&mut self) -> Vec<(ObjectKey, Option<Told>)> {
        let news = std::mem::take(&mut self.news);
        news.into_iter().map(|key| (key.clone(), self.verdict_for(&key))).collect()
    }

    fn verdict_for(&self, key: &ObjectKey) -> Option<Told> {
        let known = self.configmaps.get(key)?;
        let mut verdict = Verdict { faults: Vec::new(), warnings: known.warnings.clone() };
        if let Some(refused) = self.refused.get(&(known.feed, key.clone())) {
            verdict.faults.push(refused.fault.clone());
        } else if self.feeds[known.feed.0].content == Content::PolicyRegistry {
            match self.policies.opinion(key)? {
                Opinion::Waiting => return None,
                Opinion::Told { of: texts, faults, warnings } => {
                    let replicated = self.replicated().map(|(prefix, _)| prefix);
                    verdict.warnings.extend(shared_segments(replicated, texts));
                    verdict.warnings.extend(self.whole_read_warnings(texts));
                    verdict.faults.extend_from_slice(faults);
                    verdict.warnings.extend(warnings.iter().map(ToString::to_string));
                }
            }
        }
        Some(Told { observed: known.observed.clone(), verdict })
    }

    fn whole_read_warnings(&self, texts: &ModuleSet) -> impl Iterator<Item = String> {
        self.whole_reads.iter().filter_map(|(site, feed)| {
            let above = usize::try_from(site.row).ok()?.checked_sub(1)?;
            let line = texts.modules.get(&site.file)?.text.lines().nth(above).unwrap_or_default().trim();
            let line = &line[..line.floor_char_boundary(LINE_BYTES_MAX)];
            let (resource, megabytes) = (&self.feeds[feed.0], self.limit.bytes_of(*feed) >> 20);
            let bytes = if megabytes == 0 { "less than 1 MB".into() } else { format!("{megabytes} MB of JSON") };
            Some(format!(
                "{site} reads whole objects of {resource}, so all fields are served, {bytes}; read single fields, or if only \
                 other rules use this rule, annotate the queried rules with \"entrypoint: true\": {line}"
            ))
        })
    }

    pub(crate) fn apply(&mut self, change: Change, batch: &mut Batch) {
        let (Change::Put(feed, _) | Change::Remove(feed, _)) = &change;
        let (is_policy, places) = (self.content(*feed) == &Content::PolicyRegistry, self.dirs.len());
        self.apply_change(change, batch);
        if self.dirs.len() < places {
            self.policies.reconsider();
        }
        self.retry |= is_policy || self.dirs.len() < places;
    }

    /// Accepts rejected objects that fit now. Called once for each commit.
    pub(crate) fn retry_refused(&mut self, batch: &mut Batch) {
        if std::mem::take(&mut self.retry) {
            let refused = self.refused.iter().filter(|(id, _)| !self.over_limit.contains_key(*id));
            let again = refused.filter_map(|((feed, _), refused)| Some((*feed, refused.retry.clone()?)));
            for (feed, object) in again.collect::<Vec<_>>() {
                self.apply_change(Change::Put(feed, object), batch);
            }
        }
        // In name order. One that is too large does not block others.
        let fit: Vec<_> = self.over_limit.iter().filter(|(_, grows)| self.limit.has_room(**grows)).collect();
        let fit: Vec<_> = fit.into_iter().map(|(id, grows)| (id.clone(), *grows)).collect();
        for (id, grows) in fit {
            let object = self.refused.get(&id).and_then(|refused| refused.retry.clone());
            if let Some(object) = object.filter(|_| self.limit.has_room(grows)) {
                self.apply_change(Change::Put(id.0, object), batch);
            }
        }
    }

    /// Applies a new mask to an object. The limit counted the reads before.
    pub(crate) fn apply_again(&mut self, id: InputId, object: Object, batch: &mut Batch) {
        self.limit.is_lax = self.accepted.contains_key(&(id, object.key.clone()));
        self.apply_change(Change::Put(id, object), batch);
        self.limit.is_lax = false;
    }

    fn apply_change(&mut self, change: Change, batch: &mut Batch) {
        let (id, object) = match change {
            Change::Put(feed, object) => ((feed, object.key.clone()), Some(object)),
            Change::Remove(feed, key) => ((feed, key), None),
        };
        let content = self.content(id.0).clone();
        let result = match &content {
            Content::Resource(prefix) => self.resource(&id, prefix, object.as_ref(), batch),
            Content::Data | Content::PolicyRegistry => self.configmap(&id, object.as_ref(), batch),
            Content::BundleRegistry => return,
        };
        self.over_limit.remove(&id);
        match result {
            Ok(()) => _ = self.refused.remove(&id),
            Err(error) => {
                let fault = Diagnostic::new(error.code(), error.to_string());
                // Logs the first only: thousands may follow.
                let is_first = !matches!(error, Error::OverLimit { .. }) || self.over_limit.is_empty();
                if let Error::OverLimit { grows, .. } = error {
                    self.over_limit.insert(id.clone(), grows);
                }
                if is_first && self.refused.get(&id).is_none_or(|refused| refused.fault != fault) {
                    tracing::warn!(subject = self.subject(&id), error = fault.message, "object rejected");
                }
                self.refused.insert(id, RejectedObject { fault, retry: object.filter(|_| error.may_pass()) });
            }
        }
    }

    fn content(&self, feed: InputId) -> &Content {
        &self.feeds[feed.0].content
    }

    fn subject(&self, (feed, key): &ObjectId) -> String {
        match self.content(*feed) {
            Content::Resource(_) => format!("{} {key}", self.feeds[feed.0].resource),
            _ => format!("ConfigMap {key}"),
        }
    }

    fn resource(
        &mut self,
        id: &ObjectId,
        prefix: &DirPath,
        object: Option<&Object>,
        batch: &mut Batch,
    ) -> Result<(), Error> {
        let key = &id.1;
        let Some(dir) = directory(prefix, key) else {
            return object.map_or(Ok(()), |_| Err(Error::Name(key.namespace.to_string())));
        };
        let Some(object) = object else {
            if let Some(ServedObject { bytes, .. }) = self.accepted.remove(id) {
                self.resize(id.0, bytes, 0)?;
                self.release_dir(&dir);
                batch.entry(&dir, key.name.clone(), None);
            }
            return Ok(());
        };
        let json = self.kept.of(prefix).cut_object(&object.json).map_err(Error::NotAnObjectAtAll)?;
        check_entry(&key.name, json.len())?;
        let bytes = entry_bytes(&key.name, json.len());
        self.resize(id.0, self.accepted.get(id).map_or(0, |served| served.bytes), bytes)?;
        if let Some(served) = self.accepted.get_mut(id) {
            served.bytes = bytes;
        } else {
            if let Err(error) = self.retain_dir(&dir, false) {
                self.resize(id.0, bytes, 0)?;
                return Err(error);
            }
            self.accepted.insert(id.clone(), ServedObject { keys: Vec::new(), bytes });
        }
        batch.entry(&dir, key.name.clone(), Some(json));
        Ok(())
    }

    fn configmap(&mut self, id: &ObjectId, object: Option<&Object>, batch: &mut Batch) -> Result<(), Error> {
        let is_data = self.content(id.0) == &Content::Data;
        self.news.insert(id.1.clone());
        let Some(object) = object else {
            // A new label may have moved it to the other feed.
            if self.configmaps.get(&id.1).is_some_and(|known| known.feed == id.0) {
                self.configmaps.remove(&id.1);
            }
            if is_data {
                return self.data(id, BTreeMap::new(), batch);
            }
            self.policies.remove(&id.1);
            return Ok(());
        };
        let configmap = serde_json::from_slice::<ConfigMap>(&object.json);
        let metadata = configmap.as_ref().ok().map(|map| &map.metadata);
        let observed = metadata.map_or_else(Observed::default, |metadata| Observed {
            version: metadata.resource_version.clone(),
            status: metadata.annotation(STATUS),
            retries: metadata.annotation(RETRIES),
        });
        let warnings = configmap.as_ref().map(ConfigMap::warnings).unwrap_or_default();
        self.configmaps.insert(id.1.clone(), ConfigMapState { feed: id.0, observed, warnings });
        let result = configmap.map_err(Error::NotAConfigMap).and_then(|map| {
            match map.data.iter().flatten().map(|(name, _)| name).find(|name| !is_segment(name)) {
                Some(bad) => Err(Error::Name(bad.clone())),
                None => Ok(map),
            }
        });
        if is_data {
            return self.data(id, result?.data.unwrap_or_default(), batch);
        }
        match result.and_then(|map| self.texts(&id.1, map)) {
            Ok(texts) => {
                self.policies.put(&id.1, texts);
                Ok(())
            }
            Err(error) => {
                self.policies.put_unusable(&id.1);
                Err(error)
            }
        }
    }

    fn data(
        &mut self,
        id: &ObjectId,
        texts: BTreeMap<String, String>,
        batch: &mut Batch,
    ) -> Result<(), Error> {
        let Ok(dir) = DirPath::new([&*id.1.namespace, &*id.1.name]) else {
            return if texts.is_empty() { Ok(()) } else { Err(Error::Name(id.1.to_string())) };
        };
        let mut values = BTreeMap::new();
        for (key, text) in texts {
            let value = data_value(&key, &text)?;
            check_entry(&key, value.len())?;
            values.insert(key, value);
        }
        let bytes = values.iter().map(|(key, value)| entry_bytes(key, value.len())).sum();
        let old_bytes = self.accepted.get(id).map(|served| served.bytes);
        if !values.is_empty() && old_bytes.is_none() {
            self.check_place(&dir)?;
        }
        self.resize(id.0, old_bytes.unwrap_or(0), bytes)?;
        if !values.is_empty()
            && old_bytes.is_none()
            && let Err(error) = self.retain_dir(&dir, true)
        {
            self.resize(id.0, bytes, 0)?;
            return Err(error);
        }
        let old = if values.is_empty() {
            self.accepted.remove(id).inspect(|_| self.release_dir(&dir))
        } else {
            let keys = values.keys().cloned().collect();
            self.accepted.insert(id.clone(), ServedObject { keys, bytes })
        };
        let old = old.unwrap_or_default().keys;
        for removed in old.into_iter().filter(|key| !values.contains_key(key)) {
            batch.entry(&dir, removed, None);
        }
        for (key, value) in values {
            batch.entry(&dir, key, Some(value));
        }
        Ok(())
    }

    fn texts(&self, key: &ObjectKey, configmap: ConfigMap) -> Result<ModuleSet, Error> {
        if !is_segment(&key.namespace) || !is_segment(&key.name) {
            return Err(Error::Name(key.to_string()));
        }
        let label = |label: &String| configmap.metadata.labels.as_ref()?.get(label);
        let has_tests = self.test_label.as_ref().and_then(label).is_some_and(|value| value == "true");
        let mut texts = ModuleSet::default();
        for (name, text) in configmap.data.unwrap_or_default() {
            let is_test = has_tests && name.ends_with("_test.rego");
            let module = Module::read(&text).map_err(|source| Error::Module { key: name.clone(), source })?;
            if !is_test {
                check_root(&self.feeds, &self.closed, &self.dirs, &module.root)?;
            }
            let target = if is_test { &mut texts.tests } else { &mut texts.modules };
            target.insert(format!("{key}/{name}"), Arc::new(module));
        }
        let bytes = self.policies.bytes_beside(key) + texts.bytes();
        if bytes > MODULES_BYTES_MAX {
            return Err(Error::TooLarge {
                subject: "the bundle with this ConfigMap".into(),
                bytes,
                max: MODULES_BYTES_MAX,
                scope: "all modules together",
            });
        }
        Ok(texts)
    }

    fn check_place(&self, dir: &DirPath) -> Result<(), Error> {
        check_disjoint(dir, self.replicated().chain(reserved([&OPAHUB, &SYSTEM])))?;
        self.check_packages(dir)
    }

    fn check_packages(&self, dir: &DirPath) -> Result<(), Error> {
        let owner = overlapping(self.policies.roots(), dir).next().map(|(root, _)| root);
        owner.map_or(Ok(()), |root| {
            Err(conflict(dir, format!("package {}", root.relative().replace('/', "."))))
        })
    }

    fn replicated(&self) -> impl Iterator<Item = (&DirPath, String)> {
        replicated(&self.feeds, &self.closed)
    }

    fn resize(&mut self, feed: InputId, old: usize, new: usize) -> Result<(), Error> {
        self.limit.change(feed, old, new).map_err(|QuotaExceeded { max, heaviest, bytes }| Error::OverLimit {
            grows: new.saturating_sub(old),
            max,
            heaviest: self.feeds[heaviest.0].to_string(),
            megabytes: bytes >> 20,
        })
    }

    fn retain_dir(&mut self, dir: &DirPath, is_configmap: bool) -> Result<(), Error> {
        if self.dirs.len() >= self.directories_max && !self.dirs.contains_key(dir) {
            return Err(Error::TooManyDirectories(self.directories_max));
        }
        self.dirs.entry(dir.clone()).or_insert(DirOwner { entries: 0, is_configmap }).entries += 1;
        Ok(())
    }

    fn release_dir(&mut self, dir: &DirPath) {
        if let Some(owner) = self.dirs.get_mut(dir) {
            owner.entries -= 1;
            if owner.entries == 0 {
                self.dirs.remove(dir);
            }
        }
    }
}

/// Warns of packages that share their first segment with replicated data: OPA copies that data at each write to find
/// conflicts (v1/storage/inmem/txn.go), which takes seconds.
fn shared_segments<'a>(replicated: impl Iterator<Item = &'a DirPath>, texts: &ModuleSet) -> Option<String> {
    let first = |path: &DirPath| path.relative().split('/').next().unwrap_or_default().to_owned();
    let replicated: BTreeSet<String> = replicated.map(first).collect();
    let shared: BTreeSet<String> = texts
        .modules
        .values()
        .filter(|module| replicated.contains(&first(&module.root)))
        .map(|module| format!("package {}", module.package()))
        .collect();
    (!shared.is_empty()).then(|| {
        let shared: Vec<_> = shared.into_iter().collect();
        format!(
            "{} shares a path with replicated data, which slows down writes to OPA; rename the package or use --policy-delivery bundle",
            shared.join(", ")
        )
    })
}

/// Agents' markers.
static MARKERS: LazyLock<DirPath> = LazyLock::new(|| "/system/opahub".parse().expect("a path"));
static SYSTEM: LazyLock<DirPath> = LazyLock::new(|| "/system".parse().expect("a path"));
/// Roots of bundles that own nothing else.
static OPAHUB: LazyLock<DirPath> = LazyLock::new(|| "/opahub".parse().expect("a path"));

fn reserved<'a, const N: usize>(
    places: [&'static LazyLock<DirPath>; N],
) -> impl Iterator<Item = (&'a DirPath, String)> {
    places.into_iter().map(|place| (&**place, "opa-hub or OPA itself".to_owned()))
}

/// Rejects roots that overlap data. `package system` is OPA's entry point: modules may use it next to the marker.
fn check_root(
    feeds: &[WatchSpec],
    closed: &BTreeSet<InputId>,
    dirs: &BTreeMap<DirPath, DirOwner>,
    root: &DirPath,
) -> Result<(), Error> {
    let reserved = reserved([&OPAHUB, &MARKERS]).filter(|_| root.as_str() != "/system");
    check_disjoint(root, replicated(feeds, closed).chain(reserved))?;
    check_configmaps(dirs, root)
}

fn check_configmaps(dirs: &BTreeMap<DirPath, DirOwner>, place: &DirPath) -> Result<(), Error> {
    match overlapping(dirs, place).find(|(_, owner)| owner.is_configmap) {
        None => Ok(()),
        Some((dir, _)) => Err(conflict(place, format!("ConfigMap {}", dir.relative()))),
    }
}

fn replicated<'a>(
    feeds: &'a [WatchSpec],
    closed: &BTreeSet<InputId>,
) -> impl Iterator<Item = (&'a DirPath, String)> {
    let open = feeds.iter().enumerate().filter(|(id, _)| !closed.contains(&InputId(*id)));
    open.filter_map(|(_, feed)| Some((feed.place()?, format!("replicated {}", feed.resource))))
}

/// Paths at, above or below `place`.
fn overlapping<'a, T>(
    map: &'a BTreeMap<DirPath, T>,
    place: &DirPath,
) -> impl Iterator<Item = (&'a DirPath, &'a T)> {
    let place = place.as_str().to_owned();
    let ends: Vec<_> =
        place.match_indices('/').map(|(index, _)| index).skip(1).chain([place.len()]).collect();
    let above: Vec<_> = ends.into_iter().filter_map(|end| map.get_key_value(&place[..end])).collect();
    let from = format!("{place}/");
    let below = map.range::<str, _>((Bound::Excluded(from.as_str()), Bound::Unbounded));
    above.into_iter().chain(below.take_while(move |(path, _)| path.as_str().starts_with(&from)))
}

fn conflict(place: &DirPath, owner: String) -> Error {
    Error::ChangeBatch { place: place.clone(), owner }
}

fn check_disjoint<'a>(
    place: &DirPath,
    mut owners: impl Iterator<Item = (&'a DirPath, String)>,
) -> Result<(), Error> {
    match owners.find(|(other, _)| place.is_within(other) || other.is_within(place)) {
        None => Ok(()),
        Some((_, owner)) => Err(conflict(place, owner)),
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use opa_hub_proto::head::ENTRY_BYTES_MAX;

    use super::*;
    use crate::fields::mask::FieldMask;
    use crate::model::Resource;
    use crate::policy::candidate::Selection;
    use crate::policy::resolve::settle;

    fn feed(content: Content) -> WatchSpec {
        let scope = NamespaceSelector::AllExcept { ignored: Vec::new() };
        WatchSpec { resource: Resource::configmaps(), scope, labels: Vec::new(), content }
    }

    fn projection() -> Projector {
        let pods = "/kubernetes/pods".parse().unwrap();
        let feeds = vec![feed(Content::PolicyRegistry), feed(Content::Data), feed(Content::Resource(pods))];
        let spec = BundleSpec { test_label: Some("tests".into()), ..BundleSpec::of_feeds("main", feeds) };
        Projector::new(&spec, FieldMasks::alike(FieldMask::all()))
    }

    /// Applies a ConfigMap (`None` removes) and compares batch and rejections.
    fn check(
        projection: &mut Projector,
        feed: usize,
        name: &str,
        data: Option<&[(&str, &str)]>,
        expected: &[&str],
        refused: &[&str],
    ) {
        let (namespace, name) = name.split_once('/').unwrap();
        let key = ObjectKey { namespace: namespace.into(), name: name.into() };
        let change = match data {
            None => Change::Remove(InputId(feed), key),
            Some(data) => {
                let data: BTreeMap<_, _> = data.iter().copied().collect();
                let json = serde_json::json!({ "data": data }).to_string();
                Change::Put(InputId(feed), Object { key, json: json.into() })
            }
        };
        let mut batch = Batch::default();
        let good = projection.last_good();
        let before: Vec<_> = good.values().flat_map(|texts| texts.modules.clone()).collect();
        projection.apply(change, &mut batch);
        projection.retry_refused(&mut batch);
        while let Some(candidates) = projection.job() {
            let nothing_wrong = async |_: &Selection| Ok::<_, Infallible>(Vec::new());
            let Ok(outcome) = futures::executor::block_on(settle(&candidates, nothing_wrong));
            projection.take_outcome(outcome, &mut batch);
            projection.retry_refused(&mut batch);
        }
        // Accepted modules are part of every check.
        let is_new = |id: &String, module: &Arc<Module>| !before.contains(&(id.clone(), module.clone()));
        batch.modules.retain(|id, module| module.as_ref().is_none_or(|module| is_new(id, module)));
        let sign = |some: bool| if some { '+' } else { '-' };
        let entries = batch.dirs.iter().flat_map(|(dir, keys)| {
            keys.iter().map(move |(key, value)| format!("{}{dir}/{key}", sign(value.is_some())))
        });
        let modules = batch.modules.iter().map(|(id, module)| format!("{}{id}", sign(module.is_some())));
        assert_eq!(entries.chain(modules).collect::<Vec<_>>(), expected);
        let problems = projection.problems();
        assert_eq!(problems.len(), refused.len(), "{problems:?}");
        for (problem, part) in problems.iter().zip(refused) {
            assert!(format!("{} {}", problem.subject, problem.message).contains(part), "{problem:?}");
        }
    }

    #[test]
    fn changes_outside_the_mask_change_nothing() {
        let feeds = vec![feed(Content::Resource("/kubernetes/pods".parse().unwrap()))];
        let kept = FieldMasks::alike(FieldMask::parse(["metadata.labels"]).unwrap());
        let mut p = Projector::new(&BundleSpec::of_feeds("main", feeds), kept);
        let key = ObjectKey { namespace: "a".into(), name: "p".into() };
        let mut view = crate::snapshot::Snapshot::empty(Arc::new([]), None);
        let mut put = |json: &str| {
            let mut batch = Batch::default();
            let object = Object { key: key.clone(), json: json.to_owned().into() };
            p.apply(Change::Put(InputId(0), object), &mut batch);
            let next = view.apply(batch).map(|(next, _)| next);
            let json = next.as_ref().map(|view| {
                let mut json = Vec::new();
                view.dirs.values().for_each(|dir| dir.write_json(&mut json));
                String::from_utf8(json).unwrap()
            });
            view = next.unwrap_or(view.clone());
            json
        };
        let cut = r#"{"p":{"metadata":{"labels":{"a":"b"}}}}"#.to_owned();
        assert_eq!(put(r#"{"metadata":{"labels":{"a":"b"},"uid":"1"},"status":1}"#), Some(cut));
        assert_eq!(put(r#"{"metadata":{"labels":{"a":"b"},"uid":"1"},"status":2}"#), None);
    }

    #[test]
    fn objects_over_the_limit_stay_unchanged() {
        let feeds = vec![feed(Content::PolicyRegistry), feed(Content::Data)];
        let spec = BundleSpec { max_bytes: Some(30), ..BundleSpec::of_feeds("main", feeds) };
        let p = &mut Projector::new(&spec, FieldMasks::alike(FieldMask::all()));
        let code = "over_limit";
        check(p, 1, "a/m", Some(&[("x", r#"{"a":10}"#)]), &["+/a/m/x"], &[]);
        check(p, 1, "a/n", Some(&[("x", r#"{"a":10}"#)]), &["+/a/n/x"], &[]);
        let message = "larger than 30 bytes (maxBytes), and data (v1/configmaps) has 0 MB";
        check(p, 1, "a/o", Some(&[("x", "{}")]), &[], &[message]);
        check(p, 1, "a/m", Some(&[("x", r#"{"a":1000000}"#)]), &[], &["a/m", "a/o"]);
        assert_eq!(p.refused.values().map(|refused| &*refused.fault.code).collect::<Vec<_>>(), [code, code]);
        check(p, 1, "a/m", Some(&[("x", "{}")]), &["+/a/m/x", "+/a/o/x"], &[]);
        check(p, 1, "a/p", Some(&[("x", "{}")]), &[], &["a/p"]);
        check(p, 1, "a/p", None, &[], &[]);
        check(p, 1, "a/n", None, &["-/a/n/x"], &[]);
        assert_eq!(p.limit.bytes, 14);
    }

    #[test]
    fn fitting_objects_are_accepted_next_to_larger_ones() {
        let feeds = vec![feed(Content::PolicyRegistry), feed(Content::Data)];
        let spec = BundleSpec { max_bytes: Some(40), ..BundleSpec::of_feeds("main", feeds) };
        let p = &mut Projector::new(&spec, FieldMasks::alike(FieldMask::all()));
        let value = |length: usize| format!("{{\"a\":\"{}\"}}", "x".repeat(length - 8));
        check(p, 1, "a/first", Some(&[("x", &value(10))]), &["+/a/first/x"], &[]);
        check(p, 1, "a/second", Some(&[("x", &value(20))]), &["+/a/second/x"], &[]);
        check(p, 1, "a/big", Some(&[("x", &value(55))]), &[], &["a/big"]);
        check(p, 1, "a/small", Some(&[("x", &value(8))]), &[], &["a/big", "a/small"]);
        check(p, 1, "a/second", None, &["-/a/second/x", "+/a/small/x"], &["a/big"]);
        check(p, 1, "a/other", Some(&[("x", &value(20))]), &[], &["a/big", "a/other"]);
        check(p, 1, "a/big", Some(&[("x", "{}")]), &["+/a/big/x"], &["a/other"]);
        check(p, 1, "a/big", None, &["-/a/big/x"], &["a/other"]);
    }

    #[test]
    fn data_configmaps_are_accepted_as_a_whole() {
        let p = &mut projection();
        check(p, 1, "a/m", Some(&[("x", "{}"), ("y", r#"{"a": 1}"#)]), &["+/a/m/x", "+/a/m/y"], &[]);
        check(p, 1, "a/m", Some(&[("x", "{}"), ("y", "{")]), &[], &["ConfigMap a/m key y is not JSON"]);
        check(p, 1, "a/m", Some(&[("x", "[1]")]), &[], &["key x is not a JSON object"]);
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(1000), "]".repeat(1000));
        check(p, 1, "a/m", Some(&[("x", &deep)]), &[], &["nested deeper"]);
        check(p, 1, "a/m", Some(&[("x", "{}"), ("z", "{}")]), &["+/a/m/x", "-/a/m/y", "+/a/m/z"], &[]);
        check(p, 1, "a/m", None, &["-/a/m/x", "-/a/m/z"], &[]);
    }

    #[test]
    fn invalid_names_are_problems_until_removed() {
        for feed in [1, 2] {
            let p = &mut projection();
            check(p, feed, "a b/m", Some(&[("x", "{}")]), &[], &["a b"]);
            check(p, feed, "a b/m", None, &[], &[]);
        }
    }

    #[test]
    fn data_does_not_overlap_replicated_resources() {
        let p = &mut projection();
        check(
            p,
            1,
            "kubernetes/pods",
            Some(&[("x", "{}")]),
            &[],
            &["conflicts with replicated v1/configmaps"],
        );
        check(
            p,
            1,
            "kubernetes/other",
            Some(&[("x", "{}")]),
            &["+/kubernetes/other/x"],
            &["/kubernetes/pods"],
        );
        check(p, 1, "kubernetes/pods", None, &[], &[]);
        check(p, 2, "kubernetes/pods", Some(&[]), &["+/kubernetes/pods/kubernetes/pods"], &[]);
    }

    #[test]
    fn policy_configmaps_are_accepted_as_a_whole() {
        let p = &mut projection();
        check(p, 0, "a/m", Some(&[("x.rego", "package x")]), &["+a/m/x.rego"], &[]);
        let two = [("x.rego", "package x\np := 1"), ("y.rego", "package")];
        check(p, 0, "a/m", Some(&two), &[], &["ConfigMap a/m key y.rego is not a Rego module"]);
        check(p, 0, "a/m", Some(&[("y.rego", "package y")]), &["-a/m/x.rego", "+a/m/y.rego"], &[]);
        check(p, 0, "a/m", None, &["-a/m/y.rego"], &[]);
        check(p, 0, "a/m", Some(&[("x/y", "package x")]), &[], &["x/y"]);
    }

    #[test]
    fn packages_and_data_do_not_overlap() {
        let p = &mut projection();
        check(p, 0, "a/m", Some(&[("x", "package shop")]), &["+a/m/x"], &[]);
        check(p, 1, "shop/roles", Some(&[("x", "{}")]), &[], &["conflicts with package shop"]);
        check(p, 0, "a/m", None, &["+/shop/roles/x", "-a/m/x"], &[]);
        check(
            p,
            0,
            "a/m",
            Some(&[("x", "package shop.roles.y")]),
            &[],
            &["conflicts with ConfigMap shop/roles"],
        );
        check(p, 0, "a/m", Some(&[("x", "package shop.orders")]), &["+a/m/x"], &[]);
        check(p, 0, "b/m", Some(&[("x", "package kubernetes.admission")]), &["+b/m/x"], &[]);
        check(p, 0, "b/m", Some(&[("x", "package kubernetes.pods")]), &[], &["replicated"]);
        check(
            p,
            0,
            "b/m",
            Some(&[("x", "package system.opahub")]),
            &[],
            &["conflicts with opa-hub or OPA itself"],
        );
        check(p, 0, "b/m", Some(&[("x", "package system")]), &["+b/m/x"], &[]);
        check(p, 0, "b/m", Some(&[("x", "package system.authz")]), &["+b/m/x"], &[]);
        check(p, 1, "system/bundles", Some(&[("x", "{}")]), &[], &["conflicts with opa-hub or OPA itself"]);
    }

    #[test]
    fn entries_and_modules_are_bounded() {
        let p = &mut projection();
        let huge = format!("{{\"a\":\"{}\"}}", "x".repeat(ENTRY_BYTES_MAX));
        check(p, 1, "a/m", Some(&[("x", &huge)]), &[], &["the maximum for one entry is 10485760"]);
        check(p, 1, "a/m", None, &[], &[]);
        // Only one fits into the limit of all modules.
        let text = format!("package a\n# {}", "x".repeat(MODULES_BYTES_MAX / 40));
        let names: Vec<_> = (10..35).map(|at| format!("k{at}")).collect();
        let keys: Vec<_> = names.iter().map(|name| (name.as_str(), text.as_str())).collect();
        let ids = |sign, configmap| {
            names.iter().map(|name| format!("{sign}a/{configmap}/{name}")).collect::<Vec<_>>()
        };
        let check_ids = |p: &mut Projector, name, data, expected: &[String], refused: &[&str]| {
            check(p, 0, name, data, &expected.iter().map(String::as_str).collect::<Vec<_>>(), refused);
        };
        check_ids(p, "a/1", Some(&keys), &ids('+', 1), &[]);
        check_ids(p, "a/2", Some(&keys), &[], &["all modules together"]);
        check_ids(p, "a/1", None, &[ids('-', 1), ids('+', 2)].concat(), &[]);
    }
}
