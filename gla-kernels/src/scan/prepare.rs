//! Kernel `prepare`: what the walks need of a chunk.
//!
//! For one chunk of one head, with `b` the decay along the chunk:
//!
//! * `A[t, s] = scale sum_i q_t[i] k_s[i] exp(g_{s+1}[i] + .. + g_t[i])`, lower triangle,
//! * `qt_t = scale q_t exp(g of the chunk through t)`, `kt_s = k_s exp(g of the chunk after s)`,
//! * the decay of the whole chunk.
//!
//! A unit owns 16 rows of one channel; planes multiply the levels (see [`super`]). Four planes have a
//! 16 x 16 tile on the diagonal each, with its four levels and the diagonal itself; the other four
//! share the six tiles below it.

use cubecl::prelude::*;

use super::{CHUNK, ChunkSpec, Column, GROUP, SLICE, STRIDE, TILE, write_group, write_level};
use crate::components::{
    Pair, chunk_rows, decay_or_one, load_quad, multiply, read_or_zero, right_of_plain, row_offset,
    zero_tiles,
};

/// Accumulator sets of a diagonal tile: levels 0 to 3, and the diagonal.
const SETS: usize = 5;

/// * `q`: `[rows, H, K]`, `k`: `[rows, Hk, K]`
/// * `qt`, `kt`: out, `[rows, H, padded]`; `decays`: out, `[chunks, H, padded]`
/// * `a`: out, `[rows, H, 64]`, pairs of columns
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(crate) fn gla_prepare_kernel<E: Float, G: Float>(
    q: &[E],
    k: &[E],
    gate: &[G],
    qt: &mut [E],
    kt: &mut [E],
    decays: &mut [f32],
    a: &mut [Pair<E>],
    table: &[u32],
    num_sequences: usize,
    tasks: usize,
    scale: f32,
    #[comptime] spec: ChunkSpec,
    #[define(E, G)] _dtypes: [ElemType; 2],
) {
    let dims = comptime!(spec.dims);
    let padded = comptime!(spec.padded);
    let task = CUBE_POS;
    if task >= tasks {
        terminate!();
    }
    let head = task % dims.heads;
    let chunk = task / dims.heads;
    let rows = chunk_rows(table, num_sequences, chunk);

    let unit = UNIT_POS as usize;
    let channel = unit % SLICE;
    let group = unit / SLICE;
    let plane = unit / 32;

    // tiles 0 to 5: the levels; 6: queries, 7: keys
    let mut tiles = Shared::<[E]>::new_aligned_slice(comptime!(8 * TILE), 16usize);
    let mut totals = Shared::<[f32]>::new_slice(comptime!(SLICE * (CHUNK / GROUP)));

    let mut acc = zero_tiles(comptime!(2 * SETS));
    for slice in 0..comptime!(padded.div_ceil(SLICE)) {
        let i = slice * SLICE + channel;
        let mut qs = Array::<f32>::new(GROUP);
        let mut ks = Array::<f32>::new(GROUP);
        let mut ds = Array::<f32>::new(GROUP);
        #[unroll]
        for r in 0..GROUP {
            let row = group * GROUP + r;
            let valid = row < rows.len && i < dims.key_dim;
            let at = rows.start + row;
            let q_at = row_offset(at, head, dims, dims.heads, dims.key_dim) + i;
            let k_at = row_offset(at, head, dims, dims.kv_heads, dims.key_dim) + i;
            qs[r] = read_or_zero::<E>(q, q_at, valid) * scale;
            ks[r] = read_or_zero::<E>(k, k_at, valid);
            ds[r] = decay_or_one::<G>(gate, at, head, i, valid, dims);
        }
        let mut total = f32::new(1.0);
        #[unroll]
        for r in 0..GROUP {
            total *= ds[r];
        }
        totals[group * SLICE + channel] = total;
        let at = group * comptime!(GROUP * STRIDE) + channel;
        write_level::<E>(&qs, &ks, &ds, &mut tiles, at, 0usize);
        write_level::<E>(&qs, &ks, &ds, &mut tiles, at + TILE, 1usize);
        write_level::<E>(&qs, &ks, &ds, &mut tiles, at + 2 * TILE, 2usize);
        write_level::<E>(&qs, &ks, &ds, &mut tiles, at + 3 * TILE, 3usize);
        #[unroll]
        for r in 0..GROUP {
            tiles[at + 6 * TILE + r * STRIDE] = E::cast_from(qs[r]);
            tiles[at + 7 * TILE + r * STRIDE] = E::cast_from(ks[r]);
        }
        sync_cube();

        let (t0, t1) = (totals[channel], totals[SLICE + channel]);
        let (t2, t3) = (totals[2 * SLICE + channel], totals[3 * SLICE + channel]);
        let one = f32::new(1.0);
        let between = select(group == 0, t1, select(group == 3, t2, one));
        write_group::<E>(&qs, &ks, &ds, group % 2 == 1, one, &mut tiles, at + 4 * TILE);
        write_group::<E>(&qs, &ks, &ds, group >= 2, between, &mut tiles, at + 5 * TILE);

        let before =
            select(group > 0, t0, one) * select(group > 1, t1, one) * select(group > 2, t2, one);
        let after =
            select(group < 1, t1, one) * select(group < 2, t2, one) * select(group < 3, t3, one);
        if i < padded {
            let to =
                (rows.start + group * GROUP) * comptime!(dims.heads * padded) + head * padded + i;
            write_edges::<E>(&qs, &ds, before, true, qt, to, rows.len, group, spec);
            write_edges::<E>(&ks, &ds, after, false, kt, to, rows.len, group, spec);
            if group == 0 {
                decays[(chunk * dims.heads + head) * padded + i] = t0 * t1 * t2 * t3;
            }
        }
        sync_cube();

        if plane < 4 {
            let row = plane * 16;
            #[unroll]
            for j in 0..comptime!(SLICE / 16) {
                #[unroll]
                for level in 0..4usize {
                    let quad = load_quad::<E>(
                        &tiles[level * TILE..(level + 1) * TILE],
                        row,
                        j * 16,
                        STRIDE,
                        false,
                    );
                    let r0 = right_of_plain::<E>(&quad, 0usize);
                    let r1 = right_of_plain::<E>(&quad, 1usize);
                    multiply::<E>(&quad, &r0, &mut acc, level * 2);
                    multiply::<E>(&quad, &r1, &mut acc, level * 2 + 1);
                }
                let left = load_quad::<E>(&tiles[6 * TILE..7 * TILE], row, j * 16, STRIDE, false);
                let quad = load_quad::<E>(&tiles[7 * TILE..8 * TILE], row, j * 16, STRIDE, false);
                let r0 = right_of_plain::<E>(&quad, 0usize);
                let r1 = right_of_plain::<E>(&quad, 1usize);
                multiply::<E>(&left, &r0, &mut acc, 8usize);
                multiply::<E>(&left, &r1, &mut acc, 9usize);
            }
        } else {
            let (level, t, s) = below_diagonal(plane);
            #[unroll]
            for j in 0..comptime!(SLICE / 16) {
                let tile = &tiles[level * TILE..(level + 1) * TILE];
                let left = load_quad::<E>(tile, t * 16, j * 16, STRIDE, false);
                let quad = load_quad::<E>(tile, s * 16, j * 16, STRIDE, false);
                let r0 = right_of_plain::<E>(&quad, 0usize);
                let r1 = right_of_plain::<E>(&quad, 1usize);
                multiply::<E>(&left, &r0, &mut acc, 0usize);
                multiply::<E>(&left, &r1, &mut acc, 1usize);
                if plane >= 6 {
                    let quad = load_quad::<E>(tile, (s + 1) * 16, j * 16, STRIDE, false);
                    let r0 = right_of_plain::<E>(&quad, 0usize);
                    let r1 = right_of_plain::<E>(&quad, 1usize);
                    multiply::<E>(&left, &r0, &mut acc, 2usize);
                    multiply::<E>(&left, &r1, &mut acc, 3usize);
                }
            }
        }
        sync_cube();
    }

    if plane < 4 {
        #[unroll]
        for n in 0..2usize {
            #[unroll]
            for half in 0..2usize {
                let (r, c) = accumulator_position(n, half);
                let mut pair = Pair::<f32>::empty();
                #[unroll]
                for e in 0..2usize {
                    let x = r ^ (c + e);
                    let low = select(
                        x < 2,
                        acc[2 * n + half].extract(e),
                        acc[2 * (2 + n) + half].extract(e),
                    );
                    let high = select(
                        x < 8,
                        acc[2 * (4 + n) + half].extract(e),
                        acc[2 * (6 + n) + half].extract(e),
                    );
                    let off = select(x < 4, low, high);
                    let value = select(x == 0, acc[2 * (8 + n) + half].extract(e), off);
                    pair.insert(e, select(c + e <= r, value, f32::new(0.0)));
                }
                store_pair::<E>(
                    a,
                    pair,
                    &rows.len,
                    rows.start,
                    head,
                    plane * 16 + r,
                    plane * 16 + c,
                    dims.heads,
                );
            }
        }
    } else {
        let (_, t, s) = below_diagonal(plane);
        #[unroll]
        for n in 0..4usize {
            #[unroll]
            for half in 0..2usize {
                let (r, c) = accumulator_position(n % 2, half);
                if n < 2 || plane >= 6 {
                    let col = (s + n / 2) * 16 + c;
                    store_pair::<E>(
                        a,
                        acc[2 * n + half],
                        &rows.len,
                        rows.start,
                        head,
                        t * 16 + r,
                        col,
                        dims.heads,
                    );
                }
            }
        }
    }
}

