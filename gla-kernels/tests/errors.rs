//! What a launch refuses, on every device: types, sizes and buffers, before anything runs.
#![cfg(feature = "eval")]

mod common;

use common::{devices, elem_type, least_offset};
use cubecl::client::Client;
use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;
use cubecl::server::Handle;
use gla_kernels::eval::RefDType;
use gla_kernels::{
    BackwardArgs, Dims, ForwardArgs, GateKind, GlaError, Problem, RecurrentArgs, Sequences,
    Strategy, backward, check_chunked, check_recurrent, forward, recurrent,
};

fn problem(key_dim: usize, value_dim: usize, time: usize) -> Problem {
    Problem {
        dims: Dims { heads: 2, kv_heads: 1, key_dim, value_dim, gate: GateKind::Scalar },
        sequences: Sequences::Uniform { batch: 1, time },
        scale: 1.0,
        dtype: elem_type(RefDType::F32),
        gate_dtype: elem_type(RefDType::F32),
    }
}

/// Buffers of `problem(3, 5, 7)`, in bytes; the one called `short` lacks 4.
fn buffers<'a>(client: &'a Client, short: &'a str) -> impl Fn(&str) -> Handle + 'a {
    move |name| {
        let floats = match name {
            "q" | "dq" => 7 * 2 * 3,
            "k" | "dk" => 7 * 3,
            "v" | "dv" => 7 * 5,
            "gate" | "dgate" => 7,
            "o" | "d_o" => 7 * 2 * 5,
            _ => 2 * 3 * 5,
        };
        client.empty(4 * (floats - usize::from(name == short)))
    }
}

fn forward_with(client: &Client, short: &str, gate: bool) -> Result<(), GlaError> {
    let buffer = buffers(client, short);
    let args = ForwardArgs {
        q: buffer("q"),
        k: buffer("k"),
        v: buffer("v"),
        gate: gate.then(|| buffer("gate")),
        initial_state: Some(buffer("initial_state")),
        o: buffer("o"),
        final_state: buffer("final_state"),
    };
    forward(client, &problem(3, 5, 7), Strategy::Inferred, args).map(|_| ())
}

fn recurrent_with(client: &Client, short: &str, gate: bool) -> Result<(), GlaError> {
    let buffer = buffers(client, short);
    let args = RecurrentArgs {
        q: buffer("q"),
        k: buffer("k"),
        v: buffer("v"),
        gate: gate.then(|| buffer("gate")),
        state: buffer("state"),
        state_dtype: elem_type(RefDType::F32),
        o: buffer("o"),
    };
    recurrent(client, &problem(3, 5, 7), args)
}

fn backward_with(client: &Client, short: &str, gate: bool) -> Result<(), GlaError> {
    let buffer = buffers(client, short);
    let args = BackwardArgs {
        q: buffer("q"),
        k: buffer("k"),
        v: buffer("v"),
        gate: gate.then(|| buffer("gate")),
        initial_state: Some(buffer("initial_state")),
        d_o: buffer("d_o"),
        d_final: Some(buffer("d_final")),
        dq: buffer("dq"),
        dk: buffer("dk"),
        dv: buffer("dv"),
        dgate: (short != "no dgate").then(|| buffer("dgate")),
        dh0: buffer("dh0"),
    };
    backward(client, &problem(3, 5, 7), Strategy::Inferred, args).map(|_| ())
}

#[test]
fn short_buffers() {
    type Pass = fn(&Client, &str, bool) -> Result<(), GlaError>;
    let passes: [(Pass, &[&str]); 3] = [
        (forward_with, &["q", "k", "v", "gate", "initial_state", "o", "final_state"]),
        (recurrent_with, &["q", "k", "v", "gate", "state", "o"]),
        (
            backward_with,
            &[
                "q",
                "k",
                "v",
                "gate",
                "initial_state",
                "d_o",
                "d_final",
                "dq",
                "dk",
                "dv",
                "dgate",
                "dh0",
            ],
        ),
    ];
    for device in devices() {
        for (pass, names) in passes {
            for &name in names {
                let bytes = buffers(&device.client, "")(name).size_in_used();
                let error = pass(&device.client, name, true).expect_err(name).to_string();
                let got = bytes - 4;
                assert_eq!(error, format!("{name}: needs {bytes} bytes, the buffer has {got}"));
            }
            let error = pass(&device.client, "", false).expect_err("no gate").to_string();
            let expected = "gate: gate kind is Scalar, but a gate tensor was given: false";
            assert_eq!(error, expected);
        }
        let error = backward_with(&device.client, "no dgate", true).unwrap_err().to_string();
        assert_eq!(error, "dgate: a gate tensor was given: true, but one for its gradient: false");
    }
}

/// Kernels read vectors of up to 16 bytes.
#[test]
fn misaligned_buffers() {
    for device in devices() {
        let buffer = buffers(&device.client, "");
        let args = RecurrentArgs {
            q: buffer("q"),
            k: buffer("k"),
            v: device.client.empty(4 * (7 * 5 + 5)).offset_start(20),
            gate: Some(buffer("gate")),
            state: buffer("state"),
            state_dtype: elem_type(RefDType::F32),
            o: buffer("o"),
        };
        let error = recurrent(&device.client, &problem(3, 5, 7), args).unwrap_err().to_string();
        let step = least_offset(&device.client);
        let expected = format!("v: begins at byte 20 of its buffer, expected a multiple of {step}");
        assert_eq!(error, expected);
    }
}

