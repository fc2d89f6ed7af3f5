//! Real OPAs that are asked for a decision, again and again, which shows the change that they have: from the moment that it
//! was due to the decision.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use opa_hub_loadtest::lab::http;
use opa_hub_loadtest::pods::Nth;
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;

use crate::histogram::Histogram;

/// Between two questions, while there is something to wait for.
const LOOK: Duration = Duration::from_millis(1);

/// Rules that decide by a pod's labels, for the namespace and the name in their input.
pub(crate) const RULE: &str = "package load

round := data.kubernetes.pods[input.namespace][input.name].metadata.labels.round

app := data.kubernetes.pods[input.namespace][input.name].metadata.labels.app
";
/// Fields that these rules read, as JSON pointers into a pod.
pub(crate) const READS: &[&str] = &["/metadata/labels/round", "/metadata/labels/app"];
/// Where that rule is asked for.
pub(crate) const DECISION: &str = "/load/round";

/// The input for a pod.
pub(crate) fn input(nth: Nth) -> Value {
    json!({ "namespace": nth.namespace(), "name": nth.name() })
}

/// Asks OPAs to decide by one pod's label.
pub(crate) struct Probes {
    /// Each is told the changes of that pod, and when they were due.
    wanted: Vec<UnboundedSender<(u64, Instant)>>,
    _asking: JoinSet<()>,
    pub(crate) delays: Arc<Histogram>,
    held: Arc<Vec<AtomicU64>>,
}

impl Probes {
    /// Of the OPAs at these addresses, by this pod.
    pub(crate) fn start(opas: &[String], nth: Nth) -> anyhow::Result<Self> {
        let body = json!({ "input": input(nth) }).to_string();
        let mut wanted = Vec::new();
        let (delays, mut asking) = (Arc::new(Histogram::new()), JoinSet::new());
        let held: Arc<Vec<AtomicU64>> = Arc::new(opas.iter().map(|_| 0.into()).collect());
        for (at, opa) in opas.iter().enumerate() {
            let (url, http, body) = (format!("{opa}/v1/data{DECISION}"), http()?, body.clone());
            let (out, mut news) = unbounded_channel();
            wanted.push(out);
            let (delays, held) = (Arc::clone(&delays), Arc::clone(&held));
            asking.spawn(async move {
                while let Some(first) = news.recv().await {
                    let mut due: Vec<(u64, Instant)> = vec![first];
                    while !due.is_empty() {
                        while let Ok(next) = news.try_recv() {
                            due.push(next);
                        }
                        let found = ask(&http, &url, body.clone()).await;
                        due.retain(|(number, at)| {
                            let is_open = found.is_none_or(|found| found < *number);
                            if !is_open {
                                delays.record(at.elapsed());
                            }
                            is_open
                        });
                        held[at].store(found.unwrap_or(0), Relaxed);
                        tokio::time::sleep(LOOK).await;
                    }
                }
            });
        }
        Ok(Self { wanted, _asking: asking, delays, held })
    }

    /// The pod has the change `number` from now on, which was due then.
    pub(crate) fn expect(&self, number: u64, due: Instant) {
        self.wanted.iter().for_each(|wanted| _ = wanted.send((number, due)));
    }

    /// Whether every OPA has the change `number`.
    pub(crate) fn have(&self, number: u64) -> bool {
        self.held.iter().all(|held| held.load(Relaxed) >= number)
    }
}

async fn ask(http: &reqwest::Client, url: &str, input: String) -> Option<u64> {
    let answer = http.post(url).body(input).send().await.ok()?;
    let answer: Value = serde_json::from_slice(&answer.bytes().await.ok()?).ok()?;
    answer["result"].as_str()?.parse().ok()
}
