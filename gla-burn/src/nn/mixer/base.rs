//! One enum for all mixers, and what they have in common: checks, padding, counting.

use burn::module::{
    Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor,
};
use burn::tensor::{DType, Device, Tensor};

use super::SoftmaxAttention;
use crate::nn::{GatedLinearAttention, LayerState, LayerStateShape, SequenceLayout};

/// What a kind of mixer is made of; the rest is the same for all.
pub(in crate::nn) trait Mix {
    /// For messages.
    const NAME: &'static str;

    /// Outputs `[B, T, hidden_size]` for inputs of this shape, after the past in `state` if there is
    /// one. The layout has no padding, and the state is as [`Self::state_shape`] says.
    fn mix(
        &self,
        x: Tensor<3>,
        layout: &SequenceLayout,
        state: Option<&mut LayerState>,
    ) -> Tensor<3>;

    /// The state for `batch` sequences.
    fn state_shape(&self, batch: usize) -> LayerStateShape;

    /// Type of parameters and inputs.
    fn dtype(&self) -> DType;
}

/// Whole sequences, or their next tokens with a state.
pub(in crate::nn) fn run<M: Mix>(
    mixer: &M,
    x: Tensor<3>,
    layout: &SequenceLayout,
    state: Option<&mut LayerState>,
) -> Tensor<3> {
    let [batch, tokens, _] = x.dims();
    layout.check(M::NAME, [batch, tokens]);
    let Some(state) = state else {
        return layout.without_padding(x, |x, layout| mixer.mix(x, layout, None));
    };

    assert!(tokens > 0, "{}: x must hold at least 1 token per sequence, got 0", M::NAME);
    let shape = mixer.state_shape(layout.num_sequences(batch));
    if let Err(error) = state.check(&shape) {
        panic!("{}: {error}", M::NAME);
    }
    *state = std::mem::take(state).without_autodiff();
    let y = layout.without_padding(x, |x, layout| mixer.mix(x, layout, Some(&mut *state)));
    state.advance(layout, [batch, tokens]);
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
                $crate::nn::mixer::run(self, x, layout, None)
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
                $crate::nn::mixer::run(self, x, layout, Some(state))
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

/// Makes [`Mixer`] from its kinds.
macro_rules! mixers {
    ($($(#[$doc:meta])* $kind:ident($layer:ty),)*) => {
        /// The sequence mixer of a [`GlaBlock`](crate::nn::GlaBlock), one of several kinds.
        ///
        /// To a module visitor it is the layer inside: parameters have the same paths whatever the
        /// kind. A derived [`Module`] would put the name of the kind into them, and with it into
        /// checkpoints.
        #[derive(Clone, Debug)]
        pub enum Mixer {
            $($(#[$doc])* $kind($layer),)*
        }

        $(impl From<$layer> for Mixer {
            fn from(layer: $layer) -> Self {
                Self::$kind(layer)
            }
        })*

        impl Mixer {
            fn run(
                &self,
                x: Tensor<3>,
                layout: &SequenceLayout,
                state: Option<&mut LayerState>,
            ) -> Tensor<3> {
                match self {
                    $(Self::$kind(layer) => run(layer, x, layout, state),)*
                }
            }

            /// What the state of `batch` sequences is made of.
            pub fn state_shape(&self, batch: usize) -> LayerStateShape {
                match self {
                    $(Self::$kind(layer) => Mix::state_shape(layer, batch),)*
                }
            }

            fn dtype(&self) -> DType {
                match self {
                    $(Self::$kind(layer) => Mix::dtype(layer),)*
                }
            }
        }

        impl Module for Mixer {
            fn collect_devices(&self, devices: Devices) -> Devices {
                match self {
                    $(Self::$kind(layer) => layer.collect_devices(devices),)*
                }
            }

            fn fork(self, device: &Device) -> Self {
                match self {
                    $(Self::$kind(layer) => Self::$kind(layer.fork(device)),)*
                }
            }

            fn to_device(self, device: &Device) -> Self {
                match self {
                    $(Self::$kind(layer) => Self::$kind(layer.to_device(device)),)*
                }
            }

            fn train(self) -> Self {
                match self {
                    $(Self::$kind(layer) => Self::$kind(layer.train()),)*
                }
            }

            fn valid(&self) -> Self {
                match self {
                    $(Self::$kind(layer) => Self::$kind(layer.valid()),)*
                }
            }

            fn materialize(self) -> Self {
                match self {
                    $(Self::$kind(layer) => Self::$kind(layer.materialize()),)*
                }
            }

            fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
                match self {
                    $(Self::$kind(layer) => layer.visit(visitor),)*
                }
            }

            fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
                match self {
                    $(Self::$kind(layer) => Self::$kind(layer.map(mapper)),)*
                }
            }
        }

        impl ModuleDisplayDefault for Mixer {
            fn content(&self, content: Content) -> Option<Content> {
                match self {
                    $(Self::$kind(layer) => content.add_single(layer).optional(),)*
                }
            }

            fn num_params(&self) -> usize {
                Module::num_params(self)
            }
        }
    };
}

mixers! {
    /// Gated linear attention.
    Gla(GatedLinearAttention),
    /// Softmax attention.
    SoftmaxAttention(SoftmaxAttention),
}

impl ModuleDisplay for Mixer {}

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
        self.run(x, layout, None)
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
        self.run(x, layout, Some(state))
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
        LayerState::zeros(&self.state_shape(batch), self.dtype(), device)
    }
}
