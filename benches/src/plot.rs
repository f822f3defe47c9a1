//! Bar charts of rows, as SVG.

use std::fmt::Write;

use crate::Row;
use crate::rows::each_once;

const WIDTH: f64 = 1080.0;
const LABEL: f64 = 440.0;
const BAR: f64 = 14.0;
const GAP: f64 = 12.0;
/// Right of the longest bar of times: for the longest name of a peer.
const NAME: f64 = 250.0;
const OURS: &str = "#3b6fb6";
const PEER: &str = "#b9b9b9";

/// Horizontal bars on a logarithmic scale, two for each row beside a peer: ours and the peer's.
pub fn svg(rows: &[Row]) -> String {
    let device = device(rows).map(|device| format!(", {device}")).unwrap_or_default();
    let title = format!("milliseconds of a call, beside peers{device}");
    let rows: Vec<(&Row, f64, f64)> =
        rows.iter().filter_map(|row| Some((row, row.ms?, row.peer_ms?))).collect();
    let times = || rows.iter().flat_map(|(_, ms, peer_ms)| [*ms, *peer_ms]);
    // without rows the chart is empty
    let lowest = times().reduce(f64::min).unwrap_or(0.1).log10().floor();
    let highest = times().reduce(f64::max).unwrap_or(1.0).log10().ceil().max(lowest + 1.0);
    let room = WIDTH - LABEL - NAME;
    let x = |ms: f64| LABEL + (ms.log10() - lowest) / (highest - lowest) * room;
    let top = 50.0;
    let height = top + rows.len() as f64 * (2.0 * BAR + GAP) + 30.0;

    let mut out = String::new();
    let mut line = |text: String| writeln!(out, "{text}").expect("a string takes all");
    line(head(&title, WIDTH, height));
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
    for (n, (row, ms, peer_ms)) in rows.iter().enumerate() {
        let y = top + n as f64 * (2.0 * BAR + GAP);
        line(format!(
            r#"<text x="{:.1}" y="{:.1}" text-anchor="end">{}</text>"#,
            LABEL - 8.0,
            y + BAR + 4.0,
            escaped(&row.label())
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
        let ratio = row.ratio.map(|ratio| format!(" ({ratio:.2}x)")).unwrap_or_default();
        bar(y, *ms, OURS, format!("{ms}{ratio}"));
        let peer = row.peer.as_deref().unwrap_or_default();
        bar(y + BAR, *peer_ms, PEER, format!("{peer_ms} {peer}"));
    }
    line("</svg>".to_string());
    out
}

/// Horizontal bars: the share of each row's time that its bytes and operations take at the measured
/// ceilings. A row that stands beside several peers is drawn once.
pub fn roofline(rows: &[Row]) -> String {
    let title =
        format!("share of what {} was measured to do", device(rows).unwrap_or("the device"));
    let bar = |row: &Row| row.roofline.map(|share| (row.label(), share));
    let bars: Vec<(String, f64)> = each_once(rows).into_iter().filter_map(bar).collect();
    let top = 40.0;
    let room = WIDTH - LABEL - 60.0;
    let height = top + bars.len() as f64 * (BAR + 6.0) + 20.0;
    let mut out = head(&title, WIDTH, height) + "\n";
    for (n, (name, share)) in bars.iter().enumerate() {
        let y = top + n as f64 * (BAR + 6.0);
        let (width, text) = (share.min(1.0) * room, y + BAR - 3.0);
        out += &format!(
            r##"<text x="{:.1}" y="{text:.1}" text-anchor="end">{}</text>
<rect x="{LABEL}" y="{y:.1}" width="{room:.1}" height="{BAR}" fill="#eeeeee"/>
<rect x="{LABEL}" y="{y:.1}" width="{width:.1}" height="{BAR}" fill="{OURS}"/>
<text x="{:.1}" y="{text:.1}">{:.0} %</text>
"##,
            LABEL - 8.0,
            escaped(name),
            LABEL + room + 6.0,
            100.0 * share
        );
    }
    out + "</svg>\n"
}

/// The adapter, where the rows tell it.
pub(crate) fn device(rows: &[Row]) -> Option<&str> {
    rows.iter().map(|row| row.device.as_str()).find(|device| !device.is_empty())
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

    fn row(gate: &str, ms: f64) -> Row {
        let shape = "8,2048,4,128,256".parse().unwrap();
        let (gate, pass, dtype) = (gate.into(), "fwd".into(), "bf16".into());
        let row = Row { gate, pass, dtype, shape, plan: "scan".into(), ..Row::default() };
        row.timed(ms, Work { bytes: 1.0, operations: 1.0 })
    }

    fn widths(text: &str, color: &str) -> Vec<f64> {
        let bars = text.lines().filter(|line| line.starts_with("<rect x=") && line.contains(color));
        let width = |line: &str| line.split("width=\"").nth(1)?.split('"').next()?.parse().ok();
        bars.map(|line| width(line).unwrap()).collect()
    }

    #[test]
    fn shares_are_drawn_once_a_row() {
        let row = |gate, roofline| Row { roofline, ..row(gate, 0.2) };
        let beside = Row { peer: Some("b".into()), ..row("vector", Some(0.25)) };
        let text = roofline(&[row("vector", Some(0.25)), beside, row("none", None)]);
        assert!(text.starts_with("<svg") && text.trim_end().ends_with("</svg>"));
        assert!(text.contains("8,2048,4,128,256 vector fwd bf16 scan"), "{text}");
        let (room, share) = (widths(&text, "#eeeeee"), widths(&text, OURS));
        assert_eq!((room.len(), share.len()), (1, 1));
        assert!((share[0] - room[0] / 4.0).abs() < 0.06 && text.contains("25 %"), "{share:?}");
    }

    #[test]
    fn rows_with_times_and_peers_are_drawn() {
        let beside = |peer_ms: Option<f64>| {
            let (peer, ratio) = (Some("a & b".into()), peer_ms.map(|ms| ms / 0.2));
            Row { peer, peer_ms, ratio, ..row("vector", 0.2) }
        };
        let failed = Row { ms: None, error: Some("wrong".into()), ..beside(Some(2.0)) };
        let text = svg(&[beside(Some(2.0)), row("none", 0.3), beside(None), failed]);
        assert!(text.starts_with("<svg") && text.trim_end().ends_with("</svg>"));
        assert_eq!(text.matches("8,2048,4,128,256").count(), 1);
        assert!(text.contains("0.2 (10.00x)") && text.contains("2 a &amp; b"));
        // one decade is as wide as another: 0.2 to 2 is half of 0.1 to 10
        let (ours, peers) = (widths(&text, OURS), widths(&text, PEER));
        let room = WIDTH - LABEL - NAME;
        assert!((peers[0] - ours[0] - room / 2.0).abs() < 0.2, "{ours:?} {peers:?}");
        assert!(svg(&[]).contains("</svg>"));
    }

    #[test]
    fn titles_name_the_device_where_it_is_known() {
        let known = Row { device: "A GPU".into(), ..Row::default() };
        for (rows, named) in [([Row::default()], false), ([known], true)] {
            assert_eq!(svg(&rows).contains("A GPU"), named);
            assert_eq!(roofline(&rows).contains("what A GPU was"), named);
        }
    }
}
