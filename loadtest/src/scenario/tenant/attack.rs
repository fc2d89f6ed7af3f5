use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use opa_hub_loadtest::cluster::DATA;
use opa_hub_loadtest::lab::http;
use reqwest::{RequestBuilder, StatusCode};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::objects::{
    A, ATTACK, MAX_BYTES, Put, SEIZED, TESTS, attacking_policy, definitions, key, limit_a,
    multiplying_fields, slow_tests,
};
use super::site::{REQUEST_MAX, Site, runs_of_opa};

/// From the last step.
const TRACE_MAX: Duration = Duration::from_secs(30);

/// Far above what a phase has time for.
const STEPS_MAX: u64 = 10_000;
const WRITERS: usize = 16;
const REFUSED: usize = 500;

/// etcd accepts 70,000 keys of three letters.
const WIDE_KEYS: usize = 60_000;
const RECONCILES_AT_ONCE: u64 = 60;
const RECONCILES_MAX: u64 = 12_000;
const NAMESPACES_AT_ONCE: u64 = 50;
const NAMESPACES_MAX: u64 = 2000;
/// Leaves the cores to the hub between volleys.
pub(super) const VOLLEY_PAUSE: Duration = Duration::from_millis(100);
const SILENT: usize = 500;
const PARTIAL_REQUESTS: [&str; 2] = [
    "GET /bundles/tenant-b/stream HTTP/1.1\r\nhost: hub\r\n",
    "POST /bundles/tenant-a/reconcile?namespace=tenant-a HTTP/1.1\r\nhost: hub\r\ncontent-length: 1000000\r\n\r\n{",
];

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Attack {
    /// Fields multiply by six at each of twelve levels.
    Fields,
    /// `opa check` accepts it, `opa build --target=plan` rejects it.
    Plan,
    /// Tests that run into their timeout.
    Tests,
    /// A rule whose type is a union of 30,000 objects.
    Definitions,
    /// Seems to read a resource; then corrected.
    Typo,
    /// Data below a package, and edits of many policies.
    Refused,
    /// Reconcile requests, each different.
    Reconciles,
    Namespaces,
    /// Incomplete headers or bodies.
    Silent,
    /// All keys of a ConfigMap change.
    Wide,
    /// With and without `maxBytes`.
    Document,
}

pub(super) const ATTACKS: [(&str, Attack); 11] = [
    ("fields that multiply", Attack::Fields),
    ("no plan", Attack::Plan),
    ("slow tests", Attack::Tests),
    ("30,000 definitions", Attack::Definitions),
    ("a typo for a resource", Attack::Typo),
    ("refused data, 500 policies", Attack::Refused),
    ("reconcile flood", Attack::Reconciles),
    ("invented namespaces", Attack::Namespaces),
    ("silent connections", Attack::Silent),
    ("60,000 keys rewritten", Attack::Wide),
    ("a document that changes", Attack::Document),
];

#[derive(Default)]
pub(super) struct Counts {
    pub(super) steps: AtomicU64,
    pub(super) hits: AtomicU64,
    pub(super) closed: AtomicU64,
}

impl Counts {
    fn step(&self) {
        self.steps.fetch_add(1, Relaxed);
    }

    fn hit(&self) {
        self.hits.fetch_add(1, Relaxed);
    }
}

impl Attack {
    /// ConfigMaps load the API server even if the hub does not select them.
    pub(super) fn writes(self) -> bool {
        !matches!(self, Self::Reconciles | Self::Namespaces | Self::Silent | Self::Document)
    }

    /// Ends at most [`TRACE_MAX`] after `until`.
    pub(super) async fn run(self, site: Site, until: Instant, counts: Arc<Counts>) -> anyhow::Result<()> {
        match self {
            Self::Refused => refuse(&site, until, &counts).await,
            Self::Silent => {
                open_silent_connections(&site, until, &counts).await;
                Ok(())
            }
            Self::Document => change_document(&site, until, &counts).await,
            Self::Reconciles => {
                let client = http()?;
                let url = format!("{}/bundles/{A}/reconcile?namespace={A}", site.hub);
                let request = move |number: u64| {
                    // For an unknown digest, the response contains everything.
                    let dirs = BTreeMap::from([(format!("/flood/{number}"), format!("{number:032x}"))]);
                    client.post(&url).body(json!({ "dirs": dirs }).to_string())
                };
                flood(until, &counts, RECONCILES_AT_ONCE, RECONCILES_MAX, request).await;
                Ok(())
            }
            Self::Namespaces => {
                let client = http()?;
                let url = format!("{}/bundles/{A}?namespace=invented", site.hub);
                let request = move |number: u64| client.get(format!("{url}-{number}"));
                flood(until, &counts, NAMESPACES_AT_ONCE, NAMESPACES_MAX, request).await;
                Ok(())
            }
            _ => self.edit(&site, until, &counts).await,
        }
    }

