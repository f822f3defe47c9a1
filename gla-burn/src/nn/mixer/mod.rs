//! The sequence mixer of a block: what stands where attention stands.
//!
//! [`base`] has what all kinds share, [`recurrence`] the op and the short convolutions with and
//! without a past. Each other file is one kind; `retention`, `simple_gla` and `linear` are other
//! gates of the same layer, [`GatedLinearAttention`](crate::nn::GatedLinearAttention).

mod base;
mod config;
mod hgrn2;
mod linear;
mod mamba;
mod mamba2;
mod recurrence;
mod retention;
mod simple_gla;
mod softmax;
mod ssm;

pub use base::*;
pub use config::*;
pub use hgrn2::*;
pub use linear::*;
pub use mamba::*;
pub use mamba2::*;
pub(super) use recurrence::*;
pub use retention::*;
pub use simple_gla::*;
pub use softmax::*;
pub use ssm::TimeSteps;
