//! The public function through fusion and autodiff, on every device, against the f64 reference.

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::tensor::{DType, Tensor};
use gla_burn::{
    Blueprint, Form, Gate, GlaOptions, Instruction, Plan, StepGate, gla, gla_blueprint, gla_step,
};
use gla_kernels::eval::{self, ABS_FLOOR, Case, CaseGate, RefDType, small};
use gla_tests::{CaseTensors, TestDevice, burn_type, devices, tensor, values};

/// Few shapes, so that a software adapter compiles few kernels; all four gates, packing, groups.
const FEW: [&str; 6] = [
    "none-b2-t33-k16-v32-h2-init-final",
    "fixed-m0.7-b2-t33-k16-v32-h2-init-final",
    "scalar-ls1-b2-t33-k16-v32-h2-final",
    "vector-mixed-b2-t33-k16-v32-h2-init-final",
    "vector-m50-cu0.5.5.24.40-k16-v32-h2-init",
    "vector-ls0.1-b2-t70-k20-v12-h4-kv2-init-final",
];

fn few() -> Vec<Case> {
    FEW.iter().map(|id| Case::parse(id).expect("an id of the catalogue")).collect()
}

fn all(device: &TestDevice, cases: &[Case], dtype: RefDType, checkpointing: bool) {
    let mut autodiff = device.device.clone().autodiff();
    if checkpointing {
        autodiff = autodiff.gradient_checkpointing();
    }
    let mut errors = Vec::new();
    for case in cases {
        let found = CaseTensors::new(case, dtype, &autodiff).check();
        errors.extend(found.into_iter().map(|e| format!("{} {dtype:?}: {e}", case.id)));
    }
    println!("{}: {} cases in {dtype:?}, {} errors", device.name, cases.len(), errors.len());
    assert!(errors.is_empty(), "{}:\n{}", device.name, errors.join("\n"));
}

#[test]
fn outputs_and_gradients_match_the_reference() {
    for device in devices() {
        if device.name == "flex" {
            all(&device, &small(), RefDType::F32, false);
        } else {
            all(&device, &few(), RefDType::F32, false);
        }
        all(&device, &few(), RefDType::F32, true);
    }
}

#[test]
fn half_precision_matches_the_reference() {
    for device in devices() {
        for dtype in [RefDType::F16, RefDType::BF16] {
            if !device.has(burn_type(dtype)) {
                continue;
            }
            let cases: Vec<Case> = few().into_iter().skip(3).collect();
            all(&device, &cases, dtype, false);
            // the gate in the type of q, and its gradient with it
            let autodiff = device.device.clone().autodiff();
            for case in few().iter().filter(|case| case.gate != CaseGate::None).take(3) {
                let tensors = CaseTensors::with_gate_type(case, dtype, dtype, &autodiff);
                let errors = tensors.check();
                assert!(errors.is_empty(), "{} {}:\n{}", device.name, case.id, errors.join("\n"));
            }
        }
    }
}

/// The blueprint of a case, `None` where there are no plans.
fn told(t: &CaseTensors, options: GlaOptions) -> Option<Blueprint> {
    gla_blueprint(&t.q, &t.k, &t.v, &t.gate, &options).expect("a right call")
}

#[test]
fn what_runs_can_be_asked() {
    let case = Case::parse("vector-ls1-b2-t33-k16-v32-h2-init-final").expect("an id");
    for device in devices() {
        for on in [device.device.clone(), device.device.clone().autodiff()] {
            let t = CaseTensors::new(&case, RefDType::F32, &on);
            let inferred = told(&t, t.options());
            let split = told(&t, t.options().with_plan(Plan::Split));
            assert_eq!(split, inferred, "{}: tensor cores multiply no f32", device.name);
            let short = told(&t, t.options().with_chunk(16));
            assert_eq!(told(&t, t.options().with_form(Form::Recurrent)), None);
            if device.name == "flex" {
                assert_eq!((inferred, short), (None, None));
                assert_eq!(told(&t, t.options().with_plan(Plan::Scan)), None);
                continue;
            }
            // a few steps are walked one by one, unless a plan is asked for
            let few = Case::parse("vector-ls1-b2-t7-k16-v32-h2-init-final").expect("an id");
            let few = CaseTensors::new(&few, RefDType::F32, &on);
            assert_eq!(told(&few, few.options()), None, "{}", device.name);
            let split = told(&few, few.options().with_plan(Plan::Split)).expect("kernels");
            assert_eq!(split.plan(), Plan::Split, "{}", device.name);
            let (inferred, short) = (inferred.expect("kernels"), short.expect("kernels"));
            assert_eq!(inferred.plan(), Plan::Split, "{}", device.name);
            assert_eq!(inferred.instruction(), Instruction::Registers, "{}", device.name);
            assert_eq!(short.chunk(), 16, "{}", device.name);
        }
    }
}

