//! Kernel `intra_grad`: the gradients of `q`, `k` and the gate for one chunk of one head.
//!
//! First `dA = scale do v^T` below and on the diagonal, made symmetric: `M`. Then, with the levels of
//! [`super::levels`] and `L` the queries or keys of a level with their decay from or to its boundary,
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

use super::levels::{
    Grads, Sent, accumulator_position, add_sent, columns_of, fetch_columns, is_query, load_around,
    load_beyond, neighbour_adds, nothing_fetched, read_inner, read_outer, write_inner, write_outer,
};
use super::scores::{PLANES, lower_tile, row_products};
use super::stage::Stage;
use super::{CHUNK, CHUNK_UNITS, ChunkSpec, GROUP, GROUPS, LEVELS, SLICE, STRIDE, TILE};
use crate::Dims;
use crate::components::{
    ChunkRows, Pair, Quad, chunk_rows, load_quad, multiply, read_or_zero, right_of_transposed,
    zero_tiles,
};

/// Sums that cross the groups of a chunk: levels 4 and 5, the queries' and the keys' shares of the
/// state.
pub(crate) const CROSSING: usize = 4;

/// * `q`: `[rows, H, K]`, `k`: `[rows, Hk, K]`, `v`: `[rows, Hk, V]`, `d_o`: `[rows, H, V]`
/// * `dq_state`, `dk_state`: `[parts, chunks, H, padded, 64]`, without the decay to the chunk's edges
/// * `products`: `[shares, chunks, H, padded]`
/// * `dq`, `dk`: out, `[rows, H, K]`; `dg`: out, `[rows, H, K]`
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(crate) fn gla_scan_intra_grad_kernel<
    E: Float,
    G: Float,
    Q: Float,
    P: Float,
    R: Float,
    N: Size,
