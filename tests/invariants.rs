//! What must hold for any input: properties on random shapes, on the CPU.
#![cfg(feature = "flex")]

use burn::tensor::{DType, Device, Tensor};
use gla_burn::{Gate, GlaOptions, gla};
use gla_kernels::eval::{self, ABS_FLOOR, Case, RefDType};
use gla_tests::{CaseTensors, tensor, values};
use proptest::prelude::*;

fn close(name: &str, expected: &[f64], got: &[f64]) {
    eval::check(name, expected, got, 1e-4, ABS_FLOOR).unwrap();
}

fn run(t: &CaseTensors, gate: Gate) -> [Vec<f64>; 2] {
    let out = gla(t.q.clone(), t.k.clone(), t.v.clone(), gate, t.options());
    [values(out.output), values(out.final_state.expect("asked for"))]
}

fn gates() -> impl Strategy<Value = &'static str> {
    prop_oneof![
        Just("none"),
        Just("fixed-ls0.1"),
        Just("scalar-mixed"),
        Just("vector-mixed"),
        Just("vector-m1e4"),
        Just("vector-ls1"),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Any shape: outputs and all gradients equal the reference.
    #[test]
    fn any_shape_matches_the_reference(
        gate in gates(),
        (b, t, k, v) in (1usize..3, 1usize..100, 1usize..20, 1usize..20),
        (kv, group) in (1usize..3, 1usize..3),
        init in any::<bool>(),
    ) {
        let kv_part = if group > 1 { format!("-kv{kv}") } else { String::new() };
        let init = if init { "-init" } else { "" };
        let id = format!("{gate}-b{b}-t{t}-k{k}-v{v}-h{}{kv_part}{init}-final", kv * group);
        let case = Case::parse(&id).expect("an id of the catalogue");
        let autodiff = Device::flex().autodiff();
        let errors = CaseTensors::new(&case, RefDType::F32, &autodiff).check();
        prop_assert!(errors.is_empty(), "{id}: {}", errors.join("\n"));
    }

    /// What comes later does not change what came before.
    #[test]
    fn outputs_are_causal(gate in gates(), t in 2usize..80, cut in 0.0f64..1.0) {
        let case = Case::parse(&format!("{gate}-t{t}-k7-v5-h2")).expect("an id");
        let device = Device::flex();
        let x = CaseTensors::new(&case, RefDType::F32, &device);
        let cut = 1 + ((t - 2) as f64 * cut) as usize;
        let [whole, _] = run(&x, x.gate.clone());
        let later = Tensor::<4>::ones([1, t - cut, 2, 7], &device) * 100.0;
        let change = |x: &Tensor<4>| {
            Tensor::cat(vec![x.clone().narrow(1, 0, cut), later.clone()], 1)
        };
        let out = gla(change(&x.q), change(&x.k), x.v.clone(), x.gate.clone(), x.options());
        let before = cut * 2 * 5;
        close("o before the change", &whole[..before], &values(out.output)[..before]);
    }

    /// A constant gate is the same in every kind that can say it.
    #[test]
    fn constant_gates_agree_between_kinds(t in 1usize..80, g in -8.0f64..0.0) {
        let case = Case::parse(&format!("none-b2-t{t}-k6-v5-h2")).expect("an id");
        let device = Device::flex();
        let x = CaseTensors::new(&case, RefDType::F32, &device);
        let full = |n: usize| vec![g; n];
        let fixed = Gate::Fixed(tensor(&full(2), [2], DType::F32, &device));
        let scalar = Gate::Scalar(tensor(&full(4 * t), [2, t, 2], DType::F32, &device));
        let vector = Gate::Vector(tensor(&full(24 * t), [2, t, 2, 6], DType::F32, &device));
        let [o, state] = run(&x, vector);
        for gate in [fixed, scalar] {
            let [other_o, other_state] = run(&x, gate);
            close("o", &o, &other_o);
            close("state", &state, &other_state);
        }
        let zero = Gate::Fixed(Tensor::zeros([2], &device));
        let [ungated, _] = run(&x, Gate::None);
        close("no gate", &ungated, &run(&x, zero)[0]);
    }
}

/// A gate of 0 keeps everything, one of -1e4 forgets everything.
#[test]
fn extreme_gates_keep_and_forget() {
    let device = Device::flex();
    let case = Case::parse("none-t20-k4-v3-h1").expect("an id");
    let x = CaseTensors::new(&case, RefDType::F32, &device);
    let forget = Gate::Fixed(Tensor::from_floats([-1e4], &device));
    let options = GlaOptions { scale: Some(1.0), ..x.options() };
    let out = gla(x.q.clone(), x.k.clone(), x.v.clone(), forget, options);
    let alone = (x.q.clone() * x.k.clone()).sum_dim(3) * x.v.clone();
    close("only the own step", &values(alone), &values(out.output));
}
