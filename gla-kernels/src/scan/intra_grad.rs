//! Kernel `intra_grad`: the gradients of `q`, `k` and the gate for one chunk of one head.
//!
//! First `range do v^T` below and on the diagonal, made symmetric: `M`, with the power of two next to the
//! scale, so that `M` is rounded, and has the range, as `dA`. Then, with the levels of
//! [`super::levels`] and `L` the queries or keys of a level with their decay from or to its boundary,
//!
//! ```text
//! G_level = (M where the highest differing bit of row and column is the level) L_level
//! ```
//!
//! is what the other half sends a row, but for the row's own decay `w`: with `r = scale / range`,
//! `dq_t += r w G_t` in second halves, `dk_s += r w G_s` in first halves. `u = r x w G`, `x` the row of
//! `q` or `k`, summed from a row to the end of its half (queries) or from the start of its half to before
//! the row (keys), is the level's share of `dg`. The shares through the state are the same with the whole
//! chunk as half, and pairs on both sides of the chunk enter through the products of state and state
//! gradient.

use cubecl::prelude::*;

use super::levels::{
    Grads, Sent, add_sent, columns_of, fetch_columns, group_of, is_query, load_around, load_beyond,
    neighbour_adds, nothing_fetched, read_inner, read_outer, write_inner, write_outer,
};
use super::scores::{PLANES, lower_tile, row_products};
use super::stage::Stage;
use super::{CHUNK, ChunkSpec, GROUP, GROUPS, LEVELS};
use crate::Instruction;
use crate::components::{
    Acc, ChunkMap, ChunkRows, Left, Right, is_of_level, multiply, only_level, pair_position,
    read_or_zero,
};

/// Sums that cross the groups of a chunk: levels 4 and 5, the queries' and the keys' shares of the
/// state.
const CROSSING: usize = 4;

/// Row stride of the symmetric matrix.
const WIDE: usize = CHUNK + 8;

/// Row stride of a masked block.
const MASKED: usize = 24;

/// Bytes of shared memory for elements of `size` bytes.
pub const fn shared_memory(spec: ChunkSpec, size: usize) -> usize {
    size * (LEVELS * spec.tile() + CHUNK * WIDE) + 4 * (1 + CROSSING) * spec.slice() * GROUPS
}

