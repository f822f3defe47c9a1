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

/// How tiles of a tensor `[rows, own_heads, width]` are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    /// Heads and widths of the call.
    pub dims: Dims,
    /// Heads of this tensor.
    pub own_heads: usize,
    /// Its last dimension.
    pub width: usize,
    /// Rows of a tile.
    pub rows: usize,
    /// Columns of a tile.
    pub cols: usize,
    /// Units that share it, and divide its elements.
    pub units: usize,
}

impl Source {
    /// Elements of each unit.
    pub const fn each(&self) -> usize {
        self.rows * self.cols / self.units
    }
}

/// A tile on its way from memory to shared memory. It is fetched into registers, early, and put down when there
/// is room; what lies outside the tensor is zeroed then, for a use of the values would wait for them.
#[derive(CubeType, Clone, Copy)]
pub struct Tile {
    /// Row of the tensor that rows are counted from.
    start: usize,
    /// Of those the first of the tile, and the one past the last that there is.
    first: usize,
    end: usize,
    head: usize,
    col0: usize,
    #[cube(comptime)]
    from: Source,
}

#[cube]
impl Tile {
    /// From row `start + first` and column `col0` on, of rows that end before `start + end`.
    pub fn at(
        start: usize,
        first: usize,
        end: usize,
        head: usize,
        col0: usize,
        #[comptime] from: Source,
    ) -> Tile {
        Tile { start, first, end, head, col0, from }
    }

    /// Goes on to rows further down.
    pub fn down(&mut self, rows: usize) {
        self.first += rows;
    }

    /// Goes on to columns further right.
    pub fn right(&mut self, cols: usize) {
        self.col0 += cols;
    }

    /// Row and column, in the tile, of the unit's element `n`.
    fn place(&self, #[comptime] n: usize) -> (usize, usize) {
        let from = comptime!(self.from);
        let at = UNIT_POS as usize + comptime!(n * from.units);
        (at / from.cols, at % from.cols)
    }

    fn has(&self, row: usize, col: usize) -> bool {
        self.first + row < self.end && self.col0 + col < comptime!(self.from.width)
    }

    /// Reads the unit's elements; for those outside, others.
    pub fn fetch<E: Float>(&self, x: &[E], own: &mut Array<E>) {
        let from = comptime!(self.from);
        #[unroll]
        for n in 0..from.each() {
            let (row, col) = self.place(n);
            let own_row = self.start + self.first + row;
            let offset = row_offset(own_row, self.head, from.dims, from.own_heads, from.width);
            own[n] = x[select(self.has(row, col), offset + self.col0 + col, 0usize)];
        }
    }

    /// Of a tile `[chunk, 16]` from column 0 on, reads those that lie in the sub-chunk of their row.
    pub fn fetch_diagonal(&self, x: &[f32], own: &mut Array<f32>) {
        let from = comptime!(self.from);
        #[unroll]
        for n in 0..from.each() {
            let (row, col) = self.place(n);
            let own_row = self.start + self.first + row;
            let offset = row_offset(own_row, self.head, from.dims, from.own_heads, from.width);
            own[n] = x[select(self.has(row, col), offset + row / SUB * SUB + col, 0usize)];
        }
    }

    fn value<E: Float>(&self, own: &Array<E>, #[comptime] n: usize) -> f32 {
        let (row, col) = self.place(n);
        select(self.has(row, col), f32::cast_from(own[n]), f32::new(0.0))
    }

    /// Row-major, rows `stride` apart.
    pub fn put_rows<E: Float>(&self, own: &Array<E>, out: &mut [f32], #[comptime] stride: usize) {
        #[unroll]
        for n in 0..comptime!(self.from.each()) {
            let (row, col) = self.place(n);
            out[row * stride + col] = self.value(own, n);
        }
    }

    /// Its transpose, row-major.
    pub fn put_transposed<E: Float>(
        &self,
        own: &Array<E>,
        out: &mut [f32],
        #[comptime] stride: usize,
    ) {
        #[unroll]
        for n in 0..comptime!(self.from.each()) {
            let (row, col) = self.place(n);
            out[col * stride + row] = self.value(own, n);
        }
    }

    /// Of 16 columns, as the left operand of a contraction over them: `[rows / 16, 16 columns, PITCH]`.
    pub fn put_left<E: Float>(&self, own: &Array<E>, out: &mut [f32]) {
        #[unroll]
        for n in 0..comptime!(self.from.each()) {
            let (row, col) = self.place(n);
            out[((row / SUB) * SUB + col) * PITCH + row % SUB] = self.value(own, n);
        }
    }

    /// Of 16 rows, its transpose as the left operand of a contraction over them: `[cols / 16, 16 rows, PITCH]`.
    pub fn put_left_transposed<E: Float>(&self, own: &Array<E>, out: &mut [f32]) {
        #[unroll]
        for n in 0..comptime!(self.from.each()) {
            let (row, col) = self.place(n);
            out[((col / SUB) * SUB + row) * PITCH + col % SUB] = self.value(own, n);
        }
    }
}

/// Fetches the tile of an intra-chunk matrix `m [rows, H, chunk]` that is the left operand for the pairs of all rows
/// of a chunk with those of sub-chunk `other`: `m[row, 16 other + d]`, or transposed `m[16 other + d, row]`.
#[cube]
pub fn pairs_tile(
    rows: &ChunkRows,
    head: usize,
    other: usize,
    #[comptime] transposed: bool,
    #[comptime] chunk: usize,
    #[comptime] dims: Dims,
    #[comptime] units: usize,
) -> Tile {
    let (own_heads, width) = comptime!((dims.heads, chunk));
    if transposed {
        let from = comptime!(Source { dims, own_heads, width, rows: SUB, cols: chunk, units });
        Tile::at(rows.start, other * SUB, rows.len, head, 0usize, from)
    } else {
        let from = comptime!(Source { dims, own_heads, width, rows: chunk, cols: SUB, units });
        Tile::at(rows.start, 0usize, rows.len, head, other * SUB, from)
    }
}

/// The decay factors of a tile of keys `[chunk, 16]`, as [`Tile::put_left`] puts it down; one where the tile is zero.
#[cube]
pub fn load_decays<G: Float>(
    gate: &[G],
    out: &mut [f32],
    rows: &ChunkRows,
    head: usize,
    col0: usize,
    #[comptime] from: Source,
) {
    let tile = Tile::at(rows.start, 0usize, rows.len, head, col0, from);
    #[unroll]
    for n in 0..comptime!(from.each()) {
        let (row, c) = tile.place(n);
        let valid = tile.has(row, c);
        out[((row / SUB) * SUB + c) * PITCH + row % SUB] =
            decay_or_one::<G>(gate, rows.start + row, head, col0 + c, valid, from.dims);
    }
}

/// Multiplies the 16 rows of each (sub-chunk, channel) column of a tile by the decay between the
/// row and the edge of its sub-chunk, and stores the decay of the whole sub-chunk.
///
/// For queries the edge is the start (own gate included), for keys the end (own gate excluded).
/// `x` and `decays` are laid out as [`Tile::put_left`] does; `totals[block * 16 + c]`.
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
