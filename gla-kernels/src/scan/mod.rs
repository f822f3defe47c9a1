//! The scan plan: states stay on chip, products run on tensor cores (`mma`).
//!
//! Four kernels make the forward and the backward:
//!
//! | kernel | per | what |
//! |---|---|---|
//! | [`prepare`] | chunk and head | the intra-chunk matrix `A`; queries and keys with their decay to the chunk's edges |
//! | [`walk`] | sequence, head, columns | carries a state along the chunks and reads outputs off it: `o`; the shares of `dv`, `dk`, `dq` through the state |
//! | [`intra_grad`] | chunk and head | the shares of `dq` and `dk` inside the chunk, and `dg` |
//! | [`crate::reduce`] | | head groups, scalar and fixed gates |
//!
//! # The levels
//!
//! Inside a chunk of 64 rows, a pair `(t, s)` with `s < t` is split at its **level**: the highest bit
//! in which the row numbers differ. Both rows lie in one block of `2^(level + 1)` rows, `t` in the
//! second half and `s` in the first, so the decay between them is the product of two factors that
//! are at most one: from the boundary of the halves to `t`, and from `s` to the boundary. Each level
//! is therefore a masked matrix product without overflow or cancellation, for gates of any size, and
//! the six levels cover each pair once. In the backward the same split makes `dg` a sum of terms that
//! each carry the step's own decay: within a half, running sums of `q dq` from the end (second
//! halves) or of `k dk` from the start (first halves).

pub mod intra_grad;
mod launch;
mod plan;
pub mod prepare;
pub mod walk;

use cubecl::prelude::*;

pub(crate) use plan::{backward, forward};

use crate::Dims;
use crate::components::{Quad, left_of_transposed, load_quad};

/// Rows of a chunk: six levels.
pub const CHUNK: usize = 64;

/// Rows of a group: what one unit walks for one channel.
pub const GROUP: usize = 16;

/// Channels that the kernels of a chunk take at once.
pub const SLICE: usize = 64;

/// Units of the kernels of a chunk: one for each channel of a slice and each group.
pub const CHUNK_UNITS: usize = SLICE * (CHUNK / GROUP);

/// Row stride of a slice in shared memory: 16 bytes more than the slice, so that the eight rows of
/// a matrix load lie in different banks.
pub const STRIDE: usize = SLICE + 8;

/// Elements of one `[CHUNK, SLICE]` tile in shared memory.
pub const TILE: usize = CHUNK * STRIDE;

/// What the kernels of a chunk are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChunkSpec {
    /// Heads, widths and gate kind.
    pub dims: Dims,
    /// `dims.key_dim` rounded up to a multiple of 16: the width of what the plan stores itself.
    pub padded: usize,
}

/// The walk's left operand: `[m, k]` as stored, or the transpose of what is stored as `[k, m]`.
#[cube]
pub(crate) fn load_left<E: Float>(
    tile: &[E],
    m: usize,
    k: usize,
    #[comptime] stride: usize,
    #[comptime] transposed: bool,
) -> Quad<E> {
    if comptime!(transposed) {
        let quad = load_quad::<E>(tile, k, m, stride, true);
        left_of_transposed::<E>(&quad)
    } else {
        load_quad::<E>(tile, m, k, stride, false)
    }
}

/// A unit's 16 rows of one channel, in registers.
pub type Column = Array<f32>;

/// `[2^level]` halves inside the 16 rows of a group: writes, for the level, the second halves' rows
/// of `q` with the decay from the boundary, and the first halves' rows of `k` with the decay to it.
#[cube]
pub(crate) fn write_level<E: Float>(
    q: &Column,
    k: &Column,
    decay: &Column,
    out: &mut [E],
    at: usize,
    #[comptime] level: usize,
) {
    let half = comptime!(1usize << level);
    #[unroll]
    for block in 0..comptime!(GROUP >> (level + 1)) {
        let mut w = f32::new(1.0);
        #[unroll]
        for step in 0..half {
            let r = block * (2 * half) + (half - 1 - step);
            out[at + r * STRIDE] = E::cast_from(k[r] * w);
            w *= decay[r];
        }
        let mut w = f32::new(1.0);
        #[unroll]
        for step in 0..half {
            let r = block * (2 * half) + half + step;
            w *= decay[r];
            out[at + r * STRIDE] = E::cast_from(q[r] * w);
        }
    }
}

/// The levels that reach beyond a group (4 and 5): an odd (or later) group holds queries with the
/// decay from the boundary, an even (or earlier) one keys with the decay to it; `between` is the
/// decay of the group that lies between the rows and the boundary, or one.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(crate) fn write_group<E: Float>(
    q: &Column,
    k: &Column,
    decay: &Column,
    is_query: bool,
    between: f32,
    out: &mut [E],
    at: usize,
) {
    let mut w = between;
    if is_query {
        #[unroll]
        for r in 0..GROUP {
            w *= decay[r];
            out[at + r * STRIDE] = E::cast_from(q[r] * w);
        }
    } else {
        #[unroll]
        for step in 0..GROUP {
            let r = GROUP - 1 - step;
            out[at + r * STRIDE] = E::cast_from(k[r] * w);
            w *= decay[r];
        }
    }
}
