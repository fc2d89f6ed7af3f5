//! What a scenario measured: figures by who was measured, run by run. Kept as JSON, shown as a Markdown table of
//! medians with the goals below it, and drawn.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use crate::histogram::Histogram;
use crate::picture;

/// All runs of a scenario.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Results {
    /// Its name, and that of its files.
    pub(crate) scenario: String,
    /// What was done, in a sentence.
    pub(crate) what: String,
    /// What does it again.
    pub(crate) command: String,
    pub(crate) goals: Vec<Goal>,
    pub(crate) runs: Vec<Vec<Measured>>,
}

/// What came of one who was measured in one run.
#[derive(Serialize, Deserialize, Clone, Default)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Measured {
    pub(crate) who: String,
    pub(crate) figures: Vec<Figure>,
    /// Delays in milliseconds at the percents of [`CURVE`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) curve: Vec<f64>,
}

#[derive(Serialize, Deserialize, Clone)]
pub(crate) struct Figure {
    pub(crate) name: String,
    pub(crate) unit: String,
    pub(crate) value: f64,
}

/// A bound on a figure, or on its ratio to that of somebody else.
#[derive(Serialize, Deserialize, Clone)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Goal {
    pub(crate) who: String,
    pub(crate) figure: String,
    pub(crate) at_most: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) relative_to: Option<String>,
}

/// Where curves are sampled.
pub(crate) const CURVE: [f64; 12] = [1.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.5, 99.9, 99.99, 100.0];

impl Measured {
    pub(crate) fn new(who: &str) -> Self {
        Self { who: who.to_owned(), ..Self::default() }
    }

    pub(crate) fn add(&mut self, name: &str, unit: &str, value: f64) {
        self.figures.push(Figure { name: name.to_owned(), unit: unit.to_owned(), value });
    }

    /// Adds the percentiles of `delays` under this name.
    pub(crate) fn add_delays(&mut self, name: &str, delays: &Histogram) {
        let ms = |percent| delays.percentile(percent) * 1000.0;
        for (label, percent) in [("p50", 50.0), ("p99", 99.0), ("max", 100.0)] {
            self.add(&format!("{name}, {label}"), "ms", ms(percent));
        }
        self.curve = CURVE.map(ms).to_vec();
    }

    fn value(&self, name: &str) -> Option<f64> {
        self.figures.iter().find(|figure| figure.name == name).map(|figure| figure.value)
    }
}

impl Goal {
    /// `figure` of `who` is at most this.
    pub(crate) fn at_most(who: &str, figure: &str, at_most: f64) -> Self {
        Self { who: who.to_owned(), figure: figure.to_owned(), at_most, relative_to: None }
    }

    /// … times that of `other`.
    pub(crate) fn times(self, other: &str) -> Self {
        Self { relative_to: Some(other.to_owned()), ..self }
    }
}

impl Goal {
    fn judge(&self, medians: &[Measured]) -> String {
        let value = |who: &str| medians.iter().find(|of| of.who == who).and_then(|of| of.value(&self.figure));
        let unit = medians.iter().flat_map(|of| &of.figures).find(|figure| figure.name == self.figure);
        let unit = unit.map_or("", |figure| figure.unit.as_str());
        let (found, bound) = match &self.relative_to {
            None => (value(&self.who), shown(self.at_most, unit)),
            Some(other) => {
                let ratio = value(&self.who).zip(value(other)).map(|(one, other)| one / other);
                (ratio, format!("{} × {other}", self.at_most))
            }
        };
        let Some(found) = found else { return format!("{} of {}: not measured", self.figure, self.who) };
        let shown = if self.relative_to.is_some() { format!("{found:.2} ×") } else { shown(found, unit) };
        let verdict = if found <= self.at_most { "met" } else { "**missed**" };
        format!("{} of {} at most {bound}: {shown}, {verdict}", self.figure, self.who)
    }
}

