//! HTTP server. Editions encode each shared answer once.

mod api;
mod bundle;
mod connections;
mod dashboard;
mod error;
mod health;
pub mod memory;
mod metrics;
mod reconcile;
mod stream;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{get, post};
use bytes::Bytes;
use opa_hub_proto::reconcile::RECONCILE_BYTES_MAX;
use tokio::net::TcpListener;
use tokio::sync::{OnceCell, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::bundle::Bundle;
use crate::bundle::registry::BundleRegistry;
use crate::health::Health;
use crate::serve::connections::{Connections, PROBES_MAX};
use crate::serve::error::Error;
use crate::serve::stream::fanout::Fanout;
use crate::snapshot::bundle_archive::ArchiveKind;

/// Timeout of request heads and idle connections. Scrapes every 15 s stay connected.
pub const REQUEST_HEAD_MAX: Duration = Duration::from_secs(20);
/// Timeout of a request body.
pub const REQUEST_BODY_MAX: Duration = Duration::from_secs(10);
/// Maximum connections of a listener besides streams.
pub const CONNECTIONS_MAX: usize = 16_384;
/// Maximum time for requests in flight at shutdown.
pub const DRAIN: Duration = Duration::from_secs(5);

/// State of all handlers.
#[derive(Clone)]
pub struct Hub(Arc<Shared>, Limits);

/// Limits of a listener.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Maximum time from the connection's start, or the last response, to the end of the next request's head.
    pub head: Duration,
    /// Maximum time for a request's body.
    pub body: Duration,
    /// Maximum connections outside the fan-out.
    pub connections: usize,
}

impl Default for Limits {
    /// Leaves half of the file descriptors for streams.
    fn default() -> Self {
        let files = rlimit::Resource::NOFILE.get_soft().unwrap_or(u64::MAX);
        let connections =
            usize::try_from(files / 2).map_or(CONNECTIONS_MAX, |files| files.min(CONNECTIONS_MAX));
        Self { head: REQUEST_HEAD_MAX, body: REQUEST_BODY_MAX, connections }
    }
}

struct Shared {
    bundles: Arc<BundleRegistry>,
    checked_by: String,
    readiness: Health,
    /// `HOST:PORT` of other hubs.
    replicas: Vec<String>,
    farewell: OnceCell<Bytes>,
    stop: CancellationToken,
    memory: memory::Account,
    /// One permit.
    forecasts: Arc<Semaphore>,
}

impl Hub {
    /// Serves `bundles` until `stop`, then sends clients to `replicas`.
    pub fn new(
        bundles: Arc<BundleRegistry>,
        checked_by: String,
        readiness: Health,
        replicas: Vec<String>,
        stop: CancellationToken,
    ) -> Self {
        let shared = Shared {
            bundles,
            checked_by,
            readiness,
            replicas,
            farewell: OnceCell::new(),
            stop,
            memory: memory::Account::default(),
            forecasts: Arc::new(Semaphore::new(1)),
        };
        Self(Arc::new(shared), Limits::default())
    }

    /// Replaces the default limits.
    #[must_use]
    pub fn with_limits(self, limits: Limits) -> Self {
        Self(self.0, limits)
    }

    async fn farewell(&self) -> Bytes {
        self.0.farewell.get_or_init(|| stream::peers::farewell(&self.0.replicas)).await.clone()
    }

    fn bundle(&self, name: &str) -> Result<Arc<Bundle>, Error> {
        self.0.bundles.get(name).ok_or_else(|| {
            // The bundle may still appear.
            let is_starting = self.0.bundles.list().is_empty();
            if is_starting { Error::NotReady } else { Error::NoSuchBundle(name.to_owned()) }
        })
    }

    /// For clients that stay connected.
    fn part(&self, name: &str, namespace: Option<&str>) -> Result<Arc<Bundle>, Error> {
        Ok(self.bundle(name)?.of(namespace)?)
    }

    /// For one answer.
    fn part_once(&self, name: &str, namespace: Option<&str>) -> Result<Arc<Bundle>, Error> {
        Ok(self.bundle(name)?.once(namespace)?)
    }
}

/// All endpoints.
pub fn router(hub: Hub) -> Router {
    Router::new()
        .route("/", get(dashboard::page))
        .route(
            "/bundles/{name}",
            get(|hub, name, query, headers| bundle::get(ArchiveKind::Full, hub, name, query, headers)),
        )
        .route(
            "/bundles/{name}/policy",
            get(|hub, name, query, headers| bundle::get(ArchiveKind::Policy, hub, name, query, headers)),
        )
        .route(
            "/bundles/{name}/data",
            get(|hub, name, query, headers| bundle::get(ArchiveKind::Data, hub, name, query, headers)),
        )
        .route("/bundles/{name}/stream", get(stream::get))
        .route(
            "/bundles/{name}/reconcile",
            post(reconcile::post).layer(DefaultBodyLimit::max(RECONCILE_BYTES_MAX)),
        )
        .route("/v1/bundles", get(api::list))
        .route("/v1/bundles/{name}", get(api::show))
        .route("/v1/bundles/{name}/fields", get(api::fields))
        .route("/metrics", get(metrics::render))
        .with_state(hub.clone())
        .merge(health(hub))
}

/// `/health` is kube-mgmt's name for `/livez`.
fn health(hub: Hub) -> Router {
    Router::new()
        .route("/health", get(health::live))
        .route("/livez", get(health::live))
        .route("/readyz", get(health::ready))
        .with_state(hub)
}

/// Serves health endpoints until dropped.
pub async fn run_health(listener: TcpListener, hub: Hub) -> std::io::Result<()> {
    let limits = Limits { connections: PROBES_MAX, ..hub.1 };
    let connections = Connections::new(health(hub), limits, CancellationToken::new());
    loop {
        let permit = connections.permit().await;
        let tcp = connections::accept(&listener).await;
        connections.serve(tcp, permit);
    }
}

/// Serves until the hub stops, then drains connections for up to `DRAIN`.
pub async fn run(listener: TcpListener, hub: Hub) -> std::io::Result<()> {
    let stop = hub.0.stop.clone();
    let fanout = Fanout::new(hub.clone());
    let connections = Connections::new(router(hub.clone()), hub.1, stop.clone());
    tokio::select! {
        () = stop.cancelled() => {}
        () = stream::listener::open(listener, &hub, &fanout, &connections) => {}
    }
    let drained = async {
        connections.drained().await;
        fanout.drained().await;
    };
    _ = tokio::time::timeout(DRAIN, drained).await;
    Ok(())
}
