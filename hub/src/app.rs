//! Creates, joins and stops all parts of the hub.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use clap::Parser as _;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::args::config::{Config, Source};
use crate::args::{Cli, Task};
use crate::bundle::registry::BundleRegistry;
use crate::health::Health;
use crate::manager::last_good::{self, Place};
use crate::manager::runner::BundleFactory;
use crate::manager::{BundleController, DocumentStatuses};
use crate::policy::check::{Compiler, Dialect};
use crate::serve::DRAIN;
use crate::source::{self, EVENT_QUEUE_MAX, folder, kubernetes};
use crate::status::{bundles, configmaps, leader};
use crate::store::Store;
use crate::{fields_command, k8s, logging, serve};

/// File descriptors below which the hub warns. Each stream uses one.
pub const FILES_WANTED: u64 = 16_384;
/// Maximum unaccepted connections (kernel limit: `net.core.somaxconn`). Dropped clients retry after 1 s.
pub const LISTEN_BACKLOG: u32 = 16_384;

const NOT_COMPILED: &str = "policies are parsed, not compiled: no opa program was found; put opa on the PATH, or set \
                            OPA_BIN to it";

/// Tasks that run until shutdown. Each returns its name.
type Tasks = JoinSet<anyhow::Result<&'static str>>;

/// Runs the command line's task.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let (level, format) = cli.log();
    logging::init(level, format);
    let run = || -> anyhow::Result<()> {
        let config = match cli.task()? {
            Task::Serve(config) => config,
            Task::Fields(config) => {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                print!("{}", runtime.block_on(fields_command::report(&config))?);
                return Ok(());
            }
        };
        tracing::info!(source = %config.source, "starting");
        rustls::crypto::aws_lc_rs::default_provider().install_default().ok();
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let result = runtime.block_on(run(config));
        // Writer threads end with their queues. A folder scan may block.
        runtime.shutdown_background();
        result
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("opa-hub: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(config: Config) -> anyhow::Result<()> {
    match rlimit::increase_nofile_limit(u64::MAX) {
        Ok(files) if files < FILES_WANTED => tracing::warn!(
            files,
            reason = "each stream needs a file descriptor; raise the hard limit (LimitNOFILE, ulimit -Hn)",
            "file descriptor limit is low"
        ),
        Ok(files) => tracing::debug!(files, "file descriptor limit raised"),
        Err(error) => tracing::warn!(%error, "raising file descriptor limit failed"),
    }
    let listener = listen(config.listen)?;
    let health = match config.health {
        Some(address) => Some(listen(address)?),
        None => None,
    };
    serve::memory::note_start();
    let readiness = Health::default();
    let compiler = Compiler::find(config.opa.as_deref(), Dialect::Default).await?;
    let checker = compiler.name();
    tracing::info!(compiler = checker, "policy compiler selected");
    if let Compiler::Syntax(_) = compiler {
        tracing::warn!(reason = NOT_COMPILED, "policies are not compiled");
        readiness.notice("opa", NOT_COMPILED.into());
    }
    let stop = CancellationToken::new();
    let mut tasks = Tasks::new();
    let store = Arc::new(Store::new(readiness.clone()));
    let (events, queue) = mpsc::channel(EVENT_QUEUE_MAX);
    let cluster = start_source(&config, &store, events, &readiness, &mut tasks).await?;
    tasks.spawn({
        let store = Arc::clone(&store);
        async move {
            tokio::task::spawn_blocking(move || store.run(queue)).await?;
            Ok("store")
        }
    });
    let bundles = Arc::new(BundleRegistry::default());
    bundles.store.get_or_init(|| Arc::clone(&store));
    let is_leader = watch::Sender::new(false);
    let stages = BundleFactory {
        store,
        compiler,
        place: last_good_storage(&config, cluster.clone()),
        leads: is_leader.subscribe(),
        readiness: readiness.clone(),
        bundles: Arc::clone(&bundles),
    };
    let documents = BundleController::new(stages, config.flags.clone(), config.documents.clone());
    let lease = cluster.map(|client| {
        let statuses = documents.opinions();
        start_writeback(&config, client, is_leader, &bundles, statuses, &readiness, &stop, &mut tasks)
    });
    tasks.spawn(async move { Err(documents.run().await) });
    let address = listener.local_addr()?;
    let hub = serve::Hub::new(bundles, checker, readiness, config.replicas.clone(), stop.clone());
    if let Some(listener) = health {
        let served = serve::run_health(listener, hub.clone());
        tasks.spawn(async move { served.await.map(|()| "health endpoint").map_err(Into::into) });
    }
    let server = tokio::spawn(serve::run(listener, hub));
    let dashboard = format!("http://{address}/");
    tracing::info!(%dashboard, "listening");

    let ended = tokio::select! {
        () = shutdown_signal() => Ok(()),
        Some(ended) = tasks.join_next() => match ended {
            Ok(Ok(task)) => Err(anyhow::anyhow!("task ended unexpectedly: {task}")),
            Ok(Err(error)) => Err(error),
            Err(panic) => Err(panic.into()),
        },
    };
    tracing::info!("stopping");
    let deadline = tokio::time::Instant::now() + DRAIN;
    stop.cancel();
    server.await?.context("serving failed")?;
    if let Some(lease) = lease {
        // The stop releases the Lease. If that takes too long, the Lease expires.
        _ = tokio::time::timeout_at(deadline, lease).await;
    }
    ended
}

/// Starts the source. Returns the client of a cluster.
async fn start_source(
    config: &Config,
    store: &Store,
    events: source::Sender,
    readiness: &Health,
    tasks: &mut Tasks,
) -> anyhow::Result<Option<kube::Client>> {
    let (watches, readiness) = (store.wanted(), readiness.clone());
    match &config.source {
        Source::Folder(dir) => {
            let source = folder::run(dir.clone(), watches, events, readiness);
            tasks.spawn(async move { source.await.map(|()| "manifests folder").map_err(Into::into) });
            Ok(None)
        }
        Source::Kubernetes { kubeconfig } => {
            let client = kubernetes::client(kubeconfig.as_deref()).await?;
            let source = kubernetes::run(client.clone(), watches, events, readiness);
            tasks.spawn(async move {
                source.await;
                Ok("watches")
            });
            Ok(Some(client))
        }
    }
}

fn last_good_storage(
    config: &Config,
    cluster: Option<kube::Client>,
) -> Box<dyn Fn(&str) -> Place + Send + Sync> {
    let (dir, namespace) = (config.state_dir.clone(), config.namespace.clone());
    Box::new(move |bundle| match (&dir, &cluster) {
        (Some(dir), _) => Place::folder(dir, bundle),
        (None, Some(client)) => {
            Place::cluster(client.clone(), &k8s::namespace(namespace.as_deref(), client), bundle)
        }
        (None, None) => Place::Nowhere,
    })
}

/// Starts the leader's writers. The returned task releases the Lease.
#[expect(clippy::too_many_arguments, reason = "joins all other parts")]
fn start_writeback(
    config: &Config,
    client: kube::Client,
    is_leader: watch::Sender<bool>,
    bundles: &Arc<BundleRegistry>,
    document_statuses: watch::Receiver<DocumentStatuses>,
    readiness: &Health,
    stop: &CancellationToken,
    tasks: &mut Tasks,
) -> JoinHandle<()> {
    let identity = k8s::identity();
    if config.write_verdicts {
        let writer =
            configmaps::Writer::new(client.clone(), identity.clone(), Arc::clone(bundles), readiness.clone());
        let write = writer.run(is_leader.subscribe());
        tasks.spawn(async move {
            write.await;
            Ok("verdict writer")
        });
    }
    let write = bundles::run(
        client.clone(),
        Arc::clone(bundles),
        document_statuses,
        is_leader.subscribe(),
        readiness.clone(),
    );
    tasks.spawn(async move {
        write.await;
        Ok("status writer")
    });
    let namespace = k8s::namespace(config.namespace.as_deref(), &client);
    let elector =
        leader::LeaderElector::new(client, &namespace, last_good::object_name(&config.bundle), identity);
    tokio::spawn(elector.run(is_leader, readiness.clone(), stop.clone().cancelled_owned()))
}

fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let bind = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(LISTEN_BACKLOG)
    };
    bind().with_context(|| format!("listening on {address} failed"))
}

async fn shutdown_signal() {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
        .expect("SIGTERM can be listened for");
    tokio::select! {
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
}
