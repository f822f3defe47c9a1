//! What the kernels share: addressing, gates, products of blocks and the tile contraction.

mod address;
mod block;
mod contraction;
mod gate;
mod tile;

pub use address::*;
pub use block::*;
pub use contraction::*;
pub use gate::*;
pub use tile::*;

use crate::Dims;

/// Which end of a pair `(t, s)`, `s <= t`, a kernel works for.
///
/// The backward of the recurrence is the same recurrence in reversed time with queries and keys
/// exchanged, so each chunked kernel is written once and compiled for both roles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Rows `t`: decay runs from the start of a tile through `t`, the own gate included.
    Query,
    /// Rows `s`: decay runs from after `s` to the end of a tile, the own gate excluded.
    Key,
}

impl Role {
    /// Heads that such rows have: all, as queries and do, or their own, as keys and values.
    pub fn heads(self, dims: Dims) -> usize {
        match self {
            Role::Query => dims.heads,
            Role::Key => dims.kv_heads,
        }
    }

    /// That of the rows they are paired with.
    pub fn other(self) -> Self {
        match self {
            Role::Query => Role::Key,
            Role::Key => Role::Query,
        }
    }
}
