//! Running bundles, each on its own threads.

use std::sync::Arc;

use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::bundle::Bundle;
use crate::bundle::registry::BundleRegistry;
use crate::health::Health;
use crate::manager::last_good::Place;
use crate::pipeline::auto_replication::Auto;
use crate::pipeline::writer::BundleWriter;
use crate::pipeline::{self, WriterCommand, WriterHandles};
use crate::policy::check::Compiler;
use crate::policy::registry::LastGood;
use crate::policy::verdict::VerdictBoard;
use crate::spec::BundleSpec;
use crate::store::Store;

/// Starts bundles.
pub struct BundleFactory {
    /// Watched objects.
    pub store: Arc<Store>,
    /// Policy compiler.
    pub compiler: Compiler,
    /// Storage of a bundle's last good policies.
    pub place: Box<dyn Fn(&str) -> Place + Send + Sync>,
    /// Whether this replica is the leader.
    pub leads: watch::Receiver<bool>,
    /// Health of the hub.
    pub readiness: Health,
    /// Served bundles.
    pub bundles: Arc<BundleRegistry>,
}

/// Running bundle. Its tasks stop on drop.
pub struct RunningBundle {
    /// Specification.
    pub spec: Arc<BundleSpec>,
    /// Served content.
    pub bundle: Arc<Bundle>,
    readiness: Health,
    last_good: watch::Receiver<Option<LastGood>>,
    tasks: Vec<AbortHandle>,
    _stop: DropGuard,
}

/// Name of a finished task.
pub type TaskName = &'static str;

impl BundleFactory {
    /// Starts a bundle with the `restored` policies, or else the stored ones. `gates` delays the hub's readiness. Problems
    /// of the flags' bundle (`is_flags`) omit its name.
    pub async fn start(
        &self,
        spec: Arc<BundleSpec>,
        restored: Option<LastGood>,
        gates: bool,
        is_flags: bool,
        tasks: &mut JoinSet<TaskName>,
    ) -> RunningBundle {
        let readiness = if is_flags {
            self.readiness.clone()
        } else {
            self.readiness.of(&format!("bundle {}: ", spec.name))
        };
        let compiler = self.compiler.with_dialect(spec.dialect);
        let mut bundle = Bundle::new(spec.name.clone(), spec.scoped.clone());
        bundle.verdicts = VerdictBoard::telling(Arc::clone(&self.bundles.verdicts));
        let bundle = Arc::new(bundle);
        let (writer, WriterHandles { jobs, good: last_good }) =
            BundleWriter::new(&spec, Arc::clone(&bundle), &self.store, readiness.clone());
        if gates {
            writer.gate();
        }
        let (commands, receiver) = mpsc::channel(1);
        let stop = CancellationToken::new();
        let mut handles = Vec::new();
        handles.push(tasks.spawn(async move {
            on_thread("opa-hub-writer", move || writer.run(receiver)).await;
            "writer"
        }));
        let auto = spec.auto.clone().map(|auto| Auto::new(auto, &spec.feeds));
        let check_inputs = (Arc::clone(&spec), Arc::clone(&bundle), readiness.clone());
        let (check_commands, stopped) = (commands.clone(), stop.clone());
        handles.push(tasks.spawn(async move {
            let check = move || {
                let (spec, bundle, readiness) = check_inputs;
                Handle::current().block_on(async {
                    tokio::select! {
                        () = pipeline::check(compiler, jobs, check_commands, auto, spec, bundle, readiness) => {}
                        () = stopped.cancelled() => {}
                    }
                });
            };
            on_thread("opa-hub-check", check).await;
            "policy check"
        }));
        handles.push(tasks.spawn({
            let bundle = Arc::clone(&bundle);
            async move {
                bundle.pace().await;
                "archive throttle"
            }
        }));
        let mut running =
            RunningBundle { spec, bundle, readiness, last_good, tasks: handles, _stop: stop.drop_guard() };
        match restored {
            Some(policies) => _ = commands.send(WriterCommand::RestoreLastGood(policies)).await,
            None => self.keep(&mut running, Some(commands), tasks),
        }
        running
    }

    /// Stores changed last good policies, after sending the stored ones to `restore`.
    pub fn keep(
        &self,
        running: &mut RunningBundle,
        restore: Option<mpsc::Sender<WriterCommand>>,
        tasks: &mut JoinSet<TaskName>,
    ) {
        let storage = (self.place)(&running.spec.name);
        let (last_good, is_leader) = (running.last_good.clone(), self.leads.clone());
        let readiness = running.readiness.clone();
        running.tasks.push(tasks.spawn(async move {
            let stored = match restore {
                Some(commands) => storage.restore(commands, &readiness).await,
                None => None,
            };
            storage.keep(stored, last_good, is_leader, readiness).await;
            "last good storage"
        }));
    }
}

/// Runs long `work` on its own thread. Propagates panics.
async fn on_thread(name: &str, work: impl FnOnce() + Send + 'static) {
    let (done, ended) = oneshot::channel::<()>();
    let runtime = Handle::current();
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        // Dropped on return and on panic.
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

impl RunningBundle {
    pub(crate) fn good(&self) -> Option<LastGood> {
        self.last_good.borrow().clone()
    }

    pub(crate) fn forget(&self) {
        self.readiness.forget();
    }

    /// Whether a snapshot is published.
    pub fn is_live(&self) -> bool {
        self.bundle.head().borrow().is_some()
    }
}

impl Drop for RunningBundle {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}
