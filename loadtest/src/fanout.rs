//! `fanout`: one change, many agents. What a delivery costs the hub, beside what it costs a thread that only writes.

mod raw;
mod swarm;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use opa_hub_loadtest::eventually::eventually;
use opa_hub_loadtest::lab::process::{Process, Usage};
use opa_hub_loadtest::lab::{Hub, free_port};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use self::swarm::{Round, Swarm};

pub(crate) use self::raw::serve as serve_raw;

/// Between two changes: everybody is idle again.
const PAUSE: Duration = Duration::from_millis(300);

/// What is measured, and where the results go.
#[derive(Args)]
pub(crate) struct Options {
    /// Agents, each with a stream of its own
    #[arg(long, default_value_t = 10_000)]
    agents: usize,
    /// Changes, one after the other
    #[arg(long, default_value_t = 20)]
    rounds: usize,
    /// Write fanout.json and fanout.md here
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// What came of one server.
struct Measured {
    name: &'static str,
    /// All deliveries of all rounds, sorted.
    delays: Vec<Duration>,
    /// The median of the rounds' last.
    all: Duration,
    cpu_a_delivery: Duration,
    bytes_an_agent: u64,
}

pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    rlimit::increase_nofile_limit(u64::MAX).context("the limit of open files")?;
    let dir = tempfile::tempdir()?;
    let (ours, frame_bytes, encodes) = ours(dir.path(), &options).await?;
    let raw = raw(dir.path(), &options, frame_bytes).await?;
    let table = table(&options, &ours, &raw, frame_bytes, encodes);
    println!("{table}");
    if let Some(out) = &options.out {
        std::fs::create_dir_all(out)?;
        std::fs::write(out.join("fanout.md"), &table)?;
        let results = json!({
            "agents": options.agents, "rounds": options.rounds, "frameBytes": frame_bytes, "encodes": encodes,
            "servers": [results(&ours), results(&raw)],
        });
        std::fs::write(out.join("fanout.json"), serde_json::to_string_pretty(&results)? + "\n")?;
        println!("written to {}", out.display());
    }
    Ok(())
}

/// A hub over a folder with one pod, whose label changes.
async fn ours(dir: &std::path::Path, options: &Options) -> anyhow::Result<(Measured, usize, u64)> {
    let manifests = dir.join("manifests");
    std::fs::create_dir_all(&manifests)?;
    let change = |round: usize| {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": "p", "namespace": "a", "labels": { "round": format!("{round:06}") } },
        });
        // As an editor does it, so that nobody reads half a file.
        std::fs::write(dir.join("draft"), pod.to_string())?;
        std::fs::rename(dir.join("draft"), manifests.join("pod.json"))
    };
    change(0)?;
    let folder = manifests.display().to_string();
    let hub = Hub::start(dir, &["--manifests", &folder, "--replicate=v1/pods", "--log-level=warn"]).await?;
    let process = hub.process.as_ref().context("the hub runs")?;
    let address: SocketAddr = hub.url.trim_start_matches("http://").parse()?;
    let before = process.usage()?;
    let request = "GET /bundles/main/stream HTTP/1.1\r\nhost: hub\r\n\r\n".to_owned();
    let mut swarm = Swarm::open(address, request, options.agents).await?;
    eventually("every stream is open", async || {
        let open = hub.metric("opa_hub_agents").await.map_err(|error| error.to_string())?;
        if open == options.agents as u64 { Ok(()) } else { Err(format!("{open} are")) }
    })
    .await?;
    tokio::time::sleep(PAUSE * 10).await;
    let idle = process.usage()?;
    eprintln!("ours: {} agents", options.agents);
    let encodes = hub.metric("opa_hub_frame_encodes_total").await?;
    let mut next = 0;
    let rounds = rounds(&mut swarm, options.rounds, process, async || {
        next += 1;
        change(next).map_err(Into::into)
    });
    let (rounds, cpu) = rounds.await?;
    let encodes = hub.metric("opa_hub_frame_encodes_total").await? - encodes;
    // What one frame is on the wire.
    let frame = frame_bytes(&hub, &change, options.rounds + 1).await?;
    Ok((measured("opa-hub", rounds, cpu, before, idle, options), frame, encodes))
}

/// Bytes of the event of one more change.
async fn frame_bytes(
    hub: &Hub,
    change: &impl Fn(usize) -> std::io::Result<()>,
    round: usize,
) -> anyhow::Result<usize> {
    let address: SocketAddr = hub.url.trim_start_matches("http://").parse()?;
    let mut tcp = tokio::net::TcpStream::connect(address).await?;
    tcp.write_all(b"GET /bundles/main/stream HTTP/1.1\r\nhost: hub\r\n\r\n").await?;
    let mut text = Vec::new();
    let mut bytes = [0; 4096];
    // Head and greeting, which end in empty lines, then the event.
    let ends = |text: &[u8]| text.windows(2).filter(|two| two == b"\n\n").count();
    while ends(&text) < 1 {
        let length = tcp.read(&mut bytes).await?;
        text.extend_from_slice(&bytes[..length]);
    }
    change(round)?;
    text.clear();
    while ends(&text) < 1 {
        let length = tcp.read(&mut bytes).await?;
        text.extend_from_slice(&bytes[..length]);
    }
    Ok(text.len())
}

