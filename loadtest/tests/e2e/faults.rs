//! Fault test with real hub, agent and OPA processes. A seed determines kills, suspensions and disconnects while objects
//! and policies change. Each OPA ends with the folder's content and never decides on partial data.
//! `OPA_HUB_AGENT_FAULT_SEED` and `OPA_HUB_AGENT_FAULT_STEPS` select another run.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use fastrand::Rng;
use flate2::read::GzDecoder;
use opa_hub_loadtest::cluster::{DATA, POLICY};
use opa_hub_loadtest::eventually::{equal, eventually};
use opa_hub_loadtest::lab::{Agent, Delivery, Hub, Opa, assets, http};
use serde_json::{Map, Value, json};

use crate::proxy::{Direction, Proxy, Then};
use crate::world::{wake, without_empty_maps, write_list};

/// Default number of steps: every event twice.
const STEPS: usize = 2 * EVENTS.len();
const SEED: u64 = 17;
/// Number of steps between comparisons with the folder.
const CHECK_AFTER: usize = 4;
/// Number of permanent pods. Their load takes several requests.
const BASE: usize = 400;
/// Size of a pod's field, in bytes, so that frames contain edits.
const PADDING: usize = 900;
/// Request bytes before a load is interrupted: less than a full load.
const LOAD_BYTES: usize = BASE * PADDING / 2;
/// Pause between queries, which leaves CPU time on two cores.
const ASK_PAUSE: Duration = Duration::from_millis(2);

/// Rules defined on any data, which count all base pods only on complete data.
const COUNT: &str = "package count

