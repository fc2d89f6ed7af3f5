//! The setups that scenarios compare: the hub with agents, and alternatives.

pub(crate) mod raw;
pub(crate) mod watches;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use opa_hub_loadtest::cluster::Cluster;
use opa_hub_loadtest::eventually::{PATIENCE, within};
use opa_hub_loadtest::lab::process::Process;
use opa_hub_loadtest::lab::{Agent, ControlPlane, Delivery, Hub, Opa};
use opa_hub_loadtest::pods::{self, Nth};
use serde_json::json;

use self::watches::Watches;
use crate::probe::RULE;
use crate::scenario::{address, hub_flags};
use crate::swarm::{Schedule, Start, Swarm};

#[derive(Clone)]
pub(crate) enum Baseline {
    /// No hub and no OPA: the cost of the changes alone.
    Nothing,
    /// One hub, and an agent for each OPA.
    Hub,
    HubAndMany,
    /// One hub with `--fields=auto`.
    HubAuto,
    HubAutoAndMany,
    /// A policy package shares a path with the pods, as in kube-mgmt's documentation.
    HubShared,
    /// OPAs that load the hub's bundle directly.
    Bundles,
    /// Raw watches without OPAs.
    Watches,
    /// One kube-mgmt for each OPA.
    Sidecars(Sidecar),
}

#[derive(Clone)]
pub(crate) struct Sidecar {
    program: PathBuf,
    name: String,
}

#[derive(Clone, Copy)]
pub(crate) struct Scale {
    pub(crate) pods: usize,
    pub(crate) opas: usize,
    /// Simulated agents, or raw watches.
    pub(crate) agents: usize,
}

/// Selected by no default of kube-mgmt or the hub.
pub(crate) const POLICY_LABEL: &str = "opahub.dev/load-policy";
pub(crate) const DECISIONS: &str = "decisions";
const DECISIONS_AND_ADMISSION: &str = "decisions-and-admission";
/// Shares a path with `data.kubernetes.pods`.
const ADMISSION: &str = "package kubernetes.admission

deny contains \"label app is missing\" if not input.request.object.metadata.labels.app
";

pub(crate) async fn policy(cluster: &Cluster) -> anyhow::Result<()> {
    let namespace = Nth(0).namespace();
    for (name, modules) in [
        (DECISIONS, &[("load.rego", RULE)][..]),
        (DECISIONS_AND_ADMISSION, &[("load.rego", RULE), ("admission.rego", ADMISSION)][..]),
    ] {
        cluster.configmap(&namespace, name, Some((POLICY_LABEL, name)), modules).await?;
    }
    Ok(())
}

pub(crate) fn sidecars(kube_mgmt: Option<PathBuf>) -> Option<Baseline> {
    let Some(program) = kube_mgmt else {
        eprintln!("kube-mgmt is skipped; pass its program as --kube-mgmt");
        return None;
    };
    let name = format!("kube-mgmt {}", version(&program));
    Some(Baseline::Sidecars(Sidecar { program, name }))
}

/// Version of the module or release, else the commit.
fn version(program: &Path) -> String {
    let lines = |command: &mut Command| -> Vec<String> {
        let output = command.stdin(Stdio::null()).output().map(|output| output.stdout).unwrap_or_default();
        String::from_utf8_lossy(&output).lines().map(|line| line.trim().to_owned()).collect()
    };
    let build = lines(Command::new("go").args(["version", "-m"]).arg(program));
    let module = build.iter().find(|line| line.starts_with("mod\t")).and_then(|line| line.split('\t').nth(2));
    let commit = build.iter().find_map(|line| line.split_once("vcs.revision=")).map(|(_, commit)| commit);
    let output = lines(Command::new(program).arg("--version"));
    let release = output.iter().find_map(|line| line.strip_prefix("Version:")).map(str::trim);
    let known =
        module.filter(|module| *module != "(devel)").or(release.filter(|release| !release.is_empty()));
    known.or(commit).unwrap_or("of unknown version").to_owned()
}

