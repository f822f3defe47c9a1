//! Kernel `walk`: carries a state along the chunks of a sequence and reads outputs off it.
//!
//! ```text
//! out_chunk = left state (+ intra right)          state <- decay state + update^T right
//! ```
//!
//! with `left`, `update` `[64, depth]` and `right` `[64, columns]` of the chunk. The forward and the
//! backward of the recurrence are four such walks:
//!
//! | out | chunks | left | update | right | state | intra |
//! |---|---|---|---|---|---|---|
//! | `o` | first to last | `qt` | `kt` | `v` | `S [K, V]` | `A` |
//! | `dv` | last to first | `kt` | `qt` | `do` | `D [K, V]` | `A^T` |
//! | `dq` | first to last | `do` | `v` | `kt` | `S^T [V, K]` | `dA` |
//! | `dk` | last to first | `v` | `do` | `qt` | `D^T [V, K]` | `dA^T` |
//!
//! With a key head for each query head `o` and `dv` can be one compiled kernel, and `dq` and `dk` another, that
//! is told its direction by an argument, so that a first call compiles less. [`WalkSpec::values`] and
//! [`WalkSpec::keys`] say where they are.
//!
//! `S` is the state before the chunk, `D` the gradient of the state after it. The `dk` walk leaves
//! `D` for the `dq` walk, which forms the products `sum_j S[i, j] D[i, j]` that `dg` needs.
//!
//! Where the decay lies is [`Decay`]. A vector gate has it in the operands `qt` and `kt`, and `dq` and
//! `dk` leave what the rows of a chunk have to do with each other to `intra_grad`. Without one the
//! operands are `q` and `k` themselves: a row's decay scales its output, or its row of `left`, and, for the
//! update, a row of `update` or of `right`, see [`WalkSpec::of_update`].
//!
//! A plane owns 16 columns and some of the state's depth; a cube, some columns and all of the depth. The
//! state stays, transposed, in registers, as the pairs of the accumulators of `update^T right`: with
//! `mma` they are at the same time the right operand of `left state`, and planes with the same columns add
//! up their shares of the output through shared memory, from where whole lines are written. With `cmma` a
//! plane has all of the depth of its columns, and writes its outputs itself.
//!
//! A chunk takes two barriers, four where `left` and `update` take turns in one tile. What the next
//! chunk needs is on its way to registers meanwhile: a tile is read again as soon as its values are in
//! shared memory, without a branch or a use of what is read, which would wait for it.

use cubecl::prelude::*;

use super::CHUNK;
use super::gate_terms::{dot_rows, leave_state, multiply_states, pairs_in_place, sum_dots};
use super::intra::{add_intra, fetch_blocks, held_blocks, put_blocks};
use super::outputs::{stage_pairs, write_pairs, write_staged};
use super::stage::{
    Factors, fetch, fetch_decays, fetch_factors, held, held_factors, put, put_decays, row_factors,
    rows_line, scale_rows,
};
use super::walk_spec::{Decay, Direction, KeyAxis, TOTAL, WalkSpec};
use crate::Instruction;
use crate::components::{
    Acc, ChunkMap, ChunkRows, Left, Pair, Right, Scratch, add_to, multiply, pair_position, scaled,
    step_chunk, zero_pairs,
};

/// * `left`, `update`: `[rows, heads of each, depth_width]`; `right`: `[rows, its heads, width]`
/// * `decays`: `[chunks, H, decay_stride]`, see [`Decay`]; `intra`: `[chunks, H, 64, 64]`
/// * `probe`: as `out`, of its own heads; `dots`: out, `[tiles, parts, rows, H]`, the products of its
///   rows and those of `left state`; both if `spec.dots`
/// * `start`, `end`: `[lines, H, K, V]`, a line a sequence or a segment; `start` is read if `has_start`,
///   `end` written if `writes_end`
/// * `out`: `[parts, rows, H, width]`, or `[parts, chunks, H, width, 64]` if `spec.by_channel()`; of the
///   type of the operands if `rounds_out`
/// * `trace`: scratch `[chunks, H, trace_len]`
/// * `products`: out forward if `spec.traced`, `[shares, chunks, H, padded]`
/// * `reversed`: 1 if from the last chunk on, else 0; read if `spec.direction` is told
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(crate) fn gla_walk_kernel<
    E: Float,
    O: Float,
    D: Size,
    C: Size,
    I: Size,
    P: Size,
    R: Size,
    W: Size,
