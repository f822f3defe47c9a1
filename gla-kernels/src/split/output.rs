//! Stage `output`: rows from the state and from the chunk itself.
//!
//! `Role::Query`: `o_t = scale * (q_t * W[t, 0])^T S + sum_{s <= t} A[t, s] v_s`.
//! `Role::Key`: `dv_s = (k_s * W[L, s])^T E + sum_{t >= s} A[t, s] do_t`.
//!
//! A cube owns all rows of one chunk and `cols` value columns of one head; a unit owns a patch of them. No
//! atomics: each output element has one owner.

use cubecl::prelude::*;

use super::StageSpec;
use crate::SUB;
use crate::components::{
    ChunkMap, PATCH, PATCH_COLS, PATCH_ROWS, PITCH, Patch, Role, Source, TILE_ALIGN, load_chunk,
    load_pairs, load_rows, read_or_zero, zeros,
};

/// * `x`: `q` (Query) or `k` (Key), with a gate as `prepare` leaves them: `[rows, spec.x_heads(), K]`
/// * `y`: `v [rows, Hk, V]` (Query) or `do [rows, H, V]` (Key)
/// * `states`: `[chunks, H, K, V]`, `a`: `[rows, H, chunk]`
/// * `out`: `[rows, H, V]`
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(crate) fn gla_output_kernel<X: Float, Y: Float, O: Float>(
    x: &[X],
    y: &[Y],
    states: &[f32],
    a: &[f32],
    out: &mut [O],
    map: ChunkMap,
    tasks: usize,
    scale: f32,
    #[comptime] spec: StageSpec,
    #[define(X, Y, O)] _dtypes: [ElemType; 3],
) {
    let dims = comptime!(spec.dims);
    let key_dim = comptime!(dims.key_dim);
    let value_dim = comptime!(dims.value_dim);
    let chunk_len = comptime!(spec.chunk);
    let blocks = comptime!(spec.blocks());
    let cols = comptime!(spec.cols);
    let units = comptime!(spec.patch_units());
    let is_key = comptime!(spec.role == Role::Key);
    let (x_heads, y_heads) = comptime!((spec.x_heads(), spec.role.other().heads(dims)));
    let from_x = comptime!(Source { dims, own_heads: x_heads, width: key_dim, units });
    let from_y = comptime!(Source { dims, own_heads: y_heads, width: value_dim, units });
    let tiles_v = comptime!(value_dim.div_ceil(cols));

    let task = CUBE_POS;
    if task >= tasks {
        terminate!();
    }
    let tile_v = task % tiles_v;
    let head = (task / tiles_v) % dims.heads;
    let chunk = task / comptime!(tiles_v * dims.heads);
    let rows = map.rows_of(chunk);

    let unit = UNIT_POS as usize;
    let patch = Patch::of(unit, cols);
    let block = patch.block();

    let mut xs = Shared::<[f32]>::new_aligned_slice(comptime!(PITCH * chunk_len), TILE_ALIGN);
    let mut ys = Shared::<[f32]>::new_aligned_slice(comptime!(SUB * cols), TILE_ALIGN);

    let mut acc = zeros(PATCH);
    let state_at = (chunk * dims.heads + head) * comptime!(key_dim * value_dim);
    for step in 0..comptime!(key_dim.div_ceil(SUB)) {
        let i0 = step * SUB;
        load_chunk::<X>(x, &mut xs, &rows, head, i0, chunk_len, from_x);
        for at in range_stepped(unit, comptime!(SUB * cols), units) {
            let (i, c) = (i0 + at / cols, tile_v * cols + at % cols);
            let valid = i < key_dim && c < value_dim;
            ys[at] = read_or_zero::<f32>(states, state_at + i * value_dim + c, valid);
        }
        sync_cube();
        patch.contract(&mut acc, &xs, &ys, cols, SUB);
        sync_cube();
    }
    if !is_key {
        #[unroll]
        for at in 0..PATCH {
            acc[at] *= scale;
        }
    }

    for other in 0..blocks {
        load_pairs(a, &mut xs, &rows, head, other, is_key, chunk_len, dims.heads, units);
        let row0 = rows.start + other * SUB;
        let mut len = usize::new(0);
        if other * SUB < rows.len {
            len = rows.len - other * SUB;
        }
        load_rows::<Y>(y, &mut ys, row0, len, head, tile_v * cols, cols, from_y);
        sync_cube();
        let reaches = if is_key { other >= block } else { other <= block };
        if reaches {
            patch.contract(&mut acc, &xs, &ys, cols, SUB);
        }
        sync_cube();
    }

    #[unroll]
    for r in 0..PATCH_ROWS {
        let row = patch.row + r;
        let at = ((rows.start + row) * dims.heads + head) * value_dim;
        #[unroll]
        for c in 0..PATCH_COLS {
            let j = tile_v * cols + patch.col + c;
            if row < rows.len && j < value_dim {
                out[at + j] = O::cast_from(acc[r * PATCH_COLS + c]);
            }
        }
    }
}
