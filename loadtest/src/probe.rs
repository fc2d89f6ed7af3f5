//! Probes of real OPAs: the time from a due change to its decision.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use opa_hub_loadtest::lab::http;
use opa_hub_loadtest::pods::Nth;
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;

use crate::histogram::Histogram;

const QUERY_INTERVAL: Duration = Duration::from_millis(1);

pub(crate) const RULE: &str = "package load

round := data.kubernetes.pods[input.namespace][input.name].metadata.labels.round

app := data.kubernetes.pods[input.namespace][input.name].metadata.labels.app
";
/// JSON pointers into a pod.
pub(crate) const READS: &[&str] = &["/metadata/labels/round", "/metadata/labels/app"];
pub(crate) const DECISION: &str = "/load/round";

pub(crate) fn input(nth: Nth) -> Value {
    json!({ "namespace": nth.namespace(), "name": nth.name() })
}

pub(crate) struct Probes {
    queues: Vec<UnboundedSender<(u64, Instant)>>,
    _tasks: JoinSet<()>,
    pub(crate) delays: Arc<Histogram>,
    newest: Arc<Vec<AtomicU64>>,
}

impl Probes {
    pub(crate) fn start(opas: &[String], nth: Nth) -> anyhow::Result<Self> {
        let body = json!({ "input": input(nth) }).to_string();
        let mut queues = Vec::new();
        let (delays, mut tasks) = (Arc::new(Histogram::new()), JoinSet::new());
        let newest: Arc<Vec<AtomicU64>> = Arc::new(opas.iter().map(|_| 0.into()).collect());
        for (index, opa) in opas.iter().enumerate() {
            let (url, http, body) = (format!("{opa}/v1/data{DECISION}"), http()?, body.clone());
            let (queue, mut expected) = unbounded_channel();
            queues.push(queue);
            let (delays, newest) = (Arc::clone(&delays), Arc::clone(&newest));
            tasks.spawn(async move {
                while let Some(first) = expected.recv().await {
                    let mut open: Vec<(u64, Instant)> = vec![first];
                    while !open.is_empty() {
                        while let Ok(next) = expected.try_recv() {
                            open.push(next);
                        }
                        let found = query_round(&http, &url, body.clone()).await;
                        open.retain(|(number, due)| {
                            let is_open = found.is_none_or(|found| found < *number);
                            if !is_open {
                                delays.record(due.elapsed());
                            }
                            is_open
                        });
                        newest[index].store(found.unwrap_or(0), Relaxed);
                        tokio::time::sleep(QUERY_INTERVAL).await;
                    }
                }
            });
        }
        Ok(Self { queues, _tasks: tasks, delays, newest })
    }

    pub(crate) fn expect(&self, number: u64, due: Instant) {
        self.queues.iter().for_each(|queue| _ = queue.send((number, due)));
    }

    pub(crate) fn all_have(&self, number: u64) -> bool {
        self.newest.iter().all(|newest| newest.load(Relaxed) >= number)
    }
}

async fn query_round(http: &reqwest::Client, url: &str, input: String) -> Option<u64> {
    let response = http.post(url).body(input).send().await.ok()?;
    let response: Value = serde_json::from_slice(&response.bytes().await.ok()?).ok()?;
    response["result"].as_str()?.parse().ok()
}
