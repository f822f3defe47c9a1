//! One enum for all mixers, and what they have in common: checks, padding, counting.

use burn::tensor::{DType, Device, Tensor};

use super::{Hgrn2, Mamba, Mamba2, SoftmaxAttention};
use crate::nn::transparent::transparent_module;
use crate::nn::{GatedLinearAttention, LayerState, LayerStateShape, SequenceLayout};

/// What a call brings besides inputs and state.
pub(in crate::nn) struct Pass<'a> {
    /// How the sequences lie.
    pub layout: &'a SequenceLayout,
    /// Lower bound of the decay that the model gives the layer, `[channels]`; see
    /// [`Hgrn2`](crate::nn::Hgrn2).
    pub lower_bound: Option<Tensor<1>>,
}

impl<'a> From<&'a SequenceLayout> for Pass<'a> {
    fn from(layout: &'a SequenceLayout) -> Self {
        Self { layout, lower_bound: None }
    }
}

/// What a kind of mixer is made of; the rest is the same for all.
pub(in crate::nn) trait Mix {
    /// For messages.
    const NAME: &'static str;

    /// Outputs `[B, T, hidden_size]` for inputs of this shape, after the past in `state` if there is
    /// one. The layout has no padding, and the state is as [`Self::state_shape`] says.
    fn mix(&self, x: Tensor<3>, pass: &Pass, state: Option<&mut LayerState>) -> Tensor<3>;

    /// The state for `batch` sequences.
    fn state_shape(&self, batch: usize) -> LayerStateShape;

    /// Type of parameters and inputs.
    fn dtype(&self) -> DType;
}

/// Whole sequences, or their next tokens with a state.
pub(in crate::nn) fn run<M: Mix>(
    mixer: &M,
    x: Tensor<3>,
    pass: &Pass,
    mut state: Option<&mut LayerState>,
) -> Tensor<3> {
    let [batch, tokens, _] = x.dims();
    pass.layout.check(M::NAME, [batch, tokens]);
    if let Some(state) = &mut state {
        assert!(tokens > 0, "{}: x must hold at least 1 token per sequence, got 0", M::NAME);
        let shape = mixer.state_shape(pass.layout.num_sequences(batch));
        if let Err(error) = state.check(&shape) {
            panic!("{}: {error}", M::NAME);
        }
        **state = std::mem::take(&mut **state).into_constants(mixer.dtype());
    }
    let y = pass.layout.without_padding(x, |x, layout| {
        let pass = Pass { layout, lower_bound: pass.lower_bound.clone() };
        mixer.mix(x, &pass, state.as_deref_mut())
    });
    if let Some(state) = state {
        state.advance(pass.layout, [batch, tokens]);
    }
    y
}

/// The methods of a mixer, once for every kind.
macro_rules! mixer_methods {
    ($mixer:ty) => {
        impl $mixer {
            /// Applies the layer to whole sequences, one a row.
            ///
            /// # Shapes
            ///
            /// - x: `[B, T, hidden_size]`
            /// - output: `[B, T, hidden_size]`
            ///
            /// # Panics
            ///
            /// Panics if the last axis of `x` is not `hidden_size`.
            pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
                self.forward_with(x, &SequenceLayout::rows())
            }

            /// Applies the layer to whole sequences, packed or padded as `layout` says.
            ///
            /// # Shapes
            ///
            /// - x: `[B, T, hidden_size]`
            /// - output: `[B, T, hidden_size]`, 0 where the layout has padding
            ///
            /// # Panics
            ///
            /// Panics if the last axis of `x` is not `hidden_size`, or if the layout is not of `x`.
            pub fn forward_with(&self, x: Tensor<3>, layout: &SequenceLayout) -> Tensor<3> {
                $crate::nn::mixer::run(self, x, &layout.into(), None)
            }

            /// Applies the layer to the next tokens of sequences whose past is in `state`, one a
            /// row, and updates it.
            ///
            /// Pieces of any length may follow each other; together they give what
            /// [`forward`](Self::forward) gives.
            ///
            /// # Shapes
            ///
            /// - x: `[B, T, hidden_size]`, `T >= 1`
            /// - output: `[B, T, hidden_size]`
            ///
            /// # Panics
            ///
            /// Panics if the last axis of `x` is not `hidden_size`, or if `state` is not of this
            /// layer and batch size.
            pub fn prefill(&self, x: Tensor<3>, state: &mut LayerState) -> Tensor<3> {
                self.prefill_with(x, &SequenceLayout::rows(), state)
            }

            /// Applies the layer to the next tokens of sequences whose past is in `state`, packed
            /// or padded as `layout` says, and updates it. A sequence without tokens keeps its
            /// state.
            ///
            /// # Shapes
            ///
            /// - x: `[B, T, hidden_size]`, `T >= 1`
            /// - output: `[B, T, hidden_size]`, 0 where the layout has padding
            ///
            /// # Panics
            ///
            /// Panics if the last axis of `x` is not `hidden_size`, or if `layout` and `state` are
            /// not of this layer and batch.
            pub fn prefill_with(
                &self,
                x: Tensor<3>,
                layout: &SequenceLayout,
                state: &mut LayerState,
            ) -> Tensor<3> {
                $crate::nn::mixer::run(self, x, &layout.into(), Some(state))
            }

            /// Applies the layer to the next token of sequences whose past is in `state`, and
            /// updates it.
            ///
            /// # Shapes
            ///
            /// - x: `[B, hidden_size]`
            /// - output: `[B, hidden_size]`
            ///
            /// # Panics
            ///
            /// As [`prefill`](Self::prefill).
            pub fn step(&self, x: Tensor<2>, state: &mut LayerState) -> Tensor<2> {
                self.prefill(x.unsqueeze_dim(1), state).squeeze_dim(1)
            }

            /// The state before the first token of `batch` sequences.
            pub fn init_state(&self, batch: usize, device: &Device) -> LayerState {
                let dtype = $crate::nn::mixer::Mix::dtype(self);
                LayerState::zeros(&self.state_shape(batch), dtype, device)
            }

            /// What the state of `batch` sequences is made of.
            pub fn state_shape(&self, batch: usize) -> LayerStateShape {
                $crate::nn::mixer::Mix::state_shape(self, batch)
            }
        }
    };
}
pub(in crate::nn) use mixer_methods;

