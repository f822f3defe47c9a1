#![cfg_attr(docsrs, feature(doc_cfg))]
#![doc = include_str!("../README.md")]

mod backends;
#[cfg(feature = "store")]
pub mod checkpoint;
mod functions;
pub mod nn;
mod ops;
#[doc(hidden)]
pub mod portable;

pub use functions::*;
pub use gla_kernels::{DeviceLimits, GateKind, GlaError};
pub use nn::*;
pub use ops::*;
