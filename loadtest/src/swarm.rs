//! Thousands of agents in one process, from many loopback addresses, by the protocol of real ones: each holds the
//! digests of its directories, resumes, reconciles and fails over, and counts a change as delivered when the digest
//! after applying it is the one that the hub promised.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Read as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use flate2::read::GzDecoder;
use opa_hub_proto::frame::{DELTA_EVENT, Delta, FRAME_BYTES_MAX};
use opa_hub_proto::head::{HEAD_FILE, Head};
use opa_hub_proto::path::DirPath;
use opa_hub_proto::position::{POSITION_HEADER, Position};
use opa_hub_proto::reconcile::Reconcile;
use opa_hub_proto::revision::{Digest, Revision, data_digest};
use opa_hub_proto::sse::{Decoder, Message, Word};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use crate::histogram::Histogram;

/// Agents from one loopback address: it has 28,000 ports, and one that was used rests for a minute.
const FROM_ONE_ADDRESS: usize = 500;
/// Connections that are opened at a time.
const OPENING: usize = 256;
/// Pauses between tries, as real agents make them.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// A hub that says nothing for this long is gone.
const SILENCE: Duration = Duration::from_secs(15);
/// What a trickling agent reads, and how often.
const TRICKLE: (usize, Duration) = (64, Duration::from_millis(100));
/// What stalled and trickling agents have room for.
const LITTLE: u32 = 4096;

/// How an agent reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Pace {
    /// All that comes, as it comes.
    Steady,
    /// A few bytes now and then.
    Trickling,
    /// Nothing, until the swarm is told to wake.
    Stalled,
}

/// See the module's text.
pub(crate) struct Swarm {
    shared: Arc<Shared>,
    agents: JoinSet<anyhow::Result<()>>,
}

struct Shared {
    protocol: Protocol,
    hubs: Vec<SocketAddr>,
    /// When the change of each number was due.
    due: Schedule,
    /// The last change that each agent has.
    held: Vec<AtomicU64>,
    delays: Mutex<Arc<Histogram>>,
    opening: Semaphore,
    is_awake: watch::Sender<bool>,
    counts: Counts,
    /// What went wrong at somebody's last try.
    trouble: Mutex<String>,
}

/// What the agents speak.
pub(crate) enum Protocol {
    /// That of a hub, from what was served at the start.
    Hub(Arc<Start>),
    /// A thread that writes events whose ids are numbers.
    Raw,
}

/// Where agents start.
#[derive(Clone)]
pub(crate) struct Start {
    revision: Revision,
    dirs: BTreeMap<DirPath, Digest>,
    position: Position,
}

/// When changes are due, which are numbered from 1. What is late at the source counts as the server's delay.
#[derive(Clone, Default)]
pub(crate) struct Schedule(Arc<Mutex<Vec<Instant>>>);

/// What the agents did.
#[derive(Default)]
pub(crate) struct Counts {
    pub(crate) open: AtomicUsize,
    pub(crate) frames: AtomicU64,
    pub(crate) bytes: AtomicU64,
    pub(crate) reconciles: AtomicU64,
    pub(crate) ended: AtomicU64,
    pub(crate) refused: AtomicU64,
    is_broken: AtomicBool,
}

impl Schedule {
    /// The next change is due then. Says its number.
    pub(crate) fn push(&self, at: Instant) -> u64 {
        let mut due = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        due.push(at);
        due.len() as u64
    }

    fn since(&self, from: u64, to: u64, now: Instant, delays: &Histogram) {
        let due = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let index = |number: u64| usize::try_from(number).unwrap_or(usize::MAX).min(due.len());
        due[index(from)..index(to)].iter().for_each(|due| delays.record(now.saturating_duration_since(*due)));
    }
}

impl Start {
    /// What `hub` serves now.
    pub(crate) async fn of(hub: &str) -> anyhow::Result<Self> {
        let http = opa_hub_loadtest::lab::http()?;
        let answer = http.get(format!("{hub}/bundles/main/data")).send().await?.error_for_status()?;
        let position = answer.headers().get(POSITION_HEADER).and_then(|position| position.to_str().ok());
        let position = position.and_then(|position| position.parse().ok()).unwrap_or_default();
        let (dirs, modules) = head(&answer.bytes().await?)?;
        let revision = Revision { data: digest(&dirs), modules: modules.context("a digest of the modules")? };
        Ok(Self { revision, dirs, position })
    }
}

