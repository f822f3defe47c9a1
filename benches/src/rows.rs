//! Rows of results, beside the times of peers.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};

/// Sizes of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Sequences.
    #[serde(rename = "B")]
    pub batch: usize,
    /// Steps of each.
    #[serde(rename = "T")]
    pub time: usize,
    /// Heads.
    #[serde(rename = "H")]
    pub heads: usize,
    /// Key channels of a head.
    #[serde(rename = "K")]
    pub key_dim: usize,
    /// Value channels of a head.
    #[serde(rename = "V")]
    pub value_dim: usize,
}

impl FromStr for Shape {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let sizes: Vec<usize> = text.split(',').map(str::parse).collect::<Result<_, _>>()?;
        let [batch, time, heads, key_dim, value_dim] = sizes[..] else {
            return Err(anyhow!("{text}: expected B,T,H,K,V, got {} numbers", sizes.len()));
        };
        Ok(Shape { batch, time, heads, key_dim, value_dim })
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Shape { batch, time, heads, key_dim, value_dim } = self;
        write!(f, "{batch},{time},{heads},{key_dim},{value_dim}")
    }
}

/// One measurement.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// `gla`.
    pub op: &'static str,
    /// The kind of gate.
    pub gate: String,
    /// `fwd`, `fwdbwd` or `decode`.
    pub pass: String,
    /// Sizes.
    #[serde(flatten)]
    pub shape: Shape,
    /// Type of q, k, v, o.
    pub dtype: String,
    /// Type of the state that a decoding step reads and writes.
    pub state: Option<String>,
    /// The plan that ran.
    pub plan: String,
    /// How tiles were multiplied.
    pub instruction: String,
    /// Median.
    pub ms: f64,
    /// What it is compared with.
    pub peer: Option<String>,
    /// Its median in the same run.
    pub peer_ms: Option<f64>,
    /// `peer_ms / ms`.
    pub ratio: Option<f64>,
    /// Bytes that the pass cannot do without, per second.
    pub gbps: f64,
    /// Operations of the recurrence, whatever the form does on top, per second.
    pub tflops: f64,
    /// Share of the time that these bytes and operations take at the measured ceilings.
    pub roofline: Option<f64>,
    /// MiB that the call holds at its highest, its tensors included.
    pub peak_mib: Option<f64>,
    /// The same of the peer, at its highest.
    pub peer_mib: Option<f64>,
    /// Day of the run.
    pub date: String,
}

impl Row {
    /// A row without peer; plan and instruction are still to be told.
    pub fn new(
        gate: &str,
        pass: &str,
        shape: Shape,
        dtype: &str,
        ms: f64,
        work: Work,
        date: &str,
    ) -> Self {
        Row {
            op: "gla",
            gate: gate.into(),
            pass: pass.into(),
            shape,
            dtype: dtype.into(),
            state: None,
            plan: String::new(),
            instruction: String::new(),
            ms: rounded(ms),
            peer: None,
            peer_ms: None,
            ratio: None,
            gbps: (work.bytes / ms / 1e5).round() / 10.0,
            tflops: (work.operations / ms / 1e8).round() / 10.0,
            roofline: None,
            peak_mib: None,
            peer_mib: None,
            date: date.into(),
        }
    }
}

/// What a pass cannot do without.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// Each input read and each output written once.
    pub bytes: f64,
    /// Multiplications and additions of the recurrence.
    pub operations: f64,
}

impl Work {
    /// Milliseconds at the ceilings.
    pub fn floor_ms(&self, ceilings: &Ceilings) -> f64 {
        let matmul = ceilings.tflops.map_or(0.0, |tflops| self.operations / tflops / 1e9);
        (self.bytes / ceilings.gbps / 1e6).max(matmul)
    }
}

/// What the device was seen to do in the same run.
#[derive(Clone, Copy, Debug)]
pub struct Ceilings {
    /// Copying large buffers, read and written bytes.
    pub gbps: f64,
    /// Multiplying large half-precision matrices, if a peer did.
    pub tflops: Option<f64>,
}

