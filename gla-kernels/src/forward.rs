//! The chunked forward.
//!
//! 1. `state` (Key): the state at the start of every chunk, and the final state.
//! 2. `scores`: the intra-chunk matrix `A`. Independent of 1.
//! 3. `output` (Query): `o` from both.

use cubecl::client::Client;
use cubecl::server::Handle;

use crate::components::Role;
use crate::launch::Launcher;
use crate::{Blueprint, GlaError, Problem, Strategy, buffer, check_inputs};

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
pub fn forward(
    client: &Client,
    problem: &Problem,
    strategy: Strategy,
    args: ForwardArgs,
) -> Result<Blueprint, GlaError> {
    let launcher = Launcher::new(client, problem, strategy, args.gate)?;
    let (rows, dims, size) = (problem.rows(), problem.dims, problem.dtype.size());
    let gate = dims.gate.is_some().then_some(&launcher.gate);
    check_inputs(problem, [&args.q, &args.k, &args.v], gate)?;
    if let Some(state) = &args.initial_state {
        buffer("initial_state", state, problem.state_len() * 4)?;
    }
    buffer("o", &args.o, rows * dims.heads * dims.value_dim * size)?;
    buffer("final_state", &args.final_state, problem.state_len() * 4)?;

    let states = launcher.scratch(launcher.states_len());
    let a = launcher.scratch(launcher.row_heads() * launcher.blueprint.chunk);
    let start = args.initial_state.as_ref();
    launcher.state(Role::Key, [&args.k, &args.v], start, &states, &args.final_state);
    launcher.scores(&args.q, &args.k, dims.key_dim, dims.gate.is_some(), &a);
    launcher.output(Role::Query, [&args.q, &args.v], [&states, &a], (&args.o, problem.dtype));
    Ok(launcher.blueprint)
}
