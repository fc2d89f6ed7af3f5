//! Selection of the hub.

use std::time::Duration;

use reqwest::Url;

use crate::backoff::Backoff;

/// Spreads ten thousand reconnects over seconds.
pub(super) const BACKOFF_MAX: Duration = Duration::from_secs(5);

pub(super) struct Failover {
    urls: Vec<Url>,
    index: usize,
    /// Peer of a hub that shut down.
    peer: Option<Url>,
    backoff: Backoff,
}

impl Failover {
    /// The first hub is random, so that agents spread.
    pub(super) fn new(urls: Vec<Url>) -> Self {
        let index = fastrand::usize(..urls.len());
        Self { urls, index, peer: None, backoff: Backoff::new(BACKOFF_MAX) }
    }

    pub(super) fn len(&self) -> usize {
        self.urls.len()
    }

    pub(super) fn current(&self) -> &Url {
        self.peer.as_ref().unwrap_or(&self.urls[self.index])
    }

    pub(super) fn next_hub(&mut self) {
        if self.peer.take().is_none() {
            self.index = self.index_after(1);
        }
    }

    pub(super) fn index_after(&self, steps: usize) -> usize {
        (self.index + steps) % self.urls.len()
    }

    pub(super) fn url(&self, index: usize) -> &Url {
        &self.urls[index]
    }

    pub(super) fn select(&mut self, index: usize) {
        (self.index, self.peer) = (index, None);
    }

    /// Without peers, moves to the next hub.
    pub(super) fn move_to_peer(&mut self, mut peers: Vec<Url>) {
        // Connections with TLS stay with TLS.
        peers.retain(|peer| peer.scheme() == self.current().scheme());
        self.next_hub();
        if !peers.is_empty() {
            self.peer = Some(peers.swap_remove(fastrand::usize(..peers.len())));
        }
    }

    pub(super) fn reset_backoff(&mut self) {
        self.backoff.reset();
    }

    pub(super) async fn back_off(&mut self) {
        self.backoff.sleep().await;
    }
}
