//! The hub over HTTP. Handlers only read editions; what is shared by many is encoded by the edition, once.

mod api;
mod bundle;
mod dashboard;
mod door;
mod error;
mod fanout;
mod farewell;
mod health;
mod metrics;
mod reconcile;
mod stream;

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{get, post};
use axum::serve::ListenerExt as _;
use bytes::Bytes;
use opa_hub_proto::reconcile::RECONCILE_BYTES_MAX;
use tokio::net::TcpListener;
use tokio::sync::OnceCell;
use tokio_util::sync::CancellationToken;

use crate::bundle::{Bundle, Part};
use crate::bundles::Bundles;
use crate::config::DRAIN;
use crate::readiness::Readiness;
use crate::serve::door::Door;
use crate::serve::error::Error;
use crate::serve::fanout::Fanout;

/// What the handlers share.
#[derive(Clone)]
pub struct Hub(Arc<Shared>);

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
        Self(Arc::new(Shared {
            bundles,
            checked_by,
            readiness,
            replicas,
            farewell: OnceCell::new(),
            stop,
            deltas: bundle::DeltaClients::default(),
        }))
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

    /// What is served of the bundle to whoever names this namespace.
    fn part(&self, name: &str, namespace: Option<&str>) -> Result<Arc<Bundle>, Error> {
        Ok(self.bundle(name)?.of(namespace)?)
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

/// Serves health alone, for ever.
pub async fn run_health(listener: TcpListener, hub: Hub) -> std::io::Result<()> {
    axum::serve(listener, health(hub)).await
}

/// Serves until the hub stops, then gives requests in flight a moment to end.
pub async fn run(listener: TcpListener, hub: Hub) -> std::io::Result<()> {
    let stop = hub.0.stop.clone();
    let fanout = Fanout::new(hub.clone());
    // Says who is at the other end, as axum's own listener does.
    let door = Door::open(listener, hub.clone(), Arc::clone(&fanout))?.tap_io(|_| {});
    let service = router(hub).into_make_service_with_connect_info::<std::net::SocketAddr>();
    let graceful = axum::serve(door, service).with_graceful_shutdown(stop.clone().cancelled_owned());
    let deadline = async {
        stop.cancelled().await;
        tokio::time::sleep(DRAIN).await;
    };
    let ended = async {
        let ended = graceful.await;
        fanout.drained().await;
        ended
    };
    tokio::select! {
        ended = ended => ended,
        () = deadline => Ok(()),
    }
}
