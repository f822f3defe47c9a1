//! Loading tiles into shared memory, with zeros for what is out of bounds.

use cubecl::prelude::*;

use super::{ChunkRows, row_offset};
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

    /// Row and first column, in the tile, of the unit's vector `n`.
    fn place<N: Size>(&self, #[comptime] n: usize) -> (usize, usize) {
        let from = comptime!(self.from);
        let size = N::value();
        let across = comptime!(from.cols / size);
        let at = UNIT_POS as usize + comptime!(n * from.units);
        (at / across, at % across * size)
    }

    fn has(&self, row: usize, col: usize) -> bool {
        self.first + row < self.end && self.col0 + col < comptime!(self.from.width)
    }

    /// Where in the tensor a row of the tile begins.
    fn offset(&self, row: usize) -> usize {
        let from = comptime!(self.from);
        let own_row = self.start + self.first + row;
        row_offset(own_row, self.head, from.dims, from.own_heads, from.width) + self.col0
    }

    /// Reads the unit's vectors, of a size that divides the width; for those outside, others.
    pub fn fetch<E: Float, N: Size>(&self, x: &[Vector<E, N>], own: &mut Array<Vector<E, N>>) {
        self.read(x, own, false);
    }

    /// Of a tile `[chunk, 16]` from column 0 on, reads those that lie in the sub-chunk of their row.
    pub fn fetch_diagonal<N: Size>(&self, x: &[Vector<f32, N>], own: &mut Array<Vector<f32, N>>) {
        self.read(x, own, true);
    }

    fn read<E: Float, N: Size>(
        &self,
        x: &[Vector<E, N>],
        own: &mut Array<Vector<E, N>>,
        #[comptime] diagonal: bool,
    ) {
        let size = N::value();
        #[unroll]
        for n in 0..comptime!(self.from.each() / size) {
            let (row, col) = self.place::<N>(n);
            let mut at = self.offset(row) + col;
            if diagonal {
                at += row / SUB * SUB;
            }
            own[n] = x[select(self.has(row, col), at / size, 0usize)];
        }
    }

    /// Writes the unit's vectors, zero where they lie outside.
    pub fn put<E: Float, N: Size>(
        &self,
        own: &Array<Vector<E, N>>,
        out: &mut [f32],
        #[comptime] layout: Layout,
    ) {
        let size = N::value();
        let step = comptime!(layout.step());
        #[unroll]
        for n in 0..comptime!(self.from.each() / size) {
            let (row, col) = self.place::<N>(n);
            let (valid, at) = (self.has(row, col), address(row, col, layout));
            #[unroll]
            for e in 0..size {
                let value = f32::cast_from(own[n].extract(e));
                out[at + e * step] = select(valid, value, f32::new(0.0));
            }
        }
    }
}

/// How a tile lies in shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    /// From row to row, a multiple of 4, if row-major; else the left operand of a contraction.
    stride: Option<usize>,
    /// Whether it is the transpose that lies so.
    transposed: bool,
}

impl Layout {
    /// Row-major, rows so far apart.
    pub const fn rows(stride: usize) -> Self {
        Layout { stride: Some(stride), transposed: false }
    }

    /// Column-major, columns so far apart.
    pub const fn columns(stride: usize) -> Self {
        Layout { stride: Some(stride), transposed: true }
    }

    /// Of 16 columns, the left operand of a contraction over them, `[rows / 16, 16 columns, PITCH]`; of 16 rows, its
    /// transpose as that of one over them.
    pub const fn left(transposed: bool) -> Self {
        Layout { stride: None, transposed }
    }

    /// From one element of a row to the next.
    const fn step(self) -> usize {
        match (self.stride, self.transposed) {
            (Some(_), false) | (None, true) => 1,
            (Some(stride), true) => stride,
            (None, false) => PITCH,
        }
    }
}

#[cube]
fn address(row: usize, col: usize, #[comptime] layout: Layout) -> usize {
    let (line, at) = if comptime!(layout.transposed) { (col, row) } else { (row, col) };
    if comptime!(layout.stride.is_some()) {
        line * comptime!(layout.stride.unwrap_or(0)) + at
    } else {
        left_at(line, at)
    }
}

/// Where row and column of a left operand lie, see [`Layout::left`].
#[cube]
pub fn left_at(row: usize, col: usize) -> usize {
    ((row / SUB) * SUB + col) * PITCH + row % SUB
}

/// The tile of an intra-chunk matrix `m [rows, H, chunk]` that is the left operand for the pairs of all rows
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
