//! The order of the stages.

use cubecl::prelude::*;

use crate::components::Role;
use crate::launch::Launcher;
use crate::reduce::Sum;
use crate::{BackwardArgs, ForwardArgs, GateKind, SplitBlueprint};

/// 1. `state` (Key): the state at the start of every chunk, and the final state; of segments after `combine`.
/// 2. `scores`: the intra-chunk matrix `A`. Independent of 1.
/// 3. `output` (Query): `o` from both.
pub(crate) fn forward(launcher: &Launcher<SplitBlueprint>, args: &ForwardArgs) {
    let (problem, dims) = (launcher.problem, launcher.problem.dims);
    let states = launcher.scratch(launcher.states_len());
    let a = launcher.scratch(launcher.row_heads() * launcher.blueprint.chunk);
    let start = args.initial_state.as_ref();
    launcher.states(Role::Key, [&args.k, &args.v], start, &states, &args.final_state);
    launcher.scores(&args.q, &args.k, dims.key_dim, dims.gate.is_some(), &a);
    launcher.output(Role::Query, [&args.q, &args.v], [&states, &a], (&args.o, problem.dtype));
}

/// Nothing but the inputs is kept from the forward: states and `A` are cheap to compute again.
///
/// 1. `state` (Key): the states at chunk starts again.
/// 2. `state` (Query): their gradients at chunk ends, and `dh0`.
/// 3. `scores`: `A` again; 4. `output` (Key): `dv`.
/// 5. `scores`: `dA`.
/// 6. `project` (Query, Key): the shares of `dq` and `dk` through the state; `dg` starts.
/// 7. `intra_grad` (Query, Key): the shares inside a chunk; `dg` is complete.
/// 8. `reduce`: head groups, scalar and fixed gates, casts.
pub(crate) fn backward(launcher: &Launcher<SplitBlueprint>, args: &BackwardArgs) {
    let (problem, dims) = (launcher.problem, launcher.problem.dims);
    let f32_type = f32::elem_type_native();
    let (q, k, v, d_o) = (&args.q, &args.k, &args.v, &args.d_o);

    let states = launcher.scratch(launcher.states_len());
    let d_states = launcher.scratch(launcher.states_len());
    let end = launcher.scratch(problem.state_len());
    launcher.states(Role::Key, [k, v], args.initial_state.as_ref(), &states, &end);
    launcher.states(Role::Query, [q, d_o], args.d_final.as_ref(), &d_states, &args.dh0);

    let group = dims.heads / dims.kv_heads;
    let pairs = launcher.scratch(launcher.row_heads() * launcher.blueprint.chunk);
    launcher.scores(q, k, dims.key_dim, dims.gate.is_some(), &pairs);
    let (dv, dv_type) = launcher.shares(&args.dv, dims.kv_heads, dims.value_dim, 1, f32_type);
    launcher.output(Role::Key, [k, d_o], [&d_states, &pairs], (&dv, dv_type));
    launcher.sum_shares((&dv, dv_type), &args.dv, dims.kv_heads, dims.value_dim, 1);

    // `A` is used up: its buffer takes `dA`
    launcher.scores(d_o, v, dims.value_dim, false, &pairs);

    let key_len = launcher.row_heads() * dims.key_dim;
    let in_place = problem.dtype == f32_type;
    let dq = if in_place { args.dq.clone() } else { launcher.scratch(key_len) };
    let dk = if in_place && group == 1 { args.dk.clone() } else { launcher.scratch(key_len) };
    let vector = dims.gate == GateKind::Vector && group == 1 && problem.gate_dtype == f32_type;
    let dg = match &args.dgate {
        Some(dgate) if vector => dgate.clone(),
        Some(_) => launcher.scratch(key_len),
        None => launcher.scratch(1),
    };
    launcher.project(Role::Query, d_o, [&states, &states], [&dq, &dg]);
    launcher.project(Role::Key, v, [&d_states, &states], [&dk, &dg]);
    launcher.intra_grad(Role::Query, [q, k], &pairs, [&dq, &dg]);
    launcher.intra_grad(Role::Key, [q, k], &pairs, [&dk, &dg]);

    let keys = |group| Sum { parts: 1, group, width: dims.key_dim, inner: 1 };
    if !in_place {
        launcher.reduce_heads(&dq, &args.dq, keys(1), [f32_type, problem.dtype]);
    }
    if !in_place || group > 1 {
        launcher.reduce_heads(&dk, &args.dk, keys(group), [f32_type, problem.dtype]);
    }
    if let Some(dgate) = &args.dgate
        && !vector
    {
        launcher.gate_gradient(&dg, dgate, dims.key_dim);
    }
}
