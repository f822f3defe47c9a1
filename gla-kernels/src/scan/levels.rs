//! The levels of a chunk.
//!
//! Inside a chunk of 64 rows, a pair `(t, s)` with `s < t` is split at its **level**: the highest bit
//! in which the row numbers differ. Both rows lie in one block of `2^(level + 1)` rows, `t` in the
//! second half and `s` in the first, so the decay between them is the product of two factors that
//! are at most one: from the boundary of the halves to `t`, and from `s` to the boundary. Each level
//! is therefore a masked matrix product without overflow or cancellation, for gates of any size, and
//! the six levels cover each pair once. In the backward the same split makes `dg` a sum of terms that
//! each carry the step's own decay: within a half, running sums of `q dq` from the end (second
//! halves) or of `k dk` from the start (first halves).

use cubecl::prelude::*;

use super::{ChunkSpec, GROUP};
use crate::components::{ChunkRows, row_offset};

/// A unit's rows of one channel, in registers.
pub type Column = Array<f32>;

/// Queries, keys and decay factors of a unit.
#[derive(CubeType)]
pub(crate) struct Columns {
    pub q: Column,
    pub k: Column,
    pub decay: Column,
    /// Decay from the start of the group through the row.
    pub head: Column,
    /// Decay after the row to the end of the group.
    pub tail: Column,
}

/// A unit's rows of one channel, as they are in memory.
#[derive(CubeType)]
pub(crate) struct Fetched<E: Float, G: Float> {
    q: Array<E>,
    k: Array<E>,
    gate: Array<G>,
}

#[cube]
pub(crate) fn nothing_fetched<E: Float, G: Float>() -> Fetched<E, G> {
    Fetched::<E, G> { q: Array::new(GROUP), k: Array::new(GROUP), gate: Array::new(GROUP) }
}

/// Reads a unit's rows of channel `i`. What lies outside is read from elsewhere in the tensor and masked
/// by [`columns_of`]: a use of the values here would wait for them.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(crate) fn fetch_columns<E: Float, G: Float>(
    q: &[E],
    k: &[E],
    gate: &[G],
    out: &mut Fetched<E, G>,
    rows: &ChunkRows,
    head: usize,
    i: usize,
    #[comptime] spec: ChunkSpec,
) {
    let dims = comptime!(spec.dims);
    let first = group_of(spec) * GROUP;
    #[unroll]
    for r in 0..GROUP {
        let row = first + r;
        let valid = row < rows.len && i < dims.key_dim;
        let at = rows.start + row;
        let q_at = row_offset(at, head, dims, dims.heads, dims.key_dim) + i;
        let k_at = row_offset(at, head, dims, dims.kv_heads, dims.key_dim) + i;
        out.q[r] = q[select(valid, q_at, 0usize)];
        out.k[r] = k[select(valid, k_at, 0usize)];
        out.gate[r] = gate[select(valid, k_at, 0usize)];
    }
}

/// What was fetched of channel `i`: zero, and a decay of one, outside; queries times `scale`.
#[cube]
pub(crate) fn columns_of<E: Float, G: Float>(
    fetched: &Fetched<E, G>,
    rows: &ChunkRows,
    i: usize,
    scale: f32,
    #[comptime] spec: ChunkSpec,
) -> Columns {
    let dims = comptime!(spec.dims);
    let first = group_of(spec) * GROUP;
    let mut columns = Columns {
        q: Array::new(GROUP),
        k: Array::new(GROUP),
        decay: Array::new(GROUP),
        head: Array::new(GROUP),
        tail: Array::new(GROUP),
    };
    let (zero, one) = (f32::new(0.0), f32::new(1.0));
    #[unroll]
    for r in 0..GROUP {
        let valid = first + r < rows.len && i < dims.key_dim;
        columns.q[r] = select(valid, f32::cast_from(fetched.q[r]) * scale, zero);
        columns.k[r] = select(valid, f32::cast_from(fetched.k[r]), zero);
        columns.decay[r] = select(valid, f32::cast_from(fetched.gate[r]).exp(), one);
    }
    let mut head = f32::new(1.0);
    let mut tail = f32::new(1.0);
    #[unroll]
    for r in 0..GROUP {
        head *= columns.decay[r];
        columns.head[r] = head;
        columns.tail[GROUP - 1 - r] = tail;
        tail *= columns.decay[GROUP - 1 - r];
    }
    columns
}

/// The group of a unit.
#[cube]
pub(crate) fn group_of(#[comptime] spec: ChunkSpec) -> usize {
    UNIT_POS as usize / spec.slice()
}

