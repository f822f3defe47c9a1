//! CubeCL back-ends: tensors to buffers and back, nothing else.

use burn::backend::cubecl::dtype_to_elem_type;
use burn::backend::{DType, TensorMetadata, tensor::FloatTensor};
use burn::tensor::Shape;
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::{empty_device_contiguous_dtype, zeros_client};
use burn_cubecl::tensor::CubeTensor;
use gla_kernels::{BackwardArgs, ForwardArgs, Problem, RecurrentArgs};

use crate::{GlaGrads, GlaOps, GlaSpec, OptionalTensor};

impl GlaOps for CubeBackend {
    fn gla_forward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        gate: OptionalTensor<Self>,
        h0: OptionalTensor<Self>,
        spec: GlaSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (q, k, v) = (into_contiguous(q), into_contiguous(k), into_contiguous(v));
        let gate = gate.into_option().map(into_contiguous);
        let h0 = h0.into_option().map(into_contiguous);
        let problem = problem(&q, &v, gate.as_ref(), &spec);
        let [batch, time, heads, _] = q.shape().dims();
        let o = like(&v, [batch, time, heads, problem.dims.value_dim], v.dtype);
        let state_shape = spec.state_shape(q.shape().dims(), problem.dims.value_dim);
        let client = q.client.clone();

        if spec.recurrent {
            let state = match h0 {
                Some(state) => own(state),
                None => zeros_like(&q, state_shape, DType::F32),
            };
            let args = RecurrentArgs {
                q: q.handle,
                k: k.handle,
                v: v.handle,
                gate: gate.map(|gate| gate.handle),
                state_dtype: dtype_to_elem_type(state.dtype),
                state: state.handle.clone(),
                o: o.handle.clone(),
            };
            launched(gla_kernels::recurrent(&client, &problem, args));
            return (o, state);
        }
        let final_state = like(&q, state_shape, DType::F32);
        let args = ForwardArgs {
            q: q.handle,
            k: k.handle,
            v: v.handle,
            gate: gate.map(|gate| gate.handle),
            initial_state: h0.map(|state| state.handle),
            o: o.handle.clone(),
            final_state: final_state.handle.clone(),
        };
        launched(gla_kernels::forward(&client, &problem, spec.strategy, args));
        (o, final_state)
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
        let (q, k, v) = (into_contiguous(q), into_contiguous(k), into_contiguous(v));
        let gate = gate.into_option().map(into_contiguous);
        let h0 = h0.into_option().map(into_contiguous);
        let problem = problem(&q, &v, gate.as_ref(), &spec);
        let client = q.client.clone();
        let d_o = match d_o.into_option() {
            Some(d_o) => into_contiguous(d_o),
            None => {
                let [batch, time, heads, _] = q.shape().dims();
                let shape = [batch, time, heads, problem.dims.value_dim];
                zeros_like(&q, shape, v.dtype)
            }
        };
        let d_final = d_final.into_option().map(into_contiguous);

        let dq = like(&q, q.shape().dims::<4>(), q.dtype);
        let dk = like(&k, k.shape().dims::<4>(), k.dtype);
        let dv = like(&v, v.shape().dims::<4>(), v.dtype);
        let dgate = match &gate {
            Some(gate) => empty_device_contiguous_dtype(
                client.clone(),
                gate.device.clone(),
                gate.shape(),
                gate.dtype,
            ),
            None => zeros_like(&q, [1], DType::F32),
        };
        let state_shape = spec.state_shape(q.shape().dims(), problem.dims.value_dim);
        let dh0 = like(&q, state_shape, DType::F32);
        let args = BackwardArgs {
            q: q.handle,
            k: k.handle,
            v: v.handle,
            dgate: gate.as_ref().map(|_| dgate.handle.clone()),
            gate: gate.map(|gate| gate.handle),
            initial_state: h0.map(|state| state.handle),
            d_o: d_o.handle,
            d_final: d_final.map(|d| d.handle),
            dq: dq.handle.clone(),
            dk: dk.handle.clone(),
            dv: dv.handle.clone(),
            dh0: dh0.handle.clone(),
        };
        launched(gla_kernels::backward(&client, &problem, spec.strategy, args));
        GlaGrads { dq, dk, dv, dgate, dh0 }
    }

    fn gla_step(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        gate: OptionalTensor<Self>,
        state: FloatTensor<Self>,
        spec: GlaSpec,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (q, k, v) = (into_contiguous(q), into_contiguous(k), into_contiguous(v));
        let gate = gate.into_option().map(into_contiguous);
        let [batch, heads, key_dim] = q.shape().dims();
        let [_, kv_heads, value_dim] = v.shape().dims();
        let gate_dtype = gate.as_ref().map(|gate| gate.dtype);
        let [q_shape, v_shape] = [[batch, 1, heads, key_dim], [batch, 1, kv_heads, value_dim]];
        let problem = spec.problem(q_shape, v_shape, q.dtype, gate_dtype);
        let o = like(&v, [batch, heads, value_dim], v.dtype);
        let state = own(into_contiguous(state));
        let client = q.client.clone();
        let args = RecurrentArgs {
            q: q.handle,
            k: k.handle,
            v: v.handle,
            gate: gate.map(|gate| gate.handle),
            state_dtype: dtype_to_elem_type(state.dtype),
            state: state.handle.clone(),
            o: o.handle.clone(),
        };
        launched(gla_kernels::recurrent(&client, &problem, args));
        (o, state)
    }
}

fn problem(q: &CubeTensor, v: &CubeTensor, gate: Option<&CubeTensor>, spec: &GlaSpec) -> Problem {
    let gate_dtype = gate.map(|gate| gate.dtype);
    spec.problem(q.shape().dims(), v.shape().dims(), q.dtype, gate_dtype)
}

fn like<const D: usize>(tensor: &CubeTensor, shape: [usize; D], dtype: DType) -> CubeTensor {
    let (client, device) = (tensor.client.clone(), tensor.device.clone());
    empty_device_contiguous_dtype(client, device, Shape::from(shape), dtype)
}

// Burn makes new tensors with padded rows on CUDA and ROCm, where V asks for it: kernels take none.

fn zeros_like<const D: usize>(tensor: &CubeTensor, shape: [usize; D], dtype: DType) -> CubeTensor {
    let (client, device) = (tensor.client.clone(), tensor.device.clone());
    into_contiguous(zeros_client(client, device, Shape::from(shape), dtype))
}

/// A state that may be overwritten: itself if nobody else holds it, else a copy.
fn own(state: CubeTensor) -> CubeTensor {
    if state.can_mut() { state } else { into_contiguous(state.copy()) }
}

/// The public functions have checked all that a launch checks; other callers of the trait see it here.
fn launched<T>(result: Result<T, gla_kernels::GlaError>) -> T {
    result.unwrap_or_else(|error| panic!("gla: {error}"))
}
