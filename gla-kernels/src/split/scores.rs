//! Stage `scores`: the intra-chunk matrix.
//!
//! `A[t, s] = scale * sum_i q_t[i] k_s[i] exp(g_{s+1}[i] + .. + g_t[i])` for `s <= t` in one chunk,
//! zero above the diagonal. Without a gate and with `q = do`, `k = v` it is the gradient `dA`; where all channels have
//! one decay, it goes into `dA` too, and what the pairs of the chunk have in the gate's gradient is summed here:
//! `dg_t = sum of A[r, s] do_r . v_s over s < t <= r`.
//!
//! A cube owns one chunk of one head; a unit owns 16 rows of one column. Where channels differ in their decay, it is
//! factored between sub-chunks into the query's from its sub-chunk's start, the key's to its sub-chunk's end, and the
//! totals between; on the diagonal it is a running product down the column, of which each unit of the column takes a
//! share of the channels. Where they do not (a scalar or fixed gate), it is one factor for a product without.

use cubecl::prelude::*;

use super::StageSpec;
use crate::components::{
    ChunkMap, ChunkRows, Layout, PITCH, Source, TILE_ALIGN, Tile, decay_or_one, left_at,
    read_or_zero, zeros,
};
use crate::{GateKind, SUB};

/// * `q`: `[rows, H, width]`, `k`: `[rows, Hk, width]`
/// * `a`: out, `[rows, H, chunk]`; in as well, `A`, if it `straddles`
/// * `dg`: out, `[rows, H]`, if it `straddles`
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(crate) fn gla_scores_kernel<E: Float, G: Float, W: Size>(
    q: &[Vector<E, W>],
    k: &[Vector<E, W>],
    gate: &[G],
    a: &mut [f32],
    dg: &mut [f32],
    map: ChunkMap,
    tasks: usize,
    scale: f32,
    #[comptime] spec: StageSpec,
    #[comptime] width: usize,
    #[comptime] has_decay: bool,
    #[comptime] straddles: bool,
    #[define(E, G)] _dtypes: [ElemType; 2],
) {
    let dims = comptime!(spec.dims);
    let chunk_len = comptime!(spec.blueprint.chunk);
    let blocks = comptime!(spec.blueprint.blocks());
    let units = comptime!(blocks * chunk_len);
    let from_q =
        comptime!(Source { dims, own_heads: dims.heads, width, rows: chunk_len, cols: SUB, units });
    let from_k = comptime!(Source { own_heads: dims.kv_heads, ..from_q });
    let by_channel = comptime!(has_decay && dims.gate == GateKind::Vector);
    let by_row = comptime!(has_decay && dims.gate.by_row());

    let task = CUBE_POS;
    if task >= tasks {
        terminate!();
    }
    let head = task % dims.heads;
    let rows = map.rows_of(task / dims.heads);

    let unit = UNIT_POS as usize;
    let s = unit % chunk_len;
    let block_s = s / SUB;
    let block_t = unit / chunk_len;

    let mut qs = Shared::<[f32]>::new_aligned_slice(comptime!(PITCH * chunk_len), TILE_ALIGN);
    let mut ks = Shared::<[f32]>::new_aligned_slice(comptime!(PITCH * chunk_len), TILE_ALIGN);
    // of a tile's channels, or of the rows
    let mut decays = Shared::<[f32]>::new_aligned_slice(comptime!(PITCH * chunk_len), TILE_ALIGN);
    let mut totals = Shared::<[f32]>::new_slice(comptime!(SUB * blocks));
    if by_row {
        // there are at least as many units as rows
        if unit < chunk_len {
            let valid = unit < rows.len;
            decays[unit] = decay_or_one::<G>(gate, rows.start + unit, head, 0usize, valid, dims);
        }
    }

    let size = W::value();
    let mut q_own = Array::<Vector<E, W>>::new(comptime!(from_q.each() / size));
    let mut k_own = Array::<Vector<E, W>>::new(comptime!(from_k.each() / size));
    let mut q_tile = Tile::at(rows.start, 0usize, rows.len, head, 0usize, from_q);
    let mut k_tile = Tile::at(rows.start, 0usize, rows.len, head, 0usize, from_k);
    q_tile.fetch(q, &mut q_own);
    k_tile.fetch(k, &mut k_own);

    let mut acc = zeros(SUB);
    // channels of a tile for each of the units that share a column
    let shares = comptime!(SUB / blocks);
    let mut near = zeros(SUB);
    for step in 0..comptime!(width.div_ceil(SUB)) {
        q_tile.put(&q_own, &mut qs, comptime!(Layout::left(false)));
        k_tile.put(&k_own, &mut ks, comptime!(Layout::left(false)));
        if by_channel {
            load_decays::<G>(gate, &mut decays, &rows, head, step * SUB, from_k);
        }
        sync_cube();
        q_tile.right(SUB);
        k_tile.right(SUB);
        q_tile.fetch(q, &mut q_own);
        k_tile.fetch(k, &mut k_own);

        if by_channel {
            // of the column's own sub-chunk a share of the channels
            for n in 0..shares {
                let i = block_t * shares + n;
                let at = (block_s * SUB + i) * PITCH;
                let key = ks[at + s % SUB];
                let mut w = f32::new(0.0);
                #[unroll]
                for r in 0..SUB {
                    w = select(s % SUB == r, key, w * decays[at + r]);
                    near[r] += qs[at + r] * w;
                }
            }
            sync_cube();
            let columns = comptime!(SUB * blocks);
            scale_to_edges(&mut qs, &mut ks, &decays, &mut totals, columns, units);
            sync_cube();
        }

        if block_s < block_t || (!by_channel && block_s == block_t) {
            for i in 0..SUB {
                let mut key = ks[(block_s * SUB + i) * PITCH + s % SUB];
                if by_channel {
                    // of the sub-chunks between the two
                    #[unroll]
                    for m in 1..comptime!(blocks.max(2) - 1) {
                        let between = block_s < m && m < block_t;
                        key *= select(between, totals[m * SUB + i], f32::new(1.0));
                    }
                }
                let at = (block_t * SUB + i) * PITCH;
                #[unroll]
                for r in 0..SUB {
                    acc[r] += qs[at + r] * key;
                }
            }
        }
        sync_cube();
    }

    if by_channel {
        // the shares of one after the other; the tile of queries has done its service
        for share in 0..blocks {
            if share == block_t {
                #[unroll]
                for r in 0..SUB {
                    let at = r * chunk_len + s;
                    qs[at] = select(share == 0, near[r], qs[at] + near[r]);
                }
            }
            sync_cube();
        }
        if block_t == block_s {
            #[unroll]
            for r in 0..SUB {
                acc[r] = qs[r * chunk_len + s];
            }
        }
    }

    if straddles {
        // of each pair; `A` is zero above the diagonal
        let mut terms = zeros(SUB);
        #[unroll]
        for r in 0..SUB {
            let t = block_t * SUB + r;
            let at = ((rows.start + t) * dims.heads + head) * chunk_len + s;
            terms[r] = acc[r] * read_or_zero::<f32>(&*a, at, t < rows.len);
        }
        straddling(&mut terms, &mut decays, unit, chunk_len);
        let sum = sum_columns(&terms, &mut qs, &mut ks, unit, chunk_len);
        if unit < rows.len {
            dg[(rows.start + unit) * dims.heads + head] = sum;
        }
    }

    if by_row {
        let mut w = f32::new(1.0);
        for row in s + 1..block_t * SUB {
            w *= decays[row];
        }
        #[unroll]
        for r in 0..SUB {
            let t = block_t * SUB + r;
            w *= select(t > s, decays[t], f32::new(1.0));
            acc[r] *= w;
        }
    }

    #[unroll]
    for r in 0..SUB {
        let t = block_t * SUB + r;
        if t < rows.len {
            let value = select(s <= t, acc[r] * scale, f32::new(0.0));
            a[((rows.start + t) * dims.heads + head) * chunk_len + s] = value;
        }
    }
}

