//! Kernel `state_walk`: what the chunks of a segment add to a state of zero.
//!
//! ```text
//! state <- decay state + update^T right
//! ```
//!
//! with the operands of [`super::walk`]: keys and `v` for `S`, first chunk to last, or queries and `do` for
//! `D`, last to first. Without outputs no plane needs another's part of the state: a cube owns a
//! rectangle of it, a plane a smaller one, which stays, transposed, in registers.
//!
//! With `mma` tiles lie in shared memory twice: while some planes multiply what is in one half, others put
//! the next chunk down in the other, and a chunk takes one barrier. With `cmma`, which has less room, once.

use cubecl::prelude::*;

use super::CHUNK;
use super::stage::{
    DecayLine, Stage, fetch, fetch_decays, fetch_factors, held, held_factors, put, put_decays,
    rows_line, scale_rows,
};
use super::walk_spec::{Decay, ROWS_LEN, TOTAL, WalkShape, operands};
use crate::Instruction;
use crate::components::{
    Acc, Left, Pair, Right, Scratch, Slots, add_to, chunk_rows, multiply, pair_position,
    step_chunk, zero_pairs,
};

/// One accumulator at a time.
const SLOTS: Slots = Slots { floats: 1, halves: 0 };

/// What a state walk is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StateSpec {
    /// Query heads `H`.
    pub heads: usize,
    /// Heads of `update`.
    pub update_heads: usize,
    /// Heads of `right`.
    pub right_heads: usize,
    /// Width of `update`.
    pub depth_width: usize,
    /// Key channels `K` and value channels `V` of the state `[lines, H, K, V]`.
    pub state: (usize, usize),
    /// 16-channel blocks of a plane along the keys.
    pub depth_blocks: usize,
    /// The same along the values.
    pub column_blocks: usize,
    /// Planes of a cube along the keys.
    pub depth_planes: usize,
    /// The same along the values.
    pub column_planes: usize,
    /// Where the decay lies.
    pub decay: Decay,
    /// Last chunk first.
    pub reversed: bool,
    /// The tile instruction.
    pub instruction: Instruction,
}

impl StateSpec {
    /// With the widest cubes that fit the device and of which there are enough, else the narrowest.
    pub(crate) fn new(shape: WalkShape) -> Self {
        let WalkShape { dims, instruction, reversed, .. } = shape;
        let [q, k, depth_width] = operands(dims);
        // blocks of a plane, planes of a cube, and at least how many of those lie along the values
        let (blocks, planes, across) = match instruction {
            // 16 planes: more leave a unit less than the 128 registers that this takes
            Instruction::Mma => ((4, 2), 16, 4),
            _ => ((2, 4), 8, 2),
        };
        let planes = planes.min(shape.units / 32);
        let depth_planes = depth_width.div_ceil(16 * blocks.0).min((planes / across).max(1));
        let with = |column_planes| StateSpec {
            heads: dims.heads,
            update_heads: if reversed { q } else { k },
            right_heads: if reversed { dims.heads } else { dims.kv_heads },
            depth_width,
            state: (dims.key_dim, dims.value_dim),
            depth_blocks: blocks.0,
            column_blocks: blocks.1,
            depth_planes,
            column_planes,
            decay: Decay::of(dims.gate),
            reversed,
            instruction,
        };
        let most = dims.value_dim.div_ceil(16 * blocks.1).min((planes / depth_planes).max(1));
        let enough =
            |spec: &StateSpec| shape.count * spec.heads * spec.tiles() >= 7 * shape.processors / 8;
        let halved = std::iter::successors(Some(most), |n| (*n > 1).then_some(n / 2));
        let fits = |spec: &StateSpec| spec.shared_memory() <= shape.shared_memory;
        halved.map(with).filter(fits).find(enough).unwrap_or(with(1))
    }

    /// Key channels of a cube.
    pub const fn depth(&self) -> usize {
        16 * self.depth_blocks * self.depth_planes
    }

    /// Value channels of a cube.
    pub const fn columns(&self) -> usize {
        16 * self.column_blocks * self.column_planes
    }

    /// Cubes of a head and line: along the keys and the values.
    const fn cut(&self) -> (usize, usize) {
        (self.depth_width.div_ceil(self.depth()), self.state.1.div_ceil(self.columns()))
    }

    /// Cubes of a head and line.
    pub const fn tiles(&self) -> usize {
        let (deep, wide) = self.cut();
        deep * wide
    }

    /// Units of a cube.
    pub const fn units(&self) -> usize {
        32 * self.depth_planes * self.column_planes
    }

