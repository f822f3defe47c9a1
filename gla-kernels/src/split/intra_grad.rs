//! Stage `intra_grad`: the share of `dq`, `dk` and `dg` that stays inside a chunk.
//!
//! With `w[t, s] = exp(g_{s+1} + .. + g_t)` per channel:
//!
//! * `Role::Query`: `dq_t += sum_{s <= t} dA[t, s] k_s w[t, s]`
//! * `Role::Key`: `dk_s += sum_{t >= s} dA[t, s] q_t w[t, s]`
//!
//! The gate's gradient is a sum over all pairs that straddle a step. It is formed from sums of
//! terms that all carry the decay of that step, never as a difference of suffix sums
//! (`q dq - k dk`), which would leave rounding noise larger than the gradient of a strong gate.
//! With `P[r, s] = dA[r, s] q_r k_s w[r, s]`, and `a` the sub-chunk of `t`:
//!
//! ```text
//! dg_t = through the whole chunk                                     (stage project)
//!      + sum_{r >= t} q_r dq_r^state + sum_{s < t} k_s dk_s^state    (rows of the chunk)
//!      + sum P over r in later, s in earlier sub-chunks than a       (Query, `cuts`)
//!      + sum P over r >= t in a, s in earlier sub-chunks             (Query)
//!      + sum P over r in later sub-chunks, s < t in a                (Key)
//!      + sum P over s < t <= r, both in a                            (Query)
//! ```
//!
//! That is with a gate per channel. Where a gate decays all channels alike, `dA` has the decay already, as without a gate
//! there is none, and all is one product. Of `dg` only the rows' sums are formed then, `q_r . dq_r^state` and
//! `k_s . dk_s^state`, for kernel `row_gate`; `scores` has the rest.
//!
//! A cube owns all rows of one chunk and `cols` key channels of one head; a unit owns 16 rows (one
//! sub-chunk) of one channel and walks them in registers.

use cubecl::prelude::*;

use super::StageSpec;
use super::place::{Column, Part, scale_to_edge};
use crate::components::{
    ChunkMap, Layout, PITCH, Role, TILE_ALIGN, contract, decay_between, pairs_tile, scale_all,
    step_chunk, zeros,
};
use crate::{GateKind, SUB};

