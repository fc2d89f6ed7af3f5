//! The fan-out: many streams of one bundle, written by a few tasks. Each goes over its streams when there is a new
//! edition, at once after a quiet time; what changes meanwhile is merged into the next round, so the pause between two
//! rounds is what a round costs. A stream is a socket, a revision, and what of a frame did not fit into the socket: a
//! reader that stalls holds up nobody, and gets one merged frame when it reads again. That frame is encoded beside the
//! rounds.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io::ErrorKind;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Buf as _, Bytes};
use opa_hub_proto::revision::Revision;
use slab::Slab;
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use super::Hub;
use super::stream::{Open, WAIT, greeting, heartbeat};
use crate::bundle::feeds::Feeds;
use crate::bundle::{Bundle, Edition, Next};
use crate::config::{
    DRAIN_HALVES, DRAIN_LOOKS, DRAIN_ROUND, DRAIN_ROUNDS, HEARTBEAT, LARGE_REST, LARGE_STALL_MAX,
    ROUND_SLICE, SEND_BUFFER,
};

/// Heartbeats are spread over so many parts of their interval, or they would hold up frames.
const BEATS: usize = 16;

/// What a stream begins with. Its end is the connection's.
const RESPONSE: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-store\r\n\
                        connection: close\r\n\r\n";

/// See the module's text.
pub(super) struct Fanout {
    /// Who writes, by bundle and part.
    writers: Mutex<HashMap<(u64, usize), mpsc::UnboundedSender<Stream>>>,
    /// Parts into which the streams of a bundle are divided: one for each thread.
    parts: usize,
    tasks: TaskTracker,
    hub: Hub,
}

struct Stream {
    tcp: Arc<TcpStream>,
    /// What the reader holds once `rest` is written.
    held: Revision,
    rest: Bytes,
    /// It was told once that it holds all there is.
    is_greeted: bool,
    waits: Waits,
    _open: Open,
}

/// What keeps a stream from being written to.
enum Waits {
    /// Nothing.
    No,
    /// The socket is full since then; a task waits until it is not.
    Socket(Instant, #[expect(dead_code, reason = "ends with this")] Aborted),
    /// Its frame is being encoded.
    Frame,
}

struct Aborted(AbortHandle);

impl Drop for Aborted {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// From where a frame leads, and to where.
type Encoded = (Revision, Revision, Next);

/// The reader is gone, or must reconcile.
struct Over;

impl Fanout {
    /// Of no streams yet, until `hub` stops.
    pub(super) fn new(hub: Hub) -> Arc<Self> {
        let parts = std::thread::available_parallelism().map_or(1, usize::from);
        Arc::new(Self { writers: Mutex::default(), parts, tasks: TaskTracker::new(), hub })
    }

    /// Writes `bundle` to `tcp` from now on. Its reader, whose request was read, is at `held`.
    pub(super) fn join(self: &Arc<Self>, bundle: &Arc<Bundle>, tcp: TcpStream, held: Revision) {
        // It fails on a socket that is gone only.
        _ = SockRef::from(&tcp).set_send_buffer_size(SEND_BUFFER);
        let mut stream = Stream {
            tcp: Arc::new(tcp),
            held,
            rest: Bytes::from_static(RESPONSE.as_bytes()),
            is_greeted: false,
            waits: Waits::No,
            _open: Open::new(Arc::clone(&bundle.counters)),
        };
        let key = (bundle.id, fastrand::usize(..self.parts));
        let mut writers = self.writers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(writer) = writers.get(&key) {
            match writer.send(stream) {
                Ok(()) => return,
                // It ended just now.
                Err(mpsc::error::SendError(back)) => stream = back,
            }
        }
        let (writer, joins) = mpsc::unbounded_channel();
        _ = writer.send(stream);
        writers.insert(key, writer);
        let (rounds, fanout) = (Rounds::new(bundle, joins), Arc::clone(self));
        self.tasks.spawn(async move {
            rounds.run(&fanout, key).await;
        });
    }

