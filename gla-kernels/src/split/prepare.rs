//! Stage `prepare`: rows times their decay to the edge of the chunk that the state is met at,
//! `q_t * W[t, 0]` and `k_s * W[L, s]`, and the decay of the chunk. Without a gate there is nothing to prepare.
//!
//! A cube owns all rows of one chunk and `cols` key channels of one head; a unit owns 16 rows of one channel.

use cubecl::prelude::*;

use super::StageSpec;
use super::place::{Column, Part, scale_to_edge};
use crate::SUB;
use crate::components::{ChunkMap, decay_between};

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

    let task = CUBE_POS;
    if task >= tasks {
        terminate!();
    }
    let part = Part::of(&map, task, key_dim, spec);
    let unit = UNIT_POS as usize;
    let (block, col) = (unit / cols, unit % cols);
    let own = Column::of(&part, block, col, dims);

    let mut totals = Shared::<[f32]>::new_slice(comptime!(blocks * cols));

    let mut qr = own.read::<E>(q, dims.heads);
    let mut kr = own.read::<E>(k, dims.kv_heads);
    let wr = own.decays::<G>(gate);

    // to the edges of the sub-chunk, then of the chunk
    totals[block * cols + col] = scale_to_edge(&mut qr, &wr, false);
    let total = scale_to_edge(&mut kr, &wr, true);
    sync_cube();
    let before = decay_between(&totals, 0, block, col, cols);
    let after = decay_between(&totals, block + 1, blocks, col, cols);

    #[unroll]
    for r in 0..SUB {
        if own.has(r) {
            q_out[own.at(r, dims.heads)] = qr[r] * before;
        }
    }
    // the first query head of those that read the same
    let group = comptime!(dims.heads / spec.x_heads());
    if part.head / group * group == part.head {
        #[unroll]
        for r in 0..SUB {
            if own.has(r) {
                k_out[own.at(r, spec.x_heads())] = kr[r] * after;
            }
        }
    }
    let channel = part.col0 + col;
    if block == 0 && channel < key_dim {
        decays[(part.chunk * dims.heads + part.head) * key_dim + channel] = total * after;
    }
}
