//! Streams of a hub: stalled clients, fragmented requests, shutdown.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use opa_hub_loadtest::eventually::{equal, eventually};
use opa_hub_loadtest::lab::Hub;
use opa_hub_proto::sse::{Decoder, Message};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

use crate::world::write_manifest;

/// Approximate pod size, in bytes: larger than socket buffers.
const POD_BYTES: usize = 200 << 10;

fn put(manifests: &Path, round: usize) -> anyhow::Result<()> {
    let filler = format!("{round:06}").repeat(POD_BYTES / 6);
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "p", "namespace": "a" }, "spec": { "filler": filler },
    });
    write_manifest(manifests, "pod.json", &pod)
}

/// A stream's client.
struct Reader {
    tcp: TcpStream,
    decoder: Decoder,
    in_head: bool,
    last_word: String,
}

impl Reader {
    /// Sends the request in pieces, with a small receive buffer.
    async fn open(hub: &Hub, pieces: &[&str]) -> anyhow::Result<Self> {
        let socket = TcpSocket::new_v4()?;
        socket.set_recv_buffer_size(16 << 10)?;
        let mut tcp = socket.connect(hub.url.trim_start_matches("http://").parse()?).await?;
        for piece in pieces {
            tcp.write_all(piece.as_bytes()).await?;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(Self { tcp, decoder: Decoder::new(64 << 20), in_head: true, last_word: String::new() })
    }

    /// Next event id; `None` at the end.
    async fn next(&mut self) -> anyhow::Result<Option<String>> {
        loop {
            if !self.in_head
                && let Some(message) = self.decoder.next()?
            {
                match message {
                    Message::Event { id, .. } => return Ok(Some(id)),
                    Message::Comment(word) => {
                        self.last_word = word;
                        continue;
                    }
                }
            }
            if self.read().await? == 0 {
                return Ok(None);
            }
        }
    }

    /// Number of bytes read; zero at the end.
    async fn read(&mut self) -> anyhow::Result<usize> {
        let mut bytes = vec![0; 16 << 10];
        let read = tokio::time::timeout(Duration::from_secs(20), self.tcp.read(&mut bytes));
        let length = read.await.context("stream without heartbeats")??;
        let mut body = &bytes[..length];
        if self.in_head && length > 0 {
            ensure!(body.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(body));
            let end =
                body.windows(4).position(|four| four == b"\r\n\r\n").context("incomplete response head")?;
            (body, self.in_head) = (&body[end + 4..], false);
        }
        self.decoder.push(body);
        Ok(length)
    }

    /// Reads up to `revision`. Returns the number of events.
    async fn reach(&mut self, revision: &str) -> anyhow::Result<usize> {
        let mut events = 1;
        while self.next().await?.context("the stream ended")? != revision {
            events += 1;
        }
        Ok(events)
    }
}

async fn revision(hub: &Hub) -> anyhow::Result<String> {
    let bundle = hub.json("/v1/bundles/main").await?;
    bundle["revision"].as_str().map(ToOwned::to_owned).context("a revision")
}

const REQUEST: &str = "GET /bundles/main/stream HTTP/1.1\r\nhost: hub\r\n\r\n";

#[tokio::test]
async fn stalled_client_does_not_slow_others_and_catches_up() -> anyhow::Result<()> {
    const ROUNDS: usize = 40;
    let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
    put(manifests.path(), 0)?;
    let folder = manifests.path().display().to_string();
    let mut hub = Hub::start(work.path(), &["--manifests", &folder, "--replicate=v1/pods"]).await?;
    let mut stalled = Reader::open(&hub, &[REQUEST]).await?;
    // The listener waits for a fragmented request.
    let mut healthy = Reader::open(&hub, &["GET /bun", &REQUEST[8..30], &REQUEST[30..]]).await?;
    eventually("both streams are open", async || {
        equal(&hub.metric("opa_hub_agents").await.map_err(|error| error.to_string())?, &2)
    })
    .await?;
    let mut current = revision(&hub).await?;
    for round in 1..=ROUNDS {
        put(manifests.path(), round)?;
        let next = healthy.next().await?.context("the stream ended")?;
        ensure!(next != current, "event without a change");
        current = next;
    }
    assert_eq!(revision(&hub).await?, current);
    // One partial frame, and one for all missed changes.
    let events = stalled.reach(&current).await?;
    assert!(events <= 3, "{events} events of {ROUNDS}");
    assert_eq!(hub.metric("opa_hub_agents").await?, 2, "both streams stay open");
    let encodes = hub.metric("opa_hub_frame_encodes_total").await?;
    assert!(encodes <= ROUNDS as u64 + 2, "{encodes} encodes for {ROUNDS} changes");

    // A dropped connection is detected.
    drop(stalled);
    eventually("one stream is left", async || {
        equal(&hub.metric("opa_hub_agents").await.map_err(|error| error.to_string())?, &1)
    })
    .await?;
    // Shutdown ends the streams, then the hub.
    let started = Instant::now();
    // A partial frame is completed before the go-away comment.
    put(manifests.path(), ROUNDS + 1)?;
    let mut begun = 0;
    while begun < POD_BYTES / 20 {
        let length = healthy.read().await?;
        ensure!(length > 0, "the stream ended");
        begun += length;
    }
    let current = revision(&hub).await?;
    let process = hub.process.as_mut().context("the hub runs")?;
    process.terminate()?;
    assert_eq!(healthy.next().await?, Some(current));
    assert_eq!((healthy.next().await?, healthy.last_word.as_str()), (None, "go"));
    hub.process.as_mut().context("the hub runs")?.ended().await?;
    assert!(started.elapsed() < Duration::from_secs(6), "{:?}", started.elapsed());
    Ok(())
}
