//! The scan plan: states stay on chip, products run on tensor cores. (The backward of a gate leaves one a chunk for
//! the gate's gradient.)
//!
//! The kernels of the forward and the backward:
//!
//! | kernel | per | what |
//! |---|---|---|
//! | [`prepare`] | chunk and head | vector gate: the intra-chunk matrix `A`; queries and keys with their decay to the chunk's edges |
//! | [`scores`] | chunk and head | other gates: `A`, its gradient, the decays of the rows, and pairs inside the chunk for `dg` |
//! | [`walk`] | sequence or segment, head, columns | carries a state along the chunks and reads outputs off it: `o`, `dv`, `dk`, `dq` or their shares through the state |
//! | [`state_walk`] | segment, head, part of the state | what a segment adds to a state, where sequences are long and few |
//! | [`combine`] | sequence, head, key channel | the states between segments |
//! | [`intra_grad`] | chunk and head | vector gate: the shares of `dq` and `dk` inside the chunk, and `dg` |
//! | [`crate::row_gate`] | chunk and head | other gates: `dg` |
//! | [`crate::reduce`] | | head groups, parts, fixed gates |

mod combine;
mod gate_terms;
mod intra;
pub mod intra_grad;
mod launch;
mod levels;
mod outputs;
mod plan;
pub mod prepare;
pub mod scores;
mod stage;
pub mod state_walk;
pub mod walk;
pub mod walk_spec;

pub(crate) use plan::{backward, forward};
use state_walk::StateSpec;
use walk_spec::{WalkShape, WalkSpec};

use cubecl::ir::ElemType;
use cubecl::prelude::*;

use crate::{
    DeviceLimits, Dims, GateKind, GlaError, Instruction, Problem, SCAN_CHUNK, ScanBlueprint,
};

/// Rows of a chunk.
pub const CHUNK: usize = SCAN_CHUNK;

/// Levels of a chunk.
pub const LEVELS: usize = CHUNK.ilog2() as usize;

/// Rows that one unit walks for one channel.
pub const GROUP: usize = 8;

/// Groups of a chunk.
pub const GROUPS: usize = CHUNK / GROUP;

/// Storage buffers that the largest kernel binds, its metadata included.
pub const BINDINGS: usize = 14;

/// Key channels of what the plan stores itself: rounded up to whole tiles.
pub(crate) fn padded(dims: Dims) -> usize {
    dims.key_dim.next_multiple_of(16)
}

/// What the parts of an output are rounded to before they are added up, in f32: where all wide heads come
/// in parts, they would take as long in f32 as the walk itself.
pub(crate) fn part_type(dtype: ElemType, instruction: Instruction) -> ElemType {
    match instruction {
        Instruction::Cmma => dtype,
        _ => f32::elem_type_native(),
    }
}

/// Checks that the device has room for the kernels.
pub(crate) fn validate(
    dims: Dims,
    instruction: Instruction,
    limits: &DeviceLimits,
) -> Result<(), GlaError> {
    let shape = WalkShape::new(dims, instruction, limits, 1, true);
    let (values, keys) = (WalkSpec::values(shape), WalkSpec::keys(shape));
    let state = StateSpec::new(shape);
    let spec = ChunkSpec { dims, instruction };
    let needs = [
        ("prepare", prepare::shared_memory(spec, 2), spec.units()),
        ("walk", values.shared_memory(), values.units()),
        ("walk", keys.shared_memory(), keys.units()),
        ("state_walk", state.shared_memory(), state.units()),
        ("intra_grad", intra_grad::shared_memory(spec, 2), spec.units()),
        ("scores", scores::shared_memory(spec, 2), scores::UNITS),
    ];
    for (kernel, requested, units) in needs {
        limits.check_shared_memory(kernel, requested)?;
        limits.check_units(kernel, units)?;
    }
    limits.check_bindings(BINDINGS)
}

