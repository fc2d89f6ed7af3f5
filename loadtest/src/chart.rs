//! Line chart of delay percentiles on a logarithmic scale.

use std::fmt::Write as _;

use crate::results::CURVE;

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 340.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 260.0;
const TOP: f64 = 48.0;
const BOTTOM: f64 = 40.0;
const COLOURS: [&str; 6] = ["#1f7a5c", "#9aa7b4", "#b4552d", "#3465a4", "#8a5fa8", "#a08030"];

pub(crate) fn curves(title: &str, lines: &[(String, &[f64])]) -> String {
    let values = || lines.iter().flat_map(|(_, curve)| curve.iter().copied());
    let low = 10_f64.powf(values().fold(f64::MAX, f64::min).max(0.01).log10().floor());
    let high = 10_f64.powf(values().fold(0.1, f64::max).log10().ceil());
    let y = |ms: f64| {
        let share = (ms.max(low) / low).log10() / (high / low).log10();
        HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
    };
    // Every further nine of a percentile has equal width.
    let x = |percent: f64| {
        let nines = |percent: f64| -(1.0 - percent / 100.0).max(0.00005).log10();
        LEFT + nines(percent) / nines(100.0) * (WIDTH - LEFT - RIGHT)
    };
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"system-ui, sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#ffffff\" rx=\"6\"/>\n\
         <text x=\"16\" y=\"26\" font-size=\"14\" font-weight=\"600\" fill=\"#1c2733\">{}</text>\n",
        escaped(title)
    );
    let mut ms = low;
    while ms <= high * 1.01 {
        let height = y(ms);
        _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{height:.1}\" y2=\"{height:.1}\" stroke=\"#e3e8ee\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#44505c\">{ms} ms</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            height + 4.0
        );
        ms *= 10.0;
    }
    for percent in [50.0, 90.0, 99.0, 99.9, 100.0] {
        let left = x(percent);
        let label = if percent > 99.95 { "max".to_owned() } else { format!("p{percent}") };
        _ = writeln!(
            svg,
            "<text x=\"{left:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#44505c\">{label}</text>",
            HEIGHT - BOTTOM + 18.0
        );
    }
    for ((name, curve), colour) in lines.iter().zip(COLOURS.iter().cycle()) {
        let points: Vec<_> = CURVE
            .iter()
            .zip(*curve)
            .map(|(percent, ms)| format!("{:.1},{:.1}", x(*percent), y(*ms)))
            .collect();
        _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            points.join(" ")
        );
        if let Some(last) = curve.last() {
            _ = writeln!(
                svg,
                "<text x=\"{:.1}\" y=\"{:.1}\" fill=\"{colour}\">{}</text>",
                WIDTH - RIGHT + 8.0,
                y(*last) + 4.0,
                escaped(name)
            );
        }
    }
    svg + "</svg>\n"
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}