base := count([1 |
	some name, pod in data.kubernetes.pods[\"big\"]
	startswith(name, \"base-\")
	pod.metadata.labels.app != \"\"
	pod.metadata.labels.round != \"\"
	pod.metadata.annotations != {}
	pod.spec.text != \"\"
])
";

/// Fields read only by the edited policy.
const FIELDS: [(&str, &str); 3] = [("spec", "nodeName"), ("status", "podIP"), ("status", "phase")];

const EVENTS: [&str; 16] = [
    "agents killed",
    "agents killed in a request",
    "answers of OPA lost",
    "connections severed",
    "frames held back",
    "hubs killed",
    "maps changed",
    "modules added or removed",
    "objects added or removed",
    "objects changed",
    "OPAs killed after a change",
    "OPAs killed in a load",
    "OPAs killed without a hub",
    "OPAs suspended",
    "policies edited",
    "policies rejected",
];

/// Agent counters, each of which must increase.
const DONE: [&str; 4] = ["frames", "reconciles", "restores", "snapshots"];

/// The folder, and the content expected in OPAs.
struct Folder {
    dir: PathBuf,
    pods: BTreeMap<String, Value>,
    maps: BTreeMap<String, usize>,
    modules: BTreeMap<String, usize>,
    /// Edited policy's version.
    version: usize,
    /// Fields that this version reads.
    reads: [bool; FIELDS.len()],
    /// Whether the folder has a later, invalid text of this policy.
    is_broken: bool,
}

impl Folder {
    fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            pods: (0..BASE)
                .map(|index| format!("base-{index}"))
                .map(|name| (name.clone(), pod(&name)))
                .collect(),
            maps: BTreeMap::from([("map-0".to_owned(), 0)]),
            modules: BTreeMap::new(),
            version: 0,
            reads: [true, false, false],
            is_broken: false,
        }
    }

    fn write_pods(&self) -> anyhow::Result<()> {
        write_list(&self.dir, "pods.json", &self.pods.values().cloned().collect::<Vec<_>>())
    }

    fn write_maps(&self) -> anyhow::Result<()> {
        let configmap = |namespace: &str, name: &str, label: (&str, &str), key: &str, text: &str| {
            json!({
                "apiVersion": "v1", "kind": "ConfigMap", "data": { key: text },
                "metadata": { "name": name, "namespace": namespace, "labels": { label.0: label.1 } },
            })
        };
        let maps = self
            .maps
            .iter()
            .map(|(name, value)| configmap("conf", name, DATA, "k", &json!({ "value": value }).to_string()));
        let policies = self.policies().into_iter().map(|(name, text)| {
            let is_broken = self.is_broken && name == "reads";
            let text = if is_broken { "package reads\n\nbase := count(" } else { text.as_str() };
            configmap("opa", &name, POLICY, "p.rego", text)
        });
        write_list(&self.dir, "maps.json", &maps.chain(policies).collect::<Vec<_>>())
    }

    /// Accepted policies by ConfigMap.
    fn policies(&self) -> BTreeMap<String, String> {
        let fields = FIELDS.iter().zip(self.reads).filter(|(_, is_read)| *is_read);
        let lines = fields.map(|((parent, field), _)| format!("\tpod.{parent}.{field} != \"\"\n"));
        let reads = format!(
            "package reads\n\nversion := {}\n\nbase := count([1 |\n\tsome name, pod in data.kubernetes.pods[\"big\"]\n\t\
             startswith(name, \"base-\")\n{}])\n",
            self.version,
            lines.collect::<Vec<_>>().concat()
        );
        let modules = self.modules.iter().map(|(name, value)| {
            (name.clone(), format!("package {}\n\nx := {value}\n", name.replace('-', "_")))
        });
        modules.chain([("count".to_owned(), COUNT.to_owned()), ("reads".to_owned(), reads)]).collect()
    }

    /// Prunes `pod` to the fields that policies read.
    fn cut(&self, pod: &Value) -> Value {
        let metadata =
            json!({ "labels": pod["metadata"]["labels"], "annotations": pod["metadata"]["annotations"] });
        let mut cut = json!({ "metadata": metadata, "spec": { "text": pod["spec"]["text"] } });
        for ((parent, field), _) in FIELDS.iter().zip(self.reads).filter(|(_, is_read)| *is_read) {
            cut[*parent][*field] = pod[*parent][*field].clone();
        }
        cut
    }

    async fn is_held_by(&self, opa: &Opa) -> Result<(), String> {
        let text = |error: anyhow::Error| error.to_string();
        let modules = opa.texts().await.map_err(text)?;
        // OPA prefixes module ids with the bundle's name.
        let modules: BTreeMap<_, _> = modules
            .into_iter()
            .map(|(id, text)| (id.strip_prefix("main/").unwrap_or(&id).to_owned(), text))
            .collect();
        let policies = self.policies().into_iter();
        equal(&modules, &policies.map(|(name, text)| (format!("opa/{name}/p.rego"), text)).collect())?;
        let maps = self.maps.iter().map(|(name, value)| (name.clone(), json!({ "k": { "value": value } })));
        let maps = without_empty_maps(Value::Object(maps.collect()));
        equal(&without_empty_maps(opa.data("/conf").await.map_err(text)?), &maps)?;
        let mut found = opa.data("/kubernetes/pods").await.map_err(text)?;
        let found: Map<_, _> = match found["big"].take() {
            Value::Object(found) => found,
            other => return Err(format!("found {other} instead of pods")),
        };
        for (name, pod) in &self.pods {
            equal(&found.get(name), &Some(&self.cut(pod))).map_err(|error| format!("{name}: {error}"))?;
        }
        let stale = found.keys().find(|name| !self.pods.contains_key(*name));
        stale.map_or(Ok(()), |name| Err(format!("{name} is still there")))
    }

    /// Changes a few pods, mostly by few members.
    fn change_pods(&mut self, random: &mut Rng) -> anyhow::Result<()> {
        // A unique number makes each change visible.
        let round = random.u64(..).to_string();
        for _ in 0..random.usize(1..6) {
            let name = format!("base-{}", random.usize(..BASE));
            let pod = self.pods.get_mut(&name).context("base pods stay")?;
            pod["metadata"]["labels"]["round"] = json!(round);
            match random.u8(..5) {
                0 => pod["metadata"]["annotations"]["odd~/name"] = json!(round),
                1 => pod["metadata"]["annotations"] = json!({ "kept": "1" }),
                2 => pod["spec"]["text"] = json!("y".repeat(PADDING + random.usize(..PADDING))),
                3 => pod["spec"]["unread"] = json!(round),
                _ => {}
            }
        }
        self.write_pods()
    }

    /// Adds or removes an additional pod.
    fn toggle_pod(&mut self, random: &mut Rng) -> anyhow::Result<()> {
        let name = format!("other-{}", random.u8(..4));
        if self.pods.remove(&name).is_none() {
            self.pods.insert(name.clone(), pod(&name));
        }
        self.write_pods()
    }

    /// Sets or removes a data ConfigMap or policy.
    fn toggle(items: &mut BTreeMap<String, usize>, prefix: &str, random: &mut Rng) {
        let name = format!("{prefix}-{}", random.u8(..4));
        if random.bool() || items.remove(&name).is_none() {
            items.insert(name, random.usize(..1000));
        }
    }

    /// Edits the policy to read one more field and one less.
    fn edit(&mut self, random: &mut Rng) -> anyhow::Result<()> {
        let before = self.reads;
        let has = |reads: [bool; FIELDS.len()], others: [bool; FIELDS.len()]| {
            reads.iter().zip(others).any(|(reads, other)| *reads && !other)
        };
        while !(has(self.reads, before) && has(before, self.reads)) {
            self.reads = std::array::from_fn(|_| random.bool());
        }
        (self.version, self.is_broken) = (self.version + 1, false);
        self.write_maps()
    }
}

