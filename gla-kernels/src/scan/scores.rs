//! Kernel `scores`: what two rows of a chunk have to do with each other, for gates that decay all
//! channels of a row alike.
//!
//! For one chunk of one head, in the lower triangle:
//!
//! * `A[t, s] = scale q_t . k_s W[t, s]`, with `W[t, s] = w_{s+1} .. w_t`,
//! * `dA[t, s] = scale do_t . v_s W[t, s]` (backward),
//! * the line of the rows' decays, see [`Decay::Rows`](super::walk_spec::Decay::Rows),
//! * `dg_t = sum_{s < t <= r} A[r, s] do_r . v_s`: the pairs of the chunk that straddle `t`.
//!
//! `W` is split by levels as in [`super::levels`], so it is a product of two decays and no quotient; here
//! each row has one number a level. The products of rows are of the inputs themselves.

use cubecl::prelude::*;

use super::stage::{Stage, fetch, held, put_any};
use super::walk_spec::{Decay, ROWS_LEN, TOTAL};
use super::{CHUNK, ChunkSpec, LEVELS};
use crate::components::{
    Acc, ChunkMap, ChunkRows, Left, Pair, Right, Scratch, Slots, add_to, decay_or_one, multiply,
    pair_position, zero_pairs,
};

/// Planes that have a tile of the lower triangle: as many as it has.
pub(crate) const PLANES: usize = 10;

/// Units of a cube.
pub const UNITS: usize = 32 * PLANES;

/// A tile is what a plane has.
const SLOTS: Slots = Slots { floats: 1, halves: 0 };

/// Row stride of the pairs' products: all rows of a column in different banks.
const PAIRS: usize = CHUNK + 1;

/// Blocks of 16 rows, or columns, of a chunk.
const BLOCKS: usize = CHUNK / 16;

/// Bytes of shared memory for elements of `size` bytes.
pub const fn shared_memory(spec: ChunkSpec, size: usize) -> usize {
    let floats = (LEVELS + 2 + BLOCKS) * CHUNK + CHUNK * PAIRS;
    size * 2 * spec.tile() + 4 * floats + SLOTS.bytes(PLANES, 0, spec.instruction)
}

