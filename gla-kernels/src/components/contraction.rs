//! The tile contractions of the split plan, in registers.

use cubecl::prelude::*;

use super::PITCH;
use crate::SUB;

/// `acc[r] += sum_d a[a_at + PITCH d + r] * b[b_at + b_stride d]` for the 16 rows of the unit's tile, to depth 16.
///
/// * `a`: shared memory, `[16, PITCH]`, of which the 16 rows of the tile are the first.
/// * `b`: shared memory, `[16, b_stride]`: the unit reads its own column.
#[cube]
pub fn contract(
    acc: &mut Array<f32>,
    a: &[f32],
    a_at: usize,
    b: &[f32],
    b_at: usize,
    #[comptime] b_stride: usize,
) {
    for d in 0..SUB {
        let x = b[b_at + d * b_stride];
        #[unroll]
        for r in 0..SUB {
            acc[r] += a[a_at + d * PITCH + r] * x;
        }
    }
}

/// So many accumulators at zero.
#[cube]
pub fn zeros(#[comptime] len: usize) -> Array<f32> {
    let mut acc = Array::<f32>::new(len);
    #[unroll]
    for at in 0..len {
        acc[at] = 0.0;
    }
    acc
}

/// Multiplies all accumulators.
#[cube]
pub fn scale_all(acc: &mut Array<f32>, by: f32, #[comptime] len: usize) {
    #[unroll]
    for at in 0..len {
        acc[at] *= by;
    }
}

/// Rows of the patch that a unit owns of a tile. Of 8 x 4 numbers it reads 12 operands, of 16 x 1 it would
/// read 17 for half as many.
pub const PATCH_ROWS: usize = 8;

/// Columns of the patch.
pub const PATCH_COLS: usize = 4;

/// Accumulators of a unit.
pub const PATCH: usize = PATCH_ROWS * PATCH_COLS;

/// The patch of a unit: neighbouring rows of a sub-chunk and neighbouring columns, so that four operands are one
/// read. Its accumulators are `[row, column]`.
#[derive(CubeType, Clone, Copy)]
pub struct Patch {
    /// First row.
    pub row: usize,
    /// First column.
    pub col: usize,
}

#[cube]
impl Patch {
    /// Of a unit, in a tile of so many columns.
    pub fn of(unit: usize, #[comptime] cols: usize) -> Patch {
        let across = comptime!(cols / PATCH_COLS);
        Patch { row: unit / across * PATCH_ROWS, col: unit % across * PATCH_COLS }
    }

    /// Writes what lies within the first `rows` rows and `cols` columns of the tile, whose first element is `at` of
    /// `out`, its rows `stride` apart. Vectors divide the columns.
    #[allow(clippy::too_many_arguments)]
    pub fn store<E: Float, N: Size>(
        &self,
        acc: &Array<f32>,
        out: &mut [Vector<E, N>],
        at: usize,
        rows: usize,
        cols: usize,
        #[comptime] stride: usize,
    ) {
        let size = N::value();
        #[unroll]
        for r in 0..PATCH_ROWS {
            #[unroll]
            for part in 0..comptime!(PATCH_COLS / size) {
                let (row, col) = (self.row + r, self.col + comptime!(part * size));
                let mut x = Vector::<E, N>::empty();
                #[unroll]
                for e in 0..size {
                    x.insert(e, E::cast_from(acc[comptime!(r * PATCH_COLS + part * size + e)]));
                }
                if row < rows && col < cols {
                    out[(at + row * stride + col) / size] = x;
                }
            }
        }
    }

    /// The sub-chunk that the rows are of.
    pub fn block(&self) -> usize {
        self.row / SUB
    }

    /// `acc[r, c] += sum_d a[block, d, r] * b[d, c]`, to depth 16.
    ///
    /// * `a`: shared memory, `[blocks, 16, PITCH]`, of which the 16 rows of a sub-chunk are the first.
    /// * `b`: shared memory, `[16, b_stride]`, a multiple of 4.
    pub fn contract(
        &self,
        acc: &mut Array<f32>,
        a: &[f32],
        b: &[f32],
        #[comptime] b_stride: usize,
    ) {
        let a_at = self.block() * comptime!(PITCH * SUB) + self.row % SUB;
        for d in 0..SUB {
            let mut x = Array::<f32>::new(PATCH_COLS);
            #[unroll]
            for c in 0..PATCH_COLS {
                x[c] = b[d * b_stride + self.col + c];
            }
            #[unroll]
            for r in 0..PATCH_ROWS {
                let y = a[a_at + d * PITCH + r];
                #[unroll]
                for c in 0..PATCH_COLS {
                    acc[r * PATCH_COLS + c] += y * x[c];
                }
            }
        }
    }
}