/// Whether a group is in the second half of its block at a level beyond the group: queries.
#[cube]
pub(crate) fn is_query(#[comptime] level: usize, #[comptime] spec: ChunkSpec) -> bool {
    group_of(spec) / comptime!((1usize << level) / GROUP) % 2 == 1
}

/// Decays between a group and what lies beyond it.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Beyond {
    /// From the boundary of level 4, or to it. (That of level 3 is the edge of the group.)
    pub level4: f32,
    /// Of level 5.
    pub level5: f32,
    /// From the start of the chunk.
    pub before: f32,
    /// To the end of the chunk.
    pub after: f32,
}

/// `totals`: the decay of each group, `[8, slice]`.
#[cube]
pub(crate) fn load_beyond(totals: &[f32], #[comptime] spec: ChunkSpec) -> Beyond {
    let group = group_of(spec);
    let one = f32::new(1.0);
    let own = of_half(totals, group / 4, spec);
    let other = of_half(totals, 1 - group / 4, spec);
    let place = group % 4;
    let before = select(place > 0, own[0], one)
        * select(place > 1, own[1], one)
        * select(place > 2, own[2], one);
    let after = select(place < 1, own[1], one)
        * select(place < 2, own[2], one)
        * select(place < 3, own[3], one);
    let others = (other[0] * other[1]) * (other[2] * other[3]);
    let neighbour = totals[beside(spec)];
    let second = group >= 4;
    Beyond {
        level4: select(group / 2 % 2 == group % 2, neighbour, one),
        level5: select(second, before, after),
        before: select(second, others * before, before),
        after: select(second, after, others * after),
    }
}

/// Where the other group of the same 16 rows has its value of `[8, slice]`.
#[cube]
fn beside(#[comptime] spec: ChunkSpec) -> usize {
    (group_of(spec) ^ 1) * spec.slice() + UNIT_POS as usize % spec.slice()
}

/// The values of the first or second four groups, of `[8, slice]`.
#[cube]
fn of_half(values: &[f32], half: usize, #[comptime] spec: ChunkSpec) -> Array<f32> {
    let channel = UNIT_POS as usize % spec.slice();
    let mut four = Array::<f32>::new(4usize);
    #[unroll]
    for n in 0..4usize {
        four[n] = values[(4 * half + n) * spec.slice() + channel];
    }
    four
}

/// What the other groups add to every row of this one, of their sums `[8, slice]` of a level or of
/// the state's shares: in the same half those after it (queries), or those before it (keys).
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Around {
    /// Of the four groups of the half.
    pub later: f32,
    pub earlier: f32,
    /// Of the whole chunk.
    pub all_later: f32,
    pub all_earlier: f32,
}

#[cube]
pub(crate) fn load_around(sums: &[f32], #[comptime] spec: ChunkSpec) -> Around {
    let group = group_of(spec);
    let zero = f32::new(0.0);
    let own = of_half(sums, group / 4, spec);
    let other = of_half(sums, 1 - group / 4, spec);
    let place = group % 4;
    let earlier = select(place > 0, own[0], zero)
        + select(place > 1, own[1], zero)
        + select(place > 2, own[2], zero);
    let later = select(place < 1, own[1], zero)
        + select(place < 2, own[2], zero)
        + select(place < 3, own[3], zero);
    let others = (other[0] + other[1]) + (other[2] + other[3]);
    let second = group >= 4;
    Around {
        later,
        earlier,
        all_later: select(second, later, later + others),
        all_earlier: select(second, earlier + others, earlier),
    }
}

/// The other group of the half at level 4.
#[cube]
pub(crate) fn neighbour_adds(sums: &[f32], #[comptime] spec: ChunkSpec) -> f32 {
    let group = group_of(spec);
    let sum = sums[beside(spec)];
    select(group / 2 % 2 != group % 2, sum, f32::new(0.0))
}

/// A level inside a group: writes the second halves' rows of `q` with the decay from the boundary,
/// and the first halves' rows of `k` with the decay to it.
#[cube]
pub(crate) fn write_inner<E: Float>(
    x: &Columns,
    out: &mut [E],
    at: usize,
    #[comptime] level: usize,
    #[comptime] spec: ChunkSpec,
) {
    let half = comptime!(1usize << level);
    #[unroll]
    for block in 0..comptime!(GROUP >> (level + 1)) {
        let mut w = f32::new(1.0);
        #[unroll]
        for step in 0..half {
            let r = block * (2 * half) + (half - 1 - step);
            out[at + r * spec.stride()] = E::cast_from(x.k[r] * w);
            w *= x.decay[r];
        }
        let mut w = f32::new(1.0);
        #[unroll]
        for step in 0..half {
            let r = block * (2 * half) + half + step;
            w *= x.decay[r];
            out[at + r * spec.stride()] = E::cast_from(x.q[r] * w);
        }
    }
}

