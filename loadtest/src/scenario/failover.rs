//! `failover`: time until every agent has a change after its hub fails.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use opa_hub_loadtest::eventually::{equal, eventually};
use opa_hub_loadtest::lab::blackhole_proxy::BlackholeProxy;
use opa_hub_loadtest::lab::{Agent, Delivery, Hub, Opa};
use opa_hub_loadtest::pods::Nth;
use serde_json::json;

use super::{Common, MISMATCHES, address, at_least, cluster_of, command, hub_flags};
use crate::results::{Goal, Measurement, Results};
use crate::swarm::{Schedule, Start, Swarm};
use crate::{baseline, probe};

const SETTLE: Duration = Duration::from_secs(3);
const ALL: &str = "from the fault until every agent has a change made right after it";
const AGENTS: &str = "agents";
const RECONCILES: &str = "agents that had to reconcile";
const LOADED: &str = "real agents that loaded their OPA anew";
const OTHER: &str = "another replica";
const SAME: &str = "the same hub, restarted";
const SILENT: &str = "another replica, packets dropped";
const FIELDS: &str = "--fields=metadata.labels,spec.containers[*].image,status.podIP";
/// Those of the fields that are at one place, as JSON pointers.
const POINTERS: &[&str] = &["/metadata/labels", "/status/podIP"];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// SIGKILL: the kernel closes connections.
    Killed,
    /// SIGKILL, then a start with empty memory.
    Restarted,
    /// The network loses all packets.
    Silent,
}

#[derive(Args)]
pub(crate) struct Options {
    #[arg(long, default_value_t = 10_000, value_parser = at_least::<1>)]
    agents: usize,
    /// Number of pods
    #[arg(long, default_value_t = 1000, value_parser = at_least::<1>)]
    pods: usize,
    /// Number of real agents in addition, each with an OPA
    #[arg(long, default_value_t = 3, value_parser = at_least::<1>)]
    opas: usize,
    #[command(flatten)]
    common: Common,
}

pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let Options { agents, pods, opas, common } = options;
    let settings = [("agents", agents), ("pods", pods), ("opas", opas), ("runs", common.runs)];
    let mut results = Results::new(
        "failover",
        format!("{agents} agents and {opas} real ones with {pods} pods: their hub is killed, or cut off"),
        command("failover", &settings),
        vec![
            Goal::at_most(OTHER, ALL, 2000.0),
            Goal::at_most(OTHER, RECONCILES, 0.0),
            Goal::at_most(OTHER, LOADED, 0.0),
            Goal::at_most(OTHER, MISMATCHES, 0.0),
            Goal::at_most(SAME, ALL, 5000.0),
            Goal::at_most(SAME, LOADED, 0.0),
            Goal::at_most(SAME, MISMATCHES, 0.0),
            // Agents leave a hub after 15 s of silence.
            Goal::at_most(SILENT, ALL, 20_000.0),
            Goal::at_most(SILENT, RECONCILES, 0.0),
            Goal::at_most(SILENT, LOADED, 0.0),
            Goal::at_most(SILENT, MISMATCHES, 0.0),
        ],
    );
    for run in 0..common.runs {
        eprintln!("run {} of {}", run + 1, common.runs);
        results.push(run_once(agents, pods, opas).await?, common.out.as_deref())?;
    }
    results.finish(common.out.as_deref());
    Ok(())
}

