//! OPA as a server on loopback.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;
use reqwest::Client;
use serde_json::{Value, json};

use super::free_port;
use super::process::Process;

/// An OPA, running or stopped.
pub struct Opa {
    /// `None` while stopped.
    pub process: Option<Process>,
    /// `http://127.0.0.1:PORT`.
    pub url: String,
    http: Client,
    program: PathBuf,
    name: String,
    dir: PathBuf,
    args: Vec<String>,
}

impl Opa {
    /// Starts OPA.
    pub async fn start(
        assets: &Path,
        dir: &Path,
        config: Option<&Value>,
        args: &[&str],
    ) -> anyhow::Result<Self> {
        let port = free_port()?;
        let name = format!("opa-{port}");
        let mut all: Vec<String> =
            ["run", "--server", "--log-level", "error", "--skip-version-check"].map(Into::into).into();
        all.extend(["--addr".into(), format!("127.0.0.1:{port}")]);
        if let Some(config) = config {
            let file = dir.join(format!("{name}.json"));
            std::fs::write(&file, serde_json::to_vec_pretty(config)?)?;
            all.extend(["--config-file".into(), file.display().to_string()]);
        }
        all.extend(args.iter().map(|arg| (*arg).to_owned()));
        let mut opa = Self {
            process: None,
            url: format!("http://127.0.0.1:{port}"),
            http: super::http()?,
            program: assets.join("opa"),
            name,
            dir: dir.to_owned(),
            args: all,
        };
        opa.restart().await?;
        Ok(opa)
    }

    /// Restarts OPA and waits until it serves.
    pub async fn restart(&mut self) -> anyhow::Result<()> {
        self.process = None;
        let mut command = Command::new(&self.program);
        let mut process = Process::start(&self.name, &self.dir, command.args(&self.args))?;
        let serves = async || self.http.get(format!("{}/health", self.url)).send().await;
        process.until("OPA serves", serves).await?;
        self.process = Some(process);
        Ok(())
    }

    /// Document at `path` below `/v1/data`; `Null` if undefined.
    pub async fn data(&self, path: &str) -> anyhow::Result<Value> {
        let response =
            self.http.get(format!("{}/v1/data{path}", self.url)).send().await?.error_for_status()?;
        let mut response: Value = serde_json::from_slice(&response.bytes().await?)?;
        Ok(response["result"].take())
    }

    /// Decision at `path` for `input`; `Null` if undefined.
    pub async fn decide(&self, path: &str, input: &Value) -> anyhow::Result<Value> {
        let body = serde_json::to_vec(&json!({ "input": input }))?;
        let response = self.http.post(format!("{}/v1/data{path}", self.url)).body(body).send().await?;
        let mut response: Value = serde_json::from_slice(&response.error_for_status()?.bytes().await?)?;
        Ok(response["result"].take())
    }

    /// Number of pods in namespaces that start with `prefix`.
    pub async fn count_pods(&self, prefix: &str) -> anyhow::Result<u64> {
        const QUERY: &str = "n := sum([count(pods) | pods := data.kubernetes.pods[namespace]; startswith(namespace, input.prefix)])";
        let body = serde_json::to_vec(&json!({ "query": QUERY, "input": { "prefix": prefix } }))?;
        let response = self.http.post(format!("{}/v1/query", self.url)).body(body).send().await?;
        let response: Value = serde_json::from_slice(&response.error_for_status()?.bytes().await?)?;
        response["result"][0]["n"]
            .as_u64()
            .with_context(|| format!("counting pods in OPA failed: {response}"))
    }

    /// Adds a module.
    pub async fn put_policy(&self, id: &str, text: &str) -> anyhow::Result<()> {
        let request = self.http.put(format!("{}/v1/policies/{id}", self.url)).body(text.to_owned());
        request.send().await?.error_for_status()?;
        Ok(())
    }

    /// Sorted ids of OPA's modules.
    pub async fn modules(&self) -> anyhow::Result<Vec<String>> {
        Ok(self.texts().await?.into_keys().collect())
    }

    /// OPA's modules by id.
    pub async fn texts(&self) -> anyhow::Result<BTreeMap<String, String>> {
        let response = self.http.get(format!("{}/v1/policies", self.url)).send().await?.error_for_status()?;
        let response: Value = serde_json::from_slice(&response.bytes().await?)?;
        let list = response["result"].as_array().context("listing OPA's policies failed: no list")?;
        let text = |module: &Value, field: &str| Some(module[field].as_str()?.to_owned());
        Ok(list.iter().filter_map(|module| Some((text(module, "id")?, text(module, "raw")?))).collect())
    }

    /// The agent's marker for this bundle.
    pub async fn marker(&self, bundle: &str) -> anyhow::Result<Value> {
        self.data(&format!("/system/opahub/{bundle}")).await
    }
}
