//! Kernel `intra_grad`: the gradients of `q`, `k` and the gate for one chunk of one head.
//!
//! First `dA = scale do v^T` below and on the diagonal, made symmetric: `M`. Then, with the levels of
//! [`super`] and `L` the queries or keys of a level with their decay from or to its boundary,
//!
//! ```text
//! G_level = (M where the highest differing bit of row and column is the level) L_level
//! ```
//!
//! is what the other half sends a row, but for the row's own decay `w`: `dq_t += w G_t` in second
//! halves, `dk_s += w G_s` in first halves. `u = x w G`, `x` the row of `q` or `k`, summed from a row
//! to the end of its half (queries) or from the start of its half to before the row (keys), is the
//! level's share of `dg`. The shares through the state are the same with the whole chunk as half,
//! and pairs on both sides of the chunk enter through the products of state and state gradient.

use cubecl::prelude::*;

use super::prepare::{accumulator_position, below_diagonal};
use super::{
    CHUNK, CHUNK_UNITS, ChunkSpec, Column, GROUP, SLICE, STRIDE, TILE, write_group, write_level,
};
use crate::components::{
    ChunkRows, Pair, Quad, chunk_rows, decay_or_one, load_quad, multiply, read_or_zero,
    right_of_plain, right_of_transposed, row_offset, zero_tiles,
};

/// Levels of a chunk.
const LEVELS: usize = 6;

/// Sums that cross the groups of a chunk: level 5, and the queries' and keys' shares of the state.
const CROSSING: usize = 3;

/// * `q`: `[rows, H, K]`, `k`: `[rows, Hk, K]`, `v`: `[rows, Hk, V]`, `d_o`: `[rows, H, V]`
/// * `dq_state`, `dk_state`: `[parts, rows, H, padded]`, without the decay to the chunk's edges
/// * `products`: `[parts, chunks, H, padded]`
/// * `dq`, `dk`: out, `[rows, H, K]`; `dg`: out, `[rows, H, K]` if `spec.dims.gate` is one
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(crate) fn gla_scan_intra_grad_kernel<
    E: Float,
    G: Float,
    S: Float,
    Q: Float,
    P: Float,
    R: Float,
