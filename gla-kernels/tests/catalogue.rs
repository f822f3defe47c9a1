//! Every case of the catalogue on every device: the chunked and the recurrent form and all
//! gradients against the f64 reference.
#![cfg(feature = "eval")]

mod common;

use common::{Prepared, devices, elem_type};
use gla_kernels::Strategy;
use gla_kernels::eval::{Case, CaseGate, RefDType, small};

fn run(cases: &[Case], gate: CaseGate, dtype: RefDType) {
    for device in devices() {
        if !device.client.properties().supports_type(elem_type(dtype)) {
            println!("SKIPPED {} {dtype:?}: the device does not support it", device.name);
            continue;
        }
        let cases: Vec<_> = cases.iter().filter(|case| case.gate == gate).collect();
        let filter = std::env::var("GLA_CASE").unwrap_or_default();
        let mut errors = Vec::new();
        for case in cases.iter().filter(|case| case.id.contains(&filter)) {
            let start = std::time::Instant::now();
            let prepared = Prepared::new(case, dtype);
            errors.extend(prepared.check_all(&device.client, Strategy::Inferred));
            println!("{} {} {:?} {:.2?}", device.name, case.id, dtype, start.elapsed());
        }
        println!("{}: {} cases in {dtype:?}, {} errors", device.name, cases.len(), errors.len());
        assert!(errors.is_empty(), "{}:\n{}", device.name, errors.join("\n"));
    }
}

macro_rules! catalogue {
    ($($name:ident: $cases:ident, $gate:ident, $dtype:ident;)*) => {
        $(#[test] fn $name() { run(&$cases(), CaseGate::$gate, RefDType::$dtype); })*
    };
}

catalogue! {
    small_none_f32: small, None, F32;
    small_fixed_f32: small, Fixed, F32;
    small_scalar_f32: small, Scalar, F32;
    small_vector_f32: small, Vector, F32;
    small_none_f16: small, None, F16;
    small_fixed_f16: small, Fixed, F16;
    small_scalar_f16: small, Scalar, F16;
    small_vector_f16: small, Vector, F16;
    small_none_bf16: small, None, BF16;
    small_fixed_bf16: small, Fixed, BF16;
    small_scalar_bf16: small, Scalar, BF16;
    small_vector_bf16: small, Vector, BF16;
}
