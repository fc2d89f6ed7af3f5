//! Results of a scenario: stored as JSON, rendered as a table of medians with goals, and a chart.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use anyhow::Context as _;
use opa_hub_loadtest::lab::assets;
use serde::{Deserialize, Serialize};

use crate::chart;
use crate::histogram::Histogram;

const SUMMARY: &str = "README.md";

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Results {
    pub(crate) scenario: String,
    #[serde(rename = "what")]
    pub(crate) description: String,
    pub(crate) command: String,
    pub(crate) machine: String,
    #[serde(default)]
    pub(crate) version: Version,
    pub(crate) goals: Vec<Goal>,
    pub(crate) runs: Vec<Vec<Measurement>>,
}

#[derive(Serialize, Deserialize, Clone, Default)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Version {
    /// `None` outside a repository.
    #[serde(default)]
    commit: Option<String>,
    #[serde(default)]
    is_changed: bool,
    /// Such as `2026-11-25`.
    #[serde(default)]
    date: String,
}

#[derive(Serialize, Deserialize, Clone, Default)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Measurement {
    #[serde(rename = "who")]
    pub(crate) subject: String,
    pub(crate) figures: Vec<Figure>,
    /// Milliseconds at the percentiles of [`CURVE`], by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) curves: BTreeMap<String, Vec<f64>>,
}

#[derive(Serialize, Deserialize, Clone)]
pub(crate) struct Figure {
    pub(crate) name: String,
    pub(crate) unit: String,
    pub(crate) value: f64,
}

/// Upper bound of a figure, or of its ratio to another subject in the same run.
#[derive(Serialize, Deserialize, Clone)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Goal {
    #[serde(rename = "who")]
    pub(crate) subject: String,
    pub(crate) figure: String,
    pub(crate) at_most: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) relative_to: Option<String>,
}

struct Evaluation {
    found: String,
    bound: String,
    verdict: Verdict,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Verdict {
    Met,
    Missed,
    NotMeasured,
}

pub(crate) const CURVE: [f64; 12] = [1.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.5, 99.9, 99.99, 100.0];

impl Measurement {
    pub(crate) fn new(subject: &str) -> Self {
        Self { subject: subject.to_owned(), ..Self::default() }
    }

    /// Skips non-finite values, such as a share of zero deliveries.
    pub(crate) fn add(&mut self, name: &str, unit: &str, value: f64) {
        if value.is_finite() {
            self.figures.push(Figure { name: name.to_owned(), unit: unit.to_owned(), value });
        }
    }

    pub(crate) fn add_delays(&mut self, name: &str, delays: &Histogram) {
        if delays.count() == 0 {
            return;
        }
        let ms = |percent| delays.percentile(percent) * 1000.0;
        for (label, percent) in [("p50", 50.0), ("p99", 99.0), ("max", 100.0)] {
            self.add(&format!("{name}, {label}"), "ms", ms(percent));
        }
        self.curves.insert(name.to_owned(), CURVE.map(ms).to_vec());
    }

    fn value(&self, name: &str) -> Option<f64> {
        self.figures.iter().find(|figure| figure.name == name).map(|figure| figure.value)
    }
}

impl Goal {
    pub(crate) fn at_most(subject: &str, figure: &str, at_most: f64) -> Self {
        Self { subject: subject.to_owned(), figure: figure.to_owned(), at_most, relative_to: None }
    }

    pub(crate) fn times(self, other: &str) -> Self {
        Self { relative_to: Some(other.to_owned()), ..self }
    }

    fn value_in(&self, run: &[Measurement]) -> Option<f64> {
        let value = |subject: &str| run.iter().find(|row| row.subject == subject)?.value(&self.figure);
        let value_of_subject = value(&self.subject)?;
        match &self.relative_to {
            None => Some(value_of_subject),
            Some(other) => {
                value(other).map(|other| value_of_subject / other).filter(|ratio| ratio.is_finite())
            }
        }
    }

    fn evaluate(&self, runs: &[Vec<Measurement>]) -> Evaluation {
        let figures = runs.iter().flatten().flat_map(|row| &row.figures);
        let unit = match &self.relative_to {
            Some(_) => "×",
            None => figures.into_iter().find(|f| f.name == self.figure).map_or("", |f| f.unit.as_str()),
        };
        let bound = match &self.relative_to {
            Some(other) => format!("{} × {other}", self.at_most),
            None => format_value(self.at_most, unit),
        };
        let found: Vec<_> = runs.iter().filter_map(|run| self.value_in(run)).collect();
        let Some(middle) = median(found.clone()) else {
            return Evaluation { found: String::new(), bound, verdict: Verdict::NotMeasured };
        };
        let (low, high) =
            found.iter().fold((f64::MAX, f64::MIN), |(low, high), f| (low.min(*f), high.max(*f)));
        // Noise affects both sides of a ratio, so its median counts.
        let decisive = if unit == "×" { middle } else { high };
        let verdict = if decisive <= self.at_most { Verdict::Met } else { Verdict::Missed };
        let spread = if found.len() > 1 {
            format!(" ({} to {})", format_digits(low), format_digits(high))
        } else {
            String::new()
        };
        Evaluation { found: format_value(middle, unit) + &spread, bound, verdict }
    }
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Met => "met",
            Self::Missed => "**missed**",
            Self::NotMeasured => "not measured",
        })
    }
}

