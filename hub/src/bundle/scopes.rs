//! A bundle as it looks from one namespace: the same policies and data, and of replicated resources the objects of that
//! namespace and those that belong to none. Each is made when somebody first asks, shared by all who ask alike, and
//! dropped when nobody has asked for a while.

use std::cell::LazyCell;
use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use opa_hub_proto::path::{DirPath, is_segment};
use opa_hub_proto::position::Position;
use opa_hub_proto::revision::Revision;
use tokio::sync::watch;

use super::edition::{Bundle, Edition};
use super::log::Commit;
use super::spec::Scoped;
use super::view::{Changed, Directory, View};
use crate::config::{SCOPE_IDLE, SCOPES_MAX};

/// Why there is no view of a namespace.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// Nobody gets all of them here.
    #[error(
        "say which namespace's objects you want: add ?namespace=NAME, or give the agent --namespace NAME"
    )]
    NoNamespace,
    /// No namespace has such a name.
    #[error("{0:?} is no namespace")]
    Invalid(String),
    /// The hub is to bear this much.
    #[error("{SCOPES_MAX} namespaces are being served: no more")]
    TooMany,
}

/// The views of single namespaces.
pub struct Scopes {
    scoped: Scoped,
    live: Mutex<BTreeMap<String, Scope>>,
}

/// The view that a task paces: another one may have its namespace by now.
struct Paced {
    id: u64,
    namespace: String,
}

struct Scope {
    bundle: Arc<Bundle>,
    /// The revision of the whole bundle that the view was derived from; `None` before there is one.
    whole: Option<Revision>,
    /// Whether the namespace had objects when the view was made.
    has_objects: bool,
    /// Whether a reader has asked since the last look.
    asked: Arc<AtomicBool>,
}

/// Bytes of a directory in the map of a view that shares it.
const VIEW_DIRECTORY_BYTES: usize = 48;

/// Directories of a view by the namespace that they belong to.
struct ByNamespace<'a> {
    shared: Dirs,
    own: HashMap<&'a str, Dirs>,
}

type Dirs = Vec<(DirPath, Arc<Directory>)>;

/// The name under which the view without any namespace's objects is kept: no namespace is called so.
const NONE: &str = "";

impl Scopes {
    /// No view yet.
    pub fn new(scoped: Scoped) -> Self {
        Self { scoped, live: Mutex::default() }
    }

    /// The namespaces whose views are kept now.
    pub fn namespaces(&self) -> Vec<String> {
        self.live().keys().filter(|namespace| *namespace != NONE).cloned().collect()
    }

    /// Bytes of the views that they do not share with the whole one.
    pub fn memory(&self) -> usize {
        let of = |scope: &Scope| {
            let head = scope.bundle.head().borrow().clone();
            let dirs = head.map_or(0, |head| head.view.dirs.len());
            size_of::<(Bundle, Edition)>() + dirs * VIEW_DIRECTORY_BYTES
        };
        self.live().values().map(of).sum()
    }

    /// The bundle as it looks from `namespace`, for a reader that stays connected. A new view follows the whole bundle
    /// until it is idle.
    pub fn of(&self, whole: &Arc<Bundle>, namespace: Option<&str>) -> Result<Arc<Bundle>, Error> {
        let namespace = checked(namespace)?;
        self.view_of(whole, namespace)
    }

    /// The bundle as it looks from `namespace`, for a reader that takes one answer. All namespaces without objects share
    /// one view, so that invented names cost nothing.
    pub fn once(&self, whole: &Arc<Bundle>, namespace: Option<&str>) -> Result<Arc<Bundle>, Error> {
        let namespace = checked(namespace)?;
        let head = whole.head().borrow().clone();
        let has_objects = |edition: Arc<Edition>| self.has_objects(&edition.view, namespace);
        let is_known = self.live().contains_key(namespace) || head.is_some_and(has_objects);
        self.view_of(whole, if is_known { namespace } else { NONE })
    }

    fn view_of(&self, whole: &Arc<Bundle>, namespace: &str) -> Result<Arc<Bundle>, Error> {
        let mut live = self.live();
        if let Some(scope) = live.get(namespace) {
            scope.asked.store(true, Ordering::Relaxed);
            return Ok(Arc::clone(&scope.bundle));
        }
        let head = whole.head().borrow().clone();
        if live.len() >= SCOPES_MAX {
            // Views of namespaces without objects are made for any name. A stream that is being opened ends with its view.
            live.retain(|_, scope| scope.has_objects || scope.bundle.is_read());
        }
        if live.len() >= SCOPES_MAX {
            return Err(Error::TooMany);
        }
        let bundle = Arc::new(whole.part());
        let revision = head.as_ref().map(|edition| edition.view.revision);
        let has_objects = head.as_ref().is_some_and(|edition| self.has_objects(&edition.view, namespace));
        if let Some(edition) = head {
            let own = edition.view.dirs.iter().filter(|(dir, _)| self.has(namespace, dir));
            let own = own.map(|(path, dir)| (path.clone(), Arc::clone(dir))).collect();
            let view = edition.view.with_dirs(own);
            bundle.publish(view, edition.log().emptied(), edition.bounds().clone());
        }
        let asked = Arc::new(AtomicBool::new(true));
        let scope = Scope { bundle: Arc::clone(&bundle), whole: revision, has_objects, asked };
        live.insert(namespace.to_owned(), scope);
        drop(live);
        let paced = Paced { id: bundle.id, namespace: namespace.to_owned() };
        tokio::spawn(pace(Arc::downgrade(whole), whole.head(), bundle.pace(), paced));
        Ok(bundle)
    }

