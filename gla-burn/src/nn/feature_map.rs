use burn::tensor::Tensor;
use burn::tensor::activation::{gelu_approximate, relu, sigmoid, silu};
use serde::{Deserialize, Serialize};

use super::log_sigmoid;

/// Elementwise map of the queries and keys, applied after they are split into heads. For maps of
/// whole heads see [`HeadFeatureMap`](crate::nn::HeadFeatureMap).
///
/// Serialises to the names that flash-linear-attention's `feature_map` takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FeatureMap {
    /// `max(x, 0)`
    Relu,
    /// `1 / (1 + exp(-x))`
    Sigmoid,
    /// `ln(sigmoid(x))`
    LogSigmoid,
    /// `x * sigmoid(x)`, also called swish
    #[serde(alias = "swish")]
    Silu,
    /// `max(x, 0)^2`
    SqRelu,
    /// The tanh form of GELU
    Gelu,
    /// `elu(x) + 1`: `x + 1` above 0, `exp(x)` below; positive
    Elu,
}

impl FeatureMap {
    /// Applies the map.
    ///
    /// # Shapes
    ///
    /// - x: any
    /// - output: as `x`
    pub fn apply<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let dtype = x.dtype();
        match self {
            Self::Relu => relu(x),
            Self::Sigmoid => sigmoid(x),
            Self::LogSigmoid => log_sigmoid(x).cast(dtype),
            Self::Silu => silu(x),
            Self::SqRelu => relu(x).square(),
            Self::Gelu => gelu_approximate(x),
            // each part is taken at its own side of 0, where exp cannot overflow
            Self::Elu => relu(x.clone()) + x.clamp_max(0.0).exp(),
        }
    }
}