/// The split plan runs on every device: what is inferred for f32, and on tensor cores what is not.
#[test]
fn a_forced_plan_gives_what_the_inferred_one_does() {
    let case = Case::parse("vector-ls1-b2-t33-k16-v32-h2-init-final").expect("an id");
    for device in devices() {
        let autodiff = device.device.clone().autodiff();
        for dtype in [RefDType::F32, RefDType::F16, RefDType::BF16] {
            if !device.has(burn_type(dtype)) {
                continue;
            }
            let t = CaseTensors::new(&case, dtype, &autodiff);
            let split = || t.options().with_plan(Plan::Split);
            let (inferred, forced) = (told(&t, t.options()), told(&t, split()));
            if dtype != RefDType::F32 && inferred == forced {
                println!("not applicable: {} has one plan for {dtype:?}", device.name);
                continue;
            }
            assert_eq!(forced.is_some(), device.name != "flex");
            assert!(forced.is_none_or(|blueprint| blueprint.plan() == Plan::Split));
            let errors = t.check_with(split());
            assert!(errors.is_empty(), "{} {dtype:?}:\n{}", device.name, errors.join("\n"));
            let o = |options| {
                values(gla(t.q.clone(), t.k.clone(), t.v.clone(), t.gate.clone(), options).output)
            };
            // in half precision two plans round differently, each by up to 4e-3
            let tolerance = if dtype == RefDType::F32 { 1e-6 } else { 8e-3 };
            eval::check(device.name, &o(t.options()), &o(split()), tolerance, ABS_FLOOR).unwrap();
        }
    }
}

/// A plan that cannot run is refused before any launch, in every form that would run it.
#[test]
fn a_plan_that_a_device_lacks_is_refused() {
    let case = Case::parse("vector-ls1-b2-t33-k16-v32-h2-init-final").expect("an id");
    let expected = "plan: the scan plan needs tensor cores for f32, the device has none";
    for device in devices().iter().filter(|device| device.name != "flex") {
        let (plain, autodiff) = (device.device.clone(), device.device.clone().autodiff());
        // the backward of the recurrent form is chunked
        for (on, form) in
            [(&plain, Form::Chunk), (&autodiff, Form::Chunk), (&autodiff, Form::Recurrent)]
        {
            let t = CaseTensors::new(&case, RefDType::F32, on);
            let options = || t.options().with_form(form).with_plan(Plan::Scan);
            let asked = gla_blueprint(&t.q, &t.k, &t.v, &t.gate, &options());
            assert_eq!(asked.unwrap_err().to_string(), expected, "{}", device.name);
            let call =
                || gla(t.q.clone(), t.k.clone(), t.v.clone(), t.gate.clone(), options()).output;
            let panic = catch_unwind(AssertUnwindSafe(call)).expect_err("it must panic");
            let message = panic.downcast::<String>().expect("a message");
            assert_eq!(*message, format!("gla: {expected}"), "{}", device.name);
        }
    }
}

/// A loss over `o`, over the state, over both, with `o` used twice: all the ways in which the two
/// outputs can be on the tape.
#[test]
fn the_final_state_is_differentiable_alone_and_together() {
    // CUDA pads the rows of new tensors of this width: the gradient of an output that nobody used is one
    let case = Case::parse("vector-ls1-b2-t33-k16-v20-h2-init-final").expect("an id");
    for device in devices() {
        let autodiff = device.device.clone().autodiff();
        for (use_o, use_state) in [(1, 0), (0, 1), (1, 1), (2, 1), (2, 0)] {
            let mut t = CaseTensors::new(&case, RefDType::F32, &autodiff);
            let out = gla(t.q.clone(), t.k.clone(), t.v.clone(), t.gate.clone(), t.options());
            let state = out.final_state.expect("asked for");
            let d_o = tensor(&t.d_o, out.output.dims(), DType::F32, &autodiff);
            let d_final = t.d_final.clone().expect("the case has one");
            let d_state = tensor(&d_final, state.dims(), DType::F32, &autodiff);
            let mut loss = Tensor::<1>::zeros([1], &autodiff);
            for _ in 0..use_o {
                loss = loss + (out.output.clone() * d_o.clone()).sum();
            }
            if use_state == 1 {
                loss = loss + (state * d_state).sum();
            }
            let grads = loss.backward();
            t.d_o.iter_mut().for_each(|d| *d *= use_o as f64);
            let d_final = (use_state == 1).then_some(d_final);
            let reference = eval::backward(&t.inputs, &t.d_o, d_final.as_deref());
            let Gate::Vector(gate) = &t.gate else { unreachable!("a vector case") };
            let h0 = t.h0.as_ref().expect("the case has one");
            for (name, expected, x) in [
                ("dq", &reference.dq, &t.q),
                ("dk", &reference.dk, &t.k),
                ("dv", &reference.dv, &t.v),
                ("dgate", reference.dgate.as_ref().expect("gated"), gate),
                ("dh0", &reference.dh0, h0),
            ] {
                let got = values(x.grad(&grads).expect("tracked"));
                eval::check(name, expected, &got, 1e-4, ABS_FLOOR).unwrap_or_else(|e| {
                    panic!("{} o x{use_o} state x{use_state}: {e}", device.name)
                });
            }
        }
    }
}

