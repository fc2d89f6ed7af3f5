//! A TCP proxy that can block traffic without closing connections, like a network that loses every packet.

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// A running proxy.
pub struct BlackholeProxy {
    /// Port on loopback.
    pub port: u16,
    open: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl BlackholeProxy {
    /// Forwards to `target` (`HOST:PORT`).
    pub async fn start(target: String) -> anyhow::Result<Self> {
        Self::with_prefix(target, b"").await
    }

    /// Like [`start`](Self::start), but blocks only chunks that start with `prefix`.
    pub async fn with_prefix(target: String, prefix: &'static [u8]) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let open = watch::Sender::new(true);
        let is_open = open.subscribe();
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(forward(client, target.clone(), prefix, is_open.clone()));
            }
        });
        Ok(Self { port, open, task })
    }

    /// Forwards or blocks traffic.
    pub fn set_open(&self, open: bool) {
        self.open.send_replace(open);
    }
}

impl Drop for BlackholeProxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn forward(client: TcpStream, target: String, prefix: &'static [u8], open: watch::Receiver<bool>) {
    let Ok(server) = TcpStream::connect(target).await else { return };
    let (mut client_read, mut client_write) = client.into_split();
    let (mut server_read, mut server_write) = server.into_split();
    tokio::select! {
        () = copy(&mut client_read, &mut server_write, prefix, open.clone()) => {}
        () = copy(&mut server_read, &mut client_write, prefix, open) => {}
    }
}

async fn copy(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    prefix: &[u8],
    mut open: watch::Receiver<bool>,
) {
    let mut buffer = vec![0; 16 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        if buffer[..count].starts_with(prefix) && open.wait_for(|open| *open).await.is_err() {
            return;
        }
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}
