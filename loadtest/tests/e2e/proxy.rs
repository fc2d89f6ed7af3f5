//! A TCP proxy that fails on request: in the middle of a request or of an answer it breaks, or holds back all bytes.

use std::sync::Arc;

use opa_hub_loadtest::eventually::eventually;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Bytes that are forwarded at a time.
const CHUNK: usize = 16 << 10;

/// A direction of bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Direction {
    /// From the client.
    Requests,
    /// From the target, which has executed what it answers.
    Answers,
}

/// Behaviour of a proxy that has stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Then {
    /// Connections end, and new ones are not accepted.
    Break,
    /// Connections stay open, and no byte passes in either direction.
    Hold,
}

/// A running proxy.
pub(crate) struct Proxy {
    /// `http://127.0.0.1:PORT`.
    pub(crate) url: String,
    state: Arc<watch::Sender<State>>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct State {
    /// Bytes of requests, and of answers.
    forwarded: [usize; 2],
    stop: Option<Stop>,
    /// Number of times that all connections were severed.
    severed: usize,
}

struct Stop {
    direction: Direction,
    /// Bytes that still pass in this direction.
    left: usize,
    then: Then,
}

impl State {
    /// Behaviour if the proxy has stopped.
    fn stopped(&self) -> Option<Then> {
        self.stop.as_ref().filter(|stop| stop.left == 0).map(|stop| stop.then)
    }

    /// Number of the next `count` bytes that pass.
    fn pass(&mut self, direction: Direction, count: usize) -> usize {
        if self.stopped().is_some() {
            return 0;
        }
        let mut passing = count;
        if let Some(stop) = self.stop.as_mut().filter(|stop| stop.direction == direction) {
            passing = count.min(stop.left);
            stop.left -= passing;
        }
        self.forwarded[direction as usize] += passing;
        passing
    }
}

impl Proxy {
    /// Forwards everything to `target` (`http://HOST:PORT`).
    pub(crate) async fn start(target: &str) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}", listener.local_addr()?);
        let state = Arc::new(watch::Sender::new(State::default()));
        let target = target.trim_start_matches("http://").to_owned();
        let task = tokio::spawn({
            let state = Arc::clone(&state);
            async move {
                while let Ok((client, _)) = listener.accept().await {
                    tokio::spawn(forward(client, target.clone(), Arc::clone(&state)));
                }
            }
        });
        Ok(Self { url, state, task })
    }

    /// Stops after `bytes` more of this direction, over all connections together. Zero stops at once.
    pub(crate) fn stop_after(&self, direction: Direction, bytes: usize, then: Then) {
        self.state.send_modify(|state| state.stop = Some(Stop { direction, left: bytes, then }));
    }

    /// Forwards everything again, what was held back first.
    pub(crate) fn resume(&self) {
        self.state.send_modify(|state| state.stop = None);
    }

    /// Ends all connections; new ones are accepted.
    pub(crate) fn sever(&self) {
        self.state.send_modify(|state| state.severed += 1);
    }

    pub(crate) fn has_stopped(&self) -> bool {
        self.state.borrow().stopped().is_some()
    }

    pub(crate) async fn wait_stopped(&self) -> anyhow::Result<()> {
        eventually(
            "the proxy stops",
            async || {
                if self.has_stopped() { Ok(()) } else { Err("bytes still pass") }
            },
        )
        .await
        .map(drop)
    }

    /// Bytes of this direction so far.
    pub(crate) fn forwarded(&self, direction: Direction) -> usize {
        self.state.borrow().forwarded[direction as usize]
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
        self.sever();
    }
}

/// Forwards until either side closes, the proxy breaks, or its connections are severed.
async fn forward(client: TcpStream, target: String, state: Arc<watch::Sender<State>>) {
    let mut watched = state.subscribe();
    let severed = watched.borrow_and_update().severed;
    if state.borrow().stopped() == Some(Then::Break) {
        return;
    }
    let Ok(server) = TcpStream::connect(target).await else { return };
    let (mut client_read, mut client_write) = client.into_split();
    let (mut server_read, mut server_write) = server.into_split();
    let ends = async {
        _ = watched.wait_for(|state| state.severed != severed).await;
    };
    tokio::select! {
        () = copy(&mut client_read, &mut server_write, Direction::Requests, &state) => {}
        () = copy(&mut server_read, &mut client_write, Direction::Answers, &state) => {}
        () = ends => {}
    }
}

async fn copy(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    direction: Direction,
    state: &watch::Sender<State>,
) {
    let mut buffer = vec![0; CHUNK];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        let mut written = 0;
        while written < count {
            let mut passing = 0;
            state.send_modify(|state| passing = state.pass(direction, count - written));
            if to.write_all(&buffer[written..written + passing]).await.is_err() {
                return;
            }
            written += passing;
            // The last byte before a stop counts: a client would wait for the rest of its answer.
            let stopped = state.borrow().stopped();
            match stopped {
                Some(Then::Break) => return,
                Some(Then::Hold) => {
                    let mut watched = state.subscribe();
                    // The sender outlives its connections.
                    _ = watched.wait_for(|state| state.stopped().is_none()).await;
                }
                None => {}
            }
        }
    }
}