/// A thread that writes as many bytes to as many sockets.
async fn raw(dir: &std::path::Path, options: &Options, bytes: usize) -> anyhow::Result<Measured> {
    let address: SocketAddr = format!("127.0.0.1:{}", free_port()?).parse()?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["raw", "--listen", &address.to_string(), "--bytes", &bytes.to_string()]);
    let mut process = Process::start("raw", dir, &mut command)?;
    process.until("raw listens", async || std::net::TcpStream::connect(address).map(drop)).await?;
    let before = process.usage()?;
    let request = "GET / HTTP/1.1\r\nhost: raw\r\n\r\n".to_owned();
    let mut swarm = Swarm::open(address, request, options.agents).await?;
    tokio::time::sleep(PAUSE * 10).await;
    let idle = process.usage()?;
    eprintln!("raw: {} readers", options.agents);
    let go = async || {
        let mut tcp = tokio::net::TcpStream::connect(address).await?;
        tcp.write_all(raw::GO).await?;
        anyhow::Ok(())
    };
    let (rounds, cpu) = rounds(&mut swarm, options.rounds, &process, go).await?;
    Ok(measured("raw", rounds, cpu, before, idle, options))
}

async fn rounds(
    swarm: &mut Swarm,
    count: usize,
    process: &Process,
    mut change: impl AsyncFnMut() -> anyhow::Result<()>,
) -> anyhow::Result<(Vec<Round>, Duration)> {
    let mut rounds = Vec::new();
    let before = process.usage()?.cpu;
    let started = Instant::now();
    for _ in 0..count {
        change().await?;
        rounds.push(swarm.round().await?);
        tokio::time::sleep(PAUSE).await;
    }
    eprintln!("  {count} changes in {:.1} s", started.elapsed().as_secs_f64());
    Ok((rounds, process.usage()?.cpu.saturating_sub(before)))
}

fn measured(
    name: &'static str,
    rounds: Vec<Round>,
    cpu: Duration,
    before: Usage,
    idle: Usage,
    options: &Options,
) -> Measured {
    let deliveries = u32::try_from(options.agents * options.rounds).unwrap_or(u32::MAX).max(1);
    let mut last: Vec<_> = rounds.iter().filter_map(|round| round.delays.last().copied()).collect();
    last.sort_unstable();
    let mut delays: Vec<_> = rounds.into_iter().flat_map(|round| round.delays).collect();
    delays.sort_unstable();
    Measured {
        name,
        delays,
        all: last[last.len() / 2],
        cpu_a_delivery: cpu / deliveries,
        bytes_an_agent: idle.rss.saturating_sub(before.rss) / options.agents as u64,
    }
}

impl Measured {
    fn percentile(&self, percent: usize) -> f64 {
        let at = (self.delays.len() * percent / 100).min(self.delays.len() - 1);
        self.delays[at].as_secs_f64() * 1000.0
    }

    fn micros(&self) -> f64 {
        self.cpu_a_delivery.as_secs_f64() * 1e6
    }
}

fn results(of: &Measured) -> Value {
    json!({
        "name": of.name, "p50Ms": of.percentile(50), "p99Ms": of.percentile(99), "maxMs": of.percentile(100),
        "allMs": of.all.as_secs_f64() * 1000.0, "cpuMicrosADelivery": of.micros(), "rssBytesAnAgent": of.bytes_an_agent,
    })
}

fn table(options: &Options, ours: &Measured, raw: &Measured, frame_bytes: usize, encodes: u64) -> String {
    let row = |name: &str, value: &dyn Fn(&Measured) -> f64, unit: &str| {
        let (ours, raw) = (value(ours), value(raw));
        format!(
            "| {name} | {ours:.1} {unit} | {raw:.1} {unit} | {:.2} |\n",
            ours / raw.max(f64::MIN_POSITIVE)
        )
    };
    let delay = "at the last agent, median of the changes";
    let rows = [
        row("change at the median agent", &|of| of.percentile(50), "ms"),
        row("99th percentile", &|of| of.percentile(99), "ms"),
        row(delay, &|of| of.all.as_secs_f64() * 1000.0, "ms"),
        row("server CPU a delivery", &Measured::micros, "µs"),
    ];
    format!(
        "{} agents, {} changes of {frame_bytes} bytes each: `opa-hub-loadtest fanout --agents {} --rounds {}`\n\n\
         | from the first arrival anywhere | opa-hub | raw | ratio |\n|---|--:|--:|--:|\n{}\
         | resident memory an idle agent | {} B | {} B | |\n| frames encoded | {encodes} | | |\n",
        options.agents,
        options.rounds,
        options.agents,
        options.rounds,
        rows.concat(),
        ours.bytes_an_agent,
        raw.bytes_an_agent
    )
}