impl Results {
    pub(crate) fn new(scenario: &str, description: String, command: String, goals: Vec<Goal>) -> Self {
        let (scenario, machine) = (scenario.to_owned(), machine());
        Self { scenario, description, command, machine, version: Version::now(), goals, runs: Vec::new() }
    }

    fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read(path)?;
        serde_json::from_slice(&text)
            .with_context(|| format!("reading results from {} failed", path.display()))
    }

    /// Stores all results so far: a later run may fail.
    pub(crate) fn push(&mut self, run: Vec<Measurement>, out: Option<&Path>) -> anyhow::Result<()> {
        self.runs.push(run);
        let Some(out) = out else { return Ok(()) };
        std::fs::create_dir_all(out)?;
        let json = serde_json::to_string_pretty(self)? + "\n";
        std::fs::write(out.join(format!("{}.json", self.scenario)), json)?;
        self.draw(out)
    }

    pub(crate) fn finish(&self, out: Option<&Path>) {
        println!("{}", self.table());
        if let Some(out) = out {
            println!("written to {}", out.display());
        }
    }

    fn draw(&self, out: &Path) -> anyhow::Result<()> {
        std::fs::write(out.join(format!("{}.md", self.scenario)), self.table())?;
        let medians = self.medians();
        let lines: Vec<_> = medians
            .iter()
            .flat_map(|row| {
                row.curves.iter().map(|(name, curve)| (format!("{}: {name}", row.subject), &curve[..]))
            })
            .collect();
        if !lines.is_empty() {
            std::fs::write(
                out.join(format!("{}.svg", self.scenario)),
                chart::curves(&self.description, &lines),
            )?;
        }
        Ok(())
    }

    fn medians(&self) -> Vec<Measurement> {
        let median_row = |measured: &Measurement| {
            let runs: Vec<_> = self
                .runs
                .iter()
                .filter_map(|run| run.iter().find(|row| row.subject == measured.subject))
                .collect();
            let over = |value: &dyn Fn(&Measurement) -> Option<f64>| {
                median(runs.iter().filter_map(|row| value(row)).collect()).unwrap_or_default()
            };
            let figure =
                |figure: &Figure| Figure { value: over(&|row| row.value(&figure.name)), ..figure.clone() };
            let curve = |name: &String| {
                let point = |index| over(&|row| row.curves.get(name)?.get(index).copied());
                (name.clone(), (0..CURVE.len()).map(point).collect())
            };
            Measurement {
                subject: measured.subject.clone(),
                figures: measured.figures.iter().map(figure).collect(),
                curves: measured.curves.keys().map(curve).collect(),
            }
        };
        let mut all: Vec<&Measurement> = Vec::new();
        for measured in self.runs.iter().flatten() {
            // A baseline may fail in one run only.
            if !all.iter().any(|row| row.subject == measured.subject) {
                all.push(measured);
            }
        }
        all.into_iter().map(median_row).collect()
    }

    fn table(&self) -> String {
        let medians = self.medians();
        let mut names: Vec<(&str, &str)> = Vec::new();
        for figure in medians.iter().flat_map(|row| &row.figures) {
            if !names.iter().any(|(name, _)| *name == figure.name) {
                names.push((&figure.name, &figure.unit));
            }
        }
        let runs = match self.runs.len() {
            1 => "one run".to_owned(),
            count => format!("medians of {count} runs"),
        };
        let mut text = format!("{}: `{}`, {runs}\n\n| |", self.description, self.command);
        for row in &medians {
            _ = write!(text, " {} |", row.subject);
        }
        text = text + "\n|---|" + &"--:|".repeat(medians.len());
        for (name, unit) in names {
            _ = write!(text, "\n| {name} |");
            for row in &medians {
                match row.value(name) {
                    Some(value) => _ = write!(text, " {} |", format_value(value, unit)),
                    None => text += " |",
                }
            }
        }
        text += "\n";
        if !self.goals.is_empty() {
            text += "\n| goal: a limit by the worst run, a ratio by the median | at most | found | |\n|---|--:|--:|---|\n";
        }
        for goal in &self.goals {
            let Evaluation { found, bound, verdict } = goal.evaluate(&self.runs);
            _ = writeln!(text, "| {} of {} | {bound} | {found} | {verdict} |", goal.figure, goal.subject);
        }
        text + "\n" + &self.machine + "; " + &self.version.to_string() + "\n"
    }
}

impl Version {
    fn now() -> Self {
        let date = k8s_openapi::jiff::Timestamp::now().to_string();
        let date = date.split('T').next().unwrap_or_default().to_owned();
        Self {
            commit: git(&["rev-parse", "--short", "HEAD"]),
            is_changed: git(&["status", "--porcelain", "--", "hub", "agent", "proto"]).is_some(),
            date,
        }
    }

