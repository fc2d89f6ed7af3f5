//! Starts the agent and joins its parts.

use std::process::ExitCode;

use anyhow::Context as _;
use tokio::net::TcpListener;

use crate::args::Args;
use crate::config::Config;
use crate::server::{self, LocalServer};
use crate::status::Status;
use crate::sync::Replica;

/// A DNS outage blocks one thread for up to 30 s per attempt at a hub.
const RESOLVERS_MAX: usize = 8;

/// Runs the agent until SIGTERM or SIGINT.
pub fn main() -> ExitCode {
    let (args, unknown) = match Args::parse_tolerantly(std::env::args()) {
        Ok(parsed) => parsed,
        Err(error) => error.exit(),
    };
    let log = tracing_subscriber::fmt().with_max_level(args.log_level).with_writer(std::io::stderr);
    if args.log_json {
        log.json().init();
    } else {
        log.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init();
    }
    let run = || -> anyhow::Result<()> {
        let config = args.config()?;
        if !unknown.is_empty() {
            tracing::warn!(flags = unknown.join(" "), "unknown flags ignored");
        }
        let hubs: Vec<_> = config.hubs.iter().map(reqwest::Url::as_str).collect();
        let (opa, bundle, delivery) = (&config.opa.url, &config.bundle, config.delivery);
        tracing::info!(hubs = hubs.join(","), %opa, bundle, ?delivery, "agent starting");
        rustls::crypto::aws_lc_rs::default_provider().install_default().ok();
        // Each thread costs an arena of the allocator.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(RESOLVERS_MAX)
            .build()?;
        runtime.block_on(run(config))
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("opa-hub-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(config: Config) -> anyhow::Result<()> {
    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("cannot listen on {}", config.listen))?;
    let health = match config.health {
        Some(address) => {
            Some(TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?)
        }
        None => None,
    };
    let status = Status::new(config.delivery, config.unready_after);
    let local = LocalServer::new(config.bundle.clone(), status.clone());
    let replica = Replica::new(&config, local.clone(), status)?;
    let address = listener.local_addr()?;
    tracing::info!(%address, "serving health");
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let health_router = local.clone().health_router();
    let serve_health = async {
        match health {
            Some(listener) => server::serve(listener, health_router).await,
            None => std::future::pending().await,
        }
    };
    let stop = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
    };
    tokio::select! {
        () = server::serve(listener, local.router()) => unreachable!("a server has no end"),
        () = serve_health => unreachable!("a server has no end"),
        () = replica.run(stop) => Ok(()),
    }
}
