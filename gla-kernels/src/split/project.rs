//! Stage `project`: the share of `dq` and `dk` that comes through the state.
//!
//! `Role::Query`: `dq_t = scale W[t, 0] * (S do_t)`.
//! `Role::Key`: `dk_s = W[L, s] * (E v_s)`, and the start of the gate's gradient,
//! `dg_t = W[L, 0] * sum_j S[., j] E[., j]` in every row of the chunk; of a gate that decays channels alike
//! `sum S E` over all of the cube, without the decay.
//!
//! A cube owns all rows of one chunk and `cols` key channels of one head; a unit owns a patch
//! of them.

use cubecl::prelude::*;

use super::StageSpec;
use super::place::Part;
use crate::SUB;
use crate::components::{
    ChunkMap, Layout, PATCH, PATCH_COLS, PATCH_ROWS, PITCH, Patch, Role, TILE_ALIGN, Tile,
    decay_between, decay_or_one, scale_all, zeros,
};

/// * `y`: `do [rows, H, V]` (Query) or `v [rows, Hk, V]` (Key)
/// * `states`: the state at the start of each chunk (Query) or its gradient at the end (Key)
/// * `others`: the state at the start of each chunk; read by Key with a gate
/// * `dx`: out, `[rows, H, K]` f32; `dg`: out, written by Key with a gate: `[rows, H, K]`, or a number a task
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(crate) fn gla_project_kernel<E: Float, G: Float, S: Float, K: Size, V: Size, D: Size>(
    y: &[Vector<E, V>],
    gate: &[G],
    states: &[Vector<S, V>],
    others: &[Vector<S, V>],
    dx: &mut [Vector<f32, K>],
    dg: &mut [Vector<f32, D>],
    map: ChunkMap,
    tasks: usize,
    scale: f32,
    #[comptime] spec: StageSpec,
    #[define(E, G, S)] _dtypes: [ElemType; 3],
) {
    let dims = comptime!(spec.dims);
    let key_dim = comptime!(dims.key_dim);
    let value_dim = comptime!(dims.value_dim);
    let chunk_len = comptime!(spec.blueprint.chunk);
    let groups = comptime!(chunk_len / PATCH_ROWS);
    let cols = comptime!(spec.blueprint.cols);
    let units = comptime!(spec.blueprint.patch_units());
    let is_key = comptime!(spec.role == Role::Key);
    let gated = comptime!(dims.gate.is_some());
    let by_row = comptime!(dims.gate.by_row());
    let own_heads = comptime!(spec.role.heads(dims));
    let from_y = comptime!(spec.source(own_heads, value_dim, chunk_len, SUB));
    let from_states = comptime!(spec.source(1, value_dim, cols, SUB));

    let task = CUBE_POS;
    if task >= tasks {
        terminate!();
    }
    let part = Part::of(&map, task, key_dim, spec);
    let (chunk, rows, head, i0) = (part.chunk, part.rows, part.head, part.col0);

    let unit = UNIT_POS as usize;
    let patch = Patch::of(unit, cols);
    let group = patch.row / PATCH_ROWS;

    let overlaps = comptime!(is_key && gated);
    let mut ys = Shared::<[f32]>::new_aligned_slice(comptime!(PITCH * chunk_len), TILE_ALIGN);
    // four more, for tiles are put down by columns
    let width = comptime!(cols + 4);
    let mut tile = Shared::<[f32]>::new_aligned_slice(comptime!(SUB * width), TILE_ALIGN);
    let mut other = Shared::<[f32]>::new_slice(comptime!(if overlaps { SUB * width } else { 1 }));
    let mut totals = Shared::<[f32]>::new_slice(comptime!(groups * cols));
    let mut through = Shared::<[f32]>::new_slice(cols);

    let mut acc = zeros(PATCH);
    if overlaps {
        for col in range_stepped(unit, cols, units) {
            through[col] = 0.0;
        }
    }
    let value_size = V::value();
    let mut y_own = Array::<Vector<E, V>>::new(comptime!(from_y.each() / value_size));
    let each = comptime!(from_states.each() / value_size);
    let mut state_own = Array::<Vector<S, V>>::new(each);
    let mut other_own = Array::<Vector<S, V>>::new(each);
    let mut y_tile = Tile::at(rows.start, 0usize, rows.len, head, 0usize, from_y);
    let state_row = (chunk * dims.heads + head) * key_dim;
    // a tensor of states is one of rows of V, of one head
    let mut state_tile = Tile::at(state_row, i0, key_dim, 0usize, 0usize, from_states);
    y_tile.fetch(y, &mut y_own);
    state_tile.fetch(states, &mut state_own);
    if overlaps {
        state_tile.fetch(others, &mut other_own);
    }
    for _ in 0..comptime!(value_dim.div_ceil(SUB)) {
        y_tile.put(&y_own, &mut ys, comptime!(Layout::left(false)));
        state_tile.put(&state_own, &mut tile, comptime!(Layout::columns(width)));
        if overlaps {
            state_tile.put(&other_own, &mut other, comptime!(Layout::columns(width)));
        }
        sync_cube();
        y_tile.right(SUB);
        state_tile.right(SUB);
        y_tile.fetch(y, &mut y_own);
        state_tile.fetch(states, &mut state_own);
        if overlaps {
            state_tile.fetch(others, &mut other_own);
        }
        patch.contract(&mut acc, &ys, &tile, width);
        if overlaps {
            // of the same unit throughout
            for col in range_stepped(unit, cols, units) {
                let mut overlap = f32::new(0.0);
                for d in 0..SUB {
                    overlap += other[d * width + col] * tile[d * width + col];
                }
                through[col] += overlap;
            }
        }
        sync_cube();
    }

    if gated {
        // the decay between each of the unit's rows and the edge of the patch, then of the chunk
        #[unroll]
        for c in 0..PATCH_COLS {
            let (col, i) = (patch.col + c, i0 + patch.col + c);
            let mut w = f32::new(1.0);
            #[unroll]
            for walk in 0..PATCH_ROWS {
                let r = if is_key { comptime!(PATCH_ROWS - 1 - walk) } else { walk };
                let row = patch.row + r;
                let valid = row < rows.len && i < key_dim;
                let factor = decay_or_one::<G>(gate, rows.start + row, head, i, valid, dims);
                if is_key {
                    acc[r * PATCH_COLS + c] *= w;
                    w *= factor;
                } else {
                    w *= factor;
                    acc[r * PATCH_COLS + c] *= w;
                }
            }
            totals[group * cols + col] = w;
        }
        sync_cube();
        #[unroll]
        for c in 0..PATCH_COLS {
            let col = patch.col + c;
            let outside = if is_key {
                decay_between(&totals, group + 1, groups, col, cols)
            } else {
                decay_between(&totals, 0, group, col, cols)
            };
            #[unroll]
            for r in 0..PATCH_ROWS {
                acc[r * PATCH_COLS + c] *= outside;
            }
        }
        if is_key && !by_row {
            for col in range_stepped(unit, cols, units) {
                through[col] *= decay_between(&totals, 0, groups, col, cols);
            }
            sync_cube();
        }
    }

    if !is_key {
        scale_all(&mut acc, scale, PATCH);
    }
    let at = (rows.start * dims.heads + head) * key_dim + i0;
    let stride = comptime!(dims.heads * key_dim);
    patch.store(&acc, dx, at, rows.len, key_dim - i0, stride);
    if overlaps && by_row {
        // the other units' sums lie before the barrier of the last tile
        if unit == 0 {
            let mut sum = f32::new(0.0);
            #[unroll]
            for col in 0..cols {
                sum += through[col];
            }
            dg[task] = Vector::new(sum);
        }
    } else if overlaps {
        // equal for all rows
        #[unroll]
        for at in 0..PATCH {
            acc[at] = through[patch.col + at % PATCH_COLS];
        }
        patch.store(&acc, dg, at, rows.len, key_dim - i0, stride);
    }
}
