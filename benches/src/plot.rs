//! A chart of rows beside their peers, as SVG.

use std::fmt::Write;

use crate::Row;
use crate::rows::each_once;

const WIDTH: f64 = 880.0;
const LABEL: f64 = 290.0;
const BAR: f64 = 14.0;
const GAP: f64 = 12.0;
const OURS: &str = "#3b6fb6";
const PEER: &str = "#b9b9b9";

/// Horizontal bars on a logarithmic scale, two for each row that has a peer: ours and the peer's.
pub fn svg(title: &str, rows: &[Row]) -> String {
    let rows: Vec<(&Row, f64)> = rows.iter().filter_map(|row| Some((row, row.peer_ms?))).collect();
    let times = || rows.iter().flat_map(|(row, peer)| [row.ms, *peer]);
    // without rows the chart is empty
    let lowest = times().reduce(f64::min).unwrap_or(0.1).log10().floor();
    let highest = times().reduce(f64::max).unwrap_or(1.0).log10().ceil().max(lowest + 1.0);
    let room = WIDTH - LABEL - 90.0;
    let x = |ms: f64| LABEL + (ms.log10() - lowest) / (highest - lowest) * room;
    let top = 50.0;
    let height = top + rows.len() as f64 * (2.0 * BAR + GAP) + 30.0;

    let mut out = String::new();
    let mut line = |text: String| writeln!(out, "{text}").expect("a string takes all");
    line(head(title, WIDTH, height));
    let mut decade = lowest;
    while decade <= highest {
        let (at, ms) = (x(10f64.powf(decade)), 10f64.powf(decade));
        let bottom = height - 25.0;
        line(format!(
            r##"<line x1="{at:.1}" y1="{top}" x2="{at:.1}" y2="{bottom}" stroke="#e0e0e0"/>"##
        ));
        line(format!(
            r#"<text x="{at:.1}" y="{:.1}" text-anchor="middle">{ms} ms</text>"#,
            height - 10.0
        ));
        decade += 1.0;
    }
    for (n, (row, peer_ms)) in rows.iter().enumerate() {
        let y = top + n as f64 * (2.0 * BAR + GAP);
        let name = format!("{} {} {}", row.shape, row.gate, row.pass);
        line(format!(
            r#"<text x="{:.1}" y="{:.1}" text-anchor="end">{}</text>"#,
            LABEL - 8.0,
            y + BAR + 4.0,
            escaped(&name)
        ));
        let mut bar = |y: f64, ms: f64, color: &str, text: String| {
            line(format!(
                r#"<rect x="{LABEL}" y="{y:.1}" width="{:.1}" height="{BAR}" fill="{color}"/>"#,
                x(ms) - LABEL
            ));
            line(format!(
                r#"<text x="{:.1}" y="{:.1}" font-size="11">{}</text>"#,
                x(ms) + 4.0,
                y + BAR - 3.0,
                escaped(&text)
            ));
        };
        bar(y, row.ms, OURS, format!("{} ({:.2}x)", row.ms, peer_ms / row.ms));
        let peer = row.peer.as_deref().unwrap_or_default();
        bar(y + BAR, *peer_ms, PEER, format!("{peer_ms} {peer}"));
    }
    line("</svg>".to_string());
    out
}

