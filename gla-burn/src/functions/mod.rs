//! The public functions: check, call the back-end, wrap.

mod check;
mod device;
mod gla;
mod step;

pub(crate) use check::is_portable;
pub use device::device_limits;
pub use gla::*;
pub use step::*;
