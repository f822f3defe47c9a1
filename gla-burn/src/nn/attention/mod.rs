//! The attention layer of all gate kinds, and the configuration of gated linear attention.

mod config;
mod layer;
mod parts;

pub use config::*;
pub use layer::*;
pub(super) use parts::*;
