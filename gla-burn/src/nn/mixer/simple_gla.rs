//! Gated linear attention with one gate a head.

use burn::config::Config;

use crate::nn::FeatureMap;
use crate::nn::attention::{GateParts, Heads, OutputNorm, Parts, layer_of_parts};

/// Configuration to create a layer with one data-dependent gate a head, a
/// [`GatedLinearAttention`](crate::nn::GatedLinearAttention), using the [init
/// function](SimpleGlaConfig::init). Also known as gated retention.
///
/// The gate is a full projection: `g = logsigmoid(x W + b) / gate_logit_normalizer`.
#[derive(Config, Debug)]
pub struct SimpleGlaConfig {
    /// Width of the input and the output.
    pub hidden_size: usize,
    /// Number of heads. Default: 4
    #[config(default = 4)]
    pub num_heads: usize,
    /// Width of all queries relative to `hidden_size`. Default: 1.0
    #[config(default = 1.0)]
    pub expand_k: f64,
    /// Width of all values relative to `hidden_size`. Default: 1.0
    #[config(default = 1.0)]
    pub expand_v: f64,
    /// Map of queries and keys.
    pub feature_map: Option<FeatureMap>,
    /// Whether queries, keys and values pass a [`ShortConv`](crate::nn::ShortConv). Default: true
    #[config(default = true)]
    pub use_short_conv: bool,
    /// Kernel size of the short convolutions. Default: 4
    #[config(default = 4)]
    pub conv_size: usize,
    /// Epsilon of the output norm. Default: 1e-5
    #[config(default = 1e-5)]
    pub norm_eps: f64,
    /// The temperature: divides the logarithm of the gate. Default: 16.0
    #[config(default = 16.0)]
    pub gate_logit_normalizer: f64,
    /// Standard deviation of the initial weights. Default: 0.02
    #[config(default = 0.02)]
    pub initializer_range: f64,
}

layer_of_parts! {
    SimpleGlaConfig,
    /// Panics if `hidden_size * expand_k` or `hidden_size * expand_v` is not a positive multiple of
    /// `num_heads`, if a size is 0, or if `gate_logit_normalizer` or `norm_eps` is not positive.
}

impl SimpleGlaConfig {
    fn try_parts(&self) -> Result<Parts, String> {
        let (num_heads, expand) = ([self.num_heads; 2], [self.expand_k, self.expand_v]);
        let heads = Heads::new(self.hidden_size, num_heads, expand)?;
        let parts = Parts {
            conv_size: self.use_short_conv.then_some(self.conv_size),
            gate: GateParts::Scalar,
            gate_logit_normalizer: self.gate_logit_normalizer,
            feature_map: self.feature_map,
            output_norm: OutputNorm::Gated,
            ..Parts::new(self.hidden_size, heads, self.norm_eps, self.initializer_range)
        };
        parts.checked()
    }
}
