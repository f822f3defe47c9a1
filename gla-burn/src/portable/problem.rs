//! Inputs in the dtype and with the heads of the computation, and how to cut them into pieces.

use std::ops::Range;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, DType, FloatDType, TensorMetadata};
use gla_kernels::GateKind;

use super::Args;
use super::layout::repeat_heads;
use super::num::Num;

/// Elements of the widest input in a small piece. What is computed from them is some ten times as
/// much, which is to fit a core's cache.
const PIECE: usize = 1 << 15;

/// What [`forward`](fn@super::forward) takes.
pub(super) struct Inputs<B: Backend> {
    pub q: FloatTensor<B>,
    pub k: FloatTensor<B>,
    pub v: FloatTensor<B>,
    pub gate: Option<FloatTensor<B>>,
    pub h0: Option<FloatTensor<B>>,
}

/// Inputs with H heads each and the scale in q.
pub(super) struct Problem<B: Backend> {
    pub kind: GateKind,
    pub dtype: FloatDType,
    /// `[B, T, H, K]`, scaled.
    pub q: Num<B>,
    /// `[B, T, H, K]`
    pub k: Num<B>,
    /// `[B, T, H, V]`
    pub v: Num<B>,
    /// `[B, T, H]` or `[B, T, H, K]`; a fixed gate is `[1, 1, H]` until [`at`](Self::at) makes it
    /// `[1, T, H]`.
    pub gate: Option<Num<B>>,
    /// `[N, H, K, V]`
    pub h0: Num<B>,
}

/// A part of a problem that needs nothing from the others.
#[derive(Clone)]
pub(super) struct Piece {
    pub batch: Range<usize>,
    pub time: Range<usize>,
    pub heads: Range<usize>,
    /// Rows of the state.
    pub rows: Range<usize>,
}

impl<B: Backend> Problem<B> {
    pub fn new(inputs: Inputs<B>, args: &Args) -> Self {
        let dtype = work_dtype(inputs.q.dtype());
        let q = Num::new(inputs.q, dtype).scale(args.scale);
        let [batch, _, heads, key] = q.dims();
        let by_head = |x| repeat_heads::<B, 4>(Num::new(x, dtype), 2, heads);
        let (k, v) = (by_head(inputs.k), by_head(inputs.v));
        let [.., value]: [usize; 4] = v.dims();
        let gate = inputs.gate.map(|gate| match args.kind {
            GateKind::Vector => by_head(gate),
            GateKind::Fixed => {
                let gate = Num::new(gate, dtype);
                let [gate_heads] = gate.dims();
                repeat_heads::<B, 3>(gate.reshape([1, 1, gate_heads]), 2, heads)
            }
            _ => repeat_heads::<B, 3>(Num::new(gate, dtype), 2, heads),
        });
        let h0 = match inputs.h0 {
            Some(h0) => Num::new(h0, dtype),
            None => {
                let rows = args.cu_seqlens.map_or(batch, |bounds| bounds.len() - 1);
                Num::zeros([rows, heads, key, value], &q)
            }
        };
        Self { kind: args.kind, dtype, q, k, v, gate, h0 }
    }

    /// A piece of the problem, which must have steps.
    pub fn at(&self, piece: &Piece) -> Self {
        let gate = self.gate.as_ref().map(|gate| match self.kind {
            GateKind::Fixed => {
                let gate = gate.slice(2, piece.heads.clone());
                gate.expand([1, piece.time.len(), piece.heads.len()])
            }
            _ => piece.steps(gate),
        });
        Self {
            kind: self.kind,
            dtype: self.dtype,
            q: piece.steps(&self.q),
            k: piece.steps(&self.k),
            v: piece.steps(&self.v),
            gate,
            h0: piece.state(&self.h0),
        }
    }
}

impl Piece {
    /// Whether there are no steps, so that the state stays as it is.
    pub fn is_empty(&self) -> bool {
        self.time.is_empty() || self.batch.is_empty()
    }

