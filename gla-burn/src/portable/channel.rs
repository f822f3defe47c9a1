//! A gate per key channel, without a tensor over pairs of steps and channels.
//!
//! Two steps s < t of a chunk differ in some highest bit l. Let m be t with the bits below l
//! cleared, so that s < m <= t. There the decay from s to t factors:
//!
//! ```text
//! exp(g_{s+1} + .. + g_t) = exp(g_{s+1} + .. + g_{m-1}) * exp(g_m + .. + g_t)
//! ```
//!
//! The first factor is the same for all t that m separates from s, the second for all such s. So
//! at each level l a step takes part once, as a query where bit l is set and else as a key, with
//! one factor that is at most 1. The scores of a level are one matrix product, masked to the
//! pairs whose highest different bit is l. A chunk of C steps has log2 C levels; the pairs t = s
//! do not decay and go apart.
//!
//! The decays from the start of the chunk and to its end have the same form, so they follow as one
//! block with all steps as queries and one with all as keys.
//!
//! All exponents of a chunk are sums of its gates: they come from one product with a constant
//! matrix of zeros and ones, and the gate gets its gradient from the transposed product. No
//! exponent is a difference of sums, so a strong gate takes no digits from a weak one.

use burn::backend::Backend;

use super::decays::{Decayed, SourceGrads};
use super::num::{Mask, Num};

pub(super) struct Channel<B: Backend> {
    blocks: Blocks,
    q: Num<B>,
    k: Num<B>,
    /// The constant matrix, `[1, 1, 1, 1, R, C]` with R rows for (block, step).
    sums: Num<B>,
    /// `[B, H, N, blocks, C, K]`
    decays: Num<B>,
    /// Decays times the queries or keys they belong to, `[B, H, N, blocks, C, K]`.
    decayed: Num<B>,
}

impl<B: Backend> Channel<B> {
    /// - q, k, gate: `[B, H, N, 1, C, K]`
    pub fn new(q: Num<B>, k: Num<B>, gate: Num<B>) -> Self {
        let [batch, heads, count, _, len, key] = gate.dims();
        let blocks = Blocks::new(len);
        let rows = blocks.count() * len;
        let sums = Num::ones_where([1, 1, 1, 1, rows, len], &gate, |[.., row, m]| {
            blocks.sums(row / len, row % len, m)
        });
        let decays = sums.clone().matmul(gate).exp();
        let source: Vec<usize> = (0..rows).map(|row| blocks.source(row / len, row % len)).collect();
        let decayed = Num::cat(vec![q.clone(), k.clone()], 4).select(4, &source) * decays.clone();
        let shape = [batch, heads, count, blocks.count(), len, key];
        Self { blocks, q, k, sums, decays: decays.reshape(shape), decayed: decayed.reshape(shape) }
    }

    pub fn decayed(&self) -> Decayed<B> {
        let block = |n| self.decayed.slice(3, n..n + 1);
        let levels = self.levels();
        let scores = levels.clone().matmul(levels.t());
        let lower = self.blocks.mask(&self.q, |t, s| s < t);
        let same = (self.q.clone() * self.k.clone()).sum(5);
        Decayed {
            q: block(self.blocks.levels),
            k: block(self.blocks.levels + 1),
            total: Some(self.total().t()),
            scores: scores.hide(&lower).sum(3) + same * self.blocks.identity(&self.q),
        }
    }

    /// The gate's gradient has shape `[B, H, N, 1, C, K]`.
    pub fn backward(self, d: Decayed<B>) -> SourceGrads<B> {
        let [batch, heads, count, _, len, key]: [usize; 6] = self.q.dims();
        let rows = self.blocks.count() * len;
        let by_row = |x: Num<B>| x.reshape([batch, heads, count, 1, rows, key]);

        // symmetric, a score's gradient reaches its query and its key in one product
        let past = Mask::keep([1, 1, 1, 1, len, len], &self.q, |[.., t, s]| s < t);
        let d_scores = d.scores.clone().hide(&past);
        let d_scores = d_scores.clone() + d_scores.t();
        let both = self.blocks.mask(&self.q, |_, _| true);
        let d_levels = d_scores.hide(&both).matmul(self.levels());
        let d_decayed = Num::cat(vec![d_levels, d.q, d.k], 3);

        // a decay times its own gradient is the decayed quantity times its own
        let d_exponents = by_row(self.decayed.clone() * d_decayed.clone());
        let mut gate = self.sums.clone().t().matmul(d_exponents);
        if let Some(d_total) = d.total {
            gate = gate + d_total.t() * self.total();
        }

        let d_source = by_row(self.decays * d_decayed);
        let collect = Num::ones_where([1, 1, 1, 1, 2 * len, rows], &self.q, |[.., at, row]| {
            self.blocks.source(row / len, row % len) == at
        });
        let d_source = collect.matmul(d_source);
        let d_same = (d.scores * self.blocks.identity(&self.q)).sum(5);
        SourceGrads {
            q: d_source.slice(4, 0..len) + d_same.clone() * self.k,
            k: d_source.slice(4, len..2 * len) + d_same * self.q,
            gate: Some(gate),
        }
    }

    fn levels(&self) -> Num<B> {
        self.decayed.slice(3, 0..self.blocks.levels)
    }

    /// Decay over the chunk, `[B, H, N, 1, 1, K]`.
    fn total(&self) -> Num<B> {
        let Blocks { len, levels } = self.blocks;
        let prefix = self.decays.slice(3, levels..levels + 1);
        prefix.slice(4, len - 1..len)
    }
}

/// Who takes part in which block, for chunks of `len` steps; `len` is a power of two.
#[derive(Clone, Copy)]
struct Blocks {
    len: usize,
    levels: usize,
}

impl Blocks {
    fn new(len: usize) -> Self {
        let levels = len.ilog2() as usize;
        Self { len, levels }
    }

    fn count(self) -> usize {
        self.levels + 2
    }

    /// Whether step t is a query in the block; else it is a key.
    fn is_query(self, block: usize, t: usize) -> bool {
        match block < self.levels {
            true => (t >> block) & 1 == 1,
            false => block == self.levels,
        }
    }

    /// Whether the gate at m counts in the exponent of step t: from the start of its half to t
    /// for a query, from the step after t to the end of its half for a key.
    fn sums(self, block: usize, t: usize, m: usize) -> bool {
        // for the last two blocks the chunk is the half
        let level = block.min(self.levels);
        t >> level == m >> level && (m <= t) == self.is_query(block, t)
    }

    /// The row of step t among the queries, then the keys, of the chunk.
    fn source(self, block: usize, t: usize) -> usize {
        match self.is_query(block, t) {
            true => t,
            false => self.len + t,
        }
    }

    /// Keeps the pairs of each level that `and` keeps, `[1, 1, 1, levels, C, C]`.
    fn mask<B: Backend>(self, like: &Num<B>, and: impl Fn(usize, usize) -> bool) -> Mask<B> {
        let shape = [1, 1, 1, self.levels, self.len, self.len];
        Mask::keep(shape, like, |[.., level, t, s]| (t ^ s) >> level == 1 && and(t, s))
    }

    /// `[1, 1, 1, 1, C, C]`
    fn identity<B: Backend>(self, like: &Num<B>) -> Num<B> {
        Num::ones_where([1, 1, 1, 1, self.len, self.len], like, |[.., t, s]| t == s)
    }
}
