//! Deployment-specific flags of agent and hub, with real processes.

use std::path::Path;

use anyhow::Context as _;
use opa_hub_loadtest::cluster::{DATA, POLICY};
use opa_hub_loadtest::eventually::{equal, eventually};
use opa_hub_loadtest::lab::process::Process;
use opa_hub_loadtest::lab::{Agent, Delivery, Hub, Opa, assets, certificates, free_port, http};
use serde_json::{Value, json};

use crate::world::{write_list, write_manifest};

fn write(dir: &Path, value: usize) -> anyhow::Result<()> {
    let configmap = |name: &str, label: (&str, &str), key: &str, text: String| {
        json!({
            "apiVersion": "v1", "kind": "ConfigMap", "data": { key: text },
            "metadata": { "name": name, "namespace": "ns", "labels": { label.0: label.1 } },
        })
    };
    let policy = format!("package p\n\nx := {value}\n\ny := data.ns.data.k.value\n");
    let data = json!({ "value": value }).to_string();
    write_list(
        dir,
        "all.json",
        &[configmap("policy", POLICY, "p.rego", policy), configmap("data", DATA, "k", data)],
    )
}

async fn hub(work: &Path, manifests: &Path, flags: &[&str]) -> anyhow::Result<Hub> {
    let folder = manifests.display().to_string();
    let flags: Vec<_> = ["--manifests", &folder].iter().chain(flags).copied().collect();
    Hub::start(work, &flags).await
}

async fn decides(opa: &Opa, value: usize) -> anyhow::Result<()> {
    eventually(format!("OPA decides on {value}"), async || {
        let found = opa.decide("/p", &json!({})).await.map_err(|error| error.to_string())?;
        equal(&found, &json!({ "x": value, "y": value }))
    })
    .await
    .map(drop)
}

/// Waits until the agent's status contains `part`.
async fn reports(agent: &Agent, part: &str) -> anyhow::Result<()> {
    eventually(format!("the agent reports {part:?}"), async || {
        let status = agent.status().await.map_err(|error| error.to_string())?.to_string();
        if status.contains(part) { Ok(()) } else { Err(status) }
    })
    .await
    .map(drop)
}

#[tokio::test]
async fn agent_connects_to_opa_with_tls() -> anyhow::Result<()> {
    let assets = tokio::task::spawn_blocking(assets::folder).await??;
    let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
    write(manifests.path(), 1)?;
    certificates::write(work.path(), "opa", &["127.0.0.1"])?;
    let file = |name: &str| work.path().join(name).display().to_string();
    let hub = hub(work.path(), manifests.path(), &[]).await?;
    for flags in
        [&["--opa-ca-file", &file("ca.crt")][..], &["--opa-allow-insecure"], &["--opa-allow-insecure=true"]]
    {
        // The test queries a second address, without TLS.
        let (secure, plain) = (free_port()?, free_port()?);
        let addresses = [format!("https://127.0.0.1:{secure}"), format!("http://127.0.0.1:{plain}")];
        let mut opa = Opa::start(
            &assets,
            work.path(),
            None,
            &[
                "--addr",
                &addresses[0],
                "--addr",
                &addresses[1],
                "--tls-cert-file",
                &file("opa.crt"),
                "--tls-private-key-file",
                &file("opa.key"),
            ],
        )
        .await?;
        opa.url.clone_from(&addresses[1]);
        let start = |flags: &[&str]| {
            Agent::start(work.path(), &Agent::address()?, &[&hub.url], &addresses[0], Delivery::Rest, flags)
        };
        let stranger = start(&[])?;
        reports(&stranger, "request to OPA failed").await?;
        assert_eq!(opa.decide("/p", &json!({})).await?, Value::Null);
        drop(stranger);
        let mut agent = start(flags)?;
        agent.wait_in_step().await?;
        decides(&opa, 1).await.map_err(|error| error.context(format!("{flags:?}")))?;
    }
    Ok(())
}

/// Writes an OPA policy that requires this token.
fn write_authz(dir: &Path, token: &str) -> anyhow::Result<String> {
    let text = format!(
        "package system.authz\n\ndefault allow := false\n\nallow if input.identity == {token:?}\n\n\
         allow if {{\n\tinput.method == \"POST\"\n\tinput.path == [\"v1\", \"data\", \"p\"]\n}}\n"
    );
    let file = dir.join("authz.rego");
    std::fs::write(&file, text)?;
    Ok(file.display().to_string())
}

