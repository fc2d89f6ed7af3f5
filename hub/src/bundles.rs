//! The bundles that there are: each with a writer, a check and a keeper of its own, so that none waits for another.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::bundle::Bundle;
use crate::bundle::spec::Spec;
use crate::pipeline::{self, Ends, Pipeline, Said};
use crate::policy::candidates::LastGood;
use crate::policy::check::Compiler;
use crate::policy::verdict::Verdicts;
use crate::readiness::Readiness;
use crate::source::auto::Auto;
use crate::store::Store;
use crate::writeback::last_good::Place;

/// What is served, by name.
#[derive(Default)]
pub struct Bundles {
    served: RwLock<BTreeMap<String, Arc<Bundle>>>,
    /// The objects that they share, once it is there.
    pub store: OnceLock<Arc<Store>>,
    /// Rung when a verdict of any is new.
    pub verdicts: Arc<Notify>,
    /// Verdicts that were to be written to ConfigMaps.
    pub verdict_writes: AtomicU64,
}

impl Bundles {
    /// The bundle of this name.
    pub fn get(&self, name: &str) -> Option<Arc<Bundle>> {
        self.served.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// All, by name.
    pub fn list(&self) -> Vec<Arc<Bundle>> {
        self.served.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Serves `bundle` under its name from now on.
    pub fn serve(&self, bundle: Arc<Bundle>) {
        let mut served = self.served.write().unwrap_or_else(PoisonError::into_inner);
        served.insert(bundle.name.clone(), bundle);
    }

    /// Serves it no more. Streams of it end.
    pub fn withdraw(&self, name: &str) {
        self.served.write().unwrap_or_else(PoisonError::into_inner).remove(name);
    }
}

/// What every bundle is started with.
pub struct Stages {
    /// Where its objects are.
    pub store: Arc<Store>,
    /// What checks policies.
    pub compiler: Compiler,
    /// Where the last good policies of a bundle are kept.
    pub place: Box<dyn Fn(&str) -> Place + Send + Sync>,
    /// Whether this replica writes to the cluster.
    pub leads: watch::Receiver<bool>,
    /// What is waited for, and what is wrong.
    pub readiness: Readiness,
    /// Who is told of verdicts.
    pub bundles: Arc<Bundles>,
}

/// A bundle that is being written. Its stages end with it.
pub struct Running {
    /// As which.
    pub spec: Arc<Spec>,
    /// What is served of it.
    pub bundle: Arc<Bundle>,
    readiness: Readiness,
    good: watch::Receiver<Option<LastGood>>,
    tasks: Vec<AbortHandle>,
    _stop: DropGuard,
}

/// How a task of a bundle ended: with what it is called.
pub type Ended = &'static str;

impl Stages {
    /// Starts the stages of `spec` among `tasks`. The policies that are good already are the `restored` ones, or else
    /// those that were kept over a restart. If it `gates`, the hub is not ready before the bundle is. What is wrong
    /// with the bundle of the flags (`is_flags`) is told without its name.
    pub async fn start(
        &self,
        spec: Arc<Spec>,
        restored: Option<LastGood>,
        gates: bool,
        is_flags: bool,
        tasks: &mut JoinSet<Ended>,
    ) -> Running {
        let readiness = if is_flags {
            self.readiness.clone()
        } else {
            self.readiness.of(&format!("bundle {}: ", spec.name))
        };
        let compiler = self.compiler.with_dialect(spec.dialect);
        let mut bundle = Bundle::new(spec.name.clone(), spec.scoped.clone());
        bundle.verdicts = Verdicts::telling(Arc::clone(&self.bundles.verdicts));
        let bundle = Arc::new(bundle);
        let (writer, Ends { jobs, good }) =
            Pipeline::new(&spec, Arc::clone(&bundle), &self.store, readiness.clone());
        if gates {
            writer.gate();
        }
        let (say, said) = mpsc::channel(1);
        let stop = CancellationToken::new();
        let mut handles = Vec::new();
        handles.push(tasks.spawn(async move {
            on_thread("opa-hub-writer", move || writer.run(said)).await;
            "the writer"
        }));
        let auto = spec.auto.clone().map(|auto| Auto::new(auto, &spec.feeds));
        let (checked, of, whose) = (Arc::clone(&spec), Arc::clone(&bundle), readiness.clone());
        let (tell, stopped) = (say.clone(), stop.clone());
        handles.push(tasks.spawn(async move {
            let checking = move || {
                Handle::current().block_on(async {
                    tokio::select! {
                        () = pipeline::check(compiler, jobs, tell, auto, checked, of, whose) => {}
                        () = stopped.cancelled() => {}
                    }
                });
            };
            on_thread("opa-hub-check", checking).await;
            "the check"
        }));
        handles.push(tasks.spawn({
            let bundle = Arc::clone(&bundle);
            async move {
                bundle.pace().await;
                "the pacer"
            }
        }));
        let mut running = Running { spec, bundle, readiness, good, tasks: handles, _stop: stop.drop_guard() };
        match restored {
            Some(good) => _ = say.send(Said::Restored(good)).await,
            None => self.keep(&mut running, Some(say), tasks),
        }
        running
    }

    /// Keeps what is good of `running` from now on. What was kept is told to `say` first.
    pub fn keep(&self, running: &mut Running, say: Option<mpsc::Sender<Said>>, tasks: &mut JoinSet<Ended>) {
        let place = (self.place)(&running.spec.name);
        let (good, leads, readiness) = (running.good.clone(), self.leads.clone(), running.readiness.clone());
        running.tasks.push(tasks.spawn(async move {
            let kept = match say {
                Some(say) => place.restore(say, &readiness).await,
                None => None,
            };
            place.keep(kept, good, leads, readiness).await;
            "the keeper of the last good policies"
        }));
    }
}

/// Runs `work` on a thread of its own and waits for its end, or panics as it does. The runtime's threads for blocking
/// work are few, and for work that ends soon.
async fn on_thread(name: &str, work: impl FnOnce() + Send + 'static) {
    let (done, ended) = oneshot::channel::<()>();
    let runtime = Handle::current();
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        // Dropped at the end, and by a panic.
        let _done = done;
        let _in_runtime = runtime.enter();
        work();
    });
    let thread = thread.expect("a thread can be started");
    _ = ended.await;
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

impl Running {
    /// Its good policies; none: they were not checked yet.
    pub fn good(&self) -> Option<LastGood> {
        self.good.borrow().clone()
    }

    /// Nothing is wrong with it any more.
    pub fn forget(&self) {
        self.readiness.forget();
    }

    /// Whether there is an edition of it.
    pub fn is_live(&self) -> bool {
        self.bundle.head().borrow().is_some()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}
