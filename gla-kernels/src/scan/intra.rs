//! The intra-chunk product of a walk.
//!
//! With `mma` the matrix has a tile of its own. Where tiles take turns the scratch of the planes is its place
//! while they do not need it: its blocks on and below the diagonal, row by row, each in one piece. (Read in
//! place by every plane it took a third of the walk's time: a row of a block is 32 bytes of a line.)

use cubecl::prelude::*;

use super::CHUNK;
use super::scores::{PLANES, lower_tile};
use super::walk_spec::WalkSpec;
use crate::components::{Acc, Left, Pair, Right, multiply};

/// Pairs of the blocks on and below the diagonal.
pub const BLOCK_PAIRS: usize = PLANES * 128;

/// Vectors of four that each unit holds of the blocks.
#[cube]
pub(crate) fn held_blocks(#[comptime] spec: WalkSpec) -> comptime_type!(usize) {
    comptime!((BLOCK_PAIRS / 2).div_ceil(spec.units()))
}

/// Reads a unit's share of the blocks of a chunk and head into registers.
#[cube]
pub(crate) fn fetch_blocks<E: Float, I: Size>(
    intra: &[Vector<E, I>],
    out: &mut Array<Vector<E, I>>,
    chunk: usize,
    head: usize,
    #[comptime] spec: WalkSpec,
) {
    let line = (chunk * spec.heads + head) * CHUNK;
    #[unroll]
    for n in 0..held_blocks(spec) {
        let at = UNIT_POS as usize + n * spec.units();
        let (t, s) = lower_tile(select(at < comptime!(BLOCK_PAIRS / 2), at / 64, 0usize));
        let row = line + t * 16 + at / 4 % 16;
        out[n] = intra[row * comptime!(CHUNK / 4) + s * 4 + at % 4];
    }
}

/// Writes it to shared memory.
#[cube]
pub(crate) fn put_blocks<E: Float, I: Size>(
    x: &Array<Vector<E, I>>,
    out: &mut [Pair<E>],
    #[comptime] spec: WalkSpec,
) {
    #[unroll]
    for n in 0..held_blocks(spec) {
        let at = UNIT_POS as usize + n * spec.units();
        if at < comptime!(BLOCK_PAIRS / 2) {
            #[unroll]
            for half in 0..2usize {
                let mut pair = Pair::<E>::empty();
                pair.insert(0usize, x[n].extract(comptime!(2 * half)));
                pair.insert(1usize, x[n].extract(comptime!(2 * half + 1)));
                out[2 * at + half] = pair;
            }
        }
    }
}

/// Adds the products of the matrix and a plane's columns of `right` to the four blocks of its outputs. Planes
/// and parts that share a depth share the blocks.
#[cube]
pub(crate) fn add_intra<E: Float, N: Size, C: Size>(
    matrix: &[Vector<E, N>],
    right_tile: &[Vector<E, C>],
    sums: &mut Sequence<Acc>,
    sharer: usize,
    plane_column: usize,
    reversed: bool,
    #[comptime] spec: WalkSpec,
) {
    if reversed {
        add_triangle::<E, N, C>(matrix, right_tile, sums, sharer, plane_column, true, spec);
    } else {
        add_triangle::<E, N, C>(matrix, right_tile, sums, sharer, plane_column, false, spec);
    }
}

/// The same with the matrix, lower triangular, or `upper`, its transpose.
#[cube]
fn add_triangle<E: Float, N: Size, C: Size>(
    matrix: &[Vector<E, N>],
    right_tile: &[Vector<E, C>],
    sums: &mut Sequence<Acc>,
    sharer: usize,
    plane_column: usize,
    #[comptime] upper: bool,
    #[comptime] spec: WalkSpec,
) {
    let by = comptime!(spec.instruction);
    #[unroll]
    for s in 0..4usize {
        if takes_block(sharer, s, comptime!(spec.parts * spec.depth_planes)) {
            let stride = comptime!(spec.columns() + 8);
            let right = Right::<E>::load(right_tile, s * 16, plane_column, stride, false, by);
            #[unroll]
            for m in 0..4usize {
                if comptime!(if upper { s >= m } else { s <= m }) {
                    let (t, s) = comptime!(if upper { (s, m) } else { (m, s) });
                    let (row, col, stride) = comptime!(match spec.takes_turns() {
                        true => ((t * (t + 1) / 2 + s) * 16, 0, 16),
                        false => (t * 16, s * 16, CHUNK + 8),
                    });
                    let left = Left::<E>::load(matrix, row, col, stride, upper, by);
                    multiply::<E>(&left, &right, sums.index_mut(m));
                }
            }
        }
    }
}

/// Whether one of `sharing` takes a block of 16 rows of the chunk: each of four one, or each of two the first
/// and last or the middle ones, which balances a triangle.
#[cube]
fn takes_block(sharer: usize, block: usize, #[comptime] sharing: usize) -> bool {
    if comptime!(sharing == 1) {
        true.runtime()
    } else if comptime!(sharing == 2) {
        sharer == (block ^ (block / 2)) % 2
    } else {
        sharer == block % sharing
    }
}
