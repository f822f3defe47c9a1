//! Kernel `row_gate`: the gradient of a gate that decays all channels of a row alike.
//!
//! Of the four sorts of pairs that straddle a row `t`, `scores` has left those inside the chunk. Here
//! come those with one end outside, `sum_{r >= t} q_r . dq_r^state` and `sum_{s < t} k_s . dk_s^state`,
//! whose terms are the `dots` of the walks, and those with both, the products of state and state
//! gradient.

use cubecl::prelude::*;

use super::CHUNK;
use super::walk_spec::{ROWS_LEN, TOTAL};
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

    let mut from_q = Shared::<[f32]>::new_slice(CHUNK);
    let mut from_k = Shared::<[f32]>::new_slice(CHUNK);
    let mut across = Shared::<[f32]>::new_slice(UNITS);
    let mut sum_q = f32::new(0.0);
    let mut sum_k = f32::new(0.0);
    for share in 0..dot_shares {
        sum_q += dots_q[share * num_rows * heads + at];
        sum_k += dots_k[share * num_rows * heads + at];
    }
    from_q[t] = select(valid, sum_q, f32::new(0.0));
    from_k[t] = select(valid, sum_k, f32::new(0.0));
    let mut sum = f32::new(0.0);
    for n in range_stepped(t, comptime!(product_shares * padded), UNITS) {
        let line = ((n / padded) * num_chunks + chunk) * heads + head;
        sum += products[line * padded + n % padded];
    }
    across[t] = sum;
    sync_cube();

    if valid {
        let mut own = f32::new(0.0);
        for unit in 0..UNITS {
            own += across[unit];
        }
        own *= decays[(chunk * heads + head) * ROWS_LEN + TOTAL];
        for row in t..CHUNK {
            own += from_q[row];
        }
        for row in 0..t {
            own += from_k[row];
        }
        dg[at] += own;
    }
}
