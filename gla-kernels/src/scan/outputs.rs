//! The outputs of a walk on their way to memory.
//!
//! With `mma` through a tile in shared memory, where the shares of the planes that have some of the depth
//! each are added up; with `cmma`, where a plane has all of it, as matrices, or as pairs where matrices
//! would not fit.

use cubecl::prelude::*;

use super::CHUNK;
use super::walk_spec::WalkSpec;
use crate::components::{Pair, pair_position};

/// Puts a plane's share of 16 columns down: lines of rows, or of channels.
#[cube]
pub(crate) fn stage_pairs(
    acc: &Array<Pair<f32>>,
    tile: &mut [f32],
    depth_plane: usize,
    plane_column: usize,
    #[comptime] spec: WalkSpec,
) {
    let (columns, stride) = comptime!((spec.columns(), spec.out_stride()));
    #[unroll]
    for i in 0..16usize {
        let (r, c) = pair_position(i % 4);
        let (row, column) = (i / 4 * 16 + r, plane_column + c);
        if comptime!(spec.by_channel()) {
            let at = (depth_plane * columns + column) * stride + row;
            tile[at] = acc[i].extract(0usize);
            tile[at + stride] = acc[i].extract(1usize);
        } else {
            let at = (depth_plane * CHUNK + row) * stride + column;
            let pairs = tile.as_vectorized_mut().with_vector_size_mut::<Const<2>>();
            pairs[at / 2] = acc[i];
        }
    }
}

/// Adds up the planes' shares of a tile of outputs and writes it, four numbers of a line at a time:
/// pairs of a plane would reach eight lines with each store.
#[cube]
pub(crate) fn write_staged<O: Float, W: Size>(
    tile: &[f32],
    out: &mut [Vector<O, W>],
    line: usize,
    column0: usize,
    len: usize,
    #[comptime] spec: WalkSpec,
) {
    let size = W::value();
    let by_channel = comptime!(spec.by_channel());
    let (columns, stride) = comptime!((spec.columns(), spec.out_stride()));
    let (lines, numbers) = comptime!(if by_channel { (columns, CHUNK) } else { (CHUNK, columns) });
    let fours = tile.as_vectorized().with_vector_size::<Const<4>>();
    #[unroll]
    for n in 0..comptime!((lines * numbers / 4).div_ceil(spec.units())) {
        let at = UNIT_POS as usize + n * spec.units();
        let across = comptime!(numbers / 4);
        let (own, first) = (at / across, at % across * 4);
        if own < lines {
            let mut sum = fours[(own * stride + first) / 4];
            #[unroll]
            for share in 1..comptime!(spec.depth_planes) {
                sum += fours[((share * lines + own) * stride + first) / 4];
            }
            let (row, column) = if by_channel { (first, own) } else { (own, first) };
            let column = column0 + column;
            let to = if by_channel {
                (line * spec.width + column) * CHUNK + row
            } else {
                (line + row * spec.heads) * spec.width + column
            };
            #[unroll]
            for e in 0..comptime!(4 / size) {
                let inside = if by_channel {
                    column < spec.width
                } else {
                    row < len && column + e * size < spec.width
                };
                if inside {
                    let mut value = Vector::<f32, W>::empty();
                    #[unroll]
                    for i in 0..size {
                        value.insert(i, sum.extract(comptime!(e * size + i)));
                    }
                    out[(to + e * size) / size] = Vector::cast_from(value);
                }
            }
        }
    }
}

/// Writes a plane's outputs, rows of them, as it has them.
#[cube]
pub(crate) fn write_pairs<O: Float, W: Size>(
    acc: &Array<Pair<f32>>,
    out: &mut [Vector<O, W>],
    line: usize,
    column0: usize,
    len: usize,
    #[comptime] spec: WalkSpec,
) {
    let size = W::value();
    #[unroll]
    for i in 0..16usize {
        let (r, c) = pair_position(i % 4);
        let (row, column) = (i / 4 * 16 + r, column0 + c);
        let pair = acc[i];
        if row < len {
            let to = (line + row * spec.heads) * spec.width + column;
            if comptime!(size == 2) {
                if column < spec.width {
                    out[to / 2] = Vector::cast_from(pair);
                }
            } else {
                if column < spec.width {
                    out[to] = Vector::cast_from(pair.extract(0usize));
                }
                if column + 1 < spec.width {
                    out[to + 1] = Vector::cast_from(pair.extract(1usize));
                }
            }
        }
    }
}
