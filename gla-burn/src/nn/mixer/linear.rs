//! Linear attention: no decay.

use burn::config::Config;
use burn::tensor::Device;
use serde::{Deserialize, Serialize};

use crate::nn::attention::{Heads, OutputNorm, Parts};
use crate::nn::{FeatureMap, GatedLinearAttention};

/// Configuration to create a layer of linear attention (Katharopoulos et al., arXiv 2006.16236), a
/// [`GatedLinearAttention`] without a gate, using the [init function](LinearAttentionConfig::init).
#[derive(Config, Debug)]
pub struct LinearAttentionConfig {
    /// Width of the input and the output.
    pub hidden_size: usize,
    /// Number of heads. Default: 8
    #[config(default = 8)]
    pub num_heads: usize,
    /// Number of heads of keys and values; as many as `num_heads` if `None`.
    pub num_kv_heads: Option<usize>,
    /// Width of all queries relative to `hidden_size`. Default: 1.0
    #[config(default = 1.0)]
    pub expand_k: f64,
    /// Width of all values relative to `hidden_size`. Default: 1.0
    #[config(default = 1.0)]
    pub expand_v: f64,
    /// Map of queries and keys. Default: the learnt product
    #[config(default = "LinearFeatureMap::ElementwiseProduct")]
    pub feature_map: LinearFeatureMap,
    /// Whether outputs are divided by the sum of their weights, plus 1e-10. Wants positive
    /// features. Default: false
    #[config(default = false)]
    pub do_feature_map_norm: bool,
    /// Epsilon of the output norm. Default: 1e-5
    #[config(default = 1e-5)]
    pub norm_eps: f64,
    /// Standard deviation of the initial weights. Default: 0.02
    #[config(default = 0.02)]
    pub initializer_range: f64,
}

/// Feature maps of linear attention, by the names of flash-linear-attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinearFeatureMap {
    /// [`ElementwiseProduct`](crate::nn::ElementwiseProduct), one for queries and one for keys.
    ElementwiseProduct,
    /// [`FeatureMap::Elu`]
    Elu,
    /// [`FeatureMap::Relu`]
    Relu,
    /// None.
    Identity,
}

impl LinearAttentionConfig {
    /// Initialize a new layer.
    ///
    /// # Panics
    ///
    /// Panics if `hidden_size * expand_k` or `hidden_size * expand_v` is not a positive multiple of
    /// `num_heads`, if `num_heads` is not a multiple of `num_kv_heads`, or if `norm_eps` is not
    /// positive.
    pub fn init(&self, device: &Device) -> GatedLinearAttention {
        self.parts().init(device)
    }

    /// Number of parameters of the module, without making it.
    ///
    /// # Panics
    ///
    /// As [`init`](Self::init).
    pub fn num_params(&self) -> usize {
        self.parts().num_params()
    }

    /// Says what is wrong with the configuration, if anything is.
    ///
    /// # Errors
    ///
    /// What [`init`](Self::init) would panic with.
    pub fn check(&self) -> Result<(), String> {
        self.try_parts().map(drop)
    }

    fn parts(&self) -> Parts {
        self.try_parts().unwrap_or_else(|reason| panic!("LinearAttentionConfig: {reason}"))
    }

    fn try_parts(&self) -> Result<Parts, String> {
        let num_heads = [self.num_heads, self.num_kv_heads.unwrap_or(self.num_heads)];
        let heads = Heads::new(self.hidden_size, num_heads, [self.expand_k, self.expand_v])?;
        let parts = Parts {
            feature_map: match self.feature_map {
                LinearFeatureMap::Elu => Some(FeatureMap::Elu),
                LinearFeatureMap::Relu => Some(FeatureMap::Relu),
                LinearFeatureMap::ElementwiseProduct | LinearFeatureMap::Identity => None,
            },
            elementwise_product: self.feature_map == LinearFeatureMap::ElementwiseProduct,
            normalize: self.do_feature_map_norm,
            output_norm: OutputNorm::Named,
            ..Parts::new(self.hidden_size, heads, self.norm_eps, self.initializer_range)
        };
        parts.checked()
    }
}