>(
    q: &[E],
    k: &[E],
    v: &[E],
    d_o: &[E],
    gate: &[G],
    dq_state: &[S],
    dk_state: &[S],
    products: &[f32],
    dq: &mut [Q],
    dk: &mut [P],
    dg: &mut [R],
    table: &[u32],
    num_sequences: usize,
    num_rows: usize,
    num_chunks: usize,
    tasks: usize,
    scale: f32,
    #[comptime] spec: ChunkSpec,
    #[comptime] parts: usize,
    #[define(E, G, S, Q, P, R)] _dtypes: [ElemType; 6],
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

    let mut tiles = Shared::<[E]>::new_aligned_slice(comptime!(LEVELS * TILE), 16usize);
    let mut symmetric = Shared::<[E]>::new_aligned_slice(TILE, 16usize);
    let mut totals = Shared::<[f32]>::new_slice(comptime!(SLICE * (CHUNK / GROUP)));
    let mut sums = Shared::<[f32]>::new_slice(comptime!(CROSSING * SLICE * (CHUNK / GROUP)));

    score_gradients::<E>(v, d_o, &mut tiles, &mut symmetric, &rows, head, scale, spec);

    // the planes' share of the levels: rows of one group, half the channels of a slice
    let own = plane % 4;
    let half0 = (plane / 4) * 32;
    let diagonal = load_quad::<E>(&symmetric, own * 16, own * 16, STRIDE, false);
    let pair_group = own ^ 1;
    let far = own ^ 2;

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
            qs[r] = read_or_zero::<E>(q, q_at, valid);
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
        sync_cube();

        let one = f32::new(1.0);
        let (t0, t1) = (totals[channel], totals[SLICE + channel]);
        let (t2, t3) = (totals[2 * SLICE + channel], totals[3 * SLICE + channel]);
        let between = select(group == 0, t1, select(group == 3, t2, one));
        let before =
            select(group > 0, t0, one) * select(group > 1, t1, one) * select(group > 2, t2, one);
        let after =
            select(group < 1, t1, one) * select(group < 2, t2, one) * select(group < 3, t3, one);
        write_group::<E>(&qs, &ks, &ds, group % 2 == 1, one, &mut tiles, at + 4 * TILE);
        write_group::<E>(&qs, &ks, &ds, group >= 2, between, &mut tiles, at + 5 * TILE);
        sync_cube();

        // 6 levels, 4 blocks of 8 channels
        let mut acc = zero_tiles(comptime!(4 * LEVELS));
        #[unroll]
        for j in 0..2usize {
            let col = half0 + j * 16;
            #[unroll]
            for level in 0..4usize {
                let left = of_level::<E>(&diagonal, level);
                send::<E>(
                    &left,
                    &tiles[level * TILE..(level + 1) * TILE],
                    own,
                    col,
                    &mut acc,
                    4 * level + 2 * j,
                );
            }
            let left = load_quad::<E>(&symmetric, own * 16, pair_group * 16, STRIDE, false);
            send::<E>(&left, &tiles[4 * TILE..5 * TILE], pair_group, col, &mut acc, 16 + 2 * j);
            let left = load_quad::<E>(&symmetric, own * 16, far * 16, STRIDE, false);
            send::<E>(&left, &tiles[5 * TILE..6 * TILE], far, col, &mut acc, 20 + 2 * j);
            let left = load_quad::<E>(&symmetric, own * 16, (far ^ 1) * 16, STRIDE, false);
            send::<E>(&left, &tiles[5 * TILE..6 * TILE], far ^ 1, col, &mut acc, 20 + 2 * j);
        }
        sync_cube();
        // what the levels send takes the place of what they were made of
        #[unroll]
        for level in 0..LEVELS {
            #[unroll]
            for n in 0..4usize {
                #[unroll]
                for half in 0..2usize {
                    let (r, c) = accumulator_position(n, half);
                    let to = level * TILE + (own * 16 + r) * STRIDE + half0 + c;
                    let pair = acc[2 * (4 * level + n) + half];
                    tiles[to] = E::cast_from(pair.extract(0usize));
                    tiles[to + 1] = E::cast_from(pair.extract(1usize));
                }
            }
        }
        sync_cube();

        let mut gq = Array::<f32>::new(GROUP);
        let mut gk = Array::<f32>::new(GROUP);
        let mut gg = Array::<f32>::new(GROUP);
        #[unroll]
        for r in 0..GROUP {
            // the diagonal: a row with itself, without decay
            let row = group * GROUP + r;
            let own = f32::cast_from(symmetric[row * STRIDE + row]);
            gq[r] = own * ks[r];
            gk[r] = own * qs[r];
            gg[r] = f32::new(0.0);
        }
        read_level::<E>(&qs, &ks, &ds, &tiles, at, &mut gq, &mut gk, &mut gg, 0usize);
        read_level::<E>(&qs, &ks, &ds, &tiles, at + TILE, &mut gq, &mut gk, &mut gg, 1usize);
        read_level::<E>(&qs, &ks, &ds, &tiles, at + 2 * TILE, &mut gq, &mut gk, &mut gg, 2usize);
        read_level::<E>(&qs, &ks, &ds, &tiles, at + 3 * TILE, &mut gq, &mut gk, &mut gg, 3usize);
        read_group::<E>(
            &qs,
            &ks,
            &ds,
            group % 2 == 1,
            one,
            &tiles,
            at + 4 * TILE,
            &mut gq,
            &mut gk,
            &mut gg,
        );
        let sum5 = read_group::<E>(
            &qs,
            &ks,
            &ds,
            group >= 2,
            between,
            &tiles,
            at + 5 * TILE,
            &mut gq,
            &mut gk,
            &mut gg,
        );

        // through the state: the whole chunk is the half
        let mut from_q = Array::<f32>::new(GROUP);
        let mut from_k = Array::<f32>::new(GROUP);
        let column = head * padded + i;
        #[unroll]
        for r in 0..GROUP {
            let row = group * GROUP + r;
            let valid = row < rows.len && i < dims.key_dim;
            let mut sum_q = f32::new(0.0);
            let mut sum_k = f32::new(0.0);
            #[unroll]
            for part in 0..parts {
                let from =
                    (part * num_rows + rows.start + row) * comptime!(dims.heads * padded) + column;
                sum_q += read_or_zero::<S>(dq_state, from, valid);
                sum_k += read_or_zero::<S>(dk_state, from, valid);
            }
            from_q[r] = sum_q * scale;
            from_k[r] = sum_k;
        }
        let mut w = before;
        #[unroll]
        for r in 0..GROUP {
            w *= ds[r];
            from_q[r] *= w;
            gq[r] += from_q[r];
            from_q[r] *= qs[r];
        }
        let mut w = after;
        #[unroll]
        for step in 0..GROUP {
            let r = GROUP - 1 - step;
            from_k[r] *= w;
            w *= ds[r];
            gk[r] += from_k[r];
            from_k[r] *= ks[r];
        }
        let mut sum_q = f32::new(0.0);
        let mut sum_k = f32::new(0.0);
        #[unroll]
        for step in 0..GROUP {
            let r = GROUP - 1 - step;
            sum_q += from_q[r];
            gg[r] += sum_q;
            gg[step] += sum_k;
            sum_k += from_k[step];
        }
        let cross = comptime!(SLICE * (CHUNK / GROUP));
        sums[group * SLICE + channel] = sum5;
        sums[cross + group * SLICE + channel] = sum_q;
        sums[2 * cross + group * SLICE + channel] = sum_k;
        sync_cube();

        if comptime!(dims.gate.is_some()) {
            let mut beyond = select(group == 2, sums[3 * SLICE + channel], f32::new(0.0));
            beyond += select(group == 1, sums[channel], f32::new(0.0));
            #[unroll]
            for other in 0..4usize {
                let of_q = sums[cross + other * SLICE + channel];
                let of_k = sums[2 * cross + other * SLICE + channel];
                beyond += select(other > group, of_q, select(other < group, of_k, f32::new(0.0)));
            }
            let mut product = f32::new(0.0);
            #[unroll]
            for part in 0..parts {
                let from = ((part * num_chunks + chunk) * dims.heads + head) * padded + i;
                product += read_or_zero::<f32>(products, from, i < padded);
            }
            beyond += product * (t0 * t1) * (t2 * t3);
            #[unroll]
            for r in 0..GROUP {
                gg[r] += beyond;
            }
        }
        #[unroll]
        for r in 0..GROUP {
            let row = group * GROUP + r;
            if row < rows.len && i < dims.key_dim {
                let to = ((rows.start + row) * dims.heads + head) * dims.key_dim + i;
                dq[to] = Q::cast_from(gq[r]);
                dk[to] = P::cast_from(gk[r]);
                if comptime!(dims.gate.is_some()) {
                    dg[to] = R::cast_from(gg[r]);
                }
            }
        }
    }
}

