//! Rows of single layers.

use std::fmt;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use crate::lines::{Lines, draw};
use crate::rows::{rounded, time, write_rows, write_text};

/// A pass of one layer, or why there is none.
#[derive(Clone, Debug, Default, Serialize)]
pub struct LayerRow {
    /// `layer`.
    pub op: String,
    /// The kind of layer.
    pub mixer: String,
    /// `fwd` or `fwdbwd`.
    pub pass: String,
    /// Sequences.
    #[serde(rename = "B")]
    pub batch: usize,
    /// Their length.
    #[serde(rename = "T")]
    pub time: usize,
    /// Channels of a token.
    pub width: usize,
    /// Parameters of the layer.
    pub params: usize,
    /// Type of weights and activations.
    pub dtype: String,
    /// The adapter.
    pub device: String,
    /// Back-end.
    pub backend: String,
    /// Whether Burn's matrix products are the fastest of several.
    pub autotune: bool,
    /// Median; none where it failed.
    pub ms: Option<f64>,
    /// Tokens of a call by its time.
    pub tokens_per_s: Option<f64>,
    /// Softmax attention's `ms` by this, of the same pass and shape: how many times faster this is.
    pub ratio: Option<f64>,
    /// Day of the run.
    pub date: String,
    /// Of the sources that ran.
    pub commit: String,
    /// Why there is no time.
    pub error: Option<String>,
}

impl LayerRow {
    /// With its median, and what follows from it.
    pub fn timed(self, ms: f64) -> Self {
        let tokens = (self.batch * self.time) as f64;
        let tokens_per_s = Some((tokens / ms * 1e3).round());
        LayerRow { ms: Some(rounded(ms)), tokens_per_s, ..self }
    }
}

impl fmt::Display for LayerRow {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let LayerRow { mixer, pass, batch, time, width, dtype, .. } = self;
        write!(f, "{mixer:17} {pass:6} {batch} x {time} x {width} {dtype}")?;
        if let (Some(ms), Some(tokens)) = (self.ms, self.tokens_per_s) {
            write!(f, " {ms:9.3} ms {tokens:10.0} tokens/s")?;
        }
        match &self.error {
            Some(error) => write!(f, " failed: {error}"),
            None => Ok(()),
        }
    }
}

/// Sets the ratios to the rows of one kind of layer.
pub fn compare(rows: &mut [LayerRow], with: &str) {
    let others: Vec<LayerRow> = rows.iter().filter(|row| row.mixer == with).cloned().collect();
    for row in rows {
        let call = |row: &LayerRow| (row.pass.clone(), row.batch, row.time);
        let other = others.iter().find(|other| call(other) == call(row));
        let times = other.and_then(|other| other.ms).zip(row.ms);
        row.ratio = times.map(|(other, own)| (other / own * 1e3).round() / 1e3);
    }
}

/// Writes rows to a JSON file, and beside it a table (`.md`) and a chart (`.svg`).
///
/// # Errors
///
/// If a file cannot be written.
pub fn write_layers(path: &Path, rows: &[LayerRow]) -> Result<()> {
    write_rows(path, rows)?;
    write_text(&path.with_extension("md"), layer_table(rows))?;
    write_text(&path.with_extension("svg"), layer_chart(rows))
}

/// The rows as a table in Markdown.
pub fn layer_table(rows: &[LayerRow]) -> String {
    let mut out = String::from(
        "| layer | parameters | pass | B,T | width | type | ms | tokens/s | times faster than softmax attention |\n\
         |---|---|---|---|---|---|---|---|---|\n",
    );
    for row in rows {
        let LayerRow { mixer, params, pass, batch, time: length, width, dtype, .. } = row;
        let number =
            |x: Option<f64>, digits| x.map(|x| format!("{x:.digits$}")).unwrap_or_default();
        let (ms, tokens) = (time(row.ms, &row.error), number(row.tokens_per_s, 0));
        let ratio = number(row.ratio, 2);
        out += &format!(
            "| {mixer} | {params} | {pass} | {batch},{length} | {width} | {dtype} | {ms} | {tokens} | {ratio} |\n"
        );
    }
    out
}

/// Lines of forward + backward, one for each kind of layer.
fn layer_chart(rows: &[LayerRow]) -> String {
    let mut lines = Lines::default();
    for row in rows.iter().filter(|row| row.pass == "fwdbwd") {
        row.ms.inspect(|&ms| lines.add(&row.mixer, row.time, ms));
    }
    let title = rows.first().map_or_else(String::new, |row| {
        let LayerRow { batch, time, width, dtype, device, .. } = row;
        let tokens = batch * time;
        format!(
            "a layer of width {width}, forward + backward of {tokens} tokens, {dtype}, {device}"
        )
    });
    draw(&title, &lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(mixer: &str, pass: &str, time: usize, ms: Option<f64>) -> LayerRow {
        let (mixer, pass) = (mixer.into(), pass.into());
        LayerRow { mixer, pass, time, ms, ..LayerRow::default() }
    }

    #[test]
    fn layers_are_compared_by_pass_and_length() {
        let timed = LayerRow { batch: 2, ..row("gla", "fwd", 64, None) }.timed(0.5);
        assert_eq!((timed.ms, timed.tokens_per_s), (Some(0.5), Some(256_000.0)));
        let mut rows = [
            row("gla", "fwd", 64, Some(0.5)),
            row("gla", "fwd", 128, Some(0.5)),
            row("gla", "fwdbwd", 64, Some(0.5)),
            row("softmax", "fwd", 128, Some(2.0)),
            row("softmax", "fwd", 64, Some(1.0)),
            row("softmax", "fwdbwd", 64, None),
        ];
        compare(&mut rows, "softmax");
        let ratios = rows.map(|row| row.ratio);
        assert_eq!(ratios, [Some(2.0), Some(4.0), None, Some(1.0), Some(1.0), None]);
    }

    #[test]
    fn layers_are_drawn_and_told() {
        let failed = LayerRow { error: Some("a | b".into()), ..row("gla", "fwdbwd", 512, None) };
        let rows = [
            row("softmax", "fwdbwd", 128, Some(1.0)),
            row("softmax", "fwdbwd", 256, Some(2.0)),
            row("gla", "fwdbwd", 256, Some(1.0)),
            row("gla", "fwd", 512, Some(0.5)),
            failed.clone(),
        ];
        let chart = layer_chart(&rows);
        assert_eq!((chart.matches("<polyline").count(), chart.matches("<circle").count()), (2, 3));
        let table = layer_table(&rows);
        assert!(table.contains("| failed: a / b |"), "{table}");
        assert!(table.lines().all(|line| line.matches('|').count() == 10), "{table}");
        assert!(failed.to_string().contains("failed: a | b"));
        assert!(layer_chart(&[]).contains("</svg>"));
    }
}
