//! Thousands of readers of a stream in one process, from many loopback addresses: each knows what it holds and takes
//! only what leads on from there.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use opa_hub_proto::sse::{Decoder, Message};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpSocket;
use tokio::sync::{Semaphore, mpsc};

/// Readers from one loopback address: well below the ports that it has.
const FROM_ONE_ADDRESS: usize = 4000;
/// Connections that are opened at a time.
const OPENING: usize = 256;
/// Bytes of one event.
const EVENT_BYTES_MAX: usize = 64 << 20;
/// How long a round may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// One event at one reader.
pub(super) struct Arrival {
    at: Instant,
    id: String,
}

/// See the module's text.
pub(super) struct Swarm {
    arrivals: mpsc::UnboundedReceiver<Arrival>,
    readers: usize,
}

/// When one change was at all readers: from its first arrival anywhere, sorted.
pub(super) struct Round {
    /// One for each reader.
    pub(super) delays: Vec<Duration>,
}

impl Swarm {
    /// Opens a stream for each reader with this request, and waits until all are open.
    pub(super) async fn open(server: SocketAddr, request: String, readers: usize) -> anyhow::Result<Self> {
        let (out, arrivals) = mpsc::unbounded_channel();
        let (opening, request) = (Arc::new(Semaphore::new(OPENING)), Arc::new(request));
        let mut opened = tokio::task::JoinSet::new();
        for reader in 0..readers {
            let (opening, request, out) = (Arc::clone(&opening), Arc::clone(&request), out.clone());
            opened.spawn(async move {
                let _turn = opening.acquire().await;
                let host = u8::try_from(2 + reader / FROM_ONE_ADDRESS).unwrap_or(u8::MAX);
                let socket = TcpSocket::new_v4()?;
                socket.bind((Ipv4Addr::new(127, 0, 0, host), 0).into())?;
                let mut tcp = socket.connect(server).await?;
                tcp.write_all(request.as_bytes()).await?;
                tokio::spawn(async move {
                    // The end of a stream shows as a round that is not complete.
                    _ = read(tcp, &out).await;
                });
                anyhow::Ok(())
            });
        }
        while let Some(opened) = opened.join_next().await {
            opened?.context("a reader cannot connect")?;
        }
        Ok(Self { arrivals, readers })
    }

    /// Waits until every reader has one event more, the same one.
    pub(super) async fn round(&mut self) -> anyhow::Result<Round> {
        let mut times = Vec::with_capacity(self.readers);
        let mut id = None;
        while times.len() < self.readers {
            let arrival = tokio::time::timeout(PATIENCE, self.arrivals.recv()).await;
            let arrival =
                arrival.with_context(|| format!("{} of {} readers have it", times.len(), self.readers))?;
            let arrival = arrival.context("every stream ended")?;
            let id = id.get_or_insert_with(|| arrival.id.clone());
            ensure!(*id == arrival.id, "a reader was given {} while others were given {id}", arrival.id);
            times.push(arrival.at);
        }
        times.sort_unstable();
        let first = times[0];
        Ok(Round { delays: times.into_iter().map(|at| at - first).collect() })
    }
}

async fn read(mut tcp: tokio::net::TcpStream, out: &mpsc::UnboundedSender<Arrival>) -> anyhow::Result<()> {
    let mut decoder = Decoder::new(EVENT_BYTES_MAX);
    let mut bytes = [0; 1024];
    let mut in_head = true;
    loop {
        let length = tcp.read(&mut bytes).await?;
        let at = Instant::now();
        ensure!(length > 0, "the stream ended");
        let mut body = &bytes[..length];
        if in_head {
            let Some(end) = body.windows(4).position(|four| four == b"\r\n\r\n") else { continue };
            ensure!(body.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(body));
            (body, in_head) = (&body[end + 4..], false);
        }
        decoder.push(body);
        while !decoder.is_drained() {
            match decoder.next()? {
                Some(Message::Event { id, .. }) => out.send(Arrival { at, id })?,
                Some(Message::Comment(_)) => {}
                None => break,
            }
        }
    }
}
