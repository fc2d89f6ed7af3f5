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

use super::content::{Digests, digest, newest, number, place, take_archive};
use super::{Pace, Shared};

/// An address has 28,000 ports, reserved for a minute after use.
const FROM_ONE_ADDRESS: usize = 500;
/// Same backoff as real agents.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// A hub is considered dead after this time.
const SILENCE: Duration = Duration::from_secs(15);
/// Bytes and interval of reads.
const TRICKLE: (usize, Duration) = (64, Duration::from_millis(100));
/// Receive buffer of stalled and trickling agents.
const LITTLE: u32 = 4096;
/// Fits a frame with a pod of 10 KB.
const READ_MAX: usize = 64 * 1024;

thread_local! {
    /// Shared by a thread's agents, so that each is cheap.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_MAX]);
}

pub(super) struct Agent {
    shared: Arc<Shared>,
    at: usize,
    pace: Pace,
    hub: usize,
    revision: Revision,
    data: DataHead,
    position: Position,
}

enum End {
    Told,
    Broken,
    /// The stream can be opened.
    Reconciled,
}

struct Answer {
    status: u16,
    position: Position,
    tcp: TcpStream,
    /// Bytes received with the headers.
    body: Vec<u8>,
}

impl Agent {
    pub(super) async fn run(shared: Arc<Shared>, at: usize, pace: Pace) -> anyhow::Result<()> {
        let start = Arc::clone(&shared.start);
        let (revision, data, position) = (start.revision, start.data.clone(), start.position.clone());
        let mut agent = Self { shared, at, pace, hub: 0, revision, data, position };
        let mut pause = RETRY_FIRST;
        loop {
            match agent.session(&mut pause).await? {
                End::Reconciled => {}
                End::Told => agent.hub = (agent.hub + 1) % agent.shared.hubs.len(),
                End::Broken => {
                    agent.hub = (agent.hub + 1) % agent.shared.hubs.len();
                    tokio::time::sleep(pause.mul_f64(fastrand::f64())).await;
                    pause = (pause * 2).min(RETRY_MAX);
                }
            }
        }
    }

    /// Errors are protocol violations.
    async fn session(&mut self, pause: &mut Duration) -> anyhow::Result<End> {
        let shared = Arc::clone(&self.shared);
        let turn = shared.opening.acquire().await?;
        let Answer { status, mut tcp, body, .. } = match self.ask("GET", "/stream", b"").await {
            Ok(answer) => answer,
            Err(error) => {
                *shared.trouble.lock().unwrap_or_else(PoisonError::into_inner) = format!("{error:#}");
                return Ok(End::Broken);
            }
        };
        match status {
            200 => {}
            410 => return self.reconcile().await,
            _ => {
                shared.counts.refused.fetch_add(1, Relaxed);
                return Ok(End::Broken);
            }
        }
        drop(turn);
        *pause = RETRY_FIRST;
        shared.counts.open.fetch_add(1, Relaxed);
        let end = self.follow(&mut tcp, &body).await;
        shared.counts.open.fetch_sub(1, Relaxed);
        shared.counts.ended.fetch_add(1, Relaxed);
        end
    }

    async fn follow(&mut self, tcp: &mut TcpStream, first: &[u8]) -> anyhow::Result<End> {
        let mut decoder = Decoder::new(FRAME_BYTES_MAX);
        decoder.push(first);
        let mut judge = Judge::new(self.position.clone());
        loop {
            while let Some(message) = decoder.next()? {
                match message {
                    Message::Comment(words) if matches!(Word::of(&words), Word::Go(_)) => {
                        return Ok(End::Told);
                    }
                    Message::Comment(_) => {}
                    Message::Event { id, event, data } => {
                        if !self.take(&mut judge, &id, &event, &data)? {
                            return Ok(End::Broken);
                        }
                    }
                }
            }
            let mut most = READ_MAX;
            match self.pace {
                Pace::Stalled => _ = self.shared.is_awake.subscribe().wait_for(|is_awake| *is_awake).await?,
                Pace::Trickling if !*self.shared.is_awake.borrow() => {
                    most = TRICKLE.0;
                    tokio::time::sleep(TRICKLE.1).await;
                }
                _ => {}
            }
            if !matches!(tokio::time::timeout(SILENCE, tcp.readable()).await, Ok(Ok(()))) {
                return Ok(End::Broken);
            }
            let read = BUFFER.with_borrow_mut(|buffer| {
                let length = tcp.try_read(&mut buffer[..most])?;
                decoder.push(&buffer[..length]);
                std::io::Result::Ok(length)
            });
            match read {
                Ok(length @ 1..) => _ = self.shared.counts.bytes.fetch_add(length as u64, Relaxed),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                _ => return Ok(End::Broken),
            }
        }
    }

