//! Launches the stages of the split plan.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::StageSpec;
use super::state::Leaves;
use crate::SplitBlueprint;
use crate::combine::ChunkDecays;
use crate::components::Role;
use crate::launch::{Launcher, arg, cubes};

impl Launcher<'_, SplitBlueprint> {
    /// Elements of the states between chunks.
    pub fn states_len(&self) -> usize {
        let dims = self.problem.dims;
        self.lines.num_chunks * dims.heads * dims.key_dim * dims.value_dim
    }

    fn spec(&self, role: Role) -> StageSpec {
        let SplitBlueprint { chunk, cols, .. } = self.blueprint;
        StageSpec { dims: self.problem.dims, chunk, cols, role }
    }

    fn patch_dim(&self) -> CubeDim {
        CubeDim::new_1d(self.spec(Role::Query).patch_units() as u32)
    }

    /// Elements of the decays of the chunks, which without a gate nobody writes.
    fn decays_len(&self) -> usize {
        self.lines.num_chunks * self.problem.dims.heads * self.problem.dims.key_dim
    }

    /// The states between chunks, and that at the end of each sequence.
    ///
    /// Where the lines are segments, a first walk leaves what each adds to a state of zero, and `combine` what
    /// it starts from.
    pub fn states(
        &self,
        role: Role,
        operands: [&Handle; 2],
        start: Option<&Handle>,
        states: &Handle,
        end: &Handle,
    ) {
        if !self.lines.segmented {
            return self.state(operands, start, states, end, self.spec(role), Leaves::States);
        }
        let dims = self.problem.dims;
        let len = self.lines_len();
        let [added, starts] = [len; 2].map(|len| self.scratch(len));
        let decays = self.scratch(self.decays_len());
        let spec = self.spec(role);
        self.state(operands, None, &decays, &added, spec, Leaves::Decays);
        let by_channel = ChunkDecays { stride: dims.key_dim, of_all: None };
        let decays = (dims.gate.is_some().then_some(by_channel), arg(&decays, self.decays_len()));
        let reversed = role == Role::Query;
        self.combine([&added, &starts], decays, reversed, start, Some(end));
        // what it leaves at the ends of segments is known
        self.state(operands, Some(&starts), states, &added, spec, Leaves::States);
    }

    /// Stage `state`, see [`super::state`].
    fn state(
        &self,
        [x, y]: [&Handle; 2],
        start: Option<&Handle>,
        left: &Handle,
        end: &Handle,
        spec: StageSpec,
        leaves: Leaves,
    ) {
        let dims = self.problem.dims;
        let tiles = dims.value_dim.div_ceil(spec.cols) * dims.key_dim.div_ceil(spec.chunk);
        let tasks = tiles * dims.heads * self.lines.count;
        if tasks == 0 {
            return;
        }
        let rows = self.problem.rows();
        let own_heads = spec.role.heads(dims);
        let left_len = match leaves {
            Leaves::States => self.states_len().max(1),
            Leaves::Decays => self.decays_len(),
        };
        // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths.
        unsafe {
            super::state::gla_state_kernel::launch_unchecked(
                self.client,
                cubes(tasks, &self.limits),
                self.patch_dim(),
                // without rows there is nothing to read; an empty buffer could not be bound
                if rows == 0 { self.nothing() } else { arg(x, rows * own_heads * dims.key_dim) },
                if rows == 0 { self.nothing() } else { arg(y, rows * own_heads * dims.value_dim) },
                if rows == 0 { self.nothing() } else { self.gate() },
                start.map_or_else(|| self.nothing(), |start| arg(start, self.lines_len())),
                arg(left, left_len),
                arg(end, self.lines_len()),
                self.map(),
                tasks,
                self.problem.scale,
                spec,
                leaves,
                start.is_some(),
                self.types(),
            );
        }
    }

    /// Stage `scores`, see [`super::scores`]: `A` with the decay, or `dA` without.
    pub fn scores(&self, q: &Handle, k: &Handle, width: usize, gated: bool, a: &Handle) {
        let tasks = self.lines.num_chunks * self.problem.dims.heads;
        if tasks == 0 {
            return;
        }
        // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths.
        unsafe {
            super::scores::gla_scores_kernel::launch_unchecked(
                self.client,
                cubes(tasks, &self.limits),
                CubeDim::new_1d((self.blueprint.blocks() * self.blueprint.chunk) as u32),
                arg(q, self.row_heads() * width),
                arg(k, self.problem.rows() * self.problem.dims.kv_heads * width),
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
        [x, y]: [&Handle; 2],
        [states, a]: [&Handle; 2],
        out: (&Handle, ElemType),
    ) {
        let dims = self.problem.dims;
        let tasks =
            self.lines.num_chunks * dims.heads * dims.value_dim.div_ceil(self.blueprint.cols);
        if tasks == 0 {
            return;
        }
        let rows = self.problem.rows();
        let (x_heads, y_heads) = (role.heads(dims), role.other().heads(dims));
        // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths.
        unsafe {
            super::output::gla_output_kernel::launch_unchecked(
                self.client,
                cubes(tasks, &self.limits),
                self.patch_dim(),
                arg(x, rows * x_heads * dims.key_dim),
                arg(y, rows * y_heads * dims.value_dim),
                self.gate(),
                arg(states, self.states_len()),
                arg(a, self.row_heads() * self.blueprint.chunk),
                arg(out.0, self.row_heads() * dims.value_dim),
                self.map(),
                tasks,
                self.problem.scale,
                self.spec(role),
                [self.problem.dtype, self.problem.gate_type(), out.1],
            );
        }
    }

    /// Stage `project`, see [`super::project`].
    pub fn project(
        &self,
        role: Role,
        y: &Handle,
        [states, others]: [&Handle; 2],
        [dx, dg]: [&Handle; 2],
    ) {
        let dims = self.problem.dims;
        let tasks = self.lines.num_chunks * dims.heads * dims.key_dim.div_ceil(self.blueprint.cols);
        if tasks == 0 {
            return;
        }
        let rows = self.problem.rows();
        let own_heads = role.heads(dims);
        // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths.
        unsafe {
            super::project::gla_project_kernel::launch_unchecked(
                self.client,
                cubes(tasks, &self.limits),
                self.patch_dim(),
                arg(y, rows * own_heads * dims.value_dim),
                self.gate(),
                arg(states, self.states_len()),
                arg(others, self.states_len()),
                arg(dx, self.row_heads() * dims.key_dim),
                arg(dg, self.row_heads() * dims.key_dim),
                self.map(),
                tasks,
                self.problem.scale,
                self.spec(role),
                self.types(),
            );
        }
    }

    /// Stage `intra_grad`, see [`super::intra_grad`].
    pub fn intra_grad(
        &self,
        role: Role,
        [q, k]: [&Handle; 2],
        da: &Handle,
        [dx, dg]: [&Handle; 2],
    ) {
        let dims = self.problem.dims;
        let tasks = self.lines.num_chunks * dims.heads * dims.key_dim.div_ceil(self.blueprint.cols);
        if tasks == 0 {
            return;
        }
        // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths.
        unsafe {
            super::intra_grad::gla_intra_grad_kernel::launch_unchecked(
                self.client,
                cubes(tasks, &self.limits),
                CubeDim::new_1d(self.blueprint.units() as u32),
                arg(q, self.row_heads() * dims.key_dim),
                arg(k, self.problem.rows() * dims.kv_heads * dims.key_dim),
                self.gate(),
                arg(da, self.row_heads() * self.blueprint.chunk),
                arg(dx, self.row_heads() * dims.key_dim),
                arg(dg, self.row_heads() * dims.key_dim),
                self.map(),
                tasks,
                self.spec(role),
                self.types(),
            );
        }
    }
}