/// Four digits after the point.
fn rounded(x: f64) -> f64 {
    (x * 1e4).round() / 1e4
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Row { gate, pass, shape, dtype, plan, instruction, ms, gbps, tflops, .. } = self;
        let shape = shape.to_string();
        write!(f, "{gate:6} {pass:6} {shape:20} {dtype:4} {plan} {instruction}")?;
        if let Some(state) = &self.state {
            write!(f, " {state} state")?;
        }
        write!(f, " {ms:9.4} ms {gbps:7.1} GB/s {tflops:6.1} TFLOP/s")?;
        if let Some(roofline) = self.roofline {
            write!(f, " {:3.0} %", 100.0 * roofline)?;
        }
        if let Some(mib) = self.peak_mib {
            write!(f, " {mib} MiB")?;
        }
        match (&self.peer, self.ratio) {
            (Some(peer), Some(ratio)) => write!(f, "  {ratio:.2}x {peer}"),
            _ => Ok(()),
        }
    }
}

/// Rows that stand beside several peers, one after the other, once.
pub(crate) fn each_once(rows: &[Row]) -> Vec<&Row> {
    fn call(row: &Row) -> impl PartialEq + '_ {
        let Row { gate, pass, shape, dtype, state, plan, instruction, .. } = row;
        (gate, pass, shape, dtype, state, plan, instruction)
    }
    let mut once: Vec<&Row> = rows.iter().collect();
    once.dedup_by(|row, last| call(row) == call(last));
    once
}

/// The rows as a table in Markdown.
pub fn markdown(rows: &[Row]) -> String {
    let mut out = String::from(
        "| gate | pass | B,T,H,K,V | type | plan | ms | GB/s | TFLOP/s | of the ceiling | MiB | peer | its ms | ratio | its MiB |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for row in rows {
        let Row { gate, pass, shape, plan, instruction, ms, gbps, tflops, .. } = row;
        let number = |x: Option<f64>| x.map(|x| x.to_string()).unwrap_or_default();
        let dtype = match &row.state {
            Some(state) => format!("{}, {state} state", row.dtype),
            None => row.dtype.clone(),
        };
        let share = row.roofline.map(|x| format!("{:.0} %", 100.0 * x)).unwrap_or_default();
        let ratio = row.ratio.map(|x| format!("{x:.2}")).unwrap_or_default();
        let peer = row.peer.as_deref().unwrap_or_default();
        let (mib, peer_ms) = (number(row.peak_mib), number(row.peer_ms));
        out += &format!(
            "| {gate} | {pass} | {shape} | {dtype} | {plan}, {instruction} | {ms} | {gbps} | {tflops} \
             | {share} | {mib} | {peer} | {peer_ms} | {ratio} | {} |\n",
            number(row.peer_mib)
        );
    }
    out
}

/// Times of peers in the same run.
#[derive(Clone, Debug, Default)]
pub struct Peers(Vec<Peer>);

/// One time of a peer, as `peers.py` writes it.
#[derive(Clone, Debug, Deserialize)]
pub struct Peer {
    /// Who.
    pub name: String,
    /// The kind of gate.
    pub gate: String,
    /// `fwd`, `fwdbwd`, `decode`; `train` for a step of a model of 340M; `matmul` for the ceiling, sizes `T x K` by `K x V`.
    pub pass: String,
    /// Sizes.
    #[serde(flatten)]
    pub shape: Shape,
    /// Median.
    pub ms: f64,
    /// MiB at its highest.
    #[serde(default)]
    pub peak_mib: Option<f64>,
}

