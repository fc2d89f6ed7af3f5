//! Writes streams from one task per shard; each bundle has one shard per core. A shard passes over its connections when
//! there is a new edition. Changes during a pass are merged into the next.
//!
//! A stalled client delays no other, and receives one merged frame when it reads again. Large frames are encoded on a
//! blocking thread.
//!
//! Heartbeats are written in sixteenths of their interval, which also detects closed sockets. Half of the file
//! descriptors are reserved for streams.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io::ErrorKind;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Buf as _, Bytes};
use opa_hub_proto::revision::Revision;
use slab::Slab;
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use crate::bundle::watches::WatchStatuses;
use crate::bundle::{Bundle, CachedSnapshot, CatchUp};
use crate::serve::stream::{HEARTBEAT, PENDING, StreamGuard, heartbeat, synced_comment};
use crate::serve::{Duration, Hub};

/// Send buffer of a stream in bytes. The default, 4 MB, hides stalled clients.
pub(crate) const SEND_BUFFER: usize = 16 << 10;
/// Time after which a stalled client is disconnected while frame memory is exhausted.
pub(crate) const LARGE_STALL_MAX: Duration = Duration::from_secs(15);
/// Minimum unsent bytes of a stalled client, kernel buffers aside.
pub(crate) const LARGE_REST: usize = 256 << 10;
/// Streams written before yielding: 3 ms.
pub(crate) const ROUND_SLICE: usize = 256;
/// Maximum rounds of disconnects at shutdown.
pub(crate) const DRAIN_ROUNDS: usize = 20;
/// Length of one drain round.
pub(crate) const DRAIN_ROUND: Duration = Duration::from_millis(100);
/// Writes per round to a stream with a partial frame.
pub(crate) const DRAIN_LOOKS: usize = 10;
/// Maximum time to finish partial frames.
pub(crate) const DRAIN_HALVES: Duration = Duration::from_secs(3);

/// Heartbeats are spread over the interval, so that they do not delay frames.
const HEARTBEAT_GROUPS: usize = 16;

const RESPONSE: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-store\r\n\
                        connection: close\r\n\r\n";

/// Bundle id and shard number.
type ShardKey = (u64, usize);

pub(in crate::serve) struct Fanout {
    shards: Mutex<HashMap<ShardKey, mpsc::UnboundedSender<Connection>>>,
    shards_per_bundle: usize,
    tasks: TaskTracker,
    hub: Hub,
}

struct Connection {
    tcp: Arc<TcpStream>,
    /// The client's, once `unsent` is written.
    revision: Revision,
    unsent: Bytes,
    synced_sent: bool,
    state: WriteState,
    _guard: StreamGuard,
}

enum WriteState {
    Ready,
    /// Start of the wait, and the task that waits for the socket.
    SocketFull(Instant, #[expect(dead_code, reason = "aborts on drop")] AbortOnDropHandle<()>),
    /// Waits for a large frame.
    Encoding,
}

/// The revisions that a frame leads from and to, and the frame.
type EncodedFrame = (Revision, Revision, CatchUp);

/// The client is gone, or must reconcile.
struct Disconnected;

impl Fanout {
    pub(in crate::serve) fn new(hub: Hub) -> Arc<Self> {
        let shards_per_bundle = std::thread::available_parallelism().map_or(1, usize::from);
        Arc::new(Self { shards: Mutex::default(), shards_per_bundle, tasks: TaskTracker::new(), hub })
    }

    /// Streams from `revision` to a client whose request was read.
    pub(in crate::serve) fn join(self: &Arc<Self>, bundle: &Arc<Bundle>, tcp: TcpStream, revision: Revision) {
        // Fails only on closed sockets.
        _ = SockRef::from(&tcp).set_send_buffer_size(SEND_BUFFER);
        let mut connection = Connection {
            tcp: Arc::new(tcp),
            revision,
            unsent: Bytes::from_static(RESPONSE.as_bytes()),
            synced_sent: false,
            state: WriteState::Ready,
            _guard: StreamGuard::new(Arc::clone(&bundle.counters)),
        };
        let key = (bundle.id, fastrand::usize(..self.shards_per_bundle));
        let mut shards = self.shards.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(shard) = shards.get(&key) {
            match shard.send(connection) {
                Ok(()) => return,
                // The shard just ended.
                Err(mpsc::error::SendError(returned)) => connection = returned,
            }
        }
        let (shard, joining) = mpsc::unbounded_channel();
        _ = shard.send(connection);
        shards.insert(key, shard);
        let (writer, fanout) = (ShardWriter::new(bundle, joining), Arc::clone(self));
        self.tasks.spawn(async move {
            writer.run(&fanout, key).await;
        });
    }

