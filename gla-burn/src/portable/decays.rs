//! What the gates have in common: chunks with their decays applied, and the walk over the chunks.

use burn::backend::Backend;
use gla_kernels::GateKind;

use super::channel::Channel;
use super::layout::Chunks;
use super::num::Num;
use super::shared::Shared;

/// Chunks with their decays applied, or the gradients of all that.
///
/// A chunk that starts with state `S` puts out `q S + scores v` and ends with `total S + k^T v`.
pub(super) struct Decayed<B: Backend> {
    /// Queries, decayed from the start of the chunk to their step: `[B, H, N, 1, C, K]`.
    pub q: Num<B>,
    /// Keys, decayed from their step to the end of the chunk: `[B, H, N, 1, C, K]`.
    pub k: Num<B>,
    /// Decay over the chunk, broadcasts to `[B, H, N, 1, K, 1]`; `None` without a gate.
    pub total: Option<Num<B>>,
    /// `q_t k_s` decayed from s to t where s <= t, else 0: `[B, H, N, 1, C, C]`.
    ///
    /// Of a gradient only the part with s <= t counts.
    pub scores: Num<B>,
}

/// Gradients of queries, keys and gate, in the shapes that they had.
pub(super) struct SourceGrads<B: Backend> {
    pub q: Num<B>,
    pub k: Num<B>,
    pub gate: Option<Num<B>>,
}

/// Queries and keys in chunks, with what their gate does to them.
pub(super) enum Decays<B: Backend> {
    /// All channels of a key decay alike, or not at all.
    Shared(Shared<B>),
    /// Each channel of a key decays on its own.
    Channel(Channel<B>),
}

impl<B: Backend> Decays<B> {
    /// Takes q and k `[B, T, H, K]` and the gate `[B, T, H]` or `[B, T, H, K]` of a non-empty
    /// [`Problem`](super::problem::Problem) piece.
    pub fn new(chunks: Chunks, kind: GateKind, q: Num<B>, k: Num<B>, gate: Option<Num<B>>) -> Self {
        let (q, k) = (chunks.rows(q), chunks.rows(k));
        match gate {
            Some(gate) if kind == GateKind::Vector => {
                Self::Channel(Channel::new(q, k, chunks.rows(gate)))
            }
            gate => Self::Shared(Shared::new(q, k, gate.map(|gate| chunks.steps(gate)))),
        }
    }

    pub fn decayed(&self) -> Decayed<B> {
        match self {
            Self::Shared(shared) => shared.decayed(),
            Self::Channel(channel) => channel.decayed(),
        }
    }

    /// From `decayed` and its gradients `d`. All gradients have all B rows.
    pub fn backward(self, chunks: Chunks, decayed: Decayed<B>, d: Decayed<B>) -> SourceGrads<B> {
        let (d, gate) = match self {
            Self::Shared(shared) => {
                let mut d = shared.backward(decayed, d);
                let gate = d.gate.take().map(|gate| chunks.unsteps(gate));
                (d, gate)
            }
            Self::Channel(channel) => {
                let mut d = channel.backward(d);
                let gate = d.gate.take().map(|gate| chunks.unrows(gate));
                (d, gate)
            }
        };
        let (q, k) = (chunks.unrows(d.q), chunks.unrows(d.k));
        SourceGrads { q, k, gate }
    }
}

/// `x <- total_n x + inputs_n` over the chunks in the given order.
///
/// - x: `[B, H, K, V]`
/// - inputs: `[B, H, N, 1, K, V]`
///
/// Returns the x that each chunk found, `[B, H, N, 1, K, V]`, and the last, `[B, H, K, V]`.
pub(super) fn walk<B: Backend>(
    x: Num<B>,
    total: Option<&Num<B>>,
    inputs: &Num<B>,
    order: impl Iterator<Item = usize>,
) -> (Num<B>, Num<B>) {
    let shape: [usize; 4] = x.dims();
    let [batch, heads, key, value] = shape;
    let mut x = x.reshape([batch, heads, 1, 1, key, value]);
    let mut found = Vec::new();
    for n in order {
        found.push((n, x.clone()));
        if let Some(total) = total {
            x = x * total.slice(2, n..n + 1);
        }
        x = x + inputs.slice(2, n..n + 1);
    }
    found.sort_by_key(|&(n, _)| n);
    let found = found.into_iter().map(|(_, x)| x).collect();
    (Num::cat(found, 2), x.reshape(shape))
}
