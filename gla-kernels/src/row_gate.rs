//! Kernel `row_gate`: the gradient of a gate that decays all channels of a row alike.
//!
//! Of the four sorts of pairs that straddle a row `t`, the `scores` of either plan have left those inside the chunk.
//! Here come those with one end outside, `sum_{r >= t} q_r . dq_r^state` and `sum_{s < t} k_s . dk_s^state`,
//! whose terms are `dots`, and those with both, the products of state and state gradient.

use cubecl::prelude::*;

use crate::components::ChunkMap;

/// How what the kernels before have left is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RowGateSpec {
    /// Shares of the rows' products, one after the other.
    pub dot_shares: usize,
    /// Shares of the products of the states, and how many numbers each has of a chunk and head.
    pub product_shares: usize,
    pub products: usize,
    /// From chunk and head to the next in the decays, and where there that of the whole chunk is.
    pub decay_stride: usize,
    pub decay_at: usize,
}

/// * `dots_q`, `dots_k`: `[dot_shares, rows, H]`; `products`: `[product_shares, chunks, H, products]`
/// * `decays`: `[chunks, H, decay_stride]`
/// * `dg`: in and out, `[rows, H]`
/// * `chunk_len`: a power of two, and the units of a cube
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
    #[comptime] chunk_len: usize,
    #[comptime] spec: RowGateSpec,
) {
    let levels = comptime!(chunk_len.ilog2() as usize);
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

    let mut tile = Shared::<[f32]>::new_slice(comptime!(2 * 3 * chunk_len));
    let mut sum_q = f32::new(0.0);
    let mut sum_k = f32::new(0.0);
    for share in 0..comptime!(spec.dot_shares) {
        sum_q += dots_q[share * num_rows * heads + at];
        sum_k += dots_k[share * num_rows * heads + at];
    }
    sum_q = select(valid, sum_q, f32::new(0.0));
    sum_k = select(valid, sum_k, f32::new(0.0));
    let mut sum = f32::new(0.0);
    let each = comptime!(spec.products);
    for n in range_stepped(t, comptime!(spec.product_shares * each), chunk_len) {
        let line = ((n / each) * num_chunks + chunk) * heads + head;
        sum += products[line * each + n % each];
    }

    // of blocks of 1, 2, 4, .. rows: those from this one on, those before it, and of all
    let mut from_here = sum_q;
    let mut before = f32::new(0.0);
    #[unroll]
    for level in 0..levels {
        let half = comptime!(level % 2 * 3 * chunk_len);
        tile[half + t] = sum_q;
        tile[half + chunk_len + t] = sum_k;
        tile[half + 2 * chunk_len + t] = sum;
        sync_cube();
        let beside = half + (t ^ comptime!(1usize << level));
        let second = (t >> level) % 2 == 1;
        let (of_q, of_k) = (tile[beside], tile[beside + chunk_len]);
        from_here += select(second, f32::new(0.0), of_q);
        before += select(second, of_k, f32::new(0.0));
        sum_q += of_q;
        sum_k += of_k;
        sum += tile[beside + 2 * chunk_len];
    }
    if valid {
        let at_decay = (chunk * heads + head) * comptime!(spec.decay_stride) + spec.decay_at;
        let across = sum * decays[at_decay];
        dg[at] += across + from_here + before;
    }
}
