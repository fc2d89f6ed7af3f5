//! The only wiring: which stage feeds which, and how they end.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use clap::Parser as _;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::bundles::{Bundles, Stages};
use crate::cli::{Cli, Task};
use crate::config::{Config, DRAIN, EVENT_QUEUE_MAX, FILES_WANTED, LISTEN_BACKLOG, Source};
use crate::documents::{Documents, Opinions};
use crate::policy::check::{Compiler, Dialect};
use crate::readiness::Readiness;
use crate::source::{self, folder, kubernetes};
use crate::store::Store;
use crate::writeback::last_good::{self, Place};
use crate::writeback::{lease, statuses, verdicts};
use crate::{fields_of, serve, telemetry, writeback};

/// The notice of a hub without an OPA.
const NOT_COMPILED: &str = "policies are parsed, not compiled: no opa program was found; put opa on the PATH, or set \
                            OPA_BIN to it";

/// What runs as long as the hub does; each ends with its name.
type Tasks = JoinSet<anyhow::Result<&'static str>>;

/// Runs the hub as the command line says until it is told to stop.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let (level, format) = cli.log();
    telemetry::init(level, format);
    let run = || -> anyhow::Result<()> {
        let config = match cli.task()? {
            Task::Serve(config) => config,
            Task::Fields(config) => {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                print!("{}", runtime.block_on(fields_of::report(&config))?);
                return Ok(());
            }
        };
        tracing::info!(from = %config.source, "starting");
        rustls::crypto::aws_lc_rs::default_provider().install_default().ok();
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let result = runtime.block_on(run(config));
        // The writers' threads end with their queues; a folder being read is not waited for.
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
            "each stream takes a file descriptor: raise the hard limit (LimitNOFILE, ulimit -Hn) for more agents"
        ),
        Ok(files) => tracing::debug!(files, "file descriptors"),
        Err(error) => tracing::warn!(%error, "cannot raise the limit of open files"),
    }
    let listener = listen(config.listen)?;
    let health = match config.health {
        Some(address) => Some(listen(address)?),
        None => None,
    };
    serve::memory::note_start();
    let readiness = Readiness::default();
    let compiler = Compiler::find(config.opa.as_deref(), Dialect::Default).await?;
    let checked_by = compiler.name();
    tracing::info!(by = checked_by, "checking policies");
    if let Compiler::Syntax(_) = compiler {
        tracing::warn!("{NOT_COMPILED}");
        readiness.notice("opa", NOT_COMPILED.into());
    }
    let stop = CancellationToken::new();
    let mut tasks = Tasks::new();
    let store = Arc::new(Store::new(readiness.clone()));
    let (events, queue) = mpsc::channel(EVENT_QUEUE_MAX);
    let cluster = follow(&config, &store, events, &readiness, &mut tasks).await?;
    tasks.spawn({
        let store = Arc::clone(&store);
        async move {
            tokio::task::spawn_blocking(move || store.run(queue)).await?;
            Ok("the store")
        }
    });
    let bundles = Arc::new(Bundles::default());
    bundles.store.get_or_init(|| Arc::clone(&store));
    let leads = watch::Sender::new(false);
    let stages = Stages {
        store,
        compiler,
        place: place(&config, cluster.clone()),
        leads: leads.subscribe(),
        readiness: readiness.clone(),
        bundles: Arc::clone(&bundles),
    };
    let documents = Documents::new(stages, config.flags.clone(), config.documents.clone());
    let lease = cluster.map(|client| {
        write_down(&config, client, leads, &bundles, documents.opinions(), &readiness, &stop, &mut tasks)
    });
    tasks.spawn(async move { Err(documents.run().await) });
    let address = listener.local_addr()?;
    let hub = serve::Hub::new(bundles, checked_by, readiness, config.replicas.clone(), stop.clone());
    if let Some(listener) = health {
        let served = serve::run_health(listener, hub.clone());
        tasks.spawn(async move { served.await.map(|()| "the health endpoint").map_err(Into::into) });
    }
    let server = tokio::spawn(serve::run(listener, hub));
    tracing::info!("dashboard at http://{address}/");

    let ended = tokio::select! {
        () = signal() => Ok(()),
        Some(ended) = tasks.join_next() => match ended {
            Ok(Ok(name)) => Err(anyhow::anyhow!("{name} ended unexpectedly")),
            Ok(Err(error)) => Err(error),
            Err(panic) => Err(panic.into()),
        },
    };
    tracing::info!("stopping");
    let until = tokio::time::Instant::now() + DRAIN;
    stop.cancel();
    server.await?.context("cannot serve")?;
    if let Some(lease) = lease {
        // It began to be given back with the stop. Whoever waits for it takes it when it runs out, at worst.
        _ = tokio::time::timeout_at(until, lease).await;
    }
    ended
}

