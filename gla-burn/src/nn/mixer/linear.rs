//! Linear attention: no decay.

use burn::config::Config;
use burn::tensor::Device;
use serde::{Deserialize, Serialize};

use crate::nn::attention::{Heads, OutputNorm, Parts, layer_of_parts};
use crate::nn::{
    Dpfp, ElementwiseProductConfig, FeatureMap, HeadFeatureMap, HedgehogConfig, T2rConfig,
};

/// Configuration to create a layer of linear attention (Katharopoulos et al., arXiv 2006.16236), a
/// [`GatedLinearAttention`](crate::nn::GatedLinearAttention) without a gate, using the [init
/// function](LinearAttentionConfig::init).
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

/// Feature maps of linear attention, by the names of flash-linear-attention. Those with parameters
/// are two, one for queries and one for keys.
///
/// The state has a row per feature, so a map with more features than channels makes it larger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinearFeatureMap {
    /// [`ElementwiseProduct`](crate::nn::ElementwiseProduct)
    ElementwiseProduct,
    /// [`Hedgehog`](crate::nn::Hedgehog), with 2 features a channel.
    Hedgehog,
    /// [`T2r`](crate::nn::T2r)
    T2r,
    /// [`Dpfp`] with `nu` = 4, and so 8 features a channel.
    Dpfp,
    /// [`FeatureMap::Elu`]
    Elu,
    /// [`FeatureMap::Relu`]
    Relu,
    /// None.
    Identity,
}

impl LinearFeatureMap {
    /// The map of heads of width `dim`, if it is one of whole heads.
    pub(in crate::nn) fn init(
        self,
        dim: usize,
        initializer_range: f64,
        device: &Device,
    ) -> Option<HeadFeatureMap> {
        match self {
            Self::ElementwiseProduct => {
                let config = ElementwiseProductConfig::new(dim);
                Some(config.with_initializer_range(initializer_range).init(device).into())
            }
            Self::Hedgehog => Some(HedgehogConfig::new(dim).init(device).into()),
            Self::T2r => {
                let config = T2rConfig::new(dim);
                Some(config.with_initializer_range(initializer_range).init(device).into())
            }
            Self::Dpfp => Some(Dpfp::default().into()),
            Self::Elu | Self::Relu | Self::Identity => None,
        }
    }

    /// Number of parameters of one such map of heads of width `dim`.
    pub(in crate::nn) fn num_params(self, dim: usize) -> usize {
        match self {
            Self::ElementwiseProduct => ElementwiseProductConfig::new(dim).num_params(),
            Self::Hedgehog => HedgehogConfig::new(dim).num_params(),
            Self::T2r => T2rConfig::new(dim).num_params(),
            Self::Dpfp | Self::Elu | Self::Relu | Self::Identity => 0,
        }
    }

    /// The map of single channels, if it is one of these.
    fn of_channels(self) -> Option<FeatureMap> {
        match self {
            Self::Elu => Some(FeatureMap::Elu),
            Self::Relu => Some(FeatureMap::Relu),
            _ => None,
        }
    }
}

layer_of_parts! {
    LinearAttentionConfig,
    /// Panics if `hidden_size * expand_k` or `hidden_size * expand_v` is not a positive multiple of
    /// `num_heads`, if `num_heads` is not a multiple of `num_kv_heads`, or if `norm_eps` is not
    /// positive.
}

impl LinearAttentionConfig {
    fn try_parts(&self) -> Result<Parts, String> {
        let num_heads = [self.num_heads, self.num_kv_heads.unwrap_or(self.num_heads)];
        let heads = Heads::new(self.hidden_size, num_heads, [self.expand_k, self.expand_v])?;
        let parts = Parts {
            feature_map: self.feature_map.of_channels(),
            head_feature_map: self.feature_map,
            normalize: self.do_feature_map_norm,
            output_norm: OutputNorm::Named,
            ..Parts::new(self.hidden_size, heads, self.norm_eps, self.initializer_range)
        };
        parts.checked()
    }
}