/// Horizontal bars: the share of each row's time that its bytes and operations take at the measured
/// ceilings. A row that stands beside several peers is drawn once.
pub fn roofline(title: &str, rows: &[Row]) -> String {
    let bar = |row: &Row| {
        let Row { shape, gate, pass, dtype, plan, instruction, .. } = row;
        let state = row.state.as_ref().map(|state| format!(", {state} state")).unwrap_or_default();
        let name = format!("{shape} {gate} {pass} {dtype} {plan} {instruction}{state}");
        row.roofline.map(|share| (name, share))
    };
    let bars: Vec<(String, f64)> = each_once(rows).into_iter().filter_map(bar).collect();
    let (label, top) = (LABEL + 150.0, 40.0);
    let room = WIDTH - label - 60.0;
    let height = top + bars.len() as f64 * (BAR + 6.0) + 20.0;
    let mut out = head(title, WIDTH, height) + "\n";
    for (n, (name, share)) in bars.iter().enumerate() {
        let y = top + n as f64 * (BAR + 6.0);
        let (width, text) = (share.min(1.0) * room, y + BAR - 3.0);
        out += &format!(
            r##"<text x="{:.1}" y="{text:.1}" text-anchor="end">{}</text>
<rect x="{label}" y="{y:.1}" width="{room:.1}" height="{BAR}" fill="#eeeeee"/>
<rect x="{label}" y="{y:.1}" width="{width:.1}" height="{BAR}" fill="{OURS}"/>
<text x="{:.1}" y="{text:.1}">{:.0} %</text>
"##,
            label - 8.0,
            escaped(name),
            label + room + 6.0,
            100.0 * share
        );
    }
    out + "</svg>\n"
}

/// The start of a chart: its size, a white ground and the title.
pub(crate) fn head(title: &str, width: f64, height: f64) -> String {
    let title = escaped(title);
    format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">
<rect width="{width}" height="{height}" fill="white"/>
<text x="10" y="20" font-size="15">{title}</text>"#
    )
}

pub(crate) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Work;

    const WORK: Work = Work { bytes: 1.0, operations: 1.0 };

    #[test]
    fn shares_are_drawn_once_a_row() {
        let shape = "8,2048,4,128,256".parse().unwrap();
        let mut row = Row::new("vector", "fwd", shape, "bf16", 0.2, WORK, "");
        row.roofline = Some(0.25);
        let beside = Row { peer: Some("b".into()), ..row.clone() };
        let without = Row::new("none", "fwd", shape, "bf16", 0.3, WORK, "");
        let text = roofline("shares", &[row, beside, without]);
        assert!(text.starts_with("<svg") && text.trim_end().ends_with("</svg>"));
        assert_eq!((text.matches("8,2048,4,128,256").count(), text.matches(OURS).count()), (1, 1));
        // the one row: its room and the share of it; the ground of the chart has no x
        let widths: Vec<f64> = text
            .lines()
            .filter_map(|line| {
                line.strip_prefix("<rect ")?.split_once(" width=\"")?.1.split_once('"')
            })
            .map(|(width, _)| width.parse().unwrap())
            .collect();
        let [room, share] = widths[..] else { panic!("{widths:?} for one row") };
        assert!((share - room / 4.0).abs() < 0.06 && text.contains("25 %"), "{share} of {room}");
    }

    #[test]
    fn rows_with_peers_are_drawn() {
        let shape = "8,2048,4,128,256".parse().unwrap();
        let mut with = Row::new("vector", "fwd", shape, "bf16", 0.2, WORK, "");
        (with.peer, with.peer_ms) = (Some("a & b".into()), Some(2.0));
        let without = Row::new("none", "fwd", shape, "bf16", 0.3, WORK, "");
        let text = svg("times", &[with, without]);
        assert!(text.starts_with("<svg") && text.trim_end().ends_with("</svg>"));
        assert_eq!(text.matches("8,2048,4,128,256").count(), 1);
        assert!(text.contains("0.2 (10.00x)") && text.contains("2 a &amp; b"));
        // one decade is as wide as another: 0.2 to 2 is half of 0.1 to 10
        let widths: Vec<f64> = text
            .lines()
            .filter(|line| line.contains(OURS) || line.contains(PEER))
            .map(|line| {
                let from = line.split("width=\"").nth(1).unwrap();
                from.split('"').next().unwrap().parse().unwrap()
            })
            .collect();
        let room = WIDTH - LABEL - 90.0;
        assert!((widths[1] - widths[0] - room / 2.0).abs() < 0.2, "{widths:?}");
        assert!(svg("none", &[]).contains("</svg>"));
    }
}
