//! What every launch needs: the device's limits, the chunk table, the compile-time spec.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::chunk::{self, StageSpec, cubes};
use crate::components::Role;
use crate::{Blueprint, DeviceLimits, GlaError, Problem, Strategy, check_chunked, check_gate};

/// One call on one device: launches the stages of [`crate::chunk`].
pub(crate) struct Launcher<'a> {
    client: &'a Client,
    limits: DeviceLimits,
    pub problem: &'a Problem,
    pub blueprint: Blueprint,
    pub gate: Handle,
    table: Handle,
    table_len: usize,
    pub num_chunks: usize,
}

impl<'a> Launcher<'a> {
    /// Checks the problem and chooses the blueprint; nothing is launched yet.
    pub fn new(
        client: &'a Client,
        problem: &'a Problem,
        strategy: Strategy,
        gate: Option<Handle>,
    ) -> Result<Self, GlaError> {
        check_gate(problem, gate.is_some())?;
        let blueprint = check_chunked(client, problem, strategy)?;
        tracing::debug!(?blueprint, dims = ?problem.dims, "gla: chunked plan");
        let table = problem.sequences.chunk_table(blueprint.chunk);
        let words = if table.words.is_empty() { vec![0; 2] } else { table.words };
        let handle = client.create_from_slice(u32::as_bytes(&words));
        Ok(Launcher {
            client,
            limits: DeviceLimits::of(client),
            problem,
            blueprint,
            // without a gate the kernels read none; any buffer fills the slot
            gate: gate.unwrap_or_else(|| handle.clone()),
            table: handle,
            table_len: words.len(),
            num_chunks: table.num_chunks,
        })
    }

    /// Scratch of `len` f32.
    pub fn scratch(&self, len: usize) -> Handle {
        self.client.empty(4 * len.max(1))
    }

    /// Rows times query heads.
    pub fn row_heads(&self) -> usize {
        self.problem.rows() * self.problem.dims.heads
    }

    /// Elements of the states between chunks.
    pub fn states_len(&self) -> usize {
        let dims = self.problem.dims;
        self.num_chunks * dims.heads * dims.key_dim * dims.value_dim
    }

    fn spec(&self, role: Role) -> StageSpec {
        StageSpec { dims: self.problem.dims, blueprint: self.blueprint, role }
    }

    fn table(&self) -> BufferArg {
        arg(&self.table, self.table_len)
    }

    fn gate(&self) -> BufferArg {
        arg(&self.gate, self.problem.gate_len().max(1))
    }

    fn stage_dim(&self) -> CubeDim {
        CubeDim::new_1d(self.blueprint.units() as u32)
    }

    fn types(&self) -> [ElemType; 2] {
        [self.problem.dtype, self.problem.gate_dtype]
    }

    /// Stage `state`, see [`chunk::state`].
    pub fn state(
        &self,
        role: Role,
        [x, y]: [&Handle; 2],
        start: Option<&Handle>,
        states: &Handle,
        end: &Handle,
    ) {
        let dims = self.problem.dims;
        let (bp, sequences) = (self.blueprint, self.problem.num_sequences());
        let tiles = dims.value_dim.div_ceil(bp.cols) * dims.key_dim.div_ceil(bp.chunk);
        let tasks = tiles * dims.heads * sequences;
        if tasks == 0 {
            return;
        }
        let rows = self.problem.rows();
        let own_heads = if role == Role::Key { dims.kv_heads } else { dims.heads };
        // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths.
        unsafe {
            chunk::state::gla_state_kernel::launch_unchecked(
                self.client,
                cubes(tasks, &self.limits),
                self.stage_dim(),
                // without rows there is nothing to read; an empty buffer could not be bound
                if rows == 0 { self.table() } else { arg(x, rows * own_heads * dims.key_dim) },
                if rows == 0 { self.table() } else { arg(y, rows * own_heads * dims.value_dim) },
                if rows == 0 { self.table() } else { self.gate() },
                start.map_or_else(|| self.table(), |start| arg(start, self.problem.state_len())),
                arg(states, self.states_len().max(1)),
                arg(end, self.problem.state_len()),
                self.table(),
                sequences,
                tasks,
                self.problem.scale,
                self.spec(role),
                start.is_some(),
                self.types(),
            );
        }
    }

    /// Stage `scores`, see [`chunk::scores`]: `A` with the decay, or `dA` without.
    pub fn scores(&self, q: &Handle, k: &Handle, width: usize, gated: bool, a: &Handle) {
        let tasks = self.num_chunks * self.problem.dims.heads;
        if tasks == 0 {
            return;
        }
        // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths.
        unsafe {
            chunk::scores::gla_scores_kernel::launch_unchecked(
                self.client,
                cubes(tasks, &self.limits),
                CubeDim::new_1d((self.blueprint.blocks() * self.blueprint.chunk) as u32),
                arg(q, self.row_heads() * width),
                arg(k, self.problem.rows() * self.problem.dims.kv_heads * width),
                self.gate(),
                arg(a, self.row_heads() * self.blueprint.chunk),
                self.table(),
                self.problem.num_sequences(),
                tasks,
                self.problem.scale,
                self.spec(Role::Query),
                width,
                gated,
                self.types(),
            );
        }
    }

