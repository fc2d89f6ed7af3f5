//! HTTP/1.1 listener with bounded connections and waits.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use socket2::SockRef;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// OPA, a kubelet and some scrapers; more wait in the kernel.
const CONNECTIONS_MAX: usize = 64;
/// Includes the time between requests, so that idle clients make room for probes. Long polls are unaffected.
const REQUEST_HEAD_TIMEOUT: Duration = Duration::from_secs(5);
const WRITE_TIMEOUT: Duration = Duration::from_secs(20);
/// Other connections must end to free file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

pub(crate) async fn serve(listener: TcpListener, router: Router) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(REQUEST_HEAD_TIMEOUT);
    let service = TowerToHyperService::new(router);
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let permit = Arc::clone(&slots).acquire_owned().await.expect("the semaphore stays open");
        let tcp = match listener.accept().await {
            Ok((tcp, _)) => tcp,
            Err(error) => {
                tracing::warn!(%error, "accept failed, retrying");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // Fails only for closed sockets.
        _ = SockRef::from(&tcp).set_tcp_user_timeout(Some(WRITE_TIMEOUT));
        let connection = http.serve_connection(TokioIo::new(tcp), service.clone());
        tokio::spawn(async move {
            let _permit = permit;
            // Errors are the client's.
            _ = connection.await;
        });
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;

    use super::*;

    #[tokio::test]
    async fn silent_connections_make_room_for_a_probe() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, Router::new().route("/livez", get(|| async { "ok\n" }))));
        let mut silent = Vec::new();
        for number in 0..CONNECTIONS_MAX {
            let mut tcp = TcpStream::connect(address).await.unwrap();
            if number % 2 == 0 {
                tcp.write_all(b"GET /livez HTTP/1.1\r\nhost:").await.unwrap();
            }
            silent.push(tcp);
        }
        let mut probe = TcpStream::connect(address).await.unwrap();
        probe.write_all(b"GET /livez HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        probe.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("ok\n"), "{answer}");
        let has_ended = |tcp: &TcpStream| tcp.try_read(&mut [0]).is_ok();
        assert!(silent.iter().any(has_ended), "the probe was served beside all the others");
    }
}
