use burn::config::Config;
use burn::module::{Module, Param};
use burn::nn::{Embedding, EmbeddingConfig, Initializer, Linear};
use burn::tensor::activation::softmax;
use burn::tensor::module::linear;
use burn::tensor::{DType, Device, Int, Tensor};

use super::init::{normal, projection};
use super::{
    FeatureMap, GatedLinearAttentionConfig, GlaBlock, GlaBlockConfig, GlaMlpConfig, GlaState,
    GlaStateError, HybridAttention, LayerPlace, MixerConfig, Pass, RmsNorm, RmsNormConfig,
    SequenceLayout,
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
        let mlp = GlaMlpConfig {
            hidden_size: self.hidden_size,
            hidden_ratio: self.hidden_ratio,
            intermediate_size: self.intermediate_size,
            initializer_range: self.initializer_range,
        };
        GlaBlockConfig::new(mixer.at(place), mlp).with_norm_eps(self.norm_eps)
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
        ];
        if let Some((name, _)) = sizes.into_iter().find(|(_, size)| *size == 0) {
            return Err(format!("{name} must be at least 1, got 0"));
        }
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

/// Language model: embedding, [`GlaBlock`]s, norm, output projection. No position embedding.
///
/// Should be created using [`GlaTransformerConfig`].
#[derive(Module, Debug)]
pub struct GlaTransformer {
    /// Token embedding.
    pub embeddings: Embedding,
    /// Logits of the lower bounds of the decay, `[num_hidden_layers, channels]`, for mixers that
    /// have some, see [`Hgrn2`](super::Hgrn2).
    pub lower_bounds: Option<Param<Tensor<2>>>,
    /// The blocks, in order.
    pub layers: Vec<GlaBlock>,
    /// Norm after the last block.
    pub norm: RmsNorm,
    /// Output projection; `None` if it is the embedding, transposed.
    pub lm_head: Option<Linear>,
}

