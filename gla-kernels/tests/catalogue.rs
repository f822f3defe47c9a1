//! The catalogue on every device: the chunked and the recurrent form and all gradients against the
//! f64 reference.
//!
//! A real GPU runs all of it. A software adapter takes seconds to compile one kernel for one shape,
//! so it runs every gate on one shape, as every device does in half precision; `GLA_FULL=1` makes it
//! run all.
#![cfg(feature = "eval")]

mod common;

use common::{Prepared, devices};
use gla_kernels::eval::{Case, CaseGate, RefDType, large, one_shape, small};
use gla_kernels::{
    Blueprint, Instruction, Plan, ScanBlueprint, SplitBlueprint, Strategy, check_chunked,
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
        // shapes are a matter of indices, which do not depend on the type
        let mut cases = match (set, full) {
            (Set::Small, true) if dtype == RefDType::F32 => small(),
            (Set::Small, _) => one_shape(),
            (Set::Large, true) => large(),
            (Set::Large, false) => {
                println!("left to hardware: {} large cases (GLA_FULL=1)", device.name);
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
        errors.extend(prepared.check_all(client, strategy));
        println!("{name} {} {dtype:?} {strategy:?} {:.2?}", case.id, start.elapsed());
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
        let case = cases(&["vector-mixed-t70-k20-v33-h2-init-final"]);
        let f32 = RefDType::F32;
        let widths: &[usize] = if device.is_software() { &[16] } else { &[16, 32, 64] };
        for &chunk in widths {
            check(device.name, &device.client, &case, f32, f32, Strategy::Chunk(chunk));
        }
        for &cols in widths {
            let instruction = Instruction::Registers;
            let blueprint = SplitBlueprint { chunk: 32, cols, instruction };
            let strategy = Strategy::Forced(Blueprint::Split(blueprint));
            check(device.name, &device.client, &case, f32, f32, strategy);
        }
    }
}

/// The plan that is not chosen by itself is right too.
#[test]
fn plans_agree() {
    for device in devices() {
        for dtype in [RefDType::F16, RefDType::BF16] {
            let few = cases(&[
                "none-b2-t65-k33-v20-h4-kv2-init-final",
                "vector-ls1-cu0.5.5.64.130-k33-v20-h4-kv2-init",
                "vector-mixed-b2-t65-k33-v20-h4-kv2-init-final",
                "vector-ls1-t130-k33-v20-h4-kv2-init-final",
            ]);
            let problem = Prepared::new(&few[0], dtype).problem;
            let scan = check_chunked(&device.client, &problem, Strategy::Plan(Plan::Scan));
            match scan {
                Err(why) => println!("{} has the split plan only: {why}", device.name),
                Ok(_) => {
                    let inferred = check_chunked(&device.client, &problem, Strategy::Inferred);
                    assert_eq!(inferred.expect("it fits").plan(), Plan::Scan);
                    let short = Blueprint::Scan(ScanBlueprint { segment: 1 });
                    for strategy in [
                        Strategy::Plan(Plan::Scan),
                        Strategy::Plan(Plan::Split),
                        Strategy::Forced(short),
                    ] {
                        let f32 = RefDType::F32;
                        check(device.name, &device.client, &few, dtype, f32, strategy);
                    }
                }
            }
        }
    }
}

/// The gate, and its gradient, in the type of the other inputs.
#[test]
fn half_gates() {
    for device in devices() {
        for dtype in [RefDType::F16, RefDType::BF16] {
            if !device.supports(dtype) {
                println!("not applicable: {} has no {dtype:?}", device.name);
                continue;
            }
            let few = cases(&["vector-ls1-b2-t65-k33-v20-h4-kv2-init-final"]);
            check(device.name, &device.client, &few, dtype, dtype, Strategy::Inferred);
        }
    }
}
