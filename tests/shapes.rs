//! What Fusion is told about an output is what the output is: the lazy shape and type of a tensor
//! against those of the data that was computed. Nothing in Burn checks this in release builds.

use burn::tensor::{DType, Int, Tensor};
use gla_burn::{Gate, StepGate, gla, gla_step};
use gla_kernels::eval::{Case, RefDType};
use gla_tests::{CaseTensors, burn_type, devices};

fn same<const D: usize>(what: &str, tensor: Tensor<D>, shape: [usize; D], dtype: DType) {
    assert_eq!(tensor.dims(), shape, "{what}: lazy shape");
    assert_eq!(tensor.dtype(), dtype, "{what}: lazy type");
    let data = tensor.into_data();
    assert_eq!(data.shape().to_vec(), shape, "{what}: real shape");
    assert_eq!(data.dtype(), dtype, "{what}: real type");
    assert_eq!(data.bytes().len(), shape.iter().product::<usize>() * dtype.size(), "{what}: bytes");
}

#[test]
fn outputs_and_gradients_are_what_fusion_was_told() {
    for device in devices() {
        for (id, sequences) in [
            ("none-b2-t9-k16-v32-h4-kv2-init", 2),
            ("fixed-m0.7-b2-t9-k16-v32-h4-kv2-init", 2),
            ("scalar-ls1-b2-t9-k16-v32-h4-kv2-init", 2),
            ("vector-ls1-b2-t9-k16-v32-h4-kv2-init", 2),
            ("vector-ls1-cu0.3.3.9-k16-v32-h4-kv2-init", 3),
        ] {
            for dtype in [RefDType::F32, RefDType::F16] {
                let float = burn_type(dtype);
                if !device.has(float) {
                    continue;
                }
                let case = Case::parse(id).expect("an id of the catalogue");
                let autodiff = device.device.clone().autodiff();
                let t = CaseTensors::with_gate_type(&case, dtype, dtype, &autodiff);
                let (b, time) = (case.batch, case.time);
                let out = gla(t.q.clone(), t.k.clone(), t.v.clone(), t.gate.clone(), t.options());
                let state = out.final_state.expect("asked for");
                let loss = out.output.clone().cast(DType::F32).sum() + state.clone().sum();
                let grads = loss.backward();
                same("o", out.output, [b, time, 4, 32], float);
                same("state", state, [sequences, 4, 16, 32], DType::F32);
                let grad = |x: &Tensor<4>| x.grad(&grads).expect("tracked");
                same("dq", grad(&t.q), [b, time, 4, 16], float);
                same("dk", grad(&t.k), [b, time, 2, 16], float);
                same("dv", grad(&t.v), [b, time, 2, 32], float);
                let h0 = t.h0.as_ref().expect("the case has one");
                same("dh0", grad(h0), [sequences, 4, 16, 32], DType::F32);
                match &t.gate {
                    Gate::None => {}
                    Gate::Fixed(g) => same("dg", g.grad(&grads).expect("tracked"), [4], float),
                    Gate::Scalar(g) => {
                        same("dg", g.grad(&grads).expect("tracked"), [b, time, 2], float);
                    }
                    Gate::Vector(g) => same("dg", grad(g), [b, time, 2, 16], float),
                }
            }
        }
    }
}

#[test]
fn step_outputs_are_what_fusion_was_told() {
    for device in devices() {
        let device = device.device.clone();
        let x = |shape| Tensor::<3>::ones(shape, &device);
        let (o, state) = gla_step(
            x([3, 4, 16]),
            x([3, 2, 16]),
            x([3, 2, 32]),
            StepGate::None,
            Tensor::zeros([3, 4, 16, 32], &device),
            None,
        );
        same("o", o, [3, 4, 32], DType::F32);
        same("state", state, [3, 4, 16, 32], DType::F32);
    }
}

/// The state may have the type of q: in and out.
#[test]
fn steps_keep_the_type_of_the_state() {
    for device in devices() {
        if !device.has(DType::F16) {
            continue;
        }
        let options = (&device.device, DType::F16);
        let x = |shape: [usize; 3], seed: f32| {
            let [b, h, d] = shape;
            let n = (b * h * d) as i64;
            let values = Tensor::<1, Int>::arange(0..n, &device.device).float();
            (values * seed).sin().reshape(shape).cast(DType::F16)
        };
        let step = |state: Tensor<4>| {
            let (q, k, v) = (x([3, 4, 16], 0.7), x([3, 2, 16], 1.3), x([3, 2, 32], 0.9));
            let gate = StepGate::Scalar(Tensor::full([3, 2], -0.5, options));
            gla_step(q, k, v, gate, state, None)
        };
        let start = x([3, 4, 16 * 32], 0.31).reshape([3, 4, 16, 32]);
        let (o, state) = step(start.clone());
        same("o", o.clone(), [3, 4, 32], DType::F16);
        same("state", state.clone(), [3, 4, 16, 32], DType::F16);
        let (exact_o, exact) = step(start.cast(DType::F32));
        let off = |a: Tensor<1>, b: Tensor<1>| {
            let difference = a.cast(DType::F32) - b.cast(DType::F32);
            difference.abs().max().into_scalar::<f32>()
        };
        // half a unit in the last place of numbers below 2
        assert!(off(state.flatten(0, 3), exact.flatten(0, 3)) < 5e-4, "{}", device.name);
        assert!(off(o.flatten(0, 2), exact_o.flatten(0, 2)) < 2e-3, "{}", device.name);
    }
}
