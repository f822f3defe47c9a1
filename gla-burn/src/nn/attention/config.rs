use burn::config::Config;

use super::{GateParts, Heads, OutputNorm, Parts, layer_of_parts};
use crate::nn::FeatureMap;

/// Configuration to create a [`GatedLinearAttention`](crate::nn::GatedLinearAttention) layer using the
/// [init function](GatedLinearAttentionConfig::init).
#[derive(Config, Debug)]
pub struct GatedLinearAttentionConfig {
    /// Width of the input and the output.
    pub hidden_size: usize,
    /// Number of heads. Default: 4
    #[config(default = 4)]
    pub num_heads: usize,
    /// Number of heads of keys, values and gates; as many as `num_heads` if `None`.
    pub num_kv_heads: Option<usize>,
    /// Width of all queries relative to `hidden_size`. Default: 0.5
    #[config(default = 0.5)]
    pub expand_k: f64,
    /// Width of all values relative to `hidden_size`. Default: 1.0
    #[config(default = 1.0)]
    pub expand_v: f64,
    /// Map of queries and keys.
    pub feature_map: Option<FeatureMap>,
    /// Whether queries, keys and values pass a [`ShortConv`](crate::nn::ShortConv). Default: false
    #[config(default = false)]
    pub use_short_conv: bool,
    /// Kernel size of the short convolutions. Default: 4
    #[config(default = 4)]
    pub conv_size: usize,
    /// Whether a swish gate multiplies the normalised output. Default: true
    #[config(default = true)]
    pub use_output_gate: bool,
    /// Epsilon of the output norm. Default: 1e-5
    #[config(default = 1e-5)]
    pub norm_eps: f64,
    /// The temperature: divides the logarithm of the gate. Default: 16.0
    #[config(default = 16.0)]
    pub gate_logit_normalizer: f64,
    /// Rank of the gate's projection. Default: 16
    #[config(default = 16)]
    pub gate_low_rank_dim: usize,
    /// Lower bound of the log gate.
    pub clamp_min: Option<f64>,
    /// Standard deviation of the initial weights. Default: 0.02
    #[config(default = 0.02)]
    pub initializer_range: f64,
}

layer_of_parts! {
    GatedLinearAttentionConfig,
    /// Panics if `hidden_size * expand_k` or `hidden_size * expand_v` is not a positive multiple of
    /// `num_heads`, if `num_heads` is not a multiple of `num_kv_heads`, if a size is 0, if
    /// `gate_logit_normalizer` or `norm_eps` is not positive, or if `clamp_min` is positive.
}

impl GatedLinearAttentionConfig {
    fn try_parts(&self) -> Result<Parts, String> {
        let num_heads = [self.num_heads, self.num_kv_heads.unwrap_or(self.num_heads)];
        let heads = Heads::new(self.hidden_size, num_heads, [self.expand_k, self.expand_v])?;
        let parts = Parts {
            conv_size: self.use_short_conv.then_some(self.conv_size),
            gate: GateParts::Vector(self.gate_low_rank_dim),
            gate_logit_normalizer: self.gate_logit_normalizer,
            clamp_min: self.clamp_min,
            feature_map: self.feature_map,
            output_norm: OutputNorm::gated(self.use_output_gate),
            ..Parts::new(self.hidden_size, heads, self.norm_eps, self.initializer_range)
        };
        parts.checked()
    }
}
