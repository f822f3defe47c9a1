//! What a cube owns of a chunk, and what a unit of it.

use cubecl::prelude::*;

use super::StageSpec;
use crate::components::{ChunkMap, ChunkRows, decay_or_one, read_or_zero, row_offset};
use crate::{Dims, SUB};

/// All rows of one chunk and some columns of one head.
#[derive(CubeType)]
pub(crate) struct Part {
    /// The chunk.
    pub chunk: usize,
    /// Its rows.
    pub rows: ChunkRows,
    /// The head.
    pub head: usize,
    /// First column.
    pub col0: usize,
}

#[cube]
impl Part {
    /// Of a task, where heads of `width` columns are cut into tiles.
    pub fn of(
        map: &ChunkMap,
        task: usize,
        #[comptime] width: usize,
        #[comptime] spec: StageSpec,
    ) -> Part {
        let cols = comptime!(spec.blueprint.cols);
        let tiles = comptime!(width.div_ceil(cols));
        let heads = comptime!(spec.dims.heads);
        let chunk = task / comptime!(tiles * heads);
        let rows = map.rows_of(chunk);
        Part { chunk, rows, head: (task / tiles) % heads, col0: (task % tiles) * cols }
    }
}

/// 16 rows, a sub-chunk, of one key channel.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Column {
    /// First row of the chunk.
    start: usize,
    /// Of its rows the first of these, and how many it has.
    first: usize,
    len: usize,
    head: usize,
    channel: usize,
    #[cube(comptime)]
    dims: Dims,
}

#[cube]
impl Column {
    /// Of sub-chunk `block` and column `col` of a part.
    pub fn of(part: &Part, block: usize, col: usize, #[comptime] dims: Dims) -> Column {
        Column {
            start: part.rows.start,
            first: block * SUB,
            len: part.rows.len,
            head: part.head,
            channel: part.col0 + col,
            dims,
        }
    }

    /// Whether there is row `r` of it.
    pub fn has(&self, r: usize) -> bool {
        self.first + r < self.len && self.channel < comptime!(self.dims.key_dim)
    }

    /// Where row `r` lies in a tensor `[rows, own_heads, K]`.
    pub fn at(&self, r: usize, #[comptime] own_heads: usize) -> usize {
        let row = self.start + self.first + r;
        row_offset(row, self.head, self.dims, own_heads, self.dims.key_dim) + self.channel
    }

    /// The rows of a tensor `[rows, own_heads, K]`, or zeros.
    pub fn read<E: Float>(&self, x: &[E], #[comptime] own_heads: usize) -> Array<f32> {
        let mut own = Array::<f32>::new(SUB);
        #[unroll]
        for r in 0..SUB {
            own[r] = read_or_zero::<E>(x, self.at(r, own_heads), self.has(r));
        }
        own
    }

    /// Their decays, or ones.
    pub fn decays<G: Float>(&self, gate: &[G]) -> Array<f32> {
        let mut own = Array::<f32>::new(SUB);
        #[unroll]
        for r in 0..SUB {
            let (row, valid) = (self.start + self.first + r, self.has(r));
            own[r] = decay_or_one::<G>(gate, row, self.head, self.channel, valid, self.dims);
        }
        own
    }
}

/// Multiplies 16 rows by the decay between the row and an edge of their sub-chunk, and returns that of the sub-chunk:
/// for queries the start (own gate included), for keys the end (own gate excluded).
#[cube]
pub(crate) fn scale_to_edge(
    x: &mut Array<f32>,
    decays: &Array<f32>,
    #[comptime] is_key: bool,
) -> f32 {
    let mut w = f32::new(1.0);
    #[unroll]
    for walk in 0..SUB {
        let r = comptime!(if is_key { SUB - 1 - walk } else { walk });
        if is_key {
            x[r] *= w;
            w *= decays[r];
        } else {
            w *= decays[r];
            x[r] *= w;
        }
    }
    w
}
