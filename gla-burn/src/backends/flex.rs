//! The CPU: the portable body, in pieces on all cores.

use burn::backend::{DType, Flex, TensorMetadata, ops::FloatTensorOps, tensor::FloatTensor};
use gla_kernels::GlaError;

use crate::{GlaGrads, GlaOps, GlaSpec, OptionalTensor, portable};

use super::grads_of;

impl GlaOps for Flex {
    fn gla_forward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        gate: OptionalTensor<Self>,
        h0: OptionalTensor<Self>,
        spec: GlaSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let gate = gate.into_option();
        check_gate(gate.as_ref());
        portable::forward_parallel::<Self>(q, k, v, gate, h0.into_option(), &spec.args())
    }

    fn gla_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        gate: OptionalTensor<Self>,
        h0: OptionalTensor<Self>,
        d_o: OptionalTensor<Self>,
        d_final: OptionalTensor<Self>,
        spec: GlaSpec,
    ) -> GlaGrads<Self> {
        let device = q.device();
        let grads = portable::backward_parallel::<Self>(
            q,
            k,
            v,
            gate.into_option(),
            h0.into_option(),
            d_o.into_option(),
            d_final.into_option(),
            &spec.args(),
        );
        grads_of(grads, &device)
    }

    fn gla_step(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        gate: OptionalTensor<Self>,
        state: FloatTensor<Self>,
        spec: GlaSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let gate = gate.into_option();
        check_gate(gate.as_ref());
        portable::step::<Self>(q, k, v, gate, state, spec.gate, spec.scale)
    }
}

/// Panics on a positive gate; the numbers are at hand here, on a GPU the check would wait for it.
fn check_gate(gate: Option<&FloatTensor<Flex>>) {
    let Some(gate) = gate else { return };
    let largest = Flex::float_max(gate.clone()).into_data().convert_dtype(DType::F64);
    let largest = largest.as_slice::<f64>().expect("f64 after the conversion")[0];
    if largest > 0.0 {
        panic!("gla: {}", GlaError::PositiveGate { largest });
    }
}
