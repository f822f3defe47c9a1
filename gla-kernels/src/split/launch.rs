//! Launches the stages of the split plan.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::StageSpec;
use crate::SplitBlueprint;
use crate::components::Role;
use crate::launch::{Launcher, RowSums, arg, cubes, widest_vector};
use crate::row_gate::RowGateSpec;

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

/// Where the stages gather the gate's gradient.
#[allow(clippy::large_enum_variant)] // one a call
pub(crate) enum GateGrad {
    /// There is no gate.
    None,
    /// Of a gate per channel: `[rows, H, K]`, which `project` begins and `intra_grad` adds to.
    Channels {
        dg: Handle,
        /// Whether that is the gate's gradient itself.
        in_place: bool,
    },
    /// Of one that decays channels alike: what [`crate::row_gate`] adds up.
    Rows {
        /// `[rows, H]`
        dg: Handle,
        /// Of queries and of keys, `[tiles, rows, H]`.
        dots: [Handle; 2],
        /// Of the states, `[chunks, H, tiles]`.
        products: Handle,
    },
}

impl Launcher<'_, SplitBlueprint> {
    /// Scratch for the gate's gradient, or that itself.
    pub fn gate_grad(&self, dgate: Option<&Handle>) -> GateGrad {
        let (dims, f32_type) = (self.problem.dims, f32::elem_type_native());
        let in_place = dims.heads == dims.kv_heads && self.problem.gate_dtype == f32_type;
        match dgate {
            None => GateGrad::None,
            Some(_) if dims.gate.by_row() => GateGrad::Rows {
                dg: self.scratch(self.row_heads()),
                dots: std::array::from_fn(|_| self.scratch(self.dots_len())),
                products: self.scratch(self.key_tasks()),
            },
            Some(dgate) => GateGrad::Channels {
                dg: if in_place { dgate.clone() } else { self.key_rows() },
                in_place,
            },
        }
    }

    /// Tiles of the key channels of a head.
    fn key_tiles(&self) -> usize {
        self.problem.dims.key_dim.div_ceil(self.blueprint.cols)
    }

    /// Elements of the products of rows of all tiles.
    fn dots_len(&self) -> usize {
        self.key_tiles() * self.row_heads()
    }

    /// Completes the gate's gradient, in the shape of the gate.
    pub fn finish_gate_grad(&self, gate_grad: &GateGrad, made: &Prepared, dgate: &Handle) {
        match gate_grad {
            GateGrad::None | GateGrad::Channels { in_place: true, .. } => {}
            GateGrad::Channels { dg, .. } => self.gate_gradient(dg, dgate),
            GateGrad::Rows { dg, dots, products } => {
                let sums = RowSums {
                    dots: dots.each_ref(),
                    products,
                    decays: made.decays.as_ref().expect("`prepare` has run for a gate"),
                    spec: RowGateSpec {
                        dot_shares: self.key_tiles(),
                        product_shares: 1,
                        products: self.key_tiles(),
                        decay_stride: self.problem.dims.key_dim,
                        decay_at: 0,
                    },
                };
                self.row_gate(sums, dg);
                self.gate_gradient(dg, dgate);
            }
        }
    }

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
        self.lines.num_chunks * dims.heads * self.key_tiles()
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

    /// Stage `scores`, see [`super::scores`]: `A`.
    pub fn scores(&self, q: &Handle, k: &Handle, a: &Handle) {
        let dims = self.problem.dims;
        self.products(q, k, dims.key_dim, dims.gate.is_some(), a, None);
    }

    /// The same for `dA`, in the place of `A`.
    pub fn score_grads(&self, d_o: &Handle, v: &Handle, a: &Handle, gate_grad: &GateGrad) {
        let dims = self.problem.dims;
        let straddling = match gate_grad {
            GateGrad::Rows { dg, .. } => Some(dg),
            GateGrad::None | GateGrad::Channels { .. } => None,
        };
        self.products(d_o, v, dims.value_dim, dims.gate.by_row(), a, straddling);
    }

    /// `straddling`: where to leave the share of the pairs in the gate's gradient.
    fn products(
        &self,
        q: &Handle,
        k: &Handle,
        width: usize,
        decays: bool,
        a: &Handle,
        straddling: Option<&Handle>,
    ) {
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
                self.arg_or_nothing(straddling, self.row_heads()),
                self.map(),
                tasks,
                self.problem.scale,
                self.spec(Role::Query),
                width,
                decays,
                straddling.is_some(),
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
        gate_grad: &GateGrad,
    ) {
        let dims = self.problem.dims;
        let tasks = self.key_tasks();
        if tasks == 0 {
            return;
        }
        let rows = self.problem.rows();
        let own_heads = role.heads(dims);
        let (key, value) = self.vectors();
        let (dg, dg_len, dg_vector) = match gate_grad {
            GateGrad::None => (None, 0, 1),
            GateGrad::Channels { dg, .. } => (Some(dg), self.row_heads() * dims.key_dim / key, key),
            GateGrad::Rows { products, .. } => (Some(products), tasks, 1),
        };
        // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths.
        unsafe {
            super::project::gla_project_kernel::launch_unchecked(
                self.client,
                cubes(tasks, &self.limits),
                self.patch_dim(),
                key,
                value,
                dg_vector,
                arg(y, rows * own_heads * dims.value_dim / value),
                self.gate(),
                arg(states, self.states_len() / value),
                arg(others, self.states_len() / value),
                arg(dx, self.row_heads() * dims.key_dim / key),
                self.arg_or_nothing(dg, dg_len),
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
        gate_grad: &GateGrad,
    ) {
        let dims = self.problem.dims;
        let tasks = self.key_tasks();
        if tasks == 0 {
            return;
        }
        let (dg, dg_len) = match gate_grad {
            GateGrad::None => (None, 0),
            GateGrad::Channels { dg, .. } => (Some(dg), self.row_heads() * dims.key_dim),
            GateGrad::Rows { dots: [queries, keys], .. } => {
                (Some(if role == Role::Query { queries } else { keys }), self.dots_len())
            }
        };
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
                self.arg_or_nothing(dg, dg_len),
                self.map(),
                self.problem.rows(),
                tasks,
                self.spec(role),
                self.types(),
            );
        }
    }
}