    pub(in crate::serve) async fn drained(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Removes the shard unless a connection joined.
    fn leave(&self, key: ShardKey, joining: &mpsc::UnboundedReceiver<Connection>) -> bool {
        let mut shards = self.shards.lock().unwrap_or_else(PoisonError::into_inner);
        let is_idle = joining.is_empty();
        if is_idle {
            shards.remove(&key);
        }
        is_idle
    }
}

struct ShardWriter {
    bundle: String,
    feeds: WatchStatuses,
    head: watch::Receiver<Option<Arc<CachedSnapshot>>>,
    joining: mpsc::UnboundedReceiver<Connection>,
    connections: Slab<Connection>,
    /// Slots whose sockets are writable again.
    writable: (mpsc::UnboundedSender<usize>, mpsc::UnboundedReceiver<usize>),
    /// Slots that wait for a large frame, by revision, oldest first.
    catch_up_queue: VecDeque<(Revision, BTreeSet<usize>)>,
    largest_was_last: bool,
    /// At most one large frame.
    encoding: JoinSet<EncodedFrame>,
    /// First slot of the next pass: no connection is always last.
    first: usize,
    heartbeat_group: usize,
    /// Latest small frame: most connections need the same.
    frame: Option<(Revision, Revision, Bytes)>,
}

impl ShardWriter {
    fn new(bundle: &Bundle, joining: mpsc::UnboundedReceiver<Connection>) -> Self {
        Self {
            bundle: bundle.name.clone(),
            feeds: bundle.feeds.clone(),
            head: bundle.head(),
            joining,
            connections: Slab::new(),
            writable: mpsc::unbounded_channel(),
            catch_up_queue: VecDeque::new(),
            largest_was_last: false,
            encoding: JoinSet::new(),
            first: 0,
            heartbeat_group: 0,
            frame: None,
        }
    }

    async fn run(mut self, fanout: &Fanout, key: ShardKey) {
        let groups = u32::try_from(HEARTBEAT_GROUPS).expect("few groups");
        let mut heartbeats = tokio::time::interval(HEARTBEAT / groups);
        heartbeats.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let stop = &fanout.hub.0.stop;
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                changed = self.head.changed() => match changed {
                    Ok(()) => self.write_all().await,
                    // The bundle was replaced.
                    Err(_closed) => break,
                },
                Some(slot) = self.writable.1.recv() => self.on_writable(slot),
                Some(connection) = self.joining.recv() => self.attach(connection),
                Some(encoded) = self.encoding.join_next() => {
                    self.deliver_encoded(encoded.expect("encoding does not panic")).await;
                }
                _ = heartbeats.tick() => {
                    self.heartbeat();
                    if self.connections.is_empty() && fanout.leave(key, &self.joining) {
                        return;
                    }
                }
            }
        }
        fanout.shards.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
        // Clients of a replaced bundle reconnect to this hub.
        let go_away = if stop.is_cancelled() { fanout.hub.farewell().await } else { Bytes::new() };
        self.drain(&go_away).await;
    }

    fn attach(&mut self, connection: Connection) {
        let slot = self.connections.insert(connection);
        self.write(slot);
    }

    async fn write_all(&mut self) {
        self.head.mark_unchanged();
        let slots = self.connections.capacity();
        for step in 0..slots {
            let slot = (self.first + step) % slots;
            let connection = self.connections.get(slot);
            if connection.is_some_and(|connection| matches!(connection.state, WriteState::Ready)) {
                self.write(slot);
            }
            if step % ROUND_SLICE == ROUND_SLICE - 1 {
                tokio::task::yield_now().await;
            }
        }
        self.first = self.first.wrapping_add(ROUND_SLICE);
        for _ in 0..ROUND_SLICE {
            let Ok(connection) = self.joining.try_recv() else { break };
            self.attach(connection);
        }
        for _ in 0..self.writable.1.len() {
            let Ok(slot) = self.writable.1.try_recv() else { break };
            self.on_writable(slot);
        }
    }

