//! A bundle as it looks from one namespace: the same policies and data, and of replicated resources the objects of that
//! namespace and those that belong to none. Each is made when somebody first asks, shared by all who ask alike, and
//! dropped when nobody has asked for a while.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use opa_hub_proto::path::{DirPath, is_segment};

use super::edition::{Bundle, Edition};
use super::log::{Commit, Log};
use super::spec::Scoped;
use super::view::{Changed, View};
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

struct Scope {
    bundle: Arc<Bundle>,
    /// Somebody asked since it was looked at last.
    asked: Arc<AtomicBool>,
}

impl Scopes {
    /// None yet.
    pub fn new(scoped: Scoped) -> Self {
        Self { scoped, live: Mutex::default() }
    }

    /// The namespaces that are served now.
    pub fn namespaces(&self) -> Vec<String> {
        self.live().keys().cloned().collect()
    }

    /// The bundle as it looks from `namespace`. What is made newly keeps pace by itself until it is idle.
    pub fn of(&self, whole: &Arc<Bundle>, namespace: Option<&str>) -> Result<Arc<Bundle>, Error> {
        let namespace = namespace.filter(|namespace| !namespace.is_empty()).ok_or(Error::NoNamespace)?;
        if !is_segment(namespace) {
            return Err(Error::Invalid(namespace.to_owned()));
        }
        let mut live = self.live();
        if let Some(scope) = live.get(namespace) {
            scope.asked.store(true, Ordering::Relaxed);
            return Ok(Arc::clone(&scope.bundle));
        }
        if live.len() >= SCOPES_MAX {
            return Err(Error::TooMany);
        }
        let bundle = Arc::new(whole.part());
        if let Some(edition) = whole.head().borrow().as_ref() {
            let view = self.view(&edition.view, namespace);
            bundle.publish(view, Log::default(), edition.bounds().clone());
        }
        let asked = Arc::new(AtomicBool::new(true));
        let scope = Scope { bundle: Arc::clone(&bundle), asked };
        live.insert(namespace.to_owned(), scope);
        drop(live);
        tokio::spawn(pace(Arc::clone(whole), Arc::clone(&bundle), namespace.to_owned()));
        Ok(bundle)
    }

    /// Brings every namespace that the last change concerns to `edition`.
    pub fn follow(&self, edition: &Edition) {
        let commit = edition.log().last();
        for (namespace, scope) in self.live().iter() {
            let held = scope.bundle.head().borrow().clone();
            let concerns = |commit: &Commit| {
                let dirs = &commit.changed.dirs;
                !commit.changed.modules.is_empty() || dirs.iter().any(|dir| self.has(namespace, &dir.path))
            };
            if held.is_some() && !commit.is_some_and(concerns) {
                continue;
            }
            let next = self.view(&edition.view, namespace);
            let mut log = Log::default();
            if let (Some(held), Some(commit)) = (held, commit) {
                if held.view.revision == next.revision {
                    continue;
                }
                let kept = commit.changed.dirs.iter().filter(|dir| self.has(namespace, &dir.path));
                let changed =
                    Changed { dirs: kept.cloned().collect(), modules: commit.changed.modules.clone() };
                log = held.log().clone();
                log.push(held.view.revision, changed, commit.narrows);
            }
            scope.bundle.publish(next, log, edition.bounds().clone());
        }
    }

    fn view(&self, whole: &View, namespace: &str) -> View {
        whole.only(|dir| self.has(namespace, dir))
    }

    /// Whether a directory is seen from `namespace`. Objects of no namespace lie right below their resource.
    fn has(&self, namespace: &str, dir: &DirPath) -> bool {
        let Scoped { root, whole } = &self.scoped;
        let below = dir.as_str().strip_prefix(root.as_str()).and_then(|rest| rest.strip_prefix('/'));
        let own = below.and_then(|below| below.split_once('/'));
        own.is_none_or(|(_, of)| of == namespace) || whole.iter().any(|place| dir.is_within(place))
    }

    /// Whether nobody reads or asked since the last call; then it is gone.
    fn drop_idle(&self, namespace: &str) -> bool {
        let mut live = self.live();
        let Some(scope) = live.get(namespace) else { return true };
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

/// Paces the archives of one namespace for as long as somebody reads it.
async fn pace(whole: Arc<Bundle>, bundle: Arc<Bundle>, namespace: String) {
    let idle = async {
        loop {
            tokio::time::sleep(SCOPE_IDLE).await;
            if whole.scopes.as_ref().is_none_or(|scopes| scopes.drop_idle(&namespace)) {
                return;
            }
        }
    };
    tokio::select! {
        () = bundle.pace() => {}
        () = idle => tracing::debug!(namespace, "nobody asks for it any more: dropped"),
    }
}
