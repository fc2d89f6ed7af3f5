//! Many streams on one hub: readers that do not read, requests in pieces, a hub that stops.

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

/// A pod of about this many bytes, larger than what the kernel holds of a stream.
const POD_BYTES: usize = 200 << 10;

fn put(manifests: &Path, round: usize) -> anyhow::Result<()> {
    let filler = format!("{round:06}").repeat(POD_BYTES / 6);
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "p", "namespace": "a" }, "spec": { "filler": filler },
    });
    write_manifest(manifests, "pod.json", &pod)
}

/// A reader of a stream.
struct Reader {
    tcp: TcpStream,
    decoder: Decoder,
    in_head: bool,
    last_word: String,
}

impl Reader {
    /// Asks in these pieces, and has little room for what comes.
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

    /// The id of the next event; none at the end.
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

    /// Reads some bytes, and says how many; none at the end.
    async fn read(&mut self) -> anyhow::Result<usize> {
        let mut bytes = vec![0; 16 << 10];
        let read = tokio::time::timeout(Duration::from_secs(20), self.tcp.read(&mut bytes));
        let length = read.await.context("a stream that says nothing, not even that it is there")??;
        let mut body = &bytes[..length];
        if self.in_head && length > 0 {
            ensure!(body.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(body));
            let end =
                body.windows(4).position(|four| four == b"\r\n\r\n").context("the head in one piece")?;
            (body, self.in_head) = (&body[end + 4..], false);
        }
        self.decoder.push(body);
        Ok(length)
    }

    /// Reads until it is at `revision`, and says how many events that took.
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
async fn who_does_not_read_costs_nobody_and_loses_nothing() -> anyhow::Result<()> {
    const ROUNDS: usize = 40;
    let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
    put(manifests.path(), 0)?;
    let folder = manifests.path().display().to_string();
    let mut hub = Hub::start(work.path(), &["--manifests", &folder, "--replicate=v1/pods"]).await?;
    let mut stalled = Reader::open(&hub, &[REQUEST]).await?;
    // Its head comes in pieces: the front door waits for the rest.
    let mut healthy = Reader::open(&hub, &["GET /bun", &REQUEST[8..30], &REQUEST[30..]]).await?;
    eventually("both are open", async || {
        equal(&hub.metric("opa_hub_agents").await.map_err(|error| error.to_string())?, &2)
    })
    .await?;
    let mut held = revision(&hub).await?;
    for round in 1..=ROUNDS {
        put(manifests.path(), round)?;
        let next = healthy.next().await?.context("the stream ended")?;
        ensure!(next != held, "an event that changes nothing");
        held = next;
    }
    assert_eq!(revision(&hub).await?, held);
    // One frame that was under way, and one for all that it missed.
    let events = stalled.reach(&held).await?;
    assert!(events <= 3, "{events} events of {ROUNDS}");
    assert_eq!(hub.metric("opa_hub_agents").await?, 2, "nobody was cut off");
    let encodes = hub.metric("opa_hub_frame_encodes_total").await?;
    assert!(encodes <= ROUNDS as u64 + 2, "{encodes} encodes for {ROUNDS} changes");

    // One that goes without a word is found.
    drop(stalled);
    eventually("one is left", async || {
        equal(&hub.metric("opa_hub_agents").await.map_err(|error| error.to_string())?, &1)
    })
    .await?;
    // A hub that is told to stop ends its streams, and then itself.
    let started = Instant::now();
    // Half of a frame is under way to one that reads: it gets the other half, then the word to go.
    put(manifests.path(), ROUNDS + 1)?;
    let mut begun = 0;
    while begun < POD_BYTES / 20 {
        let length = healthy.read().await?;
        ensure!(length > 0, "the stream ended");
        begun += length;
    }
    let held = revision(&hub).await?;
    let process = hub.process.as_mut().context("the hub runs")?;
    process.terminate()?;
    assert_eq!(healthy.next().await?, Some(held));
    assert_eq!((healthy.next().await?, healthy.last_word.as_str()), (None, "go"));
    hub.process.as_mut().context("the hub runs")?.ended().await?;
    assert!(started.elapsed() < Duration::from_secs(6), "{:?}", started.elapsed());
    Ok(())
}
