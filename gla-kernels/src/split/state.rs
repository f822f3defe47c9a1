//! Stage `state`: the states between chunks.
//!
//! `Role::Key` walks the chunks forward from the initial state,
//! `S <- diag(exp g) S + k v^T`, and stores the state at the START of each chunk.
//! `Role::Query` walks them backward from the gradient of the final state,
//! `D <- diag(exp g) D + scale q do^T`, and stores the gradient at the END of each chunk.
//!
//! A cube owns a tile `[chunk channels, cols]` of one head's state for a whole line, a sequence or a segment
//! of one, and keeps it in registers; a unit owns a patch of it. It steps by sub-chunks of 16
//! rows.

use cubecl::prelude::*;

use super::StageSpec;
use crate::components::{
    ChunkMap, PATCH, PATCH_COLS, PATCH_ROWS, PITCH, Patch, Role, Source, decay_or_one, load_rows,
    read_or_zero, row_offset, scale_column, step_chunk, zeros,
};
use crate::{Dims, SUB};

/// What a walk stores, beside the state that it ends with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Leaves {
    /// The states between the chunks, `[chunks, H, K, V]`.
    States,
    /// The decays of the chunks, `[chunks, H, K]`; nothing without a gate.
    Decays,
}

/// * `x`: `k [rows, Hk, K]` (Key) or `q [rows, H, K]` (Query)
/// * `y`: `v [rows, Hk, V]` (Key) or `do [rows, H, V]` (Query)
/// * `start`: `[lines, H, K, V]`, read if `has_start`
/// * `left`: out, see [`Leaves`]
/// * `end`: out, `[lines, H, K, V]`
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(crate) fn gla_state_kernel<E: Float, G: Float>(
    x: &[E],
    y: &[E],
    gate: &[G],
    start: &[f32],
    left: &mut [f32],
    end: &mut [f32],
    map: ChunkMap,
    tasks: usize,
    scale: f32,
    #[comptime] spec: StageSpec,
    #[comptime] leaves: Leaves,
    #[comptime] has_start: bool,
    #[define(E, G)] _dtypes: [ElemType; 2],
) {
    let dims = comptime!(spec.dims);
    let key_dim = comptime!(dims.key_dim);
    let value_dim = comptime!(dims.value_dim);
    let channels = comptime!(spec.chunk);
    let cols = comptime!(spec.cols);
    let units = comptime!(spec.patch_units());
    let is_key = comptime!(spec.role == Role::Key);
    let gated = comptime!(dims.gate.is_some());
    let own_heads = comptime!(spec.role.heads(dims));
    let from_y = comptime!(Source { dims, own_heads, width: value_dim, units });
    let tiles_v = comptime!(value_dim.div_ceil(cols));
    let tiles_k = comptime!(key_dim.div_ceil(channels));

    let task = CUBE_POS;
    if task >= tasks {
        terminate!();
    }
    let tile_v = task % tiles_v;
    let tile_k = (task / tiles_v) % tiles_k;
    let head = (task / comptime!(tiles_v * tiles_k)) % dims.heads;
    let own_line = task / comptime!(tiles_v * tiles_k * dims.heads);

    let unit = UNIT_POS as usize;
    let patch = Patch::of(unit, cols);
    let channel0 = tile_k * channels;
    let i0 = channel0 + patch.row;
    let j0 = tile_v * cols;

    let mut xs = Shared::<[f32]>::new_slice(comptime!(PITCH * channels));
    let mut decays = Shared::<[f32]>::new_slice(comptime!(PITCH * channels));
    let mut ys = Shared::<[f32]>::new_slice(comptime!(SUB * cols));
    let mut totals = Shared::<[f32]>::new_slice(channels);
    let leaves_decays = comptime!(leaves == Leaves::Decays && gated);
    let mut products =
        Shared::<[f32]>::new_slice(comptime!(if leaves_decays { channels } else { 1 }));

    let mut acc = zeros(PATCH);
    let state_at = ((own_line * dims.heads + head) * key_dim + i0) * value_dim + j0;
    if has_start {
        #[unroll]
        for at in 0..PATCH {
            let (r, c) = (at / PATCH_COLS, patch.column(at % PATCH_COLS));
            let valid = i0 + r < key_dim && j0 + c < value_dim;
            acc[at] = read_or_zero::<f32>(start, state_at + r * value_dim + c, valid);
        }
    }

    let line = map.line(own_line);
    for step in 0..line.count {
        let chunk = step_chunk(line.first, line.count, step, comptime!(!is_key));
        let rows = line.rows_of(chunk);
        if comptime!(leaves == Leaves::States) {
            let out_at = ((chunk * dims.heads + head) * key_dim + i0) * value_dim + j0;
            store(left, out_at, &acc, &patch, i0, j0, dims);
        }
        // each is of one unit throughout
        if leaves_decays {
            for c in range_stepped(unit, channels, units) {
                products[c] = 1.0;
            }
        }

        let subs = rows.len.div_ceil(SUB);
        for sub_step in 0..subs {
            let sub = step_chunk(0, subs, sub_step, comptime!(!is_key));
            let row0 = rows.start + sub * SUB;
            let len = rows.len - sub * SUB;

            // the left operand is x^T: 16 channels contiguous, rows as depth
            for at in range_stepped(unit, comptime!(SUB * channels), units) {
                let (row, c) = (at / channels, at % channels);
                let i = channel0 + c;
                let valid = row < len && i < key_dim;
                let to = ((c / SUB) * SUB + row) * PITCH + c % SUB;
                let offset = row_offset(row0 + row, head, dims, own_heads, key_dim);
                xs[to] = read_or_zero::<E>(x, offset + i, valid);
                if gated {
                    decays[to] = decay_or_one::<G>(gate, row0 + row, head, i, valid, dims);
                }
            }
            load_rows::<E>(y, &mut ys, row0, len, head, tile_v * cols, cols, from_y);
            sync_cube();

            if gated {
                for c in range_stepped(unit, channels, units) {
                    let at = (c / SUB) * comptime!(SUB * PITCH) + c % SUB;
                    let w = scale_column(&mut xs, &decays, at, PITCH, f32::new(1.0), is_key);
                    totals[c] = w;
                    if leaves_decays {
                        products[c] *= w;
                    }
                }
                sync_cube();
                #[unroll]
                for r in 0..PATCH_ROWS {
                    let total = totals[patch.row + r];
                    #[unroll]
                    for c in 0..PATCH_COLS {
                        acc[r * PATCH_COLS + c] *= total;
                    }
                }
            }
            if !is_key {
                for at in range_stepped(unit, comptime!(SUB * cols), units) {
                    ys[at] *= scale;
                }
                sync_cube();
            }
            patch.contract(&mut acc, &xs, &ys, cols, SUB);
            sync_cube();
        }
        if leaves_decays {
            for c in range_stepped(unit, channels, units) {
                if tile_v == 0 && channel0 + c < key_dim {
                    left[(chunk * dims.heads + head) * key_dim + channel0 + c] = products[c];
                }
            }
        }
    }

    store(end, state_at, &acc, &patch, i0, j0, dims);
}

/// Writes a patch of a state that starts at key channel `i0`, in a tile that starts at value channel `j0`.
#[cube]
fn store(
    out: &mut [f32],
    out_at: usize,
    acc: &Array<f32>,
    patch: &Patch,
    i0: usize,
    j0: usize,
    #[comptime] dims: Dims,
) {
    #[unroll]
    for at in 0..PATCH {
        let (r, c) = (at / PATCH_COLS, patch.column(at % PATCH_COLS));
        if i0 + r < dims.key_dim && j0 + c < dims.value_dim {
            out[out_at + r * dims.value_dim + c] = acc[at];
        }
    }
}
