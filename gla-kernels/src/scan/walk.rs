//! Kernel `walk`: carries a state along the chunks of a sequence and reads outputs off it.
//!
//! ```text
//! out_chunk = left state (+ intra right)          state <- decay state + update^T right
//! ```
//!
//! with `left`, `update` `[64, depth]` and `right` `[64, columns]` of the chunk. The forward and the
//! backward of the recurrence are four such walks:
//!
//! | out | chunks | left | update | right | state | intra |
//! |---|---|---|---|---|---|---|
//! | `o` | first to last | `qt` | `kt` | `v` | `S [K, V]` | `A` |
//! | `dv` | last to first | `kt` | `qt` | `do` | `D [K, V]` | `A^T` |
//! | `dq` | first to last | `do` | `v` | `kt` | `S^T [V, K]` | |
//! | `dk` | last to first | `v` | `do` | `qt` | `D^T [V, K]` | |
//!
//! `S` is the state before the chunk, `D` the gradient of the state after it. The `dk` walk leaves
//! `D` for the `dq` walk, which forms the products `sum_j S[i, j] D[i, j]` that `dg` needs.
//!
//! A cube owns 16 columns a plane, all of the depth, and keeps its part of the state, transposed, in
//! the accumulators of `update^T right`: a lane's pairs of them are at the same time the right
//! operand of `left state`, so the state never leaves the registers. Chunks are read one ahead.

use cubecl::prelude::*;

use super::{CHUNK, load_left};
use crate::components::{
    ChunkRows, Pair, chunk_rows, left_of_transposed, load_quad, multiply, right_of_transposed,
    zero_tiles,
};

/// Which side of the state the key channels, and with them the decay, lie on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KeyAxis {
    /// The depth: `o` and `dv`.
    Depth,
    /// The columns: `dq` and `dk`.
    Columns,
}

/// The intra-chunk matrix in the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Intra {
    /// Not at all.
    None,
    /// `A`, lower triangular.
    Lower,
    /// `A^T`.
    Upper,
}

/// What a walk does with the state gradients that `dg` needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Trace {
    /// Nothing.
    None,
    /// Writes its state before each chunk.
    Write,
    /// Reads what was written and sums its products with the own state.
    Read,
}

/// What a walk is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WalkSpec {
    /// Query heads `H`.
    pub heads: usize,
    /// Heads of `left`.
    pub left_heads: usize,
    /// Heads of `update`.
    pub update_heads: usize,
    /// Heads of `right`.
    pub right_heads: usize,
    /// Width of `left` and `update`.
    pub depth_width: usize,
    /// Width of `right` and `out`.
    pub width: usize,
    /// Depth of the part of the state that a cube owns, a multiple of 16.
    pub depth: usize,
    /// Such parts; each writes its own share of the output.
    pub parts: usize,
    /// Planes of a cube, 16 columns each.
    pub planes: usize,
    /// Key channels `K` and value channels `V` of the state `[N, H, K, V]`.
    pub state: (usize, usize),
    /// Width of the decays.
    pub padded: usize,
    /// Where the key channels are.
    pub keys: KeyAxis,
    /// Last chunk first.
    pub reversed: bool,
    /// The intra-chunk matrix.
    pub intra: Intra,
    /// For `dg`.
    pub trace: Trace,
    /// Whether there are outputs; if not, the walk is after the final state alone.
    pub emits: bool,
    /// Whether the state starts from a buffer, or at zero.
    pub has_start: bool,
    /// Whether a chunk is read while the one before is worked on.
    pub ahead: bool,
}

impl WalkSpec {
    /// Columns of a cube.
    pub const fn columns(&self) -> usize {
        16 * self.planes
    }

    /// Units of a cube.
    pub const fn units(&self) -> usize {
        32 * self.planes
    }

    /// Column tiles.
    pub const fn tiles(&self) -> usize {
        self.width.div_ceil(self.columns())
    }