    /// Brings the view of every namespace to `edition`.
    pub fn follow(&self, edition: &Edition) {
        let dirs = LazyCell::new(|| self.by_namespace(&edition.view));
        for (namespace, scope) in self.live().iter_mut() {
            let before = scope.whole.replace(edition.view.revision);
            // A commit that the log has dropped, or that does not begin where the view is, proves nothing.
            let commit = before.and_then(|before| edition.log().last_from(before));
            let head = scope.bundle.head().borrow().clone();
            let concerns = |commit: &Commit| {
                let dirs = &commit.changed.dirs;
                !commit.changed.modules.is_empty() || dirs.iter().any(|dir| self.has(namespace, &dir.path))
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
                    let own = commit.changed.dirs.iter().filter(|dir| self.has(namespace, &dir.path));
                    let modules = commit.changed.modules.clone();
                    log = head.log().clone();
                    log.push(
                        head.view.revision,
                        Changed { dirs: own.cloned().collect(), modules },
                        commit.narrows,
                    );
                }
            }
            scope.bundle.publish(next, log, edition.bounds().clone());
        }
    }

    /// Moves every view to `position`, to which the source went back.
    pub fn advance(&self, position: &Position) {
        for scope in self.live().values() {
            scope.bundle.advance(position);
        }
    }

    /// The namespace whose objects a directory holds; `None` for what every namespace gets. Objects of no namespace lie
    /// right below their resource.
    fn namespace_of<'a>(&self, dir: &'a DirPath) -> Option<&'a str> {
        let Scoped { root, whole } = &self.scoped;
        let below = dir.as_str().strip_prefix(root.as_str())?.strip_prefix('/')?;
        let (_, namespace) = below.split_once('/')?;
        (!whole.iter().any(|place| dir.is_within(place))).then_some(namespace)
    }

    fn has(&self, namespace: &str, dir: &DirPath) -> bool {
        self.namespace_of(dir).is_none_or(|of| of == namespace)
    }

    /// Whether the namespace has objects. Looks at each resource once.
    fn has_objects(&self, whole: &View, namespace: &str) -> bool {
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
            let own = whole.dirs.get_key_value(format!("{root}{resource}/{namespace}").as_str());
            if own.is_some_and(|(dir, _)| self.namespace_of(dir).is_some()) {
                return true;
            }
            // Behind everything below this resource: '0' follows '/'.
            from = Bound::Included(format!("{root}{resource}0"));
        }
    }

    fn by_namespace<'a>(&self, whole: &'a View) -> ByNamespace<'a> {
        let mut dirs = ByNamespace { shared: Dirs::new(), own: HashMap::new() };
        for (path, dir) in whole.dirs.iter() {
            let of = match self.namespace_of(path) {
                None => &mut dirs.shared,
                Some(namespace) => dirs.own.entry(namespace).or_default(),
            };
            of.push((path.clone(), Arc::clone(dir)));
        }
        dirs
    }

    /// Whether the view is another one by now, or no reader has asked since the last call, nor is connected. It is dropped
    /// then.
    fn drop_idle(&self, Paced { id, namespace }: &Paced) -> bool {
        let mut live = self.live();
        let Some(scope) = live.get(namespace).filter(|scope| scope.bundle.id == *id) else { return true };
        let idle = !scope.asked.swap(false, Ordering::Relaxed) && !scope.bundle.is_read();
        if idle {
            live.remove(namespace);
        }
        idle
    }

    fn live(&self) -> MutexGuard<'_, BTreeMap<String, Scope>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ByNamespace<'_> {
    fn view(&self, whole: &View, namespace: &str) -> View {
        let own = self.own.get(namespace).into_iter().flatten();
        whole.with_dirs(self.shared.iter().chain(own).cloned().collect())
    }
}

fn checked(namespace: Option<&str>) -> Result<&str, Error> {
    let namespace = namespace.filter(|namespace| !namespace.is_empty()).ok_or(Error::NoNamespace)?;
    if is_segment(namespace) { Ok(namespace) } else { Err(Error::Invalid(namespace.to_owned())) }
}

/// Paces the archives of one namespace while it is read and the whole bundle exists. It does not hold the whole bundle:
/// readers of a bundle that was replaced must see their streams end.
async fn pace(
    whole: Weak<Bundle>,
    mut head: watch::Receiver<Option<Arc<Edition>>>,
    pacing: impl Future<Output = ()>,
    paced: Paced,
) {
    let idle = async {
        loop {
            tokio::time::sleep(SCOPE_IDLE).await;
            let whole = whole.upgrade();
            let scopes = whole.as_ref().and_then(|whole| whole.scopes.as_ref());
            if scopes.is_none_or(|scopes| scopes.drop_idle(&paced)) {
                return;
            }
        }
    };
    let ended = async { while head.changed().await.is_ok() {} };
    tokio::select! {
        () = pacing => {}
        () = ended => {}
        () = idle => tracing::debug!(namespace = paced.namespace, "idle namespace dropped"),
    }
}
