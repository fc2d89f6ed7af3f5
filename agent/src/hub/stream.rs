//! Reader of an event stream.

use std::time::Duration;

use opa_hub_proto::frame::FRAME_BYTES_MAX;
use opa_hub_proto::sse::{Decoder, Message};
use reqwest::Response;
use tokio::time::Instant;

use super::body::IDLE_TIMEOUT;
use super::error::Error;

/// Maximum time for an event of up to 4 MiB.
const EVENT_TIMEOUT: Duration = Duration::from_secs(30);

pub(crate) struct Stream {
    response: Response,
    decoder: Decoder,
    received_at: Instant,
    event_started_at: Option<Instant>,
}

impl Stream {
    pub(super) fn new(response: Response) -> Self {
        let decoder = Decoder::new(FRAME_BYTES_MAX);
        Self { response, decoder, received_at: Instant::now(), event_started_at: None }
    }

    /// For readers that were busy.
    pub(crate) fn reset_idle_timeout(&mut self) {
        self.received_at = Instant::now();
    }

    pub(crate) fn is_drained(&self) -> bool {
        self.decoder.is_drained()
    }

    /// Cancel safe.
    pub(crate) async fn next(&mut self) -> Result<Message, Error> {
        loop {
            if let Some(message) = self.decoder.next()? {
                self.event_started_at = None;
                return Ok(message);
            }
            // Callers cancel and call again, so the last bytes count.
            let idle_end = self.received_at + IDLE_TIMEOUT;
            let end = self.event_started_at.map_or(idle_end, |start| idle_end.min(start + EVENT_TIMEOUT));
            let chunk = tokio::time::timeout_at(end, self.response.chunk()).await;
            let timed_out = || {
                if end < idle_end { Error::EventTimeout(EVENT_TIMEOUT) } else { Error::Timeout(IDLE_TIMEOUT) }
            };
            match chunk.map_err(|_| timed_out())?? {
                Some(chunk) => {
                    self.received_at = Instant::now();
                    self.event_started_at.get_or_insert(self.received_at);
                    self.decoder.push(&chunk);
                }
                None => return Err(Error::Closed),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::body::repeat;

    /// A14
    #[tokio::test(start_paused = true)]
    async fn slow_event_ends_the_stream() {
        let mut stream = Stream::new(repeat(&b"data: x\n"[..], Duration::from_secs(4)));
        let opened = Instant::now();
        assert!(matches!(stream.next().await, Err(Error::EventTimeout(_))));
        assert!(opened.elapsed() <= EVENT_TIMEOUT + IDLE_TIMEOUT);
        let mut stream = Stream::new(repeat(&b": here\n"[..], Duration::from_secs(14)));
        for _ in 0..20 {
            assert_eq!(stream.next().await.unwrap(), Message::Comment("here".into()));
        }
    }
}