>(
    q: &[E],
    k: &[E],
    v: &[Vector<E, N>],
    d_o: &[Vector<E, N>],
    gate: &[G],
    dq_state: &[Vector<f32, Const<4>>],
    dk_state: &[Vector<f32, Const<4>>],
    products: &[f32],
    dq: &mut [Q],
    dk: &mut [P],
    dg: &mut [R],
    table: &[u32],
    num_sequences: usize,
    num_chunks: usize,
    tasks: usize,
    scale: f32,
    #[comptime] spec: ChunkSpec,
    #[comptime] parts: usize,
    #[comptime] shares: usize,
    #[define(E, G, Q, P, R)] _dtypes: [ElemType; 5],
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
    let mut symmetric = Shared::<[E]>::new_aligned_slice(comptime!(CHUNK * (CHUNK + 8)), 16usize);
    let mut totals = Shared::<[f32]>::new_slice(comptime!(SLICE * GROUPS));
    let mut sums = Shared::<[f32]>::new_slice(comptime!(CROSSING * SLICE * GROUPS));

    // of the first slice, while `dA` is formed
    let mut fetched = nothing_fetched::<E, G>();
    fetch_columns::<E, G>(q, k, gate, &mut fetched, &rows, head, channel, dims);
    score_gradients::<E, N>(v, d_o, &mut tiles, &mut symmetric, &rows, head, scale, dims);

    let wide = comptime!(CHUNK + 8);
    // a plane's share of the levels: 16 rows, 16 channels of a slice
    let own = plane % 4;
    let col = (plane / 4) * 16;
    let diagonal = load_quad::<E>(&symmetric, own * 16, own * 16, wide, false);

    for slice in 0..comptime!(padded.div_ceil(SLICE)) {
        let i = slice * SLICE + channel;
        let one = f32::new(1.0);
        if slice > 0 {
            fetch_columns::<E, G>(q, k, gate, &mut fetched, &rows, head, i, dims);
        }
        let x = columns_of::<E, G>(&fetched, &rows, i, one, dims);
        let total = x.head[GROUP - 1];
        totals[group * SLICE + channel] = total;
        let at = group * comptime!(GROUP * STRIDE) + channel;
        write_inner::<E>(&x, &mut tiles, at, 0usize);
        write_inner::<E>(&x, &mut tiles, at + TILE, 1usize);
        write_inner::<E>(&x, &mut tiles, at + 2 * TILE, 2usize);
        sync_cube();
        let beyond = load_beyond(&totals);
        write_outer::<E>(&x, one, &mut tiles, at + 3 * TILE, 3usize);
        write_outer::<E>(&x, beyond.level4, &mut tiles, at + 4 * TILE, 4usize);
        write_outer::<E>(&x, beyond.level5, &mut tiles, at + 5 * TILE, 5usize);
        sync_cube();

        let mut acc = zero_tiles(comptime!(2 * LEVELS));
        #[unroll]
        for level in 0..4usize {
            let left = of_level::<E>(&diagonal, level);
            send::<E>(&left, &tiles, level, own, col, &mut acc);
        }
        let left = load_quad::<E>(&symmetric, own * 16, (own ^ 1) * 16, wide, false);
        send::<E>(&left, &tiles, 4usize, own ^ 1, col, &mut acc);
        let left = load_quad::<E>(&symmetric, own * 16, (own ^ 2) * 16, wide, false);
        send::<E>(&left, &tiles, 5usize, own ^ 2, col, &mut acc);
        let left = load_quad::<E>(&symmetric, own * 16, (own ^ 3) * 16, wide, false);
        send::<E>(&left, &tiles, 5usize, own ^ 3, col, &mut acc);
        sync_cube();
        // what the levels send takes the place of what they were made of
        #[unroll]
        for level in 0..LEVELS {
            #[unroll]
            for n in 0..2usize {
                #[unroll]
                for half in 0..2usize {
                    let (r, c) = accumulator_position(n, half);
                    let to = level * TILE + (own * 16 + r) * STRIDE + col + c;
                    let pair = acc[2 * (2 * level + n) + half];
                    tiles[to] = E::cast_from(pair.extract(0usize));
                    tiles[to + 1] = E::cast_from(pair.extract(1usize));
                }
            }
        }
        sync_cube();

        let mut grads =
            Grads { q: Array::new(GROUP), k: Array::new(GROUP), gate: Array::new(GROUP) };
        #[unroll]
        for r in 0..GROUP {
            // the diagonal: a row with itself, without decay
            let row = group * GROUP + r;
            let own = f32::cast_from(symmetric[row * wide + row]);
            grads.q[r] = own * x.k[r];
            grads.k[r] = own * x.q[r];
            grads.gate[r] = f32::new(0.0);
        }
        read_inner::<E>(&x, &tiles, at, &mut grads, 0usize);
        read_inner::<E>(&x, &tiles, at + TILE, &mut grads, 1usize);
        read_inner::<E>(&x, &tiles, at + 2 * TILE, &mut grads, 2usize);
        let cross = comptime!(SLICE * GROUPS);
        let own_sum = group * SLICE + channel;
        let mut sent = Sent { q: Array::new(GROUP), k: Array::new(GROUP) };
        // through the state: the whole chunk is the half
        let mut sum_q = f32::new(0.0);
        let mut sum_k = f32::new(0.0);
        #[unroll]
        for quarter in 0..comptime!(GROUP / 4) {
            let mut share_q = Vector::<f32, Const<4>>::new(0.0f32);
            let mut share_k = Vector::<f32, Const<4>>::new(0.0f32);
            #[unroll]
            for part in 0..parts {
                let from = ((part * num_chunks + chunk) * dims.heads + head) * padded
                    + select(i < padded, i, 0usize);
                let at = (from * CHUNK + group * GROUP) / 4 + quarter;
                share_q += dq_state[at];
                share_k += dk_state[at];
            }
            #[unroll]
            for e in 0..4usize {
                let r = 4 * quarter + e;
                sent.q[r] = share_q.extract(e) * scale * beyond.before;
                sent.k[r] = share_k.extract(e) * beyond.after;
                sum_q += x.q[r] * x.head[r] * sent.q[r];
                sum_k += x.k[r] * x.tail[r] * sent.k[r];
            }
        }
        read_outer::<E>(&x, one, &tiles, at + 3 * TILE, &mut sent, 3usize);
        sums[own_sum] =
            read_outer::<E>(&x, beyond.level4, &tiles, at + 4 * TILE, &mut sent, 4usize);
        sums[cross + own_sum] =
            read_outer::<E>(&x, beyond.level5, &tiles, at + 5 * TILE, &mut sent, 5usize);
        add_sent(&x, &sent, &mut grads);
        sums[2 * cross + own_sum] = sum_q;
        sums[3 * cross + own_sum] = sum_k;
        sync_cube();

        let mut common = neighbour_adds(&sums[0..cross]);
        let level5 = load_around(&sums[cross..2 * cross]);
        common += select(is_query(5usize), level5.later, level5.earlier);
        common += load_around(&sums[2 * cross..3 * cross]).all_later;
        common += load_around(&sums[3 * cross..4 * cross]).all_earlier;
        let mut product = f32::new(0.0);
        #[unroll]
        for share in 0..shares {
            let from = ((share * num_chunks + chunk) * dims.heads + head) * padded + i;
            product += read_or_zero::<f32>(products, from, i < padded);
        }
        common += product * beyond.before * total * beyond.after;
        let row0 = rows.start + group * GROUP;
        #[unroll]
        for r in 0..GROUP {
            if group * GROUP + r < rows.len && i < dims.key_dim {
                let to = ((row0 + r) * dims.heads + head) * dims.key_dim + i;
                dq[to] = Q::cast_from(grads.q[r]);
                dk[to] = P::cast_from(grads.k[r]);
                dg[to] = R::cast_from(grads.gate[r] + common);
            }
        }
    }
}