    /// Bytes of shared memory.
    pub fn shared_memory(&self) -> usize {
        let tiles = self.buffers() * CHUNK * (self.depth() + 8 + self.columns() + 8);
        let scratch = SLOTS.bytes(self.units() / 32, 0, self.instruction);
        2 * tiles + 4 * self.buffers() * self.decay_line().len + scratch
    }

    /// Chunks in shared memory: two save a barrier; with matrices, one twice as wide.
    pub const fn buffers(&self) -> usize {
        match self.instruction {
            Instruction::Cmma => 1,
            _ => 2,
        }
    }

    /// The piece of a chunk's decays that a cube reads.
    fn decay_line(&self) -> DecayLine {
        let (stride, len) = match self.decay {
            Decay::None => (1, 1),
            // the decay of the whole chunk; those of the rows go with `update`
            Decay::Rows => (ROWS_LEN, 1),
            Decay::Channels => (self.depth_width, self.depth()),
        };
        let (units, gated) = (self.units(), self.decay != Decay::None);
        DecayLine { heads: self.heads, stride, len, units, gated }
    }

    fn stage(&self, own_heads: usize, width: usize, cols: usize) -> Stage {
        Stage::new(self.heads, own_heads, width, cols, self.units())
    }
}

/// * `update`: `[rows, its heads, depth_width]`; `right`: `[rows, its heads, V]`
/// * `decays`: `[chunks, H, stride]`, see [`Decay`]
/// * `end`: out, `[lines, H, K, V]`
/// * `table`: the lines and their chunks
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(crate) fn gla_state_walk_kernel<E: Float, D: Size, C: Size>(
    update: &[Vector<E, D>],
    right: &[Vector<E, C>],
    decays: &[f32],
    end: &mut [f32],
    table: &[u32],
    num_lines: usize,
    tasks: usize,
    scale: f32,
    #[comptime] spec: StateSpec,
    #[comptime] packed: bool,
    #[define(E)] _dtype: ElemType,
) {
    let by = comptime!(spec.instruction);
    let (key_dim, value_dim) = comptime!(spec.state);
    let (depth_blocks, column_blocks) = comptime!((spec.depth_blocks, spec.column_blocks));
    let blocks = comptime!(depth_blocks * column_blocks);
    let (depth, columns, units) = comptime!((spec.depth(), spec.columns(), spec.units()));
    let (depth_stride, column_stride) = comptime!((depth + 8, columns + 8));
    let by_rows = comptime!(spec.decay == Decay::Rows);
    let from_update = comptime!(spec.stage(spec.update_heads, spec.depth_width, depth));
    let from_right = comptime!(spec.stage(spec.right_heads, value_dim, columns));
    let decay_line = comptime!(spec.decay_line());
    let factors = comptime!(spec.decay.of_rows(spec.reversed));
    let decay_len = comptime!(decay_line.len);

    let task = CUBE_POS;
    if task >= tasks {
        terminate!();
    }
    let (deep_cut, wide_cut) = comptime!(spec.cut());
    let column0 = (task % wide_cut) * columns;
    let depth0 = (task / wide_cut % deep_cut) * depth;
    let head = (task / comptime!(spec.tiles())) % spec.heads;
    let line = task / comptime!(spec.tiles() * spec.heads);

    let plane = UNIT_POS as usize / 32;
    let plane_column = (plane % spec.column_planes) * comptime!(16 * column_blocks);
    let plane_row = (plane / spec.column_planes) * comptime!(16 * depth_blocks);

    let (deep, wide) = (D::value(), C::value());
    let buffers = comptime!(spec.buffers());
    let update_len = comptime!(CHUNK * depth_stride / deep);
    let right_len = comptime!(CHUNK * column_stride / wide);
    let mut update_tiles =
        Shared::<[Vector<E, D>]>::new_aligned_slice(comptime!(buffers * update_len), 16usize);
    let mut right_tiles =
        Shared::<[Vector<E, C>]>::new_aligned_slice(comptime!(buffers * right_len), 16usize);
    let mut decay_tiles = Shared::<[f32]>::new_slice(comptime!(buffers * decay_len));
    let mut scratch = Scratch::<E>::new(comptime!(units / 32), SLOTS, 0usize, by);

    let mut next_update = Array::<Vector<E, D>>::new(held::<D>(from_update));
    let mut next_right = Array::<Vector<E, C>>::new(held::<C>(from_right));
    let mut next_factors = Array::<f32>::new(held_factors::<D>(factors, from_update));
    let mut next_decays = Array::<f32>::new(comptime!(decay_line.held()));
    let decay0 = if by_rows { TOTAL.runtime() } else { depth0 };

    // block n: of columns n / depth_blocks, of the depth n % depth_blocks
    let mut state = zero_pairs(comptime!(4 * blocks));
    let first_chunk = table[2 * line] as usize;
    let count = table[2 * line + 1] as usize;
    if count > 0 {
        let chunk = step_chunk(first_chunk, count, 0usize, spec.reversed);
        let rows = chunk_rows(table, num_lines, chunk);
        fetch::<E, D>(update, &mut next_update, &rows, head, depth0, from_update);
        fetch::<E, C>(right, &mut next_right, &rows, head, column0, from_right);
        fetch_factors::<D>(
            decays,
            rows_line(chunk, head, spec.heads),
            &mut next_factors,
            scale,
            f32::new(1.0),
            factors,
            from_update,
        );
        fetch_decays(decays, &mut next_decays, chunk, head, decay0, decay_line);
    }
    for step in 0..count {
        let half = step % buffers;
        let (update_at, right_at, decay_at) =
            (half * update_len, half * right_len, half * decay_len);
        let chunk = step_chunk(first_chunk, count, step, spec.reversed);
        let rows = chunk_rows(table, num_lines, chunk);
        let own_decays = &mut decay_tiles[decay_at..decay_at + decay_len];
        put_decays(&next_decays, own_decays, decay0, decay_line);
        scale_rows::<E, D>(&mut next_update, &next_factors, factors, packed, from_update);
        let own_updates = &mut update_tiles[update_at..update_at + update_len];
        put::<E, D>(&next_update, own_updates, rows.len, depth0, from_update);

        let own_rights = &mut right_tiles[right_at..right_at + right_len];
        put::<E, C>(&next_right, own_rights, rows.len, column0, from_right);
        sync_cube();

        // after the last it is read once more, for nothing: a branch would wait for what it reads
        let next_step = select(step + 1 < count, step + 1, step);
        let next_chunk = step_chunk(first_chunk, count, next_step, spec.reversed);
        let next_rows = chunk_rows(table, num_lines, next_chunk);
        fetch::<E, D>(update, &mut next_update, &next_rows, head, depth0, from_update);
        fetch::<E, C>(right, &mut next_right, &next_rows, head, column0, from_right);
        fetch_factors::<D>(
            decays,
            rows_line(next_chunk, head, spec.heads),
            &mut next_factors,
            scale,
            f32::new(1.0),
            factors,
            from_update,
        );
        fetch_decays(decays, &mut next_decays, next_chunk, head, decay0, decay_line);

        #[unroll]
        for n in 0..comptime!(if spec.decay == Decay::None { 0 } else { 4 * blocks }) {
            let mut factor = Pair::<f32>::empty();
            if by_rows {
                factor = Vector::new(decay_tiles[decay_at]);
            } else {
                let (_row, col) = pair_position(comptime!(n % 4));
                let at = decay_at + plane_row + comptime!(n / 4 % depth_blocks * 16) + col;
                factor.insert(0usize, decay_tiles[at]);
                factor.insert(1usize, decay_tiles[at + 1]);
            }
            state[n] *= factor;
        }
        let mut sums = Sequence::<Acc>::new();
        #[unroll]
        for n in 0..blocks {
            sums.push(Acc::onto(&state, comptime!(4 * n), by));
        }
        #[unroll]
        for s in 0..4usize {
            let row = half * CHUNK + s * 16;
            let mut lefts = Sequence::<Left<E>>::new();
            #[unroll]
            for c in 0..column_blocks {
                let col = plane_column + c * 16;
                lefts.push(Left::<E>::load(&right_tiles, row, col, column_stride, true, by));
            }
            #[unroll]
            for d in 0..depth_blocks {
                let col = plane_row + d * 16;
                let right = Right::<E>::load(&update_tiles, row, col, depth_stride, false, by);
                #[unroll]
                for c in 0..column_blocks {
                    let sum = sums.index_mut(comptime!(c * depth_blocks + d));
                    multiply::<E>(lefts.index(c), &right, sum);
                }
            }
        }
        add_to::<E>(&sums, &mut state, &mut scratch, f32::new(1.0), 0usize, by);
        if comptime!(buffers == 1) {
            sync_cube();
        }
    }

    let state_base = (line * spec.heads + head) * comptime!(key_dim * value_dim);
    #[unroll]
    for n in 0..comptime!(4 * blocks) {
        let (row, col) = pair_position(comptime!(n % 4));
        let key = depth0 + plane_row + comptime!(n / 4 % depth_blocks * 16) + col;
        let column = column0 + plane_column + comptime!(n / 4 / depth_blocks * 16) + row;
        #[unroll]
        for e in 0..2usize {
            if key + e < key_dim && column < value_dim {
                end[state_base + (key + e) * value_dim + column] = state[n].extract(e);
            }
        }
    }
}