impl Swarm {
    /// Opens a stream for each agent at the first of the hubs, some of them with these paces, and waits until all are
    /// open.
    pub(crate) async fn open(
        protocol: Protocol,
        hubs: Vec<SocketAddr>,
        due: Schedule,
        count: usize,
        paces: &[(Pace, usize)],
    ) -> anyhow::Result<Self> {
        let shared = Arc::new(Shared {
            protocol,
            hubs,
            due,
            held: (0..count).map(|_| AtomicU64::new(0)).collect(),
            delays: Mutex::new(Arc::new(Histogram::new())),
            opening: Semaphore::new(OPENING),
            is_awake: watch::Sender::new(false),
            counts: Counts::default(),
            trouble: Mutex::default(),
        });
        let mut slow = paces.iter().flat_map(|(pace, count)| std::iter::repeat_n(*pace, *count));
        let mut agents = JoinSet::new();
        for at in 0..count {
            let pace = slow.next().unwrap_or(Pace::Steady);
            agents.spawn(Agent::run(Arc::clone(&shared), at, pace));
        }
        let mut swarm = Self { shared, agents };
        swarm.until("every stream is open", |shared| shared.counts.open.load(Relaxed) == count).await?;
        Ok(swarm)
    }

    /// What the agents did so far.
    pub(crate) fn counts(&self) -> &Counts {
        &self.shared.counts
    }

    /// Delays are counted anew; what was counted so far.
    pub(crate) fn take_delays(&self) -> Arc<Histogram> {
        let mut delays = self.shared.delays.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut delays, Arc::new(Histogram::new()))
    }

    /// How many of the agents from `first` on have the change `number`.
    pub(crate) fn at(&self, number: u64, first: usize) -> usize {
        self.shared.held.iter().skip(first).filter(|held| held.load(Relaxed) >= number).count()
    }

    /// Waits until the agents from `first` on have the change `number`.
    pub(crate) async fn reach(&mut self, number: u64, first: usize) -> anyhow::Result<()> {
        let what = format!("every agent has change {number}");
        let has = |shared: &Shared| shared.held.iter().skip(first).all(|held| held.load(Relaxed) >= number);
        self.until(&what, has).await
    }

    /// Stalled agents read on.
    pub(crate) fn wake(&self) {
        self.shared.is_awake.send_replace(true);
    }

    async fn until(&mut self, what: &str, is: impl Fn(&Shared) -> bool) -> anyhow::Result<()> {
        const PATIENCE: Duration = Duration::from_secs(120);
        let until = Instant::now() + PATIENCE;
        while !is(&self.shared) {
            if let Some(ended) = self.agents.try_join_next() {
                ended?.context("an agent gave up")?;
            }
            if Instant::now() > until {
                let trouble = self.shared.trouble.lock().unwrap_or_else(PoisonError::into_inner);
                bail!("{what}: not within {} s, {trouble}", PATIENCE.as_secs());
            }
            ensure!(!self.shared.counts.is_broken.load(Relaxed), "an agent holds what no hub ever served");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }
}

struct Agent {
    shared: Arc<Shared>,
    at: usize,
    pace: Pace,
    hub: usize,
    revision: Option<Revision>,
    dirs: BTreeMap<DirPath, Digest>,
    position: Position,
}

/// Why a stream ended.
enum End {
    /// The hub said so.
    Told,
    Broken,
}

impl Agent {
    async fn run(shared: Arc<Shared>, at: usize, pace: Pace) -> anyhow::Result<()> {
        let (mut revision, mut dirs, mut position) = Default::default();
        if let Protocol::Hub(start) = &shared.protocol {
            (revision, dirs, position) = (Some(start.revision), start.dirs.clone(), start.position.clone());
        }
        let mut agent = Self { shared, at, pace, hub: 0, revision, dirs, position };
        let mut pause = RETRY_FIRST;
        loop {
            match agent.session(&mut pause).await {
                Ok(End::Told) => agent.hub = (agent.hub + 1) % agent.shared.hubs.len(),
                Ok(End::Broken) => {
                    agent.hub = (agent.hub + 1) % agent.shared.hubs.len();
                    tokio::time::sleep(pause.mul_f64(fastrand::f64())).await;
                    pause = (pause * 2).min(RETRY_MAX);
                }
                Err(error) => {
                    agent.shared.counts.is_broken.store(true, Relaxed);
                    return Err(error);
                }
            }
        }
    }

