//! The public functions: check, call the back-end, wrap.

mod check;
mod gla;
mod step;

pub use gla::*;
pub use step::*;
