//! Every wrong argument gets a message with its name and both numbers, before any launch.
#![cfg(feature = "flex")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;

use burn::tensor::{DType, Device, Tensor, TensorData};
use gla_burn::{Form, Gate, GlaOptions, Plan, StepGate, device_limits, gla, gla_step};
use gla_tests::{TestDevice, devices};

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
        message(|c, d| c.k = Tensor::ones([2, 5, 2, 4], d)),
        "gla: k: expected shape [2, 5, 2, 3], got [2, 5, 2, 4]"
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
fn empty_dimensions() {
    let q = |shape| message(|c, d| c.q = Tensor::zeros(shape, d));
    let v = |shape| message(|c, d| c.v = Tensor::zeros(shape, d));
    assert_eq!(q([2, 5, 0, 3]), "gla: q heads: must be at least 1, got 0");
    assert_eq!(q([2, 5, 4, 0]), "gla: K: must be at least 1, got 0");
    assert_eq!(v([2, 5, 0, 6]), "gla: v heads: must be at least 1, got 0");
    assert_eq!(v([2, 5, 2, 0]), "gla: V: must be at least 1, got 0");
}

#[test]
fn types() {
    assert_eq!(
        message(|c, _| c.k = c.k.clone().cast(DType::F64)),
        "gla: k: expected dtype F32, got F64"
    );
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
            for x in [&mut c.q, &mut c.k, &mut c.v] {
                *x = x.clone().cast(DType::F16);
            }
            c.gate = Gate::Vector(Tensor::zeros([2, 5, 2, 3], (d, DType::BF16)));
        }),
        "gla: gate: expected dtype F32 or F16, got BF16"
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
        message(|c, _| c.options = GlaOptions::default().with_plan(Plan::Split).with_chunk(32)),
        "gla: plan: must not be given with chunk, got Split and 32"
    );
    let expected = "gla: gate: must be at most 0, the largest is 0.25";
    for device in [Device::flex(), Device::flex().autodiff()] {
        let one = |shape: &[usize]| {
            let mut values = vec![-1.0; shape.iter().product()];
            values[1] = 0.25;
            TensorData::new(values, shape)
        };
        let gates = [
            Gate::Fixed(Tensor::from_data(one(&[4]), &device)),
            Gate::Scalar(Tensor::from_data(one(&[2, 5, 2]), &device)),
            Gate::Vector(Tensor::from_data(one(&[2, 5, 2, 3]), &device)),
        ];
        for gate in gates {
            let found = message(|c, _| {
                for x in [&mut c.q, &mut c.k, &mut c.v] {
                    *x = Tensor::ones(x.dims(), &device);
                }
                c.gate = gate;
            });
            assert_eq!(found, expected);
        }
        let gates = [
            StepGate::Fixed(Tensor::from_data(one(&[4]), &device)),
            StepGate::Scalar(Tensor::from_data(one(&[2, 2]), &device)),
            StepGate::Vector(Tensor::from_data(one(&[2, 2, 3]), &device)),
        ];
        for gate in gates {
            let found = step_message(&device, |s| s.gate = gate);
            assert_eq!(found, expected.replace("gla:", "gla_step:"));
        }
    }
}

struct Step {
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    gate: StepGate,
    state: Tensor<4>,
}

fn step_message(device: &Device, change: impl FnOnce(&mut Step)) -> String {
    let mut s = Step {
        q: Tensor::ones([2, 4, 3], device),
        k: Tensor::ones([2, 2, 3], device),
        v: Tensor::ones([2, 2, 6], device),
        gate: StepGate::None,
        state: Tensor::zeros([2, 4, 3, 6], device),
    };
    change(&mut s);
    text(catch_unwind(AssertUnwindSafe(|| gla_step(s.q, s.k, s.v, s.gate, s.state, None))))
}

#[test]
fn steps() {
    let d = &Device::flex();
    assert_eq!(
        step_message(d, |s| s.k = Tensor::ones([2, 2, 4], d)),
        "gla_step: k: expected shape [2, 2, 3], got [2, 2, 4]"
    );
    assert_eq!(
        step_message(d, |s| s.v = Tensor::ones([3, 2, 6], d)),
        "gla_step: v: expected shape [2, 2, 6], got [3, 2, 6]"
    );
    assert_eq!(
        step_message(d, |s| s.v = Tensor::ones([2, 3, 6], d)),
        "gla_step: heads: 4 query heads are no multiple of 3 key/value heads"
    );
    assert_eq!(
        step_message(d, |s| s.gate = StepGate::Fixed(Tensor::zeros([2], d))),
        "gla_step: gate: expected shape [4], got [2]"
    );
    assert_eq!(
        step_message(d, |s| s.gate = StepGate::Scalar(Tensor::zeros([2, 4], d))),
        "gla_step: gate: expected shape [2, 2], got [2, 4]"
    );
    assert_eq!(
        step_message(d, |s| s.gate = StepGate::Vector(Tensor::zeros([2, 4, 3], d))),
        "gla_step: gate: expected shape [2, 2, 3], got [2, 4, 3]"
    );
    assert_eq!(
        step_message(d, |s| s.state = Tensor::zeros([2, 4, 3, 5], d)),
        "gla_step: state: expected shape [2, 4, 3, 6], got [2, 4, 3, 5]"
    );
    assert_eq!(
        step_message(d, |s| s.state = Tensor::zeros([2, 4, 3, 6], (d, DType::F16))),
        "gla_step: state: expected dtype F32, got F16"
    );
    assert_eq!(
        step_message(d, |s| s.v = Tensor::ones([2, 2, 6], (d, DType::F16))),
        "gla_step: v: expected dtype F32, got F16"
    );
}

