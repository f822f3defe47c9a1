use burn::module::{Module, Param};
use burn::nn::{Embedding, Linear};
use burn::tensor::activation::softmax;
use burn::tensor::module::linear;
use burn::tensor::{DType, Device, Int, Tensor};

use crate::nn::mixer::Pass;
use crate::nn::{GlaBlock, GlaState, GlaStateError, RmsNorm, SequenceLayout};

/// Language model: embedding, [`GlaBlock`]s, norm, output projection. No position
/// embedding but that of the mixers which have one.
///
/// Should be created using [`GlaTransformerConfig`](super::GlaTransformerConfig).
#[derive(Module, Debug)]
pub struct GlaTransformer {
    /// Token embedding.
    pub embeddings: Embedding,
    /// Logits of the lower bounds of the decay, `[num_hidden_layers, channels]`, for mixers that
    /// have some, see [`Hgrn2`](crate::nn::Hgrn2).
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
        self.check_layers(state).unwrap_or_else(|error| panic!("GlaTransformer: {error}"));
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
    /// [`GlaStateError::Layers`], [`GlaStateError::Batch`], [`GlaStateError::Shape`],
    /// [`GlaStateError::Presence`] or [`GlaStateError::Seen`].
    pub fn check_state(&self, state: &GlaState) -> Result<(), GlaStateError> {
        let (batch, mut layers) = (state.batch(), self.layers.iter().zip(&state.layers));
        self.check_layers(state).and_then(|()| {
            layers.try_for_each(|(layer, state)| state.check(&layer.attn.state_shape(batch)))
        })
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

    /// The layers check the rest of their own states.
    fn check_layers(&self, state: &GlaState) -> Result<(), GlaStateError> {
        let (found, expected) = (state.layers.len(), self.layers.len());
        if found != expected {
            return Err(GlaStateError::Layers { found, expected });
        }
        match state.layers.iter().position(|layer| layer.seen != state.seen()) {
            None => Ok(()),
            Some(layer) => Err(GlaStateError::Seen {
                layer,
                found: state.layers[layer].seen.clone(),
                expected: state.seen().to_vec(),
            }),
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
