//! Rows of results, as JSON, as lines of the terminal and as a table.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, Result, anyhow};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Sizes of one call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
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

/// One measurement, or why there is none. What older files do not tell is empty.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// `gla`.
    pub op: String,
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
    /// Median; none where it failed.
    pub ms: Option<f64>,
    /// The pass's first call in this process, which compiles.
    pub first_ms: Option<f64>,
    /// What it is compared with.
    pub peer: Option<String>,
    /// The peer's type.
    pub peer_dtype: Option<String>,
    /// Its median in the same run; none where it failed.
    pub peer_ms: Option<f64>,
    /// Why the peer has no time.
    pub peer_error: Option<String>,
    /// `peer_ms / ms`.
    pub ratio: Option<f64>,
    /// Bytes that the pass cannot do without, per second.
    pub gbps: Option<f64>,
    /// Operations of the recurrence, whatever the form does on top, per second.
    pub tflops: Option<f64>,
    /// Share of the time that these bytes and operations take at the measured ceilings.
    pub roofline: Option<f64>,
    /// MiB that the call holds at its highest, its tensors included.
    pub peak_mib: Option<f64>,
    /// The same of the peer, at its highest.
    pub peer_mib: Option<f64>,
    /// The ceiling of that run for bytes: copying large buffers, read and written.
    pub copy_gbps: Option<f64>,
    /// The one for operations: multiplying large half-precision matrices, if a peer did.
    pub matmul_tflops: Option<f64>,
    /// The adapter.
    #[serde(default)]
    pub device: String,
    /// Day of the run.
    pub date: String,
    /// Of the sources that ran.
    #[serde(default)]
    pub commit: String,
    /// Why there is no time.
    pub error: Option<String>,
}

impl Row {
    /// With its median, and what follows from it.
    pub fn timed(self, ms: f64, work: Work) -> Self {
        let share = |gbps| work.floor_ms(gbps, self.matmul_tflops) / ms;
        Row {
            ms: Some(rounded(ms)),
            gbps: Some((work.bytes / ms / 1e5).round() / 10.0),
            tflops: Some((work.operations / ms / 1e8).round() / 10.0),
            roofline: self.copy_gbps.map(|gbps| (share(gbps) * 1e3).round() / 1e3),
            ..self
        }
    }

    /// What ran, for charts.
    pub(crate) fn label(&self) -> String {
        let Row { shape, gate, pass, dtype, plan, instruction, .. } = self;
        let state = self.state.as_ref().map(|state| format!(", {state} state")).unwrap_or_default();
        format!("{shape} {gate} {pass} {dtype} {plan} {instruction}{state}")
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
    /// Milliseconds at these ceilings, see [`Row`].
    pub fn floor_ms(&self, copy_gbps: f64, matmul_tflops: Option<f64>) -> f64 {
        let matmul = matmul_tflops.map_or(0.0, |tflops| self.operations / tflops / 1e9);
        (self.bytes / copy_gbps / 1e6).max(matmul)
    }
}

/// Four digits after the point.
pub(crate) fn rounded(x: f64) -> f64 {
    (x * 1e4).round() / 1e4
}

/// The beginning of a message, in one line: what a row keeps of an error.
pub fn short(message: impl fmt::Display) -> String {
    clipped(&message.to_string(), 300)
}

/// At most so many characters, in one line.
pub(crate) fn clipped(text: &str, most: usize) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").chars().take(most).collect()
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Row { gate, pass, shape, dtype, plan, instruction, .. } = self;
        let shape = shape.to_string();
        write!(f, "{gate:6} {pass:6} {shape:20} {dtype:4} {plan} {instruction}")?;
        if let Some(state) = &self.state {
            write!(f, " {state} state")?;
        }
        if let (Some(ms), Some(gbps), Some(tflops)) = (self.ms, self.gbps, self.tflops) {
            write!(f, " {ms:9.4} ms {gbps:7.1} GB/s {tflops:6.1} TFLOP/s")?;
        }
        if let Some(error) = &self.error {
            write!(f, " failed: {error}")?;
        }
        if let Some(roofline) = self.roofline {
            write!(f, " {:3.0} %", 100.0 * roofline)?;
        }
        if let Some(mib) = self.peak_mib {
            write!(f, " {mib} MiB")?;
        }
        match (&self.peer, self.ratio, &self.peer_error) {
            (Some(peer), Some(ratio), _) => write!(f, "  {ratio:.2}x {peer}"),
            (Some(peer), None, Some(error)) => write!(f, "  {peer} failed: {error}"),
            _ => Ok(()),
        }
    }
}

/// Rows that stand beside several peers, one after the other, once.
pub(crate) fn each_once(rows: &[Row]) -> Vec<&Row> {
    let mut once: Vec<&Row> = rows.iter().collect();
    once.dedup_by_key(|row| row.label());
    once
}