/// `scale do v^T`, below and on the diagonal, and its mirror image above.
#[cube]
#[allow(clippy::too_many_arguments)]
fn score_gradients<E: Float>(
    v: &[E],
    d_o: &[E],
    tiles: &mut [E],
    symmetric: &mut [E],
    rows: &ChunkRows,
    head: usize,
    scale: f32,
    #[comptime] spec: ChunkSpec,
) {
    let dims = comptime!(spec.dims);
    let plane = UNIT_POS as usize / 32;
    let mut acc = zero_tiles(4usize);
    let (_, below, left_of) = below_diagonal(plane);
    let t = select(plane < 4, plane, below);
    let s = select(plane < 4, plane, left_of);
    for slice in 0..comptime!(dims.value_dim.div_ceil(SLICE)) {
        for at in range_stepped(UNIT_POS as usize, comptime!(CHUNK * SLICE), CHUNK_UNITS) {
            let (row, c) = (at / SLICE, at % SLICE);
            let j = slice * SLICE + c;
            let valid = row < rows.len && j < dims.value_dim;
            let from = rows.start + row;
            let do_at = row_offset(from, head, dims, dims.heads, dims.value_dim) + j;
            let v_at = row_offset(from, head, dims, dims.kv_heads, dims.value_dim) + j;
            let zero = E::from_int(0);
            tiles[row * STRIDE + c] = select(valid, d_o[select(valid, do_at, 0usize)], zero);
            tiles[TILE + row * STRIDE + c] = select(valid, v[select(valid, v_at, 0usize)], zero);
        }
        sync_cube();
        #[unroll]
        for j in 0..comptime!(SLICE / 16) {
            let left = load_quad::<E>(&tiles[0..TILE], t * 16, j * 16, STRIDE, false);
            let quad = load_quad::<E>(&tiles[TILE..2 * TILE], s * 16, j * 16, STRIDE, false);
            let r0 = right_of_plain::<E>(&quad, 0usize);
            let r1 = right_of_plain::<E>(&quad, 1usize);
            multiply::<E>(&left, &r0, &mut acc, 0usize);
            multiply::<E>(&left, &r1, &mut acc, 1usize);
            if plane >= 6 {
                let quad =
                    load_quad::<E>(&tiles[TILE..2 * TILE], (s + 1) * 16, j * 16, STRIDE, false);
                let r0 = right_of_plain::<E>(&quad, 0usize);
                let r1 = right_of_plain::<E>(&quad, 1usize);
                multiply::<E>(&left, &r0, &mut acc, 2usize);
                multiply::<E>(&left, &r1, &mut acc, 3usize);
            }
        }
        sync_cube();
    }
    #[unroll]
    for n in 0..4usize {
        #[unroll]
        for half in 0..2usize {
            let (r, c) = accumulator_position(n % 2, half);
            #[unroll]
            for e in 0..2usize {
                let row = t * 16 + r;
                let col = (s + n / 2) * 16 + c + e;
                if row >= col && (n < 2 || plane >= 6) {
                    let value = E::cast_from(acc[2 * n + half].extract(e) * scale);
                    symmetric[row * STRIDE + col] = value;
                    symmetric[col * STRIDE + row] = value;
                }
            }
        }
    }
    sync_cube();
}

