//! Line charts as SVG files: axes, ticks, lines with marks, a legend. Nothing more is needed, so no library is.

use std::fmt::Write;

/// One line of a chart.
#[derive(Debug, Clone)]
pub(super) struct Series {
    pub(super) name: String,
    /// (x, y), in the order that they are joined in.
    pub(super) points: Vec<(f64, f64)>,
    /// Drawn dashed.
    pub(super) dashed: bool,
}

/// A chart with a logarithmic x axis and a linear y axis from 0 to 1.
#[derive(Debug, Clone)]
pub(super) struct Chart {
    pub(super) title: String,
    pub(super) x_label: String,
    pub(super) y_label: String,
    /// A horizontal line to compare with.
    pub(super) mark_y: Option<f64>,
    pub(super) series: Vec<Series>,
}

const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 56.0;
/// Room for the legend beside the last chart.
const LEGEND: f64 = 130.0;
/// Okabe and Ito's colours, which colour-blind readers tell apart (black and yellow left out).
const COLOURS: [&str; 8] = ["#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666", "#7b3294"];

/// Charts side by side, with one legend for all; equal names have equal colours.
pub(super) fn render(charts: &[Chart]) -> String {
    let mut names: Vec<(&str, bool)> = Vec::new();
    for series in charts.iter().flat_map(|chart| &chart.series) {
        if !names.iter().any(|(name, _)| *name == series.name) {
            names.push((&series.name, series.dashed));
        }
    }
    let width = WIDTH * charts.len() as f64 + LEGEND;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{HEIGHT:.0}\" \
         viewBox=\"0 0 {width:.0} {HEIGHT:.0}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    for (i, chart) in charts.iter().enumerate() {
        let _ = writeln!(svg, "<g transform=\"translate({:.0} 0)\">", WIDTH * i as f64);
        draw(chart, &names, &mut svg);
        svg.push_str("</g>\n");
    }
    for (i, (name, dashed)) in names.iter().enumerate() {
        let (x, y) = (WIDTH * charts.len() as f64, TOP + 10.0 + 20.0 * i as f64);
        let _ = writeln!(
            svg,
            "<path d=\"M{x:.0} {y:.0}h24\" stroke=\"{}\" stroke-width=\"2\"{}/>\
             <text x=\"{:.0}\" y=\"{:.0}\">{}</text>",
            COLOURS[i % COLOURS.len()],
            dash(*dashed),
            x + 30.0,
            y + 4.0,
            escaped(name)
        );
    }
    svg.push_str("</svg>\n");
    svg
}

