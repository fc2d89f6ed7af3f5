//! Which bundles there are to be: the one that flags ask for, those of a file, and those of the source. What they ask
//! for is started, replaced and stopped here; what cannot be understood changes nothing but what is said of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::bundle::Edition;
use crate::bundle::spec::Spec;
use crate::bundles::{Ended, Running, Stages};
use crate::config::{BUNDLES_MAX, DOCUMENTS_LOOK};
use crate::model::{Change, FeedId, Object};
use crate::source::folder;
use crate::store::Subscription;

/// What is said of each document of the source, by name.
pub type Opinions = BTreeMap<String, Opinion>;

/// What is said of a document.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Opinion {
    /// The document.
    pub object: Object,
    /// Why it is refused.
    pub error: Option<String>,
}

/// See the module's text.
pub struct Documents {
    stages: Stages,
    flags: Option<Arc<Spec>>,
    file: Option<File>,
    source: Subscription,
    objects: BTreeMap<String, Object>,
    opinions: watch::Sender<Opinions>,
    /// What is wrong with each document that is refused now.
    refused: BTreeMap<String, String>,
    slots: BTreeMap<String, Slot>,
    tasks: JoinSet<Ended>,
    /// The source's documents were told, or cannot be had.
    settled: bool,
}

/// A bundle that is served, and the one that takes its place once it can.
struct Slot {
    running: Running,
    next: Option<Running>,
}

/// A file of documents.
struct File {
    path: PathBuf,
    stamp: Option<(SystemTime, u64, u64)>,
    objects: Vec<Object>,
    error: Option<String>,
}

/// What [`Readiness`](crate::readiness::Readiness) calls them.
const DOCUMENTS: &str = "bundle documents";
/// The only one.
const FEED: FeedId = FeedId(0);

impl Documents {
    /// Those of the source, of the file at `path`, and the one of the flags.
    pub fn new(stages: Stages, flags: Option<Spec>, path: Option<PathBuf>) -> Self {
        let source = stages.store.subscribe();
        source.open(FEED, &Spec::documents());
        stages.readiness.pending(DOCUMENTS, "not looked at yet");
        let file = path.map(|path| File { path, stamp: None, objects: Vec::new(), error: None });
        Self {
            stages,
            flags: flags.map(Arc::new),
            file,
            source,
            objects: BTreeMap::new(),
            opinions: watch::Sender::default(),
            refused: BTreeMap::new(),
            slots: BTreeMap::new(),
            tasks: JoinSet::new(),
            settled: false,
        }
    }

    /// What is said of the source's documents, for whoever writes it down.
    pub fn opinions(&self) -> watch::Receiver<Opinions> {
        self.opinions.subscribe()
    }

    /// Follows them for ever. Returns why it cannot.
    pub async fn run(mut self) -> anyhow::Error {
        loop {
            self.turn().await;
            let has_file = self.file.is_some();
            let nexts = self.slots.values().filter_map(|slot| slot.next.as_ref());
            let replaced = replaced(nexts.map(|next| next.bundle.head()).collect());
            tokio::select! {
                () = self.source.changed() => {}
                () = tokio::time::sleep(DOCUMENTS_LOOK), if has_file => {}
                () = replaced => {}
                Some(ended) = self.tasks.join_next() => match ended {
                    Err(error) if error.is_panic() => return error.into(),
                    // Of a bundle that was dropped.
                    Err(_) => {}
                    Ok(name) => tracing::debug!(name, "a stage ended"),
                },
            }
        }
    }

    async fn turn(&mut self) {
        if let Some(file) = &mut self.file {
            file.look();
        }
        for change in self.source.take(usize::MAX).changes {
            match change {
                Change::Put(_, object) => _ = self.objects.insert(object.key.name.to_string(), object),
                Change::Remove(_, key) => _ = self.objects.remove(&*key.name),
            }
        }
        let was_settled = self.settled;
        self.settled |= self.source.is_settled();
        let wanted = self.wanted();
        for (name, spec) in wanted.specs {
            self.provide(name, spec, !was_settled).await;
        }
        if self.settled && !was_settled {
            self.stages.readiness.ready(DOCUMENTS);
            if self.slots.is_empty() {
                tracing::info!("no bundle yet: waiting for documents of kind Bundle");
            }
        }
        // A document that is refused keeps its bundle.
        let gone = self.slots.extract_if(.., |name, _| self.settled && !wanted.names.contains(name));
        for (name, slot) in gone.collect::<Vec<_>>() {
            tracing::info!(bundle = name, "its document is gone: no longer served");
            self.stages.bundles.withdraw(&name);
            slot.running.forget();
        }
        for slot in self.slots.values_mut() {
            if slot.next.as_ref().is_some_and(Running::is_live)
                && let Some(mut next) = slot.next.take()
            {
                tracing::info!(bundle = next.spec.name, "served as its newest document says");
                self.stages.bundles.serve(Arc::clone(&next.bundle));
                self.stages.keep(&mut next, None, &mut self.tasks);
                slot.running = next;
            }
        }
    }

