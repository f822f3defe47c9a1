//! The sequence mixer of a block: what stands where attention stands.

mod base;
mod config;
mod recurrence;
mod softmax;

pub use base::*;
pub use config::*;
pub(super) use recurrence::*;
pub use softmax::*;
