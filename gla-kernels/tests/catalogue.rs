//! The catalogue on every device: the chunked and the recurrent form and all gradients against the
//! f64 reference.
//!
//! A real GPU runs all of it. A software adapter takes seconds to compile one kernel for one shape,
//! so it runs every gate on one shape, as every device does in half precision; `GLA_FULL=1` makes it
//! run all.
#![cfg(feature = "eval")]

mod common;

use common::{Prepared, TestDevice, devices, elem_type};
use gla_kernels::eval::{self, ABS_FLOOR, Case, CaseGate, RefDType, large, one_shape, small};
use gla_kernels::{
    Blueprint, DeviceLimits, Instruction, Plan, ScanBlueprint, SplitBlueprint, Strategy,
    check_chunked,
};

#[derive(Clone, Copy, PartialEq)]
enum Set {
    Small,
    Large,
}

fn run(set: Set, gate: CaseGate, dtype: RefDType) {
    for device in devices() {
        if !device.supports(dtype) {
            println!("not applicable: {} has no {dtype:?}", device.name);
            continue;
        }
        let full = !device.is_software() || std::env::var("GLA_FULL").is_ok();
        // in the split plan shapes are a matter of indices, which do not depend on the type; the scan
        // plan is for half precision alone
        let all_shapes = dtype == RefDType::F32 || scans(&device, dtype, gate);
        let mut cases = match (set, full) {
            (Set::Small, true) if all_shapes => small(),
            (Set::Small, _) => one_shape(),
            (Set::Large, true) => large(),
            (Set::Large, false) => {
                println!("SKIPPED {} large cases: a software adapter (GLA_FULL=1)", device.name);
                continue;
            }
        };
        if !full && dtype != RefDType::F32 {
            let few = ["none-b2-t65", "-ls1-b2-t65", "-mixed-b2"];
            cases.retain(|case| few.iter().any(|part| case.id.contains(part)));
        }
        let filter = std::env::var("GLA_CASE").unwrap_or_default();
        cases.retain(|case| case.gate == gate && case.id.contains(&filter));
        assert!(!cases.is_empty() || !filter.is_empty(), "no case is left to check");
        check(device.name, &device.client, &cases, dtype, RefDType::F32, Strategy::Inferred);
    }
}

/// Whether the scan plan runs by itself.
fn scans(device: &TestDevice, dtype: RefDType, gate: CaseGate) -> bool {
    chosen(device, dtype, gate).is_some_and(|blueprint| blueprint.plan() == Plan::Scan)
}

/// What is chosen for a common shape, if the device has the type.
fn chosen(device: &TestDevice, dtype: RefDType, gate: CaseGate) -> Option<Blueprint> {
    let case = one_shape().into_iter().find(|case| case.gate == gate).expect("every gate");
    let problem = Prepared::new(&case, dtype).problem;
    check_chunked(&device.client, &problem, Strategy::Inferred, true).ok()
}

fn check(
    name: &str,
    client: &cubecl::client::Client,
    cases: &[Case],
    dtype: RefDType,
    gate_dtype: RefDType,
    strategy: Strategy,
) {
    let mut errors = Vec::new();
    for case in cases {
        let start = std::time::Instant::now();
        let prepared = Prepared::with_gate(case, dtype, gate_dtype);
        let found = prepared.check_all(client, strategy);
        let (count, took) = (found.len(), start.elapsed());
        println!("{name} {} {dtype:?} {strategy:?} {count} errors {took:.2?}", case.id);
        errors.extend(found);
    }
    println!("{name}: {} cases in {dtype:?}, {} errors", cases.len(), errors.len());
    assert!(errors.is_empty(), "{name}:\n{}", errors.join("\n"));
}

