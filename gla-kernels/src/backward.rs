//! The chunked backward.

use cubecl::client::Client;
use cubecl::server::Handle;

use crate::launch::Launcher;
use crate::{
    Blueprint, GlaError, Problem, Strategy, buffer, check_chunked, check_gate, check_inputs, scan,
    split,
};

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
///
/// # Errors
///
/// Before anything is launched: what [`check_chunked`] returns, [`GlaError::Argument`] where gate and kind of
/// the gate, or gate and `dgate`, disagree or a buffer begins at no multiple of 16 bytes, on wgpu of the device's
/// alignment, and [`GlaError::BufferSize`] for one that is too small.
pub fn backward(
    client: &Client,
    problem: &Problem,
    strategy: Strategy,
    args: BackwardArgs,
) -> Result<Blueprint, GlaError> {
    let blueprint = check_chunked(client, problem, strategy, true)?;
    check(client, problem, &args)?;
    tracing::debug!(?blueprint, dims = ?problem.dims, "gla: backward");
    let (cut, gate) = (blueprint.cut(), args.gate.as_ref());
    match blueprint {
        Blueprint::Scan(own) => {
            scan::backward(&Launcher::new(client, problem, cut, own, gate), &args);
        }
        Blueprint::Split(own) => {
            split::backward(&Launcher::new(client, problem, cut, own, gate), &args);
        }
    }
    Ok(blueprint)
}

fn check(client: &Client, problem: &Problem, args: &BackwardArgs) -> Result<(), GlaError> {
    let (rows, dims, size) = (problem.rows(), problem.dims, problem.dtype.size());
    check_gate(problem, args.gate.is_some())?;
    let (gate, dgate) = (args.gate.is_some(), args.dgate.is_some());
    if gate != dgate {
        let message = format!("a gate tensor was given: {gate}, but one for its gradient: {dgate}");
        return Err(GlaError::Argument { name: "dgate", message });
    }
    let q_bytes = rows * dims.heads * dims.key_dim * size;
    let k_bytes = rows * dims.kv_heads * dims.key_dim * size;
    let v_bytes = rows * dims.kv_heads * dims.value_dim * size;
    let gate_bytes = problem.gate_len() * problem.gate_dtype.size();
    let state_bytes = problem.state_len() * 4;
    check_inputs(client, problem, [&args.q, &args.k, &args.v], args.gate.as_ref())?;
    buffer(client, "d_o", &args.d_o, rows * dims.heads * dims.value_dim * size)?;
    buffer(client, "dq", &args.dq, q_bytes)?;
    buffer(client, "dk", &args.dk, k_bytes)?;
    buffer(client, "dv", &args.dv, v_bytes)?;
    buffer(client, "dh0", &args.dh0, state_bytes)?;
    let optional = [
        ("initial_state", &args.initial_state, state_bytes),
        ("d_final", &args.d_final, state_bytes),
        ("dgate", &args.dgate, gate_bytes),
    ];
    for (name, handle, bytes) in optional {
        if let Some(handle) = handle {
            buffer(client, name, handle, bytes)?;
        }
    }
    Ok(())
}
