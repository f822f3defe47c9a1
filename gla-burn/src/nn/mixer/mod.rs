//! The sequence mixer of a block: what stands where attention stands.

mod base;
mod config;
mod recurrence;

pub use base::*;
pub use config::*;
pub(super) use recurrence::*;