    /// Waits until all streams were ended, once the hub stops.
    pub(super) async fn drained(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Nobody has joined since `joins` was empty: the writer ends.
    fn leave(&self, key: (u64, usize), joins: &mpsc::UnboundedReceiver<Stream>) -> bool {
        let mut writers = self.writers.lock().unwrap_or_else(PoisonError::into_inner);
        let is_idle = joins.is_empty();
        if is_idle {
            writers.remove(&key);
        }
        is_idle
    }
}

/// The streams of one part of a bundle.
struct Rounds {
    bundle: String,
    feeds: Feeds,
    head: watch::Receiver<Option<Arc<Edition>>>,
    joins: mpsc::UnboundedReceiver<Stream>,
    streams: Slab<Stream>,
    /// Streams whose sockets take more again.
    ready: (mpsc::UnboundedSender<usize>, mpsc::UnboundedReceiver<usize>),
    /// Streams that are far behind, by what they hold; who came first is first.
    behind: VecDeque<(Revision, BTreeSet<usize>)>,
    /// Not the first but the largest group was served last.
    large_was_last: bool,
    /// What one of those revisions lacks is encoded, at most: the others wait.
    encoding: JoinSet<Encoded>,
    /// Where the next round begins, so that nobody is last each time.
    first: usize,
    beat: usize,
    /// What leads from a revision to the head: mostly all are at one.
    frame: Option<(Revision, Revision, Bytes)>,
}

impl Rounds {
    fn new(bundle: &Bundle, joins: mpsc::UnboundedReceiver<Stream>) -> Self {
        let (head, feeds) = (bundle.head(), bundle.feeds.clone());
        let bundle = bundle.name.clone();
        let (streams, ready) = (Slab::new(), mpsc::unbounded_channel());
        Self {
            bundle,
            feeds,
            head,
            joins,
            streams,
            ready,
            behind: VecDeque::new(),
            large_was_last: false,
            encoding: JoinSet::new(),
            first: 0,
            beat: 0,
            frame: None,
        }
    }

    async fn run(mut self, fanout: &Fanout, key: (u64, usize)) {
        let mut beats = tokio::time::interval(HEARTBEAT / u32::try_from(BEATS).expect("a few"));
        beats.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let stop = &fanout.hub.0.stop;
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                changed = self.head.changed() => match changed {
                    Ok(()) => self.round().await,
                    // Another bundle took the name of this one: whoever comes back is given that.
                    Err(_closed) => break,
                },
                Some(at) = self.ready.1.recv() => self.resume(at),
                Some(stream) = self.joins.recv() => self.begin(stream),
                Some(encoded) = self.encoding.join_next() => {
                    self.lead_on(encoded.expect("encoding does not panic")).await;
                }
                _ = beats.tick() => {
                    self.heartbeat();
                    if self.streams.is_empty() && fanout.leave(key, &self.joins) {
                        return;
                    }
                }
            }
        }
        fanout.writers.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
        // Where another bundle took the name of this one, its readers come back to that: there is no other hub to go to.
        let words = if stop.is_cancelled() { fanout.hub.farewell().await } else { Bytes::new() };
        self.drain(&words).await;
    }

    fn begin(&mut self, stream: Stream) {
        let at = self.streams.insert(stream);
        self.write(at);
    }

    /// Brings everybody to the head, and lets those in who came meanwhile.
    async fn round(&mut self) {
        self.head.mark_unchanged();
        let slots = self.streams.capacity();
        for step in 0..slots {
            let at = (self.first + step) % slots;
            if self.streams.get(at).is_some_and(|stream| matches!(stream.waits, Waits::No)) {
                self.write(at);
            }
            if step % ROUND_SLICE == ROUND_SLICE - 1 {
                tokio::task::yield_now().await;
            }
        }
        self.first = self.first.wrapping_add(ROUND_SLICE);
        for _ in 0..ROUND_SLICE {
            let Ok(stream) = self.joins.try_recv() else { break };
            self.begin(stream);
        }
        for _ in 0..self.ready.1.len() {
            let Ok(at) = self.ready.1.try_recv() else { break };
            self.resume(at);
        }
    }

