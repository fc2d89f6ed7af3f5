//! The front door: looks at the head of each connection's first request. A stream goes to the fan-out, head read and
//! all; everything else, and a stream that cannot be opened, goes to axum untouched. Here is also where TLS would end.

use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::extract::Query;
use axum::http::Uri;
use tokio::io::{Interest, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::Hub;
use super::connections::{self, Connections};
use super::fanout::Fanout;
use super::stream::{Asked, Options, text};
use crate::config::{HEAD_BYTES_MAX, HEAD_LOOK, HEAD_MAX, HEADS_MAX};

/// Headers of a request for a stream: more than any agent, browser or proxy sends.
const HEADERS_MAX: usize = 64;
/// How a request for a stream begins.
const STREAMS: &[u8] = b"GET /bundles/";

/// How a request begins that asks whether the hub lives.
const PROBES: [&[u8]; 3] = [b"GET /livez", b"GET /readyz", b"GET /health"];

/// What the beginning of a request is.
enum Head {
    /// Not enough of it.
    Partial,
    /// Axum's.
    Other,
    /// Axum's, also where other connections find no room.
    Probe,
    /// For a stream, with its length.
    Stream(Asked, usize),
}

/// Accepts connections until it is dropped.
pub(super) async fn open(listener: TcpListener, hub: &Hub, fanout: &Arc<Fanout>, connections: &Connections) {
    // A storm waits in the kernel's queue, not here.
    let heads = Arc::new(Semaphore::new(HEADS_MAX));
    loop {
        let Ok(looking) = Arc::clone(&heads).acquire_owned().await else { return };
        let (tcp, peer) = connections::accept(&listener).await;
        let (hub, fanout, connections) = (hub.clone(), Arc::clone(fanout), connections.clone());
        tokio::spawn(async move {
            if let Some((tcp, is_probe)) = look(tcp, looking, &hub, &fanout).await {
                connections.admit(tcp, peer, is_probe).await;
            }
        });
    }
}

/// Hands a stream to the fan-out, and gives back everything else, and whether it is a probe.
/// Another head is looked at once this one was read.
async fn look(
    tcp: TcpStream,
    turn: OwnedSemaphorePermit,
    hub: &Hub,
    fanout: &Arc<Fanout>,
) -> Option<(TcpStream, bool)> {
    let until = Instant::now() + HEAD_MAX;
    loop {
        let peeked = tokio::time::timeout_at(until, std::future::poll_fn(|cx| peek(&tcp, cx))).await;
        let Ok(Ok((head, length))) = peeked else { return Some((tcp, false)) };
        match head {
            Head::Partial if length > 0 && length < HEAD_BYTES_MAX && Instant::now() < until => {
                // What was peeked at stays readable: there is no waiting for more of it.
                tokio::time::sleep(HEAD_LOOK).await;
            }
            Head::Partial | Head::Other => return Some((tcp, false)),
            Head::Probe => return Some((tcp, true)),
            Head::Stream(asked, length) => {
                // Opening may wait for long.
                drop(turn);
                let opened = tokio::select! {
                    biased;
                    () = hung_up(&tcp) => return None,
                    opened = asked.open(hub) => opened,
                };
                let Ok((bundle, held)) = opened else { return Some((tcp, false)) };
                if read_head(&tcp, length) {
                    fanout.join(&bundle, tcp, held);
                }
                return None;
            }
        }
    }
}

/// What the bytes are that can be read, and how many there are. They are looked at on the stack: 10,000 connections at
/// once need no memory for it.
fn peek(tcp: &TcpStream, cx: &mut Context<'_>) -> Poll<std::io::Result<(Head, usize)>> {
    let mut bytes = [0; HEAD_BYTES_MAX];
    let mut bytes = ReadBuf::new(&mut bytes);
    ready!(tcp.poll_peek(cx, &mut bytes))?;
    Poll::Ready(Ok((head(bytes.filled()), bytes.filled().len())))
}

/// Waits until the client ended its half. The unread head keeps the socket readable: of tokio's interests this one alone
/// is ready at the end and not at bytes.
async fn hung_up(tcp: &TcpStream) {
    _ = tcp.ready(Interest::PRIORITY).await;
}

/// Reads the head, which was peeked at.
fn read_head(tcp: &TcpStream, mut length: usize) -> bool {
    let mut piece = [0; 1 << 10];
    while length > 0 {
        let wanted = length.min(piece.len());
        match tcp.try_read(&mut piece[..wanted]) {
            Ok(read) if read > 0 => length -= read,
            _ => return false,
        }
    }
    true
}

fn head(bytes: &[u8]) -> Head {
    if PROBES.iter().any(|probe| bytes.starts_with(probe)) {
        return Head::Probe;
    }
    let known = bytes.len().min(STREAMS.len());
    if bytes[..known] != STREAMS[..known] {
        return Head::Other;
    }
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    let length = match request.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Head::Partial,
        Err(_) => return Head::Other,
    };
    // What comes behind it, a body or another request, is axum's to refuse.
    let has_body = |header: &&httparse::Header| {
        ["content-length", "transfer-encoding", "upgrade", "expect"]
            .iter()
            .any(|name| header.name.eq_ignore_ascii_case(name))
    };
    if length != bytes.len()
        || request.version != Some(1)
        || request.headers.iter().any(|header| has_body(&header))
    {
        return Head::Other;
    }
    let asked = || {
        let uri: Uri = request.path?.parse().ok()?;
        let name = uri.path().strip_prefix("/bundles/")?.strip_suffix("/stream")?;
        let Query(options) = Query::<Options>::try_from_uri(&uri).ok()?;
        let headers = request.headers.iter();
        let header = |name: &str| {
            let mut headers = headers.clone();
            Some(text(headers.find(|header| header.name.eq_ignore_ascii_case(name))?.value))
        };
        Some(Asked::new(name, options, header))
    };
    asked().map_or(Head::Other, |asked| Head::Stream(asked, length))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;
    use std::time::Duration;

    use tokio::io::AsyncWriteExt as _;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::bundle::Bundle;
    use crate::bundles::Bundles;
    use crate::readiness::Readiness;

    #[tokio::test]
    async fn a_stream_whose_client_left_takes_no_turn() {
        let (bundle, held) = Bundle::far_from_its_first();
        let bundles = Arc::new(Bundles::default());
        bundles.serve(Arc::clone(&bundle));
        let stop = CancellationToken::new();
        let hub = Hub::new(bundles, String::new(), Readiness::default(), Vec::new(), stop);
        let fanout = Fanout::new(hub.clone());
        let _others = bundle.budget.large_encodes.acquire().await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let request = format!("GET /bundles/main/stream HTTP/1.1\r\nlast-event-id: {held}\r\n\r\n");
        client.write_all(request.as_bytes()).await.unwrap();
        let (tcp, _) = listener.accept().await.unwrap();
        let heads = Arc::new(Semaphore::new(1));
        let turn = Arc::clone(&heads).acquire_owned().await.unwrap();
        let opening = look(tcp, turn, &hub, &fanout);
        let leaving = async {
            // Its head was read by then.
            _ = heads.acquire().await.unwrap();
            drop(client);
        };
        let both = async { tokio::join!(opening, leaving) };
        let (left, ()) = tokio::time::timeout(Duration::from_secs(10), both).await.expect("it waits no more");
        assert!(left.is_none());
        assert_eq!(bundle.counters.frame_encodes.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn only_whole_requests_for_streams_are_taken() {
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
            let found = match head(text.as_bytes()) {
                Head::Partial => "partial".to_owned(),
                Head::Other => "other".to_owned(),
                Head::Probe => "probe".to_owned(),
                Head::Stream(asked, length) => {
                    assert_eq!(length, text.len());
                    asked.to_string()
                }
            };
            assert_eq!(found, expected, "{text}");
        }
    }
}
