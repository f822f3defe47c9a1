//! Kernel `prepare`: what the walks need of a chunk.
//!
//! For one chunk of one head:
//!
//! * `A[t, s] = scale sum_i q_t[i] k_s[i] exp(g_{s+1}[i] + .. + g_t[i])`, lower triangle,
//! * `qt_t = scale q_t exp(g of the chunk through t)`, `kt_s = k_s exp(g of the chunk after s)`,
//! * the decay of the whole chunk.
//!
//! A unit owns 8 rows of one channel and writes the levels (see [`super::levels`]); then planes multiply
//! them, in 16 works of one or two products: for each of the four 16 x 16 tiles on the diagonal one of
//! levels 0 and 1, one of levels 2 and 3, one of the diagonal itself; and four for the six tiles below,
//! those of levels 4 and 5. In the end each element of `A` is taken from the product that it is of.

use cubecl::prelude::*;

use super::levels::{
    Columns, columns_of, fetch_columns, group_of, load_beyond, nothing_fetched, write_inner,
    write_outer,
};
use super::scores::{PLANES, lower_tile};
use super::{CHUNK, ChunkSpec, GROUP, GROUPS};
use crate::components::{Acc, ChunkMap, Left, Right, multiply};

/// Tiles: the six levels, the queries, the keys.
const TILES: usize = 8;

/// Pairs of products.
const WORKS: usize = 16;

/// Row stride of a product in shared memory.
const PRODUCT_STRIDE: usize = 24;

/// Elements of a product in shared memory.
const PRODUCT: usize = 16 * PRODUCT_STRIDE;

/// Bytes of shared memory for elements of `size` bytes.
pub const fn shared_memory(spec: ChunkSpec, size: usize) -> usize {
    size * TILES * spec.tile() + 4 * spec.slice() * GROUPS
}

/// * `q`: `[rows, H, K]`, `k`: `[rows, Hk, K]`
/// * `qt`, `kt`: out, `[rows, H, padded]`; `decays`: out, `[chunks, H, padded]`
/// * `a`: out, `[chunks, H, 64, 64]`, blocks below and on the diagonal; zero beyond the rows of the chunk
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(crate) fn gla_prepare_kernel<E: Float, G: Float>(
    q: &[E],
    k: &[E],
    gate: &[G],
    qt: &mut [E],
    kt: &mut [E],
    decays: &mut [f32],
    a: &mut [E],
    map: ChunkMap,
    tasks: usize,
    scale: f32,
    #[comptime] spec: ChunkSpec,
    #[define(E, G)] _dtypes: [ElemType; 2],
) {
    let dims = comptime!(spec.dims);
    let by = comptime!(spec.instruction);
    let (padded, slice_len, tile) = comptime!((spec.padded(), spec.slice(), spec.tile()));
    let task = CUBE_POS;
    if task >= tasks {
        terminate!();
    }
    let head = task % dims.heads;
    let chunk = task / dims.heads;
    let rows = map.rows_of(chunk);

    let unit = UNIT_POS as usize;
    let plane = unit / 32;
    let channel = unit % slice_len;
    let group = group_of(spec);

    let mut tiles = Shared::<[E]>::new_aligned_slice(comptime!(TILES * tile), 16usize);
    let mut totals = Shared::<[f32]>::new_slice(comptime!(slice_len * GROUPS));

    let rounds = comptime!(WORKS / spec.planes());
    let mut sums = Sequence::<Acc>::new();
    #[unroll]
    for _n in 0..comptime!(2 * rounds) {
        sums.push(Acc::zero(by));
    }
    let mut fetched = nothing_fetched::<E, G>();
    fetch_columns::<E, G>(q, k, gate, &mut fetched, &rows, head, channel, spec);
    for slice in 0..comptime!(padded.div_ceil(slice_len)) {
        let i = slice * slice_len + channel;
        let x = columns_of::<E, G>(&fetched, &rows, i, scale, spec);
        // of the next slice, while this one is worked on; past the last nobody uses it
        fetch_columns::<E, G>(q, k, gate, &mut fetched, &rows, head, i + slice_len, spec);
        let total = x.head[GROUP - 1];
        totals[group * slice_len + channel] = total;
        let at = group * comptime!(GROUP * spec.stride()) + channel;
        write_inner::<E>(&x, &mut tiles, at, 0usize, spec);
        write_inner::<E>(&x, &mut tiles, at + tile, 1usize, spec);
        write_inner::<E>(&x, &mut tiles, at + 2 * tile, 2usize, spec);
        #[unroll]
        for r in 0..GROUP {
            tiles[at + 6 * tile + r * spec.stride()] = E::cast_from(x.q[r]);
            tiles[at + 7 * tile + r * spec.stride()] = E::cast_from(x.k[r]);
        }
        sync_cube();

        let beyond = load_beyond(&totals, spec);
        write_outer::<E>(&x, f32::new(1.0), &mut tiles, at + 3 * tile, 3usize, spec);
        write_outer::<E>(&x, beyond.level4, &mut tiles, at + 4 * tile, 4usize, spec);
        write_outer::<E>(&x, beyond.level5, &mut tiles, at + 5 * tile, 5usize, spec);
        if i < padded {
            let row = rows.start + group * GROUP;
            let to = (row * dims.heads + head) * padded + i;
            write_edges::<E>(&x, beyond.before, beyond.after, qt, kt, to, rows.len, spec);
            if group == 0 {
                decays[(chunk * dims.heads + head) * padded + i] = total * beyond.after;
            }
        }
        sync_cube();

        #[unroll]
        for round in 0..rounds {
            let work = work_of(plane + round * spec.planes());
            #[unroll]
            for j in 0..comptime!(slice_len / 16) {
                add_product::<E>(&tiles, &work.first, j, sums.index_mut(2 * round), spec);
                if work.has_second {
                    add_product::<E>(&tiles, &work.second, j, sums.index_mut(2 * round + 1), spec);
                }
            }
        }
        sync_cube();
    }

    #[unroll]
    for round in 0..rounds {
        #[unroll]
        for n in 0..2usize {
            let row = (2 * (plane + round * spec.planes()) + n) * 16;
            sums.index(2 * round + n).store::<E>(&mut tiles, row, 0usize, PRODUCT_STRIDE);
        }
    }
    sync_cube();
    for at in range_stepped(unit, comptime!(PLANES * 256), comptime!(spec.units())) {
        let (t, s) = lower_tile(at / 256);
        let (r, c) = (at / 16 % 16, at % 16);
        let from = product_of(t, s, r ^ c) * PRODUCT + r * PRODUCT_STRIDE + c;
        let zero = E::from_int(0);
        let value = select(t == s && c > r, zero, tiles[from]);
        let row = (chunk * dims.heads + head) * CHUNK + t * 16 + r;
        a[row * CHUNK + s * 16 + c] = value;
    }
}

