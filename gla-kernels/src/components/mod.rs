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