/// * `q`: `[rows, H, K]`, `k`: `[rows, Hk, K]`, `v`: `[rows, Hk, V]`, `d_o`: `[rows, H, V]`
/// * `dq_state`, `dk_state`: `[parts, chunks, H, padded, 64]`, without the decay to the chunk's edges
/// * `products`: `[shares, chunks, H, padded]`
/// * `dq`, `dk`: out, `[rows, H, K]`; `dg`: out, `[rows, H, K]`
/// * `slices` of the key channels, at run time: the compiler would unroll a number that it knows
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
    dq_state: &[Vector<E, Const<4>>],
    dk_state: &[Vector<E, Const<4>>],
    products: &[f32],
    dq: &mut [Q],
    dk: &mut [P],
    dg: &mut [R],
    map: ChunkMap,
    num_chunks: usize,
    tasks: usize,
    slices: usize,
    scale: f32,
    range: f32,
    #[comptime] spec: ChunkSpec,
    #[comptime] parts: usize,
    #[comptime] shares: usize,
    #[define(E, G, Q, P, R)] _dtypes: [ElemType; 5],
) {
    let dims = comptime!(spec.dims);
    let by = comptime!(spec.instruction);
    let (padded, slice_len, tile) = comptime!((spec.padded(), spec.slice(), spec.tile()));
    let task = CUBE_POS;
    if task >= tasks {
        terminate!();
    }
    let head = task % dims.heads;
    let chunk = task / dims.heads;
    let rows = map.rows_of(chunk);

    let unit = UNIT_POS as usize;
    let channel = unit % slice_len;
    let group = group_of(spec);
    let plane = unit / 32;

    let mut tiles = Shared::<[E]>::new_aligned_slice(comptime!(LEVELS * tile), 16usize);
    let mut symmetric = Shared::<[E]>::new_aligned_slice(comptime!(CHUNK * WIDE), 16usize);
    let mut totals = Shared::<[f32]>::new_slice(comptime!(slice_len * GROUPS));
    let mut sums = Shared::<[f32]>::new_slice(comptime!(CROSSING * slice_len * GROUPS));

    score_gradients::<E, N>(v, d_o, &mut tiles, &mut symmetric, &rows, head, range, spec);
    // what `M` lacks of the scale
    let rest = scale / range;

    // a plane's share of the levels: 16 rows, 16 channels of a slice
    let own = plane % 4;
    let col = (plane / 4) * 16;
    // with `cmma`: its diagonal block, once for each of the levels in it, with the others masked
    let mut diagonal = Sequence::<Left<E>>::new();
    if comptime!(by == Instruction::Cmma) {
        #[unroll]
        for level in 0..4usize {
            diagonal.push(through_memory::<E>(&symmetric, &mut tiles, own, level));
        }
        sync_cube();
    }

    for slice in 0..slices {
        let i = slice * slice_len + channel;
        let one = f32::new(1.0);
        let mut fetched = nothing_fetched::<E, G>();
        fetch_columns::<E, G>(q, k, gate, &mut fetched, &rows, head, i, spec);
        // those of the first parts are on their way until the levels are done
        let quarters = comptime!(GROUP / 4);
        let early = comptime!(parts.min(2));
        let mut early_q = Array::<Vector<E, Const<4>>>::new(comptime!(early * quarters));
        let mut early_k = Array::<Vector<E, Const<4>>>::new(comptime!(early * quarters));
        let share = (chunk * dims.heads + head) * padded + select(i < padded, i, 0usize);
        let share = (share * CHUNK + group * GROUP) / 4;
        let part_len = num_chunks * comptime!(dims.heads * padded * CHUNK / 4);
        #[unroll]
        for n in 0..comptime!(early * quarters) {
            let at = share + comptime!(n / quarters) * part_len + comptime!(n % quarters);
            early_q[n] = dq_state[at];
            early_k[n] = dk_state[at];
        }
        let x = columns_of::<E, G>(&fetched, &rows, i, one, spec);
        let total = x.head[GROUP - 1];
        totals[group * slice_len + channel] = total;
        let at = group * comptime!(GROUP * spec.stride()) + channel;
        write_inner::<E>(&x, &mut tiles, at, 0usize, spec);
        write_inner::<E>(&x, &mut tiles, at + tile, 1usize, spec);
        write_inner::<E>(&x, &mut tiles, at + 2 * tile, 2usize, spec);
        sync_cube();
        let beyond = load_beyond(&totals, spec);
        write_outer::<E>(&x, one, &mut tiles, at + 3 * tile, 3usize, spec);
        write_outer::<E>(&x, beyond.level4, &mut tiles, at + 4 * tile, 4usize, spec);
        write_outer::<E>(&x, beyond.level5, &mut tiles, at + 5 * tile, 5usize, spec);
        sync_cube();

        let mut acc = Sequence::<Acc>::new();
        #[unroll]
        for _level in 0..LEVELS {
            acc.push(Acc::zero(by));
        }
        // with `mma`: the block itself, anew for each slice, so that what is masked holds no registers
        let mut block = Sequence::<Left<E>>::new();
        if comptime!(by != Instruction::Cmma) {
            let symmetric = symmetric.as_vectorized();
            block.push(Left::<E>::load(symmetric, own * 16, own * 16, WIDE, false, by));
        }
        #[unroll]
        for level in 0..4usize {
            if comptime!(by == Instruction::Cmma) {
                send::<E>(
                    diagonal.index(level),
                    &tiles,
                    level,
                    own,
                    col,
                    acc.index_mut(level),
                    spec,
                );
            } else {
                let left = only_level::<E>(block.index(0usize), level);
                send::<E>(&left, &tiles, level, own, col, acc.index_mut(level), spec);
            }
        }
        #[unroll]
        for n in 1..4usize {
            // the 16-row blocks of the other half
            let level = comptime!(if n == 1 { 4usize } else { 5usize });
            let symmetric = symmetric.as_vectorized();
            let left = Left::<E>::load(symmetric, own * 16, (own ^ n) * 16, WIDE, false, by);
            send::<E>(&left, &tiles, level, own ^ n, col, acc.index_mut(level), spec);
        }
        sync_cube();
        // what the levels send takes the place of what they were made of
        #[unroll]
        for level in 0..LEVELS {
            let row = level * CHUNK + own * 16;
            acc.index(level).store::<E>(&mut tiles, row, col, comptime!(spec.stride()));
        }
        sync_cube();

        let mut grads =
            Grads { q: Array::new(GROUP), k: Array::new(GROUP), gate: Array::new(GROUP) };
        #[unroll]
        for r in 0..GROUP {
            // the diagonal: a row with itself, without decay
            let row = group * GROUP + r;
            let own = f32::cast_from(symmetric[row * WIDE + row]) * rest;
            grads.q[r] = own * x.k[r];
            grads.k[r] = own * x.q[r];
            grads.gate[r] = f32::new(0.0);
        }
        read_inner::<E>(&x, &tiles, at, rest, &mut grads, 0usize, spec);
        read_inner::<E>(&x, &tiles, at + tile, rest, &mut grads, 1usize, spec);
        read_inner::<E>(&x, &tiles, at + 2 * tile, rest, &mut grads, 2usize, spec);
        let cross = comptime!(slice_len * GROUPS);
        let own_sum = group * slice_len + channel;
        let mut sent = Sent { q: Array::new(GROUP), k: Array::new(GROUP) };
        // through the state: the whole chunk is the half
        let mut sum_q = f32::new(0.0);
        let mut sum_k = f32::new(0.0);
        #[unroll]
        for quarter in 0..quarters {
            let mut share_q = Vector::<f32, Const<4>>::new(0.0f32);
            let mut share_k = Vector::<f32, Const<4>>::new(0.0f32);
            #[unroll]
            for part in 0..early {
                share_q += Vector::cast_from(early_q[part * quarters + quarter]);
                share_k += Vector::cast_from(early_k[part * quarters + quarter]);
            }
            for part in early..parts {
                share_q += Vector::cast_from(dq_state[share + part * part_len + quarter]);
                share_k += Vector::cast_from(dk_state[share + part * part_len + quarter]);
            }
            #[unroll]
            for e in 0..4usize {
                let r = 4 * quarter + e;
                sent.q[r] = share_q.extract(e) * beyond.before;
                sent.k[r] = share_k.extract(e) * beyond.after;
                sum_q += x.q[r] * x.head[r] * sent.q[r];
                sum_k += x.k[r] * x.tail[r] * sent.k[r];
            }
        }
        read_outer::<E>(&x, rest, &tiles, at + 3 * tile, &mut sent, 3usize, spec);
        let level4 = rest * beyond.level4;
        sums[own_sum] = read_outer::<E>(&x, level4, &tiles, at + 4 * tile, &mut sent, 4usize, spec);
        let level5 = rest * beyond.level5;
        sums[cross + own_sum] =
            read_outer::<E>(&x, level5, &tiles, at + 5 * tile, &mut sent, 5usize, spec);
        add_sent(&x, &sent, &mut grads);
        sums[2 * cross + own_sum] = sum_q;
        sums[3 * cross + own_sum] = sum_k;
        sync_cube();

        let mut common = neighbour_adds(&sums[0..cross], spec);
        let level5 = load_around(&sums[cross..2 * cross], spec);
        common += select(is_query(5usize, spec), level5.later, level5.earlier);
        common += load_around(&sums[2 * cross..3 * cross], spec).all_later;
        common += load_around(&sums[3 * cross..4 * cross], spec).all_earlier;
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

/// `range do v^T`, below and on the diagonal, and its mirror image above.
#[cube]
#[allow(clippy::too_many_arguments)]
fn score_gradients<E: Float, N: Size>(
    v: &[Vector<E, N>],
    d_o: &[Vector<E, N>],
    tiles: &mut [E],
    symmetric: &mut [E],
    rows: &ChunkRows,
    head: usize,
    range: f32,
    #[comptime] spec: ChunkSpec,
) {
    let (dims, planes) = comptime!((spec.dims, spec.planes()));
    let from_do = comptime!(Stage::slice(spec, dims.heads, dims.value_dim, spec.units()));
    let from_v = comptime!(Stage::slice(spec, dims.kv_heads, dims.value_dim, spec.units()));
    let tiles = tiles.as_vectorized_mut();
    let acc = row_products::<E, N, Const<1>>(
        d_o, v, tiles, rows, head, range, true, from_do, from_v, spec,
    );
    #[unroll]
    for round in 0..comptime!(PLANES.div_ceil(planes)) {
        let own = UNIT_POS as usize / 32 + round * planes;
        if own < PLANES {
            let (t, s) = lower_tile(own);
            acc.index(round).store::<E>(symmetric, t * 16, s * 16, WIDE);
        }
    }
    sync_cube();
    for at in range_stepped(UNIT_POS as usize, comptime!(CHUNK * CHUNK), spec.units()) {
        let (row, col) = (at / CHUNK, at % CHUNK);
        if row < col {
            symmetric[row * WIDE + col] = symmetric[col * WIDE + row];
        }
    }
    sync_cube();
}

/// Diagonal block `own` of `symmetric` with all but one level masked, through the plane's own part of
/// `scratch`.
#[cube]
fn through_memory<E: Float>(
    symmetric: &[E],
    scratch: &mut [E],
    own: usize,
    #[comptime] level: usize,
) -> Left<E> {
    let first = (UNIT_POS as usize / 32) * 16;
    #[unroll]
    for i in 0..4usize {
        let (row, col) = pair_position(i);
        #[unroll]
        for e in 0..2usize {
            let value = symmetric[(own * 16 + row) * WIDE + own * 16 + col + e];
            let keep = is_of_level(row, col + e, level);
            scratch[(first + row) * MASKED + col + e] = select(keep, value, E::from_int(0));
        }
    }
    sync_plane();
    let by = comptime!(Instruction::Cmma);
    let left = Left::<E>::load(scratch.as_vectorized(), first, 0usize, MASKED, false, by);
    sync_plane();
    left
}

/// Adds `left` times 16 rows and 16 channels of a level to the level's accumulator.
#[cube]
fn send<E: Float>(
    left: &Left<E>,
    tiles: &[E],
    level: usize,
    block: usize,
    col: usize,
    acc: &mut Acc,
    #[comptime] spec: ChunkSpec,
) {
    let (stride, by) = comptime!((spec.stride(), spec.instruction));
    let row = level * CHUNK + block * 16;
    let right = Right::<E>::load(tiles.as_vectorized(), row, col, stride, false, by);
    multiply::<E>(left, &right, acc);
}