/// The decay factors of a tile of keys `[chunk, 16]`, as [`Layout::left`] puts it down; one where the tile is zero.
#[cube]
fn load_decays<G: Float>(
    gate: &[G],
    out: &mut [f32],
    rows: &ChunkRows,
    head: usize,
    col0: usize,
    #[comptime] from: Source,
) {
    #[unroll]
    for n in 0..comptime!(from.each()) {
        let at = UNIT_POS as usize + comptime!(n * from.units);
        let (row, c) = (at / SUB, at % SUB);
        let valid = row < rows.len && col0 + c < comptime!(from.width);
        out[left_at(row, c)] =
            decay_or_one::<G>(gate, rows.start + row, head, col0 + c, valid, from.dims);
    }
}

/// Multiplies the 16 rows of each (sub-chunk, channel) column of queries and keys by the decay between the
/// row and the edge of its sub-chunk, and stores the decay of the whole sub-chunk.
///
/// For queries the edge is the start (own gate included), for keys the end (own gate excluded).
/// Tiles are laid out as [`Layout::left`] does; `totals[block * 16 + c]`.
#[cube]
fn scale_to_edges(
    q: &mut [f32],
    k: &mut [f32],
    decays: &[f32],
    totals: &mut [f32],
    #[comptime] columns: usize,
    #[comptime] units: usize,
) {
    for at in range_stepped(UNIT_POS as usize, comptime!(2 * columns), units) {
        let column = at % columns;
        let first = column * PITCH;
        let mut w = f32::new(1.0);
        if at < columns {
            #[unroll]
            for r in 0..SUB {
                w *= decays[first + r];
                q[first + r] *= w;
            }
            totals[column] = w;
        } else {
            #[unroll]
            for walk in 0..SUB {
                let r = comptime!(SUB - 1 - walk);
                k[first + r] *= w;
                w *= decays[first + r];
            }
        }
    }
}

