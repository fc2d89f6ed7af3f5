//! Controller of bundles from flags, a file and the source. A rejected document changes only its status.

pub mod last_good;
pub mod runner;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use std::time::SystemTime;

use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::bundle::CachedSnapshot;
use crate::manager::runner::{BundleFactory, RunningBundle, TaskName};
use crate::model::{Change, InputId, Object};
use crate::source::folder;
use crate::spec::BundleSpec;
use crate::store::Subscription;

/// Maximum bundles. Each has two threads and runs OPA.
pub const BUNDLES_MAX: usize = 200;
/// Poll interval of a document file.
pub const DOCUMENTS_LOOK: Duration = Duration::from_secs(1);

/// Statuses of the source's documents, by name.
pub type DocumentStatuses = BTreeMap<String, Opinion>;

/// Status of a document.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Opinion {
    /// The document.
    pub object: Object,
    /// Rejection.
    pub error: Option<String>,
}

pub(crate) struct BundleController {
    stages: BundleFactory,
    flags: Option<Arc<BundleSpec>>,
    file: Option<DocumentFile>,
    source: Subscription,
    objects: BTreeMap<String, Object>,
    statuses: watch::Sender<DocumentStatuses>,
    rejected: BTreeMap<String, String>,
    managed: BTreeMap<String, ManagedBundle>,
    tasks: JoinSet<TaskName>,
    /// Whether the source has listed or failed.
    is_settled: bool,
}

struct ManagedBundle {
    running: RunningBundle,
    /// Replaces `running` once it has a snapshot.
    next: Option<RunningBundle>,
}

struct DocumentFile {
    path: PathBuf,
    stamp: Option<(SystemTime, u64, u64)>,
    objects: Vec<Object>,
    error: Option<String>,
}

const DOCUMENTS: &str = "bundle documents";
const FEED: InputId = InputId(0);

impl BundleController {
    pub(crate) fn new(stages: BundleFactory, flags: Option<BundleSpec>, path: Option<PathBuf>) -> Self {
        let source = stages.store.subscribe();
        source.open(FEED, &BundleSpec::documents());
        stages.readiness.pending(DOCUMENTS, "not listed yet");
        let file = path.map(|path| DocumentFile { path, stamp: None, objects: Vec::new(), error: None });
        Self {
            stages,
            flags: flags.map(Arc::new),
            file,
            source,
            objects: BTreeMap::new(),
            statuses: watch::Sender::default(),
            rejected: BTreeMap::new(),
            managed: BTreeMap::new(),
            tasks: JoinSet::new(),
            is_settled: false,
        }
    }

    pub(crate) fn opinions(&self) -> watch::Receiver<DocumentStatuses> {
        self.statuses.subscribe()
    }

    /// Runs until a task of a bundle panics.
    pub(crate) async fn run(mut self) -> anyhow::Error {
        loop {
            self.reconcile().await;
            let has_file = self.file.is_some();
            let nexts = self.managed.values().filter_map(|managed| managed.next.as_ref());
            let next_live = any_live(nexts.map(|next| next.bundle.head()).collect());
            tokio::select! {
                () = self.source.changed() => {}
                () = tokio::time::sleep(DOCUMENTS_LOOK), if has_file => {}
                () = next_live => {}
                Some(ended) = self.tasks.join_next() => match ended {
                    Err(error) if error.is_panic() => return error.into(),
                    // The bundle was dropped.
                    Err(_) => {}
                    Ok(task) => tracing::debug!(task, "bundle task ended"),
                },
            }
        }
    }

    async fn reconcile(&mut self) {
        if let Some(file) = &mut self.file {
            file.poll();
        }
        for change in self.source.take(usize::MAX).changes {
            match change {
                Change::Put(_, object) => _ = self.objects.insert(object.key.name.to_string(), object),
                Change::Remove(_, key) => _ = self.objects.remove(&*key.name),
            }
        }
        let was_settled = self.is_settled;
        self.is_settled |= self.source.is_settled();
        let desired = self.desired();
        for (name, spec) in desired.specs {
            self.ensure_running(name, spec, !was_settled).await;
        }
        if self.is_settled && !was_settled {
            self.stages.readiness.ready(DOCUMENTS);
            if self.managed.is_empty() {
                tracing::info!("waiting for documents of kind Bundle");
            }
        }
        // Bundles of rejected documents stay.
        let removed = self.managed.extract_if(.., |name, _| self.is_settled && !desired.names.contains(name));
        for (name, managed) in removed.collect::<Vec<_>>() {
            tracing::info!(bundle = name, "document deleted, bundle removed");
            self.stages.bundles.withdraw(&name);
            managed.running.forget();
        }
        for managed in self.managed.values_mut() {
            if managed.next.as_ref().is_some_and(RunningBundle::is_live)
                && let Some(mut next) = managed.next.take()
            {
                tracing::info!(bundle = next.spec.name, "bundle replaced");
                self.stages.bundles.serve(Arc::clone(&next.bundle));
                self.stages.keep(&mut next, None, &mut self.tasks);
                managed.running = next;
            }
        }
    }

