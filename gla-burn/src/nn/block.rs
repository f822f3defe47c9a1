use burn::config::Config;
use burn::module::Module;
use burn::tensor::{DType, Device, Tensor};

use super::{
    GlaMlp, GlaMlpConfig, LayerState, Mixer, MixerConfig, Pass, RmsNorm, RmsNormConfig,
    SequenceLayout,
};

/// Configuration to create a [`GlaBlock`] using the [init function](GlaBlockConfig::init).
#[derive(Config, Debug)]
pub struct GlaBlockConfig {
    /// The sequence mixer.
    pub attn: MixerConfig,
    /// The feed-forward layer.
    pub mlp: GlaMlpConfig,
    /// Epsilon of the two norms before them. Default: 1e-6
    #[config(default = 1e-6)]
    pub norm_eps: f64,
}

impl GlaBlockConfig {
    /// Initialize a new [`GlaBlock`] module.
    ///
    /// # Panics
    ///
    /// Panics if the layers differ in `hidden_size`, and as their own `init`.
    pub fn init(&self, device: &Device) -> GlaBlock {
        let hidden = self.attn.hidden_size();
        assert!(
            self.mlp.hidden_size == hidden,
            "GlaBlockConfig: mlp.hidden_size = {} must be attn.hidden_size = {hidden}",
            self.mlp.hidden_size
        );

        let norm = RmsNormConfig::new(hidden).with_epsilon(self.norm_eps);
        GlaBlock {
            attn_norm: norm.init(device),
            attn: self.attn.init(device),
            mlp_norm: norm.init(device),
            mlp: self.mlp.init(device),
        }
    }

    /// Number of parameters of the module, without making it.
    ///
    /// # Panics
    ///
    /// As the `init` of the layers.
    pub fn num_params(&self) -> usize {
        self.attn.num_params() + self.mlp.num_params() + 2 * self.attn.hidden_size()
    }
}

/// Pre-norm block: `R = X + Mixer(norm(X))`, `Y = R + MLP(norm(R))`.
///
/// Should be created using [`GlaBlockConfig`].
#[derive(Module, Debug)]
pub struct GlaBlock {
    /// Norm before the mixer.
    pub attn_norm: RmsNorm,
    /// The sequence mixer: gated linear attention, or what stands in its place.
    pub attn: Mixer,
    /// Norm before the feed-forward layer.
    pub mlp_norm: RmsNorm,
    /// The feed-forward layer.
    pub mlp: GlaMlp,
}

impl GlaBlock {
    /// Applies the block to whole sequences.
    ///
    /// # Shapes
    ///
    /// - x: `[B, T, hidden_size]`
    /// - output: `[B, T, hidden_size]`
    ///
    /// # Panics
    ///
    /// As [`Mixer::forward`].
    pub fn forward(&self, x: Tensor<3>, layout: &SequenceLayout) -> Tensor<3> {
        self.run(x, &layout.into(), None)
    }

    /// Applies the block to the next tokens of sequences whose past is in `state`, and updates it.
    ///
    /// # Shapes
    ///
    /// - x: `[B, T, hidden_size]`, `T >= 1`
    /// - output: `[B, T, hidden_size]`
    ///
    /// # Panics
    ///
    /// As [`Mixer::prefill`].
    pub fn prefill(
        &self,
        x: Tensor<3>,
        layout: &SequenceLayout,
        state: &mut LayerState,
    ) -> Tensor<3> {
        self.run(x, &layout.into(), Some(state))
    }

    /// Applies the block to the next token of sequences whose past is in `state`, and updates it.
    ///
    /// # Shapes
    ///
    /// - x: `[B, hidden_size]`
    /// - output: `[B, hidden_size]`
    ///
    /// # Panics
    ///
    /// As [`Mixer::step`].
    pub fn step(&self, x: Tensor<2>, state: &mut LayerState) -> Tensor<2> {
        self.prefill(x.unsqueeze_dim(1), &SequenceLayout::rows(), state).squeeze_dim(1)
    }

    pub(super) fn run(
        &self,
        x: Tensor<3>,
        pass: &Pass,
        state: Option<&mut LayerState>,
    ) -> Tensor<3> {
        let mixed = self.attn.run(self.attn_norm.forward(x.clone()), pass, state);
        self.feed_forward(x, mixed)
    }

    /// Adds the mixer's output to its input, then the feed-forward layer's.
    fn feed_forward(&self, x: Tensor<3>, mixed: Tensor<3>) -> Tensor<3> {
        let dtype = x.dtype();
        // the norm sees the sum before it is rounded to the model's dtype
        let sum = x.cast(DType::F32) + mixed.cast(DType::F32);
        let normed = self.mlp_norm.forward(sum.clone()).cast(dtype);
        sum.cast(dtype) + self.mlp.forward(normed)
    }
}