/// * `q`: `[rows, H, K]`, `k`: `[rows, Hk, K]`, `v`: `[rows, Hk, V]`, `d_o`: `[rows, H, V]`
/// * `a`, `d_a`: out, `[chunks, H, 64, 64]`, blocks below and on the diagonal, zero beyond the rows of the
///   chunk; the second, `v` and `d_o` in the backward only
/// * `decays`: out, `[chunks, H, ROWS_LEN]`; `dg`: out of the backward, `[rows, H]`; both if there is
///   a gate
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(crate) fn gla_scan_scores_kernel<E: Float, G: Float, N: Size, M: Size, T: Size>(
    q: &[Vector<E, N>],
    k: &[Vector<E, N>],
    v: &[Vector<E, M>],
    d_o: &[Vector<E, M>],
    gate: &[G],
    a: &mut [Pair<E>],
    d_a: &mut [Pair<E>],
    decays: &mut [f32],
    dg: &mut [f32],
    map: ChunkMap,
    tasks: usize,
    scale: f32,
    #[comptime] spec: ChunkSpec,
    #[comptime] backward: bool,
    #[define(E, G)] _dtypes: [ElemType; 2],
) {
    let (dims, by) = comptime!((spec.dims, spec.instruction));
    let task = CUBE_POS;
    if task >= tasks {
        terminate!();
    }
    let head = task % dims.heads;
    let chunk = task / dims.heads;
    let rows = map.rows_of(chunk);
    let unit = UNIT_POS as usize;
    let gated = comptime!(Decay::of(dims.gate) == Decay::Rows);

    let size = T::value();
    let mut staged =
        Shared::<[Vector<E, T>]>::new_aligned_slice(comptime!(2 * spec.tile() / size), 16usize);
    let mut scratch = Scratch::<E>::new(PLANES, SLOTS, 0usize, by);
    let mut edges = Shared::<[f32]>::new_slice(comptime!(LEVELS * CHUNK));
    let mut own = Shared::<[f32]>::new_slice(comptime!(2 * CHUNK));
    let pairs_len = comptime!(if backward && gated { CHUNK * PAIRS } else { 1 });
    let mut pairs = Shared::<[f32]>::new_slice(pairs_len);
    let sums_len = comptime!(if backward && gated { BLOCKS * CHUNK } else { 1 });
    let mut sums_of_pairs = Shared::<[f32]>::new_slice(sums_len);

    if comptime!(gated) {
        // of blocks of 1, 2, 4, .. rows: the decay from their start through the row, and that after the row to
        // their end. All units of a row do the same
        let row = unit % CHUNK;
        let writes = unit < CHUNK;
        let valid = row < rows.len;
        let mut through = decay_or_one::<G>(gate, rows.start + row, head, 0usize, valid, dims);
        let mut after = f32::new(1.0);
        #[unroll]
        for level in 0..LEVELS {
            let block = row >> level;
            let second = block % 2 == 1;
            let half = comptime!(level % 2 * CHUNK);
            if writes {
                edges[level * CHUNK + row] = select(second, through, after);
                own[half + row] = through;
            }
            sync_cube();
            // of all of the block beside it
            let total = own[half + ((block ^ 1) << level) + comptime!((1usize << level) - 1)];
            through = select(second, total * through, through);
            after = select(second, after, after * total);
        }
        let line = (chunk * dims.heads + head) * ROWS_LEN;
        if writes {
            decays[line + row] = through * scale;
            decays[line + CHUNK + row] = after;
            if row == comptime!(CHUNK - 1) {
                decays[line + TOTAL] = through;
            }
        }
    }

    let from_q = comptime!(Stage::slice(spec, dims.heads, dims.key_dim, UNITS));
    let from_k = comptime!(Stage::slice(spec, dims.kv_heads, dims.key_dim, UNITS));
    let mut acc = zero_pairs(4usize);
    let sums = row_products::<E, N, T>(
        q,
        k,
        &mut staged,
        &rows,
        head,
        f32::new(1.0),
        false,
        from_q,
        from_k,
        spec,
    );
    add_to::<E>(&sums, &mut acc, &mut scratch, f32::new(1.0), 0usize, by);
    let mut acc_grad = zero_pairs(4usize);
    if comptime!(backward) {
        let from_do = comptime!(Stage::slice(spec, dims.heads, dims.value_dim, UNITS));
        let from_v = comptime!(Stage::slice(spec, dims.kv_heads, dims.value_dim, UNITS));
        let sums = row_products::<E, M, T>(
            d_o,
            v,
            &mut staged,
            &rows,
            head,
            f32::new(1.0),
            false,
            from_do,
            from_v,
            spec,
        );
        add_to::<E>(&sums, &mut acc_grad, &mut scratch, f32::new(1.0), 0usize, by);
    }

    let (t, s) = lower_tile(unit / 32);
    #[unroll]
    for i in 0..4usize {
        let (r, c) = pair_position(i);
        let mut scores = Pair::<f32>::empty();
        let mut grads = Pair::<f32>::empty();
        #[unroll]
        for e in 0..2usize {
            let (row, col) = (t * 16 + r, s * 16 + c + e);
            let lower = row >= col;
            let mut w = scale;
            if comptime!(gated) {
                w = scale * decay_of_pair(&edges, row, col);
            }
            let score = acc[i].extract(e) * w;
            scores.insert(e, select(lower, score, f32::new(0.0)));
            if comptime!(backward) {
                let sent = acc_grad[i].extract(e);
                grads.insert(e, select(lower, sent * w, f32::new(0.0)));
                if gated && lower {
                    pairs[row * PAIRS + col] = sent * score;
                }
            }
        }
        let to = ((task * CHUNK + t * 16 + r) * CHUNK + s * 16 + c) / 2;
        a[to] = Vector::cast_from(scores);
        if comptime!(backward) {
            d_a[to] = Vector::cast_from(grads);
        }
    }
    if comptime!(backward && gated) {
        sync_cube();
        let sum = straddling(&mut pairs, &mut sums_of_pairs);
        if unit < rows.len {
            dg[(rows.start + unit) * dims.heads + head] = sum;
        }
    }
}

/// What the pairs `[row, column]`, `column <= row`, that straddle a unit's row `t` add up to: those with
/// `column < t <= row`. A unit works on 16 columns of a row, then on 16 rows of a column. `sums`:
/// `[BLOCKS, CHUNK]`; the first units have the result.
#[cube]
fn straddling(pairs: &mut [f32], sums: &mut [f32]) -> f32 {
    let (own, block) = (UNIT_POS as usize % CHUNK, UNIT_POS as usize / CHUNK);
    // of each row, the sums from the left: first in a block of columns,
    if block < BLOCKS {
        let at = own * PAIRS + block * 16;
        let mut values = Array::<f32>::new(16usize);
        #[unroll]
        for n in 0..16usize {
            values[n] = pairs[at + n];
        }
        let mut sum = f32::new(0.0);
        #[unroll]
        for n in 0..16usize {
            pairs[at + n] = sum;
            sum += select(block * 16 + n <= own, values[n], f32::new(0.0));
        }
        sums[block * CHUNK + own] = sum;
    }
    sync_cube();
    // then those of the blocks before it
    if block == 0 {
        let mut sum = f32::new(0.0);
        #[unroll]
        for n in 0..BLOCKS {
            let of_block = sums[n * CHUNK + own];
            sums[n * CHUNK + own] = sum;
            sum += of_block;
        }
    }
    sync_cube();
    let mut sum = f32::new(0.0);
    if block < BLOCKS {
        #[unroll]
        for n in 0..16usize {
            let row = block * 16 + n;
            let before = pairs[row * PAIRS + own] + sums[own / 16 * CHUNK + row];
            sum += select(row >= own, before, f32::new(0.0));
        }
    }
    sync_cube();
    if block < BLOCKS {
        sums[block * CHUNK + own] = sum;
    }
    sync_cube();
    let mut all = f32::new(0.0);
    #[unroll]
    for n in 0..BLOCKS {
        all += sums[n * CHUNK + own];
    }
    all
}

