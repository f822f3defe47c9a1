//! Stage `state_passing`: from what each chunk adds to the states between chunks, in place.
//!
//! `Role::Key` goes from the initial state forward, `S <- diag(W) S + added`, and leaves the state at the START of
//! each chunk. `Role::Query` goes back from the gradient of the final state and leaves that at the END of each.
//!
//! A unit owns one vector of a state, along all chunks of its sequence.

use cubecl::prelude::*;

use crate::Dims;
use crate::components::{ChunkMap, step_chunk};

/// Units of a cube.
pub const UNITS: usize = 64;

/// Chunks that are read at once: the next state waits for this one, but what is added does not.
const AHEAD: usize = 8;

/// * `start`, `end`: `[N, H, K, V]`, before and after the sequence; `start` is read if `has_start`, `end` written if
///   `writes_end`
/// * `states`: in and out, `[chunks, H, K, V]`
/// * `decays`: `[chunks, H, K]`, read if there is a gate
/// * `tasks`: vectors of `start`
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(crate) fn gla_state_passing_kernel<S: Float, N: Size>(
    start: &[Vector<f32, N>],
    end: &mut [Vector<f32, N>],
    states: &mut [Vector<S, N>],
    decays: &[f32],
    map: ChunkMap,
    tasks: usize,
    #[comptime] dims: Dims,
    #[comptime] reversed: bool,
    #[comptime] has_start: bool,
    #[comptime] writes_end: bool,
    #[define(S)] _dtype: ElemType,
) {
    let own = CUBE_POS * UNITS + UNIT_POS as usize;
    if own >= tasks {
        terminate!();
    }
    let gated = comptime!(dims.gate.is_some());
    let size = N::value();
    let row = comptime!(dims.value_dim / size);
    // of a sequence's state, and of a chunk's
    let len = comptime!(dims.heads * dims.key_dim * row);
    let (sequence, within) = (own / len, own % len);
    let line = map.line(sequence);
    let (first, count) = (line.first, line.count);

    let mut state = Vector::<f32, N>::new(0.0f32);
    if has_start {
        state = start[own];
    }
    for round in 0..count.div_ceil(AHEAD) {
        let mut added = Array::<Vector<f32, N>>::new(AHEAD);
        let mut factors = Array::<f32>::new(AHEAD);
        #[unroll]
        for n in 0..AHEAD {
            let step = round * AHEAD + n;
            let step = select(step < count, step, count - 1);
            let chunk = step_chunk(first, count, step, reversed);
            added[n] = Vector::cast_from(states[chunk * len + within]);
            factors[n] = f32::new(1.0);
            if gated {
                factors[n] = decays[chunk * comptime!(dims.heads * dims.key_dim) + within / row];
            }
        }
        #[unroll]
        for n in 0..AHEAD {
            let step = round * AHEAD + n;
            if step < count {
                let chunk = step_chunk(first, count, step, reversed);
                states[chunk * len + within] = Vector::cast_from(state);
                state = state * Vector::new(factors[n]) + added[n];
            }
        }
    }
    if writes_end {
        end[own] = state;
    }
}