fn pod(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": name, "namespace": "big",
            "labels": { "app": "web", "round": "0" }, "annotations": { "kept": "1" },
        },
        "spec": { "nodeName": "n", "text": "x".repeat(PADDING), "unread": "0" },
        "status": { "podIP": "10.0.0.1", "phase": "Running" },
    })
}

/// Decision counts of an OPA.
#[derive(Default)]
struct Answers {
    right: AtomicUsize,
    undefined: AtomicUsize,
    wrong: Mutex<Vec<String>>,
    stop: AtomicBool,
}

/// Queries until stopped. Defined decisions must be based on all data.
async fn ask(http: reqwest::Client, url: String, answers: Arc<Answers>) {
    while !answers.stop.load(Ordering::Relaxed) {
        for rule in ["count/base", "reads/base"] {
            let request = http.post(format!("{url}/v1/data/{rule}")).body("{\"input\":{}}");
            let Ok(answer) = request.send().await else { continue };
            let Ok(body) = answer.bytes().await else { continue };
            let answer: Value = serde_json::from_slice(&body).unwrap_or_default();
            match answer.get("result") {
                None => _ = answers.undefined.fetch_add(1, Ordering::Relaxed),
                Some(count) if *count == json!(BASE) => _ = answers.right.fetch_add(1, Ordering::Relaxed),
                Some(count) => {
                    let mut wrong = answers.wrong.lock().unwrap_or_else(PoisonError::into_inner);
                    wrong.push(format!("{rule} is {count}"));
                }
            }
        }
        tokio::time::sleep(ASK_PAUSE).await;
    }
}

/// An OPA and its agent, with proxies to OPA and hub.
struct Consumer {
    delivery: Delivery,
    opa: Opa,
    agent: Agent,
    to_opa: Proxy,
    to_hub: Proxy,
    answers: Arc<Answers>,
}

