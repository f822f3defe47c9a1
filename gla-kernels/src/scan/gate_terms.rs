//! What walks leave for the gate's gradient: states between chunks and their products, and the products of
//! rows of `probe` and of outputs.

use cubecl::prelude::*;

use super::CHUNK;
use super::stage::Stage;
use super::walk_spec::WalkSpec;
use crate::components::{ChunkRows, Pair, pair_position};

/// Writes a unit's pairs of the state, and what rounding took off them if `spec.precise`: as many at a time
/// as a vector holds.
#[cube]
pub(crate) fn leave_state<E: Float, R: Size>(
    state: &Array<Pair<f32>>,
    trace: &mut [Vector<E, R>],
    from: usize,
    #[comptime] spec: WalkSpec,
) {
    let size = R::value();
    let vectors = comptime!(spec.plane_depth / 2 / size);
    let units = comptime!(spec.units());
    #[unroll]
    for n in 0..vectors {
        let mut own = Vector::<E, R>::empty();
        let mut rest = Vector::<E, R>::empty();
        #[unroll]
        for i in 0..size {
            let number = state[comptime!((n * size + i) / 2)].extract(comptime!(i % 2));
            let rounded = E::cast_from(number);
            own.insert(i, rounded);
            if comptime!(spec.precise) {
                rest.insert(i, E::cast_from(number - f32::cast_from(rounded)));
            }
        }
        let at = from + n * units + UNIT_POS as usize;
        trace[at] = own;
        if comptime!(spec.precise) {
            trace[at + vectors * units] = rest;
        }
    }
}

/// Multiplies a plane's state with what another walk left of its own and sums over the depth:
/// `products[line + column]` of 16 columns from that of the lane on, `column` and `column + 8`.
#[cube]
pub(crate) fn multiply_states<E: Float, R: Size>(
    state: &Array<Pair<f32>>,
    other: &Array<Vector<E, R>>,
    products: &mut [f32],
    line: usize,
    column: usize,
    #[comptime] spec: WalkSpec,
) {
    let lane = UNIT_POS_PLANE as usize;
    let size = R::value();
    let vectors = comptime!(spec.plane_depth / 2 / size);
    let mut sums = Array::<f32>::new(2usize);
    sums[0] = f32::new(0.0);
    sums[1] = f32::new(0.0);
    #[unroll]
    for n in 0..vectors {
        let mut numbers = Vector::<f32, R>::cast_from(other[n]);
        if comptime!(spec.precise) {
            numbers += Vector::<f32, R>::cast_from(other[n + vectors]);
        }
        #[unroll]
        for i in 0..size {
            let pair = comptime!((n * size + i) / 2);
            sums[comptime!(pair % 2)] += numbers.extract(i) * state[pair].extract(comptime!(i % 2));
        }
    }
    #[unroll]
    for half in 0..2usize {
        let sum = quad_sum(sums[half]);
        let own = column + 8 * half;
        if lane % 4 < 1 && own < spec.padded {
            products[line + own] = sum;
        }
    }
}

/// The products of rows of `probe` and of outputs over a plane's 16 columns, `[planes, 64]`.
#[cube]
pub(crate) fn dot_rows<E: Float>(
    probed: &Array<Pair<E>>,
    acc: &Array<Pair<f32>>,
    tile: &mut [f32],
) {
    let lane = UNIT_POS_PLANE as usize;
    #[unroll]
    for m in 0..4usize {
        #[unroll]
        for half in 0..2usize {
            let first = Pair::<f32>::cast_from(probed[4 * m + half]);
            let second = Pair::<f32>::cast_from(probed[4 * m + half + 2]);
            let mut product = first * acc[4 * m + half];
            product += second * acc[4 * m + half + 2];
            let sum = quad_sum(product.extract(0usize) + product.extract(1usize));
            if lane % 4 < 1 {
                tile[UNIT_POS as usize / 32 * CHUNK + m * 16 + lane / 4 + 8 * half] = sum;
            }
        }
    }
}

/// Adds up the planes' products of rows: `dots[first + heads row]`.
#[cube]
pub(crate) fn sum_dots(
    tile: &[f32],
    dots: &mut [f32],
    first: usize,
    len: usize,
    #[comptime] spec: WalkSpec,
) {
    for row in range_stepped(UNIT_POS as usize, len, comptime!(spec.units())) {
        let mut sum = f32::new(0.0);
        #[unroll]
        for plane in 0..comptime!(spec.units() / 32) {
            sum += tile[plane * CHUNK + row];
        }
        dots[first + row * spec.heads] = sum;
    }
}

/// The sum of four neighbouring lanes.
#[cube]
fn quad_sum(value: f32) -> f32 {
    let pair = value + plane_shuffle_xor(value, 1u32);
    pair + plane_shuffle_xor(pair, 2u32)
}

/// A lane's pairs of 16 columns of `probe`. Where there is none it has another of the same row, which
/// meets a product of zero, or for rows beyond the chunk, of another row.
#[cube]
pub(crate) fn pairs_in_place<E: Float, P: Size>(
    probe: &[Vector<E, P>],
    rows: &ChunkRows,
    head: usize,
    column: usize,
    #[comptime] from: Stage,
) -> Array<Pair<E>> {
    let size = P::value();
    let mut pairs = Array::<Pair<E>>::new(16usize);
    #[unroll]
    for i in 0..16usize {
        let (r, c) = pair_position(i % 4);
        let row = rows.start + select(i / 4 * 16 + r < rows.len, i / 4 * 16 + r, 0usize);
        let line = (row * from.own_heads + head / from.group) * from.width;
        let col = column + c;
        if comptime!(size == 2) {
            let at = line + select(col < from.width, col, 0usize);
            pairs[i] = Vector::cast_from(probe[at / 2]);
        } else {
            let mut pair = Pair::<E>::empty();
            #[unroll]
            for e in 0..2usize {
                let at = line + select(col + e < from.width, col + e, 0usize);
                pair.insert(e, probe[at].extract(0usize));
            }
            pairs[i] = pair;
        }
    }
    pairs
}
