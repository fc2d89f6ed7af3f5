//! A TCP proxy that breaks: it forwards a number of bytes to its target, then nothing more, on any connection.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// A running proxy.
pub struct Cut {
    /// `http://127.0.0.1:PORT`.
    pub url: String,
    left: Arc<AtomicI64>,
    task: JoinHandle<()>,
}

impl Cut {
    /// Forwards `bytes` to `target` (`http://HOST:PORT`), over all connections together.
    pub async fn start(target: &str, bytes: i64) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}", listener.local_addr()?);
        let left = Arc::new(AtomicI64::new(bytes));
        let target = target.trim_start_matches("http://").to_owned();
        let task = tokio::spawn({
            let left = Arc::clone(&left);
            async move {
                while let Ok((client, _)) = listener.accept().await {
                    let (target, left) = (target.clone(), Arc::clone(&left));
                    tokio::spawn(async move {
                        if left.load(Ordering::SeqCst) > 0
                            && let Ok(server) = TcpStream::connect(target).await
                        {
                            forward(client, server, &left).await;
                        }
                    });
                }
            }
        });
        Ok(Self { url, left, task })
    }

    /// Bytes forwarded so far by a proxy that was given [`i64::MAX`] of them.
    pub fn forwarded(&self) -> i64 {
        i64::MAX - self.left.load(Ordering::SeqCst)
    }

    /// Whether it has broken.
    pub fn is_broken(&self) -> bool {
        self.left.load(Ordering::SeqCst) <= 0
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Until either side closes, or nothing is left; then both connections end.
async fn forward(client: TcpStream, server: TcpStream, left: &AtomicI64) {
    let (mut client_read, mut client_write) = client.into_split();
    let (mut server_read, mut server_write) = server.into_split();
    let unbounded = AtomicI64::new(i64::MAX);
    tokio::select! {
        () = copy(&mut client_read, &mut server_write, left) => {}
        () = copy(&mut server_read, &mut client_write, &unbounded) => {}
    }
}

async fn copy(from: &mut (impl AsyncRead + Unpin), to: &mut (impl AsyncWrite + Unpin), left: &AtomicI64) {
    let mut buffer = vec![0; 16 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        let had = left.fetch_sub(count, Ordering::SeqCst);
        let may = usize::try_from(had.clamp(0, count)).unwrap_or_default();
        if to.write_all(&buffer[..may]).await.is_err() || had <= count {
            return;
        }
    }
}
