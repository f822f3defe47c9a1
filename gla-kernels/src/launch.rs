//! What every launch needs: the device's limits, the chunk table, the compile-time spec.

use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::chunk::{self, StageSpec, cubes};
use crate::components::Role;
use crate::{Blueprint, DeviceLimits, GlaError, Instruction, Plan, Problem, Strategy, check_addressable, select};

/// Checks that a device buffer holds at least `expected` bytes.
pub(crate) fn buffer(name: &'static str, handle: &Handle, expected: usize) -> Result<(), GlaError> {
    let got = handle.size_in_used() as usize;
    if got < expected {
        return Err(GlaError::BufferSize { name, expected, got });
    }
    Ok(())
}

/// Checks the problem, its types on this device, and that gate and gate kind agree.
pub(crate) fn checked(client: &Client, problem: &Problem, has_gate: bool) -> Result<(), GlaError> {
    problem.validate()?;
    let kind = problem.dims.gate;
    if has_gate != kind.is_some() {
        let message = format!("gate kind is {kind:?}, but a gate tensor was given: {has_gate}");
        return Err(GlaError::Argument { name: "gate", message });
    }
    let mut types = vec![("q", problem.dtype)];
    if has_gate {
        types.push(("gate", problem.gate_dtype));
    }
    let known = [f32::elem_type_native(), half_type(), brain_type()];
    // an adapter opened for SPIR-V lists bf16, but WGSL has none
    let wgsl = client.name() == "wgpu<wgsl>";
    for (name, dtype) in types {
        let supported = known.contains(&dtype)
            && !(wgsl && dtype == brain_type())
            && client.properties().supports_type(dtype);
        if !supported {
            return Err(GlaError::UnsupportedDtype {
                name,
                dtype: format!("{dtype:?}"),
                device: client.properties().identity.name.clone(),
            });
        }
    }
    Ok(())
}

fn half_type() -> ElemType {
    ElemType::Float(FloatKind::F16)
}

fn brain_type() -> ElemType {
    ElemType::Float(FloatKind::BF16)
}

/// Checks the sizes of the inputs that every form has.
pub(crate) fn check_inputs(
    problem: &Problem,
    [q, k, v]: [&Handle; 3],
    gate: Option<&Handle>,
) -> Result<(), GlaError> {
    let (rows, dims, size) = (problem.rows(), problem.dims, problem.dtype.size());
    buffer("q", q, rows * dims.heads * dims.key_dim * size)?;
    buffer("k", k, rows * dims.kv_heads * dims.key_dim * size)?;
    buffer("v", v, rows * dims.kv_heads * dims.value_dim * size)?;
    match gate {
        Some(gate) => buffer("gate", gate, problem.gate_len() * problem.gate_dtype.size()),
        None => Ok(()),
    }
}

/// One call on one device: launches the stages of [`crate::chunk`].
pub(crate) struct Launcher<'a> {
    pub client: &'a Client,
    pub limits: DeviceLimits,
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
        checked(client, problem, gate.is_some())?;
        let adapter = &client.properties().identity.name;
        if crashes_on_shared_memory(client.name(), adapter) {
            return Err(GlaError::Argument {
                name: "device",
                message: format!(
                    "{adapter} cannot run CubeCL's SPIR-V kernels with shared memory; build with \
                     the feature `wgpu` (WGSL) instead of `vulkan`"
                ),
            });
        }
        let limits = DeviceLimits::of(client);
        let longest = problem.sequences.longest();
        let strategy = match strategy {
            Strategy::Inferred if limits.mma.contains(&problem.dtype) && problem.dims.key_dim <= 256 => {
                Strategy::Plan(Plan::Scan)
            }
            strategy => strategy,
        };
        let blueprint = select(strategy, &problem.dims, longest, &limits)?;
        tracing::debug!(?blueprint, dims = ?problem.dims, "gla: chunked plan");
        let table = problem.sequences.chunk_table(blueprint.chunk);
        let dims = problem.dims;
        let states = table.num_chunks * dims.heads * dims.key_dim * dims.value_dim;
        check_addressable("the states between chunks", states)?;
        let pairs = problem.rows() * dims.heads * blueprint.chunk;
        check_addressable("the intra-chunk matrix [B, T, H, chunk]", pairs)?;
        let words = if table.words.is_empty() { vec![0; 2] } else { table.words };
        let handle = client.create_from_slice(u32::as_bytes(&words));
        Ok(Launcher {
            client,
            limits,
            problem,
            blueprint,
            // without a gate the kernels read none; any buffer fills the slot
            gate: gate.unwrap_or_else(|| handle.clone()),
            table: handle,
            table_len: words.len(),
            num_chunks: table.num_chunks,
        })
    }

    /// Whether the scan plan runs.
    pub fn scans(&self) -> bool {
        self.blueprint.instruction == Instruction::Mma
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

    pub fn table(&self) -> BufferArg {
        arg(&self.table, self.table_len)
    }

    pub fn gate(&self) -> BufferArg {
        arg(&self.gate, self.problem.gate_len().max(1))
    }

    fn stage_dim(&self) -> CubeDim {
        CubeDim::new_1d(self.blueprint.units() as u32)
    }

    pub fn types(&self) -> [ElemType; 2] {
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
pub(crate) fn arg(handle: &Handle, len: usize) -> BufferArg {
    // SAFETY: callers check their buffers (`buffer`) or allocate them with this length (`scratch`).
    unsafe { BufferArg::from_raw_parts(handle.clone(), len) }
}

/// CubeCL 0.11 declares shared memory wrongly in SPIR-V where the driver lacks
/// `VK_KHR_workgroup_memory_explicit_layout`, and Mesa's software adapter, which does, crashes on it.
fn crashes_on_shared_memory(runtime: &str, adapter: &str) -> bool {
    runtime == "wgpu<spirv>" && adapter.to_lowercase().contains("llvmpipe")
}

#[cfg(test)]
mod tests {
    use super::crashes_on_shared_memory;

    #[test]
    fn only_spirv_on_llvmpipe_is_refused() {
        let llvmpipe = "llvmpipe (LLVM 15.0.6, 256 bits)";
        assert!(crashes_on_shared_memory("wgpu<spirv>", llvmpipe));
        assert!(!crashes_on_shared_memory("wgpu<wgsl>", llvmpipe));
        assert!(!crashes_on_shared_memory("wgpu<spirv>", "NVIDIA H100 80GB HBM3"));
    }
}