transparent_module! {
    /// The sequence mixer of a [`GlaBlock`](crate::nn::GlaBlock), one of several kinds.
    ///
    /// Parameters have the same paths whatever the kind: to a module visitor this is the layer
    /// inside.
    // a model has some dozens, and the largest is the usual one
    #[allow(clippy::large_enum_variant)]
    pub enum Mixer {
        /// Gated linear attention, and what differs from it in its gate: see
        /// [`GatedLinearAttention`].
        Gla(GatedLinearAttention),
        /// HGRN2.
        Hgrn2(Hgrn2),
        /// Mamba-2.
        Mamba2(Mamba2),
        /// Mamba.
        Mamba(Mamba),
        /// Softmax attention.
        SoftmaxAttention(SoftmaxAttention),
    }
}

/// The same for the layer of any kind.
macro_rules! of_kind {
    ($mixer:expr, $layer:ident => $result:expr) => {
        match $mixer {
            Mixer::Gla($layer) => $result,
            Mixer::Hgrn2($layer) => $result,
            Mixer::Mamba2($layer) => $result,
            Mixer::Mamba($layer) => $result,
            Mixer::SoftmaxAttention($layer) => $result,
        }
    };
}

impl Mixer {
    /// Applies the mixer to whole sequences.
    ///
    /// # Shapes
    ///
    /// - x: `[B, T, hidden_size]`
    /// - output: `[B, T, hidden_size]`, 0 where the layout has padding
    ///
    /// # Panics
    ///
    /// Panics if the last axis of `x` is not `hidden_size`, or if the layout is not of `x`.
    pub fn forward(&self, x: Tensor<3>, layout: &SequenceLayout) -> Tensor<3> {
        self.run(x, &layout.into(), None)
    }

    /// Applies the mixer to the next tokens of sequences whose past is in `state`, and updates it.
    ///
    /// # Shapes
    ///
    /// - x: `[B, T, hidden_size]`, `T >= 1`
    /// - output: `[B, T, hidden_size]`, 0 where the layout has padding
    ///
    /// # Panics
    ///
    /// Panics if the last axis of `x` is not `hidden_size`, or if `layout` and `state` are not of
    /// this mixer and batch.
    pub fn prefill(
        &self,
        x: Tensor<3>,
        layout: &SequenceLayout,
        state: &mut LayerState,
    ) -> Tensor<3> {
        self.run(x, &layout.into(), Some(state))
    }

    /// Applies the mixer to the next token of sequences whose past is in `state`, and updates it.
    ///
    /// # Shapes
    ///
    /// - x: `[B, hidden_size]`
    /// - output: `[B, hidden_size]`
    ///
    /// # Panics
    ///
    /// As [`prefill`](Self::prefill).
    pub fn step(&self, x: Tensor<2>, state: &mut LayerState) -> Tensor<2> {
        self.prefill(x.unsqueeze_dim(1), &SequenceLayout::rows(), state).squeeze_dim(1)
    }

    /// The state before the first token of `batch` sequences.
    pub fn init_state(&self, batch: usize, device: &Device) -> LayerState {
        LayerState::zeros(&self.state_shape(batch), of_kind!(self, layer => layer.dtype()), device)
    }

    /// What the state of `batch` sequences is made of.
    pub fn state_shape(&self, batch: usize) -> LayerStateShape {
        of_kind!(self, layer => Mix::state_shape(layer, batch))
    }

    pub(in crate::nn) fn run(
        &self,
        x: Tensor<3>,
        pass: &Pass,
        state: Option<&mut LayerState>,
    ) -> Tensor<3> {
        of_kind!(self, layer => run(layer, x, pass, state))
    }
}
