//! What state space models share: time steps.

use burn::tensor::{DType, Device, Distribution, Tensor};
use serde::{Deserialize, Serialize};

use crate::nn::log_sigmoid;

/// Time steps at the start of training, drawn log-uniformly from `min` to `max`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TimeSteps {
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Default for TimeSteps {
    fn default() -> Self {
        Self { min: 1e-3, max: 0.1 }
    }
}

impl TimeSteps {
    pub(super) fn check(&self) -> Result<(), String> {
        let Self { min, max } = *self;
        if 0.0 < min && min <= max && max.is_finite() {
            return Ok(());
        }
        Err(format!("the time steps must rise from above 0, got {min} to {max}"))
    }

    /// Biases whose softplus are time steps, `[num]`.
    pub(super) fn draw_bias(&self, num: usize, device: &Device) -> Tensor<1> {
        let steps = uniform(num, [self.min.ln(), self.max.ln()], device).exp();
        // the inverse of softplus: ln(e^x - 1) = x + ln(1 - e^-x)
        steps.clone() + (-(-steps).exp() + 1.0).log()
    }
}

/// Uniform numbers `[num]`, f32.
pub(super) fn uniform(num: usize, [low, high]: [f64; 2], device: &Device) -> Tensor<1> {
    Tensor::random([num], Distribution::Uniform(low, high), (device, DType::F32))
}

/// `ln(1 + exp(x))`, exact in both tails.
pub(super) fn softplus<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    -log_sigmoid(-x)
}

/// Parts of the last axis, of these widths.
pub(super) fn pieces<const N: usize>(x: Tensor<3>, widths: [usize; N]) -> [Tensor<3>; N] {
    let mut start = 0;
    widths.map(|width| {
        let piece = x.clone().narrow(2, start, width);
        start += width;
        piece
    })
}
