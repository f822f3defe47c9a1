//! One file a back-end.

#[cfg(feature = "autodiff")]
mod autodiff;
#[cfg(feature = "cubecl-backend")]
mod cubecl;
#[cfg(feature = "flex")]
mod flex;

use burn::backend::Backend;
use burn::tensor::{FloatDType, Shape};

use crate::{GlaGrads, portable};

/// The gradients of the portable path in the form of the trait.
pub(crate) fn grads_of<B: Backend>(grads: portable::Grads<B>, device: &B::Device) -> GlaGrads<B> {
    let none = || B::float_zeros(Shape::from([1]), device, FloatDType::F32);
    GlaGrads {
        dq: grads.dq,
        dk: grads.dk,
        dv: grads.dv,
        dgate: grads.dgate.unwrap_or_else(none),
        dh0: grads.dh0,
    }
}
