//! Kernel `row_gate`: the gradient of a gate that decays all channels of a row alike.
//!
//! Of the four sorts of pairs that straddle a row `t`, `scores` has left those inside the chunk. Here
//! come those with one end outside, `sum_{r >= t} q_r . dq_r^state` and `sum_{s < t} k_s . dk_s^state`,
//! whose terms are the `dots` of the walks, and those with both, the products of state and state
//! gradient.

use cubecl::prelude::*;

use super::walk_spec::{ROWS_LEN, TOTAL};
use super::{CHUNK, LEVELS};
use crate::components::ChunkMap;

/// Units of a cube.
pub const UNITS: usize = CHUNK;

/// * `dots_q`, `dots_k`: `[dot_shares, rows, H]`; `products`: `[product_shares, chunks, H, padded]`
/// * `decays`: `[chunks, H, ROWS_LEN]`
/// * `dg`: in and out, `[rows, H]`
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(crate) fn gla_row_gate_kernel(
    dots_q: &[f32],
    dots_k: &[f32],
    products: &[f32],
    decays: &[f32],
    dg: &mut [f32],
    map: ChunkMap,
    num_rows: usize,
    num_chunks: usize,
    tasks: usize,
    #[comptime] heads: usize,
    #[comptime] padded: usize,
    #[comptime] dot_shares: usize,
    #[comptime] product_shares: usize,
) {
    let task = CUBE_POS;
    if task >= tasks {
        terminate!();
    }
    let head = task % heads;
    let chunk = task / heads;
    let rows = map.rows_of(chunk);
    let t = UNIT_POS as usize;
    let valid = t < rows.len;
    let at = select(valid, (rows.start + t) * heads + head, 0usize);

    let mut tile = Shared::<[f32]>::new_slice(comptime!(2 * 3 * CHUNK));
    let mut sum_q = f32::new(0.0);
    let mut sum_k = f32::new(0.0);
    for share in 0..dot_shares {
        sum_q += dots_q[share * num_rows * heads + at];
        sum_k += dots_k[share * num_rows * heads + at];
    }
    sum_q = select(valid, sum_q, f32::new(0.0));
    sum_k = select(valid, sum_k, f32::new(0.0));
    let mut sum = f32::new(0.0);
    for n in range_stepped(t, comptime!(product_shares * padded), UNITS) {
        let line = ((n / padded) * num_chunks + chunk) * heads + head;
        sum += products[line * padded + n % padded];
    }

    // of blocks of 1, 2, 4, .. rows: those from this one on, those before it, and of all
    let mut from_here = sum_q;
    let mut before = f32::new(0.0);
    #[unroll]
    for level in 0..LEVELS {
        let half = comptime!(level % 2 * 3 * CHUNK);
        tile[half + t] = sum_q;
        tile[half + CHUNK + t] = sum_k;
        tile[half + 2 * CHUNK + t] = sum;
        sync_cube();
        let beside = half + (t ^ comptime!(1usize << level));
        let second = (t >> level) % 2 == 1;
        let (of_q, of_k) = (tile[beside], tile[beside + CHUNK]);
        from_here += select(second, f32::new(0.0), of_q);
        before += select(second, of_k, f32::new(0.0));
        sum_q += of_q;
        sum_k += of_k;
        sum += tile[beside + 2 * CHUNK];
    }
    if valid {
        let across = sum * decays[(chunk * heads + head) * ROWS_LEN + TOTAL];
        dg[at] += across + from_here + before;
    }
}
