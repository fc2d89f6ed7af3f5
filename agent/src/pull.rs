//! Connections to the hub: archives, reconcile, the stream. Several hubs are as good as each other; a failure moves
//! on to the next after a pause drawn from nothing up to a doubling bound, so that many agents come back spread out.

use std::path::Path;
use std::time::Duration;

use futures::TryStreamExt;
use opa_hub_proto::frame::FRAME_BYTES_MAX;
use opa_hub_proto::position::{POSITION_BYTES_MAX, POSITION_HEADER, Position};
use opa_hub_proto::reconcile::Reconcile;
use opa_hub_proto::revision::Revision;
use opa_hub_proto::sse::{self, Decoder, Message};
use reqwest::header::ETAG;
use reqwest::redirect::Policy;
use reqwest::{Client, RequestBuilder, Response, StatusCode, Url};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::archive::Chunks;
use crate::authorities::authorities;
use crate::body;
use crate::config::{
    FRESH_ANSWER, HUB_ANSWER, POLICY_BUNDLE_BYTES_MAX, RETRY_FIRST, RETRY_MAX, STREAM_SILENCE,
};

/// Why the hub gave nothing. Each is tried again, on the next hub.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The client could not be made.
    #[error("making a client for the hub failed: {0}; check --hub-ca-file and the certificates of the image")]
    Client(String),
    /// No connection, or one that broke.
    #[error("the hub does not answer: {0}")]
    Unreachable(#[from] reqwest::Error),
    /// No first byte in time, or none for too long on a stream.
    #[error("the hub was silent for {} s", .0.as_secs())]
    Silent(Duration),
    /// The hub says no.
    #[error("the hub answers {what} with {status}: {message}")]
    Refused {
        /// What was asked.
        what: String,
        /// The answer's status.
        status: StatusCode,
        /// The hub's words.
        message: String,
    },
    /// What it has is older than what OPA holds.
    #[error("it would take OPA back in time: {0}")]
    Lags(String),
    /// It has not heard its source for a while, and another hub has.
    #[error("the hub is cut off, and another is not: {0}")]
    Stale(String),
    /// It stops, and says which of its replicas are ready.
    #[error("the hub stops")]
    Stops(Vec<Url>),
    /// The stream does not follow its format.
    #[error("the stream cannot be read: {0}")]
    Stream(#[from] sse::Error),
    /// The hub closed the stream: it stops, or it no longer knows what we hold.
    #[error("the hub closed the stream")]
    Closed,
    /// Between two answers the hub took a change of policies.
    #[error("the hub's policies are not those that its data was for: asking again")]
    Moved,
    /// A policy bundle that no cluster's policies fill.
    #[error("the policy bundle has more than {POLICY_BUNDLE_BYTES_MAX} bytes")]
    TooLarge,
}

/// The hubs, one of which is asked.
pub struct Hubs {
    client: Client,
    urls: Vec<Url>,
    /// A replica of one of them, asked instead until it fails.
    replica: Option<Url>,
    bundle: String,
    namespace: Option<String>,
    current: usize,
    pause: Duration,
}

/// A policy bundle as OPA takes it.
#[derive(Clone, Debug)]
pub struct PolicyBundle {
    /// The modules' digest.
    pub etag: String,
    /// The gzip'd tar.
    pub archive: bytes::Bytes,
}

/// An archive on its way.
pub struct Archive {
    /// What it holds.
    pub chunks: Chunks,
    /// As of when.
    pub position: Position,
}

/// A stream that is open.
pub struct Stream {
    response: Response,
    decoder: Decoder,
    heard: Instant,
}

impl Hubs {
    /// Starts with any of `urls`, so that agents spread over them.
    pub fn new(
        urls: Vec<Url>,
        ca_file: Option<&Path>,
        bundle: String,
        namespace: Option<String>,
    ) -> Result<Self, Error> {
        // A stream on a connection of its own is cheaper to the hub. A proxy would buffer it, and a redirect leads to who
        // was not asked.
        let mut builder = Client::builder()
            .no_proxy()
            .redirect(Policy::none())
            .tcp_nodelay(true)
            .pool_max_idle_per_host(0)
            .connect_timeout(OPEN);
        if let Some(file) = ca_file {
            builder = builder.tls_certs_merge(authorities(file).map_err(Error::Client)?);
        }
        if urls.iter().all(|url| url.scheme() == "http") {
            // An image without certificates of authorities will do.
            builder = builder.tls_certs_only([]);
        }
        let client = builder.build().map_err(|error| Error::Client(error.to_string()))?;
        let current = fastrand::usize(..urls.len());
        Ok(Self { client, urls, replica: None, bundle, namespace, current, pause: RETRY_FIRST })
    }

    /// The hub that is asked.
    pub fn current(&self) -> &Url {
        self.replica.as_ref().unwrap_or(&self.urls[self.current])
    }

    /// All went well: the next failure pauses briefly again.
    pub fn settle(&mut self) {
        self.pause = RETRY_FIRST;
    }

    /// Moves on to the next hub.
    fn move_on(&mut self) {
        if self.replica.take().is_none() {
            self.current = (self.current + 1) % self.urls.len();
        }
    }

    /// How long it takes at most until the hub that is asked is asked again, whatever the others do.
    pub fn turn(&self) -> Duration {
        (OPEN + HUB_ANSWER + RETRY_MAX) * u32::try_from(self.urls.len() + 1).unwrap_or(u32::MAX)
    }

    /// Moves on to any of `replicas`, where there are some, so that agents spread over them.
    pub fn move_to(&mut self, mut replicas: Vec<Url>) {
        // Who was given TLS stays with it.
        replicas.retain(|replica| replica.scheme() == self.current().scheme());
        self.move_on();
        if !replicas.is_empty() {
            self.replica = Some(replicas.swap_remove(fastrand::usize(..replicas.len())));
        }
    }

    /// Moves to a hub that hears its source, if there is one. Behind one address there may be several.
    pub async fn move_to_fresh(&mut self) -> bool {
        for step in 1..=self.urls.len() {
            let at = (self.current + step) % self.urls.len();
            let mut url = self.urls[at].join("readyz").expect("a path of our own");
            url.query_pairs_mut().append_pair("bundle", &self.bundle);
            let answer = self.client.get(url).timeout(FRESH_ANSWER).send().await;
            if answer.is_ok_and(|answer| answer.status().is_success()) {
                (self.current, self.replica) = (at, None);
                return true;
            }
        }
        false
    }

    /// Moves on to the next hub, after a pause.
    pub async fn fail_over(&mut self) {
        self.move_on();
        self.pause().await;
    }

    /// Waits, longer after each failure.
    pub async fn pause(&mut self) {
        tokio::time::sleep(self.pause.mul_f64(fastrand::f64())).await;
        self.pause = (self.pause * 2).min(RETRY_MAX);
    }

    /// The archive of all data.
    pub async fn data(&self) -> Result<Archive, Error> {
        let request = self.client.get(self.url("/data"));
        self.send("the data", request).await.map(archive)
    }

    /// The archive of all data and all modules.
    pub async fn whole(&self) -> Result<Archive, Error> {
        let request = self.client.get(self.url(""));
        self.send("the bundle", request).await.map(archive)
    }

    /// The newest policy bundle.
    pub async fn policy_bundle(&self) -> Result<PolicyBundle, Error> {
        let request = self.client.get(self.url("/policy"));
        let mut response = self.send("the policies", request).await?;
        let etag = response.headers().get(ETAG).and_then(|etag| etag.to_str().ok()).unwrap_or_default();
        let etag = etag.trim_matches('"').to_owned();
        let mut archive = Vec::new();
        while let Some(chunk) = in_time(response.chunk()).await? {
            archive.extend_from_slice(&chunk);
            if archive.len() > POLICY_BUNDLE_BYTES_MAX {
                return Err(Error::TooLarge);
            }
        }
        Ok(PolicyBundle { etag, archive: archive.into() })
    }

    /// The archive of what `held` lacks, which is as of `position`, and `revision` where it is whole.
    pub async fn reconcile(
        &self,
        held: &Reconcile,
        revision: Option<Revision>,
        position: &Position,
    ) -> Result<Archive, Error> {
        let body = serde_json::to_vec(held).expect("a request has text keys only");
        let mut request = at(self.client.post(self.url("/reconcile")).body(body), position);
        if let Some(revision) = revision {
            request = request.header("last-event-id", revision.to_string());
        }
        self.send("a reconcile request", request).await.map(archive)
    }

    /// The stream from `held` on, which is as of `position`; none when the hub does not know it.
    pub async fn stream(&self, held: Revision, position: &Position) -> Result<Option<Stream>, Error> {
        let request = self.client.get(self.url("/stream")).header("last-event-id", held.to_string());
        match self.send("the stream", at(request, position)).await {
            Ok(response) => {
                Ok(Some(Stream { response, decoder: Decoder::new(FRAME_BYTES_MAX), heard: Instant::now() }))
            }
            Err(Error::Refused { status: StatusCode::GONE, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn url(&self, what: &str) -> Url {
        let path = format!("bundles/{}{what}", self.bundle);
        let mut url = self.current().join(&path).expect("names of our own are URL paths");
        if let Some(namespace) = &self.namespace {
            url.query_pairs_mut().append_pair("namespace", namespace);
        }
        url
    }

    async fn send(&self, what: &str, request: RequestBuilder) -> Result<Response, Error> {
        let response = tokio::time::timeout(HUB_ANSWER, request.send());
        let response = response.await.map_err(|_| Error::Silent(HUB_ANSWER))??;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let message = tokio::time::timeout(STREAM_SILENCE, body::words(response)).await.unwrap_or_default();
        if status == StatusCode::PRECONDITION_FAILED {
            return Err(Error::Lags(message));
        }
        Err(Error::Refused { what: what.to_owned(), status, message })
    }
}

/// A hub on the same network answers a connection within milliseconds.
const OPEN: Duration = Duration::from_secs(5);

/// What comes within the time that a hub may be silent.
async fn in_time<T>(answer: impl Future<Output = reqwest::Result<T>>) -> Result<T, Error> {
    let answer = tokio::time::timeout(STREAM_SILENCE, answer).await;
    Ok(answer.map_err(|_| Error::Silent(STREAM_SILENCE))??)
}

impl Stream {
    /// The reader was busy: silence counts from now.
    pub fn heard_now(&mut self) {
        self.heard = Instant::now();
    }

    /// Whether nothing that came waits to be told.
    pub fn is_drained(&self) -> bool {
        self.decoder.is_drained()
    }

    /// The next message. May be dropped half-way without losing any.
    pub async fn next(&mut self) -> Result<Message, Error> {
        loop {
            if let Some(message) = self.decoder.next()? {
                return Ok(message);
            }
            // From when the hub was heard, not from when this was called: callers come back before it ends.
            let chunk = tokio::time::timeout_at(self.heard + STREAM_SILENCE, self.response.chunk());
            match chunk.await.map_err(|_| Error::Silent(STREAM_SILENCE))?? {
                Some(chunk) => {
                    self.heard = Instant::now();
                    self.decoder.push(&chunk);
                }
                None => return Err(Error::Closed),
            }
        }
    }
}

/// Says what must not be taken back.
fn at(request: RequestBuilder, position: &Position) -> RequestBuilder {
    let text = position.to_string();
    let is_none = position.is_empty() || text.len() > POSITION_BYTES_MAX;
    if is_none { request } else { request.header(POSITION_HEADER, text) }
}

fn archive(response: Response) -> Archive {
    let position = response.headers().get(POSITION_HEADER).and_then(|position| position.to_str().ok());
    // A hub that says none keeps nobody from anything.
    let position = position.and_then(|position| position.parse().ok()).unwrap_or_default();
    Archive { position, chunks: chunks(response) }
}

/// Hands the body on, one chunk ahead.
fn chunks(response: Response) -> Chunks {
    let (out, chunks) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut body = response.bytes_stream().map_err(std::io::Error::other);
        loop {
            let next = tokio::time::timeout(STREAM_SILENCE, body.try_next()).await;
            let chunk = next.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into())).transpose();
            let Some(chunk) = chunk else { return };
            let failed = chunk.is_err();
            if out.send(chunk).await.is_err() || failed {
                return;
            }
        }
    });
    chunks
}
