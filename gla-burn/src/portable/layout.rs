//! From the layout of the caller to chunks and back, and from key heads to query heads and back.

use burn::backend::Backend;

use super::num::Num;

/// Steps per chunk; a power of two. Twice as long and half as long were both slower on a CPU, for
/// heads of 32 by 64 and of 64 by 128.
const CHUNK: usize = 32;

/// How `time` steps are cut into `count` chunks of `len`.
///
/// The last chunk is filled up with zeros: a zero key writes nothing and a zero gate decays
/// nothing, so the padding leaves the state alone.
#[derive(Clone, Copy)]
pub(super) struct Chunks {
    time: usize,
    pub count: usize,
    pub len: usize,
}

impl Chunks {
    pub fn new(time: usize) -> Self {
        let len = time.next_power_of_two().clamp(2, CHUNK);
        Self { time, count: time.div_ceil(len), len }
    }

    /// `[B, T, H, D]` to `[B, H, N, 1, C, D]`.
    ///
    /// The dimension of size 1 is where the levels of [`super::channel`] go.
    pub fn rows<B: Backend>(self, x: Num<B>) -> Num<B> {
        let [batch, _, heads, dim] = x.dims();
        let x = self.pad(x, [batch, self.padding(), heads, dim]);
        x.reshape([batch, self.count, 1, self.len, heads, dim]).permute(&[0, 4, 1, 2, 3, 5])
    }

    /// Undoes [`rows`](Self::rows).
    pub fn unrows<B: Backend>(self, x: Num<B>) -> Num<B> {
        let [batch, heads, _, _, _, dim] = x.dims();
        x.permute(&[0, 2, 3, 4, 1, 5])
            .reshape([batch, self.count * self.len, heads, dim])
            .slice(1, 0..self.time)
    }

    /// `[B, T, H]` to `[B, H, 1, 1, N, C]`: the steps of a chunk are one row.
    pub fn steps<B: Backend>(self, x: Num<B>) -> Num<B> {
        let [batch, _, heads] = x.dims();
        let x = self.pad(x, [batch, self.padding(), heads]);
        x.reshape([batch, 1, 1, self.count, self.len, heads]).permute(&[0, 5, 1, 2, 3, 4])
    }

    /// Undoes [`steps`](Self::steps).
    pub fn unsteps<B: Backend>(self, x: Num<B>) -> Num<B> {
        let [batch, heads, ..]: [usize; 6] = x.dims();
        x.permute(&[0, 2, 3, 4, 5, 1])
            .reshape([batch, self.count * self.len, heads])
            .slice(1, 0..self.time)
    }

    fn padding(self) -> usize {
        self.count * self.len - self.time
    }

    fn pad<B: Backend, const D: usize>(self, x: Num<B>, zeros: [usize; D]) -> Num<B> {
        if self.padding() == 0 {
            return x;
        }
        let zeros = Num::zeros(zeros, &x);
        Num::cat(vec![x, zeros], 1)
    }
}

/// Repeats the heads in `dim` so that query head h of `heads` finds key head h / (H / Hk).
pub(super) fn repeat_heads<B: Backend, const D: usize>(
    x: Num<B>,
    dim: usize,
    heads: usize,
) -> Num<B> {
    let shape: [usize; D] = x.dims();
    let groups = heads / shape[dim];
    if groups == 1 {
        return x;
    }
    let before = shape[..dim].iter().product();
    let after = shape[dim + 1..].iter().product();
    let mut repeated = shape;
    repeated[dim] = heads;
    x.reshape([before, shape[dim], 1, after])
        .expand([before, shape[dim], groups, after])
        .reshape(repeated)
}

/// The adjoint of [`repeat_heads`]: sums the groups of query heads in `dim` down to `heads`.
pub(super) fn sum_heads<B: Backend, const D: usize>(x: Num<B>, dim: usize, heads: usize) -> Num<B> {
    let shape: [usize; D] = x.dims();
    let groups = shape[dim] / heads;
    if groups == 1 {
        return x;
    }
    let before = shape[..dim].iter().product();
    let after = shape[dim + 1..].iter().product();
    let mut summed = shape;
    summed[dim] = heads;
    x.reshape([before, heads, groups, after]).sum(2).reshape(summed)
}
