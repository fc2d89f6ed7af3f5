//! The fan-out: many streams of one bundle, written by a few tasks. Each goes over its streams when there is a new
//! edition, at once after a quiet time; what changes meanwhile is merged into the next round, so the pause between two
//! rounds is what a round costs. A stream is a socket, a revision, and what of a frame did not fit into the socket: a
//! reader that stalls holds up nobody, and gets one merged frame when it reads again.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use opa_hub_proto::revision::Revision;
use slab::Slab;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::stream::{FAREWELL, Open, greeting, heartbeat};
use crate::bundle::feeds::Feeds;
use crate::bundle::{Bundle, Edition, Next};
use crate::config::{
    DRAIN_ROUND, DRAIN_ROUNDS, HEARTBEAT, KEEPALIVE, KEEPALIVE_INTERVAL, KEEPALIVE_TRIES, ROUND_SLICE,
    SEND_BUFFER,
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
    next: AtomicUsize,
    tasks: TaskTracker,
    stop: CancellationToken,
}

struct Stream {
    tcp: Arc<TcpStream>,
    /// What the reader holds once `rest` is written.
    held: Revision,
    rest: Bytes,
    /// It was told once that it holds all there is.
    is_greeted: bool,
    /// The socket is full; this waits until it is not.
    waits: Option<Waiting>,
    _open: Open,
}

struct Waiting(AbortHandle);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The reader is gone, or must reconcile.
struct Over;

impl Fanout {
    /// Of no streams yet, until `stop`.
    pub(super) fn new(stop: CancellationToken) -> Arc<Self> {
        let parts = std::thread::available_parallelism().map_or(1, usize::from);
        let (next, tasks) = (AtomicUsize::new(0), TaskTracker::new());
        Arc::new(Self { writers: Mutex::default(), parts, next, tasks, stop })
    }

    /// Writes `bundle` to `tcp` from now on. Its reader, whose request was read, is at `held`.
    pub(super) fn join(self: &Arc<Self>, bundle: &Arc<Bundle>, tcp: TcpStream, held: Revision) {
        let socket = SockRef::from(&tcp);
        // Both fail on a socket that is gone only.
        _ = socket.set_send_buffer_size(SEND_BUFFER);
        let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE_INTERVAL);
        _ = socket.set_tcp_keepalive(&keepalive.with_retries(KEEPALIVE_TRIES));
        let mut stream = Stream {
            tcp: Arc::new(tcp),
            held,
            rest: Bytes::from_static(RESPONSE.as_bytes()),
            is_greeted: false,
            waits: None,
            _open: Open::new(Arc::clone(&bundle.counters)),
        };
        let key = (bundle.id, self.next.fetch_add(1, Ordering::Relaxed) % self.parts);
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
        Self { bundle, feeds, head, joins, streams, ready, first: 0, beat: 0, frame: None }
    }

    async fn run(mut self, fanout: &Fanout, key: (u64, usize)) {
        let mut beats = tokio::time::interval(HEARTBEAT / u32::try_from(BEATS).expect("a few"));
        beats.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = fanout.stop.cancelled() => break,
                changed = self.head.changed() => match changed {
                    Ok(()) => self.round().await,
                    // Another bundle took the name of this one: whoever comes back is given that.
                    Err(_closed) => break,
                },
                Some(at) = self.ready.1.recv() => self.resume(at),
                Some(stream) = self.joins.recv() => self.begin(stream),
                _ = beats.tick() => {
                    self.heartbeat();
                    if self.streams.is_empty() && fanout.leave(key, &self.joins) {
                        return;
                    }
                }
            }
        }
        fanout.writers.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
        self.drain().await;
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
            if self.streams.get(at).is_some_and(|stream| stream.waits.is_none()) {
                self.write(at);
            }
            if step % ROUND_SLICE == ROUND_SLICE - 1 {
                tokio::task::yield_now().await;
            }
        }
        self.first = self.first.wrapping_add(1);
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

    fn advance(&mut self, at: usize, edition: &Edition) -> Result<(), Over> {
        let Some(stream) = self.streams.get_mut(at) else { return Ok(()) };
        loop {
            while !stream.rest.is_empty() {
                match stream.tcp.try_write(&stream.rest) {
                    Ok(0) => return Err(Over),
                    Ok(written) => {
                        stream.rest.advance(written);
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        let (tcp, ready) = (Arc::clone(&stream.tcp), self.ready.0.clone());
                        let waiting = tokio::spawn(async move {
                            // An error shows at the next write.
                            _ = tcp.writable().await;
                            _ = ready.send(at);
                        });
                        stream.waits = Some(Waiting(waiting.abort_handle()));
                        return Ok(());
                    }
                    Err(_) => return Err(Over),
                }
            }
            let to = edition.view.revision;
            stream.rest = match &self.frame {
                _ if stream.held == to && stream.is_greeted => return Ok(()),
                _ if stream.held == to => {
                    stream.is_greeted = true;
                    greeting(&self.bundle, &self.feeds, to)
                }
                Some((from, head, bytes)) if (*from, *head) == (stream.held, to) => bytes.clone(),
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
        if let Some(stream) = self.streams.get_mut(at) {
            stream.waits = None;
            self.write(at);
        }
    }

    /// Tells readers that the hub is there, and whether it hears its source, and finds those who are not there.
    fn heartbeat(&mut self) {
        self.beat = (self.beat + 1) % BEATS;
        let bytes = heartbeat(&self.feeds);
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
            if stream.waits.is_none() && stream.rest.is_empty() {
                stream.rest = bytes.clone();
                self.write(at);
            }
        }
        // Kept for a storm of joins at one revision, not for ever.
        self.frame = None;
    }

    /// Tells readers to go, a few at a time, so that their readers come to another hub spread over a while.
    async fn drain(mut self) {
        let mut left: Vec<_> = self.streams.drain().collect();
        fastrand::shuffle(&mut left);
        let slice = left.len().div_ceil(DRAIN_ROUNDS).max(ROUND_SLICE);
        while !left.is_empty() {
            for stream in left.drain(left.len().saturating_sub(slice)..) {
                // Between two frames only; who has half of one will see that it ends.
                if stream.rest.is_empty() {
                    _ = stream.tcp.try_write(&FAREWELL);
                }
            }
            tokio::time::sleep(if left.is_empty() { Duration::ZERO } else { DRAIN_ROUND }).await;
        }
    }
}
