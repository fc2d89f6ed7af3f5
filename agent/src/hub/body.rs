//! Response body with a minimum rate.

use std::time::Duration;

use bytes::Bytes;
use reqwest::Response;
use tokio::time::Instant;

use super::error::Error;

/// Maximum time without bytes: the hub sends a heartbeat every 5 s.
pub(super) const IDLE_TIMEOUT: Duration = Duration::from_secs(15);
/// Period for [`WINDOW_BYTES_MIN`]; the reader's own time does not count.
const RATE_WINDOW: Duration = Duration::from_secs(10);
/// A thousandth of the bandwidth within a cluster.
const WINDOW_BYTES_MIN: usize = 64 << 10;

pub(super) struct Body {
    response: Response,
    waited: Duration,
    bytes: usize,
}

impl Body {
    pub(super) fn new(response: Response) -> Self {
        Self { response, waited: Duration::ZERO, bytes: 0 }
    }

    pub(super) async fn chunk(&mut self) -> Result<Option<Bytes>, Error> {
        let started = Instant::now();
        let chunk = tokio::time::timeout(IDLE_TIMEOUT, self.response.chunk()).await;
        let chunk = chunk.map_err(|_| Error::Timeout(IDLE_TIMEOUT))??;
        self.waited += started.elapsed();
        self.bytes += chunk.as_ref().map_or(0, Bytes::len);
        if self.waited >= RATE_WINDOW {
            if chunk.is_some() && self.bytes < WINDOW_BYTES_MIN {
                return Err(Error::TooSlow { bytes: WINDOW_BYTES_MIN, window: RATE_WINDOW });
            }
            (self.waited, self.bytes) = (Duration::ZERO, 0);
        }
        Ok(chunk)
    }
}

#[cfg(test)]
pub(super) fn repeat(chunk: impl Into<Bytes>, pause: Duration) -> Response {
    let chunk = chunk.into();
    let chunks = futures::stream::unfold(chunk, move |chunk| async move {
        tokio::time::sleep(pause).await;
        Some((Ok::<_, std::io::Error>(chunk.clone()), chunk))
    });
    axum::http::Response::new(reqwest::Body::wrap_stream(chunks)).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A14
    #[tokio::test(start_paused = true)]
    async fn slow_body_ends() {
        let mut body = Body::new(repeat(&b"x"[..], Duration::from_secs(14)));
        assert!(matches!(body.chunk().await, Err(Error::TooSlow { .. })));
        let mut body = Body::new(repeat(vec![0; WINDOW_BYTES_MIN], Duration::from_secs(9)));
        for _ in 0..20 {
            tokio::time::sleep(RATE_WINDOW * 2).await;
            assert!(body.chunk().await.unwrap().is_some());
        }
    }
}
