//! From a model to text.

mod generator;
mod sampler;
mod text;

pub use generator::*;
pub use sampler::*;
pub use text::*;
