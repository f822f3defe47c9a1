//! Launches the kernels of the scan plan.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::walk_spec::{KeyAxis, WalkShape, WalkSpec};
use super::{CHUNK, CHUNK_UNITS, ChunkSpec, combine, intra_grad, padded, prepare, walk};
use crate::launch::{Launcher, arg, cubes};
use crate::{ScanBlueprint, Segments};

/// What `prepare` makes of a call.
pub(crate) struct Prepared {
    pub qt: Handle,
    pub kt: Handle,
    pub decays: Handle,
    pub pairs: Handle,
}

/// The lines along which the chunks are walked: sequences, or segments of them.
pub(crate) struct Lines {
    table: Handle,
    table_len: usize,
    /// Offsets of each sequence's segments; none if the lines are the sequences.
    bounds: Option<Handle>,
    count: usize,
}

/// Where the lines start, and where their last states go; `[lines, H, K, V]`.
pub(crate) struct Ends {
    pub start: Option<Handle>,
    pub end: Handle,
}

/// One walk: what it reads and writes, and as what.
pub(crate) struct Walk<'a> {
    pub spec: WalkSpec,
    pub left: &'a Handle,
    pub update: &'a Handle,
    pub right: &'a Handle,
    pub ends: &'a Ends,
    pub out: (&'a Handle, ElemType),
    pub trace: Option<&'a Handle>,
    pub products: Option<&'a Handle>,
}