    const fn stage(&self, own_heads: usize, width: usize, cols: usize) -> Stage {
        Stage { own_heads, group: self.heads / own_heads, width, cols, units: self.units() }
    }

    /// Bytes of shared memory for elements of `size` bytes.
    pub fn shared_memory(&self, size: usize) -> usize {
        let left = if self.emits { CHUNK * (self.depth + 8) } else { 8 };
        let update = CHUNK * (self.depth + 8);
        let right = CHUNK * (self.columns() + 8);
        let pairs = if matches!(self.intra, Intra::None) { 8 } else { CHUNK * (CHUNK + 8) };
        size * (left + update + right + pairs) + 4 * self.depth.max(self.columns())
    }
}

/// A tile `[64, cols]` of a tensor `[rows, own_heads, width]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Stage {
    own_heads: usize,
    group: usize,
    width: usize,
    cols: usize,
    units: usize,
}

/// * `left`, `update`: `[rows, heads of each, depth_width]`; `right`: `[rows, its heads, width]`
/// * `decays`: `[chunks, H, padded]`; `pairs`: `[rows, H, 64]`
/// * `start`, `end`: `[N, H, K, V]`
/// * `out`: `[parts, rows, H, width]`
/// * `trace`: scratch `[chunks, H, tiles, parts, depth / 4, units]`
/// * `products`: out of `Trace::Read`, `[parts, chunks, H, padded]`
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(crate) fn gla_walk_kernel<E: Float, O: Float, D: Size, C: Size>(
    left: &[Vector<E, D>],
    update: &[Vector<E, D>],
    right: &[Vector<E, C>],
    decays: &[f32],
    pairs: &[Vector<E, Const<8>>],
    start: &[f32],
    end: &mut [f32],
    out: &mut [O],
    trace: &mut [Pair<E>],
    products: &mut [f32],
    table: &[u32],
    num_sequences: usize,
    num_rows: usize,
    num_chunks: usize,
    tasks: usize,
    #[comptime] spec: WalkSpec,
    #[define(E, O)] _dtypes: [ElemType; 2],
) {
    let depth = comptime!(spec.depth);
    let columns = comptime!(spec.columns());
    let units = comptime!(spec.units());
    let (key_dim, value_dim) = comptime!(spec.state);
    let keys_deep = comptime!(spec.keys == KeyAxis::Depth);
    let intra = comptime!(spec.intra != Intra::None);
    let depth_stride = comptime!(depth + 8);
    let column_stride = comptime!(columns + 8);
    let pair_stride = comptime!(CHUNK + 8);
    let depth_tiles = comptime!(depth / 8);
    let from_left = comptime!(spec.stage(spec.left_heads, spec.depth_width, depth));
    let from_update = comptime!(spec.stage(spec.update_heads, spec.depth_width, depth));
    let from_right = comptime!(spec.stage(spec.right_heads, spec.width, columns));
    let from_pairs = comptime!(spec.stage(spec.heads, CHUNK, CHUNK));

    let task = CUBE_POS;
    if task >= tasks {
        terminate!();
    }
    let tiles = comptime!(spec.tiles());
    let tile = task % tiles;
    let part = (task / tiles) % spec.parts;
    let head = (task / comptime!(tiles * spec.parts)) % spec.heads;
    let sequence = task / comptime!(tiles * spec.parts * spec.heads);
    let depth0 = part * depth;
    let column0 = tile * columns;

    let unit = UNIT_POS as usize;
    let plane = unit / 32;
    let lane = unit % 32;
    // of this lane's accumulators: the columns they are in, and the depth of the first one
    let own_column = column0 + plane * 16 + lane / 4;
    let own_depth = depth0 + 2 * (lane % 4);

    let mut left_tile = Shared::<[E]>::new_aligned_slice(
        comptime!(if spec.emits { CHUNK * depth_stride } else { 8 }),
        16usize,
    );
    let mut update_tile =
        Shared::<[E]>::new_aligned_slice(comptime!(CHUNK * depth_stride), 16usize);
    let mut right_tile =
        Shared::<[E]>::new_aligned_slice(comptime!(CHUNK * column_stride), 16usize);
    let mut pair_tile = Shared::<[E]>::new_aligned_slice(
        comptime!(if intra { CHUNK * pair_stride } else { 8 }),
        16usize,
    );
    let decay_len = comptime!(if keys_deep { depth } else { columns });
    let mut decay_tile = Shared::<[f32]>::new_slice(decay_len);

    // the state, transposed: accumulator tile n holds depth 8 n .. 8 n + 8
    let mut state = zero_tiles(depth_tiles);
    if comptime!(spec.has_start) {
        #[unroll]
        for n in 0..depth_tiles {
            #[unroll]
            for half in 0..2usize {
                let mut pair = Pair::<f32>::empty();
                #[unroll]
                for e in 0..2usize {
                    let (at, valid) = state_at(own_depth + 8 * n + e, own_column + 8 * half, spec);
                    let base = (sequence * spec.heads + head) * comptime!(key_dim * value_dim);
                    let value = start[select(valid, base + at, 0usize)];
                    pair.insert(e, select(valid, value, f32::new(0.0)));
                }
                state[2 * n + half] = pair;
            }
        }
    }

    let mut next_left = Array::<Vector<E, D>>::new(held::<D>(from_left));
    let mut next_update = Array::<Vector<E, D>>::new(held::<D>(from_update));
    let mut next_right = Array::<Vector<E, C>>::new(held::<C>(from_right));
    let mut next_pairs = Array::<Vector<E, Const<8>>>::new(held::<Const<8>>(from_pairs));

    let first_chunk = table[2 * sequence] as usize;
    let count = table[2 * sequence + 1] as usize;
    for step in 0..count {
        let mut chunk = first_chunk + step;
        if comptime!(spec.reversed) {
            chunk = first_chunk + count - 1 - step;
        }
        let rows = chunk_rows(table, num_sequences, chunk);

        if comptime!(!spec.ahead) || step == 0 {
            if comptime!(spec.emits) {
                fetch::<E, D>(left, &mut next_left, &rows, head, depth0, from_left);
            }
            fetch::<E, D>(update, &mut next_update, &rows, head, depth0, from_update);
            fetch::<E, C>(right, &mut next_right, &rows, head, column0, from_right);
            if intra {
                fetch::<E, Const<8>>(pairs, &mut next_pairs, &rows, head, 0usize, from_pairs);
            }
        }
        sync_cube();
        if comptime!(spec.emits) {
            put::<E, D>(&next_left, &mut left_tile, from_left);
        }
        put::<E, D>(&next_update, &mut update_tile, from_update);
        put::<E, C>(&next_right, &mut right_tile, from_right);
        if intra {
            put::<E, Const<8>>(&next_pairs, &mut pair_tile, from_pairs);
        }
        let decay0 = if comptime!(keys_deep) { depth0 } else { column0 };
        for at in range_stepped(unit, decay_len, units) {
            let i = decay0 + at;
            let from = (chunk * spec.heads + head) * spec.padded;
            let value = decays[from + select(i < spec.padded, i, 0usize)];
            decay_tile[at] = select(i < spec.padded, value, f32::new(1.0));
        }
        sync_cube();
        if comptime!(spec.ahead) && step + 1 < count {
            let mut next = chunk + 1;
            if comptime!(spec.reversed) {
                next = chunk - 1;
            }
            let rows = chunk_rows(table, num_sequences, next);
            if comptime!(spec.emits) {
                fetch::<E, D>(left, &mut next_left, &rows, head, depth0, from_left);
            }
            fetch::<E, D>(update, &mut next_update, &rows, head, depth0, from_update);
            fetch::<E, C>(right, &mut next_right, &rows, head, column0, from_right);
            if intra {
                fetch::<E, Const<8>>(pairs, &mut next_pairs, &rows, head, 0usize, from_pairs);
            }
        }

        // `right` as the left operand of the update and, block by block, the right one of `intra`
        let mut rights = Array::<Pair<E>>::new(16usize);
        #[unroll]
        for s in 0..4usize {
            let quad = load_quad::<E>(&right_tile, s * 16, plane * 16, column_stride, true);
            #[unroll]
            for i in 0..4usize {
                rights[4 * s + i] = quad[i];
            }
        }

        if comptime!(spec.emits) {
            let mut acc = zero_tiles(8usize);
            #[unroll]
            for d in 0..comptime!(depth / 16) {
                #[unroll]
                for half in 0..2usize {
                    let mut operand = Array::<Pair<E>>::new(2usize);
                    operand[0] = Vector::cast_from(state[4 * d + half]);
                    operand[1] = Vector::cast_from(state[4 * d + 2 + half]);
                    #[unroll]
                    for m in 0..4usize {
                        let quad = load_quad::<E>(&left_tile, m * 16, d * 16, depth_stride, false);
                        multiply::<E>(&quad, &operand, &mut acc, 2 * m + half);
                    }
                }
            }
            if intra && part == 0 {
                let upper = comptime!(spec.intra == Intra::Upper);
                #[unroll]
                for m in 0..4usize {
                    #[unroll]
                    for s in 0..4usize {
                        if comptime!(upper) && s >= m || comptime!(!upper) && s <= m {
                            let quad =
                                load_left::<E>(&pair_tile, m * 16, s * 16, pair_stride, upper);
                            #[unroll]
                            for half in 0..2usize {
                                let mut operand = Array::<Pair<E>>::new(2usize);
                                operand[0] = rights[4 * s + 2 * half];
                                operand[1] = rights[4 * s + 2 * half + 1];
                                multiply::<E>(&quad, &operand, &mut acc, 2 * m + half);
                            }
                        }
                    }
                }
            }
            #[unroll]
            for m in 0..4usize {
                #[unroll]
                for n in 0..2usize {
                    #[unroll]
                    for half in 0..2usize {
                        let row = m * 16 + lane / 4 + 8 * half;
                        let column = column0 + plane * 16 + 8 * n + 2 * (lane % 4);
                        let at = ((part * num_rows + rows.start + row) * spec.heads + head)
                            * spec.width
                            + column;
                        let pair = acc[2 * (2 * m + n) + half];
                        #[unroll]
                        for e in 0..2usize {
                            if row < rows.len && column + e < spec.width {
                                out[at + e] = O::cast_from(pair.extract(e));
                            }
                        }
                    }
                }
            }
        }

        if comptime!(spec.trace != Trace::None) {
            let from = (((chunk * spec.heads + head) * tiles + tile) * spec.parts + part)
                * comptime!(depth / 4)
                * units;
            let mut sums = Array::<f32>::new(2usize);
            sums[0] = f32::new(0.0);
            sums[1] = f32::new(0.0);
            #[unroll]
            for n in 0..comptime!(depth / 4) {
                let at = from + n * units + unit;
                if comptime!(spec.trace == Trace::Write) {
                    trace[at] = Vector::cast_from(state[n]);
                } else {
                    let other = Pair::<f32>::cast_from(trace[at]);
                    let product = other * state[n];
                    sums[n % 2] += product.extract(0usize) + product.extract(1usize);
                }
            }
            if comptime!(spec.trace == Trace::Read) {
                #[unroll]
                for half in 0..2usize {
                    let mut sum = sums[half];
                    sum += plane_shuffle_xor(sum, 1u32);
                    sum += plane_shuffle_xor(sum, 2u32);
                    let column = own_column + 8 * half;
                    if lane % 4 == 0 && column < spec.padded {
                        let row = (part * num_chunks + chunk) * spec.heads + head;
                        products[row * spec.padded + column] = sum;
                    }
                }
            }
        }

        #[unroll]
        for n in 0..depth_tiles {
            #[unroll]
            for half in 0..2usize {
                let mut factor = Pair::<f32>::empty();
                if comptime!(keys_deep) {
                    let at = 8 * n + 2 * (lane % 4);
                    factor.insert(0usize, decay_tile[at]);
                    factor.insert(1usize, decay_tile[at + 1]);
                } else {
                    let own = decay_tile[plane * 16 + lane / 4 + 8 * half];
                    factor.insert(0usize, own);
                    factor.insert(1usize, own);
                }
                state[2 * n + half] = state[2 * n + half] * factor;
            }
        }
        #[unroll]
        for s in 0..4usize {
            let mut quad = Array::<Pair<E>>::new(4usize);
            #[unroll]
            for i in 0..4usize {
                quad[i] = rights[4 * s + i];
            }
            let operand = left_of_transposed::<E>(&quad);
            #[unroll]
            for d in 0..comptime!(depth / 16) {
                let quad = load_quad::<E>(&update_tile, s * 16, d * 16, depth_stride, true);
                let r0 = right_of_transposed::<E>(&quad, 0usize);
                let r1 = right_of_transposed::<E>(&quad, 1usize);
                multiply::<E>(&operand, &r0, &mut state, 2 * d);
                multiply::<E>(&operand, &r1, &mut state, 2 * d + 1);
            }
        }
    }

    #[unroll]
    for n in 0..depth_tiles {
        #[unroll]
        for half in 0..2usize {
            #[unroll]
            for e in 0..2usize {
                let (at, valid) = state_at(own_depth + 8 * n + e, own_column + 8 * half, spec);
                if valid {
                    let base = (sequence * spec.heads + head) * comptime!(key_dim * value_dim);
                    end[base + at] = state[2 * n + half].extract(e);
                }
            }
        }
    }
}

