//! The control plane: etcd and kube-apiserver, or an external cluster.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, bail};
use k8s_openapi::api::core::v1::Namespace;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use rcgen::KeyPair;
use tempfile::TempDir;

use super::blackhole_proxy::BlackholeProxy;
use super::etcd::Etcd;
use super::process::{Process, Usage};
use super::{assets, certificates, external_cluster, free_port};
use crate::cluster::Cluster;
use crate::pods;

/// User without initial rights.
pub const PLAIN_USER: &str = "plain";

/// A running control plane.
pub struct ControlPlane {
    /// Folder of logs, keys and data.
    pub dir: TempDir,
    /// Folder of the components.
    pub assets: PathBuf,
    /// Administrator's kubeconfig.
    pub kubeconfig: PathBuf,
    /// Kubeconfig of [`PLAIN_USER`]; `None` for an external cluster.
    pub plain_kubeconfig: Option<PathBuf>,
    processes: Option<LocalProcesses>,
    /// Start time of the external API server instance measured first.
    measured: OnceLock<String>,
}

pub(super) struct ExternalCluster {
    kubeconfig: PathBuf,
    /// Such as `v1.37.2`.
    pub(super) version: String,
}

static EXTERNAL: OnceLock<ExternalCluster> = OnceLock::new();

pub(super) fn external() -> Option<&'static ExternalCluster> {
    EXTERNAL.get()
}

struct LocalProcesses {
    apiserver: Option<Process>,
    etcd: Etcd,
    port: u16,
    flags: Vec<String>,
}

impl ControlPlane {
    /// Uses this cluster as control plane. Fails if its version or the user's rights do not suffice.
    pub async fn use_cluster(kubeconfig: &Path) -> anyhow::Result<()> {
        super::init();
        let version = external_cluster::check(&client(kubeconfig).await?).await?;
        _ = EXTERNAL.set(ExternalCluster { kubeconfig: kubeconfig.to_owned(), version });
        Self::reset_external_cluster().await
    }

    /// Removes the run's namespaces from the external cluster and picks a new prefix.
    pub async fn reset_external_cluster() -> anyhow::Result<()> {
        let Some(external) = external() else { return Ok(()) };
        if let Some(prefix) = pods::external_prefix() {
            Cluster { client: client(&external.kubeconfig).await? }.remove_run_namespaces(&prefix).await?;
        }
        let name = std::iter::repeat_with(fastrand::alphanumeric).take(6).collect::<String>();
        pods::use_external_cluster(format!("opa-hub-load-{}", name.to_lowercase()));
        Ok(())
    }

    /// Starts a control plane, or uses the external cluster.
    pub async fn start() -> anyhow::Result<Self> {
        Self::start_with(&[]).await
    }

    /// Starts a control plane with these API server flags, ignored by an external cluster.
    pub async fn start_with(flags: &[&str]) -> anyhow::Result<Self> {
        super::init();
        let assets = tokio::task::spawn_blocking(assets::folder).await??;
        let mut dir = TempDir::with_prefix("opa-hub-lab-")?;
        dir.disable_cleanup(std::env::var_os("OPA_HUB_LAB_KEEP").is_some());
        if let Some(external) = external() {
            let kubeconfig = external.kubeconfig.clone();
            let measured = OnceLock::new();
            return Ok(Self { dir, assets, kubeconfig, plain_kubeconfig: None, processes: None, measured });
        }
        let port = free_port()?;
        credentials(dir.path())?;
        let kubeconfig = kubeconfig(dir.path(), port, "admin")?;
        let plain = self::kubeconfig(dir.path(), port, PLAIN_USER)?;
        let etcd = Etcd::start(&assets, dir.path())?;
        let flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
        let processes = LocalProcesses { apiserver: None, etcd, port, flags };
        let (processes, plain_kubeconfig, measured) = (Some(processes), Some(plain), OnceLock::new());
        let mut plane = Self { dir, assets, kubeconfig, plain_kubeconfig, processes, measured };
        plane.start_apiserver().await?;
        Ok(plane)
    }

    /// A client with administrator's rights.
    pub async fn client(&self) -> anyhow::Result<Client> {
        client(&self.kubeconfig).await
    }

    /// A proxy to the API server that can block traffic.
    pub async fn blackhole_proxy(&self) -> anyhow::Result<BlackholeProxy> {
        let processes =
            self.processes.as_ref().context("starting a proxy failed: the cluster is external")?;
        BlackholeProxy::start(format!("127.0.0.1:{}", processes.port)).await
    }

    /// Administrator's kubeconfig that connects through `proxy`.
    pub fn kubeconfig_through(&self, proxy: &BlackholeProxy) -> anyhow::Result<PathBuf> {
        kubeconfig(self.dir.path(), proxy.port, "admin")
    }

