use burn::tensor::{DType, Tensor};

use super::gradient;

/// `ln(sigmoid(x)) = min(x, 0) - ln(1 + exp(-|x|))` in f32, exact in both tails.
///
/// Value and gradient keep their relative precision where `sigmoid(x)` has rounded to 1 (`x > 16`),
/// which is where a gate that has learnt to remember lives. The gradient is `sigmoid(-x)`
/// everywhere, also at 0 where `min` and `|x|` have their kinks. Under autodiff one tensor of the
/// size of `x` is kept.
///
/// # Shapes
///
/// - x: any, any float dtype, finite
/// - output: as `x`, f32
pub fn log_sigmoid<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let x = x.cast(DType::F32);
    let constant = gradient::constant(&x);
    let decay = constant.clone().abs().neg().exp();
    let value = constant.clone().clamp_max(0.0) - log1p_unit(decay.clone());
    if !x.is_autodiff() {
        return value;
    }

    // sigmoid(-x) without a difference of nearly equal numbers
    let negative = constant.lower_elem(0.0);
    let slope = decay.clone().mask_fill(negative, 1.0) / (decay + 1.0);
    value + gradient::carry(x, slope)
}

/// `ln(1 + e)` for `e` in `[0, 1]`, with a relative error below 1e-5 down to the smallest `e`.
///
/// CubeCL evaluates `log1p` as `ln(1 + e)`, which is 0 for every `e < 6e-8`. Below 1/64, four terms
/// of the series are exact to f32.
fn log1p_unit<const D: usize>(e: Tensor<D>) -> Tensor<D> {
    let small = e.clone().lower_elem(1.0 / 64.0);
    let series = ((e.clone() * -0.25 + 1.0 / 3.0) * e.clone() - 0.5) * e.clone() + 1.0;
    e.clone().log1p().mask_where(small, series * e)
}
