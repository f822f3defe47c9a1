//! The recurrence step by step: a short scan, and the single step of decoding.
//!
//! A cube owns some columns of one head's state and walks time. Its units share the key channels:
//! each updates some rows of up to eight neighbouring columns and sums their share of the output,
//! which they add up in shared memory. The state is updated in place; it starts as the initial state and ends as the final
//! one. A step reads and writes the state once, so what counts is how many rows are on their way
//! at a time: a unit reads eight before it touches the first.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::components::{decay, row_offset};
use crate::launch::cubes;
use crate::{
    DeviceLimits, Dims, GlaError, Problem, Sequences, buffer, check_gate, check_inputs,
    check_recurrent,
};

/// * `q`: `[rows, H, K]`, `k`: `[rows, Hk, K]`, `v`: `[rows, Hk, V]`
/// * `state`: in and out, `[N, H, K, V]`; `o`: out, `[rows, H, V]`
/// * `spans`: first row and row count of each sequence, read if `spec.packed`; otherwise all have
///   `time` rows
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn gla_recurrent_kernel<E: Float, G: Float, S: Float, N: Size>(
    q: &[E],
    k: &[E],
    v: &[Vector<E, N>],
    gate: &[G],
    state: &mut [Vector<S, N>],
    o: &mut [Vector<E, N>],
    spans: &[u32],
    time: usize,
    tasks: usize,
    scale: f32,
    #[comptime] spec: RecurrentSpec,
    #[define(E, G, S)] _dtypes: [ElemType; 3],
) {
    let dims = comptime!(spec.dims);
    let cols = comptime!(spec.cols);
    let key_dim = comptime!(dims.key_dim);
    let value_dim = comptime!(dims.value_dim / spec.vector);
    let tiles_v = comptime!(value_dim.div_ceil(cols));
    // rows of the state for each unit
    let share = comptime!(key_dim.div_ceil(spec.slices).next_multiple_of(BATCH));
    let task = CUBE_POS;
    if task >= tasks {
        terminate!();
    }
    let unit = UNIT_POS as usize;
    let j = (task % tiles_v) * cols + unit % cols;
    let slice = unit / cols;
    let head = (task / tiles_v) % dims.heads;
    let sequence = task / comptime!(tiles_v * dims.heads);
    let mut start = sequence * time;
    let mut len = time;
    if comptime!(spec.packed) {
        start = spans[2 * sequence] as usize;
        len = spans[2 * sequence + 1] as usize;
    }
    let exists = j < value_dim;
    let column = select(exists, j, 0usize);
    let state_at = (sequence * dims.heads + head) * comptime!(key_dim * value_dim) + column;

    let mut partial = Shared::<[Vector<f32, N>]>::new_slice(comptime!(cols * spec.slices));
    for row in start..start + len {
        let q_at = row_offset(row, head, dims, dims.heads, key_dim);
        let k_at = row_offset(row, head, dims, dims.kv_heads, key_dim);
        let value_at = row_offset(row, head, dims, dims.kv_heads, value_dim) + column;
        let value = Vector::<f32, N>::cast_from(v[value_at]);
        let mut sum = Vector::<f32, N>::new(0.0f32);
        for batch in 0..comptime!(share / BATCH) {
            let first = slice * share + batch * BATCH;
            let mut old = Array::<Vector<S, N>>::new(BATCH);
            #[unroll]
            for n in 0..BATCH {
                let i = select(first + n < key_dim, first + n, 0usize);
                old[n] = state[state_at + i * value_dim];
            }
            #[unroll]
            for n in 0..BATCH {
                let i = first + n;
                if i < key_dim && exists {
                    let w = Vector::new(decay::<G>(gate, row, head, i, dims));
                    let own = Vector::new(f32::cast_from(k[k_at + i]));
                    let next = Vector::<f32, N>::cast_from(old[n]) * w + own * value;
                    state[state_at + i * value_dim] = Vector::cast_from(next);
                    sum += Vector::new(f32::cast_from(q[q_at + i])) * next;
                }
            }
        }
        if comptime!(spec.slices > 1) {
            partial[unit] = sum;
            sync_cube();
            if slice == 0 {
                #[unroll]
                for other in 1..spec.slices {
                    sum += partial[other * cols + unit];
                }
            }
        }
        if slice == 0 && exists {
            o[(row * dims.heads + head) * value_dim + j] =
                Vector::cast_from(sum * Vector::new(scale));
        }
        if comptime!(spec.slices > 1) {
            sync_cube();
        }
    }
}

/// Rows of the state that a unit reads before it writes the first.
const BATCH: usize = 8;

