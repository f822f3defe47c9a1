//! What every launch needs: the device's limits, where the chunks lie, scratch, and the reductions.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::components::ChunkMapLaunch;
use crate::definition::{Lines, Place};
use crate::reduce::{self, Sum};
use crate::row_gate::{self, RowGateSpec};
use crate::{DeviceLimits, GateKind, Problem};

/// Words that a buffer has at least: those of a vector.
const NOTHING: usize = 4;

/// One chunked call on one device. `B` is the blueprint of its plan, which has the kernels.
pub(crate) struct Launcher<'a, B> {
    pub client: &'a Client,
    pub limits: DeviceLimits,
    pub problem: &'a Problem,
    pub blueprint: B,
    /// The lines along which chunks are walked.
    pub lines: Lines,
    chunk: usize,
    gate: Handle,
    table: Handle,
}

/// What [`row_gate`] adds up, see there.
pub(crate) struct RowSums<'a> {
    /// Products of the rows of `q` and `dq`, of `k` and `dk`.
    pub dots: [&'a Handle; 2],
    /// Products of the states.
    pub products: &'a Handle,
    /// Decays of the chunks.
    pub decays: &'a Handle,
    /// How they are laid out.
    pub spec: RowGateSpec,
}

impl<'a, B> Launcher<'a, B> {
    /// Of a call that has been checked, with chunks of so many rows and lines of so many chunks. Uploads where
    /// packed sequences lie.
    pub fn new(
        client: &'a Client,
        problem: &'a Problem,
        (chunk, segment): (usize, usize),
        blueprint: B,
        gate: Option<&Handle>,
    ) -> Self {
        let lines = problem.sequences.lines(chunk, segment);
        let table = match &lines.place {
            Place::Equal { .. } => client.empty(4 * NOTHING),
            Place::Table(words) => client.create_from_slice(u32::as_bytes(words)),
        };
        Launcher {
            client,
            limits: DeviceLimits::of(client),
            problem,
            blueprint,
            lines,
            chunk,
            // without a gate the kernels read none; any buffer fills the slot
            gate: gate.unwrap_or(&table).clone(),
            table,
        }
    }

    /// Scratch of `len` f32.
    pub fn scratch(&self, len: usize) -> Handle {
        self.scratch_of(len, f32::elem_type_native())
    }

    /// Scratch of `len` elements of the inputs' type.
    pub fn scratch_like(&self, len: usize) -> Handle {
        self.scratch_of(len, self.problem.dtype)
    }

    /// Scratch of `len` elements of a type.
    pub fn scratch_of(&self, len: usize, dtype: ElemType) -> Handle {
        self.client.empty((dtype.size() * len).max(4 * NOTHING))
    }

    /// Rows times query heads.
    pub fn row_heads(&self) -> usize {
        self.problem.rows() * self.problem.dims.heads
    }

    /// What fills a slot that a kernel does not read.
    pub fn nothing(&self) -> BufferArg {
        arg(&self.table, NOTHING)
    }

    /// A buffer of so many elements, if there is one.
    pub fn arg_or_nothing(&self, handle: Option<&Handle>, len: usize) -> BufferArg {
        handle.map_or_else(|| self.nothing(), |handle| arg(handle, len))
    }

    /// Where lines and chunks lie.
    pub fn map(&self) -> ChunkMapLaunch {
        let (len, [time, chunks, segments, segment]) = match &self.lines.place {
            Place::Equal { time, chunks, segments, segment } => {
                (NOTHING, [*time, *chunks, *segments, *segment])
            }
            Place::Table(words) => (words.len(), [0; 4]),
        };
        ChunkMapLaunch::new(
            arg(&self.table, len),
            self.problem.num_sequences(),
            self.lines.count,
            time,
            chunks,
            segments,
            segment,
            self.chunk,
            matches!(self.lines.place, Place::Table(_)),
        )
    }

    /// The gate.
    pub fn gate(&self) -> BufferArg {
        arg(&self.gate, self.problem.gate_len().max(1))
    }

    /// Types of the inputs and of the gate.
    pub fn types(&self) -> [ElemType; 2] {
        [self.problem.dtype, self.problem.gate_type()]
    }

    /// Where a kernel that works per query head and in `parts` writes an output
    /// `[rows, own_heads, width]`: `out` itself, or scratch for [`sum_shares`](Self::sum_shares). That
    /// is of f32 for the heads of a group, and `part_type` for parts alone.
    pub fn shares(
        &self,
        out: &Handle,
        own_heads: usize,
        width: usize,
        parts: usize,
        part_type: ElemType,
    ) -> (Handle, ElemType) {
        let len = parts * self.row_heads() * width;
        match (parts, self.problem.dims.heads / own_heads) {
            (1, 1) => (out.clone(), self.problem.dtype),
            (_, 1) => (self.scratch_of(len, part_type), part_type),
            _ => (self.scratch(len), f32::elem_type_native()),
        }
    }

