//! One token.

use burn::backend::Dispatch;
use burn::tensor::{DType, Tensor};
use gla_kernels::{GateKind, Strategy};

use super::{check, device};
use crate::{GlaOps, GlaSpec, OptionalTensor};

/// The gate of [`gla_step`]: logarithms of the decay, finite and at most 0.
#[derive(Clone, Debug, Default)]
pub enum StepGate {
    /// No decay.
    #[default]
    None,
    /// `[H]`
    Fixed(Tensor<1>),
    /// `[B, Hk]`
    Scalar(Tensor<2>),
    /// `[B, Hk, K]`
    Vector(Tensor<3>),
}

impl StepGate {
    fn dtype(&self) -> Option<DType> {
        match self {
            StepGate::None => None,
            StepGate::Fixed(gate) => Some(gate.dtype()),
            StepGate::Scalar(gate) => Some(gate.dtype()),
            StepGate::Vector(gate) => Some(gate.dtype()),
        }
    }
}

/// One step of gated linear attention: what [`gla`](crate::gla) does for a sequence of length 1.
///
/// On a device without autodiff the state is updated in place if nothing else holds it; pass it by
/// value and keep what comes back.
///
/// # Shapes
///
/// - q: `[B, H, K]`
/// - k: `[B, Hk, K]`
/// - v: `[B, Hk, V]`
/// - gate: see [`StepGate`]
/// - state: `[B, H, K, V]`, f32 or the dtype of q. The latter halves the memory that a step reads and
///   writes, and rounds the state at every step
/// - returns the output `[B, H, V]` and the new state, in the dtype of the old
///
/// # Panics
///
/// As [`gla`](crate::gla), before anything is queued and before the state is touched.
pub fn gla_step(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    gate: StepGate,
    state: Tensor<4>,
    scale: Option<f64>,
) -> (Tensor<3>, Tensor<4>) {
    check::step(&q, &k, &v, &gate, &state).unwrap_or_else(|error| panic!("gla_step: {error}"));
    let [batch, heads, key_dim] = q.dims();
    if batch == 0 {
        let output = Tensor::zeros([0, heads, v.dims()[2]], (&q.device(), v.dtype()));
        return (output, state);
    }
    let gate_dtype = gate.dtype();
    let (kind, gate) = match gate {
        StepGate::None => (GateKind::None, OptionalTensor::None),
        StepGate::Fixed(gate) => (GateKind::Fixed, OptionalTensor::Some(gate.into_dispatch())),
        StepGate::Scalar(gate) => (GateKind::Scalar, OptionalTensor::Some(gate.into_dispatch())),
        StepGate::Vector(gate) => (GateKind::Vector, OptionalTensor::Some(gate.into_dispatch())),
    };
    let spec = GlaSpec {
        gate: kind,
        scale: scale.unwrap_or((key_dim as f64).powf(-0.5)),
        cu_seqlens: None,
        strategy: Strategy::Inferred,
        recurrent: true,
        state_gradient: true,
    };
    let [_, kv_heads, value_dim] = v.dims();
    let [q_shape, v_shape] = [[batch, 1, heads, key_dim], [batch, 1, kv_heads, value_dim]];
    device::check(&q.device(), &spec, q_shape, v_shape, q.dtype(), gate_dtype)
        .unwrap_or_else(|error| panic!("gla_step: {error}"));
    let (output, state) = Dispatch::gla_step(
        q.into_dispatch(),
        k.into_dispatch(),
        v.into_dispatch(),
        gate,
        state.into_dispatch(),
        spec,
    );
    (Tensor::from_dispatch(output), Tensor::from_dispatch(state))
}