    /// What is asked for, of the first who asks for each name.
    fn wanted(&mut self) -> Wanted {
        let mut wanted = Wanted::default();
        let mut refused = BTreeMap::new();
        let mut opinions = Opinions::new();
        let mut room = BUNDLES_MAX.saturating_sub(self.slots.len());
        if let Some(spec) = &self.flags {
            wanted.names.insert(spec.name.clone());
            wanted.specs.push((spec.name.clone(), Arc::clone(spec)));
        }
        let of_file = self.file.iter().flat_map(|file| &file.objects).map(|object| (true, object));
        for (is_file, object) in of_file.chain(self.objects.values().map(|object| (false, object))) {
            let subject = match self.file.as_ref().filter(|_| is_file) {
                Some(file) => format!("{}: Bundle {}", file.path.display(), object.key.name),
                None => format!("Bundle {}", object.key.name),
            };
            let result = match Spec::parse(object) {
                _ if wanted.names.contains(&*object.key.name) => {
                    Err("a bundle of this name is given by flags or by another document: rename one (the flags' is --bundle)".into())
                }
                Ok(_) if !self.slots.contains_key(&*object.key.name) && room == 0 => {
                    Err(format!("{BUNDLES_MAX} bundles are being served: no more"))
                }
                result => result.map_err(|error| error.to_string()),
            };
            let error = result.as_ref().err().cloned();
            if let Some(error) = &error {
                refused.insert(subject, error.clone());
            }
            if !is_file {
                opinions.insert(object.key.name.to_string(), Opinion { object: object.clone(), error });
            }
            wanted.names.insert(object.key.name.to_string());
            room -= usize::from(result.is_ok() && !self.slots.contains_key(&*object.key.name));
            wanted.specs.extend(result.ok().map(|spec| (spec.name.clone(), Arc::new(spec))));
        }
        if let Some((file, error)) = self.file.as_ref().and_then(|file| Some((file, file.error.clone()?))) {
            refused.insert(file.path.display().to_string(), error);
        }
        for subject in self.refused.keys().filter(|subject| !refused.contains_key(*subject)) {
            self.stages.readiness.problem(subject, None);
        }
        for (subject, error) in &refused {
            if self.stages.readiness.is_news(subject, error) {
                tracing::warn!(document = subject, error, "refused; the last good one stays");
            }
            self.stages.readiness.problem(subject, Some(error.clone()));
        }
        self.refused = refused;
        self.opinions.send_if_modified(|held| {
            let changed = *held != opinions;
            *held = opinions;
            changed
        });
        wanted
    }

    /// Sees to it that the bundle is, or will be, as `spec` says.
    async fn provide(&mut self, name: String, spec: Arc<Spec>, gates: bool) {
        let Self { stages, slots, tasks, .. } = self;
        let Some(slot) = slots.get_mut(&name) else {
            let feeds = spec.feeds.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            tracing::info!(bundle = name, feeds, "starting");
            let is_flags = self.flags.as_ref().is_some_and(|flags| flags.name == name);
            let running = stages.start(spec, None, gates, is_flags, tasks).await;
            stages.bundles.serve(Arc::clone(&running.bundle));
            slots.insert(name, Slot { running, next: None });
            return;
        };
        let newest = slot.next.as_ref().unwrap_or(&slot.running);
        if newest.spec == spec {
            return;
        }
        tracing::info!(bundle = name, "its document changed: a new one is made");
        slot.next = None;
        if *slot.running.spec == *spec {
            return;
        }
        slot.next = Some(stages.start(spec, slot.running.good(), false, false, tasks).await);
    }
}

/// Waits until one of these is live; for ever, if there is none.
async fn replaced(heads: Vec<Head>) {
    let live =
        |mut head: watch::Receiver<_>| Box::pin(async move { head.wait_for(Option::is_some).await.is_ok() });
    if heads.is_empty() {
        std::future::pending::<()>().await;
    }
    futures::future::select_all(heads.into_iter().map(live)).await;
}

type Head = watch::Receiver<Option<Arc<Edition>>>;

/// What is asked for.
#[derive(Default)]
struct Wanted {
    specs: Vec<(String, Arc<Spec>)>,
    /// Also of those that cannot be understood.
    names: BTreeSet<String>,
}

impl File {
    /// Reads it, if it changed. What it held stays while it cannot be read.
    fn look(&mut self) {
        let stamp = |file: Metadata| Some((file.modified().ok()?, file.len(), file.ino()));
        let now = std::fs::metadata(&self.path).ok().and_then(stamp);
        if now.is_some() && now == self.stamp {
            return;
        }
        self.stamp = now;
        match read(&self.path) {
            Ok(objects) => (self.objects, self.error) = (objects, None),
            Err(error) => self.error = Some(error),
        }
    }
}

fn read(path: &Path) -> Result<Vec<Object>, String> {
    let objects = folder::read_file(path)?;
    let mut names = BTreeSet::new();
    match objects.iter().find(|object| !names.insert(object.key.name.clone())) {
        Some(twice) => Err(format!("it holds two documents of the name {}: rename one", twice.key.name)),
        None => Ok(objects),
    }
}
