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

/// Where lines (sequences, or segments of them) and chunks lie. Of sequences of one length by arithmetic, so
/// that a call uploads nothing; of packed ones from a table, see `definition::Place`.
#[derive(CubeType, CubeLaunch)]
pub struct ChunkMap {
    /// See `definition::Place::Table`.
    table: Box<[u32]>,
    sequences: usize,
    lines: usize,
    /// Of each sequence: rows, chunks, lines; chunks of a line.
    time: usize,
    chunks: usize,
    segments: usize,
    segment: usize,
    /// Rows of a chunk.
    #[cube(comptime)]
    rows: usize,
    #[cube(comptime)]
    packed: bool,
}

/// A line's chunks, and the rows that they cover.
#[derive(CubeType)]
pub struct Line {
    /// First chunk.
    pub first: usize,
    /// Chunks.
    pub count: usize,
    start: usize,
    end: usize,
    #[cube(comptime)]
    rows: usize,
}

#[cube]
impl ChunkMap {
    /// The rows of a chunk.
    pub fn rows_of(&self, chunk: usize) -> ChunkRows {
        let rows = comptime!(self.rows);
        if comptime!(self.packed) {
            let at = self.sequences + 1 + 4 * self.lines + 2 * chunk;
            ChunkRows { start: self.table[at] as usize, len: self.table[at + 1] as usize }
        } else {
            let sequence = chunk / self.chunks;
            let within = (chunk - sequence * self.chunks) * rows;
            chunk_at(sequence * self.time + within, self.time - within, rows)
        }
    }

    /// A line.
    pub fn line(&self, line: usize) -> Line {
        let rows = comptime!(self.rows);
        if comptime!(self.packed) {
            let at = self.sequences + 1 + 4 * line;
            Line {
                first: self.table[at] as usize,
                count: self.table[at + 1] as usize,
                start: self.table[at + 2] as usize,
                end: self.table[at + 3] as usize,
                rows,
            }
        } else {
            let sequence = line / self.segments;
            let skipped = (line - sequence * self.segments) * self.segment;
            let left = self.chunks - skipped;
            Line {
                first: sequence * self.chunks + skipped,
                count: select(left < self.segment, left, self.segment),
                start: sequence * self.time + skipped * rows,
                end: (sequence + 1) * self.time,
                rows,
            }
        }
    }

    /// First line of a sequence, and how many it has.
    pub fn lines_of(&self, sequence: usize) -> (usize, usize) {
        if comptime!(self.packed) {
            let first = self.table[sequence] as usize;
            (first, self.table[sequence + 1] as usize - first)
        } else {
            (sequence * self.segments, self.segments)
        }
    }
}

#[cube]
impl Line {
    /// The rows of one of its chunks.
    pub fn rows_of(&self, chunk: usize) -> ChunkRows {
        let start = self.start + (chunk - self.first) * comptime!(self.rows);
        chunk_at(start, self.end - start, comptime!(self.rows))
    }
}

/// The chunk of `rows` from `start` on, of a sequence that has so many `left` there.
#[cube]
fn chunk_at(start: usize, left: usize, #[comptime] rows: usize) -> ChunkRows {
    ChunkRows { start, len: select(left < rows, left, rows.runtime()) }
}

/// The chunk of a step along `count` chunks from `first`. The direction is known to the compiler or told when
/// the kernel runs.
#[cube]
pub fn step_chunk(first: usize, count: usize, step: usize, reversed: bool) -> usize {
    select(reversed, first + count - 1 - step, first + step)
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
