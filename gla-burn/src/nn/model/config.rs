use burn::config::Config;
use burn::nn::{EmbeddingConfig, Initializer};
use burn::tensor::Device;

use super::GlaTransformer;
use crate::nn::init::{normal, projection};
use crate::nn::mixer::LayerPlace;
use crate::nn::norm::check_norm_eps;
use crate::nn::{
    FeatureMap, GatedLinearAttentionConfig, GlaBlockConfig, GlaMlpConfig, HybridAttention,
    MixerConfig, RmsNormConfig,
};

/// Configuration to create a [`GlaTransformer`] using the [init
/// function](GlaTransformerConfig::init).
///
/// Fields are named as in flash-linear-attention's `GLAConfig`.
#[derive(Config, Debug)]
pub struct GlaTransformerConfig {
    /// Number of tokens in the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
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
    /// Inner width of the feed-forward layers, see [`GlaMlpConfig::hidden_ratio`]. Default: 4.0
    #[config(default = 4.0)]
    pub hidden_ratio: f64,
    /// Inner width of the feed-forward layers; derived from `hidden_ratio` if `None`.
    pub intermediate_size: Option<usize>,
    /// Whether queries, keys and values pass a short convolution. Default: false
    #[config(default = false)]
    pub use_short_conv: bool,
    /// Kernel size of the short convolutions. Default: 4
    #[config(default = 4)]
    pub conv_size: usize,
    /// Whether a swish gate multiplies the attention's normalised output. Default: true
    #[config(default = true)]
    pub use_output_gate: bool,
    /// Epsilon of all norms. Default: 1e-6
    #[config(default = 1e-6)]
    pub norm_eps: f64,
    /// Whether the embedding is the output projection too. Default: false
    #[config(default = false)]
    pub tie_word_embeddings: bool,
    /// Standard deviation of the initial weights. Default: 0.02
    #[config(default = 0.02)]
    pub initializer_range: f64,
    /// The temperature: divides the logarithm of the gate. Default: 16.0
    #[config(default = 16.0)]
    pub gate_logit_normalizer: f64,
    /// Rank of the gate's projection. Default: 16
    #[config(default = 16)]
    pub gate_low_rank_dim: usize,
    /// Lower bound of the log gate.
    pub clamp_min: Option<f64>,
    /// Map of queries and keys.
    pub feature_map: Option<FeatureMap>,
    /// What stands in the place of gated linear attention in all blocks. The width, the epsilon of
    /// the norms and the initial weights are the model's, whatever it says; the fields above that
    /// are about gated linear attention are then without effect.
    pub mixer: Option<MixerConfig>,
    /// Layers of softmax attention among the others.
    pub attn: Option<HybridAttention>,
}

impl GlaTransformerConfig {
    /// Initialize a new [`GlaTransformer`] module.
    ///
    /// # Panics
    ///
    /// Panics if the sizes do not fit each other, see the `init` of the mixers' configurations and
    /// [`HybridAttention::check`].
    pub fn init(&self, device: &Device) -> GlaTransformer {
        let (vocab, hidden, std) = (self.vocab_size, self.hidden_size, self.initializer_range);
        GlaTransformer {
            embeddings: EmbeddingConfig::new(vocab, hidden)
                .with_initializer(normal(std))
                .init(device),
            lower_bounds: self.lower_bounds().map(|shape| Initializer::Zeros.init(shape, device)),
            layers: self.blocks().map(|block| block.init(device)).collect(),
            norm: RmsNormConfig::new(hidden).with_epsilon(self.norm_eps).init(device),
            lm_head: (!self.tie_word_embeddings).then(|| projection(hidden, vocab, std, device)),
        }
    }

    /// Configurations of the blocks, in order.
    pub fn blocks(&self) -> impl Iterator<Item = GlaBlockConfig> {
        (0..self.num_hidden_layers).map(|layer| self.block(layer))
    }

