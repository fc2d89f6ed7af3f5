//! Bar chart of whole objects against fields.

use std::fmt::Write as _;

use super::MemoryRow;

const WIDTH: f64 = 720.0;
const LABEL: f64 = 190.0;
const BAR: f64 = 380.0;
const ROW: f64 = 62.0;
const TOP: f64 = 56.0;

pub(super) fn draw(pods: usize, all: &MemoryRow, auto: &MemoryRow) -> String {
    let megabytes = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let share = |row: &MemoryRow| 100.0 * row.rollout_changes as f64 / row.rollout_events as f64;
    let rows = [
        ("OPA's memory", "MB", megabytes(all.opa_settled), megabytes(auto.opa_settled)),
        ("snapshot", "MB", megabytes(all.snapshot), megabytes(auto.snapshot)),
        ("load of an empty OPA", "s", all.load.as_secs_f64(), auto.load.as_secs_f64()),
        ("events of a rollout that reach agents", "%", share(all), share(auto)),
    ];
    let height = TOP + ROW * rows.len() as f64 + 8.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"system-ui, sans-serif\" font-size=\"13\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\" rx=\"6\"/>\n\
         <text x=\"16\" y=\"26\" font-size=\"16\" font-weight=\"600\" fill=\"#1c2733\">One OPA beside {pods} pods</text>\n\
         <rect x=\"{LABEL}\" y=\"38\" width=\"10\" height=\"10\" fill=\"#9aa7b4\"/><text x=\"{}\" y=\"47\" fill=\"#44505c\">whole objects</text>\n\
         <rect x=\"{}\" y=\"38\" width=\"10\" height=\"10\" fill=\"#1f7a5c\"/><text x=\"{}\" y=\"47\" fill=\"#44505c\">--fields auto: what the policies read</text>\n",
        LABEL + 16.0,
        LABEL + 120.0,
        LABEL + 136.0
    );
    for (index, (name, unit, all, auto)) in (0..).zip(rows) {
        let y = TOP + ROW * f64::from(index) + 8.0;
        for (words, line) in wrapped(name).iter().zip(0..) {
            let y = y + 18.0 + 15.0 * f64::from(line);
            _ = writeln!(svg, "<text x=\"16\" y=\"{y}\" fill=\"#1c2733\">{words}</text>");
        }
        for (value, colour, line) in [(all, "#9aa7b4", 0), (auto, "#1f7a5c", 1)] {
            let y = y + 22.0 * f64::from(line);
            let width = (BAR * value / all.max(auto)).max(1.5);
            let shown = if value < 10.0 { format!("{value:.1}") } else { format!("{value:.0}") };
            _ = writeln!(
                svg,
                "<rect x=\"{LABEL}\" y=\"{y}\" width=\"{width:.1}\" height=\"18\" fill=\"{colour}\" rx=\"2\"/>\
                 <text x=\"{:.1}\" y=\"{}\" fill=\"#1c2733\">{shown} {unit}</text>",
                LABEL + width + 6.0,
                y + 14.0
            );
        }
    }
    svg + "</svg>\n"
}

fn wrapped(text: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let line = lines.last_mut().expect("lines is never empty");
        if line.len() + word.len() > 24 {
            lines.push(word.to_owned());
        } else {
            line.push_str(if line.is_empty() { "" } else { " " });
            line.push_str(word);
        }
    }
    lines
}