async fn run_once(agents: usize, pods: usize, opas: usize) -> anyhow::Result<Vec<Measurement>> {
    let (plane, cluster) = cluster_of(pods).await?;
    baseline::policy(&cluster).await?;
    let mut flags = hub_flags(&plane, baseline::DECISIONS);
    flags.push(FIELDS.into());
    let flags: Vec<_> = flags.iter().map(String::as_str).collect();
    let dir = plane.dir.path();
    let mut hubs = [Hub::start(dir, &flags).await?, Hub::start(dir, &flags).await?];
    let hot = Nth(0);
    let input = probe::input(hot);
    let mut measured = Vec::new();
    for (subject, fault) in [(OTHER, Fault::Killed), (SAME, Fault::Restarted), (SILENT, Fault::Silent)] {
        let [first, second] = &mut hubs;
        if first.process.is_none() {
            first.spawn()?;
            first.wait_ready().await?;
        }
        let proxy = BlackholeProxy::start(address(first)?.to_string()).await?;
        let mut hub_urls = match fault {
            Fault::Silent => vec![format!("http://127.0.0.1:{}", proxy.port)],
            Fault::Killed | Fault::Restarted => vec![first.url.clone()],
        };
        if fault != Fault::Restarted {
            hub_urls.push(second.url.clone());
        }
        let urls: Vec<_> = hub_urls.iter().map(String::as_str).collect();
        let mut real = Vec::new();
        for _ in 0..opas {
            let opa = Opa::start(&plane.assets, dir, None, &[]).await?;
            let agent = Agent::start(dir, &Agent::address()?, &urls, &opa.url, Delivery::Rest, &[])?;
            real.push((opa, agent));
        }
        for (_, agent) in &mut real {
            agent.wait_in_step().await?;
        }
        let due = Schedule::default();
        let addresses = urls.iter().map(|url| url.trim_start_matches("http://").parse::<SocketAddr>());
        let addresses: Vec<_> = addresses.collect::<Result<_, _>>()?;
        let start = Arc::new(Start::fetch(&first.url).await?);
        let agents = if fault == Fault::Silent { agents.min(proxied_agents_max()?) } else { agents };
        let mut swarm = Swarm::open(start, addresses, due.clone(), agents, &[]).await?;
        tokio::time::sleep(SETTLE).await;
        let change = async |number: u64| {
            cluster.label_pod(&hot.namespace(), &hot.name(), &[("round", &number.to_string())]).await
        };
        // Creates a history to resume from.
        let number = due.push(Instant::now());
        change(number).await?;
        swarm.reach(number, 0).await?;
        swarm.take_delays();
        let encodes = if fault == Fault::Restarted { 0 } else { reconcile_encodes(second).await? };

        let number = due.push(Instant::now());
        match fault {
            Fault::Killed | Fault::Restarted => first.kill(),
            Fault::Silent => proxy.set_open(false),
        }
        change(number).await?;
        if fault == Fault::Restarted {
            first.spawn()?;
        }
        swarm.reach(number, 0).await?;
        let delays = swarm.take_delays();
        let mut row = Measurement::new(subject);
        row.add(AGENTS, "", agents as f64);
        row.add(ALL, "ms", delays.percentile(100.0) * 1000.0);
        row.add_delays("from the fault to a change at an agent", &delays);
        row.add(RECONCILES, "", swarm.counts().reconciles.load(Relaxed) as f64);
        let survivor = if fault == Fault::Restarted { first } else { second };
        let encodes = reconcile_encodes(survivor).await? - encodes;
        row.add("answers to those encoded", "", encodes as f64);
        row.add("requests refused meanwhile", "", swarm.counts().rejected.load(Relaxed) as f64);
        let mut loads = 0;
        for (opa, agent) in &mut real {
            eventually("a real OPA decides by the change", async || {
                let found = opa.decide(probe::DECISION, &input).await.map_err(|error| error.to_string())?;
                equal(&found, &json!(number.to_string()))
            })
            .await?;
            agent.wait_in_step().await?;
            loads += agent.status().await?["done"]["snapshots"]
                .as_u64()
                .context("reading the agent's status failed: no snapshots")?;
        }
        row.add(LOADED, "", loads as f64 - opas as f64);
        row.add(MISMATCHES, "", swarm.settled_mismatches(&cluster.pods(&[]).await?, POINTERS).await as f64);
        eprintln!("  {subject}: {:.0} ms", delays.percentile(100.0) * 1000.0);
        measured.push(row);
    }
    Ok(measured)
}

async fn reconcile_encodes(hub: &Hub) -> anyhow::Result<u64> {
    hub.metric("opa_hub_reconcile_encodes_total").await
}

/// Number of agents that one process can connect through a proxy of its own, which takes three file descriptors each. A
/// quarter of the limit leaves room for connections to the next hub.
fn proxied_agents_max() -> anyhow::Result<usize> {
    let (limit, _) = rlimit::Resource::NOFILE.get().context("reading the limit of open files failed")?;
    Ok(usize::try_from(limit / 4)?)
}
