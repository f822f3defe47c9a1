//! Launches the stages of the split plan.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::StageSpec;
use crate::SplitBlueprint;
use crate::components::Role;
use crate::launch::{Launcher, arg, cubes, widest_vector};

/// Elements of a vector of an intra-chunk matrix, whose rows are a chunk long.
const PAIRS: usize = 4;

/// Elements of a vector of rows of so many: no more than a unit takes of the smallest tile.
fn vector(width: usize) -> usize {
    widest_vector(width, &[4, 2])
}

/// What stage `prepare` leaves.
pub(crate) struct Prepared {
    /// Rows of queries and keys that a state meets.
    rows: [Handle; 2],
    dtype: ElemType,
    /// Of the chunks, `[chunks, H, K]`, with a gate.
    decays: Option<Handle>,
}

impl Prepared {
    fn of(&self, role: Role) -> &Handle {
        match role {
            Role::Query => &self.rows[0],
            Role::Key => &self.rows[1],
        }
    }
}

impl Launcher<'_, SplitBlueprint> {
    /// Elements of the states between chunks.
    fn states_len(&self) -> usize {
        let dims = self.problem.dims;
        self.lines.num_chunks * dims.heads * dims.key_dim * dims.value_dim
    }

    /// Elements of a vector of rows of keys, and of rows of values.
    fn vectors(&self) -> (usize, usize) {
        (vector(self.problem.dims.key_dim), vector(self.problem.dims.value_dim))
    }

    /// Type of the states between chunks.
    fn state_type(&self) -> ElemType {
        super::state_type(self.problem, &self.limits)
    }

    /// Scratch for the states between chunks.
    pub fn states_scratch(&self) -> Handle {
        self.scratch_of(self.states_len(), self.state_type())
    }

    /// Scratch for rows of keys of every query head.
    pub fn key_rows(&self) -> Handle {
        self.scratch(self.row_heads() * self.problem.dims.key_dim)
    }

    /// Scratch for rows times their decay.
    pub fn decayed_rows(&self, role: Role) -> Handle {
        let heads = self.spec(role).x_heads();
        self.scratch(self.problem.rows() * heads * self.problem.dims.key_dim)
    }

    fn spec(&self, role: Role) -> StageSpec {
        StageSpec { dims: self.problem.dims, blueprint: self.blueprint, role }
    }

    /// Cubes of stages that own a chunk's rows of some key channels of a head.
    fn key_tasks(&self) -> usize {
        let dims = self.problem.dims;
        self.lines.num_chunks * dims.heads * dims.key_dim.div_ceil(self.blueprint.cols)
    }

    fn patch_dim(&self) -> CubeDim {
        CubeDim::new_1d(self.blueprint.patch_units() as u32)
    }

    /// Elements of the decays of the chunks, which without a gate nobody writes.
    fn decays_len(&self) -> usize {
        self.lines.num_chunks * self.problem.dims.heads * self.problem.dims.key_dim
    }

    /// Stage `prepare`, see [`super::prepare`], into the buffers that it is given; without a gate the rows are the
    /// inputs themselves.
    pub fn prepare(&self, [q, k]: [&Handle; 2], into: impl FnOnce() -> [Handle; 2]) -> Prepared {
        let dims = self.problem.dims;
        if !dims.gate.is_some() {
            let rows = [q, k].map(Handle::clone);
            return Prepared { rows, dtype: self.problem.dtype, decays: None };
        }
        let ([q_out, k_out], decays) = (into(), self.scratch(self.decays_len()));
        let k_heads = self.spec(Role::Key).x_heads();
        let tasks = self.key_tasks();
        if tasks > 0 {
            // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths.
            unsafe {
                super::prepare::gla_split_prepare_kernel::launch_unchecked(
                    self.client,
                    cubes(tasks, &self.limits),
                    CubeDim::new_1d(self.blueprint.units() as u32),
                    arg(q, self.row_heads() * dims.key_dim),
                    arg(k, self.problem.rows() * dims.kv_heads * dims.key_dim),
                    self.gate(),
                    arg(&q_out, self.row_heads() * dims.key_dim),
                    arg(&k_out, self.problem.rows() * k_heads * dims.key_dim),
                    arg(&decays, self.decays_len()),
                    self.map(),
                    tasks,
                    self.spec(Role::Key),
                    self.types(),
                );
            }
        }
        Prepared { rows: [q_out, k_out], dtype: f32::elem_type_native(), decays: Some(decays) }
    }

    /// The states between chunks, from before the sequences to after them.
    pub fn states(
        &self,
        role: Role,
        made: &Prepared,
        y: &Handle,
        ends: (Option<&Handle>, Option<&Handle>),
        states: &Handle,
    ) {
        self.chunk_state(role, made, y, states);
        self.state_passing(role, made.decays.as_ref(), ends, states);
    }

    /// Stage `chunk_state`, see [`super::chunk_state`].
    fn chunk_state(&self, role: Role, made: &Prepared, y: &Handle, added: &Handle) {
        let (dims, spec) = (self.problem.dims, self.spec(role));
        let tiles = dims.value_dim.div_ceil(self.blueprint.cols)
            * dims.key_dim.div_ceil(self.blueprint.chunk);
        let tasks = tiles * dims.heads * self.lines.num_chunks;
        if tasks == 0 {
            return;
        }
        let rows = self.problem.rows();
        let (key, value) = self.vectors();
        // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths.
        unsafe {
            super::chunk_state::gla_chunk_state_kernel::launch_unchecked(
                self.client,
                cubes(tasks, &self.limits),
                self.patch_dim(),
                key,
                value,
                arg(made.of(role), rows * spec.x_heads() * dims.key_dim / key),
                arg(y, rows * role.heads(dims) * dims.value_dim / value),
                arg(added, self.states_len() / value),
                self.map(),
                tasks,
                self.problem.scale,
                spec,
                [made.dtype, self.problem.dtype, self.state_type()],
            );
        }
    }

    /// Stage `state_passing`, see [`super::state_passing`].
    fn state_passing(
        &self,
        role: Role,
        decays: Option<&Handle>,
        (start, end): (Option<&Handle>, Option<&Handle>),
        states: &Handle,
    ) {
        let dims = self.problem.dims;
        let size = vector(dims.value_dim);
        let (len, tasks) = (self.states_len(), self.problem.state_len() / size);
        if tasks == 0 {
            return;
        }
        // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths. Without chunks it
        // neither reads nor writes the states.
        unsafe {
            super::state_passing::gla_state_passing_kernel::launch_unchecked(
                self.client,
                cubes(tasks.div_ceil(super::state_passing::UNITS), &self.limits),
                CubeDim::new_1d(super::state_passing::UNITS as u32),
                size,
                self.arg_or_nothing(start, tasks),
                self.arg_or_nothing(end, tasks),
                arg(states, (len / size).max(1)),
                self.arg_or_nothing(decays, self.decays_len().max(1)),
                self.map(),
                tasks,
                dims,
                role == Role::Query,
                start.is_some(),
                end.is_some(),
                self.state_type(),
            );
        }
    }

    /// Stage `scores`, see [`super::scores`]: `A` with the decay, or `dA` without.
    pub fn scores(&self, q: &Handle, k: &Handle, width: usize, gated: bool, a: &Handle) {
        let tasks = self.lines.num_chunks * self.problem.dims.heads;
        if tasks == 0 {
            return;
        }
        let size = vector(width);
        // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths.
        unsafe {
            super::scores::gla_scores_kernel::launch_unchecked(
                self.client,
                cubes(tasks, &self.limits),
                CubeDim::new_1d((self.blueprint.blocks() * self.blueprint.chunk) as u32),
                size,
                arg(q, self.row_heads() * width / size),
                arg(k, self.problem.rows() * self.problem.dims.kv_heads * width / size),
                self.gate(),
                arg(a, self.row_heads() * self.blueprint.chunk),
                self.map(),
                tasks,
                self.problem.scale,
                self.spec(Role::Query),
                width,
                gated,
                self.types(),
            );
        }
    }

    /// Stage `output`, see [`super::output`].
    pub fn output(
        &self,
        role: Role,
        made: &Prepared,
        y: &Handle,
        [states, a]: [&Handle; 2],
        out: (&Handle, ElemType),
    ) {
        let (dims, spec) = (self.problem.dims, self.spec(role));
        let tasks =
            self.lines.num_chunks * dims.heads * dims.value_dim.div_ceil(self.blueprint.cols);
        if tasks == 0 {
            return;
        }
        let rows = self.problem.rows();
        let (key, value) = self.vectors();
        // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths.
        unsafe {
            super::output::gla_output_kernel::launch_unchecked(
                self.client,
                cubes(tasks, &self.limits),
                self.patch_dim(),
                key,
                value,
                PAIRS,
                arg(made.of(role), rows * spec.x_heads() * dims.key_dim / key),
                arg(y, rows * role.other().heads(dims) * dims.value_dim / value),
                arg(states, self.states_len() / value),
                arg(a, self.row_heads() * self.blueprint.chunk / PAIRS),
                arg(out.0, self.row_heads() * dims.value_dim / value),
                self.map(),
                tasks,
                self.problem.scale,
                spec,
                [made.dtype, self.problem.dtype, self.state_type(), out.1],
            );
        }
    }

    /// Stage `project`, see [`super::project`].
    pub fn project(
        &self,
        role: Role,
        y: &Handle,
        [states, others]: [&Handle; 2],
        dx: &Handle,
        dg: Option<&Handle>,
    ) {
        let dims = self.problem.dims;
        let tasks = self.key_tasks();
        if tasks == 0 {
            return;
        }
        let rows = self.problem.rows();
        let own_heads = role.heads(dims);
        let (key, value) = self.vectors();
        // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths.
        unsafe {
            super::project::gla_project_kernel::launch_unchecked(
                self.client,
                cubes(tasks, &self.limits),
                self.patch_dim(),
                key,
                value,
                arg(y, rows * own_heads * dims.value_dim / value),
                self.gate(),
                arg(states, self.states_len() / value),
                arg(others, self.states_len() / value),
                arg(dx, self.row_heads() * dims.key_dim / key),
                self.arg_or_nothing(dg, self.row_heads() * dims.key_dim / key),
                self.map(),
                tasks,
                self.problem.scale,
                self.spec(role),
                [self.problem.dtype, self.problem.gate_type(), self.state_type()],
            );
        }
    }

    /// Stage `intra_grad`, see [`super::intra_grad`].
    pub fn intra_grad(
        &self,
        role: Role,
        [q, k]: [&Handle; 2],
        da: &Handle,
        dx: &Handle,
        dg: Option<&Handle>,
    ) {
        let dims = self.problem.dims;
        let tasks = self.key_tasks();
        if tasks == 0 {
            return;
        }
        // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths.
        unsafe {
            super::intra_grad::gla_intra_grad_kernel::launch_unchecked(
                self.client,
                cubes(tasks, &self.limits),
                CubeDim::new_1d(self.blueprint.units() as u32),
                PAIRS,
                arg(q, self.row_heads() * dims.key_dim),
                arg(k, self.problem.rows() * dims.kv_heads * dims.key_dim),
                self.gate(),
                arg(da, self.row_heads() * self.blueprint.chunk / PAIRS),
                arg(dx, self.row_heads() * dims.key_dim),
                self.arg_or_nothing(dg, self.row_heads() * dims.key_dim),
                self.map(),
                tasks,
                self.spec(role),
                self.types(),
            );
        }
    }
}
