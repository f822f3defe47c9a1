use std::path::PathBuf;

use burn::tensor::{DType, Device, Tensor};

use super::SequenceLayout;

/// Name of the recurrent state, which is f32 whatever the type of the layer.
pub(super) const RECURRENT: &str = "recurrent";

/// Decoding state of a [`GlaTransformer`](super::GlaTransformer): all that it remembers of the
/// tokens seen.
///
/// A plain value. Its size is constant, whatever the number of tokens, but for layers of softmax
/// attention without a window, which remember every token. Clone it to branch a conversation or to
/// share a prefix (tensors are reference-counted, nothing is copied until a branch is stepped); save
/// it to resume later.
///
/// A model that panics halfway leaves a state of which some layers have seen the token, and the layer
/// that panicked may have lost its memory. The next call refuses such a state: go on with a clone from
/// before.
#[derive(Clone, Debug)]
pub struct GlaState {
    /// One state per layer.
    pub layers: Vec<LayerState>,
}

/// Decoding state of one mixer, whatever its kind: what a kind has no use for is absent.
///
/// Its tensors are without autodiff, whatever the model is on: `prefill` over consecutive segments
/// is truncated backpropagation through time. The first axis of all is the sequence. Code that does
/// the same to all of them uses [`merge`](Self::merge).
#[derive(Clone, Debug, Default)]
pub struct LayerState {
    /// Tokens seen by each sequence.
    pub seen: Vec<usize>,
    /// Recurrent state, `[B, num_heads, head_k_dim, head_v_dim]` f32.
    ///
    /// The layer takes it out while it runs, so that a step can update it in place. `None` is what
    /// a panic in between leaves: no layer that has one accepts it.
    pub recurrent: Option<Tensor<4>>,
    /// Last inputs of the short convolutions, each `[B, channels, conv_size]`, oldest first. Queries,
    /// keys and values, in this order, or the only one.
    pub conv: [Option<Tensor<3>>; 3],
    /// Keys of softmax attention, rotated, `[B, L, num_kv_heads, head_dim]`, newest last.
    ///
    /// A sequence that has seen fewer than `L` tokens has the rest in front, unread. `None` before
    /// the first token.
    pub keys: Option<Tensor<4>>,
    /// Values of softmax attention, as `keys`.
    pub values: Option<Tensor<4>>,
}

/// What a mixer expects of a [`LayerState`].
#[derive(Clone, Copy, Debug, Default)]
pub struct LayerStateShape {
    /// Number of sequences.
    pub batch: usize,
    /// Heads and their key and value widths.
    pub recurrent: Option<[usize; 3]>,
    /// Channels and kernel size of each convolution.
    pub conv: [Option<[usize; 2]>; 3],
    /// Heads and head width of keys and values.
    pub keys_values: Option<[usize; 2]>,
    /// How many of the latest keys and values are read; all if `None`.
    pub window_size: Option<usize>,
}