/// Two calls with the state handed over give the gradients of one call, in two forms.
#[test]
fn a_sequence_may_be_cut_anywhere() {
    let case = Case::parse("vector-ls1-b2-t33-k16-v32-h2-init-final").expect("an id");
    for device in devices() {
        let autodiff = device.device.clone().autodiff();
        for (cut, form) in [(1, Form::Auto), (17, Form::Chunk), (32, Form::Recurrent)] {
            let t = CaseTensors::new(&case, RefDType::F32, &autodiff);
            let Gate::Vector(gate) = t.gate.clone() else { unreachable!("a vector case") };
            let part = |x: &Tensor<4>, from: usize, to: usize| x.clone().narrow(1, from, to - from);
            let piece = |from, to, state| {
                let options = GlaOptions {
                    initial_state: Some(state),
                    final_state: true,
                    form,
                    ..t.options()
                };
                let gate = Gate::Vector(part(&gate, from, to));
                gla(part(&t.q, from, to), part(&t.k, from, to), part(&t.v, from, to), gate, options)
            };
            let first = piece(0, cut, t.h0.clone().expect("the case has one"));
            let second = piece(cut, 33, first.final_state.expect("asked for"));
            let o = Tensor::cat(vec![first.output, second.output], 1);
            let state = second.final_state.expect("asked for");
            let expected = eval::forward(&t.inputs);
            let context = |e: String| -> String { format!("{} cut {cut}: {e}", device.name) };
            eval::check("o", &expected.o, &values(o.clone()), 1e-4, ABS_FLOOR)
                .map_err(context)
                .unwrap();
            eval::check("state", &expected.final_state, &values(state.clone()), 1e-4, ABS_FLOOR)
                .map_err(context)
                .unwrap();
            let d_o = tensor(&t.d_o, o.dims(), DType::F32, &autodiff);
            let d_final = t.d_final.as_ref().expect("the case has one");
            let d_state = tensor(d_final, state.dims(), DType::F32, &autodiff);
            let grads = ((o * d_o).sum() + (state * d_state).sum()).backward();
            let reference = eval::backward(&t.inputs, &t.d_o, Some(d_final));
            for (name, expected, x) in [
                ("dq", &reference.dq, &t.q),
                ("dk", &reference.dk, &t.k),
                ("dgate", reference.dgate.as_ref().expect("gated"), &gate),
                ("dh0", &reference.dh0, t.h0.as_ref().expect("the case has one")),
            ] {
                let got = values(x.grad(&grads).expect("tracked"));
                eval::check(name, expected, &got, 1e-4, ABS_FLOOR).map_err(context).unwrap();
            }
        }
    }
}

