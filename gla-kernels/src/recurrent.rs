//! The recurrence step by step: a short scan, and the single step of decoding.
//!
//! A unit owns one column of one head's state and walks time: no synchronisation, no scratch. The
//! state is updated in place; it starts as the initial state and ends as the final one.

use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::components::{decay, row_offset};
use crate::launch::cubes;
use crate::{
    DeviceLimits, Dims, GlaError, Problem, buffer, check_gate, check_inputs, check_recurrent,
};

/// * `q`: `[rows, H, K]`, `k`: `[rows, Hk, K]`, `v`: `[rows, Hk, V]`
/// * `state`: in and out, `[N, H, K, V]`; `o`: out, `[rows, H, V]`
/// * `spans`: first row and row count of each sequence
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn gla_recurrent_kernel<E: Float, G: Float>(
    q: &[E],
    k: &[E],
    v: &[E],
    gate: &[G],
    state: &mut [f32],
    o: &mut [E],
    spans: &[u32],
    tasks: usize,
    scale: f32,
    #[comptime] dims: Dims,
    #[comptime] cols: usize,
    #[define(E, G)] _dtypes: [ElemType; 2],
) {
    let key_dim = comptime!(dims.key_dim);
    let value_dim = comptime!(dims.value_dim);
    let tiles_v = comptime!(value_dim.div_ceil(cols));
    let task = CUBE_POS;
    if task >= tasks {
        terminate!();
    }
    let j = (task % tiles_v) * cols + UNIT_POS as usize;
    let head = (task / tiles_v) % dims.heads;
    let sequence = task / comptime!(tiles_v * dims.heads);
    if j >= value_dim {
        terminate!();
    }
    let start = spans[2 * sequence] as usize;
    let len = spans[2 * sequence + 1] as usize;
    let state_at = (sequence * dims.heads + head) * comptime!(key_dim * value_dim) + j;
    for row in start..start + len {
        let q_at = row_offset(row, head, dims, dims.heads, key_dim);
        let k_at = row_offset(row, head, dims, dims.kv_heads, key_dim);
        let value = f32::cast_from(v[row_offset(row, head, dims, dims.kv_heads, value_dim) + j]);
        let mut sum = f32::new(0.0);
        for i in 0..key_dim {
            let at = state_at + i * value_dim;
            let w = decay::<G>(gate, row, head, i, dims);
            let next = state[at] * w + f32::cast_from(k[k_at + i]) * value;
            state[at] = next;
            sum += f32::cast_from(q[q_at + i]) * next;
        }
        o[(row * dims.heads + head) * value_dim + j] = E::cast_from(sum * scale);
    }
}

/// Inputs of [`recurrent`]; shapes as in [`Problem`].
pub struct RecurrentArgs {
    /// `[B, T, H, K]`
    pub q: Handle,
    /// `[B, T, Hk, K]`
    pub k: Handle,
    /// `[B, T, Hk, V]`
    pub v: Handle,
    /// In the shape of the gate kind; none without a gate.
    pub gate: Option<Handle>,
    /// In and out: `[N, H, K, V]` f32.
    pub state: Handle,
    /// Out: `[B, T, H, V]`
    pub o: Handle,
}

/// Runs the recurrence over all rows, updating `state` in place.
pub fn recurrent(client: &Client, problem: &Problem, args: RecurrentArgs) -> Result<(), GlaError> {
    check_gate(problem, args.gate.is_some())?;
    check_recurrent(client, problem)?;
    let limits = DeviceLimits::of(client);
    let dims = problem.dims;
    let (rows, size) = (problem.rows(), problem.dtype.size());
    check_inputs(problem, [&args.q, &args.k, &args.v], args.gate.as_ref())?;
    buffer("state", &args.state, problem.state_len() * 4)?;
    buffer("o", &args.o, rows * dims.heads * dims.value_dim * size)?;
    let spans: Vec<u32> = problem
        .sequences
        .spans()
        .into_iter()
        .flat_map(|(start, len)| [start as u32, len as u32])
        .collect();
    if rows == 0 {
        return Ok(());
    }
    let cols = [32, 64, 128].into_iter().find(|&c| dims.value_dim <= c).unwrap_or(256);
    let cols = cols.min(limits.units);
    let tasks = problem.num_sequences() * dims.heads * dims.value_dim.div_ceil(cols);
    let spans_len = spans.len();
    let spans = client.create_from_slice(u32::as_bytes(&spans));
    let gate = args.gate.unwrap_or_else(|| spans.clone());
    // SAFETY: every buffer was checked against the problem, and the kernel stays inside it.
    unsafe {
        gla_recurrent_kernel::launch_unchecked(
            client,
            cubes(tasks, &limits),
            CubeDim::new_1d(cols as u32),
            BufferArg::from_raw_parts(args.q, rows * dims.heads * dims.key_dim),
            BufferArg::from_raw_parts(args.k, rows * dims.kv_heads * dims.key_dim),
            BufferArg::from_raw_parts(args.v, rows * dims.kv_heads * dims.value_dim),
            BufferArg::from_raw_parts(gate, problem.gate_len().max(1)),
            BufferArg::from_raw_parts(args.state, problem.state_len()),
            BufferArg::from_raw_parts(args.o, rows * dims.heads * dims.value_dim),
            BufferArg::from_raw_parts(spans, spans_len),
            tasks,
            problem.scale,
            dims,
            cols,
            [problem.dtype, problem.gate_dtype],
        );
    }
    Ok(())
}
