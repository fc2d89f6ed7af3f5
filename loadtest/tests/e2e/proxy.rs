//! A TCP proxy that breaks or stalls on demand, also within a request or response.

use std::sync::Arc;

use opa_hub_loadtest::eventually::eventually;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Copy buffer size, in bytes.
const CHUNK: usize = 16 << 10;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Direction {
    /// From the client.
    Requests,
    /// From the target, after executing the request.
    Answers,
}

/// Behaviour of a stopped proxy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Then {
    /// Connections are closed, new ones rejected.
    Break,
    /// Connections stay open, but no bytes pass.
    Hold,
}

pub(crate) struct Proxy {
    /// `http://127.0.0.1:PORT`.
    pub(crate) url: String,
    state: Arc<watch::Sender<State>>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct State {
    /// Bytes of requests and responses.
    forwarded: [usize; 2],
    stop: Option<Stop>,
    /// Number of `sever` calls.
    severed: usize,
}

struct Stop {
    direction: Direction,
    /// Remaining bytes in this direction.
    left: usize,
    then: Then,
}

impl State {
    fn stopped(&self) -> Option<Then> {
        self.stop.as_ref().filter(|stop| stop.left == 0).map(|stop| stop.then)
    }

    /// Number of the next `count` bytes to forward.
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

    /// Stops after `bytes` in this direction, over all connections; immediately if zero.
    pub(crate) fn stop_after(&self, direction: Direction, bytes: usize, then: Then) {
        self.state.send_modify(|state| state.stop = Some(Stop { direction, left: bytes, then }));
    }

    /// Forwards everything again, delayed bytes first.
    pub(crate) fn resume(&self) {
        self.state.send_modify(|state| state.stop = None);
    }

    /// Closes all connections; new ones are accepted.
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
            // Checked after every byte: a client would wait for its complete response.
            let stopped = state.borrow().stopped();
            match stopped {
                Some(Then::Break) => return,
                Some(Then::Hold) => {
                    let mut watched = state.subscribe();
                    _ = watched.wait_for(|state| state.stopped().is_none()).await;
                }
                None => {}
            }
        }
    }
}
