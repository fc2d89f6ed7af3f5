//! Thousands of agents in one process, from many loopback addresses, by the protocol of real ones: each holds the
//! digests of its directories, resumes, reconciles and fails over, and counts a change as delivered when the digest
//! over those that a frame leaves is the one that the hub promised, as real agents do. Some are witnesses: they hold
//! what OPA would, so that it can be compared with what the source has.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Read as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use flate2::read::GzDecoder;
use opa_hub_proto::frame::{DELTA_EVENT, Delta, FRAME_BYTES_MAX};
use opa_hub_proto::head::{HEAD_FILE, Head};
use opa_hub_proto::manifest::DATA_FILE;
use opa_hub_proto::path::DirPath;
use opa_hub_proto::position::{POSITION_HEADER, Position};
use opa_hub_proto::reconcile::Reconcile;
use opa_hub_proto::revision::{Digest, Revision, data_digest};
use opa_hub_proto::sse::{Decoder, Message, Word};
use serde_json::{Value, json};
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
/// Witnesses of a swarm.
const WITNESSES: usize = 20;

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
    start: Arc<Start>,
    hubs: Vec<SocketAddr>,
    /// When the change of each number was due.
    due: Schedule,
    /// The last change that each agent has.
    held: Vec<AtomicU64>,
    delays: Mutex<Arc<Histogram>>,
    /// What those hold who are witnesses.
    contents: BTreeMap<usize, Mutex<Value>>,
    opening: Semaphore,
    is_awake: watch::Sender<bool>,
    counts: Counts,
    /// What went wrong at somebody's last try.
    trouble: Mutex<String>,
}

/// What agents hold at the start.
pub(crate) struct Start {
    pub(crate) revision: Revision,
    pub(crate) dirs: BTreeMap<DirPath, Digest>,
    pub(crate) position: Position,
    /// What policies read of it, in the hub's words.
    pub(crate) reads: Option<String>,
    pub(crate) content: Value,
}

/// When changes are due, which are numbered from 1. What is late at the source counts as the server's delay.
#[derive(Clone, Default)]
pub(crate) struct Schedule(Arc<Mutex<Vec<Instant>>>);

/// What the agents did.
#[derive(Default)]
pub(crate) struct Counts {
    pub(crate) open: AtomicUsize,
    pub(crate) frames: AtomicU64,
    /// Those of agents that stalled.
    pub(crate) frames_of_stalled: AtomicU64,
    pub(crate) bytes: AtomicU64,
    pub(crate) reconciles: AtomicU64,
    pub(crate) ended: AtomicU64,
    pub(crate) refused: AtomicU64,
}

impl Schedule {
    /// The next change is due then. Says its number.
    pub(crate) fn push(&self, at: Instant) -> u64 {
        let mut due = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        due.push(at);
        due.len() as u64
    }

    /// How many there are.
    pub(crate) fn len(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len() as u64
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
        let mut content = json!({});
        let (dirs, modules, reads) = take_archive(&answer.bytes().await?, &mut content)?;
        let revision = Revision { data: digest(&dirs), modules: modules.context("a digest of the modules")? };
        Ok(Self { revision, dirs, position, reads, content })
    }
}

