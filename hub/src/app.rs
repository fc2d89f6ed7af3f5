//! The only wiring: which stage feeds which, and how they end.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use clap::Parser as _;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::bundle::Bundle;
use crate::cli::{Cli, Task};
use crate::config::{Config, DRAIN, EVENT_QUEUE_MAX, Source};
use crate::model::FeedId;
use crate::pipeline::{self, Feeds, Pipeline, Said};
use crate::policy::candidates::LastGood;
use crate::policy::check::Compiler;
use crate::readiness::Readiness;
use crate::source::auto::{Auto, Wanted};
use crate::source::{self, folder, kubernetes};
use crate::writeback::last_good::{self, Place};
use crate::writeback::{lease, verdicts};
use crate::{fields_of, serve, telemetry, writeback};

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
        let sources: Vec<_> = config.feeds.iter().map(ToString::to_string).collect();
        tracing::info!(from = %config.source, bundle = config.bundle, sources = sources.join(", "), "starting");
        rustls::crypto::aws_lc_rs::default_provider().install_default().ok();
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let result = runtime.block_on(run(config));
        // The writer's thread ends with its queue; a folder being read is not waited for.
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
    let listener = listen(config.listen).await?;
    let health = match config.health {
        Some(address) => Some(listen(address).await?),
        None => None,
    };
    let readiness = Readiness::default();
    for feed in &config.feeds {
        readiness.pending(&feed.to_string(), "not listed yet");
    }
    let compiler = Compiler::find(config.rego.opa.as_deref(), config.rego.dialect).await?;
    let checked_by = compiler.name();
    tracing::info!(by = checked_by, "checking policies");
    if let Compiler::Syntax(_) = compiler {
        let warning = "no opa found: only the syntax of policies is checked, and one that does not compile reaches \
                       OPAs; give --opa-bin";
        tracing::warn!("{warning}");
        readiness.problem("opa", Some(warning.into()));
    }
    readiness.pending(pipeline::POLICIES, "not checked yet");
    let stop = CancellationToken::new();
    let bundle = Arc::new(Bundle::new(config.bundle.clone(), config.scoped.clone()));
    let feeds = Arc::new(Feeds::default());
    let (events, queue) = mpsc::channel(EVENT_QUEUE_MAX);
    let mut tasks = Tasks::new();

    let (writer, ends) = Pipeline::new(
        config.feeds.clone(),
        &config.rego,
        config.fields.clone(),
        bundle.clone(),
        readiness.clone(),
        feeds.clone(),
    );
    let (say, said) = mpsc::channel(1);
    tasks.spawn(async move {
        tokio::task::spawn_blocking(move || writer.run(queue, said)).await?;
        Ok("the writer")
    });
    let auto = config.auto.clone();
    let auto = auto.map(|auto| Auto::new(auto.path, auto.ignored, &config.feeds, ends.settled));
    let wanted = auto.as_ref().map(Auto::wanted);
    let cluster = follow(&config, wanted, &events, &readiness, &mut tasks).await?;
    drop(events);
    let lease =
        write_down(&config, cluster, &bundle, &readiness, &stop, (say.clone(), ends.good), &mut tasks);
    tasks.spawn({
        let (readiness, fields) = (readiness.clone(), config.fields.clone());
        async move {
            let here = tokio::runtime::Handle::current();
            let check =
                move || here.block_on(pipeline::check(compiler, ends.jobs, say, auto, fields, readiness));
            tokio::task::spawn_blocking(check).await?;
            Ok("the check")
        }
    });
    tasks.spawn({
        let bundle = bundle.clone();
        async move {
            bundle.pace().await;
            Ok("the pacer")
        }
    });
    let address = listener.local_addr()?;
    let hub = serve::Hub::new(bundle, checked_by, readiness, feeds, stop.clone());
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
    stop.cancel();
    server.await?.context("cannot serve")?;
    if let Some(lease) = lease {
        // Whoever waits for the Lease takes it when it runs out, at worst.
        _ = tokio::time::timeout(DRAIN, lease).await;
    }
    ended
}

/// Starts the source. What is returned reaches the cluster, where there is one.
async fn follow(
    config: &Config,
    wanted: Option<Wanted>,
    events: &source::Sender,
    readiness: &Readiness,
    tasks: &mut Tasks,
) -> anyhow::Result<Option<kube::Client>> {
    let (events, readiness) = (events.clone(), readiness.clone());
    match &config.source {
        Source::Folder(dir) => {
            let source = folder::run(dir.clone(), config.feeds.clone(), wanted, events, readiness);
            tasks.spawn(async move { source.await.map(|()| "the manifests folder").map_err(Into::into) });
            Ok(None)
        }
        Source::Kubernetes { kubeconfig } => {
            let client = kubernetes::client(kubeconfig.as_deref()).await?;
            for (id, feed) in config.feeds.iter().enumerate() {
                let (client, events, readiness) = (client.clone(), events.clone(), readiness.clone());
                let watch = kubernetes::watch(client, FeedId(id), feed.clone(), events, readiness);
                tasks.spawn(async move {
                    watch.await;
                    Ok("a watch")
                });
            }
            if let Some(wanted) = wanted {
                let watches = kubernetes::watch_wanted(client.clone(), wanted, events, readiness);
                tasks.spawn(async move {
                    watches.await;
                    Ok("the watches of what policies read")
                });
            }
            Ok(Some(client))
        }
    }
}

/// Starts what keeps the last good policies and, in a cluster, what writes verdicts. What is returned ends once the
/// Lease was given back.
fn write_down(
    config: &Config,
    cluster: Option<kube::Client>,
    bundle: &Arc<Bundle>,
    readiness: &Readiness,
    stop: &CancellationToken,
    (say, good): (mpsc::Sender<Said>, watch::Receiver<Option<LastGood>>),
    tasks: &mut Tasks,
) -> Option<JoinHandle<()>> {
    let leads = watch::Sender::new(false);
    let namespace = |client: &kube::Client| writeback::namespace(config.namespace.as_deref(), client);
    let place = match (&config.state_dir, &cluster) {
        (Some(dir), _) => Place::folder(dir, &config.bundle),
        (None, Some(client)) => Place::cluster(client.clone(), &namespace(client), &config.bundle),
        (None, None) => Place::Nowhere,
    };
    let keep = place.run(say, good, leads.subscribe(), readiness.clone());
    tasks.spawn(async move {
        keep.await;
        Ok("the keeper of the last good policies")
    });
    let client = cluster?;
    let identity = writeback::identity();
    if config.write_verdicts {
        let writer =
            verdicts::Writer::new(client.clone(), identity.clone(), bundle.clone(), readiness.clone());
        let write = writer.run(leads.subscribe());
        tasks.spawn(async move {
            write.await;
            Ok("the writer of verdicts")
        });
    }
    let namespace = namespace(&client);
    let striving = lease::Striving::new(client, &namespace, last_good::object_name(&config.bundle), identity);
    Some(tokio::spawn(striving.run(leads, readiness.clone(), stop.clone().cancelled_owned())))
}

async fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))
}

async fn signal() {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
        .expect("SIGTERM can be listened for");
    tokio::select! {
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
}
