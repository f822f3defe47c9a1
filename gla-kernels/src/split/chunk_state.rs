//! Stage `chunk_state`: what each chunk adds to a state.
//!
//! `Role::Key`: `sum_s (k_s * W[L, s])^T v_s`, to the state at the chunk's end.
//! `Role::Query`: `scale sum_t (q_t * W[t, 0])^T do_t`, to the state's gradient at the chunk's start.
//!
//! A cube owns a tile `[chunk channels, cols]` of what one chunk adds for one head; a unit owns a patch of it. It
//! steps by sub-chunks of 16 rows.

use cubecl::prelude::*;

use super::StageSpec;
use crate::SUB;
use crate::components::{
    ChunkMap, PATCH, PATCH_COLS, PATCH_ROWS, PITCH, Patch, Role, Source, TILE_ALIGN, load_columns,
    load_rows, zeros,
};

/// * `x`: `k` (Key) or `q` (Query), with a gate as `prepare` leaves them: `[rows, spec.x_heads(), K]`
/// * `y`: `v [rows, Hk, V]` (Key) or `do [rows, H, V]` (Query)
/// * `added`: out, `[chunks, H, K, V]`
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(crate) fn gla_chunk_state_kernel<X: Float, Y: Float>(
    x: &[X],
    y: &[Y],
    added: &mut [f32],
    map: ChunkMap,
    tasks: usize,
    scale: f32,
    #[comptime] spec: StageSpec,
    #[define(X, Y)] _dtypes: [ElemType; 2],
) {
    let dims = comptime!(spec.dims);
    let key_dim = comptime!(dims.key_dim);
    let value_dim = comptime!(dims.value_dim);
    let channels = comptime!(spec.chunk);
    let cols = comptime!(spec.cols);
    let units = comptime!(spec.patch_units());
    let (x_heads, y_heads) = comptime!((spec.x_heads(), spec.role.heads(dims)));
    let from_x = comptime!(Source { dims, own_heads: x_heads, width: key_dim, units });
    let from_y = comptime!(Source { dims, own_heads: y_heads, width: value_dim, units });
    let tiles_v = comptime!(value_dim.div_ceil(cols));
    let tiles_k = comptime!(key_dim.div_ceil(channels));

    let task = CUBE_POS;
    if task >= tasks {
        terminate!();
    }
    let j0 = (task % tiles_v) * cols;
    let channel0 = (task / tiles_v) % tiles_k * channels;
    let head = (task / comptime!(tiles_v * tiles_k)) % dims.heads;
    let chunk = task / comptime!(tiles_v * tiles_k * dims.heads);
    let rows = map.rows_of(chunk);

    let patch = Patch::of(UNIT_POS as usize, cols);
    let mut xs = Shared::<[f32]>::new_aligned_slice(comptime!(PITCH * channels), TILE_ALIGN);
    let mut ys = Shared::<[f32]>::new_aligned_slice(comptime!(SUB * cols), TILE_ALIGN);

    let mut acc = zeros(PATCH);
    for sub in 0..rows.len.div_ceil(SUB) {
        let (row0, len) = (rows.start + sub * SUB, rows.len - sub * SUB);
        // the left operand is x^T: its depth is the rows
        load_columns::<X>(x, &mut xs, row0, len, head, channel0, channels, from_x);
        load_rows::<Y>(y, &mut ys, row0, len, head, j0, cols, from_y);
        sync_cube();
        patch.contract(&mut acc, &xs, &ys, cols, SUB);
        sync_cube();
    }

    let i0 = channel0 + patch.row;
    let at = ((chunk * dims.heads + head) * key_dim + i0) * value_dim;
    #[unroll]
    for r in 0..PATCH_ROWS {
        #[unroll]
        for c in 0..PATCH_COLS {
            let j = j0 + patch.col + c;
            if i0 + r < key_dim && j < value_dim {
                let mut value = acc[r * PATCH_COLS + c];
                if comptime!(spec.role == Role::Query) {
                    value *= scale;
                }
                added[at + r * value_dim + j] = value;
            }
        }
    }
}