/// The op between lazily fused operations: gate activation before, scaling after, strided inputs.
#[test]
fn it_works_inside_a_fused_graph() {
    let case = Case::parse("vector-ls1-b2-t33-k16-v32-h2-init-final").expect("an id");
    let mut results: Vec<(&str, Vec<Vec<f64>>)> = Vec::new();
    let mut all = devices();
    if !all.iter().any(|d| d.name == "flex") {
        println!("SKIPPED fused graph: nothing to compare with without flex");
        return;
    }
    all.sort_by_key(|d| d.name != "flex");
    for device in all {
        let autodiff = device.device.clone().autodiff();
        let t = CaseTensors::new(&case, RefDType::F32, &autodiff);
        let Gate::Vector(gate) = t.gate.clone() else { unreachable!("a vector case") };
        // heads before time and back: a strided view reaches the op
        let q = (t.q.clone() * 2.0).swap_dims(1, 2).exp().log().swap_dims(1, 2);
        let k = t.k.clone().tanh() + 0.5;
        let log_gate = burn::tensor::activation::sigmoid(gate.clone()).log() / 4.0;
        let options = t.options();
        let out = gla(q.abs(), k, t.v.clone() * t.v.clone(), Gate::Vector(log_gate), options);
        assert_eq!(out.output.dims(), [2, 33, 2, 32]);
        let state = out.final_state.expect("asked for");
        assert_eq!(state.dims(), [2, 2, 16, 32]);
        let y = burn::tensor::activation::silu(out.output) * 0.5 + 1.0;
        let loss = y.clone().powf_scalar(2.0).mean() + (state * 0.1).sum();
        let grads = loss.backward();
        let mut got = vec![values(y)];
        for x in [&t.k, &t.v, &gate] {
            got.push(values(x.grad(&grads).expect("tracked")));
        }
        if let Some((_, expected)) = results.first() {
            for (at, (expected, got)) in expected.iter().zip(&got).enumerate() {
                eval::check(&format!("{} {at}", device.name), expected, got, 1e-4, ABS_FLOOR)
                    .unwrap();
            }
        }
        results.push((device.name, got));
    }
}

/// The recurrent form from no state, the form of short calls; from one that others hold, and in widths for
/// which CUDA pads the rows of new tensors.
#[test]
fn short_calls_match_the_reference() {
    for device in devices() {
        for id in [
            "vector-ls1-b2-t9-k16-v20-h2-final",
            "vector-ls1-b2-t9-k16-v96-h2-init-final",
            "none-b1-t3-k5-v3-h4-kv2-final",
        ] {
            let case = Case::parse(id).expect("an id");
            let t = CaseTensors::new(&case, RefDType::F32, &device.device);
            let expected = eval::forward(&t.inputs);
            let before = t.h0.clone().map(values);
            let out = gla(t.q.clone(), t.k.clone(), t.v.clone(), t.gate.clone(), t.options());
            let context = |e: String| format!("{} {id}: {e}", device.name);
            let state = values(out.final_state.expect("asked for"));
            eval::check("o", &expected.o, &values(out.output), 1e-4, ABS_FLOOR)
                .and_then(|_| eval::check("state", &expected.final_state, &state, 1e-4, ABS_FLOOR))
                .map_err(context)
                .unwrap();
            assert_eq!(t.h0.map(values), before, "{id}: a held state was overwritten");
        }
    }
}

/// Decoding: the state goes through many steps, in place where nobody else holds it.
#[test]
fn steps_equal_the_sequence() {
    for device in devices() {
        let device_name = device.name;
        let device = device.device.clone();
        // CUDA pads the rows of new tensors of 20 columns: the copy of a held state is one
        for id in ["vector-ls1-b2-t9-k16-v20-h2-init", "scalar-m0.7-b2-t9-k16-v32-h4-kv2-init"] {
            let case = Case::parse(id).expect("an id");
            let t = CaseTensors::new(&case, RefDType::F32, &device);
            let expected = eval::forward(&t.inputs);
            let mut state = t.h0.clone().expect("the case has one");
            let held = state.clone();
            let before = values(held.clone());
            let mut outputs = Vec::new();
            for step in 0..9 {
                let at = |x: &Tensor<4>| x.clone().narrow(1, step, 1).squeeze_dim::<3>(1);
                let gate = match &t.gate {
                    Gate::Vector(g) => StepGate::Vector(at(g)),
                    Gate::Scalar(g) => {
                        StepGate::Scalar(g.clone().narrow(1, step, 1).squeeze_dim::<2>(1))
                    }
                    _ => unreachable!("vector and scalar cases"),
                };
                let scale = Some(t.inputs.scale);
                let (o, next) = gla_step(at(&t.q), at(&t.k), at(&t.v), gate, state, scale);
                outputs.push(o.unsqueeze_dim::<4>(1));
                state = next;
            }
            let o = values(Tensor::cat(outputs, 1));
            eval::check(device_name, &expected.o, &o, 1e-4, ABS_FLOOR).unwrap();
            let state = values(state);
            eval::check(device_name, &expected.final_state, &state, 1e-4, ABS_FLOOR).unwrap();
            assert_eq!(values(held), before, "a held state was overwritten");
        }
    }
}
