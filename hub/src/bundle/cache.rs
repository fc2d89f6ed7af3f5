//! Published snapshots: a view, its history and a cache of all encodings.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use opa_hub_proto::path::DirPath;
use opa_hub_proto::position::{Bounds, Lag, Position};
use opa_hub_proto::reconcile::{READS_BYTES_MAX, READS_MAX, RECONCILE_BYTES_MAX, Reconcile};
use opa_hub_proto::revision::{Digest, Hasher, Revision};
use tokio::sync::{OnceCell, Semaphore, SemaphorePermit, watch};

use crate::bundle::namespaces::{self, NamespaceViews};
use crate::bundle::watches::WatchStatuses;
use crate::fields::cost::{self, Sample};
use crate::fields::mask::FieldMask;
use crate::fields::masks::FieldMasks;
use crate::model::{InputId, Object, Problem, Replicated, Version, directory};
use crate::policy::dataflow::ReadSet;
use crate::policy::verdict::VerdictBoard;
use crate::snapshot::archive::Archive;
use crate::snapshot::bundle_archive::{self, ArchiveKind, SegmentCache};
use crate::snapshot::history::History;
use crate::snapshot::{Batch, Directory, Snapshot, frame, within};
use crate::spec::NamespaceScoping;

/// Minimum interval of bundle archives. OPA parses each one completely.
pub(super) const SNAPSHOT_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum cached reconcile responses of one bundle.
const RECONCILE_CACHE_MAX: usize = 1024;
/// Maximum bytes of cached reconcile responses. The newest is always cached.
pub const RECONCILE_CACHE_BYTES_MAX: usize = 64 << 20;
/// Maximum bytes of cached or unsent reconcile responses of one bundle.
pub const RECONCILE_LIVE_MAX: usize = 128 << 20;
/// Maximum concurrent reconcile encodes of one bundle. Each uses a core.
pub const RECONCILE_ENCODES_MAX: usize = 1;
/// Maximum bytes of pending reconcile requests of one bundle: 280 with 3,000 directories.
const RECONCILE_REQUESTS_MAX: usize = 64 << 20;
/// Minimum bytes charged for a reconcile request: at most 4,096 wait.
const RECONCILE_REQUEST_MIN: usize = 16 << 10;
/// Maximum bytes of encoded frames of one bundle. Above it, clients wait for large frames.
pub(super) const FRAMES_LIVE_MAX: usize = 128 << 20;

/// Maximum cached frames of an edition. Only a burst leaves clients at more revisions.
const FRAMES_MAX: usize = 256;
const FRAMES_BYTES_MAX: usize = 64 << 20;
/// Maximum changed keys of a frame that is encoded inline: about 0.1 ms with 1 KB values.
const INLINE_ENCODE_KEYS_MAX: usize = 64;
/// Maximum large frames of a bundle encoded at a time for opening streams: writers need a core.
const LARGE_ENCODES_MAX: usize = 1;
/// Maximum time that a reconcile request waits to be read. Agents retry or ask another replica.
const RECONCILE_WAIT: Duration = Duration::from_secs(10);
/// Bytes of a reconcile request for each permit.
const REQUEST_UNIT: usize = 1 << 10;

/// A bundle: the newest edition, and a throttled one for archives.
pub struct Bundle {
    /// Unique within the process.
    pub id: u64,
    /// Bundle name.
    pub name: String,
    head: watch::Sender<Option<Arc<CachedSnapshot>>>,
    paced: watch::Sender<Option<Arc<CachedSnapshot>>>,
    /// Observed position of the source. The head contains all changes before it.
    position: Arc<Mutex<Position>>,
    problems: Mutex<Arc<[Problem]>>,
    reading: Arc<Mutex<Arc<FieldState>>>,
    /// WatchStatuses.
    pub feeds: WatchStatuses,
    pub(crate) verdicts: VerdictBoard,
    segments: Arc<SegmentCache>,
    objects: Arc<OnceLock<Objects>>,
    newest: Arc<OnceLock<Newest>>,
    /// Counters.
    pub counters: Arc<Counters>,
    pub(crate) budget: Arc<Budget>,
    /// Namespace views, if enabled.
    pub scopes: Option<NamespaceViews>,
}

