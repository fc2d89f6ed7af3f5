//! Accepts connections and peeks at the first request. Stream requests go to the fan-out; all others, and those that
//! fail, are passed to axum unread.

use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::extract::Query;
use axum::http::Uri;
use tokio::io::{Interest, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::serve::connections::{self, Connections};
use crate::serve::stream::fanout::Fanout;
use crate::serve::stream::{Options, StreamRequest, header_text};
use crate::serve::{Duration, Hub};

/// Maximum request heads peeked concurrently.
pub(crate) const HEADS_MAX: usize = 512;
/// Maximum bytes of a stream's request head: 200 watches.
pub(crate) const HEAD_BYTES_MAX: usize = 16 << 10;
/// Maximum time to peek at a head. Slower connections go to axum.
pub(crate) const HEAD_MAX: Duration = Duration::from_millis(200);
/// Interval of peeking at an incomplete head.
pub(crate) const HEAD_LOOK: Duration = Duration::from_millis(5);

/// More than any agent, browser or proxy sends.
const HEADERS_MAX: usize = 64;
const STREAM_PREFIX: &[u8] = b"GET /bundles/";

const PROBE_PREFIXES: [&[u8]; 3] = [b"GET /livez", b"GET /readyz", b"GET /health"];

enum FirstRequest {
    Partial,
    Other,
    Probe,
    /// With the length of its head.
    Stream(StreamRequest, usize),
}

pub(in crate::serve) async fn open(
    listener: TcpListener,
    hub: &Hub,
    fanout: &Arc<Fanout>,
    connections: &Connections,
) {
    // Excess connections wait in the kernel's queue.
    let heads = Arc::new(Semaphore::new(HEADS_MAX));
    loop {
        let Ok(permit) = Arc::clone(&heads).acquire_owned().await else { return };
        let tcp = connections::accept(&listener).await;
        let (hub, fanout, connections) = (hub.clone(), Arc::clone(fanout), connections.clone());
        tokio::spawn(async move {
            if let Some((tcp, is_probe)) = classify(tcp, permit, &hub, &fanout).await {
                connections.admit(tcp, is_probe).await;
            }
        });
    }
}

/// Returns connections that axum must serve, and whether they are probes. Releases `permit` after the head.
async fn classify(
    tcp: TcpStream,
    permit: OwnedSemaphorePermit,
    hub: &Hub,
    fanout: &Arc<Fanout>,
) -> Option<(TcpStream, bool)> {
    let deadline = Instant::now() + HEAD_MAX;
    loop {
        let peeked = tokio::time::timeout_at(deadline, std::future::poll_fn(|cx| peek(&tcp, cx))).await;
        let Ok(Ok((request, length))) = peeked else { return Some((tcp, false)) };
        match request {
            FirstRequest::Partial if length > 0 && length < HEAD_BYTES_MAX && Instant::now() < deadline => {
                // Peeked bytes leave the socket readable, so more bytes cannot be awaited.
                tokio::time::sleep(HEAD_LOOK).await;
            }
            FirstRequest::Partial | FirstRequest::Other => return Some((tcp, false)),
            FirstRequest::Probe => return Some((tcp, true)),
            FirstRequest::Stream(request, length) => {
                // Opening may encode a large frame.
                drop(permit);
                let opened = tokio::select! {
                    biased;
                    () = client_closed(&tcp) => return None,
                    opened = request.open(hub) => opened,
                };
                let Ok((bundle, revision)) = opened else { return Some((tcp, false)) };
                if discard(&tcp, length) {
                    fanout.join(&bundle, tcp, revision);
                }
                return None;
            }
        }
    }
}

/// The buffer is on the stack: 10,000 connections need no heap.
fn peek(tcp: &TcpStream, cx: &mut Context<'_>) -> Poll<std::io::Result<(FirstRequest, usize)>> {
    let mut bytes = [0; HEAD_BYTES_MAX];
    let mut bytes = ReadBuf::new(&mut bytes);
    ready!(tcp.poll_peek(cx, &mut bytes))?;
    Poll::Ready(Ok((parse(bytes.filled()), bytes.filled().len())))
}

/// Waits until the client closes its half. Of tokio's interests only `PRIORITY` ignores the unread head.
async fn client_closed(tcp: &TcpStream) {
    _ = tcp.ready(Interest::PRIORITY).await;
}

/// Reads the peeked head.
fn discard(tcp: &TcpStream, mut length: usize) -> bool {
    let mut buffer = [0; 1 << 10];
    while length > 0 {
        let wanted = length.min(buffer.len());
        match tcp.try_read(&mut buffer[..wanted]) {
            Ok(read) if read > 0 => length -= read,
            _ => return false,
        }
    }
    true
}

fn parse(bytes: &[u8]) -> FirstRequest {
    if PROBE_PREFIXES.iter().any(|probe| bytes.starts_with(probe)) {
        return FirstRequest::Probe;
    }
    let known = bytes.len().min(STREAM_PREFIX.len());
    if bytes[..known] != STREAM_PREFIX[..known] {
        return FirstRequest::Other;
    }
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    let length = match request.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return FirstRequest::Partial,
        Err(_) => return FirstRequest::Other,
    };
    // axum rejects a body or a pipelined request.
    let has_body = |header: &&httparse::Header| {
        ["content-length", "transfer-encoding", "upgrade", "expect"]
            .iter()
            .any(|name| header.name.eq_ignore_ascii_case(name))
    };
    if length != bytes.len()
        || request.version != Some(1)
        || request.headers.iter().any(|header| has_body(&header))
    {
        return FirstRequest::Other;
    }
    let stream_request = || {
        let uri: Uri = request.path?.parse().ok()?;
        let name = uri.path().strip_prefix("/bundles/")?.strip_suffix("/stream")?;
        let Query(options) = Query::<Options>::try_from_uri(&uri).ok()?;
        let headers = request.headers.iter();
        let header = |name: &str| {
            let mut headers = headers.clone();
            Some(header_text(headers.find(|header| header.name.eq_ignore_ascii_case(name))?.value))
        };
        Some(StreamRequest::new(name, options, header))
    };
    stream_request().map_or(FirstRequest::Other, |request| FirstRequest::Stream(request, length))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;
    use std::time::Duration;

    use tokio::io::AsyncWriteExt as _;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::bundle::Bundle;
    use crate::bundle::registry::BundleRegistry;
    use crate::health::Health;

    #[tokio::test]
    async fn disconnected_client_causes_no_encoding() {
        let (bundle, revision) = Bundle::far_from_its_first();
        let bundles = Arc::new(BundleRegistry::default());
        bundles.serve(Arc::clone(&bundle));
        let stop = CancellationToken::new();
        let hub = Hub::new(bundles, String::new(), Health::default(), Vec::new(), stop);
        let fanout = Fanout::new(hub.clone());
        let _others = bundle.budget.large_encodes.acquire().await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let request = format!("GET /bundles/main/stream HTTP/1.1\r\nlast-event-id: {revision}\r\n\r\n");
        client.write_all(request.as_bytes()).await.unwrap();
        let (tcp, _) = listener.accept().await.unwrap();
        let heads = Arc::new(Semaphore::new(1));
        let permit = Arc::clone(&heads).acquire_owned().await.unwrap();
        let opening = classify(tcp, permit, &hub, &fanout);
        let disconnecting = async {
            // The head was read.
            _ = heads.acquire().await.unwrap();
            drop(client);
        };
        let joined = async { tokio::join!(opening, disconnecting) };
        let (connection, ()) =
            tokio::time::timeout(Duration::from_secs(10), joined).await.expect("opening ends");
        assert!(connection.is_none());
        assert_eq!(bundle.counters.frame_encodes.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn only_complete_stream_requests_are_accepted() {
        for (text, expected) in [
            ("", "partial"),
            ("GET /bun", "partial"),
            ("GET /bundles/main/stream HTTP/1.1\r\nhost: x\r\n", "partial"),
            ("GET /bundles/main/stream HTTP/1.1\r\nhost: x\r\n\r\n", "main None None"),
            (
                "GET /bundles/main/stream?namespace=a HTTP/1.1\r\nLast-Event-ID: 7\r\n\r\n",
                "main Some(\"a\") Some(\"7\")",
            ),
            ("GET /bundles/main/stream?since=7 HTTP/1.1\r\n\r\n", "main None Some(\"7\")"),
            ("GET /bundles/main/stream HTTP/1.0\r\n\r\n", "other"),
            ("GET /bundles/main/stream HTTP/1.1\r\ncontent-length: 1\r\n\r\nx", "other"),
            ("GET /bundles/main/stream HTTP/1.1\r\n\r\nGET /", "other"),
            ("GET /bundles/main HTTP/1.1\r\n\r\n", "other"),
            ("GET / HTTP/1.1\r\n", "other"),
            ("GET /readyz?bundle=main HTTP/1.1\r\n", "probe"),
            ("POST /bundles/main/stream HTTP/1.1\r\n\r\n", "other"),
            ("GET /bundles/\u{1}", "other"),
        ] {
            let found = match parse(text.as_bytes()) {
                FirstRequest::Partial => "partial".to_owned(),
                FirstRequest::Other => "other".to_owned(),
                FirstRequest::Probe => "probe".to_owned(),
                FirstRequest::Stream(request, length) => {
                    assert_eq!(length, text.len());
                    request.to_string()
                }
            };
            assert_eq!(found, expected, "{text}");
        }
    }
}