    async fn edit(self, site: &Site, until: Instant, counts: &Counts) -> anyhow::Result<()> {
        let mut before = BTreeMap::new();
        for step in 0..STEPS_MAX {
            let now = Instant::now();
            if now < until {
                for put in self.configmaps(step) {
                    site.put(put).await?;
                }
                counts.step();
            } else if !site.is_selected || counts.hits.load(Relaxed) > 0 || now > until + TRACE_MAX {
                break;
            }
            tokio::time::sleep(self.pause()).await;
            let runs = runs_of_opa(site.process);
            let is_at_work = match self {
                Self::Tests => runs.values().any(|command| command == "test"),
                // B's runs of OPA end before the next sample.
                Self::Definitions => runs.keys().any(|run| before.contains_key(run)),
                _ => false,
            };
            if is_at_work || site.has_verdict(self.configmap()).await {
                counts.hit();
            }
            before = runs;
        }
        Ok(())
    }

    fn pause(self) -> Duration {
        match self {
            Self::Definitions | Self::Typo | Self::Wide => Duration::from_secs(1),
            _ => Duration::from_millis(500),
        }
    }

    pub(super) fn configmap(self) -> &'static str {
        match self {
            Self::Fields => "fields",
            Self::Plan => "entry",
            Self::Tests => "tests",
            Self::Definitions => "definitions",
            Self::Typo => "typo",
            _ => "wide",
        }
    }

    pub(super) fn configmaps(self, step: u64) -> Vec<Put> {
        let name = self.configmap();
        match self {
            Self::Fields => vec![attacking_policy(name, step, &multiplying_fields())],
            Self::Plan => {
                let roles = "package roles_of\n\nroles[x].q := 1 if {some x in [\"foo\"]}\n\n\
                             roles[x].r := 2 if {some x in [\"foo\"]; roles[\"foo\"].q}\n";
                let dynamic = "package dynamic\n\ndecision := data[input.name].p0\n";
                vec![
                    attacking_policy(name, step, "package opahub_entry\n\np0 := 1\n"),
                    attacking_policy("roles", step, roles),
                    attacking_policy("dynamic", step, dynamic),
                ]
            }
            Self::Tests => {
                let mut put = attacking_policy(name, step, "package slow\n\nx := 1\n");
                put.labels.push(TESTS);
                put.data.insert("slow_test.rego".into(), slow_tests());
                vec![put]
            }
            Self::Definitions => vec![attacking_policy(name, step, &definitions())],
            Self::Typo => {
                let helper = "exempt contains \"admin\"\n\n";
                let correction = if step.is_multiple_of(2) { "" } else { helper };
                let deny = "deny contains \"x\" if not data.kubernetes.admission.exempt[input.name]\n";
                vec![attacking_policy(
                    name,
                    step,
                    &format!("package kubernetes.admission\n\n{correction}{deny}"),
                )]
            }
            _ => {
                let first = if step.is_multiple_of(2) { 0 } else { WIDE_KEYS };
                let keys = (first..first + WIDE_KEYS).map(|number| (key(number), "{}".to_owned()));
                let labels = vec![DATA, ATTACK];
                vec![Put { namespace: A, name: name.to_owned(), labels, data: keys.collect() }]
            }
        }
    }
}

async fn refuse(site: &Site, until: Instant, counts: &Counts) -> anyhow::Result<()> {
    let owner = attacking_policy("owner", 0, &format!("package {SEIZED}\n\nx := 1\n"));
    site.put(owner).await?;
    counts.step();
    // Otherwise the data would own the package's path.
    while site.is_selected && Instant::now() < until && !site.has_verdict("owner").await {
        tokio::time::sleep(VOLLEY_PAUSE).await;
    }
    let data = |index| Put {
        namespace: SEIZED,
        name: format!("data-{index}"),
        labels: vec![DATA, ATTACK],
        data: BTreeMap::from([("k".to_owned(), json!({ "at": index }).to_string())]),
    };
    put_all(site, until, counts, (0..REFUSED).map(data).collect()).await?;
    for round in 0..STEPS_MAX {
        if Instant::now() >= until {
            break;
        }
        let policy = |index| {
            attacking_policy(
                &format!("policy-{index}"),
                round,
                &format!("package refused_p{index}\n\nx := {round}\n"),
            )
        };
        put_all(site, until, counts, (0..REFUSED).map(policy).collect()).await?;
    }
    while site.is_selected && Instant::now() < until + TRACE_MAX {
        let bundle = site.bundle_of_a().await.unwrap_or_default();
        let verdicts = bundle["verdicts"].as_object().into_iter().flatten();
        let refused =
            verdicts.filter(|(key, verdict)| key.starts_with(SEIZED) && verdict["status"] == "error");
        let refused = refused.count() as u64;
        counts.hits.store(refused, Relaxed);
        if refused > 0 {
            break;
        }
        tokio::time::sleep(VOLLEY_PAUSE).await;
    }
    Ok(())
}

async fn put_all(site: &Site, until: Instant, counts: &Counts, puts: Vec<Put>) -> anyhow::Result<()> {
    let mut writing = JoinSet::new();
    for put in puts {
        if Instant::now() >= until {
            break;
        }
        if writing.len() >= WRITERS
            && let Some(written) = writing.join_next().await
        {
            written??;
        }
        let site = site.clone();
        writing.spawn(async move { site.put(put).await });
        counts.step();
    }
    while let Some(written) = writing.join_next().await {
        written??;
    }
    Ok(())
}