#[test]
fn unsupported_types() {
    for device in devices() {
        let client = &device.client;
        let adapter = &client.properties().identity.name;
        let expect = |problem: &Problem, name: &str, dtype: &str| {
            let expected = format!("{name}: the device {adapter} does not support dtype {dtype}");
            let chunked = check_chunked(client, problem, Strategy::Inferred, true).unwrap_err();
            assert_eq!(chunked.to_string(), expected);
            assert_eq!(check_recurrent(client, problem).unwrap_err().to_string(), expected);
        };
        let double = ElemType::Float(FloatKind::F64);
        expect(&Problem { dtype: double, ..problem(3, 5, 7) }, "q", "f64");
        expect(&Problem { gate_dtype: double, ..problem(3, 5, 7) }, "gate", "f64");
        for (dtype, name) in [(RefDType::F16, "f16"), (RefDType::BF16, "bf16")] {
            if device.supports(dtype) {
                println!("not applicable: {} supports {name}", device.name);
                continue;
            }
            // where SPIR-V is compiled in too, what is opened for WGSL calls itself SPIR-V
            if device.name == "wgsl" && client.name() != "wgpu<wgsl>" {
                println!("not applicable: {name} on an adapter called {}", client.name());
                continue;
            }
            expect(&Problem { dtype: elem_type(dtype), ..problem(3, 5, 7) }, "q", name);
        }
    }
}

/// Without a gate its type is of no account: kernels are not compiled with one that the device lacks.
#[test]
fn types_of_no_gate() {
    let double = ElemType::Float(FloatKind::F64);
    let mut ungated = Problem { gate_dtype: double, ..problem(3, 5, 7) };
    ungated.dims.gate = GateKind::None;
    for device in devices() {
        let client = &device.client;
        let filled = |len: usize, x: f32| client.create_from_slice(f32::as_bytes(&vec![x; len]));
        let inputs = || [filled(7 * 2 * 3, 0.0), filled(7 * 3, 1.0), filled(7 * 5, 1.0)];
        let read = |o: Handle| f32::from_bytes(&client.read_one(o).unwrap()).to_vec();
        let [state, o] = [filled(2 * 3 * 5, 0.0), filled(7 * 2 * 5, f32::NAN)];
        let [q, k, v] = inputs();
        let args = RecurrentArgs {
            q,
            k,
            v,
            gate: None,
            state,
            state_dtype: elem_type(RefDType::F32),
            o: o.clone(),
        };
        recurrent(client, &ungated, args).unwrap();
        assert_eq!(read(o), [0.0; 7 * 2 * 5]);
        let [final_state, o] = [filled(2 * 3 * 5, f32::NAN), filled(7 * 2 * 5, f32::NAN)];
        let [q, k, v] = inputs();
        let (initial_state, end) = (None, final_state.clone());
        let args = ForwardArgs { q, k, v, gate: None, initial_state, o: o.clone(), final_state };
        forward(client, &ungated, Strategy::Inferred, args).unwrap();
        assert_eq!(read(o), [0.0; 7 * 2 * 5]);
        assert_eq!(read(end), [7.0; 2 * 3 * 5]);
    }
}

#[test]
fn sizes() {
    for device in devices() {
        let client = &device.client;
        let chunked = |problem: Problem| {
            check_chunked(client, &problem, Strategy::Chunk(64), true).map_err(|e| e.to_string())
        };
        let addresses = |what: &str, elements: usize| {
            Err(format!("{what}: {elements} elements, 32-bit addresses reach 4294967295"))
        };
        let long = problem(4096, 8, 1 << 20);
        assert_eq!(chunked(long), addresses("a [B, T, H, max(K, V)] tensor", 1 << 33));
        let wide = problem(1 << 16, 1 << 15, 1);
        assert_eq!(chunked(wide), addresses("the state", 1 << 32));
        // products that 64 bits do not hold
        let mut endless = problem(1 << 33, 1, 0);
        (endless.dims.heads, endless.dims.kv_heads) = (1 << 32, 1 << 32);
        assert_eq!(chunked(endless), addresses("the state", usize::MAX));
        let endless = Sequences::Uniform { batch: 1 << 33, time: 1 << 33 };
        let endless = Problem { sequences: endless, ..problem(1, 1, 0) };
        assert_eq!(chunked(endless), addresses("a [B, T, H, max(K, V)] tensor", usize::MAX));

        let largest = client.properties().memory.max_page_size;
        let allocates = |what: &str, elements: u64| match 4 * elements <= largest {
            true => None,
            false => Some(format!(
                "{what}: needs {} bytes in one buffer, the device allocates {largest}",
                4 * elements
            )),
        };
        // little of everything else, so that what is asked for is the largest buffer
        let states = problem(1024, 1024, 1 << 16);
        let expected = allocates("the output", 1 << 27);
        let expected = expected.or(allocates("the states between chunks", 1 << 31));
        assert_eq!(chunked(states).err(), expected);
        let pairs = problem(1, 1, 1 << 24);
        let expected = allocates("the intra-chunk matrix [B, T, H, chunk]", 1 << 31);
        let expected = allocates("the output", 1 << 25).or(expected);
        assert_eq!(chunked(pairs).err(), expected);
    }
}