fn draw(chart: &Chart, names: &[(&str, bool)], svg: &mut String) {
    let positive = chart.series.iter().flat_map(|series| &series.points).map(|p| p.0).filter(|x| *x > 0.0);
    let (low, high) = positive.fold((f64::INFINITY, 0.0_f64), |(low, high), x| (low.min(x), high.max(x)));
    let (low, high) = if low < high { (low.log10(), high.log10()) } else { (-1.0, 0.0) };
    let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
    let x = |value: f64| LEFT + (value.max(1e-12).log10() - low) / (high - low) * (right - LEFT);
    let y = |value: f64| bottom - value.clamp(0.0, 1.0) * (bottom - TOP);
    for tick in 0..=10 {
        let value = f64::from(tick) / 10.0;
        let at = y(value);
        let _ = writeln!(
            svg,
            "<path d=\"M{LEFT} {at:.1}H{right}\" stroke=\"#e4e4e4\"/>\
             <text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\">{value}</text>",
            LEFT - 6.0,
            at + 4.0
        );
    }
    for value in ticks(low, high) {
        let at = x(value);
        let _ = writeln!(
            svg,
            "<path d=\"M{at:.1} {TOP}V{bottom}\" stroke=\"#e4e4e4\"/>\
             <text x=\"{at:.1}\" y=\"{:.0}\" text-anchor=\"middle\">{value}</text>",
            bottom + 16.0
        );
    }
    if let Some(mark) = chart.mark_y {
        let at = y(mark);
        let _ = writeln!(svg, "<path d=\"M{LEFT} {at:.1}H{right}\" stroke=\"#999\" stroke-dasharray=\"2 3\"/>");
    }
    for series in &chart.series {
        let place = names.iter().position(|(name, _)| *name == series.name).unwrap_or_default();
        let colour = COLOURS[place % COLOURS.len()];
        let points: Vec<(f64, f64)> =
            series.points.iter().filter(|p| p.0 > 0.0 && p.1.is_finite()).map(|p| (x(p.0), y(p.1))).collect();
        let path: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"{}/>",
            path.join(" "),
            dash(series.dashed)
        );
        for (x, y) in points {
            let _ = write!(svg, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.5\" fill=\"{colour}\"/>");
        }
        svg.push('\n');
    }
    let middle = (LEFT + right) / 2.0;
    let centre = (TOP + bottom) / 2.0;
    let _ = writeln!(
        svg,
        "<path d=\"M{LEFT} {TOP}V{bottom}H{right}\" fill=\"none\" stroke=\"black\"/>\n\
         <text x=\"{middle:.0}\" y=\"22\" text-anchor=\"middle\" font-size=\"14\">{}</text>\n\
         <text x=\"{middle:.0}\" y=\"{:.0}\" text-anchor=\"middle\">{}</text>\n\
         <text transform=\"translate(16 {centre:.0}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
        escaped(&chart.title),
        HEIGHT - 14.0,
        escaped(&chart.x_label),
        escaped(&chart.y_label)
    );
}

/// 1, 2 and 5 of each power of ten in the range; whole powers alone where these would stand too close.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let steps: &[f64] = if high - low > 3.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
    let powers = low.floor() as i32..=high.ceil() as i32;
    let all = powers.flat_map(|power| steps.iter().map(move |step| (step * 1e9 * 10_f64.powi(power)).round() / 1e9));
    all.filter(|tick| (low - 1e-9..=high + 1e-9).contains(&tick.log10())).collect()
}

fn dash(dashed: bool) -> &'static str {
    if dashed { " stroke-dasharray=\"6 4\"" } else { "" }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn charts_hold_their_lines_and_share_a_legend() {
        let series = |name: &str, dashed| Series { name: name.into(), points: vec![(0.01, 0.5), (0.1, 1.0)], dashed };
        let chart = |series| Chart {
            title: "a < b & c".into(),
            x_label: "x".into(),
            y_label: "y".into(),
            mark_y: Some(0.95),
            series,
        };
        let svg =
            render(&[chart(vec![series("ours", false), series("theirs", true)]), chart(vec![series("ours", false)])]);
        assert_eq!(svg.matches("<polyline").count(), 3);
        assert_eq!(svg.matches(">ours</text>").count(), 1);
        assert_eq!(svg.matches("a &lt; b &amp; c").count(), 2);
        // The ends of the x axis, and recall 1 at the top.
        assert!(svg.contains("60.0,192.0 540.0,40.0"), "{svg}");
        assert_eq!(svg.matches("<g").count(), svg.matches("</g>").count());
    }

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(ticks(-2.0, -1.0), [0.01, 0.02, 0.05, 0.1]);
        assert!(ticks(0.1, 0.2).is_empty());
        assert_eq!(ticks(0.0, 4.0), [1.0, 10.0, 100.0, 1000.0, 10_000.0]);
    }

    #[test]
    fn empty_charts_are_drawn_too() {
        let chart = Chart {
            title: String::new(),
            x_label: String::new(),
            y_label: String::new(),
            mark_y: None,
            series: vec![Series { name: "none".into(), points: vec![(0.0, f64::NAN)], dashed: false }],
        };
        assert!(!render(&[chart]).contains("NaN"));
    }
}