impl Launcher<'_, ScanBlueprint> {
    fn padded(&self) -> usize {
        padded(self.problem.dims)
    }

    fn chunk_spec(&self) -> ChunkSpec {
        ChunkSpec { dims: self.problem.dims, padded: self.padded() }
    }

    /// The lines of the call.
    pub fn lines(&self) -> Lines {
        let longest = self.problem.sequences.longest().div_ceil(CHUNK);
        if longest <= self.blueprint.segment {
            let (table, table_len) = self.table_handle();
            return Lines { table, table_len, bounds: None, count: self.problem.num_sequences() };
        }
        let table = self.problem.sequences.chunk_table(CHUNK);
        let Segments { table, bounds } = table.segments(self.blueprint.segment);
        Lines {
            table: self.client.create_from_slice(u32::as_bytes(&table.words)),
            table_len: table.words.len(),
            bounds: Some(self.client.create_from_slice(u32::as_bytes(&bounds))),
            count: table.num_sequences,
        }
    }

    /// What a walk along the lines depends on.
    pub fn shape(&self, lines: &Lines, ends: &Ends, reversed: bool) -> WalkShape {
        WalkShape {
            has_start: ends.start.is_some(),
            ..WalkShape::new(self.problem.dims, &self.limits, lines.count, reversed)
        }
    }

    /// The states between the lines for a walk with `update` and `right`, from `start` to `end` of
    /// the sequences: a first walk and `combine`, see [`combine`], if the lines are segments.
    #[allow(clippy::too_many_arguments)]
    pub fn ends(
        &self,
        made: &Prepared,
        lines: &Lines,
        reversed: bool,
        [update, right]: [&Handle; 2],
        start: Option<&Handle>,
        end: &Handle,
    ) -> Ends {
        let Some(bounds) = &lines.bounds else {
            return Ends { start: start.cloned(), end: end.clone() };
        };
        let dims = self.problem.dims;
        let len = self.lines_len(lines);
        let (added, starts) = (self.scratch(len), self.scratch(len));
        let from_zero = Ends { start: None, end: added.clone() };
        self.walk(
            made,
            lines,
            Walk {
                spec: WalkSpec::state(self.shape(lines, &from_zero, reversed)),
                left: update,
                update,
                right,
                ends: &from_zero,
                out: (&starts, self.problem.dtype),
                trace: None,
                products: None,
            },
        );
        let tasks = self.problem.num_sequences() * dims.heads * dims.key_dim;
        // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths.
        unsafe {
            combine::gla_combine_kernel::launch_unchecked(
                self.client,
                cubes(tasks, &self.limits),
                CubeDim::new_1d(combine::UNITS as u32),
                start.map_or_else(|| self.table(), |start| arg(start, self.problem.state_len())),
                arg(end, self.problem.state_len()),
                arg(&added, len),
                arg(&starts, len),
                arg(&made.decays, self.num_chunks * dims.heads * self.padded()),
                arg(&lines.table, lines.table_len),
                arg(bounds, self.problem.num_sequences() + 1),
                tasks,
                dims,
                self.padded(),
                reversed,
                start.is_some(),
            );
        }
        Ends { start: Some(starts), end: added }
    }

    fn lines_len(&self, lines: &Lines) -> usize {
        let dims = self.problem.dims;
        lines.count * dims.heads * dims.key_dim * dims.value_dim
    }

    /// Kernel `prepare`, see [`prepare`].
    pub fn prepare(&self, q: &Handle, k: &Handle) -> Prepared {
        let dims = self.problem.dims;
        let padded = self.padded();
        let tasks = self.num_chunks * dims.heads;
        let made = Prepared {
            qt: self.scratch_like(self.row_heads() * padded),
            kt: self.scratch_like(self.row_heads() * padded),
            decays: self.scratch(tasks * padded),
            pairs: self.scratch_like(self.row_heads() * CHUNK),
        };
        if tasks == 0 {
            return made;
        }
        // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths.
        unsafe {
            prepare::gla_prepare_kernel::launch_unchecked(
                self.client,
                cubes(tasks, &self.limits),
                CubeDim::new_1d(CHUNK_UNITS as u32),
                arg(q, self.row_heads() * dims.key_dim),
                arg(k, self.problem.rows() * dims.kv_heads * dims.key_dim),
                self.gate(),
                arg(&made.qt, self.row_heads() * padded),
                arg(&made.kt, self.row_heads() * padded),
                arg(&made.decays, tasks * padded),
                arg(&made.pairs, self.row_heads() * CHUNK),
                self.table(),
                self.problem.num_sequences(),
                tasks,
                self.problem.scale,
                self.chunk_spec(),
                self.types(),
            );
        }
        made
    }

    /// Kernel `walk`, see [`walk`].
    pub fn walk(&self, made: &Prepared, lines: &Lines, walk: Walk) {
        let spec = walk.spec;
        let tasks = spec.tiles() * spec.parts * spec.heads * lines.count;
        if tasks == 0 {
            return;
        }
        let rows = self.problem.rows();
        // as many elements at once as divide the width, 16 bytes at most
        let vector =
            |width: usize| [8, 4, 2].into_iter().find(|n| width.is_multiple_of(*n)).unwrap_or(1);
        let (deep, wide) = (vector(spec.depth_width), vector(spec.width));
        // the walks by columns write channels as rows
        let pair = if spec.keys == KeyAxis::Depth { wide.min(2) } else { 1 };
        let none = || self.table();
        let trace = match walk.trace {
            Some(trace) => arg(trace, self.num_chunks * spec.heads * spec.trace_pairs()),
            None => none(),
        };
        let products_len = spec.shares() * self.num_chunks * spec.heads * spec.padded;
        let products = match walk.products {
            Some(products) => arg(products, products_len),
            None => none(),
        };
        let out_len = spec.out_len(rows, self.num_chunks);
        let ends_len = self.lines_len(lines);
        let read = |handle: &Handle, len: usize| if rows == 0 { none() } else { arg(handle, len) };
        // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths.
        unsafe {
            walk::gla_walk_kernel::launch_unchecked(
                self.client,
                cubes(tasks, &self.limits),
                CubeDim::new_1d(spec.units() as u32),
                deep,
                wide,
                pair,
                read(walk.left, rows * spec.left_heads * spec.depth_width / deep),
                read(walk.update, rows * spec.update_heads * spec.depth_width / deep),
                read(walk.right, rows * spec.right_heads * spec.width / wide),
                read(&made.decays, self.num_chunks * spec.heads * spec.padded),
                read(&made.pairs, self.row_heads() * CHUNK / 8),
                walk.ends.start.as_ref().map_or_else(none, |start| arg(start, ends_len)),
                arg(&walk.ends.end, ends_len),
                if rows == 0 || !spec.emits { none() } else { arg(walk.out.0, out_len / pair) },
                trace,
                products,
                arg(&lines.table, lines.table_len),
                lines.count,
                rows,
                self.num_chunks,
                tasks,
                spec,
                [self.problem.dtype, walk.out.1],
            );
        }
    }

    /// Kernel `intra_grad`, see [`intra_grad`].
    #[allow(clippy::too_many_arguments)]
    pub fn scan_intra_grad(
        &self,
        [q, k, v, d_o]: [&Handle; 4],
        [dq_state, dk_state, products]: [&Handle; 3],
        walked: &WalkSpec,
        dq: (&Handle, ElemType),
        dk: (&Handle, ElemType),
        dg: (&Handle, ElemType),
    ) {
        let dims = self.problem.dims;
        let padded = self.padded();
        let tasks = self.num_chunks * dims.heads;
        if tasks == 0 {
            return;
        }
        let (rows, row_heads) = (self.problem.rows(), self.row_heads());
        let gated = dims.gate.is_some();
        let wide = vector(dims.value_dim);
        let state_len = walked.out_len(rows, self.num_chunks);
        // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths.
        unsafe {
            intra_grad::gla_scan_intra_grad_kernel::launch_unchecked(
                self.client,
                cubes(tasks, &self.limits),
                CubeDim::new_1d(CHUNK_UNITS as u32),
                wide,
                arg(q, row_heads * dims.key_dim),
                arg(k, rows * dims.kv_heads * dims.key_dim),
                arg(v, rows * dims.kv_heads * dims.value_dim / wide),
                arg(d_o, row_heads * dims.value_dim / wide),
                self.gate(),
                arg(dq_state, state_len / 4),
                arg(dk_state, state_len / 4),
                if gated { arg(products, walked.shares() * tasks * padded) } else { self.table() },
                arg(dq.0, row_heads * dims.key_dim),
                arg(dk.0, row_heads * dims.key_dim),
                if gated { arg(dg.0, row_heads * dims.key_dim) } else { self.table() },
                self.table(),
                self.problem.num_sequences(),
                self.num_chunks,
                tasks,
                self.problem.scale,
                self.chunk_spec(),
                walked.parts,
                walked.shares(),
                [self.problem.dtype, self.problem.gate_dtype, dq.1, dk.1, dg.1],
            );
        }
    }
}

/// Elements read at once: as many as divide the width, 16 bytes at most.
fn vector(width: usize) -> usize {
    [8, 4, 2].into_iter().find(|n| width.is_multiple_of(*n)).unwrap_or(1)
}
