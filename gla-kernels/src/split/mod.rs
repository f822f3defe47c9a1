//! The split plan: the state of every chunk is stored, and chunks are worked on in parallel. Each
//! kernel is written once for both roles (see [`Role`]).
//!
//! | stage | `Role::Query` | `Role::Key` |
//! |---|---|---|
//! | [`state`] | gradients of the state at chunk ends, `dh0` | states at chunk starts, final state |
//! | [`scores`] | `A = scale q k^T` with decay, or `dA = scale do v^T` without | |
//! | [`output`] | `o` from `q`, the states, `A`, `v` | `dv` from `k`, the state gradients, `A^T`, `do` |
//! | [`project`] | share of `dq` from the state | share of `dk` from the state gradient; starts `dg` |
//! | [`intra_grad`] | rest of `dq` from `dA`; adds to `dg` | rest of `dk`; adds to `dg` |

pub mod intra_grad;
mod launch;
pub mod output;
mod plan;
pub mod project;
pub mod scores;
pub mod state;

pub(crate) use plan::{backward, forward};

use crate::components::Role;
use crate::{Dims, SplitBlueprint};

/// What a stage is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StageSpec {
    /// Heads, widths and gate kind.
    pub dims: Dims,
    /// Tile sizes.
    pub blueprint: SplitBlueprint,
    /// Which end of a pair the stage works for.
    pub role: Role,
}
