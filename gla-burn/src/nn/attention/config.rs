use burn::config::Config;
use burn::tensor::Device;

use super::GatedLinearAttention;
use crate::nn::init::{projection, projection_with_bias};
use crate::nn::{FeatureMap, RmsNormConfig, ShortConvConfig};

/// Configuration to create a [`GatedLinearAttention`] layer using the
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

/// Heads and their widths.
struct Heads {
    num: usize,
    num_kv: usize,
    k_dim: usize,
    v_dim: usize,
}

impl GatedLinearAttentionConfig {
    /// Initialize a new [`GatedLinearAttention`] module.
    ///
    /// # Panics
    ///
    /// Panics if `hidden_size * expand_k` or `hidden_size * expand_v` is not a positive multiple of
    /// `num_heads`, if `num_heads` is not a multiple of `num_kv_heads`, if a size is 0, if
    /// `gate_logit_normalizer` is not positive, or if `clamp_min` is positive.
    pub fn init(&self, device: &Device) -> GatedLinearAttention {
        let heads = self.heads();
        let (hidden, std) = (self.hidden_size, self.initializer_range);
        let [q_width, k_width, v_width] = heads.widths();
        let value_dim = heads.num * heads.v_dim;

        let linear = |d_output| projection(hidden, d_output, std, device);
        let conv = |channels| {
            self.use_short_conv.then(|| {
                ShortConvConfig::new(channels)
                    .with_kernel_size(self.conv_size)
                    .with_initializer_range(std)
                    .init(device)
            })
        };
        let norm = RmsNormConfig::new(heads.v_dim).with_epsilon(self.norm_eps).init(device);
        let (g_norm_swish_gate, g_norm) = match self.use_output_gate {
            true => (Some(norm), None),
            false => (None, Some(norm)),
        };

        GatedLinearAttention {
            q_proj: linear(q_width),
            k_proj: linear(k_width),
            v_proj: linear(v_width),
            q_conv1d: conv(q_width),
            k_conv1d: conv(k_width),
            v_conv1d: conv(v_width),
            gk_proj: [
                linear(self.gate_low_rank_dim),
                projection_with_bias(self.gate_low_rank_dim, k_width, std, device),
            ],
            g_proj: self.use_output_gate.then(|| linear(value_dim)),
            g_norm_swish_gate,
            g_norm,
            o_proj: projection(value_dim, hidden, std, device),
            num_heads: heads.num,
            num_kv_heads: heads.num_kv,
            head_k_dim: heads.k_dim,
            head_v_dim: heads.v_dim,
            gate_logit_normalizer: self.gate_logit_normalizer,
            clamp_min: self.clamp_min,
            feature_map: self.feature_map,
        }
    }

    /// Number of parameters of the module, without making it.
    ///
    /// # Panics
    ///
    /// As [`init`](Self::init).
    pub fn num_params(&self) -> usize {
        let heads = self.heads();
        let (hidden, rank) = (self.hidden_size, self.gate_low_rank_dim);
        let [q, k, v] = heads.widths();
        let value_dim = heads.num * heads.v_dim;

        let projections = hidden * (q + k + v + value_dim);
        let output_gate = usize::from(self.use_output_gate) * hidden * value_dim;
        let convs = usize::from(self.use_short_conv) * self.conv_size * (q + k + v);
        let gate = hidden * rank + rank * k + k;
        projections + output_gate + convs + gate + heads.v_dim
    }

    /// Checks the configuration and derives the heads from it.
    fn heads(&self) -> Heads {
        let num = self.num_heads;
        let num_kv = self.num_kv_heads.unwrap_or(num);
        let head_dim = |name: &str, expand: f64| {
            let dim = (self.hidden_size as f64 * expand) as usize;
            assert!(
                dim > 0 && dim.is_multiple_of(num),
                "GatedLinearAttentionConfig: hidden_size * {name} = {} * {expand} = {dim} must be \
                 a positive multiple of num_heads = {num}",
                self.hidden_size
            );
            dim / num
        };
        let (k_dim, v_dim) =
            (head_dim("expand_k", self.expand_k), head_dim("expand_v", self.expand_v));

        assert!(
            num.is_multiple_of(num_kv),
            "GatedLinearAttentionConfig: num_heads = {num} must be a multiple of num_kv_heads = \
             {num_kv}"
        );
        assert!(
            self.gate_low_rank_dim > 0,
            "GatedLinearAttentionConfig: gate_low_rank_dim must be at least 1, got 0"
        );
        assert!(
            self.gate_logit_normalizer > 0.0,
            "GatedLinearAttentionConfig: gate_logit_normalizer must be positive, got {}",
            self.gate_logit_normalizer
        );
        assert!(
            self.clamp_min.is_none_or(|min| min <= 0.0),
            "GatedLinearAttentionConfig: clamp_min must be at most 0, got {:?}",
            self.clamp_min
        );
        Heads { num, num_kv, k_dim, v_dim }
    }
}

impl Heads {
    /// Widths of all queries, keys and values.
    fn widths(&self) -> [usize; 3] {
        [self.num * self.k_dim, self.num_kv * self.k_dim, self.num_kv * self.v_dim]
    }
}
