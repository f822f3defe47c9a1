//! Stage `project`: the share of `dq` and `dk` that comes through the state.
//!
//! `Role::Query`: `dq_t[i] = scale * exp(g to t)[i] * sum_j S[i, j] do_t[j]`.
//! `Role::Key`: `dk_s[i] = exp(g after s)[i] * sum_j D[i, j] v_s[j]`, and the start of the gate's
//! gradient, `dg_t[i] = exp(g of the chunk)[i] * sum_j S[i, j] D[i, j]` in every row of the chunk.
//!
//! A cube owns all rows of one chunk and `cols` key channels of one head; a unit owns 16 rows of one
//! channel.

use cubecl::prelude::*;

use super::StageSpec;
use crate::SUB;
use crate::components::{
    ChunkMap, Role, Source, contract, decay_between, decay_or_one, load_chunk, read_or_zero,
    row_of, zero_rows,
};

/// * `y`: `do [rows, H, V]` (Query) or `v [rows, Hk, V]` (Key)
/// * `states`: the state at the start of each chunk (Query) or its gradient at the end (Key)
/// * `others`: the state at the start of each chunk; read by Key with a gate
/// * `dx`: out, `[rows, H, K]` f32; `dg`: out, `[rows, H, K]` f32, written by Key with a gate
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(crate) fn gla_project_kernel<E: Float, G: Float>(
    y: &[E],
    gate: &[G],
    states: &[f32],
    others: &[f32],
    dx: &mut [f32],
    dg: &mut [f32],
    map: ChunkMap,
    tasks: usize,
    scale: f32,
    #[comptime] spec: StageSpec,
    #[define(E, G)] _dtypes: [ElemType; 2],
) {
    let dims = comptime!(spec.dims);
    let key_dim = comptime!(dims.key_dim);
    let value_dim = comptime!(dims.value_dim);
    let chunk_len = comptime!(spec.chunk);
    let blocks = comptime!(spec.blocks());
    let cols = comptime!(spec.cols);
    let units = comptime!(spec.units());
    let is_key = comptime!(spec.role == Role::Key);
    let gated = comptime!(dims.gate.is_some());
    let own_heads = comptime!(if is_key { dims.kv_heads } else { dims.heads });
    let from_y = comptime!(Source { dims, own_heads, width: value_dim, units });
    let tiles_k = comptime!(key_dim.div_ceil(cols));

    let task = CUBE_POS;
    if task >= tasks {
        terminate!();
    }
    let tile_k = task % tiles_k;
    let head = (task / tiles_k) % dims.heads;
    let chunk = task / comptime!(tiles_k * dims.heads);
    let rows = map.rows_of(chunk);

    let unit = UNIT_POS as usize;
    let col = unit % cols;
    let block = unit / cols;
    let i = tile_k * cols + col;

    let mut ys = Shared::<[f32]>::new_slice(comptime!(SUB * chunk_len));
    let mut tile = Shared::<[f32]>::new_slice(comptime!(SUB * cols));
    let mut totals = Shared::<[f32]>::new_slice(comptime!(blocks * cols));
    let mut through = Shared::<[f32]>::new_slice(cols);

    let mut acc = zero_rows();
    let mut overlap = f32::new(0.0);
    let state_at = (chunk * dims.heads + head) * comptime!(key_dim * value_dim);
    for step in 0..comptime!(value_dim.div_ceil(SUB)) {
        let j0 = step * SUB;
        load_chunk::<E>(y, &mut ys, &rows, head, j0, chunk_len, from_y);
        for at in range_stepped(unit, comptime!(SUB * cols), units) {
            // neighbours read neighbouring columns of the state, the tile is its transpose
            let (c, d) = (at / SUB, at % SUB);
            let valid = tile_k * cols + c < key_dim && j0 + d < value_dim;
            let offset = state_at + (tile_k * cols + c) * value_dim + j0 + d;
            tile[d * cols + c] = read_or_zero::<f32>(states, offset, valid);
        }
        sync_cube();
        contract(&mut acc, &ys, block * comptime!(SUB * SUB), &tile, col, cols, SUB);
        if is_key && gated && block == 0 && i < key_dim {
            for d in 0..SUB {
                let offset = state_at + i * value_dim + j0 + d;
                let state = read_or_zero::<f32>(others, offset, j0 + d < value_dim);
                overlap += state * tile[d * cols + col];
            }
        }
        sync_cube();
    }

    if gated {
        // the decay between each of the unit's rows and the edge of its sub-chunk
        let mut w = f32::new(1.0);
        #[unroll]
        for walk in 0..SUB {
            let r = row_of(walk, is_key);
            let row = block * SUB + r;
            let valid = row < rows.len && i < key_dim;
            let factor = decay_or_one::<G>(gate, rows.start + row, head, i, valid, dims);
            if is_key {
                acc[r] *= w;
                w *= factor;
            } else {
                w *= factor;
                acc[r] *= w;
            }
        }
        totals[block * cols + col] = w;
        sync_cube();
        let mut outside = decay_between(&totals, 0, block, col, cols);
        if is_key {
            outside = decay_between(&totals, block + 1, blocks, col, cols);
        }
        #[unroll]
        for r in 0..SUB {
            acc[r] *= outside;
        }
        if is_key {
            if block == 0 {
                through[col] = overlap * decay_between(&totals, 0, blocks, col, cols);
            }
            sync_cube();
        }
    }

    #[unroll]
    for r in 0..SUB {
        let row = block * SUB + r;
        if row < rows.len && i < key_dim {
            let at = ((rows.start + row) * dims.heads + head) * key_dim + i;
            if is_key {
                dx[at] = acc[r];
                if gated {
                    dg[at] = through[col];
                }
            } else {
                dx[at] = acc[r] * scale;
            }
        }
    }
}