/// * `q`: `[rows, H, K]`, `k`: `[rows, Hk, K]`
/// * `da`: `[rows, H, chunk]`
/// * `dx`: in and out, `[rows, H, K]` f32: the share through the state, then all of it
/// * `dg`: in and out, `[rows, H, K]` f32, with a vector gate; out, `[tiles, rows, H]`, where channels decay alike
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(crate) fn gla_intra_grad_kernel<E: Float, G: Float, C: Size>(
    q: &[E],
    k: &[E],
    gate: &[G],
    da: &[Vector<f32, C>],
    dx: &mut [f32],
    dg: &mut [f32],
    map: ChunkMap,
    num_rows: usize,
    tasks: usize,
    #[comptime] spec: StageSpec,
    #[define(E, G)] _dtypes: [ElemType; 2],
) {
    let dims = comptime!(spec.dims);
    let chunk_len = comptime!(spec.blueprint.chunk);
    let blocks = comptime!(spec.blueprint.blocks());
    let cols = comptime!(spec.blueprint.cols);
    let units = comptime!(spec.blueprint.units());
    let is_key = comptime!(spec.role == Role::Key);
    let by_channel = comptime!(dims.gate == GateKind::Vector);
    let by_row = comptime!(dims.gate.by_row());

    let task = CUBE_POS;
    if task >= tasks {
        terminate!();
    }
    let part = Part::of(&map, task, comptime!(dims.key_dim), spec);
    let unit = UNIT_POS as usize;
    let (block, col) = (unit / cols, unit % cols);
    let column = Column::of(&part, block, col, dims);
    let (rows, head) = (part.rows, part.head);

    // partner[row, col]: the other end of the pairs, scaled to the edge of its sub-chunk
    let mut partner = Shared::<[f32]>::new_slice(comptime!(chunk_len * cols));
    let mut pairs = Shared::<[f32]>::new_aligned_slice(comptime!(PITCH * chunk_len), TILE_ALIGN);
    let mut totals = Shared::<[f32]>::new_slice(comptime!(blocks * cols));
    let mut sums = Shared::<[f32]>::new_slice(comptime!(blocks * cols));
    let mut cuts = Shared::<[f32]>::new_slice(comptime!(blocks * blocks * cols));

    // own rows of q, k and decay; out of bounds they are 0, 0 and 1
    let qr = column.read::<E>(q, dims.heads);
    let kr = if is_key { zeros(SUB) } else { column.read::<E>(k, dims.kv_heads) };
    let mut wr = zeros(SUB);
    if by_channel {
        wr = column.decays::<G>(gate);
    }
    let mut scaled = zeros(SUB);
    #[unroll]
    for r in 0..SUB {
        scaled[r] = if is_key { qr[r] } else { kr[r] };
    }
    if by_channel {
        totals[block * cols + col] = scale_to_edge(&mut scaled, &wr, comptime!(!is_key));
    }
    #[unroll]
    for r in 0..SUB {
        partner[(block * SUB + r) * cols + col] = scaled[r];
    }

    // pairs between sub-chunks, nearest last: decay every step towards the own sub-chunk. Without decays of channels
    // that is like the others: `dA` is zero where a row does not reach.
    let steps = comptime!(if by_channel { blocks - 1 } else { blocks });
    let own_pairs = block * comptime!(SUB * PITCH);
    let mut acc = zeros(SUB);
    let size = C::value();
    let each = comptime!(chunk_len * SUB / units / size);
    let mut pairs_own = Array::<Vector<f32, C>>::new(each);
    let mut diagonal_own = Array::<Vector<f32, C>>::new(each);
    let first = step_chunk(0, blocks, 0, is_key);
    pairs_tile(&rows, head, first, is_key, chunk_len, dims, units).fetch(da, &mut pairs_own);
    let diagonal = pairs_tile(&rows, head, 0, false, chunk_len, dims, units);
    if by_channel {
        diagonal.fetch_diagonal(da, &mut diagonal_own);
    }
    for step in 0..steps {
        let other = step_chunk(0, blocks, step, is_key);
        let tile = pairs_tile(&rows, head, other, is_key, chunk_len, dims, units);
        tile.put(&pairs_own, &mut pairs, comptime!(Layout::left(is_key)));
        sync_cube();
        // the last fetch is of no use
        let next = select(step + 1 == blocks, step, step + 1);
        let next = step_chunk(0, blocks, next, is_key);
        pairs_tile(&rows, head, next, is_key, chunk_len, dims, units).fetch(da, &mut pairs_own);
        let past = if is_key { other > block } else { other < block };
        let reaches = if by_channel { past } else { past || other == block };
        if reaches {
            if by_channel {
                if !is_key {
                    // all pairs from the own sub-chunk back across the start of `other`
                    let mut cut = f32::new(0.0);
                    #[unroll]
                    for walk in 0..SUB {
                        let r = comptime!(SUB - 1 - walk);
                        cut = (cut + qr[r] * acc[r]) * wr[r];
                    }
                    cut *= decay_between(&totals, other, block, col, cols);
                    cuts[(block * blocks + other) * cols + col] = cut;
                }
                scale_all(&mut acc, totals[other * cols + col], SUB);
            }
            contract(
                &mut acc,
                &pairs,
                own_pairs,
                &partner,
                other * comptime!(SUB * cols) + col,
                cols,
            );
        }
        sync_cube();
    }

    // decay to the own rows
    if by_channel {
        scale_to_edge(&mut acc, &wr, is_key);
    }

    // pairs inside the own sub-chunk
    let mut near = zeros(SUB);
    let mut straddle = zeros(SUB);
    if by_channel {
        if is_key {
            diagonal.put(&diagonal_own, &mut pairs, comptime!(Layout::rows(PITCH)));
            sync_cube();
            pairs_of_keys(&pairs, own_pairs, &qr, &wr, &mut near);
        } else {
            diagonal.put(&diagonal_own, &mut pairs, comptime!(Layout::left(false)));
            sync_cube();
            pairs_of_queries(&pairs, own_pairs, &qr, &kr, &wr, &mut near, &mut straddle);
        }
    }

    // the unit's shares: through the state, from other sub-chunks, from its own. All are read before any is
    // written, or each would wait for the one before.
    let from_state = column.read::<f32>(&*dx, dims.heads);
    let ends = if is_key { column.read::<E>(k, dims.kv_heads) } else { qr };
    // `own[r]`: what row r adds to dg of the rows on its far side
    let mut own = Array::<f32>::new(SUB);
    let mut state_sum = f32::new(0.0);
    #[unroll]
    for r in 0..SUB {
        let through = from_state[r] + acc[r];
        if column.has(r) {
            dx[column.at(r, dims.heads)] = through + near[r];
        }
        if by_row {
            partner[(block * SUB + r) * cols + col] = ends[r] * from_state[r];
        } else {
            own[r] = ends[r] * through;
            state_sum += ends[r] * from_state[r];
        }
    }

    if by_row {
        let sum = sum_rows(&partner, &mut sums, unit, chunk_len, cols);
        if unit < rows.len {
            let tile = part.col0 / cols;
            dg[(tile * num_rows + rows.start + unit) * dims.heads + head] = sum;
        }
    }

    if by_channel {
        sums[block * cols + col] = state_sum;
        let shares = column.read::<f32>(&*dg, dims.heads);
        sync_cube();
        let mut running = f32::new(0.0);
        if is_key {
            for earlier in 0..block {
                running += sums[earlier * cols + col];
            }
        } else {
            for later in block + 1..blocks {
                running += sums[later * cols + col] + cuts[(later * blocks + block) * cols + col];
            }
        }
        #[unroll]
        for walk in 0..SUB {
            let r = comptime!(if is_key { walk } else { SUB - 1 - walk });
            if !is_key {
                running += own[r];
            }
            if column.has(r) {
                dg[column.at(r, dims.heads)] = shares[r] + running + straddle[r];
            }
            if is_key {
                running += own[r];
            }
        }
    }
}

