//! Launches the kernels of the scan plan.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::combine::{self, ChunkDecays};
use super::stage::scales_in_half;
use super::state_walk::StateSpec;
use super::walk_spec::{Decay, Direction, ROWS_LEN, TOTAL, WalkShape, WalkSpec};
use super::{CHUNK, ChunkSpec, intra_grad, padded, part_type, prepare, scores, state_walk, walk};
use crate::launch::{Launcher, arg, cubes, widest_vector};
use crate::{Instruction, ScanBlueprint};

/// What `prepare` or `scores` makes of a call.
pub(crate) struct Prepared {
    /// Queries with their decay, or as they are.
    pub qt: Handle,
    /// Keys with theirs, or as they are.
    pub kt: Handle,
    /// See [`Decay`].
    pub decays: Handle,
    /// `A`
    pub pairs: Handle,
    /// `dA`, from `scores` in the backward.
    pub pair_grads: Handle,
    /// `[rows, H]`, what `scores` knows of the gate's gradient.
    pub dg: Handle,
}

/// Where the lines start, and where the last states go if they are not known already; `[lines, H, K, V]`.
pub(crate) struct Ends {
    pub start: Option<Handle>,
    pub end: Option<Handle>,
}

/// One walk: what it reads and writes, and as what.
pub(crate) struct Walk<'a> {
    pub spec: WalkSpec,
    pub reversed: bool,
    pub left: &'a Handle,
    pub update: &'a Handle,
    pub right: &'a Handle,
    pub decays: &'a Handle,
    pub intra: &'a Handle,
    pub start: Option<&'a Handle>,
    pub end: Option<&'a Handle>,
    pub out: (&'a Handle, ElemType),
    /// `probe` and `dots`.
    pub dots: Option<(&'a Handle, &'a Handle)>,
    pub trace: Option<&'a Handle>,
    pub products: Option<&'a Handle>,
}

