//! Stage `output`: rows from the state and from the chunk itself.
//!
//! `Role::Query`: `o_t = scale * (q_t * W[t, 0])^T S + sum_{s <= t} A[t, s] v_s`.
//! `Role::Key`: `dv_s = (k_s * W[L, s])^T E + sum_{t >= s} A[t, s] do_t`.
//!
//! A cube owns all rows of one chunk and `cols` value columns of one head; a unit owns a patch of them. No
//! atomics: each output element has one owner.

use cubecl::prelude::*;

use super::StageSpec;
use super::place::Part;
use crate::SUB;
use crate::components::{
    ChunkMap, Layout, PATCH, PITCH, Patch, Role, TILE_ALIGN, Tile, pairs_tile, scale_all, zeros,
};

/// * `x`: `q` (Query) or `k` (Key), with a gate as `prepare` leaves them: `[rows, spec.x_heads(), K]`
/// * `y`: `v [rows, Hk, V]` (Query) or `do [rows, H, V]` (Key)
/// * `states`: `[chunks, H, K, V]`, `a`: `[rows, H, chunk]`
/// * `out`: `[rows, H, V]`
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(crate) fn gla_output_kernel<
    X: Float,
    Y: Float,
    S: Float,
    O: Float,
    K: Size,
    V: Size,
    C: Size,
>(
    x: &[Vector<X, K>],
    y: &[Vector<Y, V>],
    states: &[Vector<S, V>],
    a: &[Vector<f32, C>],
    out: &mut [Vector<O, V>],
    map: ChunkMap,
    tasks: usize,
    scale: f32,
    #[comptime] spec: StageSpec,
    #[define(X, Y, S, O)] _dtypes: [ElemType; 4],
) {
    let dims = comptime!(spec.dims);
    let key_dim = comptime!(dims.key_dim);
    let value_dim = comptime!(dims.value_dim);
    let chunk_len = comptime!(spec.blueprint.chunk);
    let blocks = comptime!(spec.blueprint.blocks());
    let cols = comptime!(spec.blueprint.cols);
    let units = comptime!(spec.blueprint.patch_units());
    let is_key = comptime!(spec.role == Role::Key);
    let (x_heads, y_heads) = comptime!((spec.x_heads(), spec.role.other().heads(dims)));
    let from_x = comptime!(spec.source(x_heads, key_dim, chunk_len, SUB));
    let from_states = comptime!(spec.source(1, value_dim, SUB, cols));
    let from_y = comptime!(spec.source(y_heads, value_dim, SUB, cols));

    let task = CUBE_POS;
    if task >= tasks {
        terminate!();
    }
    let part = Part::of(&map, task, value_dim, spec);
    let (chunk, rows, head, j0) = (part.chunk, part.rows, part.head, part.col0);

    let patch = Patch::of(UNIT_POS as usize, cols);
    let block = patch.block();

    let mut xs = Shared::<[f32]>::new_aligned_slice(comptime!(PITCH * chunk_len), TILE_ALIGN);
    let mut ys = Shared::<[f32]>::new_aligned_slice(comptime!(SUB * cols), TILE_ALIGN);

    let (key_size, size, pair_size) = (K::value(), V::value(), C::value());
    let mut x_own = Array::<Vector<X, K>>::new(comptime!(from_x.each() / key_size));
    let mut state_own = Array::<Vector<S, V>>::new(comptime!(from_states.each() / size));
    let mut x_tile = Tile::at(rows.start, 0usize, rows.len, head, 0usize, from_x);
    let state_row = (chunk * dims.heads + head) * key_dim;
    // a tensor of states is one of rows of V, of one head
    let mut state_tile = Tile::at(state_row, 0usize, key_dim, 0usize, j0, from_states);
    x_tile.fetch(x, &mut x_own);
    state_tile.fetch(states, &mut state_own);

    let mut acc = zeros(PATCH);
    for _ in 0..comptime!(key_dim.div_ceil(SUB)) {
        x_tile.put(&x_own, &mut xs, comptime!(Layout::left(false)));
        state_tile.put(&state_own, &mut ys, comptime!(Layout::rows(cols)));
        sync_cube();
        x_tile.right(SUB);
        state_tile.down(SUB);
        x_tile.fetch(x, &mut x_own);
        state_tile.fetch(states, &mut state_own);
        patch.contract(&mut acc, &xs, &ys, cols);
        sync_cube();
    }
    if !is_key {
        scale_all(&mut acc, scale, PATCH);
    }

    let mut pairs_own = Array::<Vector<f32, C>>::new(comptime!(from_x.each() / pair_size));
    let mut y_own = Array::<Vector<Y, V>>::new(comptime!(from_y.each() / size));
    let mut pairs = pairs_tile(&rows, head, 0usize, is_key, chunk_len, dims, units);
    let mut y_tile = Tile::at(rows.start, 0usize, rows.len, head, j0, from_y);
    pairs.fetch(a, &mut pairs_own);
    y_tile.fetch(y, &mut y_own);
    for other in 0..blocks {
        pairs.put(&pairs_own, &mut xs, comptime!(Layout::left(is_key)));
        if is_key {
            pairs.down(SUB);
        } else {
            pairs.right(SUB);
        }
        y_tile.put(&y_own, &mut ys, comptime!(Layout::rows(cols)));
        y_tile.down(SUB);
        sync_cube();
        pairs.fetch(a, &mut pairs_own);
        y_tile.fetch(y, &mut y_own);
        let reaches = if is_key { other >= block } else { other <= block };
        if reaches {
            patch.contract(&mut acc, &xs, &ys, cols);
        }
        sync_cube();
    }

    let at = (rows.start * dims.heads + head) * value_dim + j0;
    let stride = comptime!(dims.heads * value_dim);
    patch.store(&acc, out, at, rows.len, value_dim - j0, stride);
}
