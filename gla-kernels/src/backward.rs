//! The chunked backward. Nothing but the inputs is kept from the forward: states and `A` are cheap
//! to compute again.
//!
//! 1. `state` (Key): the states at chunk starts again.
//! 2. `state` (Query): their gradients at chunk ends, and `dh0`.
//! 3. `scores`: `A` again; 4. `output` (Key): `dv`.
//! 5. `scores`: `dA`.
//! 6. `project` (Query, Key): the shares of `dq` and `dk` through the state; `dg` starts.
//! 7. `intra_grad` (Query, Key): the shares inside a chunk; `dg` is complete.
//! 8. `reduce`: head groups, scalar and fixed gates, casts.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::components::Role;
use crate::launch::Launcher;
use crate::{Blueprint, GateKind, GlaError, Problem, Strategy, buffer, check_inputs};

/// Buffers of [`backward`]; shapes as in [`Problem`], gradients like what they are gradients of.
pub struct BackwardArgs {
    /// `[B, T, H, K]`
    pub q: Handle,
    /// `[B, T, Hk, K]`
    pub k: Handle,
    /// `[B, T, Hk, V]`
    pub v: Handle,
    /// In the shape of the gate kind; none without a gate.
    pub gate: Option<Handle>,
    /// `[N, H, K, V]` f32; zero if absent.
    pub initial_state: Option<Handle>,
    /// Gradient of `o`, `[B, T, H, V]`
    pub d_o: Handle,
    /// Gradient of the final state, `[N, H, K, V]` f32; zero if absent.
    pub d_final: Option<Handle>,
    /// Out: `[B, T, H, K]`
    pub dq: Handle,
    /// Out: `[B, T, Hk, K]`
    pub dk: Handle,
    /// Out: `[B, T, Hk, V]`
    pub dv: Handle,
    /// Out: in the shape and type of the gate; none without a gate.
    pub dgate: Option<Handle>,
    /// Out: `[N, H, K, V]` f32
    pub dh0: Handle,
}

/// Computes all gradients; returns the blueprint that ran.
pub fn backward(
    client: &Client,
    problem: &Problem,
    strategy: Strategy,
    args: BackwardArgs,
) -> Result<Blueprint, GlaError> {
    let launcher = Launcher::new(client, problem, strategy, args.gate.clone())?;
    check(problem, &args)?;
    let (rows, dims) = (problem.rows(), problem.dims);
    let f32_type = f32::elem_type_native();
    let (q, k, v) = (&args.q, &args.k, &args.v);
    let d_o = &args.d_o;

    let states = launcher.scratch(launcher.states_len());
    let d_states = launcher.scratch(launcher.states_len());
    let end = launcher.scratch(problem.state_len());
    launcher.state(Role::Key, [k, v], args.initial_state.as_ref(), &states, &end);
    launcher.state(Role::Query, [q, d_o], args.d_final.as_ref(), &d_states, &args.dh0);

    let group = dims.heads / dims.kv_heads;
    let pairs = launcher.scratch(launcher.row_heads() * launcher.blueprint.chunk);
    launcher.scores(q, k, dims.key_dim, dims.gate.is_some(), &pairs);
    let dv_heads = if group == 1 {
        None
    } else {
        Some(launcher.scratch(launcher.row_heads() * dims.value_dim))
    };
    let dv = match &dv_heads {
        None => (&args.dv, problem.dtype),
        Some(scratch) => (scratch, f32_type),
    };
    launcher.output(Role::Key, [k, d_o], [&d_states, &pairs], dv);
    if let Some(scratch) = &dv_heads {
        launcher.reduce_heads(scratch, &args.dv, group, dims.value_dim, 1, problem.dtype);
    }

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

    if !in_place {
        launcher.reduce_heads(&dq, &args.dq, 1, dims.key_dim, 1, problem.dtype);
    }
    if !in_place || group > 1 {
        launcher.reduce_heads(&dk, &args.dk, group, dims.key_dim, 1, problem.dtype);
    }
    if let Some(dgate) = &args.dgate {
        let dtype = problem.gate_dtype;
        match dims.gate {
            GateKind::None => {}
            GateKind::Vector if vector => {}
            GateKind::Vector => launcher.reduce_heads(&dg, dgate, group, dims.key_dim, 1, dtype),
            GateKind::Scalar => launcher.reduce_heads(&dg, dgate, group, 1, dims.key_dim, dtype),
            GateKind::Fixed if rows > 0 => {
                // over channels first: in parallel, and into sums of few terms
                let per_row = launcher.scratch(launcher.row_heads());
                launcher.reduce_heads(&dg, &per_row, 1, 1, dims.key_dim, f32_type);
                launcher.reduce_rows(&per_row, dgate, 1, dtype);
            }
            GateKind::Fixed => launcher.reduce_rows(&dg, dgate, 1, dtype),
        }
    }
    Ok(launcher.blueprint)
}

fn check(problem: &Problem, args: &BackwardArgs) -> Result<(), GlaError> {
    let (rows, dims, size) = (problem.rows(), problem.dims, problem.dtype.size());
    if args.gate.is_some() != args.dgate.is_some() {
        let message = "must be given with, and only with, a gate".to_string();
        return Err(GlaError::Argument { name: "dgate", message });
    }
    let q_bytes = rows * dims.heads * dims.key_dim * size;
    let k_bytes = rows * dims.kv_heads * dims.key_dim * size;
    let v_bytes = rows * dims.kv_heads * dims.value_dim * size;
    let gate_bytes = problem.gate_len() * problem.gate_dtype.size();
    let state_bytes = problem.state_len() * 4;
    check_inputs(problem, [&args.q, &args.k, &args.v], args.gate.as_ref())?;
    buffer("d_o", &args.d_o, rows * dims.heads * dims.value_dim * size)?;
    buffer("dq", &args.dq, q_bytes)?;
    buffer("dk", &args.dk, k_bytes)?;
    buffer("dv", &args.dv, v_bytes)?;
    buffer("dh0", &args.dh0, state_bytes)?;
    let optional = [
        ("initial_state", &args.initial_state, state_bytes),
        ("d_final", &args.d_final, state_bytes),
        ("dgate", &args.dgate, gate_bytes),
    ];
    for (name, handle, bytes) in optional {
        if let Some(handle) = handle {
            buffer(name, handle, bytes)?;
        }
    }
    Ok(())
}
