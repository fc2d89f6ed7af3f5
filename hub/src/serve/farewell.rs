//! The last words of a hub that stops: which other replicas are ready for its readers.

use std::net::SocketAddr;

use bytes::Bytes;
use futures::future::join_all;
use futures::stream::{FuturesUnordered, StreamExt as _};
use opa_hub_proto::sse::Word;
use tokio::time::{Instant, timeout_at};

use crate::config::{FAREWELL_MAX, FAREWELL_REPLICAS_MAX};

/// Asks all addresses of `replicas` (`HOST:PORT`). This hub may be among them: it is not ready any more.
pub(super) async fn farewell(replicas: &[String]) -> Bytes {
    let ready = if replicas.is_empty() { Vec::new() } else { ready(replicas).await };
    let urls = ready.iter().map(String::as_str).collect();
    format!(": {}\n\n", Word::Go(urls)).into()
}

/// Who says so in time.
async fn ready(replicas: &[String]) -> Vec<String> {
    let until = Instant::now() + FAREWELL_MAX;
    let Ok(http) = reqwest::Client::builder().no_proxy().build() else { return Vec::new() };
    // A name that hangs must not cost the others their turn.
    let look =
        replicas.iter().map(|replica| timeout_at(until - FAREWELL_MAX / 2, tokio::net::lookup_host(replica)));
    let mut addresses: Vec<SocketAddr> =
        join_all(look).await.into_iter().flatten().flatten().flatten().collect();
    addresses.sort_unstable();
    addresses.dedup();
    fastrand::shuffle(&mut addresses);
    let ask = async |address: SocketAddr| {
        let url = format!("http://{address}");
        let answer = http.get(format!("{url}/readyz")).send().await.ok()?;
        answer.status().is_success().then_some(url)
    };
    let mut asked: FuturesUnordered<_> = addresses.into_iter().take(FAREWELL_REPLICAS_MAX).map(ask).collect();
    let mut ready = Vec::new();
    while let Ok(Some(answer)) = timeout_at(until, asked.next()).await {
        ready.extend(answer);
    }
    ready
}