#[tokio::test]
async fn agent_reads_token_from_flag_and_changing_file() -> anyhow::Result<()> {
    let assets = tokio::task::spawn_blocking(assets::folder).await??;
    let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
    write(manifests.path(), 1)?;
    let hub = hub(work.path(), manifests.path(), &[]).await?;
    let authz = write_authz(work.path(), "token-before")?;
    let flags = ["--authentication=token", "--authorization=basic", &authz];
    let mut opa = Opa::start(&assets, work.path(), None, &flags).await?;
    let token = work.path().join("token");
    std::fs::write(&token, "token-before\nnot a part of it\n")?;
    let file = token.display().to_string();
    let start = |flags: &[&str]| {
        Agent::start(work.path(), &Agent::address()?, &[&hub.url], &opa.url, Delivery::Rest, flags)
    };
    let mut agent = start(&["--opa-auth-token", "token-before"])?;
    agent.wait_in_step().await?;
    decides(&opa, 1).await?;
    drop(agent);
    let mut agent = start(&["--opa-auth-token-file", &file])?;
    agent.wait_in_step().await?;
    // OPA requires a new token before the agent has it.
    write_authz(work.path(), "token-after")?;
    opa.restart().await?;
    reports(&agent, "401").await?;
    assert_eq!(opa.decide("/p", &json!({})).await?, Value::Null);
    std::fs::write(&token, "token-after\n")?;
    decides(&opa, 1).await?;
    agent.wait_in_step().await?;
    let log = agent.process.as_ref().context("the agent runs")?.log();
    assert!(!log.contains("token-before") && !log.contains("token-after"), "tokens are secrets: {log}");
    Ok(())
}

#[tokio::test]
async fn health_address_serves_only_probes() -> anyhow::Result<()> {
    let assets = tokio::task::spawn_blocking(assets::folder).await??;
    let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
    write(manifests.path(), 1)?;
    let [of_hub, of_agent] = [free_port()?, free_port()?];
    let flags = [format!("--health-endpoint=localhost:{of_hub}"), format!("--health-endpoint=:{of_agent}")];
    let hub = hub(work.path(), manifests.path(), &[&flags[0]]).await?;
    let opa = Opa::start(&assets, work.path(), None, &[]).await?;
    let address = Agent::address()?;
    let mut agent = Agent::start(work.path(), &address, &[&hub.url], &opa.url, Delivery::Rest, &[&flags[1]])?;
    agent.wait_in_step().await?;
    let http = http()?;
    let status = async |port: u16, path: &str| {
        anyhow::Ok(http.get(format!("http://127.0.0.1:{port}{path}")).send().await?.status().as_u16())
    };
    for port in [of_hub, of_agent] {
        for path in ["/health", "/livez", "/readyz"] {
            assert_eq!(status(port, path).await?, 200, "{path}");
        }
        for path in ["/bundles/main", "/v1/status", "/v1/bundles"] {
            assert_eq!(status(port, path).await?, 404, "{path}");
        }
    }
    assert_eq!(status(of_agent, "/metrics").await?, 200);
    Ok(())
}

#[tokio::test]
async fn log_lines_are_json_with_the_flag() -> anyhow::Result<()> {
    let assets = tokio::task::spawn_blocking(assets::folder).await??;
    let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
    write(manifests.path(), 1)?;
    let hub = hub(work.path(), manifests.path(), &["--log-format=json"]).await?;
    let opa = Opa::start(&assets, work.path(), None, &[]).await?;
    let address = Agent::address()?;
    let mut agent =
        Agent::start(work.path(), &address, &[&hub.url], &opa.url, Delivery::Rest, &["--log-json"])?;
    agent.wait_in_step().await?;
    for process in [&hub.process, &agent.process] {
        let log = process.as_ref().map(Process::log).context("process runs")?;
        let lines: Result<Vec<Value>, _> = log.lines().map(serde_json::from_str).collect();
        let lines = lines.with_context(|| log.clone())?;
        assert!(!lines.is_empty() && lines.iter().all(|line| line["level"].is_string()), "{log}");
    }
    Ok(())
}

#[tokio::test]
async fn opa_pulls_policy_and_data_as_two_bundles() -> anyhow::Result<()> {
    let assets = tokio::task::spawn_blocking(assets::folder).await??;
    let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
    write(manifests.path(), 1)?;
    let hub = hub(work.path(), manifests.path(), &[]).await?;
    let bundle = |part: &str| {
        let polling =
            json!({ "long_polling_timeout_seconds": 10, "min_delay_seconds": 1, "max_delay_seconds": 1 });
        json!({ "service": "hub", "resource": format!("bundles/main/{part}"), "polling": polling })
    };
    let config = json!({
        "services": { "hub": { "url": hub.url } },
        "bundles": { "policy": bundle("policy"), "data": bundle("data") },
    });
    let mut opa = Opa::start(&assets, work.path(), Some(&config), &[]).await?;
    for value in 1..4 {
        write(manifests.path(), value)?;
        decides(&opa, value).await?;
    }
    opa.restart().await?;
    decides(&opa, 3).await
}