/// Level and tile `(row, column)` of a plane from 4 on; planes 6 and 7 have the next column too.
#[cube]
pub(crate) fn below_diagonal(plane: usize) -> (usize, usize, usize) {
    let level = select(plane < 6, 4usize, 5usize);
    let t = select(plane == 4, 1usize, select(plane == 6, 2usize, 3usize));
    let s = select(plane == 5, 2usize, 0usize);
    (level, t, s)
}

/// Row and first column, in its 16 x 16 block, of pair `half` of accumulator tile `n`.
#[cube]
pub(crate) fn accumulator_position(n: usize, half: usize) -> (usize, usize) {
    let lane = UNIT_POS_PLANE as usize;
    (lane / 4 + 8 * half, 8 * n + 2 * (lane % 4))
}

#[cube]
#[allow(clippy::too_many_arguments)]
fn store_pair<E: Float>(
    a: &mut [Pair<E>],
    pair: Pair<f32>,
    len: &usize,
    start: usize,
    head: usize,
    t: usize,
    s: usize,
    #[comptime] heads: usize,
) {
    if t < *len {
        a[(((start + t) * heads + head) * CHUNK + s) / 2] = Vector::cast_from(pair);
    }
}

/// A unit's rows with their decay from the chunk's start (own gate included), or to its end.
#[cube]
#[allow(clippy::too_many_arguments)]
fn write_edges<E: Float>(
    x: &Column,
    decay: &Column,
    beyond: f32,
    #[comptime] from_start: bool,
    out: &mut [E],
    to: usize,
    len: usize,
    group: usize,
    #[comptime] spec: ChunkSpec,
) {
    let stride = comptime!(spec.dims.heads * spec.padded);
    let mut w = beyond;
    #[unroll]
    for step in 0..GROUP {
        if comptime!(from_start) {
            w *= decay[step];
            if group * GROUP + step < len {
                out[to + step * stride] = E::cast_from(x[step] * w);
            }
        } else {
            let r = GROUP - 1 - step;
            if group * GROUP + r < len {
                out[to + r * stride] = E::cast_from(x[r] * w);
            }
            w *= decay[r];
        }
    }
}