impl Swarm {
    /// Opens a stream for each agent at the first of the hubs, some of them with these paces, and waits until all are
    /// open.
    pub(crate) async fn open(
        start: Arc<Start>,
        hubs: Vec<SocketAddr>,
        due: Schedule,
        count: usize,
        paces: &[(Pace, usize)],
    ) -> anyhow::Result<Self> {
        let witnesses = (0..count).step_by((count / WITNESSES).max(1));
        let shared = Arc::new(Shared {
            contents: witnesses.map(|at| (at, Mutex::new(start.content.clone()))).collect(),
            start,
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
        // Whoever comes back later comes as fast as real ones do.
        swarm.shared.opening.add_permits(count);
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

    /// How many witnesses hold other pods than these, by namespace and name.
    pub(crate) fn astray(&self, pods: &Value) -> usize {
        let holds = |content: &Mutex<Value>| {
            let content = content.lock().unwrap_or_else(PoisonError::into_inner);
            content["kubernetes"]["pods"] == *pods
        };
        self.shared.contents.values().filter(|content| !holds(content)).count()
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

    /// Stalled and trickling agents read on as others do.
    pub(crate) fn wake(&self) {
        self.shared.is_awake.send_replace(true);
    }

    /// Fails when an agent met what none must meet.
    pub(crate) fn check(&mut self) -> anyhow::Result<()> {
        match self.agents.try_join_next() {
            Some(ended) => ended?.context("an agent gave up"),
            None => Ok(()),
        }
    }

    async fn until(&mut self, what: &str, is: impl Fn(&Shared) -> bool) -> anyhow::Result<()> {
        const PATIENCE: Duration = Duration::from_secs(120);
        let until = Instant::now() + PATIENCE;
        while !is(&self.shared) {
            self.check()?;
            if Instant::now() > until {
                let trouble = self.shared.trouble.lock().unwrap_or_else(PoisonError::into_inner);
                bail!("{what}: not within {} s, {trouble}", PATIENCE.as_secs());
            }
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
    revision: Revision,
    dirs: BTreeMap<DirPath, Digest>,
    position: Position,
}

/// Why a stream ended.
enum End {
    /// The hub said so.
    Told,
    Broken,
    /// It was not one yet: what was lacking is there now.
    Reconciled,
}

impl Agent {
    async fn run(shared: Arc<Shared>, at: usize, pace: Pace) -> anyhow::Result<()> {
        let start = Arc::clone(&shared.start);
        let (revision, dirs, position) = (start.revision, start.dirs.clone(), start.position.clone());
        let mut agent = Self { shared, at, pace, hub: 0, revision, dirs, position };
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
            let mut most = bytes.len();
            match self.pace {
                Pace::Stalled => _ = self.shared.is_awake.subscribe().wait_for(|is_awake| *is_awake).await?,
                Pace::Trickling if !*self.shared.is_awake.borrow() => {
                    most = TRICKLE.0;
                    tokio::time::sleep(TRICKLE.1).await;
                }
                _ => {}
            }
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
        if self.pace == Pace::Stalled {
            self.shared.counts.frames_of_stalled.fetch_add(1, Relaxed);
        }
        let held = &mut self.revision;
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
            if let Some(content) = self.shared.contents.get(&self.at) {
                let mut content = content.lock().unwrap_or_else(PoisonError::into_inner);
                delta.ensure.iter().for_each(|dir| _ = place(&mut content, dir));
                let patch: json_patch::Patch = serde_json::from_str(delta.patch.get())?;
                json_patch::patch(&mut content, &patch).context("a patch that does not fit")?;
            }
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
        let reads = self.shared.start.reads.iter().cloned().collect();
        let request = Reconcile { dirs: self.dirs.clone(), modules: None, reads };
        let Ok((200, mut tcp, mut body)) =
            self.ask("POST", "/reconcile", &serde_json::to_vec(&request)?).await
        else {
            return Ok(End::Broken);
        };
        if tcp.read_to_end(&mut body).await.is_err() {
            return Ok(End::Broken);
        }
        self.shared.counts.reconciles.fetch_add(1, Relaxed);
        let (dirs, modules, _) = match self.shared.contents.get(&self.at) {
            Some(content) => {
                let mut content = content.lock().unwrap_or_else(PoisonError::into_inner);
                take_archive(&body, &mut content)?
            }
            None => take_archive(&body, &mut Value::Null)?,
        };
        self.revision = Revision { data: digest(&dirs), modules: modules.context("a digest")? };
        self.dirs = dirs;
        if let Some(number) = newest(&body)? {
            self.arrive(number, Instant::now());
        }
        Ok(End::Reconciled)
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
        Ok((status, tcp, answer.split_off(end)))
    }
}

/// The value of a directory, made a map where it is not there.
fn place<'a>(content: &'a mut Value, dir: &DirPath) -> &'a mut Value {
    let at = dir.relative().split('/').fold(content, |at, segment| &mut at[segment]);
    if at.is_null() {
        *at = json!({});
    }
    at
}

fn digest(dirs: &BTreeMap<DirPath, Digest>) -> Digest {
    data_digest(dirs.iter().map(|(dir, digest)| (dir, *digest)))
}

/// The newest change that `text` shows: objects carry the number of theirs in a label.
fn number(text: &str) -> Option<u64> {
    let numbers = text.split("\"round\":\"").skip(1);
    numbers.filter_map(|rest| rest.split('"').next()?.parse().ok()).max()
}

/// Of directories, of the modules, and what those read.
type Digests = (BTreeMap<DirPath, Digest>, Option<Digest>, Option<String>);

/// Takes an archive into `content`, unless that is null, and says what is held then.
fn take_archive(archive: &[u8], content: &mut Value) -> anyhow::Result<Digests> {
    let mut tar = tar::Archive::new(GzDecoder::new(archive));
    let mut entries = tar.entries()?;
    let mut first = entries.next().context("an empty archive")??;
    ensure!(first.path()?.to_str() == Some(HEAD_FILE), "an archive without a head");
    let mut text = Vec::new();
    first.read_to_end(&mut text)?;
    let head: Head = serde_json::from_slice(&text)?;
    let Some(data) = head.data else { bail!("an archive without data") };
    if content.is_null() {
        return Ok((data.dirs, head.modules_digest, head.reads));
    }
    // What the archive does not name is gone; what it names and does not hold stayed.
    let mut next = json!({});
    data.ensure.iter().for_each(|dir| _ = place(&mut next, dir));
    for dir in data.dirs.keys() {
        if let Some(held) = content.pointer(dir.as_str()) {
            *place(&mut next, dir) = held.clone();
        }
    }
    for entry in entries {
        let mut entry = entry?;
        let path = entry.path()?.to_str().unwrap_or_default().to_owned();
        if let Some(dir) = path.strip_suffix(DATA_FILE) {
            let mut text = Vec::new();
            entry.read_to_end(&mut text)?;
            *place(&mut next, &format!("/{}", dir.trim_matches('/')).parse()?) =
                serde_json::from_slice(&text)?;
        }
    }
    *content = next;
    Ok((data.dirs, head.modules_digest, head.reads))
}

/// The newest change that an archive shows.
fn newest(archive: &[u8]) -> anyhow::Result<Option<u64>> {
    let mut text = String::new();
    GzDecoder::new(archive).read_to_string(&mut text)?;
    Ok(number(&text))
}