/// The rows as a table in Markdown.
pub fn markdown(rows: &[Row]) -> String {
    let mut out = String::from(
        "| gate | pass | B,T,H,K,V | type | plan | ms | GB/s | TFLOP/s | of the ceiling | MiB | peer | its ms | ratio | its MiB |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for row in rows {
        let Row { gate, pass, shape, plan, instruction, .. } = row;
        let number = |x: Option<f64>| x.map(|x| x.to_string()).unwrap_or_default();
        let dtype = match &row.state {
            Some(state) => format!("{}, {state} state", row.dtype),
            None => row.dtype.clone(),
        };
        let share = row.roofline.map(|x| format!("{:.0} %", 100.0 * x)).unwrap_or_default();
        let ratio = row.ratio.map(|x| format!("{x:.2}")).unwrap_or_default();
        let peer = row.peer.as_deref().unwrap_or_default();
        let (ms, peer_ms) = (time(row.ms, &row.error), time(row.peer_ms, &row.peer_error));
        let [gbps, tflops] = [row.gbps, row.tflops].map(number);
        let [mib, peer_mib] = [row.peak_mib, row.peer_mib].map(number);
        out += &format!(
            "| {gate} | {pass} | {shape} | {dtype} | {plan}, {instruction} | {ms} | {gbps} | {tflops} \
             | {share} | {mib} | {peer} | {peer_ms} | {ratio} | {peer_mib} |\n"
        );
    }
    out
}

/// A cell of a table in Markdown: the time, or why there is none.
pub(crate) fn time(ms: Option<f64>, error: &Option<String>) -> String {
    match (ms, error) {
        (Some(ms), _) => ms.to_string(),
        (None, Some(error)) => format!("failed: {}", clipped(error, 80).replace('|', "/")),
        (None, None) => String::new(),
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

/// Reads the rows of a file, [`Row`] or another kind.
///
/// # Errors
///
/// If the file cannot be read, or has no such rows; the error names it.
pub fn read_rows<R: DeserializeOwned>(path: &Path) -> Result<Vec<R>> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).with_context(|| path.display().to_string())
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

    const WORK: Work = Work { bytes: 8e6, operations: 4e9 };

    fn row(pass: &str) -> Row {
        let shape = "1,2,3,4,5".parse().unwrap();
        let (copy_gbps, matmul_tflops) = (Some(8.0), Some(2.0));
        Row { pass: pass.into(), shape, copy_gbps, matmul_tflops, ..Row::default() }
    }

    #[test]
    fn rows_tell_speeds_and_shares_of_the_ceilings() {
        let timed = row("fwd").timed(4.0, WORK);
        assert_eq!((timed.ms, timed.gbps, timed.tflops), (Some(4.0), Some(2.0), Some(1.0)));
        assert_eq!(timed.roofline, Some(0.5));
        assert_eq!((WORK.floor_ms(8.0, None), WORK.floor_ms(8.0, Some(8.0))), (1.0, 1.0));
        let unknown = Row { copy_gbps: None, ..row("fwd") };
        assert_eq!(unknown.timed(4.0, WORK).roofline, None);
    }

    #[test]
    fn failed_rows_are_kept_and_told() {
        let error = Some("o: wrong |\n by far".to_string());
        let failed = Row { error, ..row("fwd") };
        let beside = Row {
            peer: Some("a".into()),
            peer_error: Some("out of memory".into()),
            ..row("fwd").timed(4.0, WORK)
        };
        assert!(failed.to_string().contains("failed: o: wrong"));
        assert!(beside.to_string().ends_with("a failed: out of memory"));
        let table = markdown(&[failed, beside]);
        assert_eq!((table.lines().count(), table.matches("| 1,2,3,4,5 |").count()), (4, 2));
        assert!(table.lines().all(|line| line.matches('|').count() == 15), "{table}");
        assert!(table.contains("| failed: o: wrong / by far |"), "{table}");
        assert!(table.contains("| a | failed: out of memory |"), "{table}");
    }

    #[test]
    fn rows_outlive_their_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let failed = Row { error: Some("é".into()), device: "GPU".into(), ..row("decode") };
        let rows = [row("fwd").timed(0.3, WORK), failed];
        write_rows(file.path(), &rows).unwrap();
        let text = std::fs::read_to_string(file.path()).unwrap();
        assert!(text.contains("\"ms\":null") && text.lines().count() == 4, "{text}");
        let read: Vec<Row> = read_rows(file.path()).unwrap();
        assert_eq!(read, rows);
        write_rows(file.path(), &read).unwrap();
        assert_eq!(std::fs::read_to_string(file.path()).unwrap(), text);
    }

    #[test]
    fn rows_of_older_files_are_read() {
        let old = r#"{"op":"gla","gate":"none","pass":"fwd","B":1,"T":2,"H":3,"K":4,"V":5,"dtype":"bf16",
            "state":null,"plan":"scan","instruction":"mma","ms":0.1,"peer":null,"peer_ms":null,"ratio":null,
            "gbps":1.0,"tflops":2.0,"roofline":null,"peak_mib":3.0,"peer_mib":null,"date":"2026-11-23"}"#;
        let row: Row = serde_json::from_str(old).unwrap();
        assert_eq!((row.ms, row.shape.value_dim, row.device.as_str()), (Some(0.1), 5, ""));
        assert_eq!((row.first_ms, row.error), (None, None));
    }

    #[test]
    fn texts_are_shortened_and_shapes_read() {
        assert_eq!(short("a\n  b".to_string() + &"c".repeat(400)).chars().count(), 300);
        assert!("1,2,3".parse::<Shape>().unwrap_err().to_string().contains("got 3 numbers"));
    }
}