impl Consumer {
    async fn start(dir: &Path, hub: &Hub, delivery: Delivery) -> anyhow::Result<Self> {
        let assets = tokio::task::spawn_blocking(assets::folder).await??;
        let address = Agent::address()?;
        let config = (delivery == Delivery::Bundle).then(|| Agent::opa_config(&address));
        let opa = Opa::start(&assets, dir, config.as_ref(), &[]).await?;
        let (to_opa, to_hub) = (Proxy::start(&opa.url).await?, Proxy::start(&hub.url).await?);
        let state = dir.join("agent-state").display().to_string();
        // The other agent has no last good state.
        let flags = ["--state-dir", state.as_str()];
        let flags = if delivery == Delivery::Rest { &flags[..] } else { &[] };
        let mut agent = Agent::start(dir, &address, &[&to_hub.url], &to_opa.url, delivery, flags)?;
        agent.wait_in_step().await?;
        let answers = Arc::new(Answers::default());
        tokio::spawn(ask(http()?, opa.url.clone(), Arc::clone(&answers)));
        Ok(Self { delivery, opa, agent, to_opa, to_hub, answers })
    }

    async fn decides(&self, expected: Value) -> anyhow::Result<()> {
        eventually(format!("{:?}: the decision is {expected}", self.delivery), async || {
            let found =
                self.opa.decide("/count/base", &json!({})).await.map_err(|error| error.to_string())?;
            equal(&found, &expected)
        })
        .await
        .map(drop)
    }

    async fn restart_opa(&mut self) -> anyhow::Result<()> {
        self.opa.process = None;
        self.opa.restart().await
    }
}

struct World {
    folder: Folder,
    /// The hub's last good file.
    last_good: PathBuf,
    hub: Hub,
    consumers: Vec<Consumer>,
    random: Rng,
    seen: BTreeMap<&'static str, usize>,
}

impl World {
    async fn start(work: &Path, manifests: &Path, seed: u64) -> anyhow::Result<Self> {
        let folder = Folder::new(manifests);
        folder.write_pods()?;
        folder.write_maps()?;
        let state = work.join("hub-state");
        std::fs::create_dir(&state)?;
        let folder_flag = format!("--manifests={}", manifests.display());
        let state_flag = format!("--state-dir={}", state.display());
        let flags = ["--replicate=v1/pods", "--fields=auto", "--log-level=error", &folder_flag, &state_flag];
        let hub = Hub::start(work, &flags).await?;
        let mut consumers = Vec::new();
        for delivery in [Delivery::Rest, Delivery::Bundle] {
            consumers.push(Consumer::start(work, &hub, delivery).await?);
        }
        let last_good = state.join("main.last-good.json.gz");
        let (random, seen) = (Rng::with_seed(seed), BTreeMap::new());
        Ok(Self { folder, last_good, hub, consumers, random, seen })
    }

    /// Waits until each OPA matches the folder and decides accordingly.
    async fn check(&mut self) -> anyhow::Result<()> {
        let Self { folder, consumers, .. } = self;
        for consumer in consumers {
            let delivery = consumer.delivery;
            eventually(format!("{delivery:?}: OPA matches the folder"), async || {
                folder.is_held_by(&consumer.opa).await
            })
            .await?;
            consumer.agent.wait_in_step().await?;
            let result = folder.is_held_by(&consumer.opa).await;
            result.map_err(|error| anyhow::anyhow!("{delivery:?}: in step: {error}"))?;
            consumer.decides(json!(BASE)).await?;
            let wrong = consumer.answers.wrong.lock().unwrap_or_else(PoisonError::into_inner).clone();
            anyhow::ensure!(wrong.is_empty(), "{delivery:?}: decisions on partial data: {wrong:?}");
        }
        self.count_done().await;
        Ok(())
    }

    /// Samples the agents' counters, which an agent restart resets.
    async fn count_done(&mut self) {
        for consumer in &self.consumers {
            // A new agent may not listen yet.
            let Ok(status) = consumer.agent.status().await else { continue };
            for done in DONE {
                *self.seen.entry(done).or_default() += usize::from(status["done"][done] != json!(0));
            }
        }
    }

