//! The tile contraction of the split plan, in registers.

use cubecl::prelude::*;

use crate::SUB;

/// `acc[r] += sum_d a[a_at + 16 d + r] * b[b_at + b_stride d]` for the 16 rows of the unit's tile.
///
/// * `a`: shared memory, `[depth, 16]`: the 16 rows of the tile are contiguous.
/// * `b`: shared memory, `[depth, b_stride]`: the unit reads its own column.
#[cube]
#[allow(clippy::too_many_arguments)]
pub fn contract(
    acc: &mut Array<f32>,
    a: &[f32],
    a_at: usize,
    b: &[f32],
    b_at: usize,
    #[comptime] b_stride: usize,
    #[comptime] depth: usize,
) {
    for d in 0..depth {
        let x = b[b_at + d * b_stride];
        #[unroll]
        for r in 0..SUB {
            acc[r] += a[a_at + d * SUB + r] * x;
        }
    }
}

/// 16 accumulators at zero.
#[cube]
pub fn zero_rows() -> Array<f32> {
    let mut acc = Array::<f32>::new(SUB);
    #[unroll]
    for r in 0..SUB {
        acc[r] = 0.0;
    }
    acc
}
