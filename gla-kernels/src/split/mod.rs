//! The split plan: the state of every chunk is stored, and chunks are worked on in parallel. Each
//! kernel is written once for both roles (see [`Role`]).
//!
//! | stage | `Role::Query` | `Role::Key` |
//! |---|---|---|
//! | [`prepare`], with a gate | `q_t * W[t, 0]` | `k_s * W[L, s]` |
//! | [`chunk_state`] | what each chunk adds to the state's gradient | what each adds to the state |
//! | [`state_passing`] | gradients of the state at chunk ends, `dh0` | states at chunk starts, final state |
//! | [`scores`] | `A = scale q k^T` with decay; `dA = scale do v^T`, with it if it decays channels alike | |
//! | [`output`] | `o` from those rows, the states, `A`, `v` | `dv` from those rows, the state gradients, `A^T`, `do` |
//! | [`project`] | share of `dq` from the state | share of `dk` from the state gradient; starts `dg` |
//! | [`intra_grad`] | rest of `dq` from `dA`; adds to `dg` | rest of `dk`; adds to `dg` |
//! | [`crate::row_gate`], if the gate decays channels alike | `dg`, of which the stages before leave sums | |

pub mod chunk_state;
pub mod intra_grad;
mod launch;
pub mod output;
mod place;
mod plan;
pub mod prepare;
pub mod project;
pub mod scores;
pub mod state_passing;

pub(crate) use plan::{backward, forward};

use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;

use crate::components::{Role, Source};
use crate::{DeviceLimits, Dims, GateKind, Problem, SplitBlueprint};

/// The scratch of a forward, and of a backward with `grads`: what, how many elements, of how many bytes.
pub(crate) fn scratch(
    problem: &Problem,
    blueprint: SplitBlueprint,
    limits: &DeviceLimits,
    grads: bool,
) -> Vec<(&'static str, usize, usize)> {
    let dims = problem.dims;
    let chunks = problem.sequences.num_chunks(blueprint.chunk);
    let row_heads = problem.rows() * dims.heads;
    let states =
        [dims.heads, dims.key_dim, dims.value_dim].into_iter().fold(chunks, usize::saturating_mul);
    let mut all = vec![
        ("the states between chunks", states, state_type(problem, limits).size()),
        ("the intra-chunk matrix [B, T, H, chunk]", row_heads.saturating_mul(blueprint.chunk), 4),
    ];
    if dims.gate.is_some() {
        all.push((
            "decayed queries and keys [B, T, H, K]",
            row_heads.saturating_mul(dims.key_dim),
            4,
        ));
    }
    if grads {
        let values = if dims.heads > dims.kv_heads { dims.value_dim } else { 0 };
        let width = dims.key_dim.max(values);
        all.push(("gradients before they are summed", row_heads * width, 4));
    }
    all
}

/// Type of the states between chunks. They are sums of many terms: bf16 has their range, and its rounding stays within
/// the tolerance of bf16 inputs; not so for the gradient of a gate that decays all channels alike, one number that is
/// left of many terms, nor where what does not fit may be cut off. In f16 a sum of many products could be infinite.
pub(crate) fn state_type(problem: &Problem, limits: &DeviceLimits) -> ElemType {
    let brain = ElemType::Float(FloatKind::BF16);
    let by_row = problem.dims.gate.by_row();
    match problem.dtype == brain && limits.rounds_bf16 && !by_row {
        true => brain,
        false => f32::elem_type_native(),
    }
}

/// What a stage is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StageSpec {
    /// Heads, widths and gate kind.
    pub dims: Dims,
    /// Lengths of chunks and widths of tiles.
    pub blueprint: SplitBlueprint,
    /// Which end of a pair the stage works for.
    pub role: Role,
}

impl StageSpec {
    /// Heads of the rows that a state meets: where `prepare` leaves keys times a fixed gate, that of each query
    /// head is its own.
    pub fn x_heads(&self) -> usize {
        match self.dims.gate {
            GateKind::Fixed => self.dims.heads,
            _ => self.role.heads(self.dims),
        }
    }

    /// Tiles of a tensor `[rows, own_heads, width]`, for stages whose units own patches.
    pub const fn source(&self, own_heads: usize, width: usize, rows: usize, cols: usize) -> Source {
        let units = self.blueprint.patch_units();
        Source { dims: self.dims, own_heads, width, rows, cols, units }
    }
}