impl Peers {
    /// Reads the file that `peers.py` wrote.
    ///
    /// # Errors
    ///
    /// If it cannot be read, or is not what that script writes.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        Ok(Peers(serde_json::from_str(&text).with_context(|| path.display().to_string())?))
    }

    /// All of them.
    pub fn all(&self) -> &[Peer] {
        &self.0
    }

    /// TFLOP/s of the largest matrix product that was timed.
    pub fn matmul_tflops(&self) -> Option<f64> {
        let products = self.0.iter().filter(|peer| peer.pass == "matmul");
        let speed = |peer: &Peer| {
            let Shape { time, key_dim, value_dim, .. } = peer.shape;
            2.0 * (time * key_dim * value_dim) as f64 / peer.ms / 1e9
        };
        products.map(speed).reduce(f64::max)
    }

    /// The row beside each peer of its gate, pass and shape; alone if there is none. Peers run in half
    /// precision, f16 or bf16, and decode with states in f32: other rows stand alone.
    pub fn beside(&self, row: Row) -> Vec<Row> {
        let comparable = row.dtype != "f32" && row.state.as_deref().is_none_or(|x| x == "f32");
        let same = |peer: &&Peer| {
            comparable && peer.gate == row.gate && peer.pass == row.pass && peer.shape == row.shape
        };
        let rows: Vec<Row> = self
            .0
            .iter()
            .filter(same)
            .map(|peer| Row {
                peer: Some(peer.name.clone()),
                peer_ms: Some(rounded(peer.ms)),
                ratio: Some((peer.ms / row.ms * 1e3).round() / 1e3),
                peer_mib: peer.peak_mib.map(f64::round),
                ..row.clone()
            })
            .collect();
        if rows.is_empty() { vec![row] } else { rows }
    }
}

/// A training step of a model.
#[derive(Clone, Debug, Serialize)]
pub struct ModelRow {
    /// `training step`.
    pub op: &'static str,
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
    pub ms: f64,
    /// The first step, which compiles.
    pub first_ms: f64,
    /// Tokens of a step by its time.
    pub tokens_per_s: f64,
    /// The op of all layers alone.
    pub op_ms: f64,
    /// The products with all weights alone.
    pub products_ms: f64,
    /// Their operations by their time.
    pub products_tflops: f64,
    /// MiB that the device's pool holds.
    pub peak_mib: Option<f64>,
    /// What it is compared with.
    pub peer: Option<String>,
    /// Its step in the same run.
    pub peer_ms: Option<f64>,
    /// `peer_ms / ms`.
    pub ratio: Option<f64>,
    /// Day of the run.
    pub date: String,
}

impl ModelRow {
    /// Per cent of the step: the op, the products, the rest.
    fn shares(&self) -> [f64; 3] {
        let [op, products] = [self.op_ms, self.products_ms].map(|part| 100.0 * part / self.ms);
        [op, products, 100.0 - op - products]
    }

    fn ways(&self) -> String {
        let tuned = if self.autotune { ", autotune" } else { "" };
        let again = if self.checkpointing { ", checkpointing" } else { "" };
        format!("{tuned}{again}")
    }

    /// As a table in Markdown.
    pub fn markdown(&self) -> String {
        let [op, products, rest] = self.shares();
        let number = |x: Option<f64>| x.map(|x| format!("{x:.1}")).unwrap_or_default();
        let ratio = self.ratio.map(|x| format!("{x:.2}")).unwrap_or_default();
        format!(
            "| model | B,T | type | device | ms | first ms | tokens/s | op | products | TFLOP/s | the rest | MiB | peer | its ms | ratio |\n\
             |---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n\
             | {}{} | {},{} | {} | {} | {:.1} | {:.0} | {:.0} | {op:.1} % | {products:.1} % | {:.0} | {rest:.1} % | {} | {} | {} | {ratio} |\n",
            self.model,
            self.ways(),
            self.batch,
            self.time,
            self.dtype,
            self.device,
            self.ms,
            self.first_ms,
            self.tokens_per_s,
            self.products_tflops,
            number(self.peak_mib),
            self.peer.as_deref().unwrap_or_default(),
            number(self.peer_ms),
        )
    }
}

