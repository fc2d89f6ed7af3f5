//! The last words of a hub that stops: which other replicas are ready for its readers.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use bytes::Bytes;
use futures::future::join_all;
use opa_hub_proto::sse::Word;

use crate::config::{FAREWELL_ANSWER, FAREWELL_MAX, FAREWELL_REPLICAS_MAX};

/// Asks all addresses of `replicas` (`HOST:PORT`). This hub may be among them: it is not ready any more.
pub(super) async fn farewell(replicas: &[String]) -> Bytes {
    let ready = tokio::time::timeout(FAREWELL_MAX, ready(replicas)).await.unwrap_or_default();
    let urls = ready.iter().map(String::as_str).collect();
    format!(": {}\n\n", Word::Go(urls)).into()
}

async fn ready(replicas: &[String]) -> Vec<String> {
    let Ok(http) = reqwest::Client::builder().no_proxy().timeout(FAREWELL_ANSWER).build() else {
        return Vec::new();
    };
    let found = join_all(replicas.iter().map(tokio::net::lookup_host)).await;
    let addresses: BTreeSet<SocketAddr> = found.into_iter().flatten().flatten().collect();
    let ask = async |address: SocketAddr| {
        let url = format!("http://{address}");
        let answer = http.get(format!("{url}/readyz")).send().await.ok()?;
        answer.status().is_success().then_some(url)
    };
    join_all(addresses.into_iter().take(FAREWELL_REPLICAS_MAX).map(ask)).await.into_iter().flatten().collect()
}