    /// Usage of the lab's API server; `None` for an external cluster.
    pub fn usage(&self) -> Option<Usage> {
        self.processes.as_ref()?.apiserver.as_ref()?.usage().ok()
    }

    /// Usage of the API server, for an external cluster from its metrics; `None` after a change of instance.
    pub async fn reported_usage(&self) -> anyhow::Result<Option<Usage>> {
        if self.is_local() {
            return Ok(self.usage());
        }
        let (started, usage) = Cluster { client: self.client().await? }.server_usage().await?;
        Ok((*self.measured.get_or_init(|| started.clone()) == started).then_some(usage))
    }

    /// Whether the lab started, and can stop, the control plane.
    pub fn is_local(&self) -> bool {
        self.processes.is_some()
    }

    /// Kills the API server; etcd continues to run.
    pub fn stop_apiserver(&mut self) {
        if let Some(processes) = &mut self.processes {
            processes.apiserver = None;
        }
    }

    /// Runs `act` on etcd's data folder while both servers are stopped.
    pub async fn while_stopped(
        &mut self,
        act: impl FnOnce(&Path) -> std::io::Result<()>,
    ) -> anyhow::Result<()> {
        self.stop_apiserver();
        let processes = self.processes.as_mut().context("stopping etcd failed: the cluster is external")?;
        processes.etcd.stop();
        act(&self.dir.path().join("etcd"))?;
        processes.etcd = Etcd::start(&self.assets, self.dir.path())?;
        self.start_apiserver().await
    }

    /// Starts the API server and waits until ready.
    pub async fn start_apiserver(&mut self) -> anyhow::Result<()> {
        let Some(processes) = &mut self.processes else {
            bail!("starting the API server failed: the cluster is external")
        };
        let dir = self.dir.path();
        let file = |name: &str| dir.join(name).display().to_string();
        let mut command = Command::new(self.assets.join("kube-apiserver"));
        command.arg(format!("--etcd-servers={}", processes.etcd.url));
        command.args([
            "--bind-address=127.0.0.1",
            "--endpoint-reconciler-type=none",
            &format!("--secure-port={}", processes.port),
            &format!("--cert-dir={}", file("certificates")),
            &format!("--tls-cert-file={}", file("server.crt")),
            &format!("--tls-private-key-file={}", file("server.key")),
            "--service-account-issuer=https://lab",
            &format!("--service-account-key-file={}", file("accounts.pub")),
            &format!("--service-account-signing-key-file={}", file("accounts.key")),
            "--service-cluster-ip-range=10.0.0.0/24",
            &format!("--token-auth-file={}", file("tokens.csv")),
            "--authorization-mode=RBAC",
            "--disable-admission-plugins=ServiceAccount",
        ]);
        command.args(&processes.flags);
        let mut process = Process::start("kube-apiserver", dir, &mut command)?;
        let client = self.client().await?;
        let serves = async || {
            let ready = http_get(&client, "/readyz").await?;
            Api::<Namespace>::all(client.clone()).get("default").await.map_err(|error| error.to_string())?;
            Ok::<_, String>(ready)
        };
        process.until("the API server serves", serves).await?;
        self.processes
            .as_mut()
            .context("starting the API server failed: the cluster is external")?
            .apiserver = Some(process);
        Ok(())
    }
}

async fn client(kubeconfig: &Path) -> anyhow::Result<Client> {
    let file = Kubeconfig::read_from(kubeconfig)?;
    let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

async fn http_get(client: &Client, path: &str) -> Result<String, String> {
    let request = http::Request::get(path).body(Vec::new()).map_err(|error| error.to_string())?;
    client.request_text(request).await.map_err(|error| error.to_string())
}

fn credentials(dir: &Path) -> anyhow::Result<()> {
    certificates::write(dir, "server", &["127.0.0.1", "localhost"])?;
    let accounts = KeyPair::generate()?;
    fs::write(dir.join("accounts.key"), accounts.serialize_pem())?;
    fs::write(dir.join("accounts.pub"), accounts.public_key_pem())?;
    fs::write(
        dir.join("tokens.csv"),
        format!("admin,admin,1,system:masters\n{PLAIN_USER},{PLAIN_USER},2\n"),
    )?;
    Ok(())
}

fn kubeconfig(dir: &Path, port: u16, user: &str) -> anyhow::Result<PathBuf> {
    let path = dir.join(format!("{user}-{port}.kubeconfig"));
    let authority = dir.join("ca.crt");
    let text = serde_json::json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "lab",
        "contexts": [{ "name": "lab", "context": { "cluster": "lab", "user": user } }],
        "clusters": [{ "name": "lab", "cluster": { "server": format!("https://127.0.0.1:{port}"), "certificate-authority": authority } }],
        "users": [{ "name": user, "user": { "token": user } }],
    });
    fs::write(&path, serde_json::to_vec_pretty(&text)?)?;
    Ok(path)
}
