//! Where rows, heads and chunks lie in memory.

use cubecl::prelude::*;

use crate::Dims;

/// Rows of one chunk.
#[derive(CubeType, Clone, Copy)]
pub struct ChunkRows {
    /// First row among all rows.
    pub start: usize,
    /// Rows that exist; fewer than a chunk at the end of a sequence.
    pub len: usize,
}

/// Looks a chunk up in the table of [`Sequences::chunk_table`](crate::Sequences::chunk_table).
#[cube]
pub fn chunk_rows(table: &[u32], num_sequences: usize, chunk: usize) -> ChunkRows {
    let at = 2 * (num_sequences + chunk);
    ChunkRows { start: table[at] as usize, len: table[at + 1] as usize }
}

/// The chunk of a step along `count` chunks from `first`.
#[cube]
pub fn step_chunk(first: usize, count: usize, step: usize, #[comptime] reversed: bool) -> usize {
    if reversed { first + count - 1 - step } else { first + step }
}

/// Offset of `[row, head, 0]` in a tensor `[rows, own_heads, width]`; query head `head` reads head
/// `head / (heads / own_heads)`.
#[cube]
pub fn row_offset(
    row: usize,
    head: usize,
    #[comptime] dims: Dims,
    #[comptime] own_heads: usize,
    #[comptime] width: usize,
) -> usize {
    let group = comptime!(dims.heads / own_heads);
    (row * own_heads + head / group) * width
}