    /// Adds up what was written to [`shares`](Self::shares) of `out`.
    pub fn sum_shares(
        &self,
        (written, written_type): (&Handle, ElemType),
        out: &Handle,
        own_heads: usize,
        width: usize,
        parts: usize,
    ) {
        let group = self.problem.dims.heads / own_heads;
        if parts * group > 1 {
            let sum = Sum { parts, group, width };
            self.reduce_heads(written, out, sum, [written_type, self.problem.dtype]);
        }
    }

    /// Stage `reduce` over parts and the heads of a group, from one type to another.
    pub fn reduce_heads(&self, x: &Handle, out: &Handle, sum: Sum, types: [ElemType; 2]) {
        let elements = self.row_heads() / sum.group * sum.width;
        if elements == 0 {
            return;
        }
        let size = widest_vector(sum.width, &[4, 2]);
        let vectors = elements / size;
        // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths.
        unsafe {
            reduce::gla_reduce_heads_kernel::launch_unchecked(
                self.client,
                cubes(vectors.div_ceil(reduce::UNITS * reduce::EACH), &self.limits),
                CubeDim::new_1d(reduce::UNITS as u32),
                size,
                arg(x, sum.parts * self.row_heads() * sum.width / size),
                arg(out, vectors),
                vectors,
                sum,
                types,
            );
        }
    }

    /// Stage `reduce` over all of so many rows: one value a head. Of many rows in two steps, the first in
    /// parallel.
    pub fn reduce_rows(&self, x: &Handle, out: &Handle, rows: usize, dtype: ElemType) {
        let (heads, pieces) = (self.problem.dims.heads, rows.div_ceil(reduce::ROWS).max(1));
        let launch = |x: &Handle, rows: usize, out: &Handle, pieces: usize, dtype: ElemType| {
            // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths.
            unsafe {
                reduce::gla_reduce_rows_kernel::launch_unchecked(
                    self.client,
                    cubes(pieces * heads, &self.limits),
                    CubeDim::new_1d(reduce::UNITS as u32),
                    arg(x, (rows * heads).max(1)),
                    arg(out, pieces * heads),
                    rows,
                    rows.div_ceil(pieces),
                    pieces * heads,
                    heads,
                    dtype,
                );
            }
        };
        if pieces == 1 {
            return launch(x, rows, out, 1, dtype);
        }
        let sums = self.scratch(pieces * heads);
        launch(x, rows, &sums, pieces, f32::elem_type_native());
        launch(&sums, pieces, out, 1, dtype);
    }

    /// Kernel `row_gate`, see [`row_gate`]: completes `dg [rows, H]` of a call with chunks.
    pub fn row_gate(&self, sums: RowSums, dg: &Handle) {
        let dims = self.problem.dims;
        let tasks = self.lines.num_chunks * dims.heads;
        if tasks == 0 {
            return;
        }
        let RowSums { dots: [dots_q, dots_k], products, decays, spec } = sums;
        // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths.
        unsafe {
            row_gate::gla_row_gate_kernel::launch_unchecked(
                self.client,
                cubes(tasks, &self.limits),
                CubeDim::new_1d(self.chunk as u32),
                arg(dots_q, spec.dot_shares * self.row_heads()),
                arg(dots_k, spec.dot_shares * self.row_heads()),
                arg(products, spec.product_shares * tasks * spec.products),
                arg(decays, tasks * spec.decay_stride),
                arg(dg, self.row_heads()),
                self.map(),
                self.problem.rows(),
                self.lines.num_chunks,
                tasks,
                dims.heads,
                self.chunk,
                spec,
            );
        }
    }

    /// Sums a gate gradient `[rows, H, K]`, or `[rows, H]` where channels decay alike, to the shape of the gate.
    pub fn gate_gradient(&self, dg: &Handle, dgate: &Handle) {
        let (dims, dtype) = (self.problem.dims, self.problem.gate_type());
        let width = match dims.gate {
            GateKind::None => return,
            GateKind::Fixed => return self.reduce_rows(dg, dgate, self.problem.rows(), dtype),
            GateKind::Scalar => 1,
            GateKind::Vector => dims.key_dim,
        };
        let sum = Sum { parts: 1, group: dims.heads / dims.kv_heads, width };
        self.reduce_heads(dg, dgate, sum, [f32::elem_type_native(), dtype]);
    }
}

/// A kernel argument over a whole buffer.
pub(crate) fn arg(handle: &Handle, len: usize) -> BufferArg {
    // SAFETY: callers check their buffers (`buffer`) or allocate them with this length (`scratch`).
    unsafe { BufferArg::from_raw_parts(handle.clone(), len) }
}

/// The first of the sizes that divides a width; else vectors are single elements.
pub(crate) fn widest_vector(width: usize, sizes: &[usize]) -> usize {
    sizes.iter().copied().find(|size| width.is_multiple_of(*size)).unwrap_or(1)
}

/// A grid of `tasks` cubes, and few more: devices bound each axis (65535 on WebGPU), so it has two.
pub(crate) fn cubes(tasks: usize, limits: &DeviceLimits) -> CubeCount {
    let y = tasks.div_ceil(limits.cubes.0 as usize).max(1);
    CubeCount::Static(tasks.div_ceil(y).max(1) as u32, y as u32, 1)
}
