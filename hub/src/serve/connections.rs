//! HTTP/1.1 connections served by axum.
//!
//! Hyper's header timeout also limits idle connections, but not responses such as long polls and streams.
//! [`WRITE_TIMEOUT`] ends connections whose client does not read.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
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

use crate::serve::Limits;

/// TCP keepalive time and interval.
pub(super) const KEEPALIVE: Duration = Duration::from_secs(60);
/// Pause after a failed accept, usually for lack of file descriptors.
pub(super) const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Timeout of TCP acknowledgment. Full windows count too (tcp(7), `TCP_USER_TIMEOUT`): less would evict slow clients.
pub(super) const WRITE_TIMEOUT: Duration = Duration::from_secs(300);

/// Enough for a kubelet and a few load balancers.
pub(super) const PROBES_MAX: usize = 64;
/// Long enough for a short burst.
const PERMIT_TIMEOUT: Duration = Duration::from_secs(1);
/// Maximum head of a rejected request.
const REJECTED_HEAD_BYTES: usize = 4 << 10;
const OVERLOADED: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain\r\nconnection: close\r\n\r\n\
too many connections; retry later, or use another replica\n";

#[derive(Clone)]
pub(super) struct Connections {
    http: http1::Builder,
    router: TowerToHyperService<Router>,
    permits: Arc<Semaphore>,
    probe_permits: Arc<Semaphore>,
    /// With fewer free permits, connections close after each response.
    low_permits: usize,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Connections {
    pub(super) fn new(router: Router, limits: Limits, stop: CancellationToken) -> Self {
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(limits.head);
        Self {
            http,
            router: TowerToHyperService::new(router),
            permits: Arc::new(Semaphore::new(limits.connections)),
            probe_permits: Arc::new(Semaphore::new(PROBES_MAX)),
            low_permits: limits.connections / 2,
            stop,
            tasks: TaskTracker::new(),
        }
    }

    pub(super) async fn permit(&self) -> OwnedSemaphorePermit {
        Arc::clone(&self.permits).acquire_owned().await.expect("the semaphore is never closed")
    }

    /// Serves a connection, or answers 503 if no permit is free.
    pub(super) async fn admit(&self, tcp: TcpStream, is_probe: bool) {
        let permits = if is_probe { &self.probe_permits } else { &self.permits };
        match tokio::time::timeout(PERMIT_TIMEOUT, Arc::clone(permits).acquire_owned()).await {
            Ok(permit) => self.serve(tcp, permit.expect("the semaphore is never closed")),
            Err(_late) => {
                // Closing with unread bytes resets the connection and loses the response.
                let mut request = [0; REJECTED_HEAD_BYTES];
                _ = tcp.try_read(&mut request);
                _ = tcp.try_write(OVERLOADED);
            }
        }
    }

    pub(super) fn serve(&self, tcp: TcpStream, permit: OwnedSemaphorePermit) {
        let (router, permits, low) = (self.router.clone(), Arc::clone(&self.permits), self.low_permits);
        let service = service_fn(move |request: Request<Incoming>| {
            let (response, permits) = (router.call(request), Arc::clone(&permits));
            async move {
                let mut response = response.await?;
                if permits.available_permits() < low {
                    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
                }
                Ok::<_, Infallible>(response)
            }
        });
        let connection = self.http.serve_connection(TokioIo::new(tcp), service);
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            let _permit = permit;
            let mut connection = pin!(connection);
            // All errors are the client's.
            tokio::select! {
                _ = connection.as_mut() => return,
                () = stop.cancelled() => connection.as_mut().graceful_shutdown(),
            }
            _ = connection.await;
        });
    }

    pub(super) async fn drained(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }
}

pub(super) async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((tcp, _)) => {
                // Fails only on closed sockets. Nagle's algorithm would delay small frames.
                _ = tcp.set_nodelay(true);
                let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE);
                _ = SockRef::from(&tcp).set_tcp_keepalive(&keepalive);
                _ = SockRef::from(&tcp).set_tcp_user_timeout(Some(WRITE_TIMEOUT));
                return tcp;
            }
            Err(error) => {
                // Usually no file descriptors are left.
                tracing::warn!(%error, "accepting a connection failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn accepted_connections_have_keepalive() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let tcp = accept(&listener).await;
        let socket = SockRef::from(&tcp);
        assert!(socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), KEEPALIVE);
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(WRITE_TIMEOUT));
    }
}