#[tokio::test]
async fn agents_of_two_bundles_share_an_opa() -> anyhow::Result<()> {
    let assets = tokio::task::spawn_blocking(assets::folder).await??;
    let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let write = |team: &str, value: usize| {
        let configmap = |label: (&str, &str), key: &str, text: String| {
            let name = format!("{team}-{key}");
            let labels = json!({ label.0: label.1, "team": team });
            json!({
                "apiVersion": "v1", "kind": "ConfigMap", "data": { key: text },
                "metadata": { "name": name, "namespace": team, "labels": labels },
            })
        };
        let policy = configmap(POLICY, "p.rego", format!("package {team}_p\n\nx := {value}\n"));
        let data = configmap(DATA, "k", json!({ "value": value }).to_string());
        write_list(manifests.path(), &format!("{team}.json"), &[policy, data])
    };
    let teams = ["red", "blue"];
    for team in teams {
        let spec = json!({
            "policies": { "labelSelector": { "matchLabels": { POLICY.0: POLICY.1, "team": team } } },
            "data": { "labelSelector": { "matchLabels": { DATA.0: DATA.1, "team": team } } },
        });
        let document = json!({
            "apiVersion": "opahub.dev/v1alpha1", "kind": "Bundle", "metadata": { "name": team }, "spec": spec,
        });
        write_manifest(manifests.path(), &format!("bundle-{team}.json"), &document)?;
        write(team, 0)?;
    }
    let hub = hub(work.path(), manifests.path(), &["--enable-policies=false", "--enable-data=false"]).await?;
    let mut opa = Opa::start(&assets, work.path(), None, &[]).await?;
    let mut agents = Vec::new();
    for team in teams {
        let address = Agent::address()?;
        let flags = ["--bundle", team];
        agents.push(Agent::start(work.path(), &address, &[&hub.url], &opa.url, Delivery::Rest, &flags)?);
    }
    for round in 0..3 {
        for (team, value) in [("red", round), ("blue", 10 + round)] {
            write(team, value)?;
        }
        if round == 2 {
            opa.restart().await?;
        }
        for (team, value) in [("red", round), ("blue", 10 + round)] {
            eventually(format!("{team} has {value}"), async || {
                let text = |error: anyhow::Error| error.to_string();
                equal(&opa.decide(&format!("/{team}_p/x"), &json!({})).await.map_err(text)?, &json!(value))?;
                let data = opa.data(&format!("/{team}/{team}-k/k/value")).await.map_err(text)?;
                equal(&data, &json!(value))
            })
            .await?;
        }
        for agent in &mut agents {
            agent.wait_in_step().await?;
        }
    }
    Ok(())
}

/// Two agents of one bundle contend for an OPA, as in a rollout. OPA stays up to date.
#[tokio::test]
async fn agents_of_one_bundle_share_an_opa() -> anyhow::Result<()> {
    let assets = tokio::task::spawn_blocking(assets::folder).await??;
    let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
    write(manifests.path(), 0)?;
    let hub = hub(work.path(), manifests.path(), &[]).await?;
    let opa = Opa::start(&assets, work.path(), None, &[]).await?;
    let start = || Agent::start(work.path(), &Agent::address()?, &[&hub.url], &opa.url, Delivery::Rest, &[]);
    let (first, mut second) = (start()?, start()?);
    for value in 1..4 {
        write(manifests.path(), value)?;
        decides(&opa, value).await?;
    }
    drop(first);
    write(manifests.path(), 4)?;
    decides(&opa, 4).await?;
    second.wait_in_step().await
}

/// An agent continues from a marker of another version, with unknown or invalid fields.
#[tokio::test]
async fn agent_accepts_a_marker_of_another_version() -> anyhow::Result<()> {
    let assets = tokio::task::spawn_blocking(assets::folder).await??;
    let (work, manifests) = (tempfile::tempdir()?, tempfile::tempdir()?);
    write(manifests.path(), 1)?;
    let hub = hub(work.path(), manifests.path(), &[]).await?;
    let opa = Opa::start(&assets, work.path(), None, &[]).await?;
    let address = Agent::address()?;
    let mut agent = Agent::start(work.path(), &address, &[&hub.url], &opa.url, Delivery::Rest, &[])?;
    agent.wait_in_step().await?;
    for (is_known, reconciles) in [(true, 0), (false, 1)] {
        agent.kill();
        let mut marker = opa.marker("main").await?;
        marker["future"] = json!({ "field": 1 });
        if !is_known {
            let digests = marker["dirs"].as_object_mut().context("marker without directories")?;
            digests.values_mut().for_each(|digest| *digest = json!({ "future": digest.take() }));
        }
        let request = http()?.put(format!("{}/v1/data/system/opahub/main", opa.url));
        request.body(marker.to_string()).send().await?.error_for_status()?;
        agent.spawn()?;
        agent.wait_in_step().await?;
        decides(&opa, 1).await?;
        let done = agent.status().await?["done"].clone();
        assert_eq!((&done["snapshots"], &done["reconciles"]), (&json!(0), &json!(reconciles)), "{done}");
    }
    Ok(())
}