/// `scale do v^T`, below and on the diagonal, and its mirror image above.
#[cube]
#[allow(clippy::too_many_arguments)]
fn score_gradients<E: Float, N: Size>(
    v: &[Vector<E, N>],
    d_o: &[Vector<E, N>],
    tiles: &mut [E],
    symmetric: &mut [E],
    rows: &ChunkRows,
    head: usize,
    scale: f32,
    #[comptime] dims: Dims,
) {
    let plane = UNIT_POS as usize / 32;
    let from_do = comptime!(Stage::slice(dims, dims.heads, dims.value_dim, CHUNK_UNITS));
    let from_v = comptime!(Stage::slice(dims, dims.kv_heads, dims.value_dim, CHUNK_UNITS));
    let acc = row_products::<E, N>(d_o, v, tiles, rows, head, from_do, from_v);
    if plane < PLANES {
        let (t, s) = lower_tile(plane);
        #[unroll]
        for n in 0..2usize {
            #[unroll]
            for half in 0..2usize {
                let (r, c) = accumulator_position(n, half);
                #[unroll]
                for e in 0..2usize {
                    let (row, col) = (t * 16 + r, s * 16 + c + e);
                    if row >= col {
                        let value = E::cast_from(acc[2 * n + half].extract(e) * scale);
                        symmetric[row * comptime!(CHUNK + 8) + col] = value;
                        symmetric[col * comptime!(CHUNK + 8) + row] = value;
                    }
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

/// Adds `left` times 16 rows and 16 channels of a level to the level's two accumulator tiles.
#[cube]
fn send<E: Float>(
    left: &Quad<E>,
    tiles: &[E],
    level: usize,
    block: usize,
    col: usize,
    acc: &mut Array<Pair<f32>>,
) {
    let quad = load_quad::<E>(tiles, level * CHUNK + block * 16, col, STRIDE, true);
    let r0 = right_of_transposed::<E>(&quad, 0usize);
    let r1 = right_of_transposed::<E>(&quad, 1usize);
    multiply::<E>(left, &r0, acc, 2 * level);
    multiply::<E>(left, &r1, acc, 2 * level + 1);
}
