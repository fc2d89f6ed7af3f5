//! Requests to the hub.

use std::path::Path;
use std::time::Duration;

use opa_hub_proto::position::{POSITION_BYTES_MAX, POSITION_HEADER, Position};
use opa_hub_proto::reconcile::Reconcile;
use opa_hub_proto::revision::Revision;
use reqwest::header::ETAG;
use reqwest::redirect::Policy;
use reqwest::{Client, RequestBuilder, Response, StatusCode, Url};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::body::{Body, IDLE_TIMEOUT};
use super::error::Error;
use super::failover::{BACKOFF_MAX, Failover};
use super::stream::Stream;
use crate::archive::{Chunks, PolicyBundle};
use crate::http;

/// Hubs on the same network accept within milliseconds.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum time until a response starts: compressing 150 MB needs half a second.
const HUB_RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);
const READY_PROBE_TIMEOUT: Duration = Duration::from_secs(1);
/// The agent stores the bundle in memory.
const POLICY_BUNDLE_BYTES_MAX: usize = 16 << 20;

/// Client of one hub at a time.
pub(crate) struct HubClient {
    client: Client,
    bundle: String,
    namespace: Option<String>,
    failover: Failover,
}

pub(crate) struct Download {
    pub(crate) chunks: Chunks,
    pub(crate) position: Position,
    /// Receives the archive until dropped.
    pub(crate) task: AbortOnDropHandle<()>,
}

impl HubClient {
    pub(crate) fn new(
        urls: Vec<Url>,
        ca_file: Option<&Path>,
        bundle: String,
        namespace: Option<String>,
    ) -> Result<Self, Error> {
        // A connection without a pool is cheaper for the hub; proxies buffer; redirects are untrusted.
        let mut builder = Client::builder()
            .no_proxy()
            .redirect(Policy::none())
            .tcp_nodelay(true)
            .pool_max_idle_per_host(0)
            .connect_timeout(CONNECT_TIMEOUT);
        if let Some(file) = ca_file {
            builder = builder.tls_certs_merge(http::ca_certificates(file).map_err(Error::Client)?);
        }
        if urls.iter().all(|url| url.scheme() == "http") {
            // Images may lack CA certificates.
            builder = builder.tls_certs_only([]);
        }
        let client = builder.build().map_err(|error| Error::Client(error.to_string()))?;
        Ok(Self { client, bundle, namespace, failover: Failover::new(urls) })
    }

    pub(crate) fn current(&self) -> &Url {
        self.failover.current()
    }

    pub(crate) fn next_hub(&mut self) {
        self.failover.next_hub();
    }

    /// Moves to a random peer, or to the next hub.
    pub(crate) fn move_to_peer(&mut self, peers: Vec<Url>) {
        self.failover.move_to_peer(peers);
    }

    pub(crate) fn reset_backoff(&mut self) {
        self.failover.reset_backoff();
    }

    pub(crate) async fn back_off(&mut self) {
        self.failover.back_off().await;
    }

    /// Maximum time until a return to the selected hub.
    pub(crate) fn rotation_timeout(&self) -> Duration {
        let hubs = u32::try_from(self.failover.len() + 1).unwrap_or(u32::MAX);
        (CONNECT_TIMEOUT + HUB_RESPONSE_TIMEOUT + BACKOFF_MAX) * hubs
    }

    /// Moves to a ready hub. Probes the current URL last: replicas may share it.
    pub(crate) async fn move_to_ready(&mut self) -> bool {
        for steps in 1..=self.failover.len() {
            let index = self.failover.index_after(steps);
            let mut url = self.failover.url(index).join("readyz").expect("a constant path is valid");
            url.query_pairs_mut().append_pair("bundle", &self.bundle);
            let response = self.client.get(url).timeout(READY_PROBE_TIMEOUT).send().await;
            if response.is_ok_and(|response| response.status().is_success()) {
                self.failover.select(index);
                return true;
            }
        }
        false
    }

    pub(crate) async fn data(&self) -> Result<Download, Error> {
        let request = self.client.get(self.url("/data"));
        self.send("GET data", request).await.map(download)
    }

    pub(crate) async fn full(&self) -> Result<Download, Error> {
        let request = self.client.get(self.url(""));
        self.send("GET bundle", request).await.map(download)
    }

