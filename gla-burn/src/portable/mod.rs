//! Gated linear attention in tensor operations that every back-end has.
//!
//! This is the op on the CPU and on back-ends without kernels, and what the gradients of the
//! kernels are checked against. Forward and backward are both written out; nothing here goes
//! through autodiff.
//!
//! 1. `problem`: cast, scale, repeat the key heads; cut into pieces that need nothing from each
//!    other, such as packed sequences, for `threads` to share.
//! 2. `layout`: cut time into chunks; all that follows is a batch over rows, heads and chunks.
//! 3. `shared`, `channel`: the decays inside a chunk, for a gate that all channels of a key share
//!    and for one gate per channel.
//! 4. `decays`: what these have in common, and the walk over the chunks that carries the state or
//!    its gradient.
//! 5. `forward`, `backward`: outputs and gradients from the states at the ends of the chunks.
//!
//! Every exponent is a sum of gates, so at most 0, and never a difference of sums; a gradient of a
//! gate is a sum over the decays that it is part of, never a difference of larger gradients.

mod backward;
mod channel;
mod decays;
mod forward;
mod layout;
mod num;
mod problem;
mod shared;
mod step;
mod threads;

pub use backward::{Grads, backward, backward_parallel};
pub use forward::{forward, forward_parallel};
pub use step::step;

use gla_kernels::GateKind;

/// What an operation needs besides its tensors.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// Kind of gate; decides its shape.
    pub kind: GateKind,
    /// Factor on the output.
    pub scale: f64,
    /// Bounds of packed sequences, `[N + 1]`: first 0, last T, not falling. Needs B = 1.
    pub cu_seqlens: Option<&'a [usize]>,
}
