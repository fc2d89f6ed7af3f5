//! Tenant B: its work and the delay of each edit.

use std::io::Read as _;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use flate2::read::GzDecoder;
use opa_hub_loadtest::eventually::within;
use opa_hub_proto::frame::FRAME_BYTES_MAX;
use opa_hub_proto::sse::{Decoder, Message};
use reqwest::Client;
use tokio::task::JoinSet;

use super::objects::{A, B, POD, WRITE_MAX, cluster_put, policy_of_b, settings};
use super::site::{REQUEST_MAX, Site, get, in_time};
use crate::histogram::Histogram;
use crate::scenario::at_rate;
use crate::swarm::Schedule;

/// Per second. A policy edit costs two runs of OPA.
const POLICY_RATE: f64 = 2.0;
const CHANGE_RATE: f64 = 15.0;
const ARCHIVE_RATE: f64 = 15.0;

/// Later edits count as unseen.
pub(super) const LATE_MAX: Duration = Duration::from_secs(30);

/// Three heartbeats.
const STREAM_TIMEOUT: Duration = Duration::from_secs(15);
const RETRY_DELAY: Duration = Duration::from_millis(100);
const POLL_INTERVAL: Duration = Duration::from_millis(2);

pub(super) const POLICIES: &str = "policy edit until B's OPA decides by it";
const PODS: &str = "pod change until B's stream has it";
const EDITS: &str = "data edit until B's stream has it";
const ARCHIVES: &str = "B's archive";

pub(super) struct Tracker {
    pub(super) due: Schedule,
    state: Mutex<State>,
}

struct State {
    newest: u64,
    /// With the time at which the API server accepted each.
    open: Vec<(u64, Instant)>,
    seen: u64,
    delays: Histogram,
}

pub(super) struct Tenant {
    pub(super) policies: Arc<Tracker>,
    pub(super) pods: Arc<Tracker>,
    pub(super) edits: Arc<Tracker>,
    pub(super) archives: Arc<Tracker>,
    pub(super) writes: Tracker,
    pub(super) ended: Arc<AtomicU64>,
    pub(super) _reading: JoinSet<()>,
}

impl Tenant {
    pub(super) fn start(http: &Client, hub: &str, opa: &str) -> Self {
        let tracker = || Arc::new(Tracker::new());
        let (policies, pods, edits, ended) = (tracker(), tracker(), tracker(), Arc::new(AtomicU64::new(0)));
        let mut reading = JoinSet::new();
        reading.spawn(poll_policy(
            http.clone(),
            format!("{opa}/v1/data/shop/revision"),
            Arc::clone(&policies),
        ));
        let (stream_pods, stream_edits, streams_ended) =
            (Arc::clone(&pods), Arc::clone(&edits), Arc::clone(&ended));
        let (http, hub) = (http.clone(), hub.to_owned());
        reading.spawn(async move {
            loop {
                // Each stream starts with the full archive.
                _ = follow(&http, &hub, &stream_pods, &stream_edits).await;
                streams_ended.fetch_add(1, Relaxed);
                tokio::time::sleep(RETRY_DELAY).await;
            }
        });
        let (archives, writes) = (tracker(), Tracker::new());
        Self { policies, pods, edits, archives, writes, ended, _reading: reading }
    }