/// `near[s] = sum_{t >= s} dA[t, s] q_t w[t, s]` inside one sub-chunk; `pairs[t * PITCH + s]`.
///
/// As sums that decay from row to row: a multiplication by a decay and a multiply-add a pair. (Loops over all 256
/// pairs, with what is above the diagonal masked, are less code to compile and five times the instructions.)
#[cube]
fn pairs_of_keys(
    pairs: &[f32],
    at: usize,
    q: &Array<f32>,
    decays: &Array<f32>,
    near: &mut Array<f32>,
) {
    #[unroll]
    for walk in 0..SUB {
        let t = comptime!(SUB - 1 - walk);
        #[unroll]
        for s in 0..comptime!(t + 1) {
            if comptime!(walk > 0) {
                near[s] *= decays[t + 1];
            }
            near[s] += pairs[at + t * PITCH + s] * q[t];
        }
    }
}

/// `near[t] = sum_{s <= t} dA[t, s] k_s w[t, s]` inside one sub-chunk, and the share of these pairs
/// in the gate's gradient: `straddle[m] = sum_{s < m <= t} q_t dA[t, s] k_s w[t, s]`; `pairs[s * PITCH + t]`.
///
/// Row by row, `near[t]` holds what earlier rows send `t`, decayed to the row before `m`: what it misses of
/// `straddle[m]` is the decay from there to `t`, by which the sum over `t` runs down.
#[cube]
fn pairs_of_queries(
    pairs: &[f32],
    at: usize,
    q: &Array<f32>,
    k: &Array<f32>,
    decays: &Array<f32>,
    near: &mut Array<f32>,
    straddle: &mut Array<f32>,
) {
    #[unroll]
    for m in 0..SUB {
        if comptime!(m > 0) {
            let mut sum = f32::new(0.0);
            #[unroll]
            for walk in 0..comptime!(SUB - m) {
                let t = comptime!(SUB - 1 - walk);
                if comptime!(walk > 0) {
                    sum *= decays[t + 1];
                }
                sum += q[t] * near[t];
            }
            straddle[m] = sum * decays[m];
        }
        #[unroll]
        for t in m..SUB {
            if comptime!(m > 0) {
                near[t] *= decays[m];
            }
            near[t] += pairs[at + m * PITCH + t] * k[m];
        }
    }
}

/// The sum of the row of `tile [chunk, cols]` that is the unit's number; `partial [units]` is overwritten.
#[cube]
fn sum_rows(
    tile: &[f32],
    partial: &mut [f32],
    unit: usize,
    #[comptime] chunk_len: usize,
    #[comptime] cols: usize,
) -> f32 {
    sync_cube();
    // each unit sums 16 columns, neighbouring rows from different ones on
    let (row, group) = (unit % chunk_len, unit / chunk_len);
    let mut sum = f32::new(0.0);
    for n in 0..SUB {
        sum += tile[row * cols + group * SUB + (n + row) % SUB];
    }
    partial[unit] = sum;
    sync_cube();
    let mut sum = f32::new(0.0);
    if unit < chunk_len {
        for group in 0..comptime!(cols / SUB) {
            sum += partial[group * chunk_len + unit];
        }
    }
    sum
}
