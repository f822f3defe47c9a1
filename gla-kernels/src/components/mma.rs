//! The tensor-core seam: `mma.m16n8k16` with f32 accumulators, operands from shared memory.
//!
//! A plane of 32 lanes holds a 16 x 8 accumulator as four numbers a lane: rows `lane / 4` and
//! `lane / 4 + 8`, columns `2 (lane % 4)` and the next. A quad is a 16 x 16 block of shared memory as
//! four 8 x 8 matrices; which of them make the left operand and which the two right operands depends
//! on how the block is stored, see [`Quad`].

use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::prelude::*;

/// Two neighbouring columns of an accumulator or operand row, as a lane holds them.
pub type Pair<E> = Vector<E, Const<2>>;

/// A 16 x 16 block, read with [`load_quad`]: 8 x 8 matrices `(row half, column half)` in the order
/// (0, 0), (1, 0), (0, 1), (1, 1), each transposed or not.
///
/// | stored as | transposed | left operand | right operands (two of 8 columns) |
/// |---|---|---|---|
/// | `[m, k]` | no | 0 1 2 3 | |
/// | `[k, m]` | yes | 0 2 1 3 | |
/// | `[k, n]` | yes | | 0 1 and 2 3 |
/// | `[n, k]` | no | | 0 2 and 1 3 |
pub type Quad<E> = Array<Pair<E>>;

/// Reads the 16 x 16 block at `(row, col)` of a tile `[.., stride]`; `stride` and `col` are multiples
/// of 8.
#[cube]
pub fn load_quad<E: Float>(
    tile: &[E],
    row: usize,
    col: usize,
    #[comptime] stride: usize,
    #[comptime] transpose: bool,
) -> Quad<E> {
    let lane = UNIT_POS_PLANE as usize;
    let at = (row + lane % 16) * stride + col + (lane / 16) * 8;
    let def = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    def.load_matrix::<E, Const<2>>(&tile[at..at + 8], MatrixIdent::A, 4usize, transpose)
}

/// The left operand of a block stored `[k, m]`.
#[cube]
pub fn left_of_transposed<E: Float>(quad: &Quad<E>) -> Quad<E> {
    let mut left = Array::<Pair<E>>::new(4usize);
    left[0] = quad[0];
    left[1] = quad[2];
    left[2] = quad[1];
    left[3] = quad[3];
    left
}

/// One of the two right operands of a block stored `[k, n]`.
#[cube]
pub fn right_of_transposed<E: Float>(quad: &Quad<E>, #[comptime] half: usize) -> Array<Pair<E>> {
    let mut right = Array::<Pair<E>>::new(2usize);
    right[0] = quad[2 * half];
    right[1] = quad[2 * half + 1];
    right
}

/// One of the two right operands of a block stored `[n, k]`.
#[cube]
pub fn right_of_plain<E: Float>(quad: &Quad<E>, #[comptime] half: usize) -> Array<Pair<E>> {
    let mut right = Array::<Pair<E>>::new(2usize);
    right[0] = quad[half];
    right[1] = quad[half + 2];
    right
}

/// `acc[tile] += left right`, the accumulator tile being the pairs `2 tile` (rows `lane / 4`) and
/// `2 tile + 1` (rows `lane / 4 + 8`).
#[cube]
pub fn multiply<E: Float>(
    left: &Quad<E>,
    right: &Array<Pair<E>>,
    acc: &mut Array<Pair<f32>>,
    tile: usize,
) {
    let def = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    let mut c = Array::<Pair<f32>>::new(2usize);
    c[0] = acc[2 * tile];
    c[1] = acc[2 * tile + 1];
    def.execute_inplace(left, right, &mut c);
    acc[2 * tile] = c[0];
    acc[2 * tile + 1] = c[1];
}

/// `tiles` accumulator tiles at zero.
#[cube]
pub fn zero_tiles(#[comptime] tiles: usize) -> Array<Pair<f32>> {
    let mut acc = Array::<Pair<f32>>::new(comptime!(2 * tiles));
    #[unroll]
    for i in 0..comptime!(2 * tiles) {
        acc[i] = Vector::new(0.0f32);
    }
    acc
}