    fn is_old(&self) -> bool {
        let Some(commit) = &self.commit else { return true };
        let changes = ["diff", "--name-only", commit, "HEAD", "--", "hub/src", "agent/src", "proto/src"];
        self.is_changed || git(&["rev-parse", "--verify", commit]).is_none() || git(&changes).is_some()
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Some(commit) = &self.commit else { return f.write_str("commit unknown") };
        let changed = if self.is_changed { " and changes" } else { "" };
        write!(f, "commit {commit}{changed}, {}", self.date)
    }
}

fn git(args: &[&str]) -> Option<String> {
    let output =
        Command::new("git").current_dir(env!("CARGO_MANIFEST_DIR")).arg("-C").arg("..").args(args).output();
    let output = output.ok().filter(|output| output.status.success())?;
    let text = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (!text.is_empty()).then_some(text)
}

/// Returns the number of missed goals.
pub(crate) fn report(dir: &Path) -> anyhow::Result<usize> {
    let files = std::fs::read_dir(dir).with_context(|| format!("reading {} failed", dir.display()))?;
    let mut files: Vec<_> = files.map(|file| file.map(|file| file.path())).collect::<Result<_, _>>()?;
    files.sort_unstable();
    files.retain(|file| file.extension().is_some_and(|kind| kind == "json"));
    // `memory` stores another format.
    files.retain(|file| !file.file_name().is_some_and(|name| name.to_string_lossy().starts_with("memory-")));
    anyhow::ensure!(!files.is_empty(), "reporting failed: {} has no results", dir.display());
    let mut text = "| goal | at most | found | | command | of |\n|---|--:|--:|---|---|---|\n".to_owned();
    let mut missed = 0;
    for file in files {
        let results = Results::read(&file)?;
        results.draw(dir)?;
        for goal in &results.goals {
            let Evaluation { found, bound, verdict } = goal.evaluate(&results.runs);
            let (scenario, command) = (&results.scenario, &results.command);
            _ = writeln!(
                text,
                "| {} of {} | {bound} | {found} | {verdict} | [`{command}`]({scenario}.md) | {}{} |",
                goal.figure,
                goal.subject,
                results.version,
                if results.version.is_old() { ", **older than the code**" } else { "" }
            );
            missed += usize::from(verdict != Verdict::Met);
        }
    }
    std::fs::write(dir.join(SUMMARY), &text)?;
    println!("{text}");
    Ok(missed)
}

fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let memory = read("/proc/meminfo");
    let memory = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse().ok());
    let gigabytes = memory.unwrap_or(0_u64) >> 20;
    let build = if cfg!(debug_assertions) { "**debug build**, " } else { "" };
    let kernel = read("/proc/sys/kernel/osrelease");
    format!("{build}{cores} cores, {gigabytes} GiB, Linux {}; {}", kernel.trim(), assets::versions())
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    let lower = values[(values.len() - 1) / 2];
    Some(f64::midpoint(lower, upper))
}

fn format_value(value: f64, unit: &str) -> String {
    format!("{} {unit}", format_digits(value)).trim_end().to_owned()
}

fn format_digits(value: f64) -> String {
    // Turns -0 into 0.
    let value = value + 0.0;
    if value.abs() >= 100.0 || value.fract().abs() < f64::EPSILON {
        format!("{value:.0}")
    } else if value.abs() >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_show_medians_and_goals() {
        let measured = |subject: &str, value| {
            let mut measured = Measurement::new(subject);
            measured.add("p99", "ms", value);
            measured.add("share of nothing", "", f64::NAN);
            measured
        };
        let goals = vec![
            Goal::at_most("ours", "p99", 1.3).times("raw"),
            Goal::at_most("ours", "p99", 150.0),
            Goal::at_most("ours", "p99", 900.0),
            Goal::at_most("ours", "share of nothing", 1.0),
        ];
        let mut results = Results::new("x", "Ten agents".into(), "opa-hub-loadtest x".into(), goals);
        // Ratios are per run.
        for (ours, raw) in [(100.0, 100.0), (140.0, 100.0), (150.0, 80.0), (900.0, 1000.0)] {
            results.runs.push(vec![measured("ours", ours), measured("raw", raw)]);
        }
        let table = results.table();
        for expected in [
            "medians of 4 runs\n\n| | ours | raw |\n|---|--:|--:|\n| p99 | 145 ms | 100 ms |\n",
            "| p99 of ours | 1.3 × raw | 1.20 × (0.90 to 1.88) | met |",
            "| p99 of ours | 150 ms | 145 ms (100 to 900) | **missed** |",
            "| p99 of ours | 900 ms | 145 ms (100 to 900) | met |",
            "| share of nothing of ours | 1 |  | not measured |",
        ] {
            assert!(table.contains(expected), "{expected} is not in\n{table}");
        }
    }
}