    pub(crate) async fn policy_bundle(&self) -> Result<PolicyBundle, Error> {
        let request = self.client.get(self.url("/policy"));
        let response = self.send("GET policy", request).await?;
        let etag = response.headers().get(ETAG).and_then(|etag| etag.to_str().ok()).unwrap_or_default();
        let etag = etag.trim_matches('"').to_owned();
        let mut archive = Vec::new();
        let mut body = Body::new(response);
        while let Some(chunk) = body.chunk().await? {
            archive.extend_from_slice(&chunk);
            if archive.len() > POLICY_BUNDLE_BYTES_MAX {
                return Err(Error::PolicyBundleTooLarge(POLICY_BUNDLE_BYTES_MAX));
            }
        }
        Ok(PolicyBundle { etag, archive: archive.into() })
    }

    /// Requests the differences from `digests`. `revision` is `None` for incomplete content.
    pub(crate) async fn reconcile(
        &self,
        digests: &Reconcile,
        revision: Option<Revision>,
        position: &Position,
    ) -> Result<Download, Error> {
        let body = serde_json::to_vec(digests).expect("a request has string keys");
        let request = self.client.post(self.url("/reconcile")).body(body);
        let mut request = with_position(request, position);
        if let Some(revision) = revision {
            request = request.header("last-event-id", revision.to_string());
        }
        self.send("POST reconcile", request).await.map(download)
    }

    /// Returns `None` if the hub does not know `revision`.
    pub(crate) async fn stream(
        &self,
        revision: Revision,
        position: &Position,
    ) -> Result<Option<Stream>, Error> {
        let request = self.client.get(self.url("/stream")).header("last-event-id", revision.to_string());
        match self.send("GET stream", with_position(request, position)).await {
            Ok(response) => Ok(Some(Stream::new(response))),
            Err(Error::Rejected { status: StatusCode::GONE, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn url(&self, suffix: &str) -> Url {
        let path = format!("bundles/{}{suffix}", self.bundle);
        let mut url = self.current().join(&path).expect("bundle names are valid in paths");
        if let Some(namespace) = &self.namespace {
            url.query_pairs_mut().append_pair("namespace", namespace);
        }
        url
    }

    async fn send(&self, name: &'static str, request: RequestBuilder) -> Result<Response, Error> {
        let response = tokio::time::timeout(HUB_RESPONSE_TIMEOUT, request.send());
        let response = response.await.map_err(|_| Error::Timeout(HUB_RESPONSE_TIMEOUT))??;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let message = tokio::time::timeout(IDLE_TIMEOUT, http::message(response)).await.unwrap_or_default();
        if status == StatusCode::PRECONDITION_FAILED {
            return Err(Error::BehindOpa(message));
        }
        Err(Error::Rejected { request: name, status, message })
    }
}

/// Adds the minimum position of the hub.
fn with_position(request: RequestBuilder, position: &Position) -> RequestBuilder {
    let text = position.to_string();
    let is_omitted = position.is_empty() || text.len() > POSITION_BYTES_MAX;
    if is_omitted { request } else { request.header(POSITION_HEADER, text) }
}

fn download(response: Response) -> Download {
    let position = response.headers().get(POSITION_HEADER).and_then(|position| position.to_str().ok());
    // Content without a position is always accepted.
    let position = position.and_then(|position| position.parse().ok()).unwrap_or_default();
    let (out, chunks) = mpsc::channel(1);
    let task = tokio::spawn(async move {
        let mut body = Body::new(response);
        while let Some(chunk) = body.chunk().await.map_err(std::io::Error::other).transpose() {
            let has_failed = chunk.is_err();
            if out.send(chunk).await.is_err() || has_failed {
                return;
            }
        }
    });
    Download { chunks, position, task: AbortOnDropHandle::new(task) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::body::repeat;

    /// A14
    #[tokio::test(start_paused = true)]
    async fn slow_download_ends() {
        let Download { mut chunks, task, .. } = download(repeat(&b"x"[..], Duration::from_secs(3)));
        let error = loop {
            match chunks.recv().await.unwrap() {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        assert!(error.to_string().contains("retrying with another hub"), "{error}");
        drop(task);
    }
}