pub(crate) struct Running {
    pub(crate) hub: Option<Hub>,
    pub(crate) opas: Vec<Opa>,
    pub(crate) agents: Vec<Agent>,
    pub(crate) swarm: Option<Swarm>,
    sidecars: Vec<Process>,
    watches: Option<Watches>,
    /// Time until every OPA has all pods.
    pub(crate) cold: Duration,
}

impl Baseline {
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Nothing => "nobody",
            Self::Hub => "opa-hub",
            Self::HubAndMany => "opa-hub and many agents",
            Self::HubAuto => "opa-hub, fields auto",
            Self::HubAutoAndMany => "opa-hub, fields auto, and many agents",
            Self::Bundles => "bundles",
            Self::Watches => "watches",
            Self::HubShared => "opa-hub, package kubernetes.admission",
            Self::Sidecars(sidecar) => &sidecar.name,
        }
    }

    /// Others may fail: OPA is slow with a shared package.
    pub(crate) fn must_succeed(&self) -> bool {
        matches!(self, Self::Nothing) || self.has_agents() && !matches!(self, Self::HubShared)
    }

    fn has_agents(&self) -> bool {
        matches!(self, Self::Hub | Self::HubAndMany | Self::HubAuto | Self::HubAutoAndMany | Self::HubShared)
    }

    pub(crate) async fn start(
        &self,
        plane: &ControlPlane,
        scale: Scale,
        due: &Schedule,
    ) -> anyhow::Result<Running> {
        let dir = plane.dir.path();
        let kubeconfig = plane.kubeconfig.display().to_string();
        let policies = if matches!(self, Self::HubShared) { DECISIONS_AND_ADMISSION } else { DECISIONS };
        let mut flags = hub_flags(plane, policies);
        let is_auto = matches!(self, Self::HubAuto | Self::HubAutoAndMany);
        flags.push(if is_auto { "--fields=auto" } else { "--fields=all" }.into());
        let flags: Vec<_> = flags.iter().map(String::as_str).collect();
        let hub = match self {
            Self::Bundles => Some(Hub::start(dir, &flags).await?),
            baseline if baseline.has_agents() => Some(Hub::start(dir, &flags).await?),
            _ => None,
        };
        let url = hub.as_ref().map(|hub| hub.url.clone()).unwrap_or_default();
        let started = Instant::now();
        let count = if matches!(self, Self::Nothing | Self::Watches) { 0 } else { scale.opas };
        let config = matches!(self, Self::Bundles).then(|| {
            let polling =
                json!({ "long_polling_timeout_seconds": 10, "min_delay_seconds": 1, "max_delay_seconds": 1 });
            json!({
                "services": { "hub": { "url": url } },
                "bundles": { "main": { "service": "hub", "resource": "bundles/main", "polling": polling } },
            })
        });
        let opas =
            try_join_all((0..count).map(|_| Opa::start(&plane.assets, dir, config.as_ref(), &[]))).await?;
        let (mut agents, mut sidecars) = (Vec::new(), Vec::new());
        for (index, opa) in opas.iter().enumerate() {
            match self {
                baseline if baseline.has_agents() => {
                    let agent =
                        Agent::start(dir, &Agent::address()?, &[&url], &opa.url, Delivery::Rest, &[])?;
                    agents.push(agent);
                }
                Self::Sidecars(sidecar) => {
                    let mut command = Command::new(&sidecar.program);
                    command.arg(format!("--opa-url={}/v1", opa.url)).arg("--replicate=v1/pods");
                    // Only pods are measured.
                    command.args(["--enable-policies=false", "--enable-data=false"]);
                    command.arg(format!("--kubeconfig={kubeconfig}"));
                    sidecars.push(Process::start(&format!("kube-mgmt-{index}"), dir, &mut command)?);
                }
                _ => {}
            }
        }
        if matches!(self, Self::Sidecars(_)) {
            for opa in &opas {
                opa.put_policy("load", RULE).await?;
            }
        }
        let patience = if sidecars.is_empty() { PATIENCE } else { SIDECAR_PATIENCE };
        let all = try_join_all(opas.iter().map(|opa| has_pods(opa, scale.pods, patience)));
        tokio::select! {
            all = all => drop(all?),
            ended = first_exit(&mut sidecars) => return Err(ended),
        }
        try_join_all(agents.iter_mut().map(Agent::wait_in_step)).await?;
        let cold = started.elapsed();
        let swarm = match &hub {
            Some(hub) if matches!(self, Self::HubAndMany | Self::HubAutoAndMany) => {
                let start = Arc::new(Start::fetch(&hub.url).await?);
                Some(Swarm::open(start, vec![address(hub)?], due.clone(), scale.agents, &[]).await?)
            }
            _ => None,
        };
        let watches = match self {
            Self::Watches => Some(watches::open(&plane.kubeconfig, scale.agents).await?),
            _ => None,
        };
        Ok(Running { hub, opas, agents, swarm, sidecars, watches, cold })
    }
}

