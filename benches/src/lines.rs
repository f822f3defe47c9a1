//! A chart of time against the length of the sequences, as SVG.

use std::fmt::Write;

use crate::plot::{escaped, head};
use crate::rows::each_once;
use crate::{Peers, Row};

const WIDTH: f64 = 880.0;
const HEIGHT: f64 = 480.0;
const LEFT: f64 = 70.0;
const TOP: f64 = 50.0;
const ROOM: (f64, f64) = (560.0, 370.0);
const COLORS: [&str; 8] =
    ["#3b6fb6", "#1f9e89", "#7a4fb5", "#2b2b2b", "#b9b9b9", "#d98c3f", "#c25b5b", "#8a8a50"];

/// One line of the chart: its name, and milliseconds by length.
struct Line {
    name: String,
    points: Vec<(f64, f64)>,
}

/// Lines of forward + backward on logarithmic axes: ours, one for each gate, and each peer's, of the
/// rows with the heads and widths of the first and as many steps in all.
pub fn lines(title: &str, rows: &[Row], peers: &Peers) -> String {
    let alike = |row: &Row, of: &Row| {
        let sizes = |row: &Row| {
            let s = row.shape;
            (s.batch * s.time, s.heads, s.key_dim, s.value_dim)
        };
        sizes(row) == sizes(of)
    };
    let mut lines: Vec<Line> = Vec::new();
    let mut add = |name: String, time: usize, ms: f64| {
        let point = (time as f64, ms);
        match lines.iter_mut().find(|line| line.name == name) {
            Some(line) => line.points.push(point),
            None => lines.push(Line { name, points: vec![point] }),
        }
    };
    let swept: Vec<&Row> = match rows.iter().find(|row| row.pass == "fwdbwd") {
        Some(first) => {
            let of_chart = |row: &&Row| row.pass == "fwdbwd" && alike(row, first);
            each_once(rows).into_iter().filter(of_chart).collect()
        }
        None => Vec::new(),
    };
    for row in &swept {
        add(with_gate("gla", &row.gate), row.shape.time, row.ms);
    }
    for peer in peers.all().iter().filter(|peer| peer.pass == "fwdbwd") {
        if swept.iter().any(|row| row.shape == peer.shape) {
            add(with_gate(&peer.name, &peer.gate), peer.shape.time, peer.ms);
        }
    }
    for line in &mut lines {
        line.points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    draw(title, &lines)
}

/// What a line is called.
fn with_gate(name: &str, gate: &str) -> String {
    match gate {
        "none" if name == "gla" => format!("{name}, no gate"),
        "none" => name.into(),
        _ => format!("{name}, {gate} gate"),
    }
}

fn draw(title: &str, lines: &[Line]) -> String {
    let points = || lines.iter().flat_map(|line| line.points.iter().copied());
    let range = |values: &mut dyn Iterator<Item = f64>, base: f64| {
        let all: Vec<f64> = values.map(|x| x.log(base)).collect();
        let low = all.iter().copied().reduce(f64::min).unwrap_or(0.0).floor();
        (low, all.into_iter().reduce(f64::max).unwrap_or(1.0).ceil().max(low + 1.0))
    };
    let (t0, t1) = range(&mut points().map(|p| p.0), 2.0);
    let (m0, m1) = range(&mut points().map(|p| p.1), 10.0);
    let x = |time: f64| LEFT + (time.log2() - t0) / (t1 - t0) * ROOM.0;
    let y = |ms: f64| TOP + (m1 - ms.log10()) / (m1 - m0) * ROOM.1;

    let mut out = String::new();
    let mut line = |text: String| writeln!(out, "{text}").expect("a string takes all");
    line(head(title, WIDTH, HEIGHT));
    let (right, bottom) = (LEFT + ROOM.0, TOP + ROOM.1);
    for power in t0 as i32..=t1 as i32 {
        let at = x(2f64.powi(power));
        line(format!(
            r##"<line x1="{at:.1}" y1="{TOP}" x2="{at:.1}" y2="{bottom}" stroke="#e0e0e0"/>"##
        ));
        let label = 2f64.powi(power);
        line(format!(
            r#"<text x="{at:.1}" y="{:.1}" text-anchor="middle">{label}</text>"#,
            bottom + 16.0
        ));
    }
    for power in m0 as i32..=m1 as i32 {
        let at = y(10f64.powi(power));
        line(format!(
            r##"<line x1="{LEFT}" y1="{at:.1}" x2="{right}" y2="{at:.1}" stroke="#e0e0e0"/>"##
        ));
        let label = 10f64.powi(power);
        line(format!(
            r#"<text x="{:.1}" y="{:.1}" text-anchor="end">{label} ms</text>"#,
            LEFT - 6.0,
            at + 4.0
        ));
    }
    line(format!(
        r#"<text x="{:.1}" y="{:.1}" text-anchor="middle">steps of a sequence</text>"#,
        LEFT + ROOM.0 / 2.0,
        bottom + 36.0
    ));
    for (n, one) in lines.iter().enumerate() {
        let color = COLORS[n % COLORS.len()];
        let path: Vec<String> =
            one.points.iter().map(|(t, ms)| format!("{:.1},{:.1}", x(*t), y(*ms))).collect();
        line(format!(
            r#"<polyline points="{}" fill="none" stroke="{color}" stroke-width="2"/>"#,
            path.join(" ")
        ));
        for (t, ms) in &one.points {
            let (at, up) = (x(*t), y(*ms));
            line(format!(r#"<circle cx="{at:.1}" cy="{up:.1}" r="3" fill="{color}"/>"#));
        }
        let at = TOP + 10.0 + 20.0 * n as f64;
        line(format!(
            r#"<rect x="{:.1}" y="{:.1}" width="12" height="4" fill="{color}"/>"#,
            right + 14.0,
            at - 5.0
        ));
        line(format!(
            r#"<text x="{:.1}" y="{at:.1}" font-size="11">{}</text>"#,
            right + 32.0,
            escaped(&one.name)
        ));
    }
    line("</svg>".to_string());
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Shape, Work};

    #[test]
    fn lengths_of_equal_work_make_a_line() {
        let row = |shape: &str, gate: &str, pass: &str, ms: f64| {
            let shape: Shape = shape.parse().unwrap();
            Row::new(gate, pass, shape, "bf16", ms, Work { bytes: 1.0, operations: 1.0 }, "")
        };
        let rows = [
            row("4,1024,2,8,8", "vector", "fwdbwd", 1.0),
            row("2,2048,2,8,8", "vector", "fwdbwd", 1.0),
            row("1,4096,2,8,8", "vector", "fwdbwd", 1.0),
            row("1,4096,2,8,8", "none", "fwdbwd", 0.5),
            row("1,4096,2,8,8", "none", "fwd", 0.5),
            row("1,4096,2,8,16", "none", "fwdbwd", 0.5),
        ];
        let file = tempfile::NamedTempFile::new().unwrap();
        let peer = r#"[{"name":"a & b","gate":"none","pass":"fwdbwd","B":1,"T":4096,"H":2,"K":8,"V":8,"ms":3}]"#;
        std::fs::write(file.path(), peer).unwrap();
        let text = lines("times", &rows, &Peers::read(file.path()).unwrap());
        assert_eq!(text.matches("<polyline").count(), 3);
        assert_eq!(text.matches("<circle").count(), 3 + 1 + 1);
        assert!(text.contains("gla, vector gate") && text.contains("a &amp; b<"));
        // the same time at all lengths is a level line
        let level = text.lines().find(|line| line.contains("<polyline")).unwrap();
        let heights: Vec<&str> = level
            .split('"')
            .nth(1)
            .unwrap()
            .split(' ')
            .map(|point| point.split(',').nth(1).unwrap())
            .collect();
        assert!(heights.len() == 3 && heights.iter().all(|h| *h == heights[0]), "{heights:?}");
        assert!(lines("none", &[], &Peers::default()).contains("</svg>"));
    }
}
