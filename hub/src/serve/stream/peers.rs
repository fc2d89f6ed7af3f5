//! The go-away comment of a hub that stops.

use std::net::SocketAddr;

use bytes::Bytes;
use futures::future::join_all;
use futures::stream::{FuturesUnordered, StreamExt as _};
use opa_hub_proto::sse::Word;
use tokio::time::{Instant, timeout_at};

use crate::serve::Duration;

/// Timeout of a peer's readiness response at shutdown, with DNS.
pub(crate) const FAREWELL_MAX: Duration = Duration::from_secs(1);
/// Maximum peers asked and named at shutdown.
pub(crate) const FAREWELL_REPLICAS_MAX: usize = 16;

/// Names the ready addresses of `replicas` (`HOST:PORT`). This hub's own `/readyz` already fails.
pub(in crate::serve) async fn farewell(replicas: &[String]) -> Bytes {
    let ready = if replicas.is_empty() { Vec::new() } else { ready(replicas).await };
    let urls = ready.iter().map(String::as_str).collect();
    format!(": {}\n\n", Word::Go(urls)).into()
}

async fn ready(replicas: &[String]) -> Vec<String> {
    let deadline = Instant::now() + FAREWELL_MAX;
    let Ok(http) = reqwest::Client::builder().no_proxy().build() else { return Vec::new() };
    // A hanging lookup leaves time for the other replicas.
    let lookups = replicas
        .iter()
        .map(|replica| timeout_at(deadline - FAREWELL_MAX / 2, tokio::net::lookup_host(replica)));
    let mut addresses: Vec<SocketAddr> =
        join_all(lookups).await.into_iter().flatten().flatten().flatten().collect();
    addresses.sort_unstable();
    addresses.dedup();
    fastrand::shuffle(&mut addresses);
    let probe = async |address: SocketAddr| {
        let url = format!("http://{address}");
        let response = http.get(format!("{url}/readyz")).send().await.ok()?;
        response.status().is_success().then_some(url)
    };
    let mut probes: FuturesUnordered<_> =
        addresses.into_iter().take(FAREWELL_REPLICAS_MAX).map(probe).collect();
    let mut ready = Vec::new();
    while let Ok(Some(url)) = timeout_at(deadline, probes.next()).await {
        ready.extend(url);
    }
    ready
}