impl Launcher<'_, ScanBlueprint> {
    fn padded(&self) -> usize {
        padded(self.problem.dims)
    }

    fn chunk_spec(&self) -> ChunkSpec {
        ChunkSpec { dims: self.problem.dims, instruction: self.blueprint.instruction }
    }

    /// [`Launcher::shares`], in parts of [`part_type`].
    pub fn parts(
        &self,
        out: &Handle,
        own_heads: usize,
        width: usize,
        parts: usize,
    ) -> (Handle, ElemType) {
        let part_type = part_type(self.problem.dtype, self.blueprint.instruction);
        self.shares(out, own_heads, width, parts, part_type)
    }

    /// What a walk along the lines depends on.
    pub fn shape(&self, reversed: bool) -> WalkShape {
        let instruction = self.blueprint.instruction;
        let dims = self.problem.dims;
        let shape = WalkShape::new(dims, instruction, &self.limits, self.lines.count, reversed);
        WalkShape { segmented: self.lines.segmented, ..shape }
    }

    /// The states between the lines for a walk with `update` and `right`, from `start` to `end` of
    /// the sequences: a first walk and `combine`, see [`combine`], if the lines are segments.
    pub fn ends(
        &self,
        made: &Prepared,
        reversed: bool,
        [update, right]: [&Handle; 2],
        start: Option<&Handle>,
        end: Option<&Handle>,
    ) -> Ends {
        if !self.lines.segmented {
            return Ends { start: start.cloned(), end: end.cloned() };
        }
        let len = self.lines_len();
        let (added, starts) = (self.scratch(len), self.scratch(len));
        self.state_walk(made, reversed, [update, right], &added);
        let stride = self.decay_stride();
        let chunk_decays = match Decay::of(self.problem.dims.gate) {
            Decay::None => None,
            Decay::Rows => Some(ChunkDecays { stride, of_all: Some(TOTAL) }),
            Decay::Channels => Some(ChunkDecays { stride, of_all: None }),
        };
        let decays = (chunk_decays, self.decays(&made.decays));
        self.combine([&added, &starts], decays, reversed, start, end);
        Ends { start: Some(starts), end: None }
    }

    /// Elements of a state a line.
    pub fn lines_len(&self) -> usize {
        let dims = self.problem.dims;
        self.lines.count * dims.heads * dims.key_dim * dims.value_dim
    }

    /// Kernel `combine`, see [`combine`]: what the lines start from, of what they add, and the decays of
    /// their chunks; from `start` to `end` of the sequences.
    fn combine(
        &self,
        [added, starts]: [&Handle; 2],
        (chunk_decays, decays): (Option<ChunkDecays>, BufferArg),
        reversed: bool,
        start: Option<&Handle>,
        end: Option<&Handle>,
    ) {
        let (dims, len) = (self.problem.dims, self.lines_len());
        let tasks = self.problem.num_sequences() * dims.heads * dims.key_dim;
        // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths.
        unsafe {
            combine::gla_combine_kernel::launch_unchecked(
                self.client,
                cubes(tasks, &self.limits),
                CubeDim::new_1d(combine::UNITS as u32),
                self.arg_or_nothing(start, self.problem.state_len()),
                self.arg_or_nothing(end, self.problem.state_len()),
                arg(added, len),
                arg(starts, len),
                decays,
                self.map(),
                tasks,
                reversed.into(),
                dims,
                chunk_decays,
                start.is_some(),
                end.is_some(),
            );
        }
    }

    /// Kernel `state_walk`, see [`state_walk`].
    fn state_walk(
        &self,
        made: &Prepared,
        reversed: bool,
        [update, right]: [&Handle; 2],
        end: &Handle,
    ) {
        let (dims, rows) = (self.problem.dims, self.problem.rows());
        let spec = StateSpec::new(self.shape(reversed));
        let tasks = spec.tiles() * dims.heads * self.lines.count;
        let (deep, wide) = (self.vector(spec.depth_width), self.vector(dims.value_dim));
        let decays_len = self.lines.num_chunks * dims.heads * self.decay_stride();
        // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths.
        unsafe {
            state_walk::gla_state_walk_kernel::launch_unchecked(
                self.client,
                cubes(tasks, &self.limits),
                CubeDim::new_1d(spec.units() as u32),
                deep,
                wide,
                arg(update, rows * spec.update_heads * spec.depth_width / deep),
                arg(right, rows * spec.right_heads * dims.value_dim / wide),
                self.decays(&made.decays),
                match spec.decay {
                    Decay::Channels => arg(&made.decays, decays_len / 4),
                    _ => self.nothing(),
                },
                arg(end, self.lines_len()),
                self.map(),
                tasks,
                reversed.into(),
                self.problem.scale,
                spec,
                scales_in_half(self.problem.dtype, self.problem.scale),
                self.problem.dtype,
            );
        }
    }

    /// Length of a line of the decays.
    fn decay_stride(&self) -> usize {
        match Decay::of(self.problem.dims.gate) {
            Decay::Rows => ROWS_LEN,
            _ => self.padded(),
        }
    }

    /// The decays of a call with any, else what fills the slot.
    fn decays(&self, decays: &Handle) -> BufferArg {
        match self.problem.dims.gate.is_some() && self.lines.num_chunks > 0 {
            true => {
                arg(decays, self.lines.num_chunks * self.problem.dims.heads * self.decay_stride())
            }
            false => self.nothing(),
        }
    }

    /// What the walks take: from `prepare` for a vector gate, else from `scores`. `[v, do]` in the
    /// backward.
    pub fn made(&self, [q, k]: [&Handle; 2], grads: Option<[&Handle; 2]>) -> Prepared {
        match Decay::of(self.problem.dims.gate) {
            Decay::Channels => self.prepare(q, k),
            Decay::None | Decay::Rows => self.scores([q, k], grads),
        }
    }

    /// Kernel `scores`, see [`scores`]; `[v, do]` in the backward.
    fn scores(&self, [q, k]: [&Handle; 2], grads: Option<[&Handle; 2]>) -> Prepared {
        let dims = self.problem.dims;
        let tasks = self.lines.num_chunks * dims.heads;
        let (rows, row_heads) = (self.problem.rows(), self.row_heads());
        let gated = dims.gate.is_some();
        let backward = grads.is_some();
        let needed = |needed: bool, len: usize| if needed { len } else { 1 };
        let pairs_len = tasks * CHUNK * CHUNK;
        let pair_grads_len = needed(backward, pairs_len).max(2);
        let decays_len = needed(gated, tasks * ROWS_LEN);
        let dg_len = needed(gated && backward, row_heads);
        let made = Prepared {
            qt: q.clone(),
            kt: k.clone(),
            decays: self.scratch(decays_len),
            pairs: self.scratch_like(pairs_len),
            pair_grads: self.scratch_like(pair_grads_len),
            dg: self.scratch(dg_len),
        };
        if tasks == 0 {
            return made;
        }
        let (deep, wide) = (self.vector(dims.key_dim), self.vector(dims.value_dim));
        let [v, d_o] = match grads {
            Some([v, d_o]) => [
                arg(v, rows * dims.kv_heads * dims.value_dim / wide),
                arg(d_o, row_heads * dims.value_dim / wide),
            ],
            None => [self.nothing(), self.nothing()],
        };
        // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths.
        unsafe {
            scores::gla_scan_scores_kernel::launch_unchecked(
                self.client,
                cubes(tasks, &self.limits),
                CubeDim::new_1d(scores::UNITS as u32),
                deep,
                wide,
                if deep == wide { deep } else { 1 },
                arg(q, row_heads * dims.key_dim / deep),
                arg(k, rows * dims.kv_heads * dims.key_dim / deep),
                v,
                d_o,
                self.gate(),
                arg(&made.pairs, pairs_len / 2),
                arg(&made.pair_grads, pair_grads_len.div_ceil(2)),
                arg(&made.decays, decays_len),
                arg(&made.dg, dg_len),
                self.map(),
                tasks,
                self.problem.scale,
                self.chunk_spec(),
                backward,
                self.types(),
            );
        }
        made
    }

    /// Kernel `prepare`, see [`prepare`].
    fn prepare(&self, q: &Handle, k: &Handle) -> Prepared {
        let dims = self.problem.dims;
        let padded = self.padded();
        let tasks = self.lines.num_chunks * dims.heads;
        let made = Prepared {
            qt: self.scratch_like(self.row_heads() * padded),
            kt: self.scratch_like(self.row_heads() * padded),
            decays: self.scratch(tasks * padded),
            pairs: self.scratch_like(tasks * CHUNK * CHUNK),
            pair_grads: self.scratch_like(1),
            dg: self.scratch(1),
        };
        if tasks == 0 {
            return made;
        }
        // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths.
        unsafe {
            prepare::gla_prepare_kernel::launch_unchecked(
                self.client,
                cubes(tasks, &self.limits),
                CubeDim::new_1d(self.chunk_spec().units() as u32),
                arg(q, self.row_heads() * dims.key_dim),
                arg(k, self.problem.rows() * dims.kv_heads * dims.key_dim),
                self.gate(),
                arg(&made.qt, self.row_heads() * padded),
                arg(&made.kt, self.row_heads() * padded),
                arg(&made.decays, tasks * padded),
                arg(&made.pairs, tasks * CHUNK * CHUNK),
                self.map(),
                tasks,
                self.problem.scale,
                self.chunk_spec(),
                self.types(),
            );
        }
        made
    }

    /// Kernel `walk`, see [`walk`].
    pub fn walk(&self, walk: Walk) {
        let spec = walk.spec;
        let known = match spec.direction {
            Direction::Told => walk.reversed,
            direction => direction == Direction::Backward,
        };
        assert_eq!(known, walk.reversed, "a walk in the direction of its spec");
        let tasks = spec.tiles() * spec.parts * spec.heads * self.lines.count;
        if tasks == 0 {
            return;
        }
        let rows = self.problem.rows();
        let (deep, wide) = (self.vector(spec.depth_width), self.vector(spec.width));
        let across = self.vector(CHUNK);
        let (pair, written) = (wide.min(2), spec.out_vector(wide));
        // a unit leaves a multiple of eight numbers of its state
        let left = self.vector(8);
        let none = || self.nothing();
        let trace = match walk.trace {
            Some(trace) => arg(trace, self.lines.num_chunks * spec.heads * spec.trace_len() / left),
            None => none(),
        };
        let products_len = spec.shares() * self.lines.num_chunks * spec.heads * spec.padded;
        let products = match walk.products {
            Some(products) => arg(products, products_len),
            None => none(),
        };
        let (probe, dots) = match walk.dots {
            Some((probe, dots)) if rows > 0 => (
                arg(probe, rows * spec.probe_heads * spec.width / pair),
                arg(dots, spec.dot_shares() * self.row_heads()),
            ),
            _ => (none(), none()),
        };
        let out_len = spec.out_len(rows, self.lines.num_chunks);
        let ends_len = self.lines_len();
        let read = |handle: &Handle, len: usize| if rows == 0 { none() } else { arg(handle, len) };
        // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths.
        unsafe {
            walk::gla_walk_kernel::launch_unchecked(
                self.client,
                cubes(tasks, &self.limits),
                CubeDim::new_1d(spec.units() as u32),
                deep,
                wide,
                across,
                pair,
                left,
                written,
                read(walk.left, rows * spec.left_heads * spec.depth_width / deep),
                read(walk.update, rows * spec.update_heads * spec.depth_width / deep),
                read(walk.right, rows * spec.right_heads * spec.width / wide),
                self.decays(walk.decays),
                match spec.intra {
                    true => read(
                        walk.intra,
                        self.lines.num_chunks * spec.heads * CHUNK * CHUNK / across,
                    ),
                    false => none(),
                },
                probe,
                self.arg_or_nothing(walk.start, ends_len),
                self.arg_or_nothing(walk.end, ends_len),
                read(walk.out.0, out_len / written),
                dots,
                trace,
                products,
                self.map(),
                rows,
                self.lines.num_chunks,
                tasks,
                walk.reversed.into(),
                self.problem.scale,
                power_of_two(self.problem.scale),
                spec,
                scales_in_half(self.problem.dtype, self.problem.scale),
                walk.start.is_some(),
                walk.end.is_some(),
                walk.out.1 == self.problem.dtype,
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
        let tasks = self.lines.num_chunks * dims.heads;
        if tasks == 0 {
            return;
        }
        let (rows, row_heads) = (self.problem.rows(), self.row_heads());
        let wide = self.vector(dims.value_dim);
        let state_len = walked.out_len(rows, self.lines.num_chunks);
        // SAFETY: the kernel masks what lies outside its tensors; see `arg` for their lengths.
        unsafe {
            intra_grad::gla_scan_intra_grad_kernel::launch_unchecked(
                self.client,
                cubes(tasks, &self.limits),
                CubeDim::new_1d(self.chunk_spec().units() as u32),
                wide,
                arg(q, row_heads * dims.key_dim),
                arg(k, rows * dims.kv_heads * dims.key_dim),
                arg(v, rows * dims.kv_heads * dims.value_dim / wide),
                arg(d_o, row_heads * dims.value_dim / wide),
                self.gate(),
                arg(dq_state, state_len / 4),
                arg(dk_state, state_len / 4),
                arg(products, walked.shares() * tasks * padded),
                arg(dq.0, row_heads * dims.key_dim),
                arg(dk.0, row_heads * dims.key_dim),
                arg(dg.0, row_heads * dims.key_dim),
                self.map(),
                self.lines.num_chunks,
                tasks,
                padded.div_ceil(self.chunk_spec().slice()),
                self.problem.scale,
                power_of_two(self.problem.scale),
                self.chunk_spec(),
                walked.parts,
                walked.shares(),
                [self.problem.dtype, self.problem.gate_type(), dq.1, dk.1, dg.1],
            );
        }
    }

    /// Elements read at once: as many as divide the width, 16 bytes at most. Matrices of a plane are
    /// loaded from vectors of four; with others, element by element.
    fn vector(&self, width: usize) -> usize {
        let sizes: &[usize] = match self.blueprint.instruction {
            Instruction::Cmma => &[4],
            _ => &[8, 4, 2],
        };
        widest_vector(width, sizes)
    }
}

/// The power of two next to a scale, within what half precision multiplies exactly.
fn power_of_two(scale: f32) -> f32 {
    match scale.abs().log2().round() {
        exponent if exponent.is_finite() => exponent.clamp(-8.0, 8.0).exp2(),
        _ => 1.0,
    }
}

#[cfg(test)]
mod tests {
    use super::power_of_two;

    #[test]
    fn scales_are_near_a_power_of_two() {
        let near = |scale: f32| (scale / power_of_two(scale)).abs();
        for scale in [0.125, 0.0883, 0.0625, 1.0, -0.3, 3.0] {
            assert!((0.7..1.42).contains(&near(scale)), "{scale}: {}", near(scale));
        }
        assert_eq!([0.0, 1e-30, 1e30].map(power_of_two), [1.0, 1.0 / 256.0, 256.0]);
    }
}
