//! Times of other implementations in the same run, as `peers.py` writes them.

use std::path::Path;

use anyhow::Result;
use serde::Deserialize;

use crate::rows::{Row, Shape, read_rows, rounded, short};

/// Times of peers in the same run.
#[derive(Clone, Debug, Default)]
pub struct Peers(Vec<Peer>);

/// One time of a peer, or why there is none.
#[derive(Clone, Debug, Deserialize)]
pub struct Peer {
    /// Who.
    pub name: String,
    /// The kind of gate.
    pub gate: String,
    /// `fwd`, `fwdbwd`, `decode`; `train` for a step of a model of 340M; for the ceilings `matmul`, sizes
    /// `T x K` by `K x V`, and `copy`, T the bytes that are read and written.
    pub pass: String,
    /// Sizes.
    #[serde(flatten)]
    pub shape: Shape,
    /// Type of the inputs.
    pub dtype: Option<String>,
    /// Median; none where it failed.
    pub ms: Option<f64>,
    /// Why there is none.
    pub error: Option<String>,
    /// MiB at its highest.
    pub peak_mib: Option<f64>,
}

impl Peers {
    /// Reads the file that `peers.py` wrote.
    ///
    /// # Errors
    ///
    /// If it cannot be read, or is not what that script writes.
    pub fn read(path: &Path) -> Result<Self> {
        read_rows(path).map(Peers)
    }

    /// All of them.
    pub fn all(&self) -> &[Peer] {
        &self.0
    }

    /// GB/s of the fastest copy that was timed.
    pub fn copy_gbps(&self) -> Option<f64> {
        self.fastest("copy", |shape, ms| shape.time as f64 / ms / 1e6)
    }

    /// TFLOP/s of the fastest matrix product that was timed.
    pub fn matmul_tflops(&self) -> Option<f64> {
        self.fastest("matmul", |shape, ms| {
            let Shape { time, key_dim, value_dim, .. } = shape;
            2.0 * (time * key_dim * value_dim) as f64 / ms / 1e9
        })
    }

    fn fastest(&self, pass: &str, speed: impl Fn(Shape, f64) -> f64) -> Option<f64> {
        let of_pass = self.0.iter().filter(|peer| peer.pass == pass);
        of_pass.filter_map(|peer| Some(speed(peer.shape, peer.ms?))).reduce(f64::max)
    }

    /// The row beside each peer of its gate, pass and shape; alone if there is none. Peers run in half
    /// precision, f16 or bf16, and decode with states in f32: other rows stand alone.
    pub fn beside(&self, row: Row) -> Vec<Row> {
        let comparable = row.dtype != "f32" && row.state.as_deref().is_none_or(|x| x == "f32");
        let same = |peer: &&Peer| {
            comparable && peer.gate == row.gate && peer.pass == row.pass && peer.shape == row.shape
        };
        let ratio = |peer: &Peer| Some((peer.ms? / row.ms? * 1e3).round() / 1e3);
        let rows: Vec<Row> = self
            .0
            .iter()
            .filter(same)
            .map(|peer| Row {
                peer: Some(peer.name.clone()),
                peer_dtype: peer.dtype.clone(),
                peer_ms: peer.ms.map(rounded),
                peer_error: peer.error.as_ref().map(short),
                ratio: ratio(peer),
                peer_mib: peer.peak_mib.map(f64::round),
                ..row.clone()
            })
            .collect();
        if rows.is_empty() { vec![row] } else { rows }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peers(rows: &[&str]) -> Peers {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), format!("[{}]", rows.join(","))).unwrap();
        Peers::read(file.path()).unwrap()
    }

    fn peer(name: &str, pass: &str, time: usize, result: &str) -> String {
        format!(
            r#"{{"name":"{name}","gate":"none","pass":"{pass}","B":1,"T":{time},"H":3,"K":4,"V":5,{result}}}"#
        )
    }

    #[test]
    fn rows_stand_beside_every_peer_of_the_same_call() {
        let measured = peer("a", "fwd", 2, r#""dtype":"bf16","ms":3.0"#);
        let refused = peer("b", "fwd", 2, r#""ms":null,"error":"out of\n memory""#);
        let peers = peers(&[&measured, &refused, &peer("c", "decode", 2, r#""ms":1.0"#)]);
        let row = |gate: &str, pass: &str, dtype: &str| {
            let (gate, pass, dtype) = (gate.into(), pass.into(), dtype.into());
            let (shape, ms) = ("1,2,3,4,5".parse().unwrap(), Some(4.0));
            Row { gate, pass, dtype, shape, ms, ..Row::default() }
        };
        let rows = peers.beside(row("none", "fwd", "bf16"));
        let [a, b] = &rows[..] else { panic!("{rows:?}") };
        assert_eq!((a.peer.as_deref(), a.peer_ms, a.ratio), (Some("a"), Some(3.0), Some(0.75)));
        assert_eq!((a.peer_dtype.as_deref(), &a.peer_error), (Some("bf16"), &None));
        assert_eq!((b.peer.as_deref(), b.peer_ms, b.ratio), (Some("b"), None, None));
        assert_eq!(b.peer_error.as_deref(), Some("out of memory"));
        let failed = Row { ms: None, ..row("none", "fwd", "bf16") };
        let rows = peers.beside(failed);
        assert_eq!((rows.len(), rows[0].peer_ms, rows[0].ratio), (2, Some(3.0), None));
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
    }

    #[test]
    fn ceilings_are_those_of_the_fastest() {
        let copies =
            [("copy", 4_000_000, 2.0), ("copy", 4_000_000, 4.0), ("matmul", 1_000_000, 0.02)];
        let rows = copies.map(|(pass, time, ms)| peer("a", pass, time, &format!(r#""ms":{ms}"#)));
        let failed = peer("a", "copy", 1 << 40, r#""ms":null"#);
        let peers = peers(&[&rows[0], &rows[1], &rows[2], &failed]);
        assert_eq!((peers.copy_gbps(), peers.matmul_tflops()), (Some(2.0), Some(2.0)));
        assert_eq!(Peers::default().copy_gbps(), None);
    }
}
