//! Kernel `combine`: the states that the segments of a sequence start from.
//!
//! A first walk leaves what each segment adds to a state of zero; `start <- decay start + added`,
//! along the segments, with the decay of all chunks of a segment.
//!
//! A cube owns one key channel of one head of one sequence; a unit, some columns.

use cubecl::prelude::*;

use crate::components::{ChunkMap, step_chunk};
use crate::{Dims, MAX_SEGMENTS};

/// Units of a cube.
pub const UNITS: usize = 64;

/// Where the decays of the chunks lie, whose product is that of a segment: `[chunks, H, stride]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChunkDecays {
    /// Length of a line.
    pub stride: usize,
    /// Where a line has that of all key channels; each has its own at its own place otherwise.
    pub of_all: Option<usize>,
}

/// * `start`, `end`: `[N, H, K, V]`, the states before and after the sequence; `start` is read if
///   `has_start`, `end` written if `writes_end`
/// * `added`: `[segments, H, K, V]`; `starts`: out, the same shape
/// * `decays`: see [`ChunkDecays`]; without, they are 1
/// * `reversed`: 1 if from the last segment on, else 0
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(crate) fn gla_combine_kernel(
    start: &[f32],
    end: &mut [f32],
    added: &[f32],
    starts: &mut [f32],
    decays: &[f32],
    map: ChunkMap,
    tasks: usize,
    reversed: u32,
    #[comptime] dims: Dims,
    #[comptime] chunk_decays: Option<ChunkDecays>,
    #[comptime] has_start: bool,
    #[comptime] writes_end: bool,
) {
    let task = CUBE_POS;
    if task >= tasks {
        terminate!();
    }
    let i = task % dims.key_dim;
    let head = (task / dims.key_dim) % dims.heads;
    let sequence = task / comptime!(dims.key_dim * dims.heads);
    let (first, count) = map.lines_of(sequence);
    let unit = UNIT_POS as usize;

    let mut totals = Shared::<[f32]>::new_slice(MAX_SEGMENTS);
    for segment in range_stepped(unit, count, UNITS) {
        let mut w = f32::new(1.0);
        if let Some(ChunkDecays { stride, of_all }) = comptime!(chunk_decays) {
            let own = match comptime!(of_all) {
                Some(at) => at.runtime(),
                None => i,
            };
            let line = map.line(first + segment);
            for chunk in line.first..line.first + line.count {
                w *= decays[(chunk * dims.heads + head) * stride + own];
            }
        }
        totals[segment] = w;
    }
    sync_cube();

    for j in range_stepped(unit, dims.value_dim, UNITS) {
        let own = ((sequence * dims.heads + head) * dims.key_dim + i) * dims.value_dim + j;
        let mut state = f32::new(0.0);
        if has_start {
            state = start[own];
        }
        for step in 0..count {
            let segment = step_chunk(0usize, count, step, reversed != 0);
            let at = (((first + segment) * dims.heads + head) * dims.key_dim + i) * dims.value_dim;
            starts[at + j] = state;
            state = state * totals[segment] + added[at + j];
        }
        if writes_end {
            end[own] = state;
        }
    }
}
