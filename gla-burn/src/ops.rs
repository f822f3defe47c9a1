//! The backend extension: what a back-end must be able to do.

use std::sync::Arc;

#[cfg(feature = "fusion")]
use burn::backend::fusion::custom::TensorSpec;
use burn::backend::{Backend, ExtensionType, backend_extension, tensor::FloatTensor};
#[cfg(any(feature = "fusion", feature = "cubecl-backend"))]
use burn::tensor::DType;
#[cfg(feature = "cubecl-backend")]
use gla_kernels::{Dims, Problem, Sequences};
use gla_kernels::{GateKind, Strategy};

use crate::portable;

/// A tensor argument that may be absent.
#[derive(ExtensionType, Clone, Debug)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub enum OptionalTensor<B: Backend> {
    /// Absent.
    None,
    /// Present.
    Some(FloatTensor<B>),
}

impl<B: Backend> OptionalTensor<B> {
    /// As an `Option`.
    pub fn into_option(self) -> Option<FloatTensor<B>> {
        match self {
            OptionalTensor::None => None,
            OptionalTensor::Some(tensor) => Some(tensor),
        }
    }
}

impl<B: Backend> From<Option<FloatTensor<B>>> for OptionalTensor<B> {
    fn from(tensor: Option<FloatTensor<B>>) -> Self {
        tensor.map_or(OptionalTensor::None, OptionalTensor::Some)
    }
}

/// Gradients of one call, shaped and typed like the inputs.
#[derive(ExtensionType, Clone, Debug)]
#[extension_type(fusion: cfg(feature = "fusion"))]
pub struct GlaGrads<B: Backend> {
    /// `[B, T, H, K]`
    pub dq: FloatTensor<B>,
    /// `[B, T, Hk, K]`
    pub dk: FloatTensor<B>,
    /// `[B, T, Hk, V]`
    pub dv: FloatTensor<B>,
    /// In the shape of the gate; a single zero without a gate.
    pub dgate: FloatTensor<B>,
    /// `[N, H, K, V]` f32
    pub dh0: FloatTensor<B>,
}

/// What a call needs besides its tensors. Validated by the public functions.
#[derive(Clone, Debug, PartialEq)]
pub struct GlaSpec {
    /// What the gate depends on; decides its shape.
    pub gate: GateKind,
    /// Factor on the queries.
    pub scale: f64,
    /// Bounds of packed sequences, `[N + 1]`.
    pub cu_seqlens: Option<Arc<[usize]>>,
    /// Who chooses plan and tiles of the chunked kernels. The portable path has none to choose.
    pub strategy: Strategy,
    /// Whether the forward walks step by step instead of by chunks.
    pub recurrent: bool,
    /// Whether the final state is differentiable.
    pub state_gradient: bool,
}

impl GlaSpec {
    pub(crate) fn args(&self) -> portable::Args<'_> {
        portable::Args {
            kind: self.gate,
            scale: self.scale,
            cu_seqlens: self.cu_seqlens.as_deref(),
        }
    }

    /// `[N, H, K, V]` for queries of shape `[B, T, H, K]` and `value_dim` V.
    pub fn state_shape(&self, q: [usize; 4], value_dim: usize) -> [usize; 4] {
        let sequences = self.cu_seqlens.as_ref().map_or(q[0], |cu| cu.len() - 1);
        [sequences, q[2], q[3], value_dim]
    }

    /// What the kernels are to compute, for queries `[B, T, H, K]` and values `[B, T, Hk, V]`.
    #[cfg(feature = "cubecl-backend")]
    pub(crate) fn problem(
        &self,
        [batch, time, heads, key_dim]: [usize; 4],
        [_, _, kv_heads, value_dim]: [usize; 4],
        dtype: DType,
        gate_dtype: Option<DType>,
    ) -> Problem {
        let elem_type = burn::backend::cubecl::dtype_to_elem_type;
        Problem {
            dims: Dims { heads, kv_heads, key_dim, value_dim, gate: self.gate },
            sequences: match &self.cu_seqlens {
                Some(cu) => Sequences::Packed { cu_seqlens: cu.to_vec(), time },
                None => Sequences::Uniform { batch, time },
            },
            scale: self.scale as f32,
            dtype: elem_type(dtype),
            gate_dtype: elem_type(gate_dtype.unwrap_or(dtype)),
        }
    }
}

