//! The scan plan: states stay on chip, products run on tensor cores (`mma`).
//!
//! Five kernels make the forward and the backward:
//!
//! | kernel | per | what |
//! |---|---|---|
//! | [`prepare`] | chunk and head | the intra-chunk matrix `A`; queries and keys with their decay to the chunk's edges |
//! | [`walk`] | sequence, head, columns | carries a state along the chunks and reads outputs off it: `o`; the shares of `dv`, `dk`, `dq` through the state |
//! | [`combine`] | sequence, head, key channel | the states between segments, where sequences are long and few |
//! | [`intra_grad`] | chunk and head | the shares of `dq` and `dk` inside the chunk, and `dg` |
//! | [`crate::reduce`] | | head groups, scalar and fixed gates |

pub mod combine;
pub mod intra_grad;
mod launch;
mod levels;
mod plan;
pub mod prepare;
mod stage;
pub mod walk;
pub mod walk_spec;

pub(crate) use plan::{backward, forward};
use stage::Stage;
use walk_spec::{WalkShape, WalkSpec};

use crate::{Dims, SCAN_CHUNK};

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

/// Bytes of shared memory of each kernel, for elements of two bytes.
pub(crate) fn shared_memory(dims: Dims, processors: usize) -> [(&'static str, usize); 4] {
    let shape = |reversed| WalkShape { dims, count: 1, processors, reversed, has_start: false };
    // the tiles of a call with many cubes hold less
    [
        ("prepare", 2 * 8 * TILE + 4 * SLICE * GROUPS),
        ("the o walk", WalkSpec::values(shape(false)).shared_memory(2)),
        ("the dk walk", WalkSpec::keys(shape(true)).shared_memory(2)),
        (
            "intra_grad",
            2 * (LEVELS * TILE + CHUNK * (CHUNK + 8))
                + 4 * (1 + intra_grad::CROSSING) * SLICE * GROUPS,
        ),
    ]
}

/// What the kernels of a chunk are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChunkSpec {
    /// Heads, widths and gate kind.
    pub dims: Dims,
    /// `dims.key_dim` rounded up to a multiple of 16: the width of what the plan stores itself.
    pub padded: usize,
}

impl ChunkSpec {
    /// Tiles of `do` or `v`.
    fn stage(&self, own_heads: usize) -> Stage {
        Stage {
            own_heads,
            group: self.dims.heads / own_heads,
            width: self.dims.value_dim,
            cols: intra_grad::DEPTH,
            units: CHUNK_UNITS,
        }
    }
}