    /// Configuration of block `layer`.
    ///
    /// # Panics
    ///
    /// Panics if there is no such block, or if [`HybridAttention::check`] finds something.
    pub fn block(&self, layer: usize) -> GlaBlockConfig {
        assert!(
            layer < self.num_hidden_layers,
            "GlaTransformerConfig: layer = {layer} must be below num_hidden_layers = {}",
            self.num_hidden_layers
        );
        if let Some(attn) = &self.attn {
            attn.check(self.num_hidden_layers, self.hidden_size)
                .unwrap_or_else(|error| panic!("GlaTransformerConfig: {error}"));
        }
        let place = LayerPlace {
            hidden_size: self.hidden_size,
            norm_eps: self.norm_eps,
            initializer_range: self.initializer_range,
            layer,
            num_layers: self.num_hidden_layers,
        };
        let mixer = match self.attn.as_ref().and_then(|attn| attn.at(layer)) {
            Some(spec) => MixerConfig::SoftmaxAttention(spec.layer(self.hidden_size)),
            None => self.layer_mixer(),
        };
        GlaBlockConfig::new(mixer.at(place), self.mlp()).with_norm_eps(self.norm_eps)
    }

    fn mlp(&self) -> GlaMlpConfig {
        GlaMlpConfig {
            hidden_size: self.hidden_size,
            hidden_ratio: self.hidden_ratio,
            intermediate_size: self.intermediate_size,
            initializer_range: self.initializer_range,
        }
    }

    /// The mixer of the layers that `attn` does not list.
    pub(crate) fn layer_mixer(&self) -> MixerConfig {
        self.mixer.clone().unwrap_or_else(|| MixerConfig::Gla(self.attention()))
    }

    /// Shape of the lower bounds of all layers, if their mixer has some.
    fn lower_bounds(&self) -> Option<[usize; 2]> {
        if self.num_hidden_layers == 0 {
            return None;
        }
        let config = self.clone().with_attn(None).block(0).attn;
        config.lower_bound().map(|width| [self.num_hidden_layers, width])
    }

    /// The layers of gated linear attention.
    fn attention(&self) -> GatedLinearAttentionConfig {
        GatedLinearAttentionConfig {
            hidden_size: self.hidden_size,
            num_heads: self.num_heads,
            num_kv_heads: self.num_kv_heads,
            expand_k: self.expand_k,
            expand_v: self.expand_v,
            feature_map: self.feature_map,
            use_short_conv: self.use_short_conv,
            conv_size: self.conv_size,
            use_output_gate: self.use_output_gate,
            norm_eps: self.norm_eps,
            gate_logit_normalizer: self.gate_logit_normalizer,
            gate_low_rank_dim: self.gate_low_rank_dim,
            clamp_min: self.clamp_min,
            initializer_range: self.initializer_range,
        }
    }

    /// Says what is wrong with the configuration, if anything is.
    ///
    /// # Errors
    ///
    /// What [`init`](Self::init) would panic with, or which size is 0.
    pub fn check(&self) -> Result<(), String> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("intermediate_size", self.intermediate_size.unwrap_or(1)),
            ("hidden_size * hidden_ratio", self.mlp().inner_size()),
        ];
        if let Some((name, _)) = sizes.into_iter().find(|(_, size)| *size == 0) {
            return Err(format!("{name} must be at least 1, got 0"));
        }
        check_norm_eps(self.norm_eps)?;
        if let Some(attn) = &self.attn {
            let checked = attn.check(self.num_hidden_layers, self.hidden_size);
            checked.map_err(|error| error.to_string())?;
        }
        self.blocks().try_for_each(|block| block.attn.check())
    }

    /// Number of parameters of the model, without making it; a tied embedding counts once.
    ///
    /// # Panics
    ///
    /// As [`init`](Self::init).
    pub fn num_params(&self) -> usize {
        let embeddings = self.vocab_size * self.hidden_size;
        let tables = if self.tie_word_embeddings { 1 } else { 2 };
        let blocks: usize = self.blocks().map(|block| block.num_params()).sum();
        let bounds: usize = self.lower_bounds().map_or(0, |[layers, width]| layers * width);
        tables * embeddings + bounds + blocks + self.hidden_size
    }
}