    pub(super) fn kinds(&self) -> [(&'static str, f64, &Tracker); 4] {
        [
            (POLICIES, POLICY_RATE, &self.policies),
            (PODS, CHANGE_RATE, &self.pods),
            (EDITS, CHANGE_RATE, &self.edits),
            (ARCHIVES, ARCHIVE_RATE, &self.archives),
        ]
    }

    pub(super) async fn work(&self, site: &Site, length: Duration) -> anyhow::Result<()> {
        let policies = at_rate(&self.policies.due, POLICY_RATE, length, async |number, _| {
            self.edit_policy(site, number).await
        });
        let pods = at_rate(&self.pods.due, CHANGE_RATE, length, async |number, _| {
            self.change_pod(site, number).await
        });
        let edits = at_rate(&self.edits.due, CHANGE_RATE, length, async |number, _| {
            self.edit_settings(site, number).await
        });
        let mut requests = JoinSet::new();
        let archives = at_rate(&self.archives.due, ARCHIVE_RATE, length, async |_, due| {
            requests.spawn(archive(site.clone(), due, Arc::clone(&self.archives)));
            Ok(())
        });
        tokio::try_join!(policies, pods, edits, archives)?;
        while requests.join_next().await.is_some() {}
        while !self.is_done() {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        Ok(())
    }

    pub(super) fn is_done(&self) -> bool {
        [&self.policies, &self.pods, &self.edits].into_iter().all(|tracker| tracker.is_done())
    }

    async fn edit_policy(&self, site: &Site, number: u64) -> anyhow::Result<()> {
        self.timed(cluster_put(&site.cluster, policy_of_b(number))).await?;
        self.policies.expect(number);
        Ok(())
    }

    async fn change_pod(&self, site: &Site, number: u64) -> anyhow::Result<()> {
        let round = number.to_string();
        self.timed(site.cluster.label_pod(B, POD, &[("round", &round)])).await?;
        self.pods.expect(number);
        Ok(())
    }

    async fn edit_settings(&self, site: &Site, number: u64) -> anyhow::Result<()> {
        self.timed(cluster_put(&site.cluster, settings(number))).await?;
        self.edits.expect(number);
        Ok(())
    }

    async fn timed(&self, write: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
        let started = Instant::now();
        in_time("a write to the API server", WRITE_MAX, write).await?;
        self.writes.record_response(started, true);
        Ok(())
    }

    pub(super) async fn wait_served(&self, site: &Site) -> anyhow::Result<()> {
        self.edit_policy(site, self.policies.due.push(Instant::now())).await?;
        self.change_pod(site, self.pods.due.push(Instant::now())).await?;
        self.edit_settings(site, self.edits.due.push(Instant::now())).await?;
        let served = within(LATE_MAX, "edits of B after the attack", async || {
            if self.is_done() { Ok(()) } else { Err("B's edits are not seen") }
        });
        let served = served.await;
        self.kinds().iter().for_each(|(_, _, tracker)| drop(tracker.drain()));
        drop(self.writes.drain());
        served.map(drop)
    }
}

async fn poll_policy(http: Client, url: String, policies: Arc<Tracker>) {
    loop {
        if !policies.is_done()
            && let Some(number) = revision(&http, &url).await
        {
            policies.arrive(number);
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

pub(super) async fn revision(http: &Client, url: &str) -> Option<u64> {
    get(http, url).await.ok()?["result"].as_str()?.parse().ok()
}

async fn follow(http: &Client, hub: &str, pods: &Tracker, edits: &Tracker) -> anyhow::Result<()> {
    let arrive = |text: &str| {
        for (mark, tracker) in [("\"round\":\"", pods), ("\"setting\":\"", edits)] {
            if let Some(number) = newest(text, mark) {
                tracker.arrive(number);
            }
        }
    };
    let mut stream = http.get(format!("{hub}/bundles/{B}/stream")).send().await?.error_for_status()?;
    // Earlier changes are in the archive.
    let request = http.post(format!("{hub}/bundles/{B}/reconcile")).body(r#"{"dirs":{}}"#);
    let archive = request.timeout(REQUEST_MAX).send().await?.error_for_status()?.bytes().await?;
    let mut text = String::new();
    GzDecoder::new(&archive[..]).read_to_string(&mut text)?;
    arrive(&text);
    let mut decoder = Decoder::new(FRAME_BYTES_MAX);
    while let Some(chunk) = tokio::time::timeout(STREAM_TIMEOUT, stream.chunk()).await?? {
        decoder.push(&chunk);
        while let Some(message) = decoder.next()? {
            if let Message::Event { data, .. } = message {
                arrive(&String::from_utf8_lossy(&data));
            }
        }
    }
    Ok(())
}

pub(super) fn newest(text: &str, mark: &str) -> Option<u64> {
    text.split(mark).skip(1).filter_map(|rest| rest.split('"').next()?.parse().ok()).max()
}

async fn archive(site: Site, due: Instant, archives: Arc<Tracker>) {
    let get = async {
        let request = site.http.get(format!("{}/bundles/{B}", site.hub)).timeout(LATE_MAX);
        anyhow::Ok(request.send().await?.error_for_status()?.bytes().await?)
    };
    let is_whole = get.await.is_ok_and(|bytes| !bytes.is_empty());
    archives.record_response(due, is_whole);
}

pub(super) async fn read_stream_of_a(http: Client, hub: String) {
    let url = format!("{hub}/bundles/{A}/stream?namespace={A}");
    loop {
        if let Ok(mut stream) = http.get(&url).send().await {
            while let Ok(Some(_)) = stream.chunk().await {}
        }
        tokio::time::sleep(RETRY_DELAY).await;
    }
}

impl Tracker {
    pub(super) fn new() -> Self {
        let state = State { newest: 0, open: Vec::new(), seen: 0, delays: Histogram::new() };
        Self { due: Schedule::default(), state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The edit may have arrived already.
    pub(super) fn expect(&self, number: u64) {
        let mut state = self.state();
        state.open.push((number, Instant::now()));
        let newest = state.newest;
        state.arrive(newest);
    }

    pub(super) fn arrive(&self, number: u64) {
        self.state().arrive(number);
    }

    pub(super) fn record_response(&self, due: Instant, is_good: bool) {
        let mut state = self.state();
        state.seen += u64::from(is_good);
        state.delays.record(due.elapsed());
    }

    pub(super) fn is_done(&self) -> bool {
        self.state().open.is_empty()
    }

    /// Resets the tracker. Open edits count with their age.
    pub(super) fn drain(&self) -> (Histogram, u64) {
        let mut state = self.state();
        for (_, since) in std::mem::take(&mut state.open) {
            state.delays.record(since.elapsed());
        }
        (std::mem::replace(&mut state.delays, Histogram::new()), std::mem::take(&mut state.seen))
    }
}

impl State {
    pub(super) fn arrive(&mut self, number: u64) {
        self.newest = self.newest.max(number);
        let before = self.open.len();
        self.open.retain(|(open, since)| {
            let is_open = *open > self.newest;
            if !is_open {
                self.delays.record(since.elapsed());
            }
            is_open
        });
        self.seen += (before - self.open.len()) as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_edit_is_seen_once_and_an_open_one_is_not() {
        let tracker = Tracker::new();
        tracker.expect(1);
        tracker.expect(2);
        tracker.arrive(2);
        tracker.arrive(2);
        // Seen before the write returned.
        tracker.arrive(3);
        tracker.expect(3);
        assert!(tracker.is_done());
        tracker.expect(4);
        assert!(!tracker.is_done());
        let (delays, seen) = tracker.drain();
        assert_eq!((delays.count(), seen, tracker.is_done()), (4, 3, true));
        assert_eq!(
            (tracker.drain().1, newest("\"round\":\"7\" \"round\":\"12\"", "\"round\":\"")),
            (0, Some(12))
        );
    }
}
