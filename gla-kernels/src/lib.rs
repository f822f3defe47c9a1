//! Gated linear attention as CubeCL kernels, written once for CUDA, Vulkan, Metal and WebGPU.
//!
//! Per sequence and head, with `S_0` the initial state or zero:
//!
//! ```text
//! S_t = diag(exp g_t) S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t
//! ```
//!
//! The crate knows no tensors, only buffers on a CubeCL client: a [`Problem`] says what they hold,
//! a [`Strategy`] becomes a [`Blueprint`] of compile-time choices that fits the device, and
//! [`forward`], [`backward`] and [`recurrent`] launch the kernels. For Burn tensors see the crate
//! `gla-burn`. The derivation is in this crate's README.
//!
//! A failed launch is silent in CubeCL until one of its outputs is read. Everything that can be
//! checked is therefore checked before the first launch, and reported as a [`GlaError`].

mod backward;
mod check;
mod components;
mod definition;
mod error;
#[cfg(feature = "eval")]
pub mod eval;
mod forward;
mod launch;
mod recurrent;
mod reduce;
mod row_gate;
mod scan;
mod select;
mod split;

pub use backward::*;
pub use check::{check_chunked, check_recurrent};
pub use definition::*;
pub use error::GlaError;
pub use forward::*;
pub use recurrent::*;
pub use select::select;

pub(crate) use check::{buffer, check_gate, check_inputs};
