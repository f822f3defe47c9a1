//! Retention: a constant decay per head, and rotary positions.

use burn::config::Config;
use serde::{Deserialize, Serialize};

use crate::nn::attention::{GateParts, Heads, OutputNorm, Parts, layer_of_parts};
use crate::nn::{FeatureMap, Rotary};

/// Configuration to create a retention layer using the [init function](RetentionConfig::init): a
/// [`GatedLinearAttention`](crate::nn::GatedLinearAttention) with a constant decay per head, as in
/// RetNet (Sun et al., arXiv 2307.08621). Queries and keys have rotary positions, after their
/// feature map.
#[derive(Config, Debug)]
pub struct RetentionConfig {
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
    /// Width of all values relative to `hidden_size`. Default: 2.0
    #[config(default = 2.0)]
    pub expand_v: f64,
    /// The decay of each head. Default: that of RetNet
    #[config(default = "FixedDecay::Retention")]
    pub decay: FixedDecay,
    /// Base of the rotary embedding, none if `None`. Default: 10000.0
    #[config(default = "Some(10000.0)")]
    pub rope_theta: Option<f64>,
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
    /// Standard deviation of the initial weights. Default: 0.02
    #[config(default = 0.02)]
    pub initializer_range: f64,
}

/// Constants for the decay of each head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FixedDecay {
    /// RetNet: head `h` keeps `1 - 2^(-5 - h)` of its state in a step.
    Retention,
    /// TransNormerLLM (Qin et al., arXiv 2307.14995): head `h` of `H` keeps
    /// `exp(-(8 / H) (1 - layer / num_layers) h)`. The first head forgets nothing, and later layers
    /// forget less. In a model the layer is the model's.
    Lightning {
        /// Index of the layer, from 0.
        layer: usize,
        /// Number of layers.
        num_layers: usize,
    },
}

impl FixedDecay {
    /// Logarithm of what head `head` of `num_heads` keeps in a step.
    pub fn log_decay(&self, head: usize, num_heads: usize) -> f64 {
        let head = head as f64;
        match *self {
            // ln(1 - x) loses digits where x is small
            Self::Retention => (-(-5.0 - head).exp2()).ln_1p(),
            Self::Lightning { layer, num_layers } => {
                -8.0 / num_heads as f64 * (1.0 - layer as f64 / num_layers as f64) * head
            }
        }
    }
}

layer_of_parts! {
    RetentionConfig,
    /// Panics if `hidden_size * expand_k` or `hidden_size * expand_v` is not a positive multiple of
    /// `num_heads`, if `num_heads` is not a multiple of `num_kv_heads`, if a head has an odd width
    /// to turn, if `rope_theta` or `norm_eps` is not a positive number, or if the decay is of a
    /// layer beyond `num_layers`.
}

impl RetentionConfig {
    fn try_parts(&self) -> Result<Parts, String> {
        let num_heads = [self.num_heads, self.num_kv_heads.unwrap_or(self.num_heads)];
        let heads = Heads::new(self.hidden_size, num_heads, [self.expand_k, self.expand_v])?;
        if let FixedDecay::Lightning { layer, num_layers } = self.decay
            && layer >= num_layers
        {
            return Err(format!(
                "layer = {layer} of the decay must be below num_layers = {num_layers}"
            ));
        }
        let decay = |head| self.decay.log_decay(head, heads.num) as f32;
        let parts = Parts {
            conv_size: self.use_short_conv.then_some(self.conv_size),
            gate: GateParts::Fixed((0..heads.num).map(decay).collect()),
            feature_map: self.feature_map,
            rotary: self.rope_theta.map(|theta| Rotary { theta }),
            output_norm: OutputNorm::gated(self.use_output_gate),
            ..Parts::new(self.hidden_size, heads, self.norm_eps, self.initializer_range)
        };
        parts.checked()
    }
}