    fn write(&mut self, slot: usize) {
        let Some(edition) = self.head.borrow().clone() else { return };
        if let Err(Disconnected) = self.advance(slot, &edition) {
            self.connections.try_remove(slot);
        }
    }

    /// Encodes one queued frame: by turns the oldest request and the largest group.
    fn encode(&mut self) {
        let Some(edition) = self.head.borrow().clone() else { return };
        if !self.encoding.is_empty() || edition.is_full() {
            return;
        }
        self.largest_was_last = !self.largest_was_last;
        while !self.catch_up_queue.is_empty() {
            let groups = 0..self.catch_up_queue.len();
            let largest = || groups.max_by_key(|index| self.catch_up_queue[*index].1.len());
            let next = if self.largest_was_last { largest().unwrap_or(0) } else { 0 };
            let (from, waiting) = &self.catch_up_queue[next];
            let is_waiting = |slot: &usize| {
                self.connections.get(*slot).is_some_and(|connection| connection.needs_frame(*from))
            };
            if waiting.iter().any(is_waiting) {
                let from = *from;
                self.encoding.spawn_blocking(move || (from, edition.view.revision, edition.next(from)));
                return;
            }
            // Its connections are closed.
            self.catch_up_queue.remove(next);
        }
    }

    async fn deliver_encoded(&mut self, (from, to, next): EncodedFrame) {
        let group = self.catch_up_queue.iter().position(|(revision, _)| *revision == from);
        let waiting = group.and_then(|index| self.catch_up_queue.remove(index)).map(|(_, waiting)| waiting);
        for (step, slot) in waiting.into_iter().flatten().enumerate() {
            // The slot may have been reused.
            let Some(connection) =
                self.connections.get_mut(slot).filter(|connection| connection.needs_frame(from))
            else {
                continue;
            };
            connection.state = WriteState::Ready;
            match &next {
                CatchUp::Frame(bytes) => (connection.unsent, connection.revision) = (bytes.clone(), to),
                CatchUp::UpToDate => {}
                CatchUp::TooOld => {
                    self.connections.remove(slot);
                    continue;
                }
            }
            self.write(slot);
            if step % ROUND_SLICE == ROUND_SLICE - 1 {
                tokio::task::yield_now().await;
            }
        }
        self.encode();
    }

    fn advance(&mut self, slot: usize, edition: &CachedSnapshot) -> Result<(), Disconnected> {
        let Some(connection) = self.connections.get_mut(slot) else { return Ok(()) };
        loop {
            if !connection.flush()? {
                let (tcp, writable) = (Arc::clone(&connection.tcp), self.writable.0.clone());
                let waiting = tokio::spawn(async move {
                    // The next write returns errors.
                    _ = tcp.writable().await;
                    _ = writable.send(slot);
                });
                connection.state = WriteState::SocketFull(Instant::now(), AbortOnDropHandle::new(waiting));
                return Ok(());
            }
            if let WriteState::Encoding = connection.state {
                return Ok(());
            }
            let to = edition.view.revision;
            connection.unsent = match &self.frame {
                _ if connection.revision == to && connection.synced_sent => return Ok(()),
                _ if connection.revision == to => {
                    connection.synced_sent = true;
                    synced_comment(&self.bundle, &self.feeds, to)
                }
                // New connections may need a later position.
                Some((from, newest, bytes))
                    if connection.synced_sent && (*from, *newest) == (connection.revision, to) =>
                {
                    bytes.clone()
                }
                _ if !edition.is_near(connection.revision) => {
                    connection.state = WriteState::Encoding;
                    let from = connection.revision;
                    match self.catch_up_queue.iter_mut().find(|(revision, _)| *revision == from) {
                        Some((_, waiting)) => _ = waiting.insert(slot),
                        None => self.catch_up_queue.push_back((from, BTreeSet::from([slot]))),
                    }
                    self.encode();
                    return Ok(());
                }
                _ => match edition.next(connection.revision) {
                    CatchUp::Frame(bytes) => {
                        self.frame = Some((connection.revision, to, bytes.clone()));
                        bytes
                    }
                    CatchUp::UpToDate => return Ok(()),
                    CatchUp::TooOld => return Err(Disconnected),
                },
            };
            connection.revision = to;
        }
    }

