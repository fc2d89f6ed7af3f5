//! Namespace views: all policies and data, with replicated objects that are cluster-scoped or in the namespace. Views
//! are created on request and dropped when idle.

use std::cell::LazyCell;
use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use opa_hub_proto::path::{DirPath, is_segment};
use opa_hub_proto::position::Position;
use opa_hub_proto::revision::Revision;
use tokio::sync::watch;

use crate::bundle::cache::{Bundle, CachedSnapshot};
use crate::snapshot::history::Commit;
use crate::snapshot::{ChangeSet, Directory, Snapshot};
use crate::spec::NamespaceScoping;

/// Maximum cached namespace views.
pub const SCOPES_MAX: usize = 10_000;
/// Idle time of a namespace view before eviction.
pub const SCOPE_IDLE: Duration = Duration::from_secs(60);

/// A view is not available.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The request has no namespace.
    #[error("namespace missing; add ?namespace=NAME, or start the agent with --namespace NAME")]
    NoNamespace,
    /// Invalid namespace name.
    #[error("{0:?} is not a valid namespace")]
    Invalid(String),
    /// Too many views.
    #[error("namespace limit reached: {SCOPES_MAX} are being served; retry later")]
    TooMany,
}

/// The namespace views of a bundle.
pub struct NamespaceViews {
    scoped: NamespaceScoping,
    live: Mutex<BTreeMap<String, NamespaceView>>,
}

struct ViewId {
    id: u64,
    namespace: String,
}

struct NamespaceView {
    bundle: Arc<Bundle>,
    source_revision: Option<Revision>,
    /// Whether the namespace had objects at creation.
    has_objects: bool,
    asked: Arc<AtomicBool>,
}

/// Bytes of the map entry of a shared directory.
const VIEW_DIRECTORY_BYTES: usize = 48;

struct ByNamespace<'a> {
    shared: Dirs,
    namespaced: HashMap<&'a str, Dirs>,
}

type Dirs = Vec<(DirPath, Arc<Directory>)>;

/// Key of the view without namespaced objects.
const NO_NAMESPACE: &str = "";

impl NamespaceViews {
    pub(crate) fn new(scoped: NamespaceScoping) -> Self {
        Self { scoped, live: Mutex::default() }
    }

    /// Namespaces with a view.
    pub fn namespaces(&self) -> Vec<String> {
        self.live().keys().filter(|namespace| *namespace != NO_NAMESPACE).cloned().collect()
    }

    /// Bytes not shared with the bundle.
    pub(crate) fn memory(&self) -> usize {
        let bytes = |scope: &NamespaceView| {
            let head = scope.bundle.head().borrow().clone();
            let dirs = head.map_or(0, |head| head.view.dirs.len());
            size_of::<(Bundle, CachedSnapshot)>() + dirs * VIEW_DIRECTORY_BYTES
        };
        self.live().values().map(bytes).sum()
    }

    pub(crate) fn of(&self, whole: &Arc<Bundle>, namespace: Option<&str>) -> Result<Arc<Bundle>, Error> {
        let namespace = validate(namespace)?;
        self.view_of(whole, namespace)
    }

    /// Snapshot for a single response. Namespaces without objects share one view: invented names cost nothing.
    pub(crate) fn once(&self, whole: &Arc<Bundle>, namespace: Option<&str>) -> Result<Arc<Bundle>, Error> {
        let namespace = validate(namespace)?;
        let head = whole.head().borrow().clone();
        let has_objects = |edition: Arc<CachedSnapshot>| self.has_objects(&edition.view, namespace);
        let is_known = self.live().contains_key(namespace) || head.is_some_and(has_objects);
        self.view_of(whole, if is_known { namespace } else { NO_NAMESPACE })
    }

    fn view_of(&self, whole: &Arc<Bundle>, namespace: &str) -> Result<Arc<Bundle>, Error> {
        let mut live = self.live();
        if let Some(scope) = live.get(namespace) {
            scope.asked.store(true, Ordering::Relaxed);
            return Ok(Arc::clone(&scope.bundle));
        }
        let head = whole.head().borrow().clone();
        if live.len() >= SCOPES_MAX {
            // Drops views of invented names. Streams that are opening end.
            live.retain(|_, scope| scope.has_objects || scope.bundle.is_read());
        }
        if live.len() >= SCOPES_MAX {
            return Err(Error::TooMany);
        }
        let bundle = Arc::new(whole.part());
        let revision = head.as_ref().map(|edition| edition.view.revision);
        let has_objects = head.as_ref().is_some_and(|edition| self.has_objects(&edition.view, namespace));
        if let Some(edition) = head {
            let namespaced = edition.view.dirs.iter().filter(|(dir, _)| self.includes(namespace, dir));
            let namespaced = namespaced.map(|(path, dir)| (path.clone(), Arc::clone(dir))).collect();
            let view = edition.view.with_dirs(namespaced);
            bundle.publish(view, edition.log().emptied(), edition.bounds().clone());
        }
        let asked = Arc::new(AtomicBool::new(true));
        let scope =
            NamespaceView { bundle: Arc::clone(&bundle), source_revision: revision, has_objects, asked };
        live.insert(namespace.to_owned(), scope);
        drop(live);
        let view = ViewId { id: bundle.id, namespace: namespace.to_owned() };
        tokio::spawn(throttle_archives(Arc::downgrade(whole), whole.head(), bundle.pace(), view));
        Ok(bundle)
    }