/// Field masks and the reads behind them.
#[derive(Default)]
pub struct FieldState {
    pub(crate) kept: FieldMasks,
    pub(crate) reads: Option<ReadSet>,
}

/// Returns the newest possible version of each feed's objects.
pub type Newest = Box<dyn Fn() -> BTreeMap<InputId, Version> + Send + Sync>;

/// Lists the replicated objects.
pub type Objects = Box<dyn Fn() -> Replicated + Send + Sync>;

/// Totals since the start, and memory.
#[derive(Default)]
pub struct Counters {
    /// Editions published.
    pub view_changes: AtomicU64,
    /// Frames encoded.
    pub frame_encodes: AtomicU64,
    pub(crate) projection_bytes: AtomicUsize,
    /// Bytes of frames cached or being sent.
    pub frame_bytes: Arc<AtomicUsize>,
    /// Bytes of reconcile answers cached or being sent, without shared content.
    pub answer_bytes: Arc<AtomicUsize>,
    /// Archives encoded.
    pub snapshot_encodes: AtomicU64,
    /// Reconcile answers encoded.
    pub reconcile_encodes: AtomicU64,
    pub(crate) agents: AtomicI64,
    /// Archives sent, by [`ArchiveKind`].
    pub(crate) snapshots: [AtomicU64; 3],
    pub(crate) reconciles: AtomicU64,
    pub(crate) unknown_revisions: AtomicU64,
}

/// A published snapshot.
pub struct CachedSnapshot {
    /// Content.
    pub view: Snapshot,
    pub(crate) published: SystemTime,
    bounds: Mutex<Bounds>,
    bundle: String,
    log: History,
    frames: Mutex<Frames>,
    archives: [Arc<OnceCell<Archive>>; 3],
    /// Owned by waiting requests and the [`Budget`].
    answers: Mutex<HashMap<Digest, Weak<Answer>>>,
    segments: Arc<SegmentCache>,
    objects: Arc<OnceLock<Objects>>,
    counters: Arc<Counters>,
    budget: Arc<Budget>,
}

/// Limits memory and threads for all clients of a bundle.
pub(crate) struct Budget {
    pub(crate) large_encodes: Semaphore,
    reconcile_encodes: Arc<Semaphore>,
    /// In [`REQUEST_UNIT`]s.
    requests: Semaphore,
    /// Oldest first.
    answers: Mutex<VecDeque<Arc<Answer>>>,
}

/// Answer to equal reconcile requests.
#[derive(Default)]
struct Answer {
    /// Locked until the answer is encoded. If the client disconnects, the next request takes over.
    first: tokio::sync::Mutex<()>,
    archive: OnceLock<(Archive, IsWidened)>,
}

/// Whether an answer has objects as of its encoding, newer than its edition.
pub type IsWidened = bool;

/// Frames by start revision.
type Frames = HashMap<Revision, Arc<OnceLock<Option<Bytes>>>>;

/// Bytes counted until the last reference is dropped.
struct MeteredBytes {
    bytes: Bytes,
    live: Arc<AtomicUsize>,
}

impl MeteredBytes {
    fn bytes(bytes: Bytes, live: &Arc<AtomicUsize>) -> Bytes {
        live.fetch_add(bytes.len(), Ordering::Relaxed);
        Bytes::from_owner(Self { bytes, live: Arc::clone(live) })
    }
}

impl AsRef<[u8]> for MeteredBytes {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for MeteredBytes {
    fn drop(&mut self) {
        self.live.fetch_sub(self.bytes.len(), Ordering::Relaxed);
    }
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            large_encodes: Semaphore::new(LARGE_ENCODES_MAX),
            reconcile_encodes: Arc::new(Semaphore::new(RECONCILE_ENCODES_MAX)),
            requests: Semaphore::new(RECONCILE_REQUESTS_MAX / REQUEST_UNIT),
            answers: Mutex::default(),
        }
    }
}

impl Budget {
    /// Whether another answer may be encoded. Clears the cache if needed.
    fn has_room(&self, live: &AtomicUsize) -> bool {
        let has_room = || live.load(Ordering::Relaxed) <= RECONCILE_LIVE_MAX;
        if !has_room() {
            self.answers().clear();
        }
        has_room()
    }