/// Gated linear attention on a back-end.
///
/// CubeCL back-ends (CUDA, Vulkan, Metal, WebGPU, ..) run the kernels of `gla-kernels`; the default
/// bodies, in plain tensor operations, are the CPU path. Inputs are taken to be valid: call
/// [`gla`](crate::gla) and [`gla_step`](crate::gla_step).
#[backend_extension(
    Cube: cfg(feature = "cubecl-backend"),
    Flex: cfg(feature = "flex"),
    Autodiff: cfg(feature = "autodiff"),
    Fusion: cfg(feature = "fusion"),
)]
pub trait GlaOps: Backend {
    /// Output `[B, T, H, V]` in the type of v, and final state `[N, H, K, V]` in f32.
    #[fusion(meta = forward_meta)]
    fn gla_forward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        #[extension_type] gate: OptionalTensor<Self>,
        #[extension_type] h0: OptionalTensor<Self>,
        spec: GlaSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        portable::forward::<Self>(q, k, v, gate.into_option(), h0.into_option(), &spec.args())
    }

    /// All gradients; absent output gradients are zero.
    #[allow(clippy::too_many_arguments)]
    #[fusion(meta = backward_meta)]
    fn gla_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        #[extension_type] gate: OptionalTensor<Self>,
        #[extension_type] h0: OptionalTensor<Self>,
        #[extension_type] d_o: OptionalTensor<Self>,
        #[extension_type] d_final: OptionalTensor<Self>,
        spec: GlaSpec,
    ) -> GlaGrads<Self> {
        let device = burn::backend::TensorMetadata::device(&q);
        let grads = portable::backward::<Self>(
            q,
            k,
            v,
            gate.into_option(),
            h0.into_option(),
            d_o.into_option(),
            d_final.into_option(),
            &spec.args(),
        );
        crate::backends::grads_of(grads, &device)
    }

    /// One step: output `[B, H, V]` and the new state `[B, H, K, V]` in the type of the old, in place
    /// where possible.
    #[fusion(meta = step_meta)]
    fn gla_step(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        #[extension_type] gate: OptionalTensor<Self>,
        state: FloatTensor<Self>,
        spec: GlaSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        portable::step::<Self>(q, k, v, gate.into_option(), state, spec.gate, spec.scale)
    }
}

// Fusion trusts these shapes without checking them: `tests/shapes.rs` does.

#[cfg(feature = "fusion")]
fn forward_meta(
    q: &TensorSpec,
    _k: &TensorSpec,
    v: &TensorSpec,
    _gate: &OptionalTensorMetadata,
    _h0: &OptionalTensorMetadata,
    spec: &GlaSpec,
) -> (TensorSpec, TensorSpec) {
    let [batch, time, heads, key_dim] = q.shape.dims();
    let value_dim = v.shape[3];
    let state = spec.state_shape([batch, time, heads, key_dim], value_dim);
    (
        TensorSpec::new([batch, time, heads, value_dim].into(), v.dtype),
        TensorSpec::new(state.into(), DType::F32),
    )
}

#[cfg(feature = "fusion")]
#[allow(clippy::too_many_arguments)]
fn backward_meta(
    q: &TensorSpec,
    k: &TensorSpec,
    v: &TensorSpec,
    gate: &OptionalTensorMetadata,
    _h0: &OptionalTensorMetadata,
    _d_o: &OptionalTensorMetadata,
    _d_final: &OptionalTensorMetadata,
    spec: &GlaSpec,
) -> GlaGradsMetadata {
    let state = spec.state_shape(q.shape.dims(), v.shape[3]);
    GlaGradsMetadata {
        dq: q.clone(),
        dk: k.clone(),
        dv: v.clone(),
        dgate: match gate {
            OptionalTensorMetadata::None => TensorSpec::new([1].into(), DType::F32),
            OptionalTensorMetadata::Some(gate) => gate.clone(),
        },
        dh0: TensorSpec::new(state.into(), DType::F32),
    }
}

#[cfg(feature = "fusion")]
fn step_meta(
    q: &TensorSpec,
    _k: &TensorSpec,
    v: &TensorSpec,
    _gate: &OptionalTensorMetadata,
    state: &TensorSpec,
    _spec: &GlaSpec,
) -> (TensorSpec, TensorSpec) {
    let [batch, heads, _] = q.shape.dims();
    (TensorSpec::new([batch, heads, v.shape[2]].into(), v.dtype), state.clone())
}