    /// Stage `output`, see [`chunk::output`].
    pub fn output(
        &self,
        role: Role,
        [x, y]: [&Handle; 2],
        [states, a]: [&Handle; 2],
        out: (&Handle, ElemType),
    ) {
        let dims = self.problem.dims;
        let tasks = self.num_chunks * dims.heads * dims.value_dim.div_ceil(self.blueprint.cols);
        if tasks == 0 {
            return;
        }
        // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths.
        unsafe {
            chunk::output::gla_output_kernel::launch_unchecked(
                self.client,
                cubes(tasks, &self.limits),
                self.stage_dim(),
                arg(x, self.row_heads() * dims.key_dim),
                arg(y, self.row_heads() * dims.value_dim),
                self.gate(),
                arg(states, self.states_len()),
                arg(a, self.row_heads() * self.blueprint.chunk),
                arg(out.0, self.row_heads() * dims.value_dim),
                self.table(),
                self.problem.num_sequences(),
                tasks,
                self.problem.scale,
                self.spec(role),
                [self.problem.dtype, self.problem.gate_dtype, out.1],
            );
        }
    }

    /// Stage `project`, see [`chunk::project`].
    pub fn project(
        &self,
        role: Role,
        y: &Handle,
        [states, others]: [&Handle; 2],
        [dx, dg]: [&Handle; 2],
    ) {
        let dims = self.problem.dims;
        let tasks = self.num_chunks * dims.heads * dims.key_dim.div_ceil(self.blueprint.cols);
        if tasks == 0 {
            return;
        }
        // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths.
        unsafe {
            chunk::project::gla_project_kernel::launch_unchecked(
                self.client,
                cubes(tasks, &self.limits),
                self.stage_dim(),
                arg(y, self.row_heads() * dims.value_dim),
                self.gate(),
                arg(states, self.states_len()),
                arg(others, self.states_len()),
                arg(dx, self.row_heads() * dims.key_dim),
                arg(dg, self.row_heads() * dims.key_dim),
                self.table(),
                self.problem.num_sequences(),
                tasks,
                self.problem.scale,
                self.spec(role),
                self.types(),
            );
        }
    }

    /// Stage `intra_grad`, see [`chunk::intra_grad`].
    pub fn intra_grad(
        &self,
        role: Role,
        [q, k]: [&Handle; 2],
        da: &Handle,
        [dx, dg]: [&Handle; 2],
    ) {
        let dims = self.problem.dims;
        let tasks = self.num_chunks * dims.heads * dims.key_dim.div_ceil(self.blueprint.cols);
        if tasks == 0 {
            return;
        }
        // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths.
        unsafe {
            chunk::intra_grad::gla_intra_grad_kernel::launch_unchecked(
                self.client,
                cubes(tasks, &self.limits),
                self.stage_dim(),
                arg(q, self.row_heads() * dims.key_dim),
                arg(k, self.problem.rows() * dims.kv_heads * dims.key_dim),
                self.gate(),
                arg(da, self.row_heads() * self.blueprint.chunk),
                arg(dx, self.row_heads() * dims.key_dim),
                arg(dg, self.row_heads() * dims.key_dim),
                self.table(),
                self.problem.num_sequences(),
                tasks,
                self.spec(role),
                self.types(),
            );
        }
    }

    /// Stage `reduce` over the heads of a group and `inner` channels, with a cast to `dtype`.
    pub fn reduce_heads(
        &self,
        x: &Handle,
        out: &Handle,
        group: usize,
        width: usize,
        inner: usize,
        dtype: ElemType,
    ) {
        let elements = self.row_heads() / group * width;
        if elements == 0 {
            return;
        }
        let units = 64;
        // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths.
        unsafe {
            chunk::reduce::gla_reduce_heads_kernel::launch_unchecked(
                self.client,
                cubes(elements.div_ceil(units), &self.limits),
                CubeDim::new_1d(units as u32),
                arg(x, self.row_heads() * width * inner),
                arg(out, elements),
                elements,
                group,
                width,
                inner,
                dtype,
            );
        }
    }

    /// Stage `reduce` over all rows and `width` channels: one value a head.
    pub fn reduce_rows(&self, x: &Handle, out: &Handle, width: usize, dtype: ElemType) {
        let (rows, heads, units) = (self.problem.rows(), self.problem.dims.heads, 64);
        // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths.
        unsafe {
            chunk::reduce::gla_reduce_rows_kernel::launch_unchecked(
                self.client,
                cubes(heads, &self.limits),
                CubeDim::new_1d(units as u32),
                arg(x, (self.row_heads() * width).max(1)),
                arg(out, heads),
                rows,
                heads,
                width,
                units,
                dtype,
            );
        }
    }
}

/// A kernel argument over a whole buffer.
fn arg(handle: &Handle, len: usize) -> BufferArg {
    // SAFETY: callers check their buffers (`buffer`) or allocate them with this length (`scratch`).
    unsafe { BufferArg::from_raw_parts(handle.clone(), len) }
}
