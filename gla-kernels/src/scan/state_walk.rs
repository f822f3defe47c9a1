//! Kernel `state_walk`: what the chunks of a segment add to a state of zero.
//!
//! ```text
//! state = sum over the chunks of (after update)^T right
//! ```
//!
//! with the operands of [`super::walk`]: keys and `v` for `S`, queries and `do` for `D`. `after` is the decay
//! of the chunks that the state passes after this one. They are walked against its direction, last to first
//! for `S` and first to last for `D`, so that `after` is a running product: one matrix product over all rows
//! of the segment, whose accumulators nothing touches in between. A cube owns a rectangle of the state, a
//! plane a smaller one, in registers. The direction is an argument: with a key head for each query head,
//! forward and backward launch the same compiled kernel.
//!
//! With `mma` tiles lie in shared memory twice: while some planes multiply what is in one half, others put
//! the next chunk down in the other, and a chunk takes one barrier. With `cmma`, which has less room, once.

use cubecl::prelude::*;

use super::CHUNK;
use super::stage::{
    Stage, fetch, fetch_factors, held, held_factors, put, row_factors, rows_line, scale_columns,
    scale_rows,
};
use super::walk_spec::{Decay, Direction, TOTAL, WalkShape, operands};
use crate::Instruction;
use crate::components::{
    Acc, ChunkMap, Left, Right, Scratch, Slots, add_to, multiply, pair_position, step_chunk,
    zero_pairs,
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
    /// The tile instruction.
    pub instruction: Instruction,
}