/// Bytes of shared memory of the largest walk for so many lines.
#[cfg(test)]
pub(crate) fn largest_walk(
    dims: Dims,
    count: usize,
    instruction: Instruction,
    limits: &DeviceLimits,
) -> usize {
    let shape = |reversed| WalkShape::new(dims, instruction, limits, count, reversed);
    [false, true]
        .into_iter()
        .flat_map(|reversed| {
            let shape = shape(reversed);
            let [values, keys] = [WalkSpec::values(shape), WalkSpec::keys(shape)];
            let state = StateSpec::new(shape).shared_memory();
            [values.shared_memory(), keys.shared_memory(), state]
        })
        .max()
        .unwrap_or(0)
}

/// The scratch of a forward, and of a backward with `grads`: what, how many elements, of how many bytes.
pub(crate) fn scratch(
    problem: &Problem,
    blueprint: ScanBlueprint,
    limits: &DeviceLimits,
    grads: bool,
) -> Vec<(&'static str, usize, usize)> {
    let dims = problem.dims;
    let chunks = problem.sequences.num_chunks(CHUNK);
    let segments = problem.sequences.num_chunks(CHUNK.saturating_mul(blueprint.segment));
    let shape = WalkShape::new(dims, blueprint.instruction, limits, segments, true);
    let (keys, values) = (WalkSpec::keys(shape), WalkSpec::values(shape));
    let size = problem.dtype.size();
    let (chunk_heads, row_heads) = (chunks * dims.heads, problem.rows() * dims.heads);
    // of the gradients of keys and values: outputs and the queries' have a head for each
    let group = if grads { dims.heads / dims.kv_heads } else { 1 };
    // see `Launcher::shares`
    let shares = |what, width, parts| match (parts, group) {
        (1, 1) => (what, 0, size),
        (_, 1) => {
            let part_size = part_type(problem.dtype, blueprint.instruction).size();
            (what, parts * row_heads * width, part_size)
        }
        _ => (what, parts * row_heads * width, 4),
    };
    let key_parts = if keys.by_channel() { 1 } else { keys.parts };
    let by_channel = if keys.by_channel() { keys.out_len(problem.rows(), chunks) } else { 0 };
    let decayed = if dims.gate == GateKind::Vector { row_heads * keys.padded } else { 0 };
    let mut all = vec![
        ("queries with their decay", decayed, size),
        ("the states between segments", segments * dims.heads * dims.key_dim * dims.value_dim, 4),
        ("the matrix inside the chunks", chunk_heads * CHUNK * CHUNK, size),
        shares("shares of the output", dims.value_dim, values.parts),
    ];
    if grads {
        let trace = if dims.gate.is_some() { chunk_heads * keys.trace_len() } else { 0 };
        all.extend([
            ("the state gradients between chunks", trace, size),
            ("shares of the key gradient through the state", by_channel, size),
            shares("shares of the key gradient", dims.key_dim, key_parts),
        ]);
    }
    all
}

/// What the kernels of a chunk are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChunkSpec {
    /// Heads, widths and gate kind.
    pub dims: Dims,
    /// The tile instruction.
    pub instruction: Instruction,
}

impl ChunkSpec {
    /// See [`padded`].
    pub fn padded(&self) -> usize {
        padded(self.dims)
    }

    /// Channels that a cube takes at once: what Vulkan's devices have of shared memory holds half of
    /// what CUDA's do.
    pub const fn slice(&self) -> usize {
        match self.instruction {
            Instruction::Cmma => 32,
            _ => 64,
        }
    }

    /// Row stride of a slice in shared memory: 16 bytes more than the slice, so that the eight rows of
    /// a matrix load lie in different banks.
    pub const fn stride(&self) -> usize {
        self.slice() + 8
    }

    /// Elements of one tile of a slice in shared memory.
    pub const fn tile(&self) -> usize {
        CHUNK * self.stride()
    }

    /// Units of a cube: one for each channel of a slice and each group.
    pub const fn units(&self) -> usize {
        self.slice() * GROUPS
    }

    /// Planes of a cube.
    pub const fn planes(&self) -> usize {
        self.units() / 32
    }
}