    /// Until the stream ends. An error is one that no agent must meet.
    async fn session(&mut self, pause: &mut Duration) -> anyhow::Result<End> {
        let shared = Arc::clone(&self.shared);
        let turn = shared.opening.acquire().await?;
        let (status, mut tcp, body) = match self.ask("GET", "/stream", b"").await {
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
        let mut bytes = [0; 4096];
        loop {
            while let Some(message) = decoder.next()? {
                match message {
                    Message::Comment(words) if matches!(Word::of(&words), Word::Go(_)) => {
                        return Ok(End::Told);
                    }
                    Message::Comment(_) => {}
                    Message::Event { id, event, data } => self.take(&id, &event, &data)?,
                }
            }
            let (most, rest) = match self.pace {
                Pace::Trickling => (TRICKLE.0, TRICKLE.1),
                _ => (bytes.len(), Duration::ZERO),
            };
            if self.pace == Pace::Stalled {
                self.shared.is_awake.subscribe().wait_for(|is_awake| *is_awake).await?;
            }
            tokio::time::sleep(rest).await;
            let read = tokio::time::timeout(SILENCE, tcp.read(&mut bytes[..most])).await;
            let Ok(Ok(length @ 1..)) = read else { return Ok(End::Broken) };
            self.shared.counts.bytes.fetch_add(length as u64, Relaxed);
            decoder.push(&bytes[..length]);
        }
    }

    /// A frame must lead on from what is held, to what it promises.
    fn take(&mut self, id: &str, event: &str, data: &[u8]) -> anyhow::Result<()> {
        let now = Instant::now();
        self.shared.counts.frames.fetch_add(1, Relaxed);
        let Some(held) = &mut self.revision else {
            self.arrive(id.parse().context("a number")?, now);
            return Ok(());
        };
        let said: Revision = id.parse()?;
        if event == DELTA_EVENT {
            let delta: Delta = serde_json::from_slice(data)?;
            ensure!(delta.from == held.data, "a frame from {}, while {} is held", delta.from, held.data);
            for (dir, digest) in delta.dirs {
                match digest {
                    Some(digest) => _ = self.dirs.insert(dir, digest),
                    None => _ = self.dirs.remove(&dir),
                }
            }
            ensure!(digest(&self.dirs) == delta.to, "after a frame {} is not held", delta.to);
            self.position = delta.position.after(&self.position);
            *held = said;
            if let Some(number) = number(delta.patch.get()) {
                self.arrive(number, now);
            }
        } else {
            *held = said;
        }
        Ok(())
    }

    fn arrive(&self, number: u64, now: Instant) {
        let before = self.shared.held[self.at].fetch_max(number, Relaxed);
        if before < number && self.pace == Pace::Steady {
            let delays = self.shared.delays.lock().unwrap_or_else(PoisonError::into_inner).clone();
            self.shared.due.since(before, number, now, &delays);
        }
    }

    /// Takes what is lacking, and opens the stream next.
    async fn reconcile(&mut self) -> anyhow::Result<End> {
        let request = Reconcile { dirs: self.dirs.clone(), modules: None, reads: Vec::new() };
        let Ok((200, mut tcp, mut body)) =
            self.ask("POST", "/reconcile", &serde_json::to_vec(&request)?).await
        else {
            return Ok(End::Broken);
        };
        if tcp.read_to_end(&mut body).await.is_err() {
            return Ok(End::Broken);
        }
        self.shared.counts.reconciles.fetch_add(1, Relaxed);
        let (dirs, modules) = head(&body)?;
        self.revision = Some(Revision { data: digest(&dirs), modules: modules.context("a digest")? });
        self.dirs = dirs;
        if let Some(number) = newest(&body)? {
            self.arrive(number, Instant::now());
        }
        // At the same hub again.
        self.hub = (self.hub + self.shared.hubs.len() - 1) % self.shared.hubs.len();
        Ok(End::Told)
    }

    /// The status, and what is behind the head of the answer.
    async fn ask(&self, method: &str, what: &str, body: &[u8]) -> anyhow::Result<(u16, TcpStream, Vec<u8>)> {
        let host = u8::try_from(2 + self.at / FROM_ONE_ADDRESS).unwrap_or(u8::MAX);
        let socket = TcpSocket::new_v4()?;
        if self.pace != Pace::Steady {
            socket.set_recv_buffer_size(LITTLE)?;
        }
        socket.bind((Ipv4Addr::new(127, 0, 0, host), 0).into())?;
        let mut tcp = socket.connect(self.shared.hubs[self.hub]).await?;
        let mut request = format!("{method} /bundles/main{what} HTTP/1.1\r\nhost: hub\r\n");
        if let Some(revision) = self.revision {
            _ = write!(request, "last-event-id: {revision}\r\n");
        }
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
        Ok((status, tcp, answer.split_off(end)))
    }
}

fn digest(dirs: &BTreeMap<DirPath, Digest>) -> Digest {
    data_digest(dirs.iter().map(|(dir, digest)| (dir, *digest)))
}

/// The newest change that `text` shows: objects carry the number of theirs in a label.
fn number(text: &str) -> Option<u64> {
    let numbers = text.split("\"round\":\"").skip(1);
    numbers.filter_map(|rest| rest.split('"').next()?.parse().ok()).max()
}

type Digests = (BTreeMap<DirPath, Digest>, Option<Digest>);

/// What the head of an archive says is held once the rest was applied.
fn head(archive: &[u8]) -> anyhow::Result<Digests> {
    let mut tar = tar::Archive::new(GzDecoder::new(archive));
    let mut first = tar.entries()?.next().context("an empty archive")??;
    ensure!(first.path()?.to_str() == Some(HEAD_FILE), "an archive without a head");
    let mut text = Vec::new();
    first.read_to_end(&mut text)?;
    let head: Head = serde_json::from_slice(&text)?;
    let Some(data) = head.data else { bail!("an archive without data") };
    Ok((data.dirs, head.modules_digest))
}

/// The newest change that an archive shows.
fn newest(archive: &[u8]) -> anyhow::Result<Option<u64>> {
    let mut text = String::new();
    GzDecoder::new(archive).read_to_string(&mut text)?;
    Ok(number(&text))
}