impl LayerStateShape {
    /// Bytes of such a state with convolution inputs of type `dtype`, but for keys and values, which
    /// grow.
    pub fn num_bytes(&self, dtype: DType) -> usize {
        let recurrent = self.recurrent.map_or(0, |shape| shape.iter().product());
        let conv: usize =
            self.conv.iter().flatten().map(|shape| shape.iter().product::<usize>()).sum();
        self.batch * (recurrent * DType::F32.size() + conv * dtype.size())
    }
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
    /// The file cannot be read, is truncated, or is no safetensors file.
    #[error("cannot read a state from {path}: {reason}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        reason: String,
    },
    /// The file is a safetensors file, but not of a state.
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
    /// The number of sequences differs from the input's, or between layers.
    #[error("the state is of {found} sequences, expected {expected}")]
    Batch {
        /// Sequences in the state.
        found: usize,
        /// Sequences in the input, or in the first layer.
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
    /// The layers have seen different tokens: the model panicked between two of them.
    #[error("layer {layer} of the state has seen {found:?} tokens, layer 0 has seen {expected:?}")]
    Seen {
        /// The layer, from 0.
        layer: usize,
        /// Tokens of each sequence that it has seen.
        found: Vec<usize>,
        /// Those that the first layer has seen.
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

/// What the second axis of a tensor in a [`LayerState`] means; the first is the sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateAxis {
    /// A width of the layer: the same in all states of a layer.
    Width,
    /// Time, the newest token last. States of one layer may differ here; what is to be joined is
    /// filled up in front.
    Time,
}

/// One thing done to everything in states, see [`LayerState::merge`].
pub trait StateVisitor {
    /// Makes one tensor from those of this `name` in the given states. Absent if there was none.
    fn tensor<const D: usize>(
        &mut self,
        name: &str,
        axis: StateAxis,
        parts: Vec<Option<Tensor<D>>>,
    ) -> Option<Tensor<D>>;

    /// Makes one count per sequence from those of this `name` in the given states.
    fn counts(&mut self, name: &str, parts: Vec<Vec<usize>>) -> Vec<usize>;
}

impl GlaState {
    /// Tokens seen by each sequence.
    pub fn seen(&self) -> &[usize] {
        self.layers.first().map_or(&[], |layer| &layer.seen)
    }

    /// Number of sequences.
    pub fn batch(&self) -> usize {
        self.seen().len()
    }

    /// Bytes that the tensors of the state take.
    pub fn num_bytes(&self) -> usize {
        let mut bytes = Bytes(0);
        for layer in &self.layers {
            LayerState::merge(vec![layer.clone()], &mut bytes);
        }
        bytes.0
    }
}

impl LayerState {
    /// Builds a state from everything in the given ones, one kind of thing after the other: the one
    /// place that knows all kinds.
    ///
    /// No state, and the visitor makes everything: loading. One: a map, or a visit that gives the
    /// parts back. Several: joining batches.
    pub fn merge(parts: Vec<Self>, visitor: &mut impl StateVisitor) -> Self {
        // by value: a tensor that nobody else holds can be changed in place
        let (mut seen, mut recurrent) = (Vec::new(), Vec::new());
        let mut convs = [const { Vec::new() }; 3];
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for part in parts {
            seen.push(part.seen);
            recurrent.push(part.recurrent);
            convs.iter_mut().zip(part.conv).for_each(|(convs, conv)| convs.push(conv));
            keys.push(part.keys);
            values.push(part.values);
        }
        let [first, second, third] = convs;
        Self {
            seen: visitor.counts("seen", seen),
            recurrent: visitor.tensor(RECURRENT, StateAxis::Width, recurrent),
            conv: [
                visitor.tensor("conv.0", StateAxis::Width, first),
                visitor.tensor("conv.1", StateAxis::Width, second),
                visitor.tensor("conv.2", StateAxis::Width, third),
            ],
            keys: visitor.tensor("keys", StateAxis::Time, keys),
            values: visitor.tensor("values", StateAxis::Time, values),
        }
    }

    /// The state before the first token.
    pub(super) fn zeros(shape: &LayerStateShape, dtype: DType, device: &Device) -> Self {
        let device = &device.clone().without_autodiff();
        let batch = shape.batch;
        Self {
            seen: vec![0; batch],
            recurrent: shape.recurrent.map(|[heads, k_dim, v_dim]| {
                Tensor::zeros([batch, heads, k_dim, v_dim], (device, DType::F32))
            }),
            conv: shape.conv.map(|conv| {
                let [channels, size] = conv?;
                Some(Tensor::zeros([batch, channels, size], (device, dtype)))
            }),
            keys: None,
            values: None,
        }
    }

    /// Compares the state with what a layer needs.
    pub(super) fn check(&self, expected: &LayerStateShape) -> Result<(), GlaStateError> {
        let batch = expected.batch;
        if self.seen.len() != batch {
            return Err(GlaStateError::Batch { found: self.seen.len(), expected: batch });
        }
        let recurrent = expected.recurrent.map(|[heads, k, v]| [batch, heads, k, v]);
        check_tensor(RECURRENT, &self.recurrent, recurrent)?;
        for (i, (found, expected)) in self.conv.iter().zip(expected.conv).enumerate() {
            let expected = expected.map(|[channels, size]| [batch, channels, size]);
            check_tensor(&format!("conv.{i}"), found, expected)?;
        }
        // keys and values grow; before the first token there are none
        let seen = self.seen.iter().copied().max().unwrap_or(0);
        let read = seen.min(expected.window_size.unwrap_or(usize::MAX));
        let length = self.keys.as_ref().map_or(0, |keys| keys.dims()[1]);
        let keys_values = expected.keys_values.filter(|_| self.keys.is_some() || seen > 0);
        let keys_values = keys_values.map(|[heads, dim]| [batch, length.max(read), heads, dim]);
        check_tensor("keys", &self.keys, keys_values)?;
        check_tensor("values", &self.values, keys_values)
    }

    /// Counts the tokens of a `[B, T]` batch as seen.
    pub(super) fn advance(&mut self, layout: &SequenceLayout, dims: [usize; 2]) {
        let lengths = layout.lengths(dims);
        self.seen.iter_mut().zip(lengths).for_each(|(seen, length)| *seen += length);
    }

    /// The state for a layer of type `dtype`, also if one of another type or on an autodiff device
    /// made it.
    pub(super) fn into_constants(self, dtype: DType) -> Self {
        Self::merge(vec![self], &mut Constants { dtype })
    }
}

/// Takes tensors out of autodiff, and gives those that have the type of the layer this type.
struct Constants {
    dtype: DType,
}

impl StateVisitor for Constants {
    fn tensor<const D: usize>(
        &mut self,
        name: &str,
        _axis: StateAxis,
        parts: Vec<Option<Tensor<D>>>,
    ) -> Option<Tensor<D>> {
        let tensor = only(parts)?.without_autodiff();
        Some(if name == RECURRENT { tensor } else { tensor.cast(self.dtype) })
    }

    fn counts(&mut self, _name: &str, parts: Vec<Vec<usize>>) -> Vec<usize> {
        parts.concat()
    }
}

/// Adds up bytes.
struct Bytes(usize);

impl StateVisitor for Bytes {
    fn tensor<const D: usize>(
        &mut self,
        _name: &str,
        _axis: StateAxis,
        parts: Vec<Option<Tensor<D>>>,
    ) -> Option<Tensor<D>> {
        for tensor in parts.iter().flatten() {
            self.0 += tensor.shape().num_elements() * tensor.dtype().size();
        }
        None
    }

    fn counts(&mut self, _name: &str, _parts: Vec<Vec<usize>>) -> Vec<usize> {
        Vec::new()
    }
}

/// The last `count` tokens of the second axis, where there are more.
pub(super) fn newest<const D: usize>(x: Tensor<D>, count: usize) -> Tensor<D> {
    let length = x.dims()[1];
    if length <= count {
        return x;
    }
    // copied, not sliced: a view would keep the tokens that are forgotten
    let kept = Tensor::arange((length - count) as i64..length as i64, &x.device());
    x.select(1, kept)
}

/// The tensor of a visit to one state.
pub(super) fn only<const D: usize>(parts: Vec<Option<Tensor<D>>>) -> Option<Tensor<D>> {
    parts.into_iter().next().flatten()
}

fn check_tensor<const D: usize>(
    name: &str,
    found: &Option<Tensor<D>>,
    expected: Option<[usize; D]>,
) -> Result<(), GlaStateError> {
    match (found, expected) {
        (Some(found), Some(expected)) if found.dims() != expected => Err(GlaStateError::Shape {
            tensor: name.into(),
            found: found.dims().to_vec(),
            expected: expected.to_vec(),
        }),
        (Some(_), None) => Err(GlaStateError::Presence { tensor: name.into(), found: true }),
        (None, Some(_)) => Err(GlaStateError::Presence { tensor: name.into(), found: false }),
        _ => Ok(()),
    }
}
