//! The decay factor of one step, whatever the gate depends on.

use cubecl::prelude::*;

use crate::{Dims, GateKind};

/// `exp(g)` of `row`, `head` and key channel `channel`.
///
/// The kernels multiply these factors along a tile instead of subtracting cumulative sums: products
/// of numbers <= 1 neither overflow nor cancel, so a gate of -1e4 does not blur the small gates
/// that follow it.
#[cube]
pub fn decay<G: Float>(
    gate: &[G],
    row: usize,
    head: usize,
    channel: usize,
    #[comptime] dims: Dims,
) -> f32 {
    let group = comptime!(dims.heads / dims.kv_heads);
    if comptime!(dims.gate == GateKind::Vector) {
        let at = (row * dims.kv_heads + head / group) * dims.key_dim + channel;
        f32::cast_from(gate[at]).exp()
    } else if comptime!(dims.gate == GateKind::Scalar) {
        f32::cast_from(gate[row * dims.kv_heads + head / group]).exp()
    } else if comptime!(dims.gate == GateKind::Fixed) {
        f32::cast_from(gate[head]).exp()
    } else {
        f32::new(1.0)
    }
}

/// [`decay`], or one where there is no such row or channel.
#[cube]
pub fn decay_or_one<G: Float>(
    gate: &[G],
    row: usize,
    head: usize,
    channel: usize,
    valid: bool,
    #[comptime] dims: Dims,
) -> f32 {
    let row = select(valid, row, 0usize);
    let channel = select(valid, channel, 0usize);
    select(valid, decay::<G>(gate, row, head, channel, dims), f32::new(1.0))
}

/// Product of the decays of the sub-chunks, or other groups of rows, `from..to` for channel `c`
/// (`totals[block * width + c]`).
#[cube]
pub fn decay_between(
    totals: &[f32],
    from: usize,
    to: usize,
    c: usize,
    #[comptime] width: usize,
) -> f32 {
    let mut w = f32::new(1.0);
    for block in from..to {
        w *= totals[block * width + c];
    }
    w
}
