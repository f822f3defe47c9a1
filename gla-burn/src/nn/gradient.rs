//! Gradients by formula: a value that autodiff does not see, and a zero that carries what is known of its slope.

use burn::tensor::Tensor;

/// Zero, with the gradient `slope` for `x`; in the type of the slope, which is all that is kept.
pub(super) fn carry<const D: usize>(x: Tensor<D>, slope: Tensor<D>) -> Tensor<D> {
    let zero = x.clone() - constant(&x);
    zero.cast(slope.dtype()) * slope
}

/// `x` without its history; a leaf's copy would be a leaf else, and what it enters be kept.
pub(super) fn constant<const D: usize>(x: &Tensor<D>) -> Tensor<D> {
    x.clone().detach().set_require_grad(false)
}

#[cfg(feature = "autodiff")]
pub(super) fn is_tracked<const D: usize>(x: &Tensor<D>) -> bool {
    x.is_tracked()
}

#[cfg(not(feature = "autodiff"))]
pub(super) fn is_tracked<const D: usize>(x: &Tensor<D>) -> bool {
    // autodiff may be on in Burn alone
    x.is_autodiff()
}