/// One 16 x 16 tile of a level.
#[derive(CubeType, Clone, Copy)]
struct Product {
    /// Tile of the left operand.
    left: usize,
    /// Tile of the right operand.
    right: usize,
    /// Row block.
    t: usize,
    /// Column block.
    s: usize,
}

/// A pair of products.
#[derive(CubeType, Clone, Copy)]
struct Work {
    first: Product,
    second: Product,
    has_second: bool,
}

#[cube]
fn work_of(work: usize) -> Work {
    let kind = work / 4;
    let n = work % 4;
    // kinds 0 and 1: two levels of a diagonal tile each; 2: its diagonal; 3: below the diagonal
    let inner = kind < 2;
    let low = 2 * kind;
    let level = select(n < 2, 4usize, 5usize);
    let t = select(n == 0, 1usize, select(n == 2, 2usize, 3usize));
    let s = select(n == 1, 2usize, 0usize);
    let left = select(inner, low, select(kind == 2, 6usize, level));
    let right = select(inner, low, select(kind == 2, 7usize, level));
    let row = select(kind < 3, n, t);
    let column = select(kind < 3, n, s);
    Work {
        first: Product { left, right, t: row, s: column },
        second: Product {
            left: select(inner, left + 1, left),
            right: select(inner, right + 1, right),
            t: row,
            s: select(inner, column, column + 1),
        },
        has_second: inner || (kind == 3 && n >= 2),
    }
}

/// The product that has an element of tile `(t, s)`: the first of work `n` is `2 n`, the second the
/// next. `x`: the element's row xor its column.
#[cube]
fn product_of(t: usize, s: usize, x: usize) -> usize {
    let level = select(x >= 2, 1usize, 0usize)
        + select(x >= 4, 1usize, 0usize)
        + select(x >= 8, 1usize, 0usize);
    let on_diagonal = select(x == 0, 16 + 2 * t, 8 * (level / 2) + 2 * t + level % 2);
    let of_level5 = 24 + 2 * t + s;
    let of_level4 = select(t == 1, 24usize, 26usize);
    let below = select(t >= 2 && s < 2, of_level5, of_level4);
    select(t == s, on_diagonal, below)
}

#[cube]
fn add_product<E: Float>(
    tiles: &[E],
    product: &Product,
    j: usize,
    acc: &mut Acc,
    #[comptime] spec: ChunkSpec,
) {
    let (stride, by) = comptime!((spec.stride(), spec.instruction));
    let tiles = tiles.as_vectorized();
    let left = product.left * CHUNK + product.t * 16;
    let left = Left::<E>::load(tiles, left, j * 16, stride, false, by);
    let right = product.right * CHUNK + product.s * 16;
    let right = Right::<E>::load(tiles, right, j * 16, stride, true, by);
    multiply::<E>(&left, &right, acc);
}

/// A unit's queries with their decay from the chunk's start (own gate included), and its keys with
/// theirs to its end.
#[cube]
#[allow(clippy::too_many_arguments)]
fn write_edges<E: Float>(
    x: &Columns,
    before: f32,
    after: f32,
    qt: &mut [E],
    kt: &mut [E],
    to: usize,
    len: usize,
    #[comptime] spec: ChunkSpec,
) {
    let stride = comptime!(spec.dims.heads * spec.padded());
    let row0 = group_of(spec) * GROUP;
    #[unroll]
    for r in 0..GROUP {
        if row0 + r < len {
            qt[to + r * stride] = E::cast_from(x.q[r] * x.head[r] * before);
            kt[to + r * stride] = E::cast_from(x.k[r] * x.tail[r] * after);
        }
    }
}
