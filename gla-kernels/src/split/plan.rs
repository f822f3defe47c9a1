//! The order of the stages.

use cubecl::prelude::*;

use crate::components::Role;
use crate::launch::Launcher;
use crate::reduce::Sum;
use crate::{BackwardArgs, ForwardArgs, SplitBlueprint};

/// 1. `prepare`: rows times their decay to the edges of their chunks, and the decays of the chunks.
/// 2. `chunk_state` and `state_passing` (Key): the state at the start of every chunk, and the final state.
/// 3. `scores`: the intra-chunk matrix `A`. Independent of 1 and 2.
/// 4. `output` (Query): `o` from all of them.
pub(crate) fn forward(launcher: &Launcher<SplitBlueprint>, args: &ForwardArgs) {
    let problem = launcher.problem;
    let states = launcher.states_scratch();
    let a = launcher.scratch(launcher.row_heads() * launcher.blueprint.chunk);
    let made = launcher.prepare([&args.q, &args.k], || {
        [Role::Query, Role::Key].map(|role| launcher.decayed_rows(role))
    });
    let ends = (args.initial_state.as_ref(), Some(&args.final_state));
    launcher.states(Role::Key, &made, &args.v, ends, &states);
    launcher.scores(&args.q, &args.k, &a);
    launcher.output(Role::Query, &made, &args.v, [&states, &a], (&args.o, problem.dtype));
}

/// Nothing but the inputs is kept from the forward: states and `A` are cheap to compute again.
///
/// 1. `prepare` again, into the buffers of `dq` and `dk`, which nobody writes before 7.
/// 2. `chunk_state` and `state_passing` (Key): the states at chunk starts again.
/// 3. The same (Query): their gradients at chunk ends, and `dh0`.
/// 4. `scores`: `A` again; 5. `output` (Key): `dv`.
/// 6. `scores`: `dA`, and of a scalar or fixed gate the pairs' share of `dg`.
/// 7. `project` (Query, Key): the shares of `dq` and `dk` through the state; `dg` of a vector gate starts.
/// 8. `intra_grad` (Query, Key): the shares inside a chunk; that `dg` is complete.
/// 9. `row_gate`: `dg` of a scalar or fixed gate, with what 7 and 8 have left for it.
/// 10. `reduce`: head groups, all rows of a fixed gate, casts.
pub(crate) fn backward(launcher: &Launcher<SplitBlueprint>, args: &BackwardArgs) {
    let (problem, dims) = (launcher.problem, launcher.problem.dims);
    let f32_type = f32::elem_type_native();
    let (q, k, v, d_o) = (&args.q, &args.k, &args.v, &args.d_o);
    let group = dims.heads / dims.kv_heads;

    let in_place = problem.dtype == f32_type;
    let dq = if in_place { args.dq.clone() } else { launcher.key_rows() };
    let dk = if in_place && group == 1 { args.dk.clone() } else { launcher.key_rows() };

    let made = launcher.prepare([q, k], || [dq.clone(), dk.clone()]);
    let states = launcher.states_scratch();
    let d_states = launcher.states_scratch();
    launcher.states(Role::Key, &made, v, (args.initial_state.as_ref(), None), &states);
    let ends = (args.d_final.as_ref(), Some(&args.dh0));
    launcher.states(Role::Query, &made, d_o, ends, &d_states);

    let pairs = launcher.scratch(launcher.row_heads() * launcher.blueprint.chunk);
    launcher.scores(q, k, &pairs);
    let (dv, dv_type) = launcher.shares(&args.dv, dims.kv_heads, dims.value_dim, 1, f32_type);
    launcher.output(Role::Key, &made, d_o, [&d_states, &pairs], (&dv, dv_type));
    launcher.sum_shares((&dv, dv_type), &args.dv, dims.kv_heads, dims.value_dim, 1);

    // `A` is used up: its buffer takes `dA`
    let gate_grad = launcher.gate_grad(args.dgate.as_ref());
    launcher.score_grads(d_o, v, &pairs, &gate_grad);

    launcher.project(Role::Query, d_o, [&states, &states], &dq, &gate_grad);
    launcher.project(Role::Key, v, [&d_states, &states], &dk, &gate_grad);
    launcher.intra_grad(Role::Query, [q, k], &pairs, &dq, &gate_grad);
    launcher.intra_grad(Role::Key, [q, k], &pairs, &dk, &gate_grad);

    let keys = |group| Sum { parts: 1, group, width: dims.key_dim };
    if !in_place {
        launcher.reduce_heads(&dq, &args.dq, keys(1), [f32_type, problem.dtype]);
    }
    if !in_place || group > 1 {
        launcher.reduce_heads(&dk, &args.dk, keys(group), [f32_type, problem.dtype]);
    }
    if let Some(dgate) = &args.dgate {
        launcher.finish_gate_grad(&gate_grad, &made, dgate);
    }
}
