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
    ChunkMap, Layout, PATCH, PITCH, Patch, Role, TILE_ALIGN, Tile, scale_all, zeros,
};

/// * `x`: `k` (Key) or `q` (Query), with a gate as `prepare` leaves them: `[rows, spec.x_heads(), K]`
/// * `y`: `v [rows, Hk, V]` (Key) or `do [rows, H, V]` (Query)
/// * `added`: out, `[chunks, H, K, V]`
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(crate) fn gla_chunk_state_kernel<X: Float, Y: Float, S: Float, K: Size, V: Size>(
    x: &[Vector<X, K>],
    y: &[Vector<Y, V>],
    added: &mut [Vector<S, V>],
    map: ChunkMap,
    tasks: usize,
    scale: f32,
    #[comptime] spec: StageSpec,
    #[define(X, Y, S)] _dtypes: [ElemType; 3],
) {
    let dims = comptime!(spec.dims);
    let key_dim = comptime!(dims.key_dim);
    let value_dim = comptime!(dims.value_dim);
    let channels = comptime!(spec.blueprint.chunk);
    let cols = comptime!(spec.blueprint.cols);
    let (x_heads, y_heads) = comptime!((spec.x_heads(), spec.role.heads(dims)));
    let from_x = comptime!(spec.source(x_heads, key_dim, SUB, channels));
    let from_y = comptime!(spec.source(y_heads, value_dim, SUB, cols));
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

    let (key_size, size) = (K::value(), V::value());
    let mut x_own = Array::<Vector<X, K>>::new(comptime!(from_x.each() / key_size));
    let mut y_own = Array::<Vector<Y, V>>::new(comptime!(from_y.each() / size));
    let mut x_tile = Tile::at(rows.start, 0usize, rows.len, head, channel0, from_x);
    let mut y_tile = Tile::at(rows.start, 0usize, rows.len, head, j0, from_y);
    x_tile.fetch(x, &mut x_own);
    y_tile.fetch(y, &mut y_own);

    let mut acc = zeros(PATCH);
    for _ in 0..rows.len.div_ceil(SUB) {
        // the left operand is x^T: its depth is the rows
        x_tile.put(&x_own, &mut xs, comptime!(Layout::left(true)));
        y_tile.put(&y_own, &mut ys, comptime!(Layout::rows(cols)));
        sync_cube();
        x_tile.down(SUB);
        y_tile.down(SUB);
        x_tile.fetch(x, &mut x_own);
        y_tile.fetch(y, &mut y_own);
        patch.contract(&mut acc, &xs, &ys, cols);
        sync_cube();
    }

    if comptime!(spec.role == Role::Query) {
        scale_all(&mut acc, scale, PATCH);
    }
    let at = ((chunk * dims.heads + head) * key_dim + channel0) * value_dim + j0;
    patch.store(&acc, added, at, key_dim - channel0, value_dim - j0, value_dim);
}
