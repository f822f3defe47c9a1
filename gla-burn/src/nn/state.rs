use std::path::PathBuf;

use burn::tensor::{DType, Device, Tensor};

/// Decoding state of a [`GlaTransformer`](super::GlaTransformer): all that it remembers of the
/// tokens seen.
///
/// A plain value of constant size, whatever the number of tokens. Clone it to branch a conversation
/// or to share a prefix (tensors are reference-counted, nothing is copied until a branch is
/// stepped); save it to resume later.
///
/// A model that panics halfway leaves a state of which some layers have seen the token: go on with a
/// clone from before. A layer that panicked in its recurrence has none left, and the next call
/// refuses such a state.
#[derive(Clone, Debug)]
pub struct GlaState {
    /// One state per layer.
    pub layers: Vec<LayerState>,
    /// Tokens seen per sequence.
    pub seen: usize,
}

/// Decoding state of one [`GatedLinearAttention`](super::GatedLinearAttention) layer.
///
/// Its tensors are without autodiff, whatever the model is on: `prefill` over consecutive segments
/// is truncated backpropagation through time.
#[derive(Clone, Debug)]
pub struct LayerState {
    /// Recurrent state, `[B, num_heads, head_k_dim, head_v_dim]` f32.
    ///
    /// The layer takes it out while it runs, so that a step can update it in place. `None` is what
    /// a panic in between leaves: no layer accepts it.
    pub recurrent: Option<Tensor<4>>,
    /// Last inputs of the short convolutions of queries, keys and values, each
    /// `[B, channels, conv_size]`, oldest first. `None` for a layer without them.
    pub conv: Option<[Tensor<3>; 3]>,
}

/// Shapes of a [`LayerState`].
#[derive(Clone, Copy, Debug)]
pub(super) struct LayerStateShape {
    pub recurrent: [usize; 4],
    pub conv: Option<[[usize; 3]; 3]>,
}

/// What can be wrong with a state or with the file that holds it.
#[derive(Debug, thiserror::Error)]
pub enum GlaStateError {
    /// The file cannot be written.
    #[error("cannot write the state to {path}: {reason}")]
    Write {
        /// The destination.
        path: PathBuf,
        /// The cause.
        reason: String,
    },
    /// The file cannot be read, is truncated, or is no burnpack file.
    #[error("cannot read a state from {path}: {reason}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        reason: String,
    },
    /// The file is a burnpack file, but not of a state.
    #[error("{path} holds no usable state: {reason}")]
    Content {
        /// The file.
        path: PathBuf,
        /// What is missing or superfluous.
        reason: String,
    },
    /// The number of layers differs from the model's.
    #[error("the state has {found} layers, the model has {expected}")]
    Layers {
        /// Layers in the state.
        found: usize,
        /// Layers of the model.
        expected: usize,
    },
    /// A tensor has a shape that the layer cannot use.
    #[error("{tensor} of the state has shape {found:?}, the layer needs {expected:?}")]
    Shape {
        /// Name of the tensor.
        tensor: String,
        /// Shape in the state.
        found: Vec<usize>,
        /// Shape that the layer and the batch size ask for.
        expected: Vec<usize>,
    },
    /// A tensor is missing, or there is one that the layer has no use for.
    #[error("{tensor} of the state is {}", if *.found { "superfluous" } else { "missing" })]
    Presence {
        /// Name of the tensor.
        tensor: String,
        /// Whether the state has it.
        found: bool,
    },
}

impl GlaState {
    /// Sequences in the state, 0 for a state without tensors.
    pub fn batch(&self) -> usize {
        let first = self.layers.first().and_then(|l| l.recurrent.as_ref());
        first.map_or(0, |state| state.dims()[0])
    }

    /// Bytes that the tensors of the state take.
    pub fn num_bytes(&self) -> usize {
        self.layers.iter().map(LayerState::num_bytes).sum()
    }
}

impl LayerState {
    /// The state before the first token.
    pub(super) fn zeros(shape: &LayerStateShape, dtype: DType, device: &Device) -> Self {
        let device = &device.clone().without_autodiff();
        Self {
            recurrent: Some(Tensor::zeros(shape.recurrent, (device, DType::F32))),
            conv: shape
                .conv
                .map(|shapes| shapes.map(|shape| Tensor::zeros(shape, (device, dtype)))),
        }
    }

    /// Compares the tensors with what a layer needs.
    pub(super) fn check(&self, expected: &LayerStateShape) -> Result<(), GlaStateError> {
        let Some(recurrent) = &self.recurrent else {
            return Err(GlaStateError::Presence { tensor: "recurrent".into(), found: false });
        };
        check_shape("recurrent", recurrent, &expected.recurrent)?;
        match (&self.conv, &expected.conv) {
            (None, None) => Ok(()),
            (Some(found), Some(expected)) => {
                let names = ["conv.q", "conv.k", "conv.v"];
                let mut tensors = names.iter().zip(found).zip(expected);
                tensors.try_for_each(|((name, found), expected)| check_shape(name, found, expected))
            }
            (found, _) => {
                Err(GlaStateError::Presence { tensor: "conv".into(), found: found.is_some() })
            }
        }
    }

    fn num_bytes(&self) -> usize {
        let recurrent = self.recurrent.iter().map(num_bytes);
        let conv = self.conv.iter().flatten().map(num_bytes);
        recurrent.sum::<usize>() + conv.sum::<usize>()
    }
}

fn num_bytes<const D: usize>(tensor: &Tensor<D>) -> usize {
    tensor.shape().num_elements() * tensor.dtype().size()
}

fn check_shape<const D: usize>(
    name: &str,
    found: &Tensor<D>,
    expected: &[usize; D],
) -> Result<(), GlaStateError> {
    if found.dims() == *expected {
        return Ok(());
    }
    Err(GlaStateError::Shape {
        tensor: name.into(),
        found: found.dims().to_vec(),
        expected: expected.to_vec(),
    })
}