>(
    left: &[Vector<E, D>],
    update: &[Vector<E, D>],
    right: &[Vector<E, C>],
    decays: &[f32],
    intra: &[Vector<E, I>],
    probe: &[Vector<E, P>],
    start: &[f32],
    end: &mut [f32],
    out: &mut [Vector<O, W>],
    dots: &mut [f32],
    trace: &mut [Vector<E, R>],
    products: &mut [f32],
    map: ChunkMap,
    num_rows: usize,
    num_chunks: usize,
    tasks: usize,
    reversed: u32,
    scale: f32,
    near: f32,
    #[comptime] spec: WalkSpec,
    #[comptime] in_half: bool,
    #[comptime] has_start: bool,
    #[comptime] writes_end: bool,
    #[comptime] rounds_out: bool,
    #[define(E, O)] _dtypes: [ElemType; 2],
) {
    // where it is known, what depends on it is compiled for one direction alone
    let reversed = if comptime!(spec.direction == Direction::Told) {
        reversed != 0
    } else {
        comptime!(spec.direction == Direction::Backward).runtime()
    };
    let (outs_at, updates_at) = row_factors(reversed);
    // where no operand holds the scale: forward the states take it (without a gate, and for `dq` of a vector
    // gate), backward the updates (without a gate)
    let (of_state, of_updates) = (select(reversed, 1.0, scale), select(reversed, scale, 1.0));
    let by = comptime!(spec.instruction);
    let takes_turns = comptime!(spec.takes_turns());
    let plane_depth = comptime!(spec.plane_depth);
    let sharing = comptime!(spec.depth_planes);
    let depth = comptime!(spec.depth());
    let columns = comptime!(spec.columns());
    let units = comptime!(spec.units());
    let (key_dim, value_dim) = comptime!(spec.state);
    let keys_deep = comptime!(spec.keys == KeyAxis::Depth);
    let (stages_out, by_channel) = comptime!((spec.stages_out(), spec.by_channel()));
    let has_intra = comptime!(spec.intra);
    let may_write = comptime!(spec.traced && spec.direction != Direction::Forward);
    let may_read = comptime!(spec.traced && spec.direction != Direction::Backward);
    let by_rows = comptime!(spec.decay == Decay::Rows);
    let scales_state = comptime!(spec.scales_state());
    let (of_left, of_update) = comptime!((spec.of_left(), spec.of_update()));
    let of_right = comptime!(spec.of_right());
    let scales_left = comptime!(of_left != Factors::None);
    // the power of two next to the scale, where the products take it instead of `update`
    let (added, taken) = if comptime!(spec.splits_scale()) {
        let near = select(reversed, near, 1.0);
        (near, 1.0 / near)
    } else {
        (f32::new(1.0), f32::new(1.0))
    };
    // matrices are written from where and to where 16 bytes begin
    let writes_matrices = comptime!(spec.width.is_multiple_of(if rounds_out { 8 } else { 4 }));
    let depth_stride = comptime!(depth + 8);
    let column_stride = comptime!(columns + 8);
    let from_left = comptime!(spec.stage(spec.left_heads, spec.depth_width, depth));
    let from_update = comptime!(spec.stage(spec.update_heads, spec.depth_width, depth));
    let from_right = comptime!(spec.stage(spec.right_heads, spec.width, columns));
    let from_probe = comptime!(spec.stage(spec.probe_heads, spec.width, columns));
    let from_intra = comptime!(spec.stage(1usize, CHUNK, CHUNK));

    let task = CUBE_POS;
    if task >= tasks {
        terminate!();
    }
    let tiles = comptime!(spec.tiles());
    let tile = task % tiles;
    let part = (task / tiles) % spec.parts;
    let head = (task / comptime!(tiles * spec.parts)) % spec.heads;
    // a sequence, or a segment of one
    let line = task / comptime!(tiles * spec.parts * spec.heads);
    let depth0 = part * depth;
    let column0 = tile * columns;

    let unit = UNIT_POS as usize;
    let lane = unit % 32;
    // the plane's columns and depth in the cube
    let column_plane = (unit / 32) % spec.column_planes;
    let depth_plane = unit / comptime!(32 * spec.column_planes);
    let plane_column = column_plane * 16;
    let plane_row = depth_plane * plane_depth;
    // of this lane's accumulators: the first of two columns, and the depth of the first pair
    let own_column = column0 + plane_column + lane / 4;
    let own_depth = depth0 + plane_row + 2 * (lane % 4);

    let (deep, wide, across) = (D::value(), C::value(), I::value());
    let left_at_once = R::value();
    let mut left_tile = Shared::<[Vector<E, D>]>::new_aligned_slice(
        comptime!(spec.left_len().div_ceil(deep)),
        16usize,
    );
    let mut update_tile = Shared::<[Vector<E, D>]>::new_aligned_slice(
        comptime!(spec.update_len().div_ceil(deep)),
        16usize,
    );
    let mut right_tile = Shared::<[Vector<E, C>]>::new_aligned_slice(
        comptime!(CHUNK * column_stride / wide),
        16usize,
    );
    let mut intra_tile = Shared::<[Vector<E, I>]>::new_aligned_slice(
        comptime!(spec.pairs_len().div_ceil(across)),
        16usize,
    );
    let mut scratch = Scratch::<E>::new(
        comptime!(units / 32),
        comptime!(spec.slots()),
        comptime!(spec.least_halves()),
        by,
    );
    let mut out_tile = Shared::<[f32]>::new_aligned_slice(comptime!(spec.out_tile_len()), 16usize);
    let mut dot_tile = Shared::<[f32]>::new_slice(comptime!(spec.dots_len()));
    let decay_len = comptime!(spec.decay_len());
    let decay_line = comptime!(spec.decay_line());
    let mut decay_tiles = Shared::<[f32]>::new_slice(comptime!(spec.decay_tiles() * decay_len));

    // the state, transposed: accumulator tile n holds depth 8 n .. 8 n + 8
    let depth_tiles = comptime!(plane_depth / 8);
    let state_base = (line * spec.heads + head) * comptime!(key_dim * value_dim);
    let mut state = zero_pairs(comptime!(2 * depth_tiles));
    if has_start {
        #[unroll]
        for n in 0..depth_tiles {
            #[unroll]
            for half in 0..2usize {
                let mut pair = Pair::<f32>::empty();
                #[unroll]
                for e in 0..2usize {
                    let (at, valid) = state_at(own_depth + 8 * n + e, own_column + 8 * half, spec);
                    let value = start[select(valid, state_base + at, 0usize)];
                    pair.insert(e, select(valid, value, f32::new(0.0)));
                }
                state[2 * n + half] = pair;
            }
        }
    }

    let mut next_left = Array::<Vector<E, D>>::new(held::<D>(from_left));
    let mut next_right = Array::<Vector<E, C>>::new(held::<C>(from_right));
    let mut next_intra = Array::<Vector<E, I>>::new(if takes_turns {
        held_blocks(spec)
    } else {
        held::<I>(from_intra)
    });
    let mut left_factors = Array::<f32>::new(held_factors::<D>(of_left, from_left));
    let mut update_factors = Array::<f32>::new(held_factors::<D>(of_update, from_update));
    let mut next_update = Array::<Vector<E, D>>::new(held::<D>(from_update));
    let mut next_decays = Array::<f32>::new(comptime!(decay_line.held()));
    let decay0 = if comptime!(spec.decay != Decay::Channels) {
        0usize.runtime()
    } else if keys_deep {
        depth0
    } else {
        column0
    };

    let own_line = map.line(line);
    let (first_chunk, count) = (own_line.first, own_line.count);
    if count > 0 {
        let chunk = step_chunk(first_chunk, count, 0usize, reversed);
        let rows = own_line.rows_of(chunk);
        fetch::<E, D>(left, &mut next_left, &rows, head, depth0, from_left);
        fetch_factors::<D>(
            decays,
            rows_line(chunk, head, spec.heads) + outs_at,
            &mut left_factors,
            scale,
            f32::new(1.0),
            of_left,
            from_left,
        );
        fetch::<E, C>(right, &mut next_right, &rows, head, column0, from_right);
        if comptime!(has_intra && !takes_turns) {
            let pairs = pairs_of(chunk, head, spec);
            fetch::<E, I>(intra, &mut next_intra, &pairs, 0usize, 0usize, from_intra);
        }
        fetch_decays(decays, &mut next_decays, chunk, head, decay0, decay_line);
        if !takes_turns {
            fetch::<E, D>(update, &mut next_update, &rows, head, depth0, from_update);
            let of_rows = rows_line(chunk, head, spec.heads) + updates_at;
            let out = &mut update_factors;
            fetch_factors::<D>(decays, of_rows, out, of_updates, taken, of_update, from_update);
        }
    }
    for step in 0..count {
        let chunk = step_chunk(first_chunk, count, step, reversed);
        let rows = own_line.rows_of(chunk);
        // after the last it is read once more, for nothing: a branch would wait for what it reads
        let next_step = select(step + 1 < count, step + 1, step);
        let next_chunk = step_chunk(first_chunk, count, next_step, reversed);
        let next_rows = own_line.rows_of(next_chunk);
        // with `mma` of this chunk and the next in turn: the last planes to scale their state still read the
        // one when the first put down the other
        let decay_at = (step % comptime!(spec.decay_tiles())) * decay_len;
        scale_rows::<E, D>(&mut next_left, &left_factors, of_left, in_half, from_left);
        put::<E, D>(&next_left, &mut left_tile, rows.len, depth0, from_left);
        put::<E, C>(&next_right, &mut right_tile, rows.len, column0, from_right);
        if comptime!(has_intra && !takes_turns) {
            put::<E, I>(&next_intra, &mut intra_tile, CHUNK.runtime(), 0usize, from_intra);
        }
        let own_decays = &mut decay_tiles[decay_at..decay_at + decay_len];
        put_decays(&next_decays, own_decays, decay0, decay_line);
        fetch_decays(decays, &mut next_decays, next_chunk, head, decay0, decay_line);
        let traces = comptime!(spec.traces() / left_at_once);
        let trace_from = (chunk * spec.heads + head) * comptime!(spec.trace_len() / left_at_once)
            + (tile * spec.parts + part) * comptime!(traces * units);
        let mut traced = Array::<Vector<E, R>>::new(traces);
        if comptime!(may_read) && !reversed {
            #[unroll]
            for n in 0..traces {
                traced[n] = trace[trace_from + n * units + unit];
            }
        }
        // on their way while the products run
        let probed = if comptime!(spec.dots) {
            let column = column0 + plane_column;
            pairs_in_place::<E, P>(probe, &rows, head, column, from_probe)
        } else {
            Array::<Pair<E>>::new(1usize)
        };
        sync_cube();
        // where tiles take turns units are few, with more of them to hold than registers: they come as late
        // as the products with `left` cover
        if takes_turns {
            fetch::<E, D>(update, &mut next_update, &rows, head, depth0, from_update);
            if has_intra {
                fetch_blocks::<E, I>(intra, &mut next_intra, chunk, head, spec);
            }
        }

        let mut sums = Sequence::<Acc>::new();
        #[unroll]
        for _m in 0..4usize {
            sums.push(Acc::zero(by));
        }
        // the state, and what rounding took off it
        let terms = comptime!(if spec.precise { 2 } else { 1 });
        let (depth_blocks, slots) = comptime!((plane_depth / 16, spec.slots()));
        let at_once = comptime!((slots.halves / terms).max(1));
        #[unroll]
        for round in 0..comptime!(depth_blocks.div_ceil(at_once)) {
            let count = comptime!((depth_blocks - round * at_once).min(at_once));
            let mut own = zero_pairs(comptime!(4 * terms * count));
            #[unroll]
            for n in 0..comptime!(4 * count) {
                let pair = state[comptime!(4 * round * at_once + n)];
                let at = comptime!(n / 4 * 4 * terms + n % 4);
                own[at] = pair;
                if scales_state {
                    own[at] *= Vector::new(of_state);
                }
                if comptime!(spec.precise) {
                    own[at + 4] = pair - Vector::cast_from(Pair::<E>::cast_from(pair));
                }
            }
            let rights = Right::<E>::of_pairs(&own, &mut scratch, comptime!(terms * count), by);
            #[unroll]
            for d in 0..count {
                #[unroll]
                for m in 0..4usize {
                    let (row, col) = (m * 16, plane_row + (round * at_once + d) * 16);
                    let left = Left::<E>::load(&left_tile, row, col, depth_stride, false, by);
                    #[unroll]
                    for term in 0..terms {
                        let right = rights.index(comptime!(d * terms + term));
                        multiply::<E>(&left, right, sums.index_mut(m));
                    }
                }
            }
        }
        let mut acc = zero_pairs(16usize);
        // what is done to the products with the state alone wants them in registers
        let early = comptime!(by_rows && !scales_left || by != Instruction::Cmma);
        if early {
            add_to::<E>(&sums, &mut acc, &mut scratch, f32::new(1.0), 0usize, by);
        }
        if comptime!(by_rows && !scales_left) {
            #[unroll]
            for i in 0..16usize {
                let (row, _col) = pair_position(i % 4);
                let factor = decay_tiles[decay_at + outs_at + (i / 4) * 16 + row];
                acc[i] *= Vector::new(factor);
            }
        }
        if comptime!(spec.dots) {
            dot_rows::<E>(&probed, &acc, &mut dot_tile);
        }
        let mut further = Sequence::<Acc>::new();
        #[unroll]
        for m in 0..comptime!(if early && has_intra { 4 } else { 0 }) {
            further.push(Acc::onto(&acc, 4 * m, by));
        }
        let mut sums = if early { further } else { sums };
        let sharer = part * sharing + depth_plane;
        // lines of rows, or of channels for `intra_grad`, whose units read some rows of one channel
        let out_line = if by_channel {
            (part * num_chunks + chunk) * spec.heads + head
        } else {
            (part * num_rows + rows.start) * spec.heads + head
        };
        let column = column0 + plane_column;
        if takes_turns {
            sync_cube();
            let out = &mut update_factors;
            fetch_factors::<D>(
                &decay_tiles,
                updates_at,
                out,
                of_updates,
                taken,
                of_update,
                from_update,
            );
            scale_rows::<E, D>(&mut next_update, &update_factors, of_update, in_half, from_update);
            put::<E, D>(&next_update, &mut left_tile, rows.len, depth0, from_update);
            if has_intra {
                put_blocks::<E, I>(&next_intra, &mut scratch.halves, spec);
            }
        } else {
            if has_intra {
                add_intra::<E, I, C>(
                    &intra_tile,
                    &right_tile,
                    &mut sums,
                    sharer,
                    plane_column,
                    reversed,
                    spec,
                );
                add_to::<E>(&sums, &mut acc, &mut scratch, f32::new(1.0), 0usize, by);
            }
            stage_pairs(&acc, &mut out_tile, depth_plane, plane_column, spec);
            scale_rows::<E, D>(&mut next_update, &update_factors, of_update, in_half, from_update);
            put::<E, D>(&next_update, &mut update_tile, rows.len, depth0, from_update);
            fetch::<E, D>(update, &mut next_update, &next_rows, head, depth0, from_update);
            let of_rows = rows_line(next_chunk, head, spec.heads) + updates_at;
            let out = &mut update_factors;
            fetch_factors::<D>(decays, of_rows, out, of_updates, taken, of_update, from_update);
        }

        if comptime!(may_write) && reversed {
            leave_state::<E, R>(&state, trace, trace_from, spec);
        }
        if comptime!(may_read) && !reversed {
            let at = (((part * sharing + depth_plane) * num_chunks + chunk) * spec.heads + head)
                * spec.padded;
            multiply_states::<E, R>(&state, &traced, products, at, own_column, spec);
        }
        // `right^T`; with `mma` the tile is the next chunk's after the barrier
        let mut lefts = Sequence::<Left<E>>::new();
        #[unroll]
        for s in 0..comptime!(if takes_turns { 0 } else { 4 }) {
            let (row, col) = (s * 16, plane_column);
            let left = Left::<E>::load(&right_tile, row, col, column_stride, true, by);
            if comptime!(of_right != Factors::None) {
                let factors =
                    factors_of_right(&decay_tiles, decay_at + updates_at, s, of_updates, spec);
                lefts.push(scaled::<E>(&left, &factors));
            } else {
                lefts.push(left);
            }
        }
        sync_cube();

        fetch::<E, D>(left, &mut next_left, &next_rows, head, depth0, from_left);
        fetch_factors::<D>(
            decays,
            rows_line(next_chunk, head, spec.heads) + outs_at,
            &mut left_factors,
            scale,
            f32::new(1.0),
            of_left,
            from_left,
        );
        fetch::<E, C>(right, &mut next_right, &next_rows, head, column0, from_right);
        if comptime!(has_intra && !takes_turns) {
            let pairs = pairs_of(next_chunk, head, spec);
            fetch::<E, I>(intra, &mut next_intra, &pairs, 0usize, 0usize, from_intra);
        }
        if comptime!(spec.dots) {
            let first = (tile * spec.parts + part) * num_rows + rows.start;
            sum_dots(&dot_tile, dots, first * spec.heads + head, rows.len, spec);
        }
        if stages_out {
            write_staged::<O, W>(&out_tile, out, out_line, column0, rows.len, spec);
        } else {
            if has_intra {
                let blocks = &scratch.halves;
                add_intra::<E, Const<2>, C>(
                    blocks,
                    &right_tile,
                    &mut sums,
                    sharer,
                    plane_column,
                    reversed,
                    spec,
                );
            }
            if by_channel {
                if column < spec.width {
                    #[unroll]
                    for m in 0..4usize {
                        let at = (out_line * spec.width + column) * CHUNK + m * 16;
                        sums.index(m).write::<O, W>(out, at, CHUNK, true, rounds_out);
                    }
                }
            } else if comptime!(writes_matrices && !early)
                && rows.len == CHUNK
                && column + 16 <= spec.width
            {
                #[unroll]
                for m in 0..4usize {
                    let stride = comptime!(spec.heads * spec.width);
                    let at = out_line * spec.width + column + m * 16 * stride;
                    sums.index(m).write::<O, W>(out, at, stride, false, rounds_out);
                }
            } else {
                if comptime!(!early || has_intra) {
                    add_to::<E>(&sums, &mut acc, &mut scratch, f32::new(1.0), 0usize, by);
                }
                write_pairs::<O, W>(&acc, out, out_line, column, rows.len, spec);
            }
        }

        #[unroll]
        for n in 0..comptime!(if spec.decay == Decay::None { 0 } else { depth_tiles }) {
            #[unroll]
            for half in 0..2usize {
                let mut factor = Pair::<f32>::empty();
                if comptime!(by_rows) {
                    factor = Vector::new(decay_tiles[decay_at + TOTAL]);
                } else if keys_deep {
                    let at = decay_at + plane_row + 8 * n + 2 * (lane % 4);
                    factor.insert(0usize, decay_tiles[at]);
                    factor.insert(1usize, decay_tiles[at + 1]);
                } else {
                    let own = decay_tiles[decay_at + plane_column + lane / 4 + 8 * half];
                    factor.insert(0usize, own);
                    factor.insert(1usize, own);
                }
                state[2 * n + half] *= factor;
            }
        }
        if takes_turns {
            #[unroll]
            for s in 0..4usize {
                let (row, col) = (s * 16, plane_column);
                lefts.push(Left::<E>::load(&right_tile, row, col, column_stride, true, by));
            }
        }
        #[unroll]
        for round in 0..comptime!(depth_blocks.div_ceil(slots.floats)) {
            let first = comptime!(round * slots.floats);
            let count = comptime!((depth_blocks - first).min(slots.floats));
            let mut sums = Sequence::<Acc>::new();
            #[unroll]
            for d in 0..count {
                let mut sum = Acc::onto(&state, comptime!(4 * (first + d)), by);
                #[unroll]
                for s in 0..4usize {
                    let (row, col) = (s * 16, plane_row + (first + d) * 16);
                    let right = if takes_turns {
                        Right::<E>::load(&left_tile, row, col, depth_stride, false, by)
                    } else {
                        Right::<E>::load(&update_tile, row, col, depth_stride, false, by)
                    };
                    multiply::<E>(lefts.index(s), &right, &mut sum);
                }
                sums.push(sum);
            }
            add_to::<E>(&sums, &mut state, &mut scratch, added, comptime!(4 * first), by);
        }
        if takes_turns {
            sync_cube();
        }
    }

    #[unroll]
    for n in 0..comptime!(if writes_end { depth_tiles } else { 0 }) {
        #[unroll]
        for half in 0..2usize {
            #[unroll]
            for e in 0..2usize {
                let (at, valid) = state_at(own_depth + 8 * n + e, own_column + 8 * half, spec);
                if valid {
                    end[state_base + at] = state[2 * n + half].extract(e);
                }
            }
        }
    }
}

