//! Raw watches of all pods: the API server load of as many sidecars.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use anyhow::Context as _;
use serde_json::Value;
use tokio::task::JoinSet;

pub(crate) struct Watches {
    _open: JoinSet<()>,
    received: Arc<AtomicU64>,
    ended: Arc<AtomicU64>,
}

impl Watches {
    pub(crate) fn received(&self) -> u64 {
        self.received.load(Relaxed)
    }

    /// Watches ended by the API server, which drops slow readers.
    pub(crate) fn ended(&self) -> u64 {
        self.ended.load(Relaxed)
    }
}

pub(crate) async fn open(kubeconfig: &Path, count: usize) -> anyhow::Result<Watches> {
    // JSON from the lab, YAML from a user.
    let text = std::fs::read_to_string(kubeconfig)?;
    let config: Value = serde_saphyr::from_str(&text)?;
    let cluster = &config["clusters"][0]["cluster"];
    let server = cluster["server"].as_str().context("reading the kubeconfig failed: no server")?;
    let ca = cluster["certificate-authority"]
        .as_str()
        .context("reading the kubeconfig failed: no certificate-authority")?;
    let token =
        config["users"][0]["user"]["token"].as_str().context("reading the kubeconfig failed: no token")?;
    opa_hub_loadtest::lab::init();
    let ca = reqwest::Certificate::from_pem(&std::fs::read(ca)?)?;
    let client = reqwest::Client::builder().no_proxy().http1_only().add_root_certificate(ca).build()?;
    let url = format!("{server}/api/v1/pods");
    let list: Value = {
        let response = client.get(format!("{url}?limit=1")).bearer_auth(token).send().await?;
        serde_json::from_slice(&response.error_for_status()?.bytes().await?)?
    };
    let version =
        list["metadata"]["resourceVersion"].as_str().context("listing pods failed: no resourceVersion")?;
    let url =
        format!("{url}?watch=true&timeoutSeconds=3600&allowWatchBookmarks=true&resourceVersion={version}");
    let mut open = JoinSet::new();
    let (received, ended) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    for _ in 0..count {
        let mut response = client.get(&url).bearer_auth(token).send().await?.error_for_status()?;
        let (received, ended) = (Arc::clone(&received), Arc::clone(&ended));
        open.spawn(async move {
            while let Ok(Some(chunk)) = response.chunk().await {
                received.fetch_add(chunk.len() as u64, Relaxed);
            }
            ended.fetch_add(1, Relaxed);
        });
    }
    Ok(Watches { _open: open, received, ended })
}
