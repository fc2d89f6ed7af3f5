//! A simulated agent, with the protocol of a real one.

use std::cell::RefCell;
use std::fmt::Write as _;
use std::io::ErrorKind;
use std::net::Ipv4Addr;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use opa_hub_proto::frame::{DELTA_EVENT, Delta, FRAME_BYTES_MAX};
use opa_hub_proto::head::DataHead;
use opa_hub_proto::position::{Judge, POSITION_HEADER, Position};
use opa_hub_proto::reconcile::Reconcile;
use opa_hub_proto::revision::Revision;
use opa_hub_proto::sse::{Decoder, Message, Word};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

use super::content::{Digests, apply_archive, digest, dir_mut, newest_change, newest_in_archive};
use super::{Pace, Shared};

/// An address has 28,000 ports, reserved for a minute after use.
const AGENTS_PER_ADDRESS: usize = 500;
/// Same backoff as real agents.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// A hub is considered dead after this time.
const HUB_TIMEOUT: Duration = Duration::from_secs(15);
/// Bytes and interval of reads.
const TRICKLE: (usize, Duration) = (64, Duration::from_millis(100));
/// Receive buffer of stalled and trickling agents.
const RECEIVE_BUFFER_BYTES: u32 = 4096;
/// Fits a frame with a pod of 10 KB.
const READ_BYTES_MAX: usize = 64 * 1024;

thread_local! {
    /// Shared by a thread's agents, so that each is cheap.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_BYTES_MAX]);
}

pub(super) struct Agent {
    shared: Arc<Shared>,
    index: usize,
    pace: Pace,
    hub: usize,
    revision: Revision,
    data: DataHead,
    position: Position,
}

enum StreamEnd {
    GoAway,
    Failed,
    /// The stream can be opened.
    Reconciled,
}

struct Response {
    status: u16,
    position: Position,
    tcp: TcpStream,
    /// Bytes received with the headers.
    body: Vec<u8>,
}

impl Agent {
    pub(super) async fn run(shared: Arc<Shared>, index: usize, pace: Pace) -> anyhow::Result<()> {
        let start = Arc::clone(&shared.start);
        let (revision, data, position) = (start.revision, start.data.clone(), start.position.clone());
        let mut agent = Self { shared, index, pace, hub: 0, revision, data, position };
        let mut pause = BACKOFF_MIN;
        loop {
            match agent.session(&mut pause).await? {
                StreamEnd::Reconciled => {}
                StreamEnd::GoAway => agent.hub = (agent.hub + 1) % agent.shared.hubs.len(),
                StreamEnd::Failed => {
                    agent.hub = (agent.hub + 1) % agent.shared.hubs.len();
                    tokio::time::sleep(pause.mul_f64(fastrand::f64())).await;
                    pause = (pause * 2).min(BACKOFF_MAX);
                }
            }
        }
    }

    /// Errors are protocol violations.
    async fn session(&mut self, pause: &mut Duration) -> anyhow::Result<StreamEnd> {
        let shared = Arc::clone(&self.shared);
        let permit = shared.opening.acquire().await?;
        let Response { status, mut tcp, body, .. } = match self.send("GET", "/stream", b"").await {
            Ok(response) => response,
            Err(error) => {
                *shared.last_error.lock().unwrap_or_else(PoisonError::into_inner) = format!("{error:#}");
                return Ok(StreamEnd::Failed);
            }
        };
        match status {
            200 => {}
            410 => return self.reconcile().await,
            _ => {
                shared.counts.rejected.fetch_add(1, Relaxed);
                return Ok(StreamEnd::Failed);
            }
        }
        drop(permit);
        *pause = BACKOFF_MIN;
        shared.counts.open.fetch_add(1, Relaxed);
        let end = self.follow(&mut tcp, &body).await;
        shared.counts.open.fetch_sub(1, Relaxed);
        shared.counts.ended.fetch_add(1, Relaxed);
        end
    }

    async fn follow(&mut self, tcp: &mut TcpStream, first: &[u8]) -> anyhow::Result<StreamEnd> {
        let mut decoder = Decoder::new(FRAME_BYTES_MAX);
        decoder.push(first);
        let mut judge = Judge::new(self.position.clone());
        loop {
            while let Some(message) = decoder.next()? {
                match message {
                    Message::Comment(comment) if matches!(Word::of(&comment), Word::Go(_)) => {
                        return Ok(StreamEnd::GoAway);
                    }
                    Message::Comment(_) => {}
                    Message::Event { id, event, data } => {
                        if !self.apply(&mut judge, &id, &event, &data)? {
                            return Ok(StreamEnd::Failed);
                        }
                    }
                }
            }
            let mut limit = READ_BYTES_MAX;
            match self.pace {
                Pace::Stalled => _ = self.shared.is_awake.subscribe().wait_for(|is_awake| *is_awake).await?,
                Pace::Trickling if !*self.shared.is_awake.borrow() => {
                    limit = TRICKLE.0;
                    tokio::time::sleep(TRICKLE.1).await;
                }
                _ => {}
            }
            if !matches!(tokio::time::timeout(HUB_TIMEOUT, tcp.readable()).await, Ok(Ok(()))) {
                return Ok(StreamEnd::Failed);
            }
            let read = BUFFER.with_borrow_mut(|buffer| {
                let length = tcp.try_read(&mut buffer[..limit])?;
                decoder.push(&buffer[..length]);
                std::io::Result::Ok(length)
            });
            match read {
                Ok(length @ 1..) => _ = self.shared.counts.bytes.fetch_add(length as u64, Relaxed),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                _ => return Ok(StreamEnd::Failed),
            }
        }
    }