/// Where a number of the state lies in `[K, V]`, and whether it exists.
#[cube]
fn state_at(deep: usize, column: usize, #[comptime] spec: WalkSpec) -> (usize, bool) {
    let (key_dim, value_dim) = comptime!(spec.state);
    if comptime!(spec.keys == KeyAxis::Depth) {
        (deep * value_dim + column, deep < key_dim && column < value_dim)
    } else {
        (column * value_dim + deep, column < key_dim && deep < value_dim)
    }
}

/// Vectors that each unit holds of a tile.
#[cube]
fn held<N: Size>(#[comptime] from: Stage) -> comptime_type!(usize) {
    let size = N::value();
    comptime!((CHUNK * (from.cols / size)).div_ceil(from.units))
}

/// Reads a unit's share of a tile into registers; what lies outside is zero.
#[cube]
fn fetch<E: Float, N: Size>(
    x: &[Vector<E, N>],
    out: &mut Array<Vector<E, N>>,
    rows: &ChunkRows,
    head: usize,
    col0: usize,
    #[comptime] from: Stage,
) {
    let size = N::value();
    let across = comptime!(from.cols / size);
    let wide = comptime!(from.width / size);
    #[unroll]
    for n in 0..held::<N>(from) {
        let at = UNIT_POS as usize + n * from.units;
        let (r, c) = (at / across, col0 / size + at % across);
        let valid = r < rows.len && c < wide;
        let offset = ((rows.start + r) * from.own_heads + head / from.group) * wide + c;
        let value = x[select(valid, offset, 0usize)];
        out[n] = select(valid, value, Vector::new(E::from_int(0)));
    }
}

/// Writes a unit's share of a tile to shared memory, rows 8 elements longer than the tile.
#[cube]
fn put<E: Float, N: Size>(x: &Array<Vector<E, N>>, out: &mut [E], #[comptime] from: Stage) {
    let size = N::value();
    let across = comptime!(from.cols / size);
    let stride = comptime!((from.cols + 8) / size);
    let out = out.as_vectorized_mut().with_vector_size_mut::<N>();
    #[unroll]
    for n in 0..held::<N>(from) {
        let at = UNIT_POS as usize + n * from.units;
        if at < comptime!(CHUNK * across) {
            out[(at / across) * stride + at % across] = x[n];
        }
    }
}