    /// Writes what the stream at `at` lacks, as much as its socket takes.
    fn write(&mut self, at: usize) {
        let Some(edition) = self.head.borrow().clone() else { return };
        if let Err(Over) = self.advance(at, &edition) {
            self.streams.try_remove(at);
        }
    }

    /// Encodes what one group of those lacks who are far behind, beside the rounds: by turns the first, and the largest,
    /// which may be all others.
    fn encode(&mut self) {
        let Some(edition) = self.head.borrow().clone() else { return };
        if !self.encoding.is_empty() || edition.is_full() {
            return;
        }
        self.large_was_last = !self.large_was_last;
        while !self.behind.is_empty() {
            let largest = || (0..self.behind.len()).max_by_key(|at| self.behind[*at].1.len());
            let next = if self.large_was_last { largest().unwrap_or(0) } else { 0 };
            let (from, waiting) = &self.behind[next];
            if waiting.iter().any(|at| self.streams.get(*at).is_some_and(|stream| stream.waits_at(*from))) {
                let from = *from;
                self.encoding.spawn_blocking(move || (from, edition.view.revision, edition.next(from)));
                return;
            }
            // All of them have gone.
            self.behind.remove(next);
        }
    }

    /// Gives a frame to those who waited for it.
    async fn lead_on(&mut self, (from, to, next): Encoded) {
        let group = self.behind.iter().position(|(held, _)| *held == from);
        let waiting = group.and_then(|at| self.behind.remove(at)).map(|(_, waiting)| waiting);
        for (step, at) in waiting.into_iter().flatten().enumerate() {
            // Another one may have its place by now.
            let Some(stream) = self.streams.get_mut(at).filter(|stream| stream.waits_at(from)) else {
                continue;
            };
            stream.waits = Waits::No;
            match &next {
                Next::Frames(bytes) => (stream.rest, stream.held) = (bytes.clone(), to),
                Next::UpToDate => {}
                Next::Unknown => {
                    self.streams.remove(at);
                    continue;
                }
            }
            self.write(at);
            if step % ROUND_SLICE == ROUND_SLICE - 1 {
                tokio::task::yield_now().await;
            }
        }
        self.encode();
    }

    fn advance(&mut self, at: usize, edition: &Edition) -> Result<(), Over> {
        let Some(stream) = self.streams.get_mut(at) else { return Ok(()) };
        loop {
            if !stream.flush()? {
                let (tcp, ready) = (Arc::clone(&stream.tcp), self.ready.0.clone());
                let waiting = tokio::spawn(async move {
                    // An error shows at the next write.
                    _ = tcp.writable().await;
                    _ = ready.send(at);
                });
                stream.waits = Waits::Socket(Instant::now(), Aborted(waiting.abort_handle()));
                return Ok(());
            }
            if let Waits::Frame = stream.waits {
                return Ok(());
            }
            let to = edition.view.revision;
            stream.rest = match &self.frame {
                _ if stream.held == to && stream.is_greeted => return Ok(()),
                _ if stream.held == to => {
                    stream.is_greeted = true;
                    greeting(&self.bundle, &self.feeds, to)
                }
                // Who comes anew may have been promised a younger one.
                Some((from, head, bytes)) if stream.is_greeted && (*from, *head) == (stream.held, to) => {
                    bytes.clone()
                }
                _ if !edition.is_near(stream.held) => {
                    stream.waits = Waits::Frame;
                    match self.behind.iter_mut().find(|(held, _)| *held == stream.held) {
                        Some((_, waiting)) => _ = waiting.insert(at),
                        None => self.behind.push_back((stream.held, BTreeSet::from([at]))),
                    }
                    self.encode();
                    return Ok(());
                }
                _ => match edition.next(stream.held) {
                    Next::Frames(bytes) => {
                        self.frame = Some((stream.held, to, bytes.clone()));
                        bytes
                    }
                    Next::UpToDate => return Ok(()),
                    Next::Unknown => return Err(Over),
                },
            };
            stream.held = to;
        }
    }

