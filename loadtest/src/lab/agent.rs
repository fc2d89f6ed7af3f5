//! The agent as a child process.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;
use reqwest::Client;
use serde_json::{Value, json};

use super::free_port;
use super::process::{Process, program};

/// Delivery of policies to OPA.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Delivery {
    /// One PUT for each module.
    Rest,
    /// A bundle that OPA loads from the agent.
    Bundle,
}

/// An agent, running or stopped.
pub struct Agent {
    /// `None` while stopped.
    pub process: Option<Process>,
    /// `http://127.0.0.1:PORT`.
    pub url: String,
    http: Client,
    dir: PathBuf,
    args: Vec<String>,
}

impl Agent {
    /// A free address.
    pub fn address() -> anyhow::Result<String> {
        Ok(format!("127.0.0.1:{}", free_port()?))
    }

    /// OPA configuration that loads policies from the agent at `address`.
    pub fn opa_config(address: &str) -> Value {
        let bundle = |resource: &str| {
            let polling =
                json!({ "long_polling_timeout_seconds": 10, "min_delay_seconds": 1, "max_delay_seconds": 1 });
            json!({ "service": "agent", "resource": resource, "polling": polling })
        };
        json!({
            "services": { "agent": { "url": format!("http://{address}") } },
            "bundles": { "main": bundle("bundles/main"), "data": bundle("bundles/main/data-only") },
        })
    }

    /// Starts an agent at `address` for the OPA at `opa`.
    pub fn start(
        dir: &Path,
        address: &str,
        hubs: &[&str],
        opa: &str,
        delivery: Delivery,
        args: &[&str],
    ) -> anyhow::Result<Self> {
        let delivery = if delivery == Delivery::Rest { "rest" } else { "bundle" };
        let mut all: Vec<String> =
            ["--hub", &hubs.join(","), "--opa-url", &format!("{opa}/v1")].map(Into::into).into();
        all.extend(["--listen", address, "--policy-delivery", delivery].map(Into::into));
        all.extend(args.iter().map(|arg| (*arg).to_owned()));
        let http = super::http()?;
        let mut agent =
            Self { process: None, url: format!("http://{address}"), http, dir: dir.to_owned(), args: all };
        agent.spawn()?;
        Ok(agent)
    }

    /// Kills the agent.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Restarts the agent at its address.
    pub fn spawn(&mut self) -> anyhow::Result<()> {
        self.process = None;
        let mut command = Command::new(program("opa-hub-agent")?);
        let name = format!("opa-hub-agent-{}", self.url.rsplit(':').next().unwrap_or_default());
        self.process = Some(Process::start(&name, &self.dir, command.args(&self.args))?);
        Ok(())
    }

    /// The agent's `/v1/status`.
    pub async fn status(&self) -> anyhow::Result<Value> {
        let response = self.http.get(format!("{}/v1/status", self.url)).send().await?;
        Ok(serde_json::from_slice(&response.bytes().await?)?)
    }

    /// Waits until OPA has applied the hub's latest revision.
    pub async fn wait_in_step(&mut self) -> anyhow::Result<()> {
        let process = self.process.as_mut().context("the agent is stopped")?;
        let url = format!("{}/v1/status", self.url);
        let in_step = async || {
            let response = self.http.get(&url).send().await.map_err(|error| error.to_string())?;
            let body = response.bytes().await.map_err(|error| error.to_string())?;
            let status: Value = serde_json::from_slice(&body).map_err(|error| error.to_string())?;
            if status["inStep"] == json!(true) { Ok(()) } else { Err(status.to_string()) }
        };
        process.until("the agent is in step", in_step).await
    }

    /// Success and body of `/readyz`.
    pub async fn readiness(&self) -> anyhow::Result<(bool, String)> {
        let response = self.http.get(format!("{}/readyz", self.url)).send().await?;
        Ok((response.status().is_success(), response.text().await?))
    }
}
