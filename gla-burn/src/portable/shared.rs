//! No gate, or one that all channels of a key share: decays between two steps are one matrix.
//!
//! All exponents of a chunk are sums of its gates: they come from one product with a constant
//! matrix of zeros and ones, and the gate gets its gradient from the transposed product. Its
//! columns, in which the gate at m counts if
//!
//! - pair (t, s): s < m <= t
//! - prefix of t: m <= t
//! - suffix of s: m > s
//!
//! No exponent is a difference of sums, so a strong gate takes no digits from a weak one.

use burn::backend::Backend;

use super::decays::{Decayed, SourceGrads};
use super::num::{Mask, Num};

pub(super) struct Shared<B: Backend> {
    q: Num<B>,
    k: Num<B>,
    /// Hides pairs with s > t.
    future: Mask<B>,
    decay: Option<Decay<B>>,
}

/// Exponentials; B may be 1.
struct Decay<B: Backend> {
    /// The constant matrix, `[1, 1, 1, 1, C, C * C + 2 C]`.
    sums: Num<B>,
    /// `[B, H, N, 1, C, C]`
    pairs: Num<B>,
    /// `[B, H, N, 1, C, 1]`
    prefix: Num<B>,
    /// `[B, H, N, 1, C, 1]`
    suffix: Num<B>,
}

impl<B: Backend> Shared<B> {
    /// - q, k: `[B, H, N, 1, C, K]`
    /// - gate: `[B, H, 1, 1, N, C]`
    pub fn new(q: Num<B>, k: Num<B>, gate: Option<Num<B>>) -> Self {
        let [.., len, _]: [usize; 6] = q.dims();
        let future = Mask::keep([1, 1, 1, 1, len, len], &q, |[.., t, s]| s <= t);
        let decay = gate.map(|gate| Decay::new(gate, &future));
        Self { q, k, future, decay }
    }

    pub fn decayed(&self) -> Decayed<B> {
        let (q, k) = (self.q.clone(), self.k.clone());
        let scores = q.clone().matmul(k.clone().t());
        match &self.decay {
            None => Decayed { q, k, total: None, scores: scores.hide(&self.future) },
            Some(decay) => Decayed {
                q: q * decay.prefix.clone(),
                k: k * decay.suffix.clone(),
                total: Some(decay.total()),
                scores: scores * decay.pairs.clone(),
            },
        }
    }

    /// The gate's gradient has shape `[B, H, 1, 1, N, C]`.
    pub fn backward(self, decayed: Decayed<B>, d: Decayed<B>) -> SourceGrads<B> {
        let Self { q, k, future, decay } = self;
        let Some(decay) = decay else {
            let d_scores = d.scores.hide(&future);
            return SourceGrads {
                q: d.q + d_scores.clone().matmul(k),
                k: d.k + d_scores.t().matmul(q),
                gate: None,
            };
        };
        let gate = decay.backward(&decayed, &d);
        let d_scores = d.scores * decay.pairs;
        SourceGrads {
            q: d.q * decay.prefix + d_scores.clone().matmul(k),
            k: d.k * decay.suffix + d_scores.t().matmul(q),
            gate: Some(gate),
        }
    }
}

impl<B: Backend> Decay<B> {
    fn new(gate: Num<B>, future: &Mask<B>) -> Self {
        let [batch, heads, _, _, count, len] = gate.dims();
        let pairs = len * len;
        let columns = pairs + 2 * len;
        let sums =
            Num::ones_where([1, 1, 1, 1, len, columns], &gate, |[.., m, column]| {
                match column.checked_sub(pairs) {
                    None => column % len < m && m <= column / len,
                    Some(t) if t < len => m <= t,
                    Some(s) => m > s - len,
                }
            });
        let decays = gate.matmul(sums.clone()).exp();
        let part = |range, columns| {
            let part = decays.slice(5, range);
            part.reshape([batch, heads, count, 1, len, columns])
        };
        Self {
            pairs: part(0..pairs, len).hide(future),
            prefix: part(pairs..pairs + len, 1),
            suffix: part(pairs + len..columns, 1),
            sums,
        }
    }

    fn total(&self) -> Num<B> {
        let [.., len, _]: [usize; 6] = self.prefix.dims();
        self.prefix.slice(4, len - 1..len)
    }

    fn backward(&self, decayed: &Decayed<B>, d: &Decayed<B>) -> Num<B> {
        // each decay times its own gradient is each decayed quantity times its own
        let pairs = decayed.scores.clone() * d.scores.clone();
        let [batch, heads, count, _, len, _]: [usize; 6] = pairs.dims();
        let row = |x: Num<B>, size| x.reshape([batch, heads, 1, 1, count, size]);
        let exponents = vec![
            row(pairs, len * len),
            row((decayed.q.clone() * d.q.clone()).sum(5), len),
            row((decayed.k.clone() * d.k.clone()).sum(5), len),
        ];
        let gate = Num::cat(exponents, 5).matmul(self.sums.clone().t());
        match &d.total {
            None => gate,
            Some(d_total) => gate + row((d_total.clone() * self.total()).sum(4), 1),
        }
    }
}