    async fn happens(&mut self, event: &'static str) -> anyhow::Result<()> {
        // These events require connected agents or delivered policies.
        if matches!(event, "OPAs killed without a hub" | "OPAs suspended" | "policies rejected") {
            self.check().await?;
        }
        let Self { folder, last_good, hub, consumers, random, .. } = self;
        let one = random.usize(..consumers.len());
        match event {
            "objects changed" => folder.change_pods(random)?,
            "objects added or removed" => folder.toggle_pod(random)?,
            "maps changed" => {
                Folder::toggle(&mut folder.maps, "map", random);
                folder.write_maps()?;
            }
            "modules added or removed" => {
                Folder::toggle(&mut folder.modules, "module", random);
                folder.write_maps()?;
            }
            "policies edited" => folder.edit(random)?,
            "policies rejected" => reject(folder, last_good, hub).await?,
            "hubs killed" => {
                hub.kill();
                folder.change_pods(random)?;
                hub.spawn()?;
            }
            "OPAs killed without a hub" => kill_without_hub(folder, hub, consumers, random).await?,
            _ => consumers[one].fails(event, folder, random).await?,
        }
        *self.seen.entry(event).or_default() += 1;
        self.count_done().await;
        Ok(())
    }
}

/// Writes an invalid policy. The hub keeps the previous version across restarts.
async fn reject(folder: &mut Folder, last_good: &Path, hub: &Hub) -> anyhow::Result<()> {
    let version = format!("version := {}\\n", folder.version);
    eventually("the hub has stored the policies", async || {
        let mut json = String::new();
        let file = std::fs::File::open(last_good).map_err(|error| error.to_string())?;
        GzDecoder::new(file).read_to_string(&mut json).map_err(|error| error.to_string())?;
        if json.contains(&version) { Ok(()) } else { Err(format!("no {version} in {json}")) }
    })
    .await?;
    folder.is_broken = true;
    folder.write_maps()?;
    eventually("the hub rejects the policy", async || {
        let bundle = hub.json("/v1/bundles/main").await.map_err(|error| error.to_string())?;
        if bundle["problems"] == json!([]) { Err(bundle.to_string()) } else { Ok(()) }
    })
    .await
    .map(drop)
}

/// Restarts both OPAs without a hub: only one agent has a last good state.
async fn kill_without_hub(
    folder: &mut Folder,
    hub: &mut Hub,
    consumers: &mut [Consumer],
    random: &mut Rng,
) -> anyhow::Result<()> {
    hub.kill();
    for consumer in &mut *consumers {
        consumer.restart_opa().await?;
    }
    for consumer in consumers {
        if consumer.delivery == Delivery::Bundle {
            consumer.decides(Value::Null).await?;
            continue;
        }
        consumer.decides(json!(BASE)).await?;
        eventually("the agent has restored its OPA", async || {
            let status = consumer.agent.status().await.map_err(|error| error.to_string())?;
            if status["done"]["restores"] == json!(0) { Err(status.to_string()) } else { Ok(()) }
        })
        .await?;
    }
    folder.change_pods(random)?;
    hub.spawn()
}

