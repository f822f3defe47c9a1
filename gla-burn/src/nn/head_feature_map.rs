//! Feature maps that look at all channels of a head.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::nn::{Initializer, Linear};
use burn::tensor::activation::{relu, softmax};
use burn::tensor::{Device, Tensor};

use super::init::{projection, projection_with_bias};
use super::rows::project_rows;
use super::transparent::transparent_module;

transparent_module! {
    /// Map of the queries or the keys of [linear attention](crate::nn::LinearAttentionConfig), the
    /// same for all heads. Unlike a [`FeatureMap`](crate::nn::FeatureMap) it looks at a whole head,
    /// and may have parameters and more features than the head has channels.
    pub enum HeadFeatureMap {
        /// Learnt, as wide as the head.
        ElementwiseProduct(ElementwiseProduct),
        /// Learnt, twice as wide, positive.
        Hedgehog(Hedgehog),
        /// Learnt, as wide as the head, not negative.
        T2r(T2r),
        /// Without parameters, `2 nu` times as wide, not negative.
        Dpfp(Dpfp),
    }
}

impl HeadFeatureMap {
    /// Applies the map.
    ///
    /// # Shapes
    ///
    /// - x: `[..., head_dim]`
    /// - output: `[..., head_dim * widening]`
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Self::ElementwiseProduct(map) => map.forward(x),
            Self::Hedgehog(map) => map.forward(x),
            Self::T2r(map) => map.forward(x),
            Self::Dpfp(map) => map.forward(x),
        }
    }

    /// Number of features for each channel of a head.
    pub fn widening(&self) -> usize {
        match self {
            Self::ElementwiseProduct(_) | Self::T2r(_) => 1,
            Self::Hedgehog(_) => 2,
            Self::Dpfp(map) => 2 * map.nu,
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
        project_rows(&self.layer1, x.clone()) * project_rows(&self.layer2, x)
    }
}

/// Configuration to create a [`Hedgehog`] using the [init function](HedgehogConfig::init).
#[derive(Config, Debug)]
pub struct HedgehogConfig {
    /// Width of a head.
    pub head_dim: usize,
}

impl HedgehogConfig {
    /// Initialize a new [`Hedgehog`] module, whose projection is the identity.
    pub fn init(&self, device: &Device) -> Hedgehog {
        let weight = Param::from_tensor(Tensor::eye(self.head_dim, device));
        let bias = Some(Initializer::Zeros.init([self.head_dim], device));
        Hedgehog { layer: Linear { weight, bias } }
    }

    /// Number of parameters of the module, without making it.
    pub fn num_params(&self) -> usize {
        (self.head_dim + 1) * self.head_dim
    }
}

/// Feature map of Hedgehog (Zhang et al., arXiv 2402.04347), which learns to act like softmax
/// attention: `softmax([2 Z, -2 Z])` over the `2 head_dim` features, `Z = X W + b`.
#[derive(Module, Debug)]
pub struct Hedgehog {
    /// `head_dim -> head_dim`
    pub layer: Linear,
}

impl Hedgehog {
    /// Applies the map.
    ///
    /// # Shapes
    ///
    /// - x: `[..., head_dim]`
    /// - output: `[..., 2 head_dim]`, which sum to 1
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let z = project_rows(&self.layer, x) * 2.0;
        softmax(Tensor::cat(vec![z.clone(), -z], D - 1), D - 1)
    }
}

/// Configuration to create a [`T2r`] using the [init function](T2rConfig::init).
#[derive(Config, Debug)]
pub struct T2rConfig {
    /// Width of a head.
    pub head_dim: usize,
    /// Standard deviation of the initial weights. Default: 0.02
    #[config(default = 0.02)]
    pub initializer_range: f64,
}

impl T2rConfig {
    /// Initialize a new [`T2r`] module.
    pub fn init(&self, device: &Device) -> T2r {
        T2r { layer: projection(self.head_dim, self.head_dim, self.initializer_range, device) }
    }

    /// Number of parameters of the module, without making it.
    pub fn num_params(&self) -> usize {
        self.head_dim * self.head_dim
    }
}

/// Feature map of T2R (Kasai et al., arXiv 2103.13076): `max(X W, 0)`.
#[derive(Module, Debug)]
pub struct T2r {
    /// `head_dim -> head_dim`, without a bias.
    pub layer: Linear,
}

impl T2r {
    /// Applies the map.
    ///
    /// # Shapes
    ///
    /// - x: `[..., head_dim]`
    /// - output: as `x`
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        relu(project_rows(&self.layer, x))
    }
}

/// Deterministic parameter-free projection (Schlag et al., arXiv 2102.11174): with
/// `r = max([x, -x], 0)`, feature `(j - 1) 2 head_dim + i` is `r[i] r[i - j]`, where `j` goes from 1
/// to `nu` and indices wrap around.
#[derive(Module, Debug)]
pub struct Dpfp {
    /// Number of products for each entry of `r`.
    pub nu: usize,
}

impl Default for Dpfp {
    /// With `nu` = 4.
    fn default() -> Self {
        Self { nu: 4 }
    }
}

impl Dpfp {
    /// Applies the map.
    ///
    /// # Shapes
    ///
    /// - x: `[..., head_dim]`
    /// - output: `[..., 2 nu head_dim]`
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let r = relu(Tensor::cat(vec![x.clone(), -x], D - 1));
        let width = r.dims()[D - 1];
        let products = (1..=self.nu).map(|j| {
            let last = j % width;
            let ends = [(width - last, last), (0, width - last)];
            let ends = ends.into_iter().filter(|(_, length)| *length > 0);
            let parts = ends.map(|(start, length)| r.clone().narrow(D - 1, start, length));
            r.clone() * Tensor::cat(parts.collect(), D - 1)
        });
        Tensor::cat(products.collect(), D - 1)
    }
}
