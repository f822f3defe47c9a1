//! The order of the kernels.

use cubecl::prelude::*;

use super::launch::Walk;
use super::walk_spec::WalkSpec;
use crate::launch::Launcher;
use crate::{BackwardArgs, ForwardArgs, GateKind, ScanBlueprint};

/// 1. `prepare`. 2. The `o` walk, after the states between segments if there are any.
pub(crate) fn forward(launcher: &Launcher<ScanBlueprint>, args: &ForwardArgs) {
    let made = launcher.prepare(&args.q, &args.k);
    let lines = launcher.lines();
    let (start, end) = (args.initial_state.as_ref(), &args.final_state);
    let ends = launcher.ends(&made, &lines, false, [&made.kt, &args.v], start, end);
    launcher.walk(
        &made,
        &lines,
        Walk {
            spec: WalkSpec::values(launcher.shape(&lines, &ends, false)),
            left: &made.qt,
            update: &made.kt,
            right: &args.v,
            ends: &ends,
            out: (&args.o, launcher.problem.dtype),
            trace: None,
            products: None,
        },
    );
}

/// 1. `prepare` again.
/// 2. The `dv` walk, and `dh0`.
/// 3. The `dk` walk, which leaves its states for
/// 4. the `dq` walk.
/// 5. `intra_grad`.
/// 6. Reductions for head groups and the cheaper gates.
pub(crate) fn backward(launcher: &Launcher<ScanBlueprint>, args: &BackwardArgs) {
    let problem = launcher.problem;
    let dims = problem.dims;
    let f32_type = f32::elem_type_native();
    let group = dims.heads / dims.kv_heads;
    let (q, k, v, d_o) = (&args.q, &args.k, &args.v, &args.d_o);
    let made = launcher.prepare(q, k);
    let lines = launcher.lines();
    let unused = launcher.scratch(problem.state_len());

    let (start, end) = (args.d_final.as_ref(), &args.dh0);
    let ends = launcher.ends(&made, &lines, true, [&made.qt, d_o], start, end);
    let (dv, dv_type) = launcher.per_head(&args.dv, dims.value_dim);
    launcher.walk(
        &made,
        &lines,
        Walk {
            spec: WalkSpec::values(launcher.shape(&lines, &ends, true)),
            left: &made.kt,
            update: &made.qt,
            right: d_o,
            ends: &ends,
            out: (&dv, dv_type),
            trace: None,
            products: None,
        },
    );
    launcher.sum_heads(&dv, &args.dv, dims.value_dim);

    // writes the same last states once more
    let spec = WalkSpec::keys(launcher.shape(&lines, &ends, true));
    let len = spec.out_len(problem.rows(), launcher.num_chunks);
    let (dk_state, dq_state) = (launcher.scratch(len), launcher.scratch(len));
    let gated = dims.gate.is_some();
    let chunk_heads = launcher.num_chunks * dims.heads;
    let trace = gated.then(|| launcher.scratch_like(2 * chunk_heads * spec.trace_pairs()));
    let products = launcher.scratch(spec.shares() * chunk_heads * spec.padded);
    launcher.walk(
        &made,
        &lines,
        Walk {
            spec,
            left: v,
            update: d_o,
            right: &made.qt,
            ends: &ends,
            out: (&dk_state, f32_type),
            trace: trace.as_ref(),
            products: None,
        },
    );
    let start = args.initial_state.as_ref();
    let ends = launcher.ends(&made, &lines, false, [&made.kt, v], start, &unused);
    launcher.walk(
        &made,
        &lines,
        Walk {
            spec: WalkSpec::keys(launcher.shape(&lines, &ends, false)),
            left: d_o,
            update: v,
            right: &made.kt,
            ends: &ends,
            out: (&dq_state, f32_type),
            trace: trace.as_ref(),
            products: gated.then_some(&products),
        },
    );

    let key_len = launcher.row_heads() * dims.key_dim;
    let (dk, dk_type) = launcher.per_head(&args.dk, dims.key_dim);
    let dg = match &args.dgate {
        Some(_) if dims.gate != GateKind::Vector || group > 1 => Some(launcher.scratch(key_len)),
        _ => None,
    };
    launcher.scan_intra_grad(
        [q, k, v, d_o],
        [&dq_state, &dk_state, &products],
        &spec,
        (&args.dq, problem.dtype),
        (&dk, dk_type),
        match (&dg, &args.dgate) {
            (Some(scratch), _) => (scratch, f32_type),
            (None, Some(dgate)) => (dgate, problem.gate_dtype),
            (None, None) => (&unused, f32_type),
        },
    );
    launcher.sum_heads(&dk, &args.dk, dims.key_dim);
    if let (Some(scratch), Some(dgate)) = (&dg, &args.dgate) {
        launcher.gate_gradient(scratch, dgate);
    }
}