    fn cache(&self, answer: Arc<Answer>) {
        let bytes = |answer: &Arc<Answer>| answer.archive.get().map_or(0, |(archive, _)| archive.bytes);
        let mut answers = self.answers();
        answers.push_back(answer);
        let mut total: usize = answers.iter().map(bytes).sum();
        while answers.len() > RECONCILE_CACHE_MAX || total > RECONCILE_CACHE_BYTES_MAX && answers.len() > 1 {
            total -= answers.pop_front().as_ref().map_or(0, bytes);
        }
    }

    fn answers(&self) -> MutexGuard<'_, VecDeque<Arc<Answer>>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Next step for a stream.
pub enum CatchUp {
    /// The client is at the head.
    UpToDate,
    /// Events that lead to the head.
    Frame(Bytes),
    /// The revision is unknown or too old: the client must reconcile.
    TooOld,
}

impl Bundle {
    /// Creates a bundle without edition.
    pub fn new(name: String, scoped: Option<NamespaceScoping>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            name,
            head: watch::Sender::new(None),
            paced: watch::Sender::new(None),
            position: Arc::default(),
            problems: Mutex::default(),
            reading: Arc::default(),
            feeds: WatchStatuses::default(),
            verdicts: VerdictBoard::default(),
            segments: Arc::default(),
            objects: Arc::default(),
            newest: Arc::default(),
            counters: Arc::default(),
            budget: Arc::default(),
            scopes: scoped.map(NamespaceViews::new),
        }
    }

    pub(super) fn part(&self) -> Self {
        let (objects, counters) = (Arc::clone(&self.objects), Arc::clone(&self.counters));
        let newest = Arc::clone(&self.newest);
        let (reading, position) = (Arc::clone(&self.reading), Arc::clone(&self.position));
        let (feeds, budget) = (self.feeds.clone(), Arc::clone(&self.budget));
        Self {
            position,
            reading,
            feeds,
            objects,
            newest,
            counters,
            budget,
            ..Self::new(self.name.clone(), None)
        }
    }

    /// The bundle as seen by streams from `namespace`.
    pub fn of(self: &Arc<Self>, namespace: Option<&str>) -> Result<Arc<Self>, namespaces::Error> {
        self.scopes.as_ref().map_or_else(|| Ok(Arc::clone(self)), |scopes| scopes.of(self, namespace))
    }

    /// The bundle as seen by a single request from `namespace`.
    pub fn once(self: &Arc<Self>, namespace: Option<&str>) -> Result<Arc<Self>, namespaces::Error> {
        self.scopes.as_ref().map_or_else(|| Ok(Arc::clone(self)), |scopes| scopes.once(self, namespace))
    }

