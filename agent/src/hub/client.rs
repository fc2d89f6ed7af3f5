//! Connections to the hub: archives, reconcile, the stream. Several hubs are as good as each other; a failure moves
//! on to the next after a pause drawn from nothing up to a doubling bound, so that many agents come back spread out.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
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
use tokio_util::task::AbortOnDropHandle;

use crate::archive::Chunks;
use crate::authorities::authorities;
use crate::body;
use crate::config::{
    BODY_BYTES_MIN, BODY_WINDOW, EVENT_MAX, FRESH_ANSWER, HUB_ANSWER, POLICY_BUNDLE_BYTES_MAX, RETRY_FIRST,
    RETRY_MAX, STREAM_SILENCE,
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
    /// A body that comes, but hardly.
    #[error("the hub sent less than {BODY_BYTES_MIN} bytes in {} s; another one is asked", BODY_WINDOW.as_secs())]
    Trickles,
    /// Announcements of an event, and no event.
    #[error("the hub announced an event and sent none for {} s; another one is asked", .0.as_secs())]
    Waits(Duration),
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

impl Error {
    /// Whether the hub would refuse the same request again: it takes no request of this kind, or this one is too large.
    pub fn is_final(&self) -> bool {
        let passes = [
            StatusCode::NOT_FOUND,
            StatusCode::REQUEST_TIMEOUT,
            StatusCode::GONE,
            StatusCode::TOO_MANY_REQUESTS,
        ];
        matches!(self, Self::Refused { status, .. } if status.is_client_error() && !passes.contains(status))
    }
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
    /// The task that receives it, which ends with this.
    pub download: AbortOnDropHandle<()>,
}

/// A stream that is open.
pub struct Stream {
    response: Response,
    decoder: Decoder,
    heard: Instant,
    /// Time of the first bytes of an event that is not complete.
    begun: Option<Instant>,
}

/// A body that is neither silent nor slow.
struct Body {
    response: Response,
    /// Time that the current window was waited for.
    waited: Duration,
    /// Bytes that came in it.
    bytes: usize,
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
    pub fn move_on(&mut self) {
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

    /// Waits, longer after each failure.
    pub async fn pause(&mut self) {
        let pause = self.pause;
        // A pause may be dropped half-way.
        self.pause = (pause * 2).min(RETRY_MAX);
        tokio::time::sleep(pause.mul_f64(fastrand::f64())).await;
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
        let response = self.send("the policies", request).await?;
        let etag = response.headers().get(ETAG).and_then(|etag| etag.to_str().ok()).unwrap_or_default();
        let etag = etag.trim_matches('"').to_owned();
        let mut archive = Vec::new();
        let mut body = Body::new(response);
        while let Some(chunk) = body.chunk().await? {
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
            Ok(response) => Ok(Some(Stream::new(response))),
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

impl Body {
    fn new(response: Response) -> Self {
        Self { response, waited: Duration::ZERO, bytes: 0 }
    }

    async fn chunk(&mut self) -> Result<Option<Bytes>, Error> {
        let asked = Instant::now();
        let chunk = tokio::time::timeout(STREAM_SILENCE, self.response.chunk()).await;
        let chunk = chunk.map_err(|_| Error::Silent(STREAM_SILENCE))??;
        self.waited += asked.elapsed();
        self.bytes += chunk.as_ref().map_or(0, Bytes::len);
        if self.waited >= BODY_WINDOW {
            if chunk.is_some() && self.bytes < BODY_BYTES_MIN {
                return Err(Error::Trickles);
            }
            (self.waited, self.bytes) = (Duration::ZERO, 0);
        }
        Ok(chunk)
    }
}

impl Stream {
    fn new(response: Response) -> Self {
        let decoder = Decoder::new(FRAME_BYTES_MAX);
        Self { response, decoder, heard: Instant::now(), begun: None }
    }

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
                self.begun = None;
                return Ok(message);
            }
            // From when the hub was heard, not from when this was called: callers come back before it ends.
            let silent = self.heard + STREAM_SILENCE;
            let until = self.begun.map_or(silent, |begun| silent.min(begun + EVENT_MAX));
            let chunk = tokio::time::timeout_at(until, self.response.chunk()).await;
            let late =
                || if until < silent { Error::Waits(EVENT_MAX) } else { Error::Silent(STREAM_SILENCE) };
            match chunk.map_err(|_| late())?? {
                Some(chunk) => {
                    self.heard = Instant::now();
                    self.begun.get_or_insert(self.heard);
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
    // Handed on one chunk ahead.
    let (out, chunks) = mpsc::channel(1);
    let download = tokio::spawn(async move {
        let mut body = Body::new(response);
        while let Some(chunk) = body.chunk().await.map_err(std::io::Error::other).transpose() {
            let failed = chunk.is_err();
            if out.send(chunk).await.is_err() || failed {
                return;
            }
        }
    });
    Archive { chunks, position, download: AbortOnDropHandle::new(download) }
}

#[cfg(test)]
mod tests {
    use futures::stream;

    use super::*;

    /// An answer that sends `chunk` after each `pause`.
    fn answer(chunk: impl Into<Bytes>, pause: Duration) -> Response {
        let chunk = chunk.into();
        let chunks = stream::unfold(chunk, move |chunk| async move {
            tokio::time::sleep(pause).await;
            Some((Ok::<_, std::io::Error>(chunk.clone()), chunk))
        });
        axum::http::Response::new(reqwest::Body::wrap_stream(chunks)).into()
    }

    /// A14: bytes that come now and then keep nobody.
    #[tokio::test(start_paused = true)]
    async fn a_body_that_trickles_ends() {
        let mut body = Body::new(answer(&b"x"[..], Duration::from_secs(14)));
        assert!(matches!(body.chunk().await, Err(Error::Trickles)));
        let mut body = Body::new(answer(vec![0; BODY_BYTES_MIN], Duration::from_secs(9)));
        for _ in 0..20 {
            // The reader may take its time.
            tokio::time::sleep(BODY_WINDOW * 2).await;
            assert!(body.chunk().await.unwrap().is_some());
        }
        let Archive { mut chunks, download, .. } = archive(answer(&b"x"[..], Duration::from_secs(3)));
        let error = loop {
            match chunks.recv().await.unwrap() {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        assert!(error.to_string().contains("another one is asked"), "{error}");
        drop(download);
    }

    /// A14: so does an event without an end.
    #[tokio::test(start_paused = true)]
    async fn an_event_that_trickles_ends_the_stream() {
        let mut stream = Stream::new(answer(&b"data: x\n"[..], Duration::from_secs(4)));
        let opened = Instant::now();
        assert!(matches!(stream.next().await, Err(Error::Waits(_))));
        assert!(opened.elapsed() <= EVENT_MAX + STREAM_SILENCE);
        let mut stream = Stream::new(answer(&b": here\n"[..], Duration::from_secs(14)));
        for _ in 0..20 {
            assert_eq!(stream.next().await.unwrap(), Message::Comment("here".into()));
        }
    }

    /// A10.
    #[test]
    fn final_refusals_are_told_from_those_that_pass() {
        for (status, expected) in [
            (400, true),
            (401, true),
            (403, true),
            (404, false),
            (408, false),
            (409, true),
            (410, false),
            (413, true),
            (422, true),
            (429, false),
            (500, false),
            (503, false),
        ] {
            let status = StatusCode::from_u16(status).unwrap();
            let error = Error::Refused { what: String::new(), status, message: String::new() };
            assert_eq!(error.is_final(), expected, "{status}");
        }
    }
}
