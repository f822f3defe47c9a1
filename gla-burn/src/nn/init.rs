//! The initialisation shared by all projections: weights from `N(0, std)`, biases zero.

use burn::nn::{Initializer, Linear, LinearConfig};
use burn::tensor::Device;

/// Normal distribution around zero.
pub(super) fn normal(std: f64) -> Initializer {
    Initializer::Normal { mean: 0.0, std }
}

/// Projection `d_input -> d_output` without a bias.
pub(super) fn projection(d_input: usize, d_output: usize, std: f64, device: &Device) -> Linear {
    LinearConfig::new(d_input, d_output).with_bias(false).with_initializer(normal(std)).init(device)
}

/// Projection `d_input -> d_output` with a bias that starts at zero.
pub(super) fn projection_with_bias(
    d_input: usize,
    d_output: usize,
    std: f64,
    device: &Device,
) -> Linear {
    Linear {
        bias: Some(Initializer::Zeros.init([d_output], device)),
        ..projection(d_input, d_output, std, device)
    }
}