    /// Reserves memory for a request of `bytes`. `None` on timeout.
    pub(crate) async fn admit_reconcile(&self, bytes: usize) -> Option<SemaphorePermit<'_>> {
        let units = bytes.clamp(RECONCILE_REQUEST_MIN, RECONCILE_BYTES_MAX).div_ceil(REQUEST_UNIT);
        let units = u32::try_from(units).expect("a request is a few thousand units");
        let permit =
            tokio::time::timeout(RECONCILE_WAIT, self.budget.requests.acquire_many(units)).await.ok()?;
        Some(permit.expect("the semaphore is never closed"))
    }

    /// Whether anything but [`pace`](Self::pace) receives editions.
    pub(super) fn is_read(&self) -> bool {
        self.head.receiver_count() > 1 || self.paced.receiver_count() > 0
    }

    /// Sets the lister of replicated objects, once.
    pub fn set_objects(&self, objects: Objects) {
        _ = self.objects.set(objects);
    }

    /// Unpruned replicated objects, each with its resource's place.
    pub fn objects(&self) -> Vec<(DirPath, Object)> {
        self.replicated().objects
    }

    pub(crate) fn set_newest(&self, newest: Newest) {
        _ = self.newest.set(newest);
    }

    /// Newest possible version of all objects.
    pub fn newest(&self) -> Position {
        let mut newest = Position::default();
        for (id, Version(version)) in self.newest.get().map(|newest| newest()).unwrap_or_default() {
            if let Some(feed) = self.feeds.of(id) {
                newest.heard(feed.position_name.clone(), version);
            }
        }
        newest
    }

    fn replicated(&self) -> Replicated {
        self.objects.get().map(|objects| objects()).unwrap_or_default()
    }

    /// Publishes `view`, which is within `bounds`.
    pub fn publish(&self, view: Snapshot, log: History, bounds: Bounds) {
        self.counters.view_changes.fetch_add(1, Ordering::Relaxed);
        let before = self.head.borrow().clone();
        // Unchanged parts share their archives.
        let archives = [ArchiveKind::Full, ArchiveKind::Policy, ArchiveKind::Data].map(|part| {
            let same = before.as_ref().filter(|before| part.is_same(&before.view, &view));
            same.map(|before| Arc::clone(&before.archives[part as usize])).unwrap_or_default()
        });
        let edition = CachedSnapshot {
            view,
            published: SystemTime::now(),
            bounds: Mutex::new(bounds),
            bundle: self.name.clone(),
            log,
            frames: Mutex::default(),
            archives,
            answers: Mutex::default(),
            segments: Arc::clone(&self.segments),
            objects: Arc::clone(&self.objects),
            counters: Arc::clone(&self.counters),
            budget: Arc::clone(&self.budget),
        };
        let edition = Arc::new(edition);
        self.head.send_replace(Some(Arc::clone(&edition)));
        if let Some(scopes) = &self.scopes {
            scopes.follow(&edition);
        }
    }

    /// Advances the observed position without publishing. The head contains all changes before it.
    pub(crate) fn set_position(&self, position: &Position) {
        let before = {
            let mut current = self.position.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *current, position.clone())
        };
        self.advance(position);
        if let Some(scopes) = self.scopes.as_ref().filter(|_| position.is_behind(&before)) {
            scopes.advance(position);
        }
    }

    /// Moves the head to `position`. The archived edition moves only if the source went back.
    pub(super) fn advance(&self, position: &Position) {
        let (head, paced) = (self.head.borrow().clone(), self.paced.borrow().clone());
        if let Some(head) = head
            && head.bounds().advance(position)
        {
            head.forget_frames();
        }
        if let Some(paced) = paced
            && position.is_behind(&paced.newest())
        {
            paced.bounds().advance(position);
        }
    }

    /// Newest position of `edition`. The head is as new as its bundle.
    pub(crate) fn newest_of(&self, edition: &Arc<CachedSnapshot>) -> Position {
        let position = self.position();
        let is_head = self.head.borrow().as_ref().is_some_and(|head| Arc::ptr_eq(head, edition));
        if is_head { position.after(&edition.newest()) } else { edition.newest() }
    }

    /// Observed position of the source.
    pub fn position(&self) -> Position {
        self.position.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn memory(&self) -> [(&'static str, usize); 8] {
        let head = self.head.borrow().clone();
        let (entries, modules) = head.as_ref().map(|head| head.view.memory()).unwrap_or_default();
        let load = |bytes: &AtomicUsize| bytes.load(Ordering::Relaxed);
        [
            ("entries", entries),
            ("modules", modules),
            ("history", head.map_or(0, |head| head.log.memory())),
            ("segments", self.segments.memory()),
            ("namespaces", self.scopes.as_ref().map_or(0, NamespaceViews::memory)),
            ("projection", load(&self.counters.projection_bytes)),
            ("frames", load(&self.counters.frame_bytes)),
            ("answers", load(&self.counters.answer_bytes)),
        ]
    }

    pub(crate) fn set_problems(&self, problems: Vec<Problem>) {
        let mut current = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
        if **current != *problems {
            *current = problems.into();
        }
    }

    /// Rejected objects.
    pub fn problems(&self) -> Arc<[Problem]> {
        self.problems.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_reading(&self, reading: FieldState) {
        *self.reading.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(reading);
    }

    pub(crate) fn reading(&self) -> Arc<FieldState> {
        self.reading.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Cost of each replicated resource. Reads all replicated objects.
    pub(crate) fn forecast(&self) -> Vec<cost::Resource> {
        let (reading, edition) = (self.reading(), self.head.borrow().clone());
        let Some(edition) = edition else { return Vec::new() };
        let mut places: BTreeMap<DirPath, Vec<Sample>> = BTreeMap::new();
        for (place, object) in self.objects() {
            let (namespace, whole_bytes) = (object.key.namespace.clone(), object.json.len());
            let dir = directory(&place, &object.key).and_then(|dir| edition.view.dirs.get(&dir));
            if let Some(entry) = dir.and_then(|dir| dir.get(&object.key.name)) {
                let sample = Sample { namespace, whole_bytes, kept: entry.value.clone() };
                places.entry(place).or_default().push(sample);
            }
        }
        let resource = |(place, objects): (DirPath, Vec<Sample>)| {
            let scope = Some(objects.iter().all(|object| object.namespace.is_empty()));
            cost::resource(&place, scope, reading.kept.of(&place), reading.reads.as_ref(), &objects)
        };
        places.into_iter().map(resource).collect()
    }

    /// The newest edition, `None` until all sources have listed (I5).
    pub fn head(&self) -> watch::Receiver<Option<Arc<CachedSnapshot>>> {
        self.head.subscribe()
    }

    /// The edition for archives of `part`. With data, see [`pace`](Self::pace).
    pub fn archived(&self, part: ArchiveKind) -> watch::Receiver<Option<Arc<CachedSnapshot>>> {
        if part.has_data() { self.paced.subscribe() } else { self.head.subscribe() }
    }

    /// Passes editions to [`archived`](Self::archived), at most one in `SNAPSHOT_INTERVAL`.
    pub fn pace(self: &Arc<Self>) -> impl Future<Output = ()> + Send + 'static {
        // Subscribes at once, for `is_read`.
        let (bundle, mut head) = (Arc::clone(self), self.head());
        async move {
            loop {
                let edition = head.borrow_and_update().clone();
                if edition.is_some() {
                    bundle.paced.send_replace(edition);
                    tokio::time::sleep(SNAPSHOT_INTERVAL).await;
                }
                if head.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        }
    }
}

impl CachedSnapshot {
    pub(super) fn log(&self) -> &History {
        &self.log
    }

    /// Position that no content is newer than.
    pub fn newest(&self) -> Position {
        self.bounds().newest.clone()
    }

    pub(super) fn bounds(&self) -> MutexGuard<'_, Bounds> {
        self.bounds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Raises the position of this head to `current` if a client at `required` needs it. Drops frames with the older
    /// position.
    pub fn tell_as_of(&self, current: &Position, required: &Position) {
        let mut bounds = self.bounds();
        if bounds.all.is_behind(required) && bounds.all.is_behind(current) {
            let newest = current.clone().after(&bounds.newest);
            *bounds = Bounds { all: current.clone(), newest };
            self.frames.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
    }

    /// Content that this edition would revert at a client with revision `from`, observed at `required`. `current` is
    /// the bundle's position before this edition was read. `None` if there is none, or `from` is unknown.
    pub fn lag(&self, from: Revision, current: &Position, required: &Position) -> Option<Lag> {
        if !current.is_behind(required) {
            return None;
        }
        let modules = from.modules != self.view.revision.modules;
        if from.data == self.view.revision.data {
            return current.lag(required, std::iter::empty(), modules);
        }
        current.lag(required, self.log.dirs_since(from.data)?, modules)
    }

    /// [`lag`](Self::lag) for a reconcile request. `modules` is the digest of the client's modules, if known.
    pub fn lag_of(
        &self,
        request: &Reconcile,
        modules: Option<Digest>,
        current: &Position,
        required: &Position,
    ) -> Option<Lag> {
        let dirs = &self.view.dirs;
        let removed = request.dirs.keys().filter(|dir| !dirs.contains_key(*dir));
        let changed = dirs.iter().filter(|(path, dir)| request.dirs.get(*path) != Some(&dir.digest));
        let differing = removed.chain(changed.map(|(path, _)| path));
        current.lag(required, differing, modules != Some(self.view.revision.modules))
    }

    /// Whether the frame from `from` is cached or cheap to encode.
    pub(crate) fn is_near(&self, from: Revision) -> bool {
        from == self.view.revision || self.log.data_keys_since(from.data) <= INLINE_ENCODE_KEYS_MAX || {
            let frames = self.frames.lock().unwrap_or_else(PoisonError::into_inner);
            frames.get(&from).is_some_and(|frame| frame.get().is_some())
        }
    }

    /// Whether large frames must wait for memory.
    pub(crate) fn is_full(&self) -> bool {
        self.counters.frame_bytes.load(Ordering::Relaxed) > FRAMES_LIVE_MAX
    }

    /// Drops cached frames, which would remain cached in a quiet namespace.
    pub fn forget_frames(&self) {
        self.frames.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Returns [`next`](Self::next). Large frames are encoded on a blocking thread, few at a time.
    pub(crate) async fn next_beside(self: &Arc<Self>, from: Revision) -> CatchUp {
        if self.is_near(from) {
            return self.next(from);
        }
        let _permit = self.budget.large_encodes.acquire().await.expect("the semaphore is never closed");
        if self.is_near(from) {
            return self.next(from);
        }
        let edition = Arc::clone(self);
        tokio::task::spawn_blocking(move || edition.next(from)).await.expect("encoding does not panic")
    }

    /// Next step for a client at `from`. Each frame is encoded once (I4).
    pub fn next(&self, from: Revision) -> CatchUp {
        if from == self.view.revision {
            return CatchUp::UpToDate;
        }
        let cell = {
            let mut frames = self.frames.lock().unwrap_or_else(PoisonError::into_inner);
            let bytes = |frame: &Arc<OnceLock<Option<Bytes>>>| frame.get()?.as_ref().map(Bytes::len);
            if frames.len() >= FRAMES_MAX
                || frames.values().filter_map(bytes).sum::<usize>() > FRAMES_BYTES_MAX
            {
                frames.clear();
            }
            Arc::clone(frames.entry(from).or_default())
        };
        let frame = cell.get_or_init(|| {
            let bounds = self.bounds().clone();
            let frame = frame::encode(&self.view, &self.log, &bounds, from);
            self.counters.frame_encodes.fetch_add(u64::from(frame.is_some()), Ordering::Relaxed);
            frame.map(|frame| MeteredBytes::bytes(frame.into(), &self.counters.frame_bytes))
        });
        frame.clone().map_or(CatchUp::TooOld, CatchUp::Frame)
    }

    /// Archive of `part`, encoded once (I4).
    pub async fn archive(self: &Arc<Self>, part: ArchiveKind) -> Archive {
        let edition = Arc::clone(self);
        let cell = Arc::clone(&self.archives[part as usize]);
        encode_once(cell, move || {
            edition.counters.snapshot_encodes.fetch_add(1, Ordering::Relaxed);
            bundle_archive::whole(&edition.view, part, &edition.bundle, &edition.segments)
        })
        .await
    }

    /// Archive of what the client of `request` lacks; `None` if answers use all their memory. Equal requests share one
    /// encoding. The archive has all fields that the client's modules read until they are replaced (I10).
    pub async fn reconcile(self: &Arc<Self>, request: Reconcile) -> Option<(Archive, IsWidened)> {
        let mut hasher = Hasher::default();
        hasher.part(&serde_json::to_vec(&request).expect("a request has text keys only"));
        let answer = self.answer(hasher.finish());
        let _first = answer.first.lock().await;
        if let Some(archive) = answer.archive.get() {
            return Some(archive.clone());
        }
        let permits = Arc::clone(&self.budget.reconcile_encodes);
        let permit = permits.acquire_owned().await.expect("the semaphore is never closed");
        if !self.budget.has_room(&self.counters.answer_bytes) {
            return None;
        }
        let (edition, encoding) = (Arc::clone(self), Arc::clone(&answer));
        // Completes if the client disconnects, for the next request.
        let encoded = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let archive = encoding.archive.get_or_init(|| edition.difference(&request)).clone();
            edition.budget.cache(encoding);
            archive
        });
        Some(encoded.await.expect("encoding does not panic"))
    }

    fn answer(&self, request: Digest) -> Arc<Answer> {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(answer) = answers.get(&request).and_then(Weak::upgrade) {
            return answer;
        }
        if answers.len() == answers.capacity() {
            answers.retain(|_, answer| answer.strong_count() > 0);
        }
        let answer = Arc::default();
        answers.insert(request, Arc::downgrade(&answer));
        answer
    }

    fn difference(&self, request: &Reconcile) -> (Archive, IsWidened) {
        self.counters.reconcile_encodes.fetch_add(1, Ordering::Relaxed);
        let widened = self.widened_for(request);
        let is_widened = widened.is_some();
        let mut archive =
            bundle_archive::difference(widened.as_ref().unwrap_or(&self.view), request, &self.segments);
        for piece in &mut archive.pieces {
            // Others are cached segments.
            if piece.is_unique() {
                *piece = MeteredBytes::bytes(std::mem::take(piece), &self.counters.answer_bytes);
            }
        }
        (archive, is_widened)
    }

    /// Masks of this hub, and their union with the client's. `None` if objects are served whole.
    fn masks(&self, request: &Reconcile) -> Option<(FieldMasks, FieldMasks)> {
        let served = FieldMasks::parse(self.view.reads.as_deref()?).ok()?;
        let mut union = served.clone();
        let is_bounded = |reads: &&String| request.reads.len() <= READS_MAX && reads.len() <= READS_BYTES_MAX;
        let parse = |reads| Some(reads).filter(is_bounded).and_then(|reads| FieldMasks::parse(reads).ok());
        let readers: Option<Vec<_>> = request.reads.iter().map(parse).collect();
        match readers {
            Some(readers) if !readers.is_empty() => readers.iter().for_each(|reads| union.join(reads)),
            _ if request.dirs.is_empty() && request.modules.as_ref().is_none_or(BTreeMap::is_empty) => {}
            // The client expects whole objects, or its masks are unreadable.
            _ => union.join_alike(&FieldMask::all()),
        }
        Some((served, union))
    }

    /// This view with the fields that the client needs in addition. `None` if there are none.
    fn widened_for(&self, request: &Reconcile) -> Option<Snapshot> {
        let (served, union) = self.masks(request)?;
        // Older modules may read resources that this hub removed: the client retains them.
        let named: BTreeSet<_> = served.places().collect();
        let is_removed =
            |dir: &DirPath| union.places().any(|place| !named.contains(place) && dir.is_within(place));
        let is_occupied = |dir: &DirPath| {
            let mut outer = std::iter::successors(Some(dir.clone()), DirPath::parent);
            let has_inner = || within(&self.view.dirs, dir).next().is_some();
            outer.any(|outer| self.view.dirs.contains_key(&outer)) || has_inner()
        };
        let retained = request.dirs.iter().filter(|(dir, _)| is_removed(dir) && !is_occupied(dir));
        let retained: Vec<_> =
            retained.map(|(dir, digest)| (dir.clone(), Arc::new(Directory::elsewhere(*digest)))).collect();
        let mut batch = Batch::default();
        if !served.includes(&union) {
            let Replicated { objects, places, .. } = self.objects.get()?();
            for (path, dir) in places.iter().flat_map(|place| within(&self.view.dirs, place)) {
                let entries = dir.chunks.iter().flat_map(|chunk| &chunk.entries);
                entries.for_each(|entry| batch.entry(path, entry.key.clone(), None));
            }
            for (place, object) in objects {
                let (Some(dir), name) = (directory(&place, &object.key), &object.key.name) else { continue };
                if self.view.dirs.get(&dir).is_some_and(|dir| dir.get(name).is_some()) {
                    // An object that cannot be pruned was rejected before.
                    let Ok(json) = union.of(&place).cut_object(&object.json) else { continue };
                    batch.entry(&dir, name.clone(), Some(json));
                }
            }
        }
        let widened = self.view.apply(batch).map(|(view, _)| view);
        if retained.is_empty() {
            return widened;
        }
        let view = widened.as_ref().unwrap_or(&self.view);
        let dirs = view.dirs.iter().map(|(path, dir)| (path.clone(), Arc::clone(dir)));
        Some(view.with_dirs(dirs.chain(retained).collect()))
    }
}

/// Encodes once on a blocking thread, even if the client disconnects.
async fn encode_once(
    cell: Arc<OnceCell<Archive>>,
    encode: impl FnOnce() -> Archive + Send + 'static,
) -> Archive {
    if let Some(archive) = cell.get() {
        return archive.clone();
    }
    let encoding = tokio::spawn(async move {
        let encode = || async { tokio::task::spawn_blocking(encode).await.expect("encoding does not panic") };
        cell.get_or_init(encode).await.clone()
    });
    encoding.await.expect("encoding does not panic, and the runtime outlives its requests")
}

#[cfg(test)]
impl Bundle {
    /// Returns a bundle with two editions and its first revision.
    pub(crate) fn far_from_its_first() -> (Arc<Self>, Revision) {
        let bundle = Self::new("main".into(), None);
        let next = |view: &Snapshot, value: &'static str| {
            let mut batch = Batch::default();
            for key in 0..=INLINE_ENCODE_KEYS_MAX {
                let value = Bytes::from_static(value.as_bytes());
                batch.entry(&"/ns/m".parse().unwrap(), format!("k{key}"), Some(value));
            }
            view.apply(batch).unwrap()
        };
        let (first, _) = next(&Snapshot::empty(Arc::new([]), None), "1");
        let (second, changed) = next(&first, "2");
        let mut log = History::new(crate::snapshot::history::BundleLimits::default());
        log.push(first.revision, changed, false);
        bundle.publish(second, log, Bounds::default());
        (Arc::new(bundle), first.revision)
    }
}

#[cfg(test)]
mod tests {
    use std::pin::{Pin, pin};
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn head(bundle: &Bundle) -> Arc<CachedSnapshot> {
        bundle.head().borrow().clone().unwrap()
    }

    fn poll<T>(future: Pin<&mut impl Future<Output = T>>) -> Poll<T> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[tokio::test]
    async fn bundles_encode_far_frames_independently() {
        let ((busy, held), (idle, _)) = (Bundle::far_from_its_first(), Bundle::far_from_its_first());
        let _permit = busy.budget.large_encodes.acquire().await.unwrap();
        assert!(matches!(head(&idle).next_beside(held).await, CatchUp::Frame(_)));
        let head = head(&busy);
        assert!(poll(pin!(head.next_beside(held))).is_pending(), "its own permit is taken");
        assert_eq!(busy.counters.frame_encodes.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn disconnected_request_frees_its_permit() {
        let (bundle, _) = Bundle::far_from_its_first();
        let head = head(&bundle);
        let permits = RECONCILE_ENCODES_MAX.try_into().unwrap();
        let busy = bundle.budget.reconcile_encodes.acquire_many(permits).await.unwrap();
        let request = |dir: &str| Reconcile {
            dirs: BTreeMap::from([(dir.parse().unwrap(), Digest::of(b""))]),
            ..Reconcile::default()
        };
        let mut other = pin!(head.reconcile(request("/b")));
        {
            let mut left = pin!(head.reconcile(request("/a")));
            assert!(poll(left.as_mut()).is_pending());
            assert!(poll(other.as_mut()).is_pending());
        }
        drop(busy);
        assert!(other.await.is_some());
        assert_eq!(bundle.counters.reconcile_encodes.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn cached_answers_are_bounded_and_make_room() {
        let (bundle, _) = Bundle::far_from_its_first();
        let budget = &bundle.budget;
        let answer = |bytes| {
            let answer = Answer::default();
            _ = answer.archive.set((Archive { pieces: Vec::new(), bytes }, false));
            Arc::new(answer)
        };
        for _ in 0..2 * RECONCILE_CACHE_MAX {
            budget.cache(answer(1));
        }
        assert_eq!(budget.answers().len(), RECONCILE_CACHE_MAX);
        budget.cache(answer(RECONCILE_CACHE_BYTES_MAX - 1));
        assert_eq!(budget.answers().len(), 2);
        budget.cache(answer(2 * RECONCILE_CACHE_BYTES_MAX));
        assert_eq!(budget.answers().len(), 1, "the newest");
        let live = &bundle.counters.answer_bytes;
        let sent = MeteredBytes::bytes(vec![0_u8; RECONCILE_LIVE_MAX + 1].into(), live);
        assert!(head(&bundle).reconcile(Reconcile::default()).await.is_none());
        assert!(budget.answers().is_empty());
        drop(sent);
        assert!(head(&bundle).reconcile(Reconcile::default()).await.is_some());
        assert_eq!(budget.answers().len(), 1);
        let cached = live.load(Ordering::Relaxed);
        assert!(cached > 0);
        budget.answers().clear();
        assert_eq!(live.load(Ordering::Relaxed), 0);
    }
}
