//! The only wiring.

use std::process::ExitCode;

use anyhow::Context as _;
use tokio::net::TcpListener;

use crate::cli::Cli;
use crate::config::{Config, RESOLVERS_MAX};
use crate::local::Local;
use crate::replica::Replica;
use crate::server;
use crate::status::Status;

/// Runs the agent as the command line says until it is told to stop.
pub fn main() -> ExitCode {
    let (cli, others) = match Cli::parse_tolerantly(std::env::args()) {
        Ok(parsed) => parsed,
        Err(error) => error.exit(),
    };
    let log = tracing_subscriber::fmt().with_max_level(cli.log_level).with_writer(std::io::stderr);
    if cli.log_json {
        log.json().init();
    } else {
        log.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init();
    }
    let run = || -> anyhow::Result<()> {
        let config = cli.config()?;
        if !others.is_empty() {
            tracing::warn!(flags = others.join(" "), "passed over, the hub may need them now");
        }
        let hubs: Vec<_> = config.hubs.iter().map(reqwest::Url::as_str).collect();
        let (opa, bundle, delivery) = (&config.opa.url, &config.bundle, config.delivery);
        tracing::info!(hubs = hubs.join(","), %opa, bundle, ?delivery, "starting");
        rustls::crypto::aws_lc_rs::default_provider().install_default().ok();
        // One thread for everything but archives, the state and names: each thread costs an arena of the allocator.
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
    let local = Local::new(config.bundle.clone(), status.clone());
    let replica = Replica::new(&config, local.clone(), status)?;
    tracing::info!("health at http://{}/readyz", listener.local_addr()?);
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let router = local.clone().health();
    let also_health = async {
        match health {
            Some(listener) => server::serve(listener, router).await,
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
        () = server::serve(listener, local.router()) => unreachable!("it serves for ever"),
        () = also_health => unreachable!("it serves for ever"),
        () = replica.run(stop) => Ok(()),
    }
}
