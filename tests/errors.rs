//! Every wrong argument gets a message with its name and both numbers, before any launch.
#![cfg(feature = "flex")]

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::tensor::{DType, Device, Tensor};
use gla_burn::{Gate, GlaOptions, StepGate, gla, gla_step};

struct Call {
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    gate: Gate,
    options: GlaOptions,
}

fn call() -> Call {
    let device = Device::flex();
    Call {
        q: Tensor::ones([2, 5, 4, 3], &device),
        k: Tensor::ones([2, 5, 2, 3], &device),
        v: Tensor::ones([2, 5, 2, 6], &device),
        gate: Gate::Vector(Tensor::zeros([2, 5, 2, 3], &device)),
        options: GlaOptions::default(),
    }
}

fn message(change: impl FnOnce(&mut Call, &Device)) -> String {
    let mut c = call();
    change(&mut c, &Device::flex());
    text(catch_unwind(AssertUnwindSafe(|| gla(c.q, c.k, c.v, c.gate, c.options))))
}

fn text<T>(result: std::thread::Result<T>) -> String {
    let panic = result.err().expect("a wrong argument must panic");
    match panic.downcast::<String>() {
        Ok(message) => *message,
        Err(other) => other.downcast_ref::<&str>().expect("a message").to_string(),
    }
}

#[test]
fn a_right_call_returns() {
    let c = call();
    let out = gla(c.q, c.k, c.v, c.gate, c.options);
    assert_eq!(out.output.dims(), [2, 5, 4, 6]);
}

#[test]
fn shapes() {
    assert_eq!(
        message(|c, d| c.k = Tensor::ones([2, 7, 2, 3], d)),
        "gla: k: expected shape [2, 5, 2, 3], got [2, 7, 2, 3]"
    );
    assert_eq!(
        message(|c, d| c.v = Tensor::ones([2, 6, 2, 6], d)),
        "gla: v: expected shape [2, 5, 2, 6], got [2, 6, 2, 6]"
    );
    assert_eq!(
        message(|c, d| c.v = Tensor::ones([2, 5, 3, 6], d)),
        "gla: heads: 4 query heads are no multiple of 3 key/value heads"
    );
    assert_eq!(
        message(|c, d| c.gate = Gate::Vector(Tensor::zeros([2, 5, 4, 3], d))),
        "gla: gate: expected shape [2, 5, 2, 3], got [2, 5, 4, 3]"
    );
    assert_eq!(
        message(|c, d| c.gate = Gate::Scalar(Tensor::zeros([2, 4, 2], d))),
        "gla: gate: expected shape [2, 5, 2], got [2, 4, 2]"
    );
    assert_eq!(
        message(|c, d| c.gate = Gate::Fixed(Tensor::zeros([2], d))),
        "gla: gate: expected shape [4], got [2]"
    );
    assert_eq!(
        message(|c, d| c.options.initial_state = Some(Tensor::zeros([2, 4, 6, 3], d))),
        "gla: initial_state: expected shape [2, 4, 3, 6], got [2, 4, 6, 3]"
    );
}

#[test]
fn types() {
    assert_eq!(
        message(|c, _| c.v = c.v.clone().cast(DType::F16)),
        "gla: v: expected dtype F32, got F16"
    );
    assert_eq!(
        message(|c, d| c.gate = Gate::Vector(Tensor::zeros([2, 5, 2, 3], (d, DType::F16)))),
        "gla: gate: expected dtype F32, got F16"
    );
    assert_eq!(
        message(|c, d| {
            c.options.initial_state = Some(Tensor::zeros([2, 4, 3, 6], (d, DType::F16)));
        }),
        "gla: initial_state: expected dtype F32, got F16"
    );
}

#[test]
fn packed_sequences() {
    let with = |cu: Vec<usize>| {
        message(|c, d| {
            c.q = Tensor::ones([1, 5, 4, 3], d);
            c.k = Tensor::ones([1, 5, 2, 3], d);
            c.v = Tensor::ones([1, 5, 2, 6], d);
            c.gate = Gate::None;
            c.options.cu_seqlens = Some(cu);
        })
    };
    assert_eq!(with(vec![0, 4]), "gla: cu_seqlens: must end at T = 5, got 4");
    assert_eq!(with(vec![1, 5]), "gla: cu_seqlens: must start at 0, got 1");
    assert_eq!(with(vec![]), "gla: cu_seqlens: needs at least 2 entries, got 0");
    assert_eq!(with(vec![0, 3, 2, 5]), "gla: cu_seqlens: must not fall, got 2 at index 2 after 3");
    assert_eq!(
        message(|c, _| c.options.cu_seqlens = Some(vec![0, 5])),
        "gla: cu_seqlens: packed sequences need batch 1, got 2"
    );
}

#[test]
fn chunk_and_gate_values() {
    assert_eq!(
        message(|c, _| c.options.chunk = Some(48)),
        "gla: chunk: must be one of [16, 32, 64], got 48"
    );
    assert_eq!(
        message(|c, d| c.gate = Gate::Fixed(Tensor::from_floats([-1.0, 0.25, 0.0, -2.0], d))),
        "gla: gate: must be at most 0, the largest is 0.25"
    );
}

#[test]
fn steps() {
    let device = Device::flex();
    let (q, k) = (Tensor::<3>::ones([2, 4, 3], &device), Tensor::<3>::ones([2, 2, 3], &device));
    let v = Tensor::<3>::ones([2, 2, 6], &device);
    let state = Tensor::<4>::zeros([2, 4, 3, 5], &device);
    let result = catch_unwind(AssertUnwindSafe(|| {
        gla_step(q.clone(), k.clone(), v.clone(), StepGate::None, state, None)
    }));
    assert_eq!(text(result), "gla_step: state: expected shape [2, 4, 3, 6], got [2, 4, 3, 5]");
    let state = Tensor::<4>::zeros([2, 4, 3, 6], &device);
    let gate = StepGate::Scalar(Tensor::zeros([2, 4], &device));
    let result = catch_unwind(AssertUnwindSafe(|| gla_step(q, k, v, gate, state, None)));
    assert_eq!(text(result), "gla_step: gate: expected shape [2, 2], got [2, 4]");
}

#[test]
fn empty_sequences_return_their_state() {
    let device = Device::flex();
    let state = Tensor::<4>::ones([2, 4, 3, 6], &device);
    let options = GlaOptions::default().with_initial_state(state.clone()).with_final_state();
    let out = gla(
        Tensor::zeros([2, 0, 4, 3], &device),
        Tensor::zeros([2, 0, 4, 3], &device),
        Tensor::zeros([2, 0, 4, 6], &device),
        Gate::None,
        options,
    );
    assert_eq!(out.output.dims(), [2, 0, 4, 6]);
    let final_state = out.final_state.expect("asked for");
    final_state.into_data().assert_eq(&state.into_data(), true);
}