    /// Fails if digests do not match; returns false for an outdated frame.
    fn take(&mut self, judge: &mut Judge, id: &str, event: &str, data: &[u8]) -> anyhow::Result<bool> {
        let now = Instant::now();
        self.shared.counts.frames.fetch_add(1, Relaxed);
        if self.pace == Pace::Stalled {
            self.shared.counts.frames_of_stalled.fetch_add(1, Relaxed);
        }
        let held = &mut self.revision;
        let said: Revision = id.parse()?;
        if event == DELTA_EVENT {
            let mut delta: Delta = serde_json::from_slice(data)?;
            self.shared.counts.operations.fetch_add(delta.ops as u64, Relaxed);
            ensure!(delta.from == held.data, "a frame from {}, while {} is held", delta.from, held.data);
            if judge.pass(&delta.position, delta.dirs.keys(), false).is_err() {
                return Ok(false);
            }
            for (dir, digest) in std::mem::take(&mut delta.dirs) {
                match digest {
                    Some(digest) => _ = self.data.dirs.insert(dir, digest),
                    None => _ = self.data.dirs.remove(&dir),
                }
            }
            ensure!(digest(&self.data) == delta.to, "after a frame {} is not held", delta.to);
            if let Some(content) = self.shared.contents.get(&self.at) {
                let mut content = content.lock().unwrap_or_else(PoisonError::into_inner);
                delta.ensure.iter().for_each(|dir| _ = place(&mut content, dir));
                let patch: json_patch::Patch = serde_json::from_str(delta.patch.get())?;
                json_patch::patch(&mut content, &patch).context("a patch that does not fit")?;
            }
            self.position = delta.after(&self.position);
            *held = said;
            if let Some(number) = number(delta.patch.get(), self.shared.due.every) {
                self.arrive(number, now);
            }
        } else {
            *held = said;
        }
        Ok(true)
    }

    fn arrive(&self, number: u64, now: Instant) {
        let before = self.shared.held[self.at].fetch_max(number, Relaxed);
        if before < number && self.pace == Pace::Steady {
            let delays = self.shared.delays.lock().unwrap_or_else(PoisonError::into_inner).clone();
            self.shared.due.since(before, number, now, &delays);
        }
    }

    async fn reconcile(&mut self) -> anyhow::Result<End> {
        let reads = self.shared.start.reads.iter().cloned().collect();
        let request = Reconcile { dirs: self.data.dirs.clone(), modules: None, reads };
        let answer = self.ask("POST", "/reconcile", &serde_json::to_vec(&request)?).await;
        let Ok(Answer { status: 200, position, mut tcp, mut body }) = answer else {
            return Ok(End::Broken);
        };
        if tcp.read_to_end(&mut body).await.is_err() {
            return Ok(End::Broken);
        }
        self.shared.counts.reconciles.fetch_add(1, Relaxed);
        let Digests { data, modules, .. } = match self.shared.contents.get(&self.at) {
            Some(content) => {
                let mut content = content.lock().unwrap_or_else(PoisonError::into_inner);
                take_archive(&body, &mut content)?
            }
            None => take_archive(&body, &mut Value::Null)?,
        };
        self.revision = Revision { data: digest(&data), modules: modules.context("a digest")? };
        self.data = data;
        self.position = position.after(&self.position);
        if let Some(number) = newest(&body, self.shared.due.every)? {
            self.arrive(number, Instant::now());
        }
        Ok(End::Reconciled)
    }

    async fn ask(&self, method: &str, what: &str, body: &[u8]) -> anyhow::Result<Answer> {
        let host = u8::try_from(2 + self.at / FROM_ONE_ADDRESS).unwrap_or(u8::MAX);
        let socket = TcpSocket::new_v4()?;
        if self.pace != Pace::Steady {
            socket.set_recv_buffer_size(LITTLE)?;
        }
        socket.bind((Ipv4Addr::new(127, 0, 0, host), 0).into())?;
        let mut tcp = socket.connect(self.shared.hubs[self.hub]).await?;
        let mut request = format!("{method} /bundles/main{what} HTTP/1.1\r\nhost: hub\r\n");
        _ = write!(request, "last-event-id: {}\r\n", self.revision);
        if !self.position.is_empty() {
            _ = write!(request, "{POSITION_HEADER}: {}\r\n", self.position);
        }
        if method == "POST" {
            _ = write!(request, "content-length: {}\r\nconnection: close\r\n", body.len());
        }
        let request = [(request + "\r\n").as_bytes(), body].concat();
        tcp.write_all(&request).await?;
        let mut answer = Vec::new();
        let end = loop {
            let mut bytes = [0; 1024];
            let length = tokio::time::timeout(SILENCE, tcp.read(&mut bytes)).await??;
            ensure!(length > 0, "the connection ended");
            answer.extend_from_slice(&bytes[..length]);
            if let Some(end) = answer.windows(4).position(|four| four == b"\r\n\r\n") {
                break end + 4;
            }
        };
        let text = std::str::from_utf8(&answer[..end])?;
        let status = text.split(' ').nth(1).context("a status")?.parse()?;
        let position = text.lines().find_map(|line| line.strip_prefix(POSITION_HEADER)?.strip_prefix(": "));
        let position = position.map(str::parse).transpose()?.unwrap_or_default();
        Ok(Answer { status, position, tcp, body: answer.split_off(end) })
    }
}