/// Of the terms `P[r, s]` of a unit's 16 rows and column, what its column adds to each of these rows `t`:
/// `sum over r >= t of P[r, s]` where `s < t`, of the whole chunk. Sums only what has the decay of row `t`.
///
/// * `shared`: behind its first row, `[blocks, chunk]` numbers are overwritten.
#[cube]
fn straddling(
    terms: &mut Array<f32>,
    shared: &mut [f32],
    unit: usize,
    #[comptime] chunk_len: usize,
) {
    let blocks = comptime!(chunk_len / SUB);
    let (block, s) = (unit / chunk_len, unit % chunk_len);
    let mut sum = f32::new(0.0);
    #[unroll]
    for r in 0..SUB {
        sum += terms[r];
    }
    shared[chunk_len + unit] = sum;
    sync_cube();
    let mut running = f32::new(0.0);
    for later in block + 1..blocks {
        running += shared[chunk_len + later * chunk_len + s];
    }
    #[unroll]
    for walk in 0..SUB {
        let r = comptime!(SUB - 1 - walk);
        running += terms[r];
        terms[r] = select(s < block * SUB + r, running, f32::new(0.0));
    }
}

/// The sum over all columns of the row of the chunk that is the unit's number, of 16 rows of a column a unit.
///
/// * `tile`: overwritten, `[chunk, PITCH]`; `partial`: overwritten, `[blocks, blocks^2, 16]`
#[cube]
fn sum_columns(
    own: &Array<f32>,
    tile: &mut [f32],
    partial: &mut [f32],
    unit: usize,
    #[comptime] chunk_len: usize,
) -> f32 {
    let blocks = comptime!(chunk_len / SUB);
    // each sums some columns of one row
    let groups = comptime!(blocks * blocks);
    let each = comptime!(chunk_len / groups);
    let (block, s) = (unit / chunk_len, unit % chunk_len);
    let (group, row) = (unit / SUB, unit % SUB);
    for turn in 0..blocks {
        if block == turn {
            #[unroll]
            for r in 0..SUB {
                tile[s * PITCH + r] = own[r];
            }
        }
        sync_cube();
        let mut sum = f32::new(0.0);
        #[unroll]
        for n in 0..each {
            sum += tile[(group * each + n) * PITCH + row];
        }
        partial[(turn * groups + group) * SUB + row] = sum;
        sync_cube();
    }
    let mut sum = f32::new(0.0);
    if unit < chunk_len {
        for group in 0..groups {
            sum += partial[(unit / SUB * groups + group) * SUB + row];
        }
    }
    sum
}