impl Consumer {
    /// Injects a fault while objects change.
    async fn fails(&mut self, event: &str, folder: &mut Folder, random: &mut Rng) -> anyhow::Result<()> {
        match event {
            "agents killed" => {
                self.agent.kill();
                folder.change_pods(random)?;
                self.agent.spawn()?;
            }
            "agents killed in a request" => {
                self.to_opa.stop_after(Direction::Requests, random.usize(1..600), Then::Hold);
                folder.change_pods(random)?;
                self.to_opa.wait_stopped().await?;
                self.agent.kill();
                // Delayed bytes arrive before or after the next agent's.
                if random.bool() {
                    self.to_opa.resume();
                }
                self.agent.spawn()?;
                self.to_opa.resume();
            }
            "answers of OPA lost" => {
                self.to_opa.stop_after(Direction::Answers, random.usize(1..200), Then::Break);
                folder.change_pods(random)?;
                self.to_opa.wait_stopped().await?;
                self.to_opa.resume();
            }
            "connections severed" => {
                folder.change_pods(random)?;
                let proxy = if random.bool() { &self.to_opa } else { &self.to_hub };
                proxy.sever();
            }
            "frames held back" => {
                self.to_hub.stop_after(Direction::Answers, random.usize(1..200), Then::Hold);
                folder.change_pods(random)?;
                self.to_hub.wait_stopped().await?;
                folder.change_pods(random)?;
                if random.bool() {
                    self.to_hub.sever();
                }
                self.to_hub.resume();
            }
            "OPAs killed after a change" => {
                folder.change_pods(random)?;
                self.restart_opa().await?;
            }
            "OPAs killed in a load" => {
                self.opa.process = None;
                self.to_opa.stop_after(Direction::Requests, random.usize(1..LOAD_BYTES), Then::Hold);
                self.opa.restart().await?;
                self.to_opa.wait_stopped().await?;
                let found = self.opa.decide("/count/base", &json!({})).await?;
                anyhow::ensure!(found == Value::Null, "{:?}: {found} during a load", self.delivery);
                self.opa.process = None;
                self.to_opa.resume();
                self.opa.restart().await?;
            }
            "OPAs suspended" => {
                self.opa.process.as_ref().context("OPA runs")?.suspend()?;
                folder.change_pods(random)?;
                eventually("the agent waits for its OPA", async || {
                    let status = self.agent.status().await.map_err(|error| error.to_string())?;
                    if status["said"] == status["held"] { Err(status.to_string()) } else { Ok(()) }
                })
                .await?;
                if random.bool() {
                    self.agent.spawn()?;
                }
                wake(self.opa.process.as_ref().context("OPA runs")?)?;
            }
            _ => anyhow::bail!("unknown event {event}"),
        }
        Ok(())
    }
}

/// I1 and I10 with real processes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i10_opas_match_the_folder_despite_faults() -> anyhow::Result<()> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seed = number("OPA_HUB_AGENT_FAULT_SEED").unwrap_or(SEED);
    let steps = number("OPA_HUB_AGENT_FAULT_STEPS").map_or(Ok(STEPS), usize::try_from)?;
    let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let mut world = World::start(work.path(), manifests.path(), seed).await?;
    let mut events = Vec::new();
    for step in 1..=steps {
        if events.is_empty() {
            events.extend(EVENTS);
            world.random.shuffle(&mut events);
        }
        let event = events.pop().context("there are events")?;
        let context = |error: anyhow::Error| error.context(format!("seed {seed}, step {step}, {event}"));
        world.happens(event).await.map_err(context)?;
        if step % CHECK_AFTER == 0 || step == steps {
            world.check().await.map_err(context)?;
        }
    }
    println!("seed {seed}, {steps} steps: {:?}", world.seen);
    for Consumer { delivery, answers, .. } in &world.consumers {
        answers.stop.store(true, Ordering::Relaxed);
        let (right, undefined) = (&answers.right, &answers.undefined);
        println!("{delivery:?}: {right:?} decisions right, {undefined:?} undefined");
        assert!(right.load(Ordering::Relaxed) > steps, "{delivery:?}: decisions were queried");
        assert!(steps < STEPS || undefined.load(Ordering::Relaxed) > 0, "{delivery:?}: OPA was empty");
    }
    let is_missing = |what: &&str| world.seen.get(*what).is_none_or(|count| *count == 0);
    let missing: Vec<_> = EVENTS.into_iter().chain(DONE).filter(is_missing).collect();
    assert!(missing.is_empty() || steps < STEPS, "never covered: {missing:?}");
    Ok(())
}