/// Starts the source. What is returned reaches the cluster, where there is one.
async fn follow(
    config: &Config,
    store: &Store,
    events: source::Sender,
    readiness: &Readiness,
    tasks: &mut Tasks,
) -> anyhow::Result<Option<kube::Client>> {
    let (wanted, readiness) = (store.wanted(), readiness.clone());
    match &config.source {
        Source::Folder(dir) => {
            let source = folder::run(dir.clone(), wanted, events, readiness);
            tasks.spawn(async move { source.await.map(|()| "the manifests folder").map_err(Into::into) });
            Ok(None)
        }
        Source::Kubernetes { kubeconfig } => {
            let client = kubernetes::client(kubeconfig.as_deref()).await?;
            let source = kubernetes::run(client.clone(), wanted, events, readiness);
            tasks.spawn(async move {
                source.await;
                Ok("the watches")
            });
            Ok(Some(client))
        }
    }
}

/// Where the last good policies of each bundle are kept.
fn place(config: &Config, cluster: Option<kube::Client>) -> Box<dyn Fn(&str) -> Place + Send + Sync> {
    let (dir, namespace) = (config.state_dir.clone(), config.namespace.clone());
    Box::new(move |bundle| match (&dir, &cluster) {
        (Some(dir), _) => Place::folder(dir, bundle),
        (None, Some(client)) => {
            Place::cluster(client.clone(), &writeback::namespace(namespace.as_deref(), client), bundle)
        }
        (None, None) => Place::Nowhere,
    })
}

/// Starts what writes to the cluster while this replica leads. What is returned ends once the Lease was given back.
#[expect(clippy::too_many_arguments, reason = "it joins what the others made")]
fn write_down(
    config: &Config,
    client: kube::Client,
    leads: watch::Sender<bool>,
    bundles: &Arc<Bundles>,
    opinions: watch::Receiver<Opinions>,
    readiness: &Readiness,
    stop: &CancellationToken,
    tasks: &mut Tasks,
) -> JoinHandle<()> {
    let identity = writeback::identity();
    if config.write_verdicts {
        let writer =
            verdicts::Writer::new(client.clone(), identity.clone(), Arc::clone(bundles), readiness.clone());
        let write = writer.run(leads.subscribe());
        tasks.spawn(async move {
            write.await;
            Ok("the writer of verdicts")
        });
    }
    let write =
        statuses::run(client.clone(), Arc::clone(bundles), opinions, leads.subscribe(), readiness.clone());
    tasks.spawn(async move {
        write.await;
        Ok("the writer of statuses")
    });
    let namespace = writeback::namespace(config.namespace.as_deref(), &client);
    let striving = lease::Striving::new(client, &namespace, last_good::object_name(&config.bundle), identity);
    tokio::spawn(striving.run(leads, readiness.clone(), stop.clone().cancelled_owned()))
}

fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let bind = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(LISTEN_BACKLOG)
    };
    bind().with_context(|| format!("cannot listen on {address}"))
}

async fn signal() {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
        .expect("SIGTERM can be listened for");
    tokio::select! {
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
}
