//! The CPU: the portable body, in pieces on all cores.

use burn::backend::{Flex, TensorMetadata, tensor::FloatTensor};

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
        let (gate, h0) = (gate.into_option(), h0.into_option());
        portable::forward_parallel::<Self>(q, k, v, gate, h0, &spec.args())
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
}
