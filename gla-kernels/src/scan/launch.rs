//! Launches the kernels of the scan plan.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::walk_spec::{WalkShape, WalkSpec};
use super::{CHUNK, CHUNK_UNITS, ChunkSpec, intra_grad, prepare, walk};
use crate::ScanBlueprint;
use crate::launch::{Launcher, arg, cubes};

/// What `prepare` makes of a call.
pub(crate) struct Prepared {
    pub qt: Handle,
    pub kt: Handle,
    pub decays: Handle,
    pub pairs: Handle,
}

/// One walk: what it reads and writes, and as what.
pub(crate) struct Walk<'a> {
    pub spec: WalkSpec,
    pub left: &'a Handle,
    pub update: &'a Handle,
    pub right: &'a Handle,
    pub start: Option<&'a Handle>,
    pub end: &'a Handle,
    pub out: (&'a Handle, ElemType),
    pub trace: Option<&'a Handle>,
    pub products: Option<&'a Handle>,
}

impl Launcher<'_, ScanBlueprint> {
    /// `K` rounded up to whole tiles.
    pub fn padded(&self) -> usize {
        self.problem.dims.key_dim.next_multiple_of(16)
    }

    fn chunk_spec(&self) -> ChunkSpec {
        ChunkSpec { dims: self.problem.dims, padded: self.padded() }
    }

    /// What a walk depends on.
    pub fn walk_shape(&self, reversed: bool, start: Option<&Handle>) -> WalkShape {
        WalkShape {
            dims: self.problem.dims,
            count: self.problem.num_sequences(),
            processors: self.limits.processors,
            reversed,
            has_start: start.is_some(),
        }
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
    pub fn walk(&self, made: &Prepared, walk: Walk) {
        let spec = walk.spec;
        let sequences = self.problem.num_sequences();
        let tasks = spec.tiles() * spec.parts * spec.heads * sequences;
        if tasks == 0 {
            return;
        }
        let rows = self.problem.rows();
        // as many elements at once as divide the width, 16 bytes at most
        let vector =
            |width: usize| [8, 4, 2].into_iter().find(|n| width.is_multiple_of(*n)).unwrap_or(1);
        let (deep, wide) = (vector(spec.depth_width), vector(spec.width));
        let pair = wide.min(2);
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
        let out_len = spec.parts * self.row_heads() * spec.width;
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
                walk.start.map_or_else(none, |start| arg(start, self.problem.state_len())),
                arg(walk.end, self.problem.state_len()),
                if rows == 0 { none() } else { arg(walk.out.0, out_len / pair) },
                trace,
                products,
                self.table(),
                sequences,
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
        state_type: ElemType,
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
        let (parts, wide) = (walked.parts, vector(dims.value_dim));
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
                arg(dq_state, parts * row_heads * padded),
                arg(dk_state, parts * row_heads * padded),
                if gated { arg(products, walked.shares() * tasks * padded) } else { self.table() },
                arg(dq.0, row_heads * dims.key_dim),
                arg(dk.0, row_heads * dims.key_dim),
                if gated { arg(dg.0, row_heads * dims.key_dim) } else { self.table() },
                self.table(),
                self.problem.num_sequences(),
                rows,
                self.num_chunks,
                tasks,
                self.problem.scale,
                self.chunk_spec(),
                parts,
                walked.shares(),
                [self.problem.dtype, self.problem.gate_dtype, state_type, dq.1, dk.1, dg.1],
            );
        }
    }
}

/// Elements read at once: as many as divide the width, 16 bytes at most.
fn vector(width: usize) -> usize {
    [8, 4, 2].into_iter().find(|n| width.is_multiple_of(*n)).unwrap_or(1)
}