impl StateSpec {
    /// With the widest cubes that fit the device and of which there are enough, else the narrowest.
    pub(crate) fn new(shape: WalkShape) -> Self {
        let WalkShape { dims, instruction, reversed, .. } = shape;
        let [q, k, depth_width] = operands(dims);
        let decay = Decay::of(dims.gate);
        // blocks of a plane, planes of a cube, and at least how many of those lie along the values
        let (blocks, planes, across) = match instruction {
            Instruction::Mma => ((4, 4), 8, 2),
            // as many in fewer planes were slower
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
            decay,
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
        2 * tiles + scratch
    }

    /// Chunks in shared memory: two save a barrier; with matrices, one twice as wide.
    pub const fn buffers(&self) -> usize {
        match self.instruction {
            Instruction::Cmma => 1,
            _ => 2,
        }
    }

    fn stage(&self, own_heads: usize, width: usize, cols: usize) -> Stage {
        Stage::new(self.heads, own_heads, width, cols, self.units())
    }
}

/// * `update`: `[rows, its heads, depth_width]`; `right`: `[rows, its heads, V]`
/// * `decays`: `[chunks, H, stride]`, see [`Decay`], of rows; `channel_decays`: those of channels
/// * `end`: out, `[lines, H, K, V]`
/// * `reversed`: 1 for `D`, 0 for `S`
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(crate) fn gla_state_walk_kernel<E: Float, D: Size, C: Size>(
    update: &[Vector<E, D>],
    right: &[Vector<E, C>],
    decays: &[f32],
    channel_decays: &[Vector<f32, Const<4>>],
    end: &mut [f32],
    map: ChunkMap,
    tasks: usize,
    reversed: u32,
    scale: f32,
    #[comptime] spec: StateSpec,
    #[comptime] in_half: bool,
    #[define(E)] _dtype: ElemType,
) {
    let by = comptime!(spec.instruction);
    let (key_dim, value_dim) = comptime!(spec.state);
    let (depth_blocks, column_blocks) = comptime!((spec.depth_blocks, spec.column_blocks));
    let blocks = comptime!(depth_blocks * column_blocks);
    let (depth, columns, units) = comptime!((spec.depth(), spec.columns(), spec.units()));
    let (depth_stride, column_stride) = comptime!((depth + 8, columns + 8));
    let by_rows = comptime!(spec.decay == Decay::Rows);
    let by_columns = comptime!(spec.decay == Decay::Channels);
    let from_update = comptime!(spec.stage(spec.update_heads, spec.depth_width, depth));
    let from_right = comptime!(spec.stage(spec.right_heads, value_dim, columns));
    // what the rows of `update` are multiplied with
    let factors = comptime!(spec.decay.of_rows(Direction::Told));

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
    let mut scratch = Scratch::<E>::new(comptime!(units / 32), SLOTS, 0usize, by);

    let mut next_update = Array::<Vector<E, D>>::new(held::<D>(from_update));
    let mut next_right = Array::<Vector<E, C>>::new(held::<C>(from_right));
    let mut next_factors = Array::<f32>::new(held_factors::<D>(factors, from_update));
    // of a chunk, and of those before it: one number, or one for each channel of a unit's vectors
    let mut next_decay = Vector::<f32, D>::new(1.0);
    let mut after = Vector::<f32, D>::new(1.0);

    // block n: of the depth n % depth_blocks, of columns n / depth_blocks
    let mut sums = Sequence::<Acc>::new();
    #[unroll]
    for _n in 0..blocks {
        sums.push(Acc::zero(by));
    }
    let own_line = map.line(line);
    let (first_chunk, count) = (own_line.first, own_line.count);
    let backwards = reversed == 0;
    let (_, factors_at) = row_factors(reversed != 0);
    let scale = select(reversed != 0, scale, 1.0);
    if count > 0 {
        let chunk = step_chunk(first_chunk, count, 0usize, backwards);
        let rows = own_line.rows_of(chunk);
        fetch::<E, D>(update, &mut next_update, &rows, head, depth0, from_update);
        fetch::<E, C>(right, &mut next_right, &rows, head, column0, from_right);
        let of_rows = rows_line(chunk, head, spec.heads) + factors_at;
        let one = f32::new(1.0);
        fetch_factors::<D>(decays, of_rows, &mut next_factors, scale, one, factors, from_update);
        fetch_decay::<D>(decays, channel_decays, &mut next_decay, chunk, head, depth0, spec);
    }
    for step in 0..count {
        let half = step % buffers;
        let (update_at, right_at) = (half * update_len, half * right_len);
        let chunk = step_chunk(first_chunk, count, step, backwards);
        let rows = own_line.rows_of(chunk);
        if by_columns {
            scale_columns::<E, D>(&mut next_update, &after, in_half, from_update);
        } else {
            if by_rows {
                #[unroll]
                for n in 0..held::<D>(from_update) {
                    next_factors[n] *= after.extract(0usize);
                }
            }
            scale_rows::<E, D>(&mut next_update, &next_factors, factors, in_half, from_update);
        }
        after *= next_decay;
        let own_updates = &mut update_tiles[update_at..update_at + update_len];
        put::<E, D>(&next_update, own_updates, rows.len, depth0, from_update);
        let own_rights = &mut right_tiles[right_at..right_at + right_len];
        put::<E, C>(&next_right, own_rights, rows.len, column0, from_right);
        sync_cube();

        // after the last it is read once more, for nothing: a branch would wait for what it reads
        let next_step = select(step + 1 < count, step + 1, step);
        let next_chunk = step_chunk(first_chunk, count, next_step, backwards);
        let next_rows = own_line.rows_of(next_chunk);
        fetch::<E, D>(update, &mut next_update, &next_rows, head, depth0, from_update);
        fetch::<E, C>(right, &mut next_right, &next_rows, head, column0, from_right);
        let of_rows = rows_line(next_chunk, head, spec.heads) + factors_at;
        let one = f32::new(1.0);
        fetch_factors::<D>(decays, of_rows, &mut next_factors, scale, one, factors, from_update);
        fetch_decay::<D>(decays, channel_decays, &mut next_decay, next_chunk, head, depth0, spec);

        #[unroll]
        for s in 0..4usize {
            let row = half * CHUNK + s * 16;
            let mut lefts = Sequence::<Left<E>>::new();
            #[unroll]
            for d in 0..depth_blocks {
                let col = plane_row + d * 16;
                lefts.push(Left::<E>::load(&update_tiles, row, col, depth_stride, true, by));
            }
            #[unroll]
            for c in 0..column_blocks {
                let col = plane_column + c * 16;
                let right = Right::<E>::load(&right_tiles, row, col, column_stride, false, by);
                #[unroll]
                for d in 0..depth_blocks {
                    let sum = sums.index_mut(comptime!(c * depth_blocks + d));
                    multiply::<E>(lefts.index(d), &right, sum);
                }
            }
        }
        if comptime!(buffers == 1) {
            sync_cube();
        }
    }

    let mut state = zero_pairs(comptime!(4 * blocks));
    add_to::<E>(&sums, &mut state, &mut scratch, f32::new(1.0), 0usize, by);
    let state_base = (line * spec.heads + head) * comptime!(key_dim * value_dim);
    #[unroll]
    for n in 0..comptime!(4 * blocks) {
        let (row, col) = pair_position(comptime!(n % 4));
        let key = depth0 + plane_row + comptime!(n / 4 % depth_blocks * 16) + row;
        let column = column0 + plane_column + comptime!(n / 4 / depth_blocks * 16) + col;
        #[unroll]
        for e in 0..2usize {
            if key < key_dim && column + e < value_dim {
                end[state_base + key * value_dim + column + e] = state[n].extract(e);
            }
        }
    }
}

/// Reads the decay of a chunk: that of its rows, or those of the channels of a unit's vectors of `update`,
/// which are the same in all of its rows.
#[cube]
fn fetch_decay<N: Size>(
    decays: &[f32],
    channel_decays: &[Vector<f32, Const<4>>],
    out: &mut Vector<f32, N>,
    chunk: usize,
    head: usize,
    depth0: usize,
    #[comptime] spec: StateSpec,
) {
    let size = N::value();
    if comptime!(spec.decay == Decay::Rows) {
        *out = Vector::new(decays[rows_line(chunk, head, spec.heads) + TOTAL]);
    }
    if comptime!(spec.decay == Decay::Channels) {
        let across = comptime!(spec.depth() / size);
        comptime!(assert!(spec.units().is_multiple_of(across), "a unit has one column"));
        comptime!(assert!(size.is_multiple_of(4), "lines are padded"));
        let line = (chunk * spec.heads + head) * spec.depth_width;
        let first = depth0 + UNIT_POS as usize % across * size;
        #[unroll]
        for n in 0..comptime!(size / 4) {
            // of channels beyond the line nothing is written
            let i = select(first < spec.depth_width, first + 4 * n, 0usize);
            let four = channel_decays[(line + i) / 4];
            #[unroll]
            for e in 0..4usize {
                out.insert(comptime!(4 * n + e), four.extract(e));
            }
        }
    }
}