    /// The socket of a stream takes more.
    fn resume(&mut self, at: usize) {
        if let Some(stream) = self.streams.get_mut(at)
            && let Waits::Socket(..) = stream.waits
        {
            stream.waits = Waits::No;
            self.write(at);
        }
    }

    /// Tells readers that the hub is there, and whether it hears its source, and finds those who are not there.
    fn heartbeat(&mut self) {
        self.beat = (self.beat + 1) % BEATS;
        let bytes = heartbeat(&self.feeds);
        let full = self.head.borrow().clone().filter(|edition| edition.is_full());
        if let Some(edition) = &full {
            edition.forget_frames();
        }
        for at in (self.beat..self.streams.capacity()).step_by(BEATS) {
            let Some(stream) = self.streams.get_mut(at) else { continue };
            let mut nothing = [0; 64];
            match stream.tcp.try_read(&mut nothing) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                // It ended its half, failed, or said what nobody asked for.
                _ => {
                    self.streams.remove(at);
                    continue;
                }
            }
            if full.is_some() && stream.holds_much() {
                self.streams.remove(at);
                continue;
            }
            if stream.rest.is_empty() {
                // No other word says that this was all.
                stream.rest = if let Waits::Frame = stream.waits { WAIT } else { bytes.clone() };
                self.write(at);
            }
        }
        // Kept for a storm of joins at one revision, not for ever.
        self.frame = None;
        // There may be room for the next of those far behind.
        self.encode();
    }

    /// Ends streams with these words, a few at a time, so that their readers come back, or to another hub, spread over a
    /// while; those of many small bundles too.
    async fn drain(mut self, words: &[u8]) {
        while let Ok(stream) = self.joins.try_recv() {
            self.streams.insert(stream);
        }
        let mut left: Vec<Stream> = self.streams.drain().collect();
        fastrand::shuffle(&mut left);
        let slice = left.len().div_ceil(DRAIN_ROUNDS).max(ROUND_SLICE);
        let spare = DRAIN_ROUNDS.saturating_sub(left.len().div_ceil(slice));
        let first = fastrand::usize(..=spare * DRAIN_LOOKS);
        let (until, mut ending) = (Instant::now() + DRAIN_HALVES, Vec::new());
        for look in 0.. {
            if look >= first && (look - first) % DRAIN_LOOKS == 0 {
                let told = left.drain(left.len().saturating_sub(slice)..).map(|mut stream| {
                    // Who has half of a frame gets the rest of it first, if it reads.
                    stream.rest = [&stream.rest[..], words].concat().into();
                    stream
                });
                ending.extend(told);
            }
            left.retain_mut(|stream| stream.flush().is_ok());
            ending.retain_mut(|stream| matches!(stream.flush(), Ok(false)));
            if left.is_empty() && (ending.is_empty() || Instant::now() > until) {
                return;
            }
            tokio::time::sleep(DRAIN_ROUND / u32::try_from(DRAIN_LOOKS).expect("a few")).await;
        }
    }
}

impl Stream {
    /// Writes as much of what is under way as the socket takes. Whether that is all.
    fn flush(&mut self) -> Result<bool, Over> {
        while !self.rest.is_empty() {
            match self.tcp.try_write(&self.rest) {
                Ok(0) => return Err(Over),
                Ok(written) => self.rest.advance(written),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(_) => return Err(Over),
            }
        }
        Ok(true)
    }

    /// What leads on from `held` is being encoded.
    fn waits_at(&self, held: Revision) -> bool {
        self.held == held && matches!(self.waits, Waits::Frame)
    }

    /// It has not read on for long, of a frame that is large.
    fn holds_much(&self) -> bool {
        let is_stalled = matches!(&self.waits, Waits::Socket(since, _) if since.elapsed() > LARGE_STALL_MAX);
        is_stalled && self.rest.len() > LARGE_REST
    }
}