/// Most units of a cube.
const UNITS: usize = 256;

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct RecurrentSpec {
    dims: Dims,
    /// Columns that a unit owns.
    vector: usize,
    /// Units of a cube that own columns.
    cols: usize,
    /// Units that share a column.
    slices: usize,
    /// Whether sequences have lengths of their own.
    packed: bool,
}

impl RecurrentSpec {
    /// `size`: bytes of an element of the state.
    fn new(dims: Dims, packed: bool, units: usize, size: usize) -> Self {
        let units = units.min(UNITS);
        let fits = |&n: &usize| n * size <= 16 && dims.value_dim.is_multiple_of(n);
        let vector = [8, 4, 2].into_iter().find(fits).unwrap_or(1);
        let vectors = dims.value_dim / vector;
        // eight neighbours read a line of the cache
        let wanted = 128 / (size * vector);
        let cols = wanted.min(vectors.next_power_of_two()).min(units);
        let slices = dims.key_dim.div_ceil(BATCH).min(units / cols);
        RecurrentSpec { dims, vector, cols, slices, packed }
    }

    fn units(&self) -> usize {
        self.cols * self.slices
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
    /// In and out: `[N, H, K, V]`.
    pub state: Handle,
    /// Type of its elements: f32, or the type of q, which halves what a step reads and writes and
    /// rounds the state at each step.
    pub state_dtype: ElemType,
    /// Out: `[B, T, H, V]`
    pub o: Handle,
}

/// Runs the recurrence over all rows, updating `state` in place.
///
/// # Errors
///
/// Before anything is launched: what [`check_recurrent`] returns, [`GlaError::Argument`] where gate and kind of
/// the gate disagree, the state is neither f32 nor of the type of q or a buffer begins at no multiple of 16
/// bytes, on wgpu of the device's alignment, and [`GlaError::BufferSize`] for one that is too small.
pub fn recurrent(client: &Client, problem: &Problem, args: RecurrentArgs) -> Result<(), GlaError> {
    check_gate(problem, args.gate.is_some())?;
    check_recurrent(client, problem)?;
    let limits = DeviceLimits::of(client);
    let dims = problem.dims;
    let (rows, size) = (problem.rows(), problem.dtype.size());
    check_inputs(client, problem, [&args.q, &args.k, &args.v], args.gate.as_ref())?;
    if args.state_dtype != f32::elem_type_native() && args.state_dtype != problem.dtype {
        let (got, own) = (args.state_dtype, problem.dtype);
        let message = format!("the state is {got}, expected f32 or {own} as q");
        return Err(GlaError::Argument { name: "state", message });
    }
    buffer(client, "state", &args.state, problem.state_len() * args.state_dtype.size())?;
    buffer(client, "o", &args.o, rows * dims.heads * dims.value_dim * size)?;
    if rows == 0 {
        return Ok(());
    }
    let (time, spans) = match &problem.sequences {
        Sequences::Uniform { time, .. } => (*time, None),
        packed => {
            let spans = packed.spans().into_iter();
            let words: Vec<u32> = spans.flat_map(|(at, len)| [at as u32, len as u32]).collect();
            (0, Some((client.create_from_slice(u32::as_bytes(&words)), words.len())))
        }
    };
    let spec = RecurrentSpec::new(dims, spans.is_some(), limits.units, args.state_dtype.size());
    let vectors = dims.value_dim / spec.vector;
    let tasks = problem.num_sequences() * dims.heads * vectors.div_ceil(spec.cols);
    // what is not read may be any buffer that is not written
    let (spans, spans_len) = spans.unwrap_or_else(|| (args.q.clone(), 1));
    let gate = args.gate.unwrap_or_else(|| args.q.clone());
    // SAFETY: every buffer was checked against the problem, and the kernel stays inside it.
    unsafe {
        gla_recurrent_kernel::launch_unchecked(
            client,
            cubes(tasks, &limits),
            CubeDim::new_1d(spec.units() as u32),
            spec.vector,
            BufferArg::from_raw_parts(args.q, rows * dims.heads * dims.key_dim),
            BufferArg::from_raw_parts(args.k, rows * dims.kv_heads * dims.key_dim),
            BufferArg::from_raw_parts(args.v, rows * dims.kv_heads * vectors),
            BufferArg::from_raw_parts(gate, problem.gate_len().max(1)),
            BufferArg::from_raw_parts(args.state, problem.state_len() / spec.vector),
            BufferArg::from_raw_parts(args.o, rows * dims.heads * vectors),
            BufferArg::from_raw_parts(spans, spans_len),
            time,
            tasks,
            problem.scale,
            spec,
            [problem.dtype, problem.gate_type(), args.state_dtype],
        );
    }
    Ok(())
}
