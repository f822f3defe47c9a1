//! The chunked kernels, each written once for both roles (see [`Role`]).
//!
//! | stage | `Role::Query` | `Role::Key` |
//! |---|---|---|
//! | [`state`] | gradients of the state at chunk ends, `dh0` | states at chunk starts, final state |
//! | [`scores`] | `A = scale q k^T` with decay, or `dA = scale do v^T` without | |
//! | [`output`] | `o` from `q`, the states, `A`, `v` | `dv` from `k`, the state gradients, `A^T`, `do` |
//! | [`project`] | share of `dq` from the state | share of `dk` from the state gradient; starts `dg` |
//! | [`intra_grad`] | rest of `dq` from `dA`; adds to `dg` | rest of `dk`; adds to `dg` |
//! | [`reduce`] | sums over head groups, channels or rows; casts | |

pub mod intra_grad;
pub mod output;
pub mod project;
pub mod reduce;
pub mod scores;
pub mod state;

use cubecl::prelude::*;

use crate::components::Role;
use crate::{Blueprint, DeviceLimits, Dims};

/// What a stage is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StageSpec {
    /// Heads, widths and gate kind.
    pub dims: Dims,
    /// Tile sizes and instruction.
    pub blueprint: Blueprint,
    /// Which end of a pair the stage works for.
    pub role: Role,
}

/// The task of this cube; may be past the last one, see [`cubes`].
#[cube]
pub(crate) fn cube_task() -> usize {
    CUBE_POS
}

/// A grid of at least `tasks` cubes: devices bound each axis (65535 on WebGPU), so it has two.
pub(crate) fn cubes(tasks: usize, limits: &DeviceLimits) -> CubeCount {
    let x = tasks.min(limits.cubes.0 as usize).max(1);
    CubeCount::Static(x as u32, tasks.div_ceil(x) as u32, 1)
}