    pub(crate) fn follow(&self, edition: &CachedSnapshot) {
        let dirs = LazyCell::new(|| self.by_namespace(&edition.view));
        for (namespace, scope) in self.live().iter_mut() {
            let before = scope.source_revision.replace(edition.view.revision);
            // Only a commit from the view's revision proves the view unaffected.
            let commit = before.and_then(|before| edition.log().last_from(before));
            let head = scope.bundle.head().borrow().clone();
            let concerns = |commit: &Commit| {
                let dirs = &commit.changed.dirs;
                !commit.changed.modules.is_empty()
                    || dirs.iter().any(|dir| self.includes(namespace, &dir.path))
            };
            if head.is_some() && commit.is_some_and(|commit| !concerns(commit)) {
                continue;
            }
            let next = dirs.view(&edition.view, namespace);
            let mut log = edition.log().emptied();
            if let Some(head) = head {
                if head.view.revision == next.revision {
                    continue;
                }
                if let Some(commit) = commit {
                    let namespaced =
                        commit.changed.dirs.iter().filter(|dir| self.includes(namespace, &dir.path));
                    let modules = commit.changed.modules.clone();
                    log = head.log().clone();
                    log.push(
                        head.view.revision,
                        ChangeSet { dirs: namespaced.cloned().collect(), modules },
                        commit.narrows,
                    );
                }
            }
            scope.bundle.publish(next, log, edition.bounds().clone());
        }
    }

    /// Moves all views back with the source.
    pub(crate) fn advance(&self, position: &Position) {
        for scope in self.live().values() {
            scope.bundle.advance(position);
        }
    }

    /// Namespace of a directory; `None` if all namespaces share it. Cluster-scoped objects are directly below their
    /// resource.
    fn namespace_of<'a>(&self, dir: &'a DirPath) -> Option<&'a str> {
        let NamespaceScoping { root, whole } = &self.scoped;
        let below = dir.as_str().strip_prefix(root.as_str())?.strip_prefix('/')?;
        let (_, namespace) = below.split_once('/')?;
        (!whole.iter().any(|place| dir.is_within(place))).then_some(namespace)
    }

    fn includes(&self, namespace: &str, dir: &DirPath) -> bool {
        self.namespace_of(dir).is_none_or(|owner| owner == namespace)
    }

    fn has_objects(&self, whole: &Snapshot, namespace: &str) -> bool {
        let root = format!("{}/", self.scoped.root);
        let mut from = Bound::Included(root.clone());
        loop {
            let dirs = (from.as_ref().map(String::as_str), Bound::Unbounded);
            let next = whole.dirs.range::<str, _>(dirs).next();
            let Some((dir, below)) = next.and_then(|(dir, _)| Some((dir, dir.as_str().strip_prefix(&root)?)))
            else {
                return false;
            };
            let Some((resource, _)) = below.split_once('/') else {
                from = Bound::Excluded(dir.to_string());
                continue;
            };
            let namespaced = whole.dirs.get_key_value(format!("{root}{resource}/{namespace}").as_str());
            if namespaced.is_some_and(|(dir, _)| self.namespace_of(dir).is_some()) {
                return true;
            }
            // Skips this resource: '0' follows '/'.
            from = Bound::Included(format!("{root}{resource}0"));
        }
    }

    fn by_namespace<'a>(&self, whole: &'a Snapshot) -> ByNamespace<'a> {
        let mut dirs = ByNamespace { shared: Dirs::new(), namespaced: HashMap::new() };
        for (path, dir) in whole.dirs.iter() {
            let group = match self.namespace_of(path) {
                None => &mut dirs.shared,
                Some(namespace) => dirs.namespaced.entry(namespace).or_default(),
            };
            group.push((path.clone(), Arc::clone(dir)));
        }
        dirs
    }

    /// Drops the view if idle. Returns whether it is dropped or replaced.
    fn evict_idle(&self, ViewId { id, namespace }: &ViewId) -> bool {
        let mut live = self.live();
        let Some(scope) = live.get(namespace).filter(|scope| scope.bundle.id == *id) else { return true };
        let idle = !scope.asked.swap(false, Ordering::Relaxed) && !scope.bundle.is_read();
        if idle {
            live.remove(namespace);
        }
        idle
    }

    fn live(&self) -> MutexGuard<'_, BTreeMap<String, NamespaceView>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ByNamespace<'_> {
    fn view(&self, whole: &Snapshot, namespace: &str) -> Snapshot {
        let namespaced = self.namespaced.get(namespace).into_iter().flatten();
        whole.with_dirs(self.shared.iter().chain(namespaced).cloned().collect())
    }
}

fn validate(namespace: Option<&str>) -> Result<&str, Error> {
    let namespace = namespace.filter(|namespace| !namespace.is_empty()).ok_or(Error::NoNamespace)?;
    if is_segment(namespace) { Ok(namespace) } else { Err(Error::Invalid(namespace.to_owned())) }
}

/// Does not own the bundle: streams of a replaced bundle must end.
async fn throttle_archives(
    whole: Weak<Bundle>,
    mut head: watch::Receiver<Option<Arc<CachedSnapshot>>>,
    pacing: impl Future<Output = ()>,
    view: ViewId,
) {
    let idle = async {
        loop {
            tokio::time::sleep(SCOPE_IDLE).await;
            let whole = whole.upgrade();
            let scopes = whole.as_ref().and_then(|whole| whole.scopes.as_ref());
            if scopes.is_none_or(|scopes| scopes.evict_idle(&view)) {
                return;
            }
        }
    };
    let ended = async { while head.changed().await.is_ok() {} };
    tokio::select! {
        () = pacing => {}
        () = ended => {}
        () = idle => tracing::debug!(namespace = view.namespace, "namespace view evicted"),
    }
}
