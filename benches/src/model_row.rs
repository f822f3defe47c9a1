//! Rows of training steps.

use std::fmt;

use serde::Serialize;

use crate::rows::time;

/// A training step of a model, or why there is none: what was measured before is kept.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ModelRow {
    /// `training step`.
    pub op: String,
    /// Preset.
    pub model: String,
    /// Back-end.
    pub device: String,
    /// Sequences of a step.
    #[serde(rename = "B")]
    pub batch: usize,
    /// Their length.
    #[serde(rename = "T")]
    pub time: usize,
    /// Type of weights, activations and moments.
    pub dtype: String,
    /// Whether Burn's matrix products are the fastest of several.
    pub autotune: bool,
    /// Whether elementwise results are computed again in the backward.
    pub checkpointing: bool,
    /// Median.
    pub ms: Option<f64>,
    /// The first step, which compiles.
    pub first_ms: Option<f64>,
    /// Tokens of a step by its time.
    pub tokens_per_s: Option<f64>,
    /// The op of all layers alone.
    pub op_ms: Option<f64>,
    /// The products with all weights alone.
    pub products_ms: Option<f64>,
    /// Their operations by their time.
    pub products_tflops: Option<f64>,
    /// MiB that the device's pool holds.
    pub peak_mib: Option<f64>,
    /// What it is compared with.
    pub peer: Option<String>,
    /// The peer's type.
    pub peer_dtype: Option<String>,
    /// Its step in the same run.
    pub peer_ms: Option<f64>,
    /// Why the peer has no time.
    pub peer_error: Option<String>,
    /// `peer_ms / ms`.
    pub ratio: Option<f64>,
    /// Day of the run.
    pub date: String,
    /// Of the sources that ran.
    pub commit: String,
    /// Why it ended early.
    pub error: Option<String>,
}

impl ModelRow {
    /// Per cent of the step: the op, the products, the rest.
    fn shares(&self) -> Option<[f64; 3]> {
        let [op, products] = [self.op_ms?, self.products_ms?].map(|part| 100.0 * part);
        let ms = self.ms?;
        Some([op / ms, products / ms, 100.0 - (op + products) / ms])
    }

    fn ways(&self) -> String {
        let tuned = if self.autotune { ", autotune" } else { "" };
        let again = if self.checkpointing { ", checkpointing" } else { "" };
        format!("{tuned}{again}")
    }

    /// As a table in Markdown.
    pub fn markdown(&self) -> String {
        let number =
            |x: Option<f64>, digits: usize| x.map(|x| format!("{x:.digits$}")).unwrap_or_default();
        let [op, products, rest] = self
            .shares()
            .map_or_else(Default::default, |shares| shares.map(|x| format!("{x:.1} %")));
        let tenths = |ms: Option<f64>| ms.map(|ms| (10.0 * ms).round() / 10.0);
        let cells = [
            format!("{}{}", self.model, self.ways()),
            format!("{},{}", self.batch, self.time),
            self.dtype.clone(),
            self.device.clone(),
            time(tenths(self.ms), &self.error),
            number(self.first_ms, 0),
            number(self.tokens_per_s, 0),
            op,
            products,
            number(self.products_tflops, 0),
            rest,
            number(self.peak_mib, 1),
            self.peer.clone().unwrap_or_default(),
            time(tenths(self.peer_ms), &self.peer_error),
            number(self.ratio, 2),
        ];
        format!(
            "| model | B,T | type | device | ms | first ms | tokens/s | op | products | TFLOP/s | the rest | MiB | peer | its ms | ratio |\n\
             |---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n\
             | {} |\n",
            cells.join(" | ")
        )
    }
}

impl fmt::Display for ModelRow {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let ModelRow { model, device, batch, time, dtype, .. } = self;
        write!(f, "{model} {batch} x {time} {dtype} {device}{}:", self.ways())?;
        if let (Some(ms), Some(tokens), Some(first)) = (self.ms, self.tokens_per_s, self.first_ms) {
            let first = first / 1e3;
            write!(f, " {ms:.1} ms a step, {tokens:.0} tokens/s; first step {first:.1} s")?;
        }
        if let (Some([op, products, rest]), Some(tflops)) = (self.shares(), self.products_tflops) {
            write!(f, "; op {op:.1} %, products {products:.1} % at {tflops:.1} TFLOP/s")?;
            write!(f, ", the rest {rest:.1} %")?;
        }
        if let (Some(peer), Some(ratio)) = (&self.peer, self.ratio) {
            write!(f, "; {ratio:.2}x {peer}")?;
        }
        match &self.error {
            Some(error) => write!(f, " failed: {error}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_failed_is_told() {
        let row = ModelRow { ms: Some(20.0), op_ms: Some(1.0), ..ModelRow::default() };
        let whole = ModelRow { products_ms: Some(4.0), peer_ms: Some(10.04), ..row.clone() };
        let table = whole.markdown();
        assert!(table.contains("| 20 |") && table.contains("| 10 |"), "{table}");
        assert!(table.contains("| 5.0 % | 20.0 % |") && table.contains("| 75.0 % |"), "{table}");
        let failed = ModelRow { ms: None, error: Some("lost\n| device".into()), ..row };
        let table = failed.markdown();
        assert!(table.contains("| failed: lost / device |"), "{table}");
        assert!(table.lines().all(|line| line.matches('|').count() == 16), "{table}");
        assert!(failed.to_string().contains("failed: lost"));
    }
}