/// A level beyond the group: all rows are queries, or all are keys.
#[cube]
pub(crate) fn write_outer<E: Float>(
    x: &Columns,
    beyond: f32,
    out: &mut [E],
    at: usize,
    #[comptime] level: usize,
    #[comptime] spec: ChunkSpec,
) {
    if is_query(level, spec) {
        #[unroll]
        for r in 0..GROUP {
            out[at + r * spec.stride()] = E::cast_from(x.q[r] * x.head[r] * beyond);
        }
    } else {
        #[unroll]
        for r in 0..GROUP {
            out[at + r * spec.stride()] = E::cast_from(x.k[r] * x.tail[r] * beyond);
        }
    }
}

/// Shares of a unit's rows in the gradients.
#[derive(CubeType)]
pub(crate) struct Grads {
    pub q: Column,
    pub k: Column,
    pub gate: Column,
}

/// The shares of a level inside a group, see the module; what is sent is times `scale`.
#[cube]
pub(crate) fn read_inner<E: Float>(
    x: &Columns,
    sent: &[E],
    at: usize,
    scale: f32,
    grads: &mut Grads,
    #[comptime] level: usize,
    #[comptime] spec: ChunkSpec,
) {
    let half = comptime!(1usize << level);
    #[unroll]
    for block in 0..comptime!(GROUP >> (level + 1)) {
        let first = block * (2 * half);
        let mut u = Array::<f32>::new(comptime!(2 * half));
        let mut w = scale;
        #[unroll]
        for step in 0..half {
            let n = half - 1 - step;
            let share = w * f32::cast_from(sent[at + (first + n) * spec.stride()]);
            w *= x.decay[first + n];
            grads.k[first + n] += share;
            u[n] = share * x.k[first + n];
        }
        let mut w = scale;
        #[unroll]
        for step in 0..half {
            let n = half + step;
            w *= x.decay[first + n];
            let share = w * f32::cast_from(sent[at + (first + n) * spec.stride()]);
            grads.q[first + n] += share;
            u[n] = share * x.q[first + n];
        }
        let mut from_start = f32::new(0.0);
        let mut to_end = f32::new(0.0);
        #[unroll]
        for step in 0..half {
            grads.gate[first + step] += from_start;
            from_start += u[step];
            let n = 2 * half - 1 - step;
            to_end += u[n];
            grads.gate[first + n] += to_end;
        }
    }
}

/// What the rows of a group are sent from beyond it, with the decay up to the group: by the outer
/// levels, and through the state.
#[derive(CubeType)]
pub(crate) struct Sent {
    pub q: Column,
    pub k: Column,
}

/// Adds what an outer level sends; returns the group's sum of the level's terms of `dg`, which the
/// other groups of the same half add.
#[cube]
pub(crate) fn read_outer<E: Float>(
    x: &Columns,
    beyond: f32,
    tile: &[E],
    at: usize,
    sent: &mut Sent,
    #[comptime] level: usize,
    #[comptime] spec: ChunkSpec,
) -> f32 {
    let mut sum = f32::new(0.0);
    if is_query(level, spec) {
        #[unroll]
        for r in 0..GROUP {
            let share = beyond * f32::cast_from(tile[at + r * spec.stride()]);
            sent.q[r] += share;
            sum += x.q[r] * x.head[r] * share;
        }
    } else {
        #[unroll]
        for r in 0..GROUP {
            let share = beyond * f32::cast_from(tile[at + r * spec.stride()]);
            sent.k[r] += share;
            sum += x.k[r] * x.tail[r] * share;
        }
    }
    sum
}

/// The gradients of what was sent, and the running sums of their terms of `dg` within the group.
#[cube]
pub(crate) fn add_sent(x: &Columns, sent: &Sent, grads: &mut Grads) {
    let mut to_end = f32::new(0.0);
    let mut from_start = f32::new(0.0);
    #[unroll]
    for step in 0..GROUP {
        let r = GROUP - 1 - step;
        let share = x.head[r] * sent.q[r];
        grads.q[r] += share;
        to_end += x.q[r] * share;
        grads.gate[r] += to_end;

        let share = x.tail[step] * sent.k[step];
        grads.k[step] += share;
        grads.gate[step] += from_start;
        from_start += x.k[step] * share;
    }
}
