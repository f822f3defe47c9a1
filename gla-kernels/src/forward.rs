//! The chunked forward.

use cubecl::client::Client;
use cubecl::server::Handle;

use crate::launch::Launcher;
use crate::{
    Blueprint, GlaError, Problem, Strategy, buffer, check_chunked, check_gate, check_inputs, scan,
    split,
};

/// Buffers of [`forward`]; shapes as in [`Problem`].
pub struct ForwardArgs {
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
    /// Out: `[B, T, H, V]`
    pub o: Handle,
    /// Out: `[N, H, K, V]` f32
    pub final_state: Handle,
}

/// Computes `o` and the final state; returns the blueprint that ran.
///
/// # Errors
///
/// Before anything is launched: what [`check_chunked`] returns, [`GlaError::Argument`] where gate and kind of
/// the gate disagree or a buffer begins at no multiple of 16 bytes, on wgpu of the device's alignment, and
/// [`GlaError::BufferSize`] for one that is too small.
pub fn forward(
    client: &Client,
    problem: &Problem,
    strategy: Strategy,
    args: ForwardArgs,
) -> Result<Blueprint, GlaError> {
    let blueprint = check_chunked(client, problem, strategy, false)?;
    check(client, problem, &args)?;
    tracing::debug!(?blueprint, dims = ?problem.dims, "gla: forward");
    let (cut, gate) = (blueprint.cut(), args.gate.as_ref());
    match blueprint {
        Blueprint::Scan(own) => {
            scan::forward(&Launcher::new(client, problem, cut, own, gate), &args);
        }
        Blueprint::Split(own) => {
            split::forward(&Launcher::new(client, problem, cut, own, gate), &args);
        }
    }
    Ok(blueprint)
}

fn check(client: &Client, problem: &Problem, args: &ForwardArgs) -> Result<(), GlaError> {
    let (rows, dims, size) = (problem.rows(), problem.dims, problem.dtype.size());
    check_gate(problem, args.gate.is_some())?;
    check_inputs(client, problem, [&args.q, &args.k, &args.v], args.gate.as_ref())?;
    if let Some(state) = &args.initial_state {
        buffer(client, "initial_state", state, problem.state_len() * 4)?;
    }
    buffer(client, "o", &args.o, rows * dims.heads * dims.value_dim * size)?;
    buffer(client, "final_state", &args.final_state, problem.state_len() * 4)
}