/// A response or a closed connection is a trace.
async fn flood(
    until: Instant,
    counts: &Counts,
    at_once: u64,
    max: u64,
    request: impl Fn(u64) -> RequestBuilder + Send,
) {
    let mut next = 0;
    while next < max && Instant::now() < until {
        let mut requests = JoinSet::new();
        for number in next..next + at_once {
            let request = request(number).timeout(REQUEST_MAX);
            // The hub builds the body even if unread.
            requests.spawn(async move { request.send().await.map(|response| response.status()) });
            counts.step();
        }
        next += at_once;
        while let Some(finished) = requests.join_next().await {
            let (is_trace, is_closed) = match finished {
                Ok(Ok(status)) => {
                    let refusals = [StatusCode::SERVICE_UNAVAILABLE, StatusCode::TOO_MANY_REQUESTS];
                    (true, refusals.contains(&status))
                }
                Ok(Err(error)) => {
                    let is_closed = !error.is_timeout() && !error.is_connect();
                    (is_closed, is_closed)
                }
                Err(_aborted) => (false, false),
            };
            counts.hits.fetch_add(u64::from(is_trace), Relaxed);
            counts.closed.fetch_add(u64::from(is_closed), Relaxed);
        }
        tokio::time::sleep(VOLLEY_PAUSE).await;
    }
}

/// The trace is the number of the hub's open files.
async fn open_silent_connections(site: &Site, until: Instant, counts: &Counts) {
    let files = || std::fs::read_dir(format!("/proc/{}/fd", site.process)).map_or(0, Iterator::count);
    let before = files();
    let mut open = Vec::new();
    for partial in PARTIAL_REQUESTS.into_iter().cycle().take(SILENT) {
        if Instant::now() >= until {
            break;
        }
        counts.step();
        let begin = async {
            let mut tcp = TcpStream::connect(site.hub.trim_start_matches("http://")).await?;
            tcp.write_all(partial.as_bytes()).await?;
            Ok::<_, std::io::Error>(tcp)
        };
        match tokio::time::timeout(REQUEST_MAX, begin).await {
            Ok(Ok(tcp)) => open.push(tcp),
            _ => _ = counts.closed.fetch_add(1, Relaxed),
        }
    }
    let first = files();
    tokio::time::sleep_until(until.into()).await;
    let opened = first.max(files()).saturating_sub(before) as u64;
    // A response such as 408 ends a connection too.
    let is_open = |tcp: &&TcpStream| {
        let read = tcp.try_read(&mut [0]);
        read.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    };
    let closed = open.len() - open.iter().filter(is_open).count();
    let closed = counts.closed.fetch_add(closed as u64, Relaxed) + closed as u64;
    counts.hits.store(opened.max(closed), Relaxed);
}

/// The trace is a new publication of the bundle.
async fn change_document(site: &Site, until: Instant, counts: &Counts) -> anyhow::Result<()> {
    let published = async || site.bundle_of_a().await.ok()?.get("publishedUnixSeconds").cloned();
    let mut before = published().await;
    for step in 0..STEPS_MAX {
        let now = Instant::now();
        if now > until && (counts.hits.load(Relaxed) > 0 || now > until + TRACE_MAX) {
            break;
        }
        let limit = if step.is_multiple_of(2) { Value::Null } else { json!(MAX_BYTES) };
        limit_a(&site.cluster, &limit).await?;
        counts.step();
        tokio::time::sleep(Duration::from_millis(500)).await;
        let now = published().await;
        if before.as_ref().zip(now.as_ref()).is_some_and(|(before, now)| before != now) {
            counts.hit();
        }
        before = now.or(before);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const CONFIGMAP_BYTES_MAX: usize = 1 << 20;
    const OBJECT_BYTES_MAX: usize = 3 << 19;

    #[test]
    fn configmaps_of_attacks_fit() {
        for (name, attack) in ATTACKS {
            for put in attack.configmaps(1) {
                let bytes: usize = put.data.values().map(String::len).sum();
                assert!(bytes < CONFIGMAP_BYTES_MAX, "{name}: {bytes} bytes");
                // Managed fields repeat the key.
                let bytes: usize = put.data.iter().map(|(key, value)| 2 * key.len() + value.len() + 14).sum();
                assert!(bytes < OBJECT_BYTES_MAX, "{name}: {bytes} bytes in etcd");
                assert!(put.labels.contains(&ATTACK), "{name}: {} would stay", put.name);
            }
        }
    }

    #[test]
    fn each_step_changes_every_key() {
        let keys = |step| Attack::Wide.configmaps(step).remove(0).data.into_keys().collect::<BTreeSet<_>>();
        assert_eq!(keys(0).len(), WIDE_KEYS);
        assert!(keys(0).is_disjoint(&keys(1)));
        assert_eq!(keys(0), keys(2));
    }
}