impl fmt::Display for ModelRow {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let ModelRow { model, device, batch, time, dtype, ms, first_ms, .. } = self;
        let [op, products, rest] = self.shares();
        let ways = self.ways();
        write!(
            f,
            "{model} {batch} x {time} {dtype} {device}{ways}: {ms:.1} ms a step, {:.0} tokens/s; op {op:.1} %, \
             products {products:.1} % at {:.1} TFLOP/s, the rest {rest:.1} %; first step {:.1} s",
            self.tokens_per_s,
            self.products_tflops,
            first_ms / 1e3
        )?;
        match (&self.peer, self.ratio) {
            (Some(peer), Some(ratio)) => write!(f, "; {ratio:.2}x {peer}"),
            _ => Ok(()),
        }
    }
}

/// Writes rows as one JSON array, a row a line.
///
/// # Errors
///
/// If the file cannot be written.
pub fn write_rows<R: Serialize>(path: &Path, rows: &[R]) -> Result<()> {
    let lines: Vec<String> = rows.iter().map(serde_json::to_string).collect::<Result<_, _>>()?;
    write_text(path, format!("[\n {}\n]\n", lines.join(",\n ")))
}

/// Writes a file.
///
/// # Errors
///
/// If it cannot be written; the error names it.
pub fn write_text(path: &Path, text: String) -> Result<()> {
    std::fs::write(path, text).with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_stand_beside_every_peer_of_the_same_call() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let peer = |name: &str, pass: &str, ms: f64| {
            format!(
                r#"{{"name":"{name}","gate":"none","pass":"{pass}","B":1,"T":2,"H":3,"K":4,"V":5,"ms":{ms}}}"#
            )
        };
        let peers = [peer("a", "fwd", 3.0), peer("b", "fwd", 2.0), peer("c", "decode", 1.0)];
        std::fs::write(file.path(), format!("[{}]", peers.join(","))).unwrap();
        let peers = Peers::read(file.path()).unwrap();
        let shape: Shape = "1,2,3,4,5".parse().unwrap();
        let work = Work { bytes: 8e6, operations: 4e9 };
        let row =
            |gate: &str, pass: &str, dtype: &str| Row::new(gate, pass, shape, dtype, 4.0, work, "");
        let rows = peers.beside(row("none", "fwd", "bf16"));
        let told: Vec<_> = rows.iter().map(|row| (row.peer.as_deref(), row.ratio)).collect();
        assert_eq!(told, [(Some("a"), Some(0.75)), (Some("b"), Some(0.5))]);
        assert_eq!((rows[0].gbps, rows[0].tflops), (2.0, 1.0));
        let alone = [
            row("vector", "fwd", "bf16"),
            row("none", "fwd", "f32"),
            Row { state: Some("bf16".into()), ..row("none", "decode", "bf16") },
        ];
        for row in alone {
            let rows = peers.beside(row);
            assert_eq!((rows.len(), &rows[0].peer), (1, &None));
        }
        let state = Row { state: Some("f32".into()), ..row("none", "decode", "bf16") };
        assert_eq!(peers.beside(state)[0].ratio, Some(0.25));

        let ceilings = Ceilings { gbps: 8.0, tflops: Some(8.0) };
        assert_eq!(work.floor_ms(&ceilings), 1.0);
        assert_eq!(work.floor_ms(&Ceilings { tflops: Some(2.0), ..ceilings }), 2.0);
        assert_eq!(peers.matmul_tflops(), None);
        write_rows(file.path(), &rows).unwrap();
        let text = std::fs::read_to_string(file.path()).unwrap();
        let read: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
        assert_eq!((read.len(), &read[0]["V"]), (2, &serde_json::json!(5)));
        let table = markdown(&rows);
        assert_eq!((table.lines().count(), table.matches("| 1,2,3,4,5 |").count()), (4, 2));
        assert!(table.lines().all(|line| line.matches('|').count() == 15), "{table}");
        assert!("1,2,3".parse::<Shape>().unwrap_err().to_string().contains("got 3 numbers"));
    }
}
