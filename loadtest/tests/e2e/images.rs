//! Programs in otherwise empty images.

use std::process::Command;

use opa_hub_loadtest::lab::process::{Process, program};
use opa_hub_loadtest::lab::{free_port, http};

/// Plain HTTP needs no CA certificates.
#[tokio::test]
async fn agent_starts_without_ca_certificates() -> anyhow::Result<()> {
    let work = tempfile::tempdir()?;
    let listen = format!("127.0.0.1:{}", free_port()?);
    let mut command = Command::new(program("opa-hub-agent")?);
    command.args(["--hub", "http://127.0.0.1:1", "--listen", &listen]);
    command.env("SSL_CERT_FILE", "/dev/null").env("SSL_CERT_DIR", work.path());
    let mut agent = Process::start("agent", work.path(), &mut command)?;
    let (http, url) = (http()?, format!("http://{listen}/livez"));
    let answers = async || http.get(&url).send().await?.error_for_status();
    agent.until("the agent answers", answers).await.map(drop)
}
