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
pub use gla_kernels::{
    Blueprint, DeviceLimits, GateKind, GlaError, Instruction, Plan, ScanBlueprint, SplitBlueprint,
    Strategy,
};
pub use nn::*;
pub use ops::*;