    /// Fails if digests do not match; returns false for an outdated frame.
    fn apply(&mut self, judge: &mut Judge, id: &str, event: &str, data: &[u8]) -> anyhow::Result<bool> {
        let now = Instant::now();
        self.shared.counts.frames.fetch_add(1, Relaxed);
        if self.pace == Pace::Stalled {
            self.shared.counts.stalled_frames.fetch_add(1, Relaxed);
        }
        let revision = &mut self.revision;
        let target: Revision = id.parse()?;
        if event == DELTA_EVENT {
            let mut delta: Delta = serde_json::from_slice(data)?;
            self.shared.counts.operations.fetch_add(delta.ops as u64, Relaxed);
            ensure!(
                delta.from == revision.data,
                "applying a frame failed: starts at {}, agent is at {}",
                delta.from,
                revision.data
            );
            if judge.pass(&delta.position, delta.dirs.keys(), false).is_err() {
                return Ok(false);
            }
            for (dir, digest) in std::mem::take(&mut delta.dirs) {
                match digest {
                    Some(digest) => _ = self.data.dirs.insert(dir, digest),
                    None => _ = self.data.dirs.remove(&dir),
                }
            }
            ensure!(
                digest(&self.data) == delta.to,
                "applying a frame failed: its digest is not {}",
                delta.to
            );
            if let Some(content) = self.shared.contents.get(&self.index) {
                let mut content = content.lock().unwrap_or_else(PoisonError::into_inner);
                delta.ensure.iter().for_each(|dir| _ = dir_mut(&mut content, dir));
                let patch: json_patch::Patch = serde_json::from_str(delta.patch.get())?;
                json_patch::patch(&mut content, &patch).context("applying a patch failed")?;
            }
            self.position = delta.after(&self.position);
            *revision = target;
            if let Some(number) = newest_change(delta.patch.get(), self.shared.due.every) {
                self.arrive(number, now);
            }
        } else {
            *revision = target;
        }
        Ok(true)
    }

    fn arrive(&self, number: u64, now: Instant) {
        let before = self.shared.newest[self.index].fetch_max(number, Relaxed);
        if before < number && self.pace == Pace::Steady {
            let delays = self.shared.delays.lock().unwrap_or_else(PoisonError::into_inner).clone();
            self.shared.due.record_delays(before, number, now, &delays);
        }
    }

    async fn reconcile(&mut self) -> anyhow::Result<StreamEnd> {
        let reads = self.shared.start.reads.iter().cloned().collect();
        let request = Reconcile { dirs: self.data.dirs.clone(), modules: None, reads };
        let response = self.send("POST", "/reconcile", &serde_json::to_vec(&request)?).await;
        let Ok(Response { status: 200, position, mut tcp, mut body }) = response else {
            return Ok(StreamEnd::Failed);
        };
        if tcp.read_to_end(&mut body).await.is_err() {
            return Ok(StreamEnd::Failed);
        }
        self.shared.counts.reconciles.fetch_add(1, Relaxed);
        let Digests { data, modules, .. } = match self.shared.contents.get(&self.index) {
            Some(content) => {
                let mut content = content.lock().unwrap_or_else(PoisonError::into_inner);
                apply_archive(&body, &mut content)?
            }
            None => apply_archive(&body, &mut Value::Null)?,
        };
        self.revision = Revision {
            data: digest(&data),
            modules: modules.context("reconciling failed: no digest of the modules")?,
        };
        self.data = data;
        self.position = position.after(&self.position);
        if let Some(number) = newest_in_archive(&body, self.shared.due.every)? {
            self.arrive(number, Instant::now());
        }
        Ok(StreamEnd::Reconciled)
    }

    async fn send(&self, method: &str, path: &str, body: &[u8]) -> anyhow::Result<Response> {
        let host = u8::try_from(2 + self.index / AGENTS_PER_ADDRESS).unwrap_or(u8::MAX);
        let socket = TcpSocket::new_v4()?;
        if self.pace != Pace::Steady {
            socket.set_recv_buffer_size(RECEIVE_BUFFER_BYTES)?;
        }
        socket.bind((Ipv4Addr::new(127, 0, 0, host), 0).into())?;
        let mut tcp = socket.connect(self.shared.hubs[self.hub]).await?;
        let mut request = format!("{method} /bundles/main{path} HTTP/1.1\r\nhost: hub\r\n");
        _ = write!(request, "last-event-id: {}\r\n", self.revision);
        if !self.position.is_empty() {
            _ = write!(request, "{POSITION_HEADER}: {}\r\n", self.position);
        }
        if method == "POST" {
            _ = write!(request, "content-length: {}\r\nconnection: close\r\n", body.len());
        }
        let request = [(request + "\r\n").as_bytes(), body].concat();
        tcp.write_all(&request).await?;
        let mut received = Vec::new();
        let end = loop {
            let mut bytes = [0; 1024];
            let length = tokio::time::timeout(HUB_TIMEOUT, tcp.read(&mut bytes)).await??;
            ensure!(length > 0, "reading a response failed: connection closed");
            received.extend_from_slice(&bytes[..length]);
            if let Some(end) = received.windows(4).position(|four| four == b"\r\n\r\n") {
                break end + 4;
            }
        };
        let text = std::str::from_utf8(&received[..end])?;
        let status = text.split(' ').nth(1).context("reading a response failed: no status")?.parse()?;
        let position = text.lines().find_map(|line| line.strip_prefix(POSITION_HEADER)?.strip_prefix(": "));
        let position = position.map(str::parse).transpose()?.unwrap_or_default();
        Ok(Response { status, position, tcp, body: received.split_off(end) })
    }
}
