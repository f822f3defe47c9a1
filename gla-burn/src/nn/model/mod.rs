//! The language model, its configuration, and the published ones.

mod config;
mod presets;
mod transformer;

pub use config::*;
pub use transformer::*;
