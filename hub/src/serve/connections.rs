//! Connections that axum serves: HTTP/1.1, with a limit on each wait for the client.
//!
//! Hyper's time for a head also runs while a connection is idle between two requests, and not while a response is under
//! way, so it cuts neither long polls nor streams. A client that does not read its response ends by [`WRITE_TIMEOUT`].

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::ConnectInfo;
use axum::http::header::CONNECTION;
use axum::http::{HeaderValue, Request};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::Limits;
use crate::config::{ACCEPT_PAUSE, KEEPALIVE, WRITE_TIMEOUT};

/// Maximum number of connections that begin with a probe: a kubelet and a few load balancers.
pub(super) const PROBES_MAX: usize = 64;
/// Time that a connection waits for room, so that a short burst is served and a hub that is full says so.
const ROOM_WAIT: Duration = Duration::from_secs(1);
/// Bytes that are read of the request of a connection that found no room: the head of any client.
const NO_ROOM_REQUEST_BYTES: usize = 4 << 10;
/// The answer to a connection that found no room.
const NO_ROOM: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain\r\nconnection: close\r\n\r\n\
too many connections: retry later, or use another replica\n";

/// Connections that axum serves.
#[derive(Clone)]
pub(super) struct Connections {
    http: http1::Builder,
    router: TowerToHyperService<Router>,
    /// One permit for each further connection.
    room: Arc<Semaphore>,
    /// The same for connections that begin with a probe.
    probes: Arc<Semaphore>,
    /// With less room than this a connection ends after a response, so that the next one need not wait.
    scarce: usize,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Connections {
    /// None yet; they end with `stop`, after the response that is under way.
    pub(super) fn new(router: Router, limits: Limits, stop: CancellationToken) -> Self {
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(limits.head);
        Self {
            http,
            router: TowerToHyperService::new(router),
            room: Arc::new(Semaphore::new(limits.connections)),
            probes: Arc::new(Semaphore::new(PROBES_MAX)),
            scarce: limits.connections / 2,
            stop,
            tasks: TaskTracker::new(),
        }
    }

    /// Waits until one more connection may be open.
    pub(super) async fn room(&self) -> OwnedSemaphorePermit {
        Arc::clone(&self.room).acquire_owned().await.expect("it is never closed")
    }

    /// Serves a connection if there is room for it soon. Probes have room of their own.
    pub(super) async fn admit(&self, tcp: TcpStream, peer: SocketAddr, is_probe: bool) {
        let room = if is_probe { Arc::clone(&self.probes) } else { Arc::clone(&self.room) };
        match tokio::time::timeout(ROOM_WAIT, room.acquire_owned()).await {
            Ok(room) => self.serve(tcp, peer, room.expect("it is never closed")),
            Err(_late) => {
                // With unread bytes the kernel resets the connection, and the answer is lost.
                let mut request = [0; NO_ROOM_REQUEST_BYTES];
                _ = tcp.try_read(&mut request);
                _ = tcp.try_write(NO_ROOM);
            }
        }
    }

    /// Serves a connection until it ends.
    pub(super) fn serve(&self, tcp: TcpStream, peer: SocketAddr, room: OwnedSemaphorePermit) {
        let (router, free, scarce) = (self.router.clone(), Arc::clone(&self.room), self.scarce);
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(ConnectInfo(peer));
            let (response, free) = (router.call(request), Arc::clone(&free));
            async move {
                let mut response = response.await?;
                if free.available_permits() < scarce {
                    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
                }
                Ok::<_, Infallible>(response)
            }
        });
        let connection = self.http.serve_connection(TokioIo::new(tcp), service);
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            let _room = room;
            let mut connection = pin!(connection);
            // An error is the client's: it left, was silent for too long, or does not speak HTTP.
            tokio::select! {
                _ = connection.as_mut() => return,
                () = stop.cancelled() => connection.as_mut().graceful_shutdown(),
            }
            _ = connection.await;
        });
    }

    /// Waits until all ended, after the stop.
    pub(super) async fn drained(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }
}

/// The next connection. One whose client's machine is gone ends, also while it is idle.
pub(super) async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok((tcp, peer)) => {
                // These fail only for a socket that is closed. A frame is small and must not wait for the acknowledgement
                // of the one before.
                _ = tcp.set_nodelay(true);
                let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE);
                _ = SockRef::from(&tcp).set_tcp_keepalive(&keepalive);
                _ = SockRef::from(&tcp).set_tcp_user_timeout(Some(WRITE_TIMEOUT));
                return (tcp, peer);
            }
            Err(error) => {
                // No more file descriptors, mostly: what is open goes on.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_kernel_probes_every_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (tcp, _) = accept(&listener).await;
        let socket = SockRef::from(&tcp);
        assert!(socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), KEEPALIVE);
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(WRITE_TIMEOUT));
    }
}