impl Results {
    /// Reads what was kept.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read(path)?;
        serde_json::from_slice(&text).with_context(|| format!("{} holds no results", path.display()))
    }

    /// Prints the table, and keeps all of it in `out`.
    pub(crate) fn finish(&self, out: Option<&Path>) -> anyhow::Result<()> {
        println!("{}", self.table());
        let Some(out) = out else { return Ok(()) };
        std::fs::create_dir_all(out)?;
        let json = serde_json::to_string_pretty(self)? + "\n";
        std::fs::write(out.join(format!("{}.json", self.scenario)), json)?;
        self.draw(out)?;
        println!("written to {}", out.display());
        Ok(())
    }

    /// Writes the table and the picture into `out`.
    pub(crate) fn draw(&self, out: &Path) -> anyhow::Result<()> {
        std::fs::write(out.join(format!("{}.md", self.scenario)), self.table())?;
        let curves: Vec<_> = self.medians().into_iter().filter(|of| !of.curve.is_empty()).collect();
        if !curves.is_empty() {
            std::fs::write(out.join(format!("{}.svg", self.scenario)), picture::curves(&self.what, &curves))?;
        }
        Ok(())
    }

    /// Of each figure of each who was measured, over the runs.
    fn medians(&self) -> Vec<Measured> {
        let Some(first) = self.runs.first() else { return Vec::new() };
        let of = |who: &Measured| {
            let runs: Vec<_> =
                self.runs.iter().filter_map(|run| run.iter().find(|of| of.who == who.who)).collect();
            let figure = |figure: &Figure| {
                let values = runs.iter().filter_map(|run| run.value(&figure.name)).collect();
                Figure { value: median(values), ..figure.clone() }
            };
            let curve =
                |at: usize| median(runs.iter().filter_map(|run| run.curve.get(at).copied()).collect());
            Measured {
                who: who.who.clone(),
                figures: who.figures.iter().map(figure).collect(),
                curve: (0..who.curve.len()).map(curve).collect(),
            }
        };
        first.iter().map(of).collect()
    }

    fn table(&self) -> String {
        let medians = self.medians();
        let mut names: Vec<(&str, &str)> = Vec::new();
        for figure in medians.iter().flat_map(|of| &of.figures) {
            if !names.iter().any(|(name, _)| *name == figure.name) {
                names.push((&figure.name, &figure.unit));
            }
        }
        let runs = match self.runs.len() {
            1 => "one run".to_owned(),
            count => format!("medians of {count} runs"),
        };
        let mut text = format!("{}: `{}`, {runs}\n\n| |", self.what, self.command);
        for of in &medians {
            _ = write!(text, " {} |", of.who);
        }
        text = text + "\n|---|" + &"--:|".repeat(medians.len());
        for (name, unit) in names {
            _ = write!(text, "\n| {name} |");
            for of in &medians {
                match of.value(name) {
                    Some(value) => _ = write!(text, " {} |", shown(value, unit)),
                    None => text += " |",
                }
            }
        }
        text += "\n";
        for goal in &self.goals {
            _ = write!(text, "\n- {}", goal.judge(&medians));
        }
        text + if self.goals.is_empty() { "" } else { "\n" }
    }

    /// The goals that are missed.
    pub(crate) fn missed(&self) -> usize {
        let medians = self.medians();
        self.goals.iter().filter(|goal| !goal.judge(&medians).ends_with(", met")).count()
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

fn shown(value: f64, unit: &str) -> String {
    let number = if value.abs() >= 100.0 || value.fract().abs() < f64::EPSILON {
        format!("{value:.0}")
    } else if value.abs() >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    };
    if unit.is_empty() { number } else { format!("{number} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_show_medians_and_goals() {
        let measured = |who: &str, value| {
            let mut measured = Measured::new(who);
            measured.add("p99", "ms", value);
            measured
        };
        let results = Results {
            scenario: "x".into(),
            what: "Ten agents".into(),
            command: "opa-hub-loadtest x".into(),
            goals: vec![Goal::at_most("ours", "p99", 1.3).times("raw"), Goal::at_most("ours", "p99", 100.0)],
            runs: [100.0, 140.0, 900.0]
                .map(|ours| vec![measured("ours", ours), measured("raw", 100.0)])
                .into(),
        };
        let table = results.table();
        assert!(
            table.contains(
                "medians of 3 runs\n\n| | ours | raw |\n|---|--:|--:|\n| p99 | 140 ms | 100 ms |\n"
            )
        );
        assert!(
            table.contains("1.40 ×, **missed**") && table.contains("at most 100 ms: 140 ms, **missed**"),
            "{table}"
        );
        assert_eq!(results.missed(), 2);
    }
}
