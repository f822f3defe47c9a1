//! The scan plan: states stay on chip, products run on tensor cores (`mma`).
//!
//! The kernels of the forward and the backward:
//!
//! | kernel | per | what |
//! |---|---|---|
//! | [`prepare`] | chunk and head | vector gate: the intra-chunk matrix `A`; queries and keys with their decay to the chunk's edges |
//! | [`scores`] | chunk and head | other gates: `A`, its gradient, the decays of the rows |
//! | [`walk`] | sequence, head, columns | carries a state along the chunks and reads outputs off it: `o`, `dv`, `dk`, `dq` or their shares through the state |
//! | [`combine`] | sequence, head, key channel | the states between segments, where sequences are long and few |
//! | [`intra_grad`] | chunk and head | vector gate: the shares of `dq` and `dk` inside the chunk, and `dg` |
//! | [`row_gate`] | chunk and head | other gates: `dg` |
//! | [`crate::reduce`] | | head groups, parts, fixed gates |

pub mod combine;
pub mod intra_grad;
mod launch;
mod levels;
mod plan;
pub mod prepare;
pub mod row_gate;
pub mod scores;
mod stage;
pub mod walk;
pub mod walk_spec;

pub(crate) use plan::{backward, forward};
use walk_spec::{WalkShape, WalkSpec};

use crate::{DeviceLimits, Dims, GlaError, Problem, SCAN_CHUNK, ScanBlueprint};

/// Rows of a chunk.
pub const CHUNK: usize = SCAN_CHUNK;

/// Levels of a chunk.
pub const LEVELS: usize = CHUNK.ilog2() as usize;

/// Rows that one unit walks for one channel.
pub const GROUP: usize = 8;

/// Groups of a chunk.
pub const GROUPS: usize = CHUNK / GROUP;

/// Channels that the kernels of a chunk take at once.
pub const SLICE: usize = 64;

/// Units of the kernels of a chunk: one for each channel of a slice and each group.
pub const CHUNK_UNITS: usize = SLICE * GROUPS;

/// Row stride of a slice in shared memory: 16 bytes more than the slice, so that the eight rows of
/// a matrix load lie in different banks.
pub const STRIDE: usize = SLICE + 8;

/// Elements of one `[CHUNK, SLICE]` tile in shared memory.
pub const TILE: usize = CHUNK * STRIDE;

/// Storage buffers that the largest kernel binds, its metadata included.
pub const BINDINGS: usize = 14;

/// Key channels of what the plan stores itself: rounded up to whole tiles.
pub(crate) fn padded(dims: Dims) -> usize {
    dims.key_dim.next_multiple_of(16)
}

/// Checks that the device has room for the kernels.
pub(crate) fn validate(dims: Dims, limits: &DeviceLimits) -> Result<(), GlaError> {
    let shape = WalkShape::new(dims, limits, 1, true);
    let [values, keys, state] =
        [WalkSpec::values(shape), WalkSpec::keys(shape), WalkSpec::state(shape)];
    let sums = 4 * (1 + intra_grad::CROSSING) * SLICE * GROUPS;
    let needs = [
        ("prepare", 2 * 8 * TILE + 4 * SLICE * GROUPS, CHUNK_UNITS),
        ("walk", values.shared_memory(2), values.units()),
        ("walk", keys.shared_memory(2), keys.units()),
        ("walk", state.shared_memory(2), state.units()),
        ("intra_grad", 2 * (LEVELS * TILE + CHUNK * (CHUNK + 8)) + sums, CHUNK_UNITS),
        ("scores", scores::shared_memory(2), scores::UNITS),
    ];
    for (kernel, requested, units) in needs {
        limits.check_shared_memory(kernel, requested)?;
        limits.check_units(kernel, units)?;
    }
    limits.check_bindings(BINDINGS)
}

/// Bytes of shared memory of the largest walk for so many lines.
#[cfg(test)]
pub(crate) fn largest_walk(dims: Dims, count: usize, limits: &DeviceLimits) -> usize {
    let shape = |reversed| WalkShape::new(dims, limits, count, reversed);
    [false, true]
        .into_iter()
        .flat_map(|reversed| {
            let shape = shape(reversed);
            [WalkSpec::values(shape), WalkSpec::keys(shape), WalkSpec::state(shape)]
        })
        .map(|spec| spec.shared_memory(2))
        .max()
        .unwrap_or(0)
}

/// The scratch of a call: what, how many elements, of how many bytes.
pub(crate) fn scratch(
    problem: &Problem,
    blueprint: ScanBlueprint,
    limits: &DeviceLimits,
) -> Vec<(&'static str, usize, usize)> {
    let dims = problem.dims;
    let chunks = problem.sequences.num_chunks(CHUNK);
    let segments = problem.sequences.num_chunks(CHUNK.saturating_mul(blueprint.segment));
    let keys = WalkSpec::keys(WalkShape::new(dims, limits, segments, true));
    let size = problem.dtype.size();
    let chunk_heads = chunks * dims.heads;
    vec![
        ("queries with their decay", problem.rows() * dims.heads * keys.padded, size),
        ("the states between segments", segments * dims.heads * dims.key_dim * dims.value_dim, 4),
        ("the state gradients between chunks", 2 * chunk_heads * keys.trace_pairs(), size),
        ("shares of the key gradient", keys.out_len(problem.rows(), chunks), 4),
    ]
}

/// What the kernels of a chunk are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChunkSpec {
    /// Heads, widths and gate kind.
    pub dims: Dims,
    /// See [`padded`].
    pub padded: usize,
}
