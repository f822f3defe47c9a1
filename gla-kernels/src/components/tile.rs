//! Loading tiles into shared memory, with what is out of bounds as zero (decay: one).

use cubecl::prelude::*;

use super::{ChunkRows, decay_or_one, row_offset};
use crate::{Dims, SUB};

/// From one column of 16 rows to the next in shared memory. Units that walk along neighbouring columns, and those
/// that put down a tile's rows as columns, would all meet in one or two banks if it were 16; every column begins
/// where four of its rows can be read at once.
pub const PITCH: usize = SUB + 4;

/// Bytes that tiles are aligned to, so that this is seen.
pub const TILE_ALIGN: usize = 16;

/// `x[at]` in f32, or zero. Without a branch: kernels are full of these, and each branch would cost
/// compile time and divergence.
#[cube]
pub fn read_or_zero<E: Float>(x: &[E], at: usize, valid: bool) -> f32 {
    let value = f32::cast_from(x[select(valid, at, 0usize)]);
    select(valid, value, f32::new(0.0))
}

/// Where a tensor `[rows, own_heads, width]` is read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    /// Heads and widths of the call.
    pub dims: Dims,
    /// Heads of this tensor.
    pub own_heads: usize,
    /// Its last dimension.
    pub width: usize,
    /// Units that load together.
    pub units: usize,
}

/// A row-major tile: `out[r * cols + c] = x[row0 + r, head, col0 + c]` for 16 rows.
#[cube]
#[allow(clippy::too_many_arguments)]
pub fn load_rows<E: Float>(
    x: &[E],
    out: &mut [f32],
    row0: usize,
    len: usize,
    head: usize,
    col0: usize,
    #[comptime] cols: usize,
    #[comptime] from: Source,
) {
    for at in range_stepped(UNIT_POS as usize, comptime!(SUB * cols), from.units) {
        let (r, c) = (at / cols, at % cols);
        let offset = row_offset(row0 + r, head, from.dims, from.own_heads, from.width);
        out[at] = read_or_zero::<E>(x, offset + col0 + c, r < len && col0 + c < from.width);
    }
}

/// The transpose of such a tile, ready to be the left operand of a contraction over its rows:
/// `out[(block * 16 + r) * PITCH + c] = x[row0 + r, head, col0 + 16 block + c]`.
#[cube]
#[allow(clippy::too_many_arguments)]
pub fn load_columns<E: Float>(
    x: &[E],
    out: &mut [f32],
    row0: usize,
    len: usize,
    head: usize,
    col0: usize,
    #[comptime] cols: usize,
    #[comptime] from: Source,
) {
    for at in range_stepped(UNIT_POS as usize, comptime!(SUB * cols), from.units) {
        let (r, c) = (at / cols, at % cols);
        let offset = row_offset(row0 + r, head, from.dims, from.own_heads, from.width);
        out[((c / SUB) * SUB + r) * PITCH + c % SUB] =
            read_or_zero::<E>(x, offset + col0 + c, r < len && col0 + c < from.width);
    }
}

/// A tile of all rows of a chunk and 16 channels, ready to be the left operand of a contraction:
/// `out[(block * 16 + c) * PITCH + r] = x[start + 16 block + r, head, col0 + c]`.
#[cube]
#[allow(clippy::too_many_arguments)]
pub fn load_chunk<E: Float>(
    x: &[E],
    out: &mut [f32],
    rows: &ChunkRows,
    head: usize,
    col0: usize,
    #[comptime] chunk: usize,
    #[comptime] from: Source,
) {
    for at in range_stepped(UNIT_POS as usize, comptime!(chunk * SUB), from.units) {
        let (row, c) = (at / SUB, at % SUB);
        let offset = row_offset(rows.start + row, head, from.dims, from.own_heads, from.width);
        out[((row / SUB) * SUB + c) * PITCH + row % SUB] =
            read_or_zero::<E>(x, offset + col0 + c, row < rows.len && col0 + c < from.width);
    }
}

/// The decay factors of the tile that [`load_chunk`] loads, in the same layout.
#[cube]
#[allow(clippy::too_many_arguments)]
pub fn load_chunk_decays<G: Float>(
    gate: &[G],
    out: &mut [f32],
    rows: &ChunkRows,
    head: usize,
    col0: usize,
    #[comptime] chunk: usize,
    #[comptime] from: Source,
) {
    let key_dim = comptime!(from.dims.key_dim);
    for at in range_stepped(UNIT_POS as usize, comptime!(chunk * SUB), from.units) {
        let (row, c) = (at / SUB, at % SUB);
        let valid = row < rows.len && col0 + c < key_dim;
        out[((row / SUB) * SUB + c) * PITCH + row % SUB] =
            decay_or_one::<G>(gate, rows.start + row, head, col0 + c, valid, from.dims);
    }
}

/// A tile of an intra-chunk matrix `m [rows, H, chunk]` for sub-chunk pairs `(block, other)`, all
/// blocks of the chunk at once, ready to be the left operand:
/// `out[(block * 16 + d) * PITCH + r] = m[16 block + r, 16 other + d]`, or transposed
/// `m[16 other + d, 16 block + r]`.
#[cube]
#[allow(clippy::too_many_arguments)]
pub fn load_pairs(
    m: &[f32],
    out: &mut [f32],
    rows: &ChunkRows,
    head: usize,
    other: usize,
    #[comptime] transposed: bool,
    #[comptime] chunk: usize,
    #[comptime] heads: usize,
    #[comptime] units: usize,
) {
    for at in range_stepped(UNIT_POS as usize, comptime!(chunk * SUB), units) {
        let (row, d) = (at / SUB, at % SUB);
        let mut t = row;
        let mut s = other * SUB + d;
        if transposed {
            t = other * SUB + d;
            s = row;
        }
        let offset = ((rows.start + t) * heads + head) * chunk + s;
        out[((row / SUB) * SUB + d) * PITCH + row % SUB] =
            read_or_zero::<f32>(m, offset, t < rows.len);
    }
}

/// Multiplies the 16 rows of each (sub-chunk, channel) column of a tile by the decay between the
/// row and the edge of its sub-chunk, and stores the decay of the whole sub-chunk.
///
/// For queries the edge is the start (own gate included), for keys the end (own gate excluded).
/// `x` and `decays` are laid out as [`load_chunk`] does; `totals[block * 16 + c]`.
#[cube]
pub fn scale_to_edge(
    x: &mut [f32],
    decays: &[f32],
    totals: &mut [f32],
    #[comptime] is_key: bool,
    #[comptime] columns: usize,
    #[comptime] units: usize,
) {
    for column in range_stepped(UNIT_POS as usize, columns, units) {
        let mut w = f32::new(1.0);
        for walk in 0..SUB {
            let row = column * PITCH + row_of(walk, is_key);
            if is_key {
                x[row] *= w;
                w *= decays[row];
            } else {
                w *= decays[row];
                x[row] *= w;
            }
        }
        totals[column] = w;
    }
}

/// Product of the totals of the sub-chunks, or other groups of rows, `from..to` for channel `c` (`totals[block * width + c]`).
#[cube]
pub fn decay_between(
    totals: &[f32],
    from: usize,
    to: usize,
    c: usize,
    #[comptime] width: usize,
) -> f32 {
    let mut w = f32::new(1.0);
    for block in from..to {
        w *= totals[block * width + c];
    }
    w
}

/// The row a walk over the 16 rows of a sub-chunk is at, from the first on or from the last back.
#[cube]
pub fn row_of(walk: usize, #[comptime] from_last: bool) -> usize {
    if from_last { SUB - 1 - walk } else { walk }
}