/// `left_t . right_s` of a chunk, below and on the diagonal, if `scales` times `factor`, a power of two:
/// rows of `right` take it in their own type. (`left` are the gradients, which may be small already.) Of
/// each plane tile [`lower_tile`] of its number, and of those of as many more as there are planes in the
/// cube; none beyond the tenth. `staged`: two tiles `[64, stride]`.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(crate) fn row_products<E: Float, N: Size, T: Size>(
    left: &[Vector<E, N>],
    right: &[Vector<E, N>],
    staged: &mut [Vector<E, T>],
    rows: &ChunkRows,
    head: usize,
    factor: f32,
    #[comptime] scales: bool,
    #[comptime] from_left: Stage,
    #[comptime] from_right: Stage,
    #[comptime] spec: ChunkSpec,
) -> Sequence<Acc> {
    let (slice_len, stride, tile) = comptime!((spec.slice(), spec.stride(), spec.tile()));
    let by = comptime!(spec.instruction);
    let size = T::value();
    let plane = UNIT_POS as usize / 32;
    let planes = comptime!(from_left.units / 32);
    let mut next_left = Array::<Vector<E, N>>::new(held::<N>(from_left));
    let mut next_right = Array::<Vector<E, N>>::new(held::<N>(from_right));
    fetch::<E, N>(left, &mut next_left, rows, head, 0usize, from_left);
    fetch::<E, N>(right, &mut next_right, rows, head, 0usize, from_right);
    let mut sums = Sequence::<Acc>::new();
    #[unroll]
    for _round in 0..comptime!(PLANES.div_ceil(planes)) {
        sums.push(Acc::zero(by));
    }
    for slice in 0..comptime!(from_left.width.div_ceil(slice_len)) {
        sync_cube();
        let at = slice * slice_len;
        if scales {
            #[unroll]
            for n in 0..held::<N>(from_right) {
                let product = Vector::<f32, N>::cast_from(next_right[n]) * Vector::new(factor);
                next_right[n] = Vector::cast_from(product);
            }
        }
        let first = &mut staged[0..comptime!(tile / size)];
        put_any::<E, N, T>(&next_left, first, rows.len, at, from_left, by);
        let second = &mut staged[comptime!(tile / size)..comptime!(2 * tile / size)];
        put_any::<E, N, T>(&next_right, second, rows.len, at, from_right, by);
        sync_cube();
        // after the last it reads the first again, for nothing
        let next = select(at + slice_len < from_left.width, at + slice_len, 0usize);
        fetch::<E, N>(left, &mut next_left, rows, head, next, from_left);
        fetch::<E, N>(right, &mut next_right, rows, head, next, from_right);
        #[unroll]
        for round in 0..comptime!(PLANES.div_ceil(planes)) {
            let own = plane + round * planes;
            let (t, s) = lower_tile(own);
            if own < PLANES {
                let both = &staged[0..comptime!(2 * tile / size)];
                #[unroll]
                for j in 0..comptime!(slice_len / 16) {
                    let left = Left::<E>::load(both, t * 16, j * 16, stride, false, by);
                    let right = Right::<E>::load(both, CHUNK + s * 16, j * 16, stride, true, by);
                    multiply::<E>(&left, &right, sums.index_mut(round));
                }
            }
        }
    }
    sums
}

/// Row and column of tile `n` of a lower triangle of four, row by row.
#[cube]
pub(crate) fn lower_tile(n: usize) -> (usize, usize) {
    let t = select(n >= 6, 3usize, select(n >= 3, 2usize, select(n >= 1, 1usize, 0usize)));
    (t, n - t * (t + 1) / 2)
}

/// `W[row, col]` for `col <= row`, anything finite above.
#[cube]
fn decay_of_pair(edges: &[f32], row: usize, col: usize) -> f32 {
    let x = row ^ col;
    let mut level = 0usize;
    #[unroll]
    for n in 1..LEVELS {
        level += select(x >= comptime!(1usize << n), 1usize, 0usize);
    }
    let w = edges[level * CHUNK + row] * edges[level * CHUNK + col];
    select(x == 0, f32::new(1.0), w)
}