/// A diagonal block with all but one level masked.
#[cube]
fn of_level<E: Float>(block: &Quad<E>, #[comptime] level: usize) -> Quad<E> {
    let lane = UNIT_POS_PLANE as usize;
    let mut left = Array::<Pair<E>>::new(4usize);
    let zero = Pair::<E>::new(E::from_int(0));
    if comptime!(level == 3) {
        left[0] = zero;
        left[1] = block[1];
        left[2] = block[2];
        left[3] = zero;
    } else {
        #[unroll]
        for i in 0..4usize {
            if comptime!(i == 0 || i == 3) {
                let mut pair = Pair::<E>::empty();
                #[unroll]
                for e in 0..2usize {
                    let x = (lane / 4) ^ (2 * (lane % 4) + e);
                    let keep = x >= comptime!(1usize << level) && x < comptime!(2usize << level);
                    pair.insert(e, select(keep, block[i].extract(e), E::from_int(0)));
                }
                left[i] = pair;
            } else {
                left[i] = zero;
            }
        }
    }
    left
}

/// `acc[tile], acc[tile + 1] += left x` for the rows of a group and 16 channels of a level.
#[cube]
fn send<E: Float>(
    left: &Quad<E>,
    level: &[E],
    group: usize,
    col: usize,
    acc: &mut Array<Pair<f32>>,
    tile: usize,
) {
    let quad = load_quad::<E>(level, group * 16, col, STRIDE, true);
    let r0 = right_of_transposed::<E>(&quad, 0usize);
    let r1 = right_of_transposed::<E>(&quad, 1usize);
    multiply::<E>(left, &r0, acc, tile);
    multiply::<E>(left, &r1, acc, tile + 1);
}

/// The shares of a level inside a group, see the module.
#[cube]
#[allow(clippy::too_many_arguments)]
fn read_level<E: Float>(
    q: &Column,
    k: &Column,
    decay: &Column,
    sent: &[E],
    at: usize,
    gq: &mut Column,
    gk: &mut Column,
    gg: &mut Column,
    #[comptime] level: usize,
) {
    let half = comptime!(1usize << level);
    #[unroll]
    for block in 0..comptime!(GROUP >> (level + 1)) {
        let first = block * (2 * half);
        let mut u = Array::<f32>::new(comptime!(2 * half));
        let mut w = f32::new(1.0);
        #[unroll]
        for step in 0..half {
            let n = half - 1 - step;
            let share = w * f32::cast_from(sent[at + (first + n) * STRIDE]);
            w *= decay[first + n];
            gk[first + n] += share;
            u[n] = share * k[first + n];
        }
        let mut w = f32::new(1.0);
        #[unroll]
        for step in 0..half {
            let n = half + step;
            w *= decay[first + n];
            let share = w * f32::cast_from(sent[at + (first + n) * STRIDE]);
            gq[first + n] += share;
            u[n] = share * q[first + n];
        }
        let mut from_start = f32::new(0.0);
        let mut to_end = f32::new(0.0);
        #[unroll]
        for step in 0..half {
            gg[first + step] += from_start;
            from_start += u[step];
            let n = 2 * half - 1 - step;
            to_end += u[n];
            gg[first + n] += to_end;
        }
    }
}

/// The shares of a level that reaches beyond the group; returns the sum of the group's terms of
/// `dg`, which the next group of the same half adds.
#[cube]
#[allow(clippy::too_many_arguments)]
fn read_group<E: Float>(
    q: &Column,
    k: &Column,
    decay: &Column,
    is_query: bool,
    between: f32,
    sent: &[E],
    at: usize,
    gq: &mut Column,
    gk: &mut Column,
    gg: &mut Column,
) -> f32 {
    let mut u = Array::<f32>::new(GROUP);
    let mut sum = f32::new(0.0);
    let mut w = between;
    if is_query {
        #[unroll]
        for r in 0..GROUP {
            w *= decay[r];
            let share = w * f32::cast_from(sent[at + r * STRIDE]);
            gq[r] += share;
            u[r] = share * q[r];
        }
        #[unroll]
        for step in 0..GROUP {
            let r = GROUP - 1 - step;
            sum += u[r];
            gg[r] += sum;
        }
    } else {
        #[unroll]
        for step in 0..GROUP {
            let r = GROUP - 1 - step;
            let share = w * f32::cast_from(sent[at + r * STRIDE]);
            w *= decay[r];
            gk[r] += share;
            u[r] = share * k[r];
        }
        #[unroll]
        for r in 0..GROUP {
            gg[r] += sum;
            sum += u[r];
        }
    }
    sum
}
