//! etcd with one member on loopback.

use std::path::Path;
use std::process::Command;

use super::free_port;
use super::process::Process;

/// A running etcd.
pub struct Etcd {
    process: Option<Process>,
    /// Client URL.
    pub url: String,
}

impl Etcd {
    /// Starts etcd with its data below `dir`.
    pub fn start(assets: &Path, dir: &Path) -> anyhow::Result<Self> {
        let url = format!("http://127.0.0.1:{}", free_port()?);
        let peers = format!("http://127.0.0.1:{}", free_port()?);
        let mut command = Command::new(assets.join("etcd"));
        command.arg("--data-dir").arg(dir.join("etcd"));
        command.args(["--listen-client-urls", &url, "--advertise-client-urls", &url]);
        command.args(["--listen-peer-urls", &peers, "--initial-advertise-peer-urls", &peers]);
        command.args([
            "--initial-cluster",
            &format!("default={peers}"),
            "--unsafe-no-fsync",
            "--log-level",
            "error",
        ]);
        Ok(Self { process: Some(Process::start("etcd", dir, &mut command)?), url })
    }

    /// Kills etcd; its data stays.
    pub fn stop(&mut self) {
        self.process = None;
    }
}
