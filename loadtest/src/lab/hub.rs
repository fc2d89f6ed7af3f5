//! The hub as a child process.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;
use reqwest::Client;
use serde_json::Value;

use super::process::{Process, program};
use super::{assets, free_port};

/// A hub, running or stopped.
pub struct Hub {
    /// `None` while stopped.
    pub process: Option<Process>,
    /// `http://127.0.0.1:PORT`.
    pub url: String,
    http: Client,
    dir: PathBuf,
    args: Vec<String>,
}

impl Hub {
    /// Starts a hub and waits until it is ready.
    pub async fn start(dir: &Path, args: &[&str]) -> anyhow::Result<Self> {
        let mut hub = Self::start_unready(dir, args)?;
        hub.wait_ready().await?;
        Ok(hub)
    }

    /// Starts a hub at a free port.
    pub fn start_unready(dir: &Path, args: &[&str]) -> anyhow::Result<Self> {
        Self::start_at(dir, &format!("127.0.0.1:{}", free_port()?), args)
    }

    /// Starts a hub at address `listen`.
    pub fn start_at(dir: &Path, listen: &str, args: &[&str]) -> anyhow::Result<Self> {
        let mut all = vec!["--listen".to_owned(), listen.to_owned()];
        all.extend(args.iter().map(|arg| (*arg).to_owned()));
        let http = super::http()?;
        let mut hub =
            Self { process: None, url: format!("http://{listen}"), http, dir: dir.to_owned(), args: all };
        hub.spawn()?;
        Ok(hub)
    }

    /// Kills the hub.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Restarts the hub at its address.
    pub fn spawn(&mut self) -> anyhow::Result<()> {
        self.process = None;
        let mut command = Command::new(program("opa-hub")?);
        // A killed hub leaves temporary files.
        command.env("OPA_BIN", assets::folder()?.join("opa")).env("TMPDIR", &self.dir).args(&self.args);
        self.process = Some(Process::start("opa-hub", &self.dir, &mut command)?);
        Ok(())
    }

    /// Waits until `/readyz` succeeds.
    pub async fn wait_ready(&mut self) -> anyhow::Result<()> {
        let process = self.process.as_mut().context("the hub is stopped")?;
        let ready = async || {
            let response =
                self.http.get(format!("{}/readyz", self.url)).send().await.map_err(|e| e.to_string())?;
            if response.status().is_success() {
                Ok(())
            } else {
                Err(response.text().await.unwrap_or_default())
            }
        };
        process.until("the hub is ready", ready).await
    }

    /// The JSON response at a path.
    pub async fn json(&self, path: &str) -> anyhow::Result<Value> {
        let response = self.http.get(format!("{}{path}", self.url)).send().await?;
        Ok(serde_json::from_slice(&response.bytes().await?)?)
    }

    /// Sum of a metric over its labels.
    pub async fn metric(&self, name: &str) -> anyhow::Result<u64> {
        let text = self.http.get(format!("{}/metrics", self.url)).send().await?.text().await?;
        let samples = text.lines().filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            let value = rest.starts_with(['{', ' ']).then(|| rest.rsplit(' ').next())??;
            value.parse::<u64>().ok()
        });
        let samples: Vec<u64> = samples.collect();
        anyhow::ensure!(!samples.is_empty(), "reading metrics failed: the hub has no {name}");
        Ok(samples.iter().sum())
    }
}