impl GlaTransformer {
    /// Logits of whole sequences: position `t` predicts token `t + 1`.
    ///
    /// # Shapes
    ///
    /// - ids: `[B, T]`
    /// - output: `[B, T, vocab_size]`
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        self.logits(self.hidden(ids))
    }

    /// [`forward`](Self::forward) up to the output projection, for losses that project piece by
    /// piece.
    ///
    /// # Shapes
    ///
    /// - ids: `[B, T]`
    /// - output: `[B, T, hidden_size]`
    pub fn hidden(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        self.hidden_with(ids, &SequenceLayout::rows())
    }

    /// [`forward`](Self::forward) of sequences that are packed or padded as `layout` says.
    ///
    /// # Shapes
    ///
    /// - ids: `[B, T]`
    /// - output: `[B, T, vocab_size]`, 0 where the layout has padding
    ///
    /// # Panics
    ///
    /// Panics if the layout is not of `ids`.
    pub fn forward_with(&self, ids: Tensor<2, Int>, layout: &SequenceLayout) -> Tensor<3> {
        self.logits(self.hidden_with(ids, layout))
    }

    /// [`hidden`](Self::hidden) of sequences that are packed or padded as `layout` says.
    ///
    /// # Shapes
    ///
    /// - ids: `[B, T]`
    /// - output: `[B, T, hidden_size]`, 0 where the layout has padding
    ///
    /// # Panics
    ///
    /// Panics if the layout is not of `ids`.
    pub fn hidden_with(&self, ids: Tensor<2, Int>, layout: &SequenceLayout) -> Tensor<3> {
        let [batch, tokens] = ids.dims();
        layout.check("GlaTransformer", [batch, tokens]);
        // padding leaves once, before the first layer
        layout.without_padding(ids.unsqueeze_dim(2), |ids, layout| {
            let x = self.embeddings.forward(ids.squeeze_dim(2));
            let layers = self.layers.iter().zip(self.passes(layout));
            let x = layers.fold(x, |x, (layer, pass)| layer.run(x, &pass, None));
            self.norm.forward(x)
        })
    }

    /// The output projection.
    ///
    /// # Shapes
    ///
    /// - x: `[..., hidden_size]`
    /// - output: `[..., vocab_size]`
    pub fn logits<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match &self.lm_head {
            Some(head) => head.forward(x),
            None => linear(x, self.embeddings.weight.val().transpose(), None),
        }
    }

    /// Logits of the next tokens of sequences whose past is in `state`, which is updated.
    ///
    /// A prompt may come in pieces of any length; together they give what
    /// [`forward`](Self::forward) gives.
    ///
    /// # Shapes
    ///
    /// - ids: `[B, T]`, `T >= 1`
    /// - output: `[B, T, vocab_size]`
    ///
    /// # Panics
    ///
    /// Panics if `state` is not of this model and batch size.
    pub fn prefill(&self, ids: Tensor<2, Int>, state: &mut GlaState) -> Tensor<3> {
        self.logits(self.prefill_hidden(ids, state))
    }

    /// [`prefill`](Self::prefill) up to the output projection, for prompts of which only the last
    /// position is to be projected.
    ///
    /// # Shapes
    ///
    /// - ids: `[B, T]`, `T >= 1`
    /// - output: `[B, T, hidden_size]`
    ///
    /// # Panics
    ///
    /// Panics if `state` is not of this model and batch size.
    pub fn prefill_hidden(&self, ids: Tensor<2, Int>, state: &mut GlaState) -> Tensor<3> {
        self.prefill_hidden_with(ids, &SequenceLayout::rows(), state)
    }

    /// [`prefill`](Self::prefill) of tokens that are packed or padded as `layout` says: prompts of
    /// different lengths, for example. A sequence without tokens keeps its state.
    ///
    /// # Shapes
    ///
    /// - ids: `[B, T]`, `T >= 1`
    /// - output: `[B, T, vocab_size]`, 0 where the layout has padding
    ///
    /// # Panics
    ///
    /// Panics if `layout` or `state` is not of this model and batch.
    pub fn prefill_with(
        &self,
        ids: Tensor<2, Int>,
        layout: &SequenceLayout,
        state: &mut GlaState,
    ) -> Tensor<3> {
        self.logits(self.prefill_hidden_with(ids, layout, state))
    }

    /// [`prefill_with`](Self::prefill_with) up to the output projection.
    ///
    /// # Shapes
    ///
    /// - ids: `[B, T]`, `T >= 1`
    /// - output: `[B, T, hidden_size]`, 0 where the layout has padding
    ///
    /// # Panics
    ///
    /// Panics if `layout` or `state` is not of this model and batch.
    pub fn prefill_hidden_with(
        &self,
        ids: Tensor<2, Int>,
        layout: &SequenceLayout,
        state: &mut GlaState,
    ) -> Tensor<3> {
        let [batch, tokens] = ids.dims();
        layout.check("GlaTransformer", [batch, tokens]);
        self.expect_layers(state);
        layout.without_padding(ids.unsqueeze_dim(2), |ids, layout| {
            let mut x = self.embeddings.forward(ids.squeeze_dim(2));
            let layers = self.layers.iter().zip(self.passes(layout));
            for ((layer, pass), state) in layers.zip(&mut state.layers) {
                x = layer.run(x, &pass, Some(state));
            }
            self.norm.forward(x)
        })
    }

    /// Logits after the next token of sequences whose past is in `state`, which is updated.
    ///
    /// # Shapes
    ///
    /// - ids: `[B]`
    /// - output: `[B, vocab_size]`
    ///
    /// # Panics
    ///
    /// Panics if `state` is not of this model and batch size.
    pub fn step(&self, ids: Tensor<1, Int>, state: &mut GlaState) -> Tensor<2> {
        self.prefill(ids.unsqueeze_dim(1), state).squeeze_dim(1)
    }

    /// The state before the first token of `batch` sequences.
    pub fn init_state(&self, batch: usize, device: &Device) -> GlaState {
        let layers = self.layers.iter();
        GlaState { layers: layers.map(|layer| layer.attn.init_state(batch, device)).collect() }
    }

    /// Checks that a state, for example a loaded one, is of this model.
    ///
    /// # Errors
    ///
    /// [`GlaStateError::Layers`], [`GlaStateError::Shape`] or [`GlaStateError::Presence`].
    pub fn check_state(&self, state: &GlaState) -> Result<(), GlaStateError> {
        let (found, expected) = (state.layers.len(), self.layers.len());
        if found != expected {
            return Err(GlaStateError::Layers { found, expected });
        }
        let batch = state.batch();
        let mut pairs = self.layers.iter().zip(&state.layers);
        pairs.try_for_each(|(layer, state)| state.check(&layer.attn.state_shape(batch)))
    }

    /// What each layer is given besides inputs and state.
    fn passes<'a>(&self, layout: &'a SequenceLayout) -> impl Iterator<Item = Pass<'a>> {
        // the first layer has no bound, the next that of the second part of a softmax over all
        // layers, the next that of the second and the third, ..
        let bounds = self.lower_bounds.as_ref().map(|logits| {
            let parts = softmax(logits.val().cast(DType::F32), 0);
            parts.clone().cumsum(0) - parts.narrow(0, 0, 1)
        });
        (0..self.layers.len()).map(move |layer| {
            let bound = bounds.as_ref().filter(|_| layer > 0);
            let lower_bound = bound.map(|bounds| bounds.clone().narrow(0, layer, 1).squeeze_dim(0));
            Pass { layout, lower_bound }
        })
    }

    /// The layers check their own states.
    fn expect_layers(&self, state: &GlaState) {
        let (found, expected) = (state.layers.len(), self.layers.len());
        if found != expected {
            panic!("GlaTransformer: {}", GlaStateError::Layers { found, expected });
        }
    }
}

/// Full name in a flash-linear-attention checkpoint of the parameter at `path` of a
/// [`GlaTransformer`].
///
/// All but the output projection live under `model.`:
///
/// ```
/// # use gla_burn::fla_name;
/// assert_eq!(fla_name("layers.0.attn.q_proj.weight"), "model.layers.0.attn.q_proj.weight");
/// assert_eq!(fla_name("lm_head.weight"), "lm_head.weight");
/// ```
///
/// Shapes agree but for the weights of [`Linear`], which Burn stores transposed.
pub fn fla_name(path: &str) -> String {
    match path.starts_with("lm_head.") {
        true => path.to_string(),
        false => format!("model.{path}"),
    }
}