    /// The part of a tensor `[B, T, H, D]`.
    pub fn steps<B: Backend>(&self, x: &Num<B>) -> Num<B> {
        let x = x.slice(0, self.batch.clone());
        let x = x.slice(1, self.time.clone());
        x.slice(2, self.heads.clone())
    }

    /// The part of a state `[N, H, K, V]`.
    pub fn state<B: Backend>(&self, state: &Num<B>) -> Num<B> {
        let state = state.slice(0, self.rows.clone());
        state.slice(1, self.heads.clone())
    }
}

/// A problem in pieces: rows of the batch or packed sequences, each cut into groups of heads.
pub(super) struct Pieces {
    pub pieces: Vec<Piece>,
    /// The dimension of `[B, T, H, D]` that the outer cut is in.
    dim: usize,
    /// Groups of heads; they are neighbours in `pieces`.
    groups: usize,
}

impl Pieces {
    /// The fewest pieces there can be or, if `small`, pieces of about [`PIECE`] elements.
    pub fn new<B: Backend>(problem: &Problem<B>, args: &Args, small: bool) -> Self {
        let [batch, time, heads, key] = problem.q.dims();
        let [.., value]: [usize; 4] = problem.v.dims();
        let step = heads * key.max(value);
        let all_heads =
            |batch: Range<usize>, time, rows| Piece { batch, time, heads: 0..heads, rows };
        let (outer, dim): (Vec<Piece>, _) = match args.cu_seqlens {
            Some(bounds) => {
                let sequence =
                    |(n, pair): (usize, &[usize])| all_heads(0..batch, pair[0]..pair[1], n..n + 1);
                (bounds.windows(2).enumerate().map(sequence).collect(), 1)
            }
            None => {
                let batch_or_one = batch.max(1);
                let rows = match small {
                    true => (PIECE / (time * step).max(1)).clamp(1, batch_or_one),
                    false => batch_or_one,
                };
                let some_rows = |first: usize| {
                    let rows = first..(first + rows).min(batch);
                    all_heads(rows.clone(), 0..time, rows)
                };
                let first = (0..batch_or_one).step_by(rows);
                (first.map(some_rows).collect(), 0)
            }
        };
        let steps = outer.iter().map(|piece| piece.batch.len() * piece.time.len());
        let longest = steps.max().unwrap_or(0);
        let groups = match small {
            true => (longest * step).div_ceil(PIECE).clamp(1, heads),
            false => 1,
        };
        let some_heads = |piece: Piece| {
            (0..groups).map(move |n| Piece {
                heads: n * heads / groups..(n + 1) * heads / groups,
                ..piece.clone()
            })
        };
        Self { pieces: outer.into_iter().flat_map(some_heads).collect(), dim, groups }
    }

    /// Joins the parts `[B, T, H, ..]` of the pieces that are not empty.
    pub fn join<B: Backend>(&self, parts: Vec<Num<B>>) -> Option<Num<B>> {
        self.join_in(parts, 2, self.dim)
    }

    /// Joins the parts `[1, 1, H]` of what has neither rows nor steps: sums over all but heads.
    pub fn join_heads<B: Backend>(&self, parts: Vec<Num<B>>) -> Option<Num<B>> {
        self.join_in(parts, 2, 1).map(|x| x.sum(1))
    }

    /// Joins the parts of a state `[N, H, K, V]`.
    pub fn join_states<B: Backend>(&self, parts: Vec<Num<B>>) -> Num<B> {
        self.join_in(parts, 1, 0).expect("a state of each piece")
    }

    fn join_in<B: Backend>(
        &self,
        parts: Vec<Num<B>>,
        heads: usize,
        outer: usize,
    ) -> Option<Num<B>> {
        let joined: Vec<Num<B>> =
            parts.chunks(self.groups).map(|group| Num::cat(group.to_vec(), heads)).collect();
        (!joined.is_empty()).then(|| Num::cat(joined, outer))
    }
}

/// f64 stays; all else is computed in f32.
pub(super) fn work_dtype(dtype: DType) -> FloatDType {
    match dtype {
        DType::F64 => FloatDType::F64,
        _ => FloatDType::F32,
    }
}