impl Running {
    pub(crate) fn received(&self) -> Option<u64> {
        self.watches.as_ref().map(Watches::received)
    }

    pub(crate) fn dropped_watches(&self) -> Option<u64> {
        self.watches.as_ref().map(Watches::ended)
    }

    pub(crate) fn cpu(&self) -> anyhow::Result<Vec<(&'static str, f64)>> {
        let hub = self.hub.iter().filter_map(|hub| hub.process.as_ref());
        let agents = self.agents.iter().filter_map(|agent| agent.process.as_ref()).chain(&self.sidecars);
        let opas = self.opas.iter().filter_map(|opa| opa.process.as_ref());
        let kinds: [(_, Vec<_>); 3] =
            [("the hub", hub.collect()), ("the agents", agents.collect()), ("the OPAs", opas.collect())];
        let sum = |processes: Vec<&Process>| -> anyhow::Result<f64> {
            let each = processes.into_iter().map(|process| Ok(process.usage()?.cpu.as_secs_f64()));
            each.sum()
        };
        kinds.into_iter().map(|(name, processes)| Ok((name, sum(processes)?))).collect()
    }

    /// Medians of sidecar and OPA.
    pub(crate) fn memory(&self) -> anyhow::Result<Option<(u64, u64)>> {
        let sidecars = self.agents.iter().filter_map(|agent| agent.process.as_ref()).chain(&self.sidecars);
        let mut sidecars: Vec<_> =
            sidecars.map(|process| process.usage().map(|usage| usage.rss)).collect::<Result<_, _>>()?;
        let opas = self.opas.iter().filter_map(|opa| opa.process.as_ref());
        let mut opas: Vec<_> =
            opas.map(|process| process.usage().map(|usage| usage.rss)).collect::<Result<_, _>>()?;
        sidecars.sort_unstable();
        opas.sort_unstable();
        let middle = |all: &[u64]| all.get(all.len() / 2).copied();
        Ok(middle(&opas).map(|opa| (middle(&sidecars).unwrap_or_default(), opa)))
    }
}

/// kube-mgmt needs more than a minute to load ten OPAs with 3,000 pods.
const SIDECAR_PATIENCE: Duration = Duration::from_secs(600);

async fn first_exit(processes: &mut [Process]) -> anyhow::Error {
    loop {
        for process in &mut *processes {
            if let Some(error) = process.exit_error() {
                return error;
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Samples three pods first: counting is work for OPA.
async fn has_pods(opa: &Opa, count: usize, patience: Duration) -> anyhow::Result<()> {
    for nth in [Nth(0), Nth(count / 2), Nth(count - 1)] {
        let path = format!("/kubernetes/pods/{}/{}/metadata/labels/app", nth.namespace(), nth.name());
        within(patience, "OPA has every pod", async || match opa.data(&path).await {
            Ok(found) if found.is_string() => Ok(()),
            Ok(found) => Err(format!("{path} is {found}")),
            Err(error) => Err(error.to_string()),
        })
        .await?;
    }
    let (prefix, expected) = (pods::prefix(), count as u64);
    let counted = async || match opa.count_pods(&prefix).await {
        Ok(found) if found >= expected => Ok(()),
        Ok(found) => Err(format!("OPA has {found} of {expected}")),
        Err(error) => Err(error.to_string()),
    };
    within(patience, "OPA has every pod", counted).await.map(drop)
}