    /// Validates all documents. The first one of a name wins.
    fn desired(&mut self) -> Desired {
        let mut desired = Desired::default();
        let mut rejected = BTreeMap::new();
        let mut statuses = DocumentStatuses::new();
        let mut room = BUNDLES_MAX.saturating_sub(self.managed.len());
        if let Some(spec) = &self.flags {
            desired.names.insert(spec.name.clone());
            desired.specs.push((spec.name.clone(), Arc::clone(spec)));
        }
        let in_file = self.file.iter().flat_map(|file| &file.objects).map(|object| (true, object));
        for (is_file, object) in in_file.chain(self.objects.values().map(|object| (false, object))) {
            let subject = match self.file.as_ref().filter(|_| is_file) {
                Some(file) => format!("{}: Bundle {}", file.path.display(), object.key.name),
                None => format!("Bundle {}", object.key.name),
            };
            let result = match BundleSpec::parse(object) {
                _ if desired.names.contains(&*object.key.name) => Err(
                    "a bundle of this name is given by flags (--bundle) or by another document; rename one"
                        .into(),
                ),
                Ok(_) if !self.managed.contains_key(&*object.key.name) && room == 0 => {
                    Err(format!("{BUNDLES_MAX} bundles run already, which is the maximum; delete one"))
                }
                result => result.map_err(|error| error.to_string()),
            };
            let error = result.as_ref().err().cloned();
            if let Some(error) = &error {
                rejected.insert(subject, error.clone());
            }
            if !is_file {
                statuses.insert(object.key.name.to_string(), Opinion { object: object.clone(), error });
            }
            desired.names.insert(object.key.name.to_string());
            room -= usize::from(result.is_ok() && !self.managed.contains_key(&*object.key.name));
            desired.specs.extend(result.ok().map(|spec| (spec.name.clone(), Arc::new(spec))));
        }
        if let Some((file, error)) = self.file.as_ref().and_then(|file| Some((file, file.error.clone()?))) {
            rejected.insert(file.path.display().to_string(), error);
        }
        for subject in self.rejected.keys().filter(|subject| !rejected.contains_key(*subject)) {
            self.stages.readiness.problem(subject, None);
        }
        for (subject, error) in &rejected {
            if self.stages.readiness.is_news(subject, error) {
                tracing::warn!(document = subject, error, "document rejected");
            }
            self.stages.readiness.problem(subject, Some(error.clone()));
        }
        self.rejected = rejected;
        self.statuses.send_if_modified(|current| {
            let changed = *current != statuses;
            *current = statuses;
            changed
        });
        desired
    }

    async fn ensure_running(&mut self, name: String, spec: Arc<BundleSpec>, gates: bool) {
        let Self { stages, managed, tasks, .. } = self;
        let Some(bundle) = managed.get_mut(&name) else {
            let watches = spec.feeds.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            tracing::info!(bundle = name, watches, "bundle starting");
            let is_flags = self.flags.as_ref().is_some_and(|flags| flags.name == name);
            let running = stages.start(spec, None, gates, is_flags, tasks).await;
            stages.bundles.serve(Arc::clone(&running.bundle));
            managed.insert(name, ManagedBundle { running, next: None });
            return;
        };
        let newest = bundle.next.as_ref().unwrap_or(&bundle.running);
        if newest.spec == spec {
            return;
        }
        tracing::info!(bundle = name, "document changed, replacing bundle");
        bundle.next = None;
        if *bundle.running.spec == *spec {
            return;
        }
        bundle.next = Some(stages.start(spec, bundle.running.good(), false, false, tasks).await);
    }
}

/// Waits for a snapshot of any of these bundles.
async fn any_live(heads: Vec<Head>) {
    let live =
        |mut head: watch::Receiver<_>| Box::pin(async move { head.wait_for(Option::is_some).await.is_ok() });
    if heads.is_empty() {
        std::future::pending::<()>().await;
    }
    futures::future::select_all(heads.into_iter().map(live)).await;
}

type Head = watch::Receiver<Option<Arc<CachedSnapshot>>>;

#[derive(Default)]
struct Desired {
    specs: Vec<(String, Arc<BundleSpec>)>,
    /// Includes rejected documents.
    names: BTreeSet<String>,
}

impl DocumentFile {
    /// Reads the file if it changed. On failure the last documents stay.
    fn poll(&mut self) {
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
        Some(duplicate) => Err(format!("two documents are named {}; rename one", duplicate.key.name)),
        None => Ok(objects),
    }
}