/// The rows of a chunk and head in `intra`: it has all of them.
#[cube]
fn pairs_of(chunk: usize, head: usize, #[comptime] spec: WalkSpec) -> ChunkRows {
    ChunkRows { start: (chunk * spec.heads + head) * CHUNK, len: CHUNK.runtime() }
}

/// The factors of 16 rows of `right` that a lane has elements of: rows `8 half + 2 (lane % 4)` and the
/// next.
#[cube]
fn factors_of_right(
    decay_tiles: &[f32],
    first: usize,
    #[comptime] s: usize,
    scale: f32,
    #[comptime] spec: WalkSpec,
) -> Array<Pair<f32>> {
    let mut factors = Array::<Pair<f32>>::new(2usize);
    #[unroll]
    for half in 0..2usize {
        let mut factor = Pair::<f32>::empty();
        #[unroll]
        for e in 0..2usize {
            let row = s * 16 + 8 * half + 2 * (UNIT_POS_PLANE as usize % 4) + e;
            let own =
                if comptime!(spec.decay == Decay::Rows) { decay_tiles[first + row] } else { scale };
            factor.insert(e, own);
        }
        factors[half] = factor;
    }
    factors
}

/// Where a number of the state lies in `[K, V]`, and whether it exists.
#[cube]
fn state_at(deep: usize, column: usize, #[comptime] spec: WalkSpec) -> (usize, bool) {
    let (key_dim, value_dim) = comptime!(spec.state);
    if comptime!(spec.keys == KeyAxis::Depth) {
        (deep * value_dim + column, deep < key_dim && column < value_dim)
    } else {
        (column * value_dim + deep, column < key_dim && deep < value_dim)
    }
}
