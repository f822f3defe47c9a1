//! The attention layer and its configuration.

mod config;
mod layer;

pub use config::*;
pub use layer::*;
