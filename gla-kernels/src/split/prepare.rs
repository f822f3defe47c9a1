//! Stage `prepare`: rows times their decay to the edge of the chunk that the state is met at,
//! `q_t * W[t, 0]` and `k_s * W[L, s]`, and the decay of the chunk. Without a gate there is nothing to prepare.
//!
//! A cube owns all rows of one chunk and `cols` key channels of one head; a unit owns 16 rows of one channel.

use cubecl::prelude::*;

use super::StageSpec;
use crate::SUB;
use crate::components::{ChunkMap, decay_between, decay_or_one, read_or_zero, row_offset};

/// * `q`: `[rows, H, K]`, `k`: `[rows, Hk, K]`
/// * `q_out`: out, `[rows, H, K]`; `k_out`: out, `[rows, spec.x_heads(), K]`
/// * `decays`: out, `[chunks, H, K]`
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(crate) fn gla_split_prepare_kernel<E: Float, G: Float>(
    q: &[E],
    k: &[E],
    gate: &[G],
    q_out: &mut [f32],
    k_out: &mut [f32],
    decays: &mut [f32],
    map: ChunkMap,
    tasks: usize,
    #[comptime] spec: StageSpec,
    #[define(E, G)] _dtypes: [ElemType; 2],
) {
    let dims = comptime!(spec.dims);
    let key_dim = comptime!(dims.key_dim);
    let blocks = comptime!(spec.blueprint.blocks());
    let cols = comptime!(spec.blueprint.cols);
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
    let (block, col) = (unit / cols, unit % cols);
    let i = tile_k * cols + col;
    let row0 = rows.start + block * SUB;

    let mut totals = Shared::<[f32]>::new_slice(comptime!(blocks * cols));

    let mut qr = Array::<f32>::new(SUB);
    let mut kr = Array::<f32>::new(SUB);
    let mut wr = Array::<f32>::new(SUB);
    #[unroll]
    for r in 0..SUB {
        let valid = block * SUB + r < rows.len && i < key_dim;
        let q_at = row_offset(row0 + r, head, dims, dims.heads, key_dim) + i;
        let k_at = row_offset(row0 + r, head, dims, dims.kv_heads, key_dim) + i;
        qr[r] = read_or_zero::<E>(q, q_at, valid);
        kr[r] = read_or_zero::<E>(k, k_at, valid);
        wr[r] = decay_or_one::<G>(gate, row0 + r, head, i, valid, dims);
    }

    // to the edges of the sub-chunk, then of the chunk
    let mut w = f32::new(1.0);
    #[unroll]
    for r in 0..SUB {
        w *= wr[r];
        qr[r] *= w;
    }
    totals[block * cols + col] = w;
    w = f32::new(1.0);
    #[unroll]
    for walk in 0..SUB {
        let r = comptime!(SUB - 1 - walk);
        kr[r] *= w;
        w *= wr[r];
    }
    sync_cube();
    let before = decay_between(&totals, 0, block, col, cols);
    let after = decay_between(&totals, block + 1, blocks, col, cols);

    #[unroll]
    for r in 0..SUB {
        if block * SUB + r < rows.len && i < key_dim {
            let at = ((row0 + r) * dims.heads + head) * key_dim + i;
            q_out[at] = qr[r] * before;
        }
    }
    // the first query head of those that read the same
    let group = comptime!(dims.heads / spec.x_heads());
    let k_head = head / group;
    if k_head * group == head {
        #[unroll]
        for r in 0..SUB {
            if block * SUB + r < rows.len && i < key_dim {
                let at = ((row0 + r) * spec.x_heads() + k_head) * key_dim + i;
                k_out[at] = kr[r] * after;
            }
        }
    }
    if block == 0 && i < key_dim {
        decays[(chunk * dims.heads + head) * key_dim + i] = w * after;
    }
}