    fn on_writable(&mut self, slot: usize) {
        if let Some(connection) = self.connections.get_mut(slot)
            && let WriteState::SocketFull(..) = connection.state
        {
            connection.state = WriteState::Ready;
            self.write(slot);
        }
    }

    /// Sends heartbeats, and removes closed connections, and stalled ones while frame memory is exhausted.
    fn heartbeat(&mut self) {
        self.heartbeat_group = (self.heartbeat_group + 1) % HEARTBEAT_GROUPS;
        let bytes = heartbeat(&self.feeds);
        let full = self.head.borrow().clone().filter(|edition| edition.is_full());
        if let Some(edition) = &full {
            edition.forget_frames();
        }
        for slot in (self.heartbeat_group..self.connections.capacity()).step_by(HEARTBEAT_GROUPS) {
            let Some(connection) = self.connections.get_mut(slot) else { continue };
            let mut buffer = [0; 64];
            match connection.tcp.try_read(&mut buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                // Closed, failed, or unexpected bytes.
                _ => {
                    self.connections.remove(slot);
                    continue;
                }
            }
            if full.is_some() && connection.is_stalled() {
                self.connections.remove(slot);
                continue;
            }
            if connection.unsent.is_empty() {
                let is_pending = matches!(connection.state, WriteState::Encoding);
                // A plain heartbeat would report the client as synced.
                connection.unsent = if is_pending { PENDING } else { bytes.clone() };
                self.write(slot);
            }
        }
        // Useful for a burst of joins only.
        self.frame = None;
        // Memory may be free again.
        self.encode();
    }

    /// Closes connections in small groups to spread reconnects, also over many small bundles.
    async fn drain(mut self, go_away: &[u8]) {
        while let Ok(connection) = self.joining.try_recv() {
            self.connections.insert(connection);
        }
        let mut open: Vec<Connection> = self.connections.drain().collect();
        fastrand::shuffle(&mut open);
        let slice = open.len().div_ceil(DRAIN_ROUNDS).max(ROUND_SLICE);
        let spare = DRAIN_ROUNDS.saturating_sub(open.len().div_ceil(slice));
        let first = fastrand::usize(..=spare * DRAIN_LOOKS);
        let (deadline, mut closing) = (Instant::now() + DRAIN_HALVES, Vec::new());
        for poll in 0.. {
            if poll >= first && (poll - first) % DRAIN_LOOKS == 0 {
                let next = open.drain(open.len().saturating_sub(slice)..).map(|mut connection| {
                    // Partial frames are completed first.
                    connection.unsent = [&connection.unsent[..], go_away].concat().into();
                    connection
                });
                closing.extend(next);
            }
            open.retain_mut(|connection| connection.flush().is_ok());
            closing.retain_mut(|connection| matches!(connection.flush(), Ok(false)));
            if open.is_empty() && (closing.is_empty() || Instant::now() > deadline) {
                return;
            }
            tokio::time::sleep(DRAIN_ROUND / u32::try_from(DRAIN_LOOKS).expect("few polls")).await;
        }
    }
}

impl Connection {
    /// Returns whether nothing is unsent.
    fn flush(&mut self) -> Result<bool, Disconnected> {
        while !self.unsent.is_empty() {
            match self.tcp.try_write(&self.unsent) {
                Ok(0) => return Err(Disconnected),
                Ok(written) => self.unsent.advance(written),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(_) => return Err(Disconnected),
            }
        }
        Ok(true)
    }

    fn needs_frame(&self, from: Revision) -> bool {
        self.revision == from && matches!(self.state, WriteState::Encoding)
    }

    fn is_stalled(&self) -> bool {
        let is_stalled =
            matches!(&self.state, WriteState::SocketFull(since, _) if since.elapsed() > LARGE_STALL_MAX);
        is_stalled && self.unsent.len() > LARGE_REST
    }
}
