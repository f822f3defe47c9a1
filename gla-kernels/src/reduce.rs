//! Stage `reduce`: sums and casts of gradients.
//!
//! The stages before it work per query head, and some in parts. Here the heads of a group and the parts
//! are added up in f32, the rows too if the gate is fixed, and the sum takes the type of the input.

use cubecl::prelude::*;

/// What is added up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Sum {
    /// Whole tensors after each other.
    pub parts: usize,
    /// Neighbouring heads.
    pub group: usize,
    /// Channels.
    pub width: usize,
}

/// Units of a cube.
pub(crate) const UNITS: usize = 128;

/// Vectors of `out` that a unit sums: so many loads are on their way at a time.
pub(crate) const EACH: usize = 4;

/// `out[row, hk, i] = sum over parts and the group's heads` of `x [parts, rows, heads, width]`;
/// `out`: `[rows, heads / group, width]`, in vectors.
#[cube(launch_unchecked)]
pub(crate) fn gla_reduce_heads_kernel<I: Float, O: Float, N: Size>(
    x: &[Vector<I, N>],
    out: &mut [Vector<O, N>],
    vectors: usize,
    #[comptime] over: Sum,
    #[define(I, O)] _dtypes: [ElemType; 2],
) {
    let first = CUBE_POS * comptime!(UNITS * EACH) + UNIT_POS as usize;
    if first >= vectors {
        terminate!();
    }
    let size = N::value();
    let across = comptime!(over.width / size);
    let part_len = vectors * over.group;
    let mut sums = Array::<Vector<f32, N>>::new(EACH);
    let mut starts = Array::<usize>::new(EACH);
    #[unroll]
    for n in 0..EACH {
        let at = first + n * UNITS;
        let own = select(at < vectors, at, first);
        let (heads, c) = (own / across, own % across);
        starts[n] = heads * comptime!(over.group * across) + c;
        sums[n] = Vector::new(f32::new(0.0));
    }
    for part in 0..over.parts {
        for member in 0..over.group {
            let from = part * part_len + member * across;
            #[unroll]
            for n in 0..EACH {
                sums[n] += Vector::cast_from(x[starts[n] + from]);
            }
        }
    }
    #[unroll]
    for n in 0..EACH {
        let at = first + n * UNITS;
        if at < vectors {
            out[at] = Vector::cast_from(sums[n]);
        }
    }
}

/// Rows that a cube of [`gla_reduce_rows_kernel`] adds up at most, where it is not the last.
pub(crate) const ROWS: usize = 8 * UNITS;

/// `out[piece, h] = sum over the piece's rows of x [rows, heads]`. One cube a piece of `piece` rows and a
/// head, which are `tasks`.
#[cube(launch_unchecked)]
pub(crate) fn gla_reduce_rows_kernel<O: Float>(
    x: &[f32],
    out: &mut [O],
    rows: usize,
    piece: usize,
    tasks: usize,
    #[comptime] heads: usize,
    #[define(O)] _dtype: ElemType,
) {
    let task = CUBE_POS;
    if task >= tasks {
        terminate!();
    }
    let (first, head) = (task / heads * piece, task % heads);
    let end = select(first + piece < rows, first + piece, rows);
    let unit = UNIT_POS as usize;
    let mut partial = Shared::<[f32]>::new_slice(UNITS);
    let mut sum = f32::new(0.0);
    for row in range_stepped(first + unit, end, UNITS) {
        sum += x[row * heads + head];
    }
    partial[unit] = sum;
    let mut left = comptime!(UNITS / 2).runtime();
    while left > 0 {
        sync_cube();
        if unit < left {
            sum += partial[unit + left];
            partial[unit] = sum;
        }
        left /= 2;
    }
    if unit == 0 {
        out[task] = O::cast_from(sum);
    }
}