macro_rules! catalogue {
    ($($name:ident: $set:ident, $gate:ident, $dtype:ident;)*) => {
        $(#[test] fn $name() { run(Set::$set, CaseGate::$gate, RefDType::$dtype); })*
    };
}

catalogue! {
    none_f32: Small, None, F32;
    fixed_f32: Small, Fixed, F32;
    scalar_f32: Small, Scalar, F32;
    vector_f32: Small, Vector, F32;
    none_half: Small, None, F16;
    fixed_half: Small, Fixed, F16;
    scalar_half: Small, Scalar, F16;
    vector_half: Small, Vector, F16;
    none_brain: Small, None, BF16;
    fixed_brain: Small, Fixed, BF16;
    scalar_brain: Small, Scalar, BF16;
    vector_brain: Small, Vector, BF16;
    large_none_f32: Large, None, F32;
    large_fixed_f32: Large, Fixed, F32;
    large_scalar_f32: Large, Scalar, F32;
    large_vector_f32: Large, Vector, F32;
    large_none_brain: Large, None, BF16;
    large_none_half: Large, None, F16;
    large_fixed_half: Large, Fixed, F16;
    large_fixed_brain: Large, Fixed, BF16;
    large_scalar_half: Large, Scalar, F16;
    large_scalar_brain: Large, Scalar, BF16;
    large_vector_half: Large, Vector, F16;
    large_vector_brain: Large, Vector, BF16;
}

fn cases(ids: &[&str]) -> Vec<Case> {
    ids.iter().map(|id| Case::parse(id).expect("an id")).collect()
}

/// All chunk lengths and tile widths are the same function.
#[test]
fn blueprints_agree() {
    for device in devices() {
        let case = cases(&[
            "vector-mixed-t70-k20-v33-h2-init-final",
            "scalar-mixed-t70-k20-v33-h2-init-final",
        ]);
        let f32 = RefDType::F32;
        let widths: &[usize] = if device.is_software() { &[16] } else { &[16, 32, 64] };
        for &chunk in widths {
            check(device.name, &device.client, &case, f32, f32, Strategy::Chunk(chunk));
        }
        let forced: &[(usize, usize)] = match device.is_software() {
            // what the least of WebGPU takes
            true => &[(64, 32)],
            false => &[(16, 32), (32, 16), (32, 32), (32, 64), (64, 16), (64, 32)],
        };
        for &(chunk, cols) in forced {
            let blueprint = SplitBlueprint { chunk, cols };
            let strategy = Strategy::Forced(Blueprint::Split(blueprint));
            check(device.name, &device.client, &case, f32, f32, strategy);
        }
    }
}

/// Plans and instructions that are not chosen by themselves are right too, and segments of any length.
fn plans_agree(dtype: RefDType) {
    let few = [
        "none-b2-t65-k33-v20-h4-kv2-init-final",
        "vector-ls1-cu0.5.5.64.130-k33-v20-h4-kv2-init",
        "vector-mixed-b2-t65-k33-v20-h4-kv2-init-final",
        "vector-ls1-t130-k33-v20-h4-kv2-init-final",
        "none-b2-t130-k33-v20-h4-kv2-init-final",
        "scalar-mixed-t130-k33-v20-h4-kv2-init-final",
        "fixed-ls1-cu0.5.5.64.130-k33-v20-h4-kv2-init-final",
    ];
    check_scans(&few, dtype, |device, dtype| {
        let scans = scans_in(device, dtype, &[1, 2, usize::MAX]);
        [vec![Strategy::Plan(Plan::Split)], scans].concat()
    });
}

#[test]
fn plans_agree_half() {
    plans_agree(RefDType::F16);
}

#[test]
fn plans_agree_brain() {
    plans_agree(RefDType::BF16);
}

/// Checks cases on each device with tensor cores for the type.
fn check_scans(
    ids: &[&str],
    dtype: RefDType,
    strategies: impl Fn(&TestDevice, RefDType) -> Vec<Strategy>,
) {
    let cases = cases(ids);
    for device in devices() {
        if has_scan(&device, dtype) {
            for strategy in strategies(&device, dtype) {
                check(device.name, &device.client, &cases, dtype, RefDType::F32, strategy);
            }
        }
    }
}

/// The tile instructions of the scan plan that the device has for the type.
fn instructions(device: &TestDevice, dtype: RefDType) -> Vec<Instruction> {
    let limits = DeviceLimits::of(&device.client);
    let elem = elem_type(dtype);
    let of = [(Instruction::Mma, limits.mma), (Instruction::Cmma, limits.cmma)];
    let found: Vec<_> =
        of.into_iter().filter(|(_, types)| types.contains(&elem)).map(|(by, _)| by).collect();
    let least = if dtype == RefDType::F16 { 2 } else { 1 };
    assert!(device.name != "cuda" || found.len() >= least, "{dtype:?} on CUDA: {found:?}");
    found
}

/// The scan plan with every instruction of the device, in segments of so many chunks.
fn scans_in(device: &TestDevice, dtype: RefDType, segments: &[usize]) -> Vec<Strategy> {
    let mut strategies = Vec::new();
    for instruction in instructions(device, dtype) {
        for &segment in segments {
            let blueprint = ScanBlueprint { segment, instruction };
            strategies.push(Strategy::Forced(Blueprint::Scan(blueprint)));
        }
    }
    strategies
}

/// What is inferred, and the scan plan with the instructions of the device that are not.
fn inferred_and_others(device: &TestDevice, dtype: RefDType) -> Vec<Strategy> {
    let others = scans_in(device, dtype, &[usize::MAX]).into_iter().skip(1);
    std::iter::once(Strategy::Inferred).chain(others).collect()
}

/// Whether the device has the scan plan for the type; says so if not. CUDA has it.
fn has_scan(device: &TestDevice, dtype: RefDType) -> bool {
    let scans = scans(device, dtype, CaseGate::Vector);
    assert!(scans || device.name != "cuda", "no scan plan for {dtype:?} on CUDA");
    if !scans {
        println!("SKIPPED {} {dtype:?}: no tensor cores for the scan plan", device.name);
    }
    scans
}

/// Widths in one and several parts, and calls with enough cubes for the wider tiles.
fn scan_widths(dtype: RefDType) {
    let ids = [
        "vector-ls1-t130-k256-v512-h2-init-final",
        "vector-mixed-cu0.5.5.64.200-k256-v300-h4-kv2-init-final",
        "scalar-ls1-b2-t65-k192-v385-h2-final",
        "none-b2-t65-k80-v24-h2-init",
        "none-b2-t130-k256-v300-h4-kv2-init-final",
        "fixed-ls1-b2-t65-k40-v520-h2-init-final",
        "scalar-ls1-b64-t65-k128-v64-h4-kv2-final",
        "vector-ls16-t1200-k64-v64-h1-init-final",
        "vector-ls1-b64-t65-k128-v64-h4-final",
        "vector-ls1-b32-t65-k256-v256-h2",
        "scalar-ls1-b8-t130-k128-v256-h4-kv2-init-final",
        "fixed-ls1-b8-t130-k128-v256-h4-kv2-init-final",
        "none-b8-t130-k128-v256-h4-kv2-init-final",
    ];
    check_scans(&ids, dtype, inferred_and_others);
}

#[test]
fn scan_widths_half() {
    scan_widths(RefDType::F16);
}

#[test]
fn scan_widths_brain() {
    scan_widths(RefDType::BF16);
}

/// Segments of several chunks, and enough of them for the wider cubes of the walks along and between them.
fn segments(dtype: RefDType) {
    let ids = [
        "vector-ls1-b2-t580-k72-v130-h20-init-final",
        "vector-mixed-cu0.5.5.300.580-k200-v40-h40-kv20-final",
        "scalar-ls16-b2-t580-k64-v150-h20-kv10-init-final",
        "fixed-ls1-b2-t580-k33-v70-h20-final",
        "none-b2-t580-k64-v130-h20-init",
        // walks that are told their direction, with scales of both signs and sizes
        "none-b2-t580-k80-v100-h20-sm0.3-init-final",
        "none-cu0.5.5.300.580-k72-v100-h20-init-final",
        "none-b2-t260-k64-v96-h20-s0-init-final",
        "scalar-ls16-b2-t580-k64-v96-h20-s0.002-init-final",
        "vector-ls1-b2-t580-k72-v96-h20-sm1-init",
    ];
    check_scans(&ids, dtype, |device, dtype| scans_in(device, dtype, &[4]));
}

#[test]
fn segments_half() {
    segments(RefDType::F16);
}

#[test]
fn segments_brain() {
    segments(RefDType::BF16);
}

/// More chunks than the split plan's states are read ahead for, as many, and rows in vectors of 1, 2 and 4.
#[test]
fn split_many_chunks() {
    let cases = cases(&[
        "vector-mixed-cu0.5.5.133.300-k18-v34-h4-kv2-init-final",
        "vector-ls1-b2-t260-k20-v33-h4-kv2-init-final",
        "scalar-ls16-cu0.5.128.256-k18-v36-h4-kv2-final",
        "fixed-ls1-b2-t128-k18-v36-h4-kv2-init-final",
        "none-b2-t140-k18-v33-h4-kv2-init-final",
    ]);
    let blueprint = SplitBlueprint { chunk: 16, cols: 16 };
    let strategy = Strategy::Forced(Blueprint::Split(blueprint));
    for device in devices() {
        for dtype in [RefDType::F32, RefDType::F16, RefDType::BF16] {
            if device.supports(dtype) && !(device.is_software() && dtype != RefDType::F32) {
                check(device.name, &device.client, &cases, dtype, RefDType::F32, strategy);
            }
        }
    }
}

/// Gates that decay all channels alike, of bf16 inputs: their gradients are numbers that are left of many terms.
#[test]
fn split_row_gates_brain() {
    let cases = cases(&[
        "fixed-m0.03-t1000-k33-v20-h4",
        "fixed-ls16-t500-k64-v64-h2",
        "scalar-m0-t1028-k320-v64-h1",
        "scalar-m0.001-t2057-k64-v64-h1",
    ]);
    for device in devices() {
        if device.supports(RefDType::BF16) {
            let strategy = Strategy::Plan(Plan::Split);
            check(device.name, &device.client, &cases, RefDType::BF16, RefDType::F32, strategy);
        } else {
            println!("not applicable: {} has no BF16", device.name);
        }
    }
}

/// Calls without a step: states and their gradients pass through.
#[test]
fn no_steps() {
    for device in devices() {
        for dtype in [RefDType::F32, RefDType::F16, RefDType::BF16] {
            if !device.supports(dtype) {
                println!("not applicable: {} has no {dtype:?}", device.name);
                continue;
            }
            let cases = cases(&[
                "vector-ls1-b2-t0-k33-v20-h4-kv2-init-final",
                "scalar-ls1-cu0.0.0-k33-v20-h4-kv2-init-final",
                "fixed-ls1-b2-t0-k33-v20-h4-init-final",
                "none-b2-t0-k33-v20-h4-init-final",
            ]);
            for strategy in [Strategy::Inferred, Strategy::Plan(Plan::Split)] {
                check(device.name, &device.client, &cases, dtype, RefDType::F32, strategy);
            }
        }
    }
}

/// The gate, and its gradient, in the type of the other inputs, and in half precision where they are not.
#[test]
fn half_gates() {
    for device in devices() {
        for dtype in [RefDType::F16, RefDType::BF16] {
            if !device.supports(dtype) {
                println!("not applicable: {} has no {dtype:?}", device.name);
                continue;
            }
            let few = cases(&[
                "vector-ls1-b2-t65-k33-v20-h4-kv2-init-final",
                "scalar-ls1-b2-t65-k33-v20-h4-kv2-init-final",
                "fixed-ls1-b2-t65-k33-v20-h4-kv2-init-final",
            ]);
            check(device.name, &device.client, &few, dtype, dtype, Strategy::Inferred);
            check(device.name, &device.client, &few[..2], RefDType::F32, dtype, Strategy::Inferred);
        }
    }
}

/// The gradient of a weak gate beside a strong one has digits of its own.
#[test]
fn gate_gradient_is_relative() {
    let ids = ["vector-mixed-t70-k20-v33-h2-init-final", "scalar-mixed-t70-k20-v33-h2-init-final"];
    for device in devices() {
        for case in cases(&ids) {
            let prepared = Prepared::new(&case, RefDType::F32);
            let got = prepared.backward(&device.client, Strategy::Inferred).expect("it runs");
            let expected =
                eval::backward(&prepared.inputs, &prepared.d_o, prepared.d_final.as_deref());
            let (expected, got) = (expected.dgate.expect("a gate"), got.dgate.expect("a gate"));
            eval::check_each(&case.id, &expected, &got).unwrap();
        }
    }
}

/// Gradients of a loss that nobody scaled are small: in f16 they are near its subnormal numbers, and
/// have to stay the numbers they are.
#[test]
fn small_gradients() {
    let size = 2.0f64.powi(-13);
    for device in devices() {
        let dtype = RefDType::F16;
        if !device.supports(dtype) {
            println!("not applicable: {} has no {dtype:?}", device.name);
            continue;
        }
        let mut errors = Vec::new();
        for case in cases(&[
            "vector-ls1-t130-k60-v64-h2-init",
            "scalar-ls1-t65-k64-v60-h2",
            // the gradient of the first state is that of the first row, times a strong decay
            "scalar-m7-t65-k64-v60-h2-init",
            "fixed-m7-t65-k64-v60-h2-init",
            // the scale takes them nearer, and the state has much of them, of several segments
            "none-t1000-k256-v64-h1",
            "scalar-ls16-t1000-k256-v64-h1",
        ]) {
            let mut prepared = Prepared::new(&case, dtype);
            prepared.d_o.iter_mut().for_each(|x| *x *= size);
            dtype.round_all(&mut prepared.d_o);
            let floor = size * ABS_FLOOR;
            let strategies = match has_scan(&device, dtype) {
                true => {
                    let mut all = inferred_and_others(&device, dtype);
                    all.extend(scans_in(&device, dtype, &[8]));
                    all
                }
                false => vec![Strategy::Inferred],
            };
            for strategy in strategies {
                prepared.check_gradients(&device.client, strategy, floor, &mut errors);
            }
        }
        assert!(errors.is_empty(), "{}:\n{}", device.name, errors.join("\n"));
    }
}

/// The state in the type of the inputs, for a step of decoding.
#[test]
fn half_states() {
    for device in devices() {
        for dtype in [RefDType::F16, RefDType::BF16] {
            if !device.supports(dtype) {
                println!("not applicable: {} has no {dtype:?}", device.name);
                continue;
            }
            let mut errors = Vec::new();
            for case in cases(&[
                "vector-ls1-b2-t1-k33-v20-h4-kv2-init-final",
                // vectors of eight
                "vector-ls1-b2-t1-k24-v64-h4-kv2-init-final",
            ]) {
                let prepared = Prepared::new(&case, dtype);
                let outputs = prepared.recurrent(&device.client, dtype);
                prepared.check_outputs("half state", outputs, &mut errors);
            }
            assert!(errors.is_empty(), "{}:\n{}", device.name, errors.join("\n"));
        }
    }
}
