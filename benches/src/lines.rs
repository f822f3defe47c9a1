//! A chart of time against the length of the sequences, as SVG.

use std::collections::BTreeSet;
use std::fmt::Write;

use crate::Row;
use crate::plot::{device, escaped, head};
use crate::rows::each_once;

const WIDTH: f64 = 920.0;
const HEIGHT: f64 = 480.0;
const LEFT: f64 = 70.0;
const TOP: f64 = 50.0;
const ROOM: (f64, f64) = (560.0, 370.0);
const COLORS: [&str; 8] =
    ["#3b6fb6", "#1f9e89", "#7a4fb5", "#2b2b2b", "#b9b9b9", "#d98c3f", "#c25b5b", "#8a8a50"];

/// Lengths that make a chart: two happen to be as many steps in all, more are meant to.
const LENGTHS: usize = 3;

/// Lines of the chart: names, and milliseconds by length.
#[derive(Default)]
pub(crate) struct Lines(Vec<(String, Vec<(usize, f64)>)>);

impl Lines {
    /// Of several times for one length the first stays: that of what the device chooses for itself, since other
    /// plans are measured last, and of a peer beside several rows.
    pub fn add(&mut self, name: &str, time: usize, ms: f64) {
        let at = self.0.iter().position(|line| line.0 == name).unwrap_or_else(|| {
            self.0.push((name.into(), Vec::new()));
            self.0.len() - 1
        });
        let points = &mut self.0[at].1;
        if points.iter().all(|point| point.0 != time) {
            points.push((time, ms));
            points.sort_by_key(|point| point.0);
        }
    }
}

/// Lines of forward + backward on logarithmic axes: ours, one for each gate and type, and each peer's. Of the
/// rows of one size of head and as many steps in all, those with the most lengths; none if these are few.
pub fn lines(rows: &[Row]) -> Option<String> {
    let sizes = |row: &Row| {
        let s = row.shape;
        (s.batch * s.time, s.heads, s.key_dim, s.value_dim)
    };
    let both: Vec<&Row> = each_once(rows)
        .into_iter()
        .filter(|row| row.pass == "fwdbwd" && row.ms.is_some())
        .collect();
    let lengths = |of: &Row| {
        let alike = both.iter().filter(|row| sizes(row) == sizes(of));
        alike.map(|row| row.shape.time).collect::<BTreeSet<_>>().len()
    };
    let first = both.iter().rev().max_by_key(|row| lengths(row))?;
    if lengths(first) < LENGTHS {
        return None;
    }
    let swept = |row: &&Row| row.pass == "fwdbwd" && sizes(row) == sizes(first);
    let mut lines = Lines::default();
    for row in rows.iter().filter(swept) {
        let name = format!("gla, {}, {}", gate(&row.gate).unwrap_or("no gate".into()), row.dtype);
        row.ms.inspect(|&ms| lines.add(&name, row.shape.time, ms));
    }
    for row in rows.iter().filter(swept) {
        let told = [row.peer.clone(), gate(&row.gate), row.peer_dtype.clone()];
        let name = told.into_iter().flatten().collect::<Vec<_>>().join(", ");
        row.peer_ms.inspect(|&ms| lines.add(&name, row.shape.time, ms));
    }
    let (steps, heads, key_dim, value_dim) = sizes(first);
    let width = match key_dim == value_dim {
        true => key_dim.to_string(),
        false => format!("{key_dim} x {value_dim}"),
    };
    let device = device(rows).map(|device| format!(", {device}")).unwrap_or_default();
    let title =
        format!("forward + backward of {steps} steps in all, {heads} heads of {width}{device}");
    Some(draw(&title, &lines))
}

/// How a name tells of a gate.
fn gate(kind: &str) -> Option<String> {
    (kind != "none").then(|| format!("{kind} gate"))
}

/// The chart.
pub(crate) fn draw(title: &str, Lines(lines): &Lines) -> String {
    let points = || lines.iter().flat_map(|line| &line.1).map(|(time, ms)| (*time as f64, *ms));
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
    for (n, (name, points)) in lines.iter().enumerate() {
        let color = COLORS[n % COLORS.len()];
        let path: Vec<String> =
            points.iter().map(|(t, ms)| format!("{:.1},{:.1}", x(*t as f64), y(*ms))).collect();
        line(format!(
            r#"<polyline points="{}" fill="none" stroke="{color}" stroke-width="2"/>"#,
            path.join(" ")
        ));
        for (t, ms) in points {
            let (at, up) = (x(*t as f64), y(*ms));
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
            escaped(name)
        ));
    }
    line("</svg>".to_string());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(shape: &str, gate: &str, pass: &str, ms: f64) -> Row {
        let shape = shape.parse().unwrap();
        let (gate, pass, dtype) = (gate.into(), pass.into(), "bf16".into());
        Row { gate, pass, dtype, shape, ms: Some(ms), ..Row::default() }
    }

    #[test]
    fn lengths_of_equal_work_make_a_line() {
        let peer = |name: &str, peer_ms| {
            let row = row("1,4096,2,8,8", "none", "fwdbwd", 0.5);
            Row { peer: Some(name.into()), peer_ms, ..row }
        };
        let rows = [
            row("4,1024,2,8,8", "vector", "fwdbwd", 1.0),
            row("2,2048,2,8,8", "vector", "fwdbwd", 1.0),
            row("1,4096,2,8,8", "vector", "fwdbwd", 1.0),
            peer("a & b", Some(3.0)),
            peer("refused", None),
            row("1,4096,2,8,8", "none", "fwd", 0.5),
            row("1,4096,2,8,16", "none", "fwdbwd", 0.5),
            // another plan, of which the first is drawn
            row("1,4096,2,8,8", "vector", "fwdbwd", 2.0),
            Row { ms: None, ..row("1,4096,2,8,8", "scalar", "fwdbwd", 0.0) },
        ];
        let text = lines(&rows).unwrap();
        assert_eq!(text.matches("<polyline").count(), 3);
        assert_eq!(text.matches("<circle").count(), 3 + 1 + 1);
        assert!(text.contains("gla, vector gate, bf16<") && text.contains("a &amp; b<"));
        assert!(text.contains("4096 steps in all, 2 heads of 8<"), "{text}");
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
    }

    #[test]
    fn few_lengths_make_no_chart() {
        assert_eq!(lines(&[]), None);
        let two = [("2,8,1,4,4", 1.0), ("1,16,1,4,4", 1.0)];
        assert_eq!(lines(&two.map(|(shape, ms)| row(shape, "none", "fwdbwd", ms))), None);
    }
}
