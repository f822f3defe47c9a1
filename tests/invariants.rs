//! What must hold for any input: properties on random shapes on the CPU, and on one shape on every
//! device.
#![cfg(feature = "flex")]

use burn::tensor::{DType, Device, Tensor};
use gla_burn::{Form, Gate, StepGate, gla, gla_step};
use gla_kernels::eval::{self, ABS_FLOOR, Case, RefDType};
use gla_tests::{CaseTensors, TestDevice, devices, tensor, values};
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

/// One small shape for all devices: a software adapter compiles few kernels for it.
struct OnDevice {
    x: CaseTensors,
    tested: TestDevice,
}

const TIME: usize = 40;

fn on_devices() -> impl Iterator<Item = OnDevice> {
    let case = Case::parse("vector-ls1-t40-k7-v5-h2-init").expect("an id");
    devices().into_iter().map(move |tested| {
        let x = CaseTensors::new(&case, RefDType::F32, &tested.device);
        OnDevice { tested, x }
    })
}

impl OnDevice {
    /// Rows `from..to` by chunks of `chunk`, after `state`: output and final state.
    fn piece(&self, [from, to]: [usize; 2], state: Tensor<4>, chunk: usize) -> [Tensor<4>; 2] {
        let part = |x: &Tensor<4>| x.clone().narrow(1, from, to - from);
        let Gate::Vector(gate) = &self.x.gate else { unreachable!("a vector case") };
        let options = self.x.options().with_initial_state(state).with_chunk(chunk);
        let options = options.with_form(Form::Chunk);
        let [q, k, v] = [&self.x.q, &self.x.k, &self.x.v].map(part);
        let out = gla(q, k, v, Gate::Vector(part(gate)), options);
        [out.output, out.final_state.expect("asked for")]
    }

    fn h0(&self) -> Tensor<4> {
        self.x.h0.clone().expect("the case has one")
    }

    fn close(&self, what: &str, expected: &[f64], got: &[f64]) {
        close(&format!("{} {what}", self.tested.name), expected, got);
    }
}

#[test]
fn a_split_sequence_resumes_on_every_device() {
    for d in on_devices() {
        let [o, end] = d.piece([0, TIME], d.h0(), 16).map(values);
        let [first, state] = d.piece([0, 19], d.h0(), 16);
        let [second, state] = d.piece([19, TIME], state, 16);
        d.close("o", &o, &values(Tensor::cat(vec![first, second], 1)));
        d.close("state", &end, &values(state));
    }
}

#[test]
fn outputs_are_causal_on_every_device() {
    for mut d in on_devices() {
        let cut = 21;
        let [whole, _] = d.piece([0, TIME], d.h0(), 16).map(values);
        let later = Tensor::<4>::ones([1, TIME - cut, 2, 7], &d.tested.device) * 100.0;
        let change =
            |x: &Tensor<4>| Tensor::cat(vec![x.clone().narrow(1, 0, cut), later.clone()], 1);
        [d.x.q, d.x.k] = [change(&d.x.q), change(&d.x.k)];
        let [changed, _] = d.piece([0, TIME], d.h0(), 16).map(values);
        let at = cut * 2 * 5;
        // not even rounding: earlier rows are computed from the same numbers in the same way
        assert_eq!(changed[..at], whole[..at], "{}", d.tested.name);
        assert_ne!(changed[at..], whole[at..], "{}", d.tested.name);
    }
}

#[test]
fn chunk_lengths_agree_on_every_device() {
    for d in on_devices() {
        let [o, state] = d.piece([0, TIME], d.h0(), 16).map(values);
        for chunk in [32, 64] {
            let [other_o, other_state] = d.piece([0, TIME], d.h0(), chunk).map(values);
            d.close(&format!("o, chunk {chunk}"), &o, &other_o);
            d.close(&format!("state, chunk {chunk}"), &state, &other_state);
        }
    }
}

/// A gate of 0 keeps everything, one of -1e4 forgets everything.
#[test]
fn extreme_gates_keep_and_forget() {
    for mut d in on_devices() {
        let with = |d: &mut OnDevice, gate: f64| {
            d.x.gate = Gate::Vector(Tensor::full([1, TIME, 2, 7], gate, &d.tested.device));
            d.piece([0, TIME], d.h0(), 16)
        };
        let [o, state] = with(&mut d, -1e4).map(values);
        let alone = (d.x.q.clone() * d.x.k.clone()).sum_dim(3) * d.x.v.clone();
        d.close("only the own step", &values(alone * d.x.inputs.scale), &o);
        let last = |x: &Tensor<4>| x.clone().narrow(1, TIME - 1, 1).swap_dims(1, 2);
        let outer = last(&d.x.k).swap_dims(2, 3) * last(&d.x.v);
        d.close("only the last step", &values(outer), &state);

        d.x.k = d.x.k.zeros_like();
        let [o, state] = with(&mut d, 0.0).map(values);
        // exactly: nothing is added, and the factor is 1
        assert_eq!(state, values(d.h0()), "{}", d.tested.name);
        // not as a matrix product, which Burn may form in TF32
        let q = d.x.q.clone().swap_dims(1, 2).unsqueeze_dim::<5>(4) * d.x.inputs.scale;
        let kept: Tensor<4> = (q * d.h0().unsqueeze_dim::<5>(2)).sum_dim(3).squeeze_dim(3);
        d.close("the kept state", &values(kept.swap_dims(1, 2)), &o);
    }
}

/// A step writes into the state that it was given, unless somebody else holds it: then, and only
/// then, the device holds two.
#[test]
fn a_step_updates_the_state_in_place() {
    let (heads, key_dim, value_dim) = (64, 256, 1024);
    let bytes = 4 * (heads * key_dim * value_dim) as u64;
    for tested in devices() {
        let (name, device) = (tested.name, tested.device.clone());
        let reserved = || device.memory_pool_usage().map(|usage| usage.bytes_reserved);
        let x = |dim: usize| Tensor::<3>::ones([1, heads, dim], &device);
        let step = |state| {
            gla_step(x(key_dim), x(key_dim), x(value_dim), StepGate::None, state, Some(1.0))
        };
        let state = Tensor::zeros([1, heads, key_dim, value_dim], &device);
        device.sync().expect("the device works");
        // the CPU path has no pool, and promises nothing
        let Some(before) = reserved() else { continue };
        let (mut o, mut state) = step(state);
        for _ in 1..3 {
            (o, state) = step(state);
        }
        let first = |o: Tensor<3>| o.narrow(2, 0, 1).max().into_scalar::<f32>();
        assert_eq!(first(o), 3.0 * key_dim as f32);
        let alone = reserved().expect("reported before");
        let held = state.clone();
        let (o, _) = step(state);
        assert_eq!(first(o), 4.0 * key_dim as f32);
        let copied = reserved().expect("reported before");
        drop(held);
        println!("{name}: {before} bytes reserved, {alone} after steps, {copied} after a copy");
        if copied - alone < bytes {
            println!("SKIPPED {name}: its memory pool had room for a copy");
            continue;
        }
        assert!(alone - before < bytes / 2, "{name}: a step alone took {}", alone - before);
    }
}
