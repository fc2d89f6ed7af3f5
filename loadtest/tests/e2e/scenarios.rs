//! The load runs, small: what they count is what it must be, however fast this machine is.

use std::process::Command;

use anyhow::{Context as _, ensure};
use serde_json::Value;

/// What a scenario kept of its one run.
struct Kept(Value);

impl Kept {
    async fn of(args: &[&str]) -> anyhow::Result<Self> {
        let out = tempfile::tempdir()?;
        let mut command = Command::new(env!("CARGO_BIN_EXE_opa-hub-loadtest"));
        command.args(args).arg("--out").arg(out.path());
        let ran = tokio::task::spawn_blocking(move || command.output()).await??;
        ensure!(ran.status.success(), "{args:?}: {}", String::from_utf8_lossy(&ran.stderr));
        let file = |kind: &str| out.path().join(format!("{}.{kind}", args[0]));
        ensure!(std::fs::read_to_string(file("md"))?.contains("| opa-hub |") || args[0] != "fanout");
        // Drawn anew from what was kept, it is the same.
        let drawn = std::fs::read(file("md"))?;
        let mut report = Command::new(env!("CARGO_BIN_EXE_opa-hub-loadtest"));
        report.arg("report").arg(out.path());
        // It fails where a goal is missed, as goals of time may be here.
        tokio::task::spawn_blocking(move || report.output()).await??;
        ensure!(std::fs::read(file("md"))? == drawn);
        Ok(Self(serde_json::from_slice(&std::fs::read(file("json"))?)?))
    }

    fn figure(&self, who: &str, name: &str) -> anyhow::Result<f64> {
        let run = self.0["runs"][0].as_array().context("a run")?;
        let of = run.iter().find(|of| of["who"] == who).with_context(|| format!("nothing of {who}"))?;
        let figures = of["figures"].as_array().context("figures")?;
        let figure = figures.iter().find(|figure| figure["name"] == name);
        figure.with_context(|| format!("no {name} in {of}"))?["value"].as_f64().context("a number")
    }

    fn check(&self, who: &str, name: &str, expected: f64) -> anyhow::Result<()> {
        let found = self.figure(who, name)?;
        ensure!((found - expected).abs() < f64::EPSILON, "{name} of {who}: {found}, not {expected}");
        Ok(())
    }
}

/// I4, and bytes: one encode a change, and no more bytes for an agent than for a thread that writes the same.
#[tokio::test]
async fn fanout() -> anyhow::Result<()> {
    let kept = Kept::of(&["fanout", "--agents", "100", "--rounds", "3", "--flood-seconds", "1"]).await?;
    kept.check("opa-hub", "frames encoded a change", 1.0)?;
    let bytes = |who| kept.figure(who, "bytes an agent and change");
    ensure!(
        (bytes("opa-hub")? - bytes("raw")?).abs() < 16.0,
        "{:?} and {:?}",
        bytes("opa-hub"),
        bytes("raw")
    );
    Ok(())
}

/// Nobody is cut off or falls behind who reads slowly, and nothing is lost.
#[tokio::test]
async fn slow() -> anyhow::Result<()> {
    let kept = Kept::of(&["slow", "--agents", "200", "--rate", "10", "--seconds", "2"]).await?;
    kept.check("1 % stalled, 1 % trickling", "streams that ended", 0.0)
}

/// No fail-over and no restart costs a snapshot; an answer to reconcile is encoded once for all.
#[tokio::test]
async fn failover() -> anyhow::Result<()> {
    let kept = Kept::of(&["failover", "--agents", "200"]).await?;
    for who in ["another replica", "the same hub, restarted"] {
        kept.check(who, "snapshots served", 0.0)?;
    }
    kept.check("another replica", "reconciles", 0.0)?;
    kept.check("the same hub, restarted", "reconciles", 200.0)?;
    ensure!(kept.figure("the same hub, restarted", "answers encoded for them")? <= 2.0);
    Ok(())
}

/// However many agents and OPAs, the API server has one watch of pods to serve.
#[tokio::test]
async fn churn() -> anyhow::Result<()> {
    let args = ["churn", "--pods", "20", "--opas", "2", "--agents", "50", "--rate", "10", "--seconds", "3"];
    let kept = Kept::of(&args).await?;
    kept.check("opa-hub and many agents", "watches of pods", 1.0)?;
    kept.check("watches", "watches of pods", 50.0)
}

/// One frame, however many changes.
#[tokio::test]
async fn catchup() -> anyhow::Result<()> {
    let kept = Kept::of(&["catchup", "--changes", "3000", "--pods", "1000"]).await?;
    kept.check("opa-hub", "frames", 1.0)?;
    kept.check("opa-hub", "reconciles", 0.0)
}

/// Joins share a snapshot; what is killed comes back without one.
#[tokio::test]
async fn start_and_restart() -> anyhow::Result<()> {
    let args = ["start", "--pods", "20", "--opas", "2", "--joins", "50", "--small-pods", "500"];
    Kept::of(&args).await?.check("opa-hub", "snapshots encoded for all that join", 1.0)?;
    let kept = Kept::of(&["restart", "--pods", "20", "--opas", "2"]).await?;
    for (who, loaded) in [("the hub", 0.0), ("the agents", 0.0), ("the OPAs", 2.0), ("the API server", 0.0)] {
        kept.check(who, "OPAs that were loaded anew", loaded)?;
    }
    Ok(())
}

#[tokio::test]
async fn soak() -> anyhow::Result<()> {
    let kept = Kept::of(&["soak", "--agents", "50", "--rate", "100", "--seconds", "5"]).await?;
    kept.check("opa-hub", "agents without the last change", 0.0)?;
    kept.check("opa-hub", "streams that ended", 0.0)
}
