//! The hub over HTTP. Handlers only read editions; what is shared by many is encoded by the edition, once.

mod api;
mod bundle;
mod connections;
mod dashboard;
mod door;
mod error;
mod fanout;
mod farewell;
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

use crate::bundle::{Bundle, Part};
use crate::bundles::Bundles;
use crate::config::{CONNECTIONS_MAX, DRAIN, REQUEST_BODY_MAX, REQUEST_HEAD_MAX};
use crate::readiness::Readiness;
use crate::serve::connections::{Connections, PROBES_MAX};
use crate::serve::error::Error;
use crate::serve::fanout::Fanout;

/// What the handlers share.
#[derive(Clone)]
pub struct Hub(Arc<Shared>, Limits);

/// The waits for clients, and the number of clients, that a listener grants.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// From the start of a connection, or from the end of a response, to the end of the next request's head.
    pub head: Duration,
    /// For a request's body.
    pub body: Duration,
    /// Open connections, besides streams in the fan-out.
    pub connections: usize,
}

impl Default for Limits {
    /// Half of the process's file descriptors stay for streams.
    fn default() -> Self {
        let files = rlimit::Resource::NOFILE.get_soft().unwrap_or(u64::MAX);
        let connections =
            usize::try_from(files / 2).map_or(CONNECTIONS_MAX, |files| files.min(CONNECTIONS_MAX));
        Self { head: REQUEST_HEAD_MAX, body: REQUEST_BODY_MAX, connections }
    }
}

struct Shared {
    bundles: Arc<Bundles>,
    /// What checks the policies.
    checked_by: String,
    readiness: Readiness,
    /// Other hubs like this one, as `HOST:PORT`, and what readers are told of them in the end.
    replicas: Vec<String>,
    farewell: OnceCell<Bytes>,
    stop: CancellationToken,
    deltas: bundle::DeltaClients,
    memory: memory::Account,
    /// One turn to compute what fields cost.
    forecasts: Arc<Semaphore>,
}

impl Hub {
    /// A hub that serves `bundles`, whose policies are `checked_by`, until `stop`; then its readers go to `replicas`.
    pub fn new(
        bundles: Arc<Bundles>,
        checked_by: String,
        readiness: Readiness,
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
            deltas: bundle::DeltaClients::default(),
            memory: memory::Account::default(),
            forecasts: Arc::new(Semaphore::new(1)),
        };
        Self(Arc::new(shared), Limits::default())
    }

    /// The same with other limits.
    #[must_use]
    pub fn with_limits(self, limits: Limits) -> Self {
        Self(self.0, limits)
    }

    /// The last words to readers, once the hub stops.
    async fn farewell(&self) -> Bytes {
        self.0.farewell.get_or_init(|| farewell::farewell(&self.0.replicas)).await.clone()
    }

    fn bundle(&self, name: &str) -> Result<Arc<Bundle>, Error> {
        self.0.bundles.get(name).ok_or_else(|| {
            // While the hub starts it may be to come.
            let starts = self.0.bundles.list().is_empty();
            if starts { Error::NotReady } else { Error::NoSuchBundle(name.to_owned()) }
        })
    }

    /// The bundle as it looks from a namespace, for a client that stays connected.
    fn part(&self, name: &str, namespace: Option<&str>) -> Result<Arc<Bundle>, Error> {
        Ok(self.bundle(name)?.of(namespace)?)
    }

    /// The bundle as it looks from a namespace, for one answer.
    fn part_once(&self, name: &str, namespace: Option<&str>) -> Result<Arc<Bundle>, Error> {
        Ok(self.bundle(name)?.once(namespace)?)
    }
}

/// All that the hub answers.
pub fn router(hub: Hub) -> Router {
    Router::new()
        .route("/", get(dashboard::page))
        .route(
            "/bundles/{name}",
            get(|hub, name, query, headers, peer| bundle::get(Part::Whole, hub, name, query, headers, peer)),
        )
        .route(
            "/bundles/{name}/policy",
            get(|hub, name, query, headers, peer| bundle::get(Part::Policy, hub, name, query, headers, peer)),
        )
        .route(
            "/bundles/{name}/data",
            get(|hub, name, query, headers, peer| bundle::get(Part::Data, hub, name, query, headers, peer)),
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

/// Whether the process answers, and whether it is ready. kube-mgmt's name for the first is `/health`.
fn health(hub: Hub) -> Router {
    Router::new()
        .route("/health", get(health::live))
        .route("/livez", get(health::live))
        .route("/readyz", get(health::ready))
        .with_state(hub)
}

/// Serves health alone, until it is dropped.
pub async fn run_health(listener: TcpListener, hub: Hub) -> std::io::Result<()> {
    let limits = Limits { connections: PROBES_MAX, ..hub.1 };
    let connections = Connections::new(health(hub), limits, CancellationToken::new());
    loop {
        let room = connections.room().await;
        let (tcp, peer) = connections::accept(&listener).await;
        connections.serve(tcp, peer, room);
    }
}

/// Serves until the hub stops, then gives requests in flight a moment to end.
pub async fn run(listener: TcpListener, hub: Hub) -> std::io::Result<()> {
    let stop = hub.0.stop.clone();
    let fanout = Fanout::new(hub.clone());
    let connections = Connections::new(router(hub.clone()), hub.1, stop.clone());
    tokio::select! {
        () = stop.cancelled() => {}
        () = door::open(listener, &hub, &fanout, &connections) => {}
    }
    let drained = async {
        connections.drained().await;
        fanout.drained().await;
    };
    _ = tokio::time::timeout(DRAIN, drained).await;
    Ok(())
}