/// The devices that run kernels.
fn accelerators() -> Vec<TestDevice> {
    let mut found = devices();
    found.retain(|device| device.name != "flex");
    if found.is_empty() {
        println!("SKIPPED device errors: no device runs kernels");
    }
    found
}

#[test]
fn devices_must_agree() {
    assert!(device_limits(&Device::flex()).is_none());
    for tested in accelerators() {
        let device = tested.device.clone();
        assert!(device_limits(&device.clone().autodiff()).is_some());
        let on = |name: &str| format!("{name}: is on {device:?}, q is on {:?}", Device::flex());
        assert_eq!(
            message(|c, _| c.k = Tensor::ones([2, 5, 2, 3], &device)),
            format!("gla: {}", on("k"))
        );
        assert_eq!(
            message(|c, _| c.gate = Gate::Fixed(Tensor::zeros([4], &device))),
            format!("gla: {}", on("gate"))
        );
        assert_eq!(
            message(|c, _| c.options.initial_state = Some(Tensor::zeros([2, 4, 3, 6], &device))),
            format!("gla: {}", on("initial_state"))
        );
        assert_eq!(
            step_message(&Device::flex(), |s| s.state = Tensor::zeros([2, 4, 3, 6], &device)),
            format!("gla_step: {}", on("state"))
        );
    }
}

#[test]
fn types_that_a_device_lacks() {
    for tested in accelerators() {
        let (name, device) = (tested.name, tested.device.clone());
        let with = |dtype| {
            let empty = |shape| Tensor::<4>::empty(shape, (&device, dtype));
            let found = message(|c, _| {
                c.q = empty([2, 5, 4, 3]);
                c.k = empty([2, 5, 2, 3]);
                c.v = empty([2, 5, 2, 6]);
                c.gate = Gate::None;
            });
            let empty = |shape| Tensor::<3>::empty(shape, (&device, dtype));
            let step = step_message(&device, |s| {
                s.q = empty([2, 4, 3]);
                s.k = empty([2, 2, 3]);
                s.v = empty([2, 2, 6]);
            });
            assert_eq!(step, found.replace("gla:", "gla_step:"));
            found
        };
        assert_eq!(with(DType::F64), "gla: q: expected dtype F32 or F16 or BF16, got F64");
        for dtype in [DType::F16, DType::BF16] {
            if device.supports_dtype(dtype) {
                println!("not applicable: {name} supports {dtype:?}");
                continue;
            }
            let expected =
                format!("gla: q: the device {device:?} does not support dtype {dtype:?}");
            assert_eq!(with(dtype), expected);
        }
    }
}

/// Limits of a device are reported by the call, not by whoever reads its output later.
#[test]
fn sizes_that_a_device_lacks() {
    for tested in accelerators() {
        let (name, device) = (tested.name, tested.device.clone());
        // many empty sequences: a large state for small tensors
        let with = |sequences: usize, form| {
            let mut cu_seqlens = vec![0; sequences + 1];
            cu_seqlens[sequences] = 1;
            message(|c, _| {
                for x in [&mut c.q, &mut c.k, &mut c.v] {
                    *x = Tensor::ones([1, 1, 1, 1024], &device);
                }
                c.gate = Gate::None;
                c.options = GlaOptions::default().with_cu_seqlens(cu_seqlens).with_form(form);
            })
        };
        for form in [Form::Chunk, Form::Recurrent] {
            assert_eq!(
                with(4096, form),
                "gla: the state: 4294967296 elements, 32-bit addresses reach 4294967295"
            );
            if name == "cuda" {
                println!("not applicable: {name} may hold 16 GiB in a buffer");
                continue;
            }
            let found = with(4095, form);
            let expected = "gla: the state: needs 17175674880 bytes in one buffer, the device \
                            allocates ";
            assert!(found.starts_with(expected), "{found}");
        }
    }
}

/// Tests pass without a device that they would need, but not if it was asked for.
#[test]
fn a_required_device_must_be_there() {
    let run = |required: &str| {
        let output = Command::new(std::env::current_exe().expect("a test has a path"))
            .args(["--exact", "devices_must_agree", "--nocapture"])
            .env("GLA_REQUIRE", required)
            .env_remove("GLA_DEVICES")
            // CubeCL's own variable: no machine has as many
            .env("CUBECL_WGPU_DEFAULT_DEVICE", "DiscreteGpu(1000)")
            .output()
            .expect("a test can be run");
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (passed, log) = run("flex");
    assert!(passed, "{log}");
    for (name, compiled) in [
        ("wgpu", cfg!(feature = "wgpu")),
        ("vulkan", cfg!(feature = "vulkan")),
        ("cuda", cfg!(feature = "cuda")),
    ] {
        let expected = match (compiled, name) {
            (false, _) => format!("GLA_REQUIRE lists {name}, which is not compiled in"),
            (true, "cuda") => continue,
            (true, _) => format!("GLA_REQUIRE lists {name}, but there is no such device"),
        };
        let (passed, log) = run(&format!("flex,{name}"));
        assert!(!passed && log.contains(&expected), "{name}: {log}");
    }
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
