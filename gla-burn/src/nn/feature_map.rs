use burn::config::Config;
use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::activation::{gelu_approximate, relu, sigmoid, silu};
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::init::projection_with_bias;
use super::log_sigmoid;

/// Elementwise map of the queries and keys, applied after they are split into heads.
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

/// Configuration to create an [`ElementwiseProduct`] using the
/// [init function](ElementwiseProductConfig::init).
#[derive(Config, Debug)]
pub struct ElementwiseProductConfig {
    /// Width of a head.
    pub head_dim: usize,
    /// Standard deviation of the initial weights. Default: 0.02
    #[config(default = 0.02)]
    pub initializer_range: f64,
}

impl ElementwiseProductConfig {
    /// Initialize a new [`ElementwiseProduct`] module.
    pub fn init(&self, device: &Device) -> ElementwiseProduct {
        let (dim, std) = (self.head_dim, self.initializer_range);
        let linear = || projection_with_bias(dim, dim, std, device);
        ElementwiseProduct { layer1: linear(), layer2: linear() }
    }

    /// Number of parameters of the module, without making it.
    pub fn num_params(&self) -> usize {
        2 * (self.head_dim + 1) * self.head_dim
    }
}

/// Learnt feature map, one for all heads: `Y = (X W_1 + b_1) * (X W_2 + b_2)`.
#[derive(Module, Debug)]
pub struct ElementwiseProduct {
    /// First factor, `head_dim -> head_dim`.
    pub layer1: Linear,
    /// Second factor, `head_dim -> head_dim`.
    pub layer2: Linear,
}

impl ElementwiseProduct {
    /// Applies the map.
    ///
    /// # Shapes
    ///
    /// - x: `[..., head_dim]`
    /// - output: as `x`
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        self.layer1.forward(x.clone()) * self.layer2.forward(x)
    }
}
