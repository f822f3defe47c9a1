//! Kernel `prepare`: what the walks need of a chunk.
//!
//! For one chunk of one head:
//!
//! * `A[t, s] = scale sum_i q_t[i] k_s[i] exp(g_{s+1}[i] + .. + g_t[i])`, lower triangle,
//! * `qt_t = scale q_t exp(g of the chunk through t)`, `kt_s = k_s exp(g of the chunk after s)`,
//! * the decay of the whole chunk.
//!
//! A unit owns 8 rows of one channel and writes the levels (see [`super::levels`]); then planes multiply
//! them. Of the four 16 x 16 tiles on the diagonal, one plane has levels 0 and 1, one levels 2 and 3,
//! one the diagonal itself; the six tiles below are those of levels 4 and 5.

use cubecl::prelude::*;

use super::levels::{
    Columns, accumulator_position, columns_of, fetch_columns, load_beyond, nothing_fetched,
    write_inner, write_outer,
};
use super::{CHUNK, ChunkSpec, GROUP, GROUPS, SLICE, STRIDE, TILE};
use crate::components::{Pair, chunk_rows, load_quad, multiply, right_of_plain, zero_tiles};

/// * `q`: `[rows, H, K]`, `k`: `[rows, Hk, K]`
/// * `qt`, `kt`: out, `[rows, H, padded]`; `decays`: out, `[chunks, H, padded]`
/// * `a`: out, `[rows, H, 64]`
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
    table: &[u32],
    num_sequences: usize,
    tasks: usize,
    scale: f32,
    #[comptime] spec: ChunkSpec,
    #[define(E, G)] _dtypes: [ElemType; 2],
) {
    let dims = comptime!(spec.dims);
    let padded = comptime!(spec.padded);
    let task = CUBE_POS;
    if task >= tasks {
        terminate!();
    }
    let head = task % dims.heads;
    let chunk = task / dims.heads;
    let rows = chunk_rows(table, num_sequences, chunk);

    let unit = UNIT_POS as usize;
    let channel = unit % SLICE;
    let group = unit / SLICE;

    // tiles 0 to 5: the levels; 6: queries, 7: keys
    let mut tiles = Shared::<[E]>::new_aligned_slice(comptime!(8 * TILE), 16usize);
    let mut totals = Shared::<[f32]>::new_slice(comptime!(SLICE * GROUPS));

    let work = work_of(unit / 32);
    let mut acc = zero_tiles(4usize);
    let mut fetched = nothing_fetched::<E, G>();
    fetch_columns::<E, G>(q, k, gate, &mut fetched, &rows, head, channel, dims);
    for slice in 0..comptime!(padded.div_ceil(SLICE)) {
        let i = slice * SLICE + channel;
        let x = columns_of::<E, G>(&fetched, &rows, i, scale, dims);
        let total = x.head[GROUP - 1];
        totals[group * SLICE + channel] = total;
        let at = group * comptime!(GROUP * STRIDE) + channel;
        write_inner::<E>(&x, &mut tiles, at, 0usize);
        write_inner::<E>(&x, &mut tiles, at + TILE, 1usize);
        write_inner::<E>(&x, &mut tiles, at + 2 * TILE, 2usize);
        #[unroll]
        for r in 0..GROUP {
            tiles[at + 6 * TILE + r * STRIDE] = E::cast_from(x.q[r]);
            tiles[at + 7 * TILE + r * STRIDE] = E::cast_from(x.k[r]);
        }
        sync_cube();

        let beyond = load_beyond(&totals);
        write_outer::<E>(&x, f32::new(1.0), &mut tiles, at + 3 * TILE, 3usize);
        write_outer::<E>(&x, beyond.level4, &mut tiles, at + 4 * TILE, 4usize);
        write_outer::<E>(&x, beyond.level5, &mut tiles, at + 5 * TILE, 5usize);
        if i < padded {
            let row = rows.start + group * GROUP;
            let to = (row * dims.heads + head) * padded + i;
            write_edges::<E>(&x, beyond.before, beyond.after, qt, kt, to, rows.len, spec);
            if group == 0 {
                decays[(chunk * dims.heads + head) * padded + i] = total * beyond.after;
            }
        }
        sync_cube();

        // of the next slice, while this one's products run; past the last nobody uses it
        fetch_columns::<E, G>(q, k, gate, &mut fetched, &rows, head, i + SLICE, dims);
        #[unroll]
        for j in 0..comptime!(SLICE / 16) {
            add_product::<E>(&tiles, &work.first, j, &mut acc, 0usize);
            if work.has_second {
                add_product::<E>(&tiles, &work.second, j, &mut acc, 2usize);
            }
        }
        sync_cube();
    }

    store_product::<E>(a, &work.first, &acc, 0usize, rows.start, rows.len, head, dims.heads);
    if work.has_second {
        store_product::<E>(a, &work.second, &acc, 2usize, rows.start, rows.len, head, dims.heads);
    }
}

/// Stores the elements that are the product's own: all of a tile below the diagonal, those of its
/// level on it; the diagonal itself comes with the zeros above.
#[cube]
#[allow(clippy::too_many_arguments)]
fn store_product<E: Float>(
    a: &mut [E],
    product: &Product,
    acc: &Array<Pair<f32>>,
    #[comptime] tile: usize,
    start: usize,
    len: usize,
    head: usize,
    #[comptime] heads: usize,
) {
    #[unroll]
    for n in 0..2usize {
        #[unroll]
        for half in 0..2usize {
            let (r, c) = accumulator_position(n, half);
            let row = product.t * 16 + r;
            let to = ((start + row) * heads + head) * CHUNK + product.s * 16 + c;
            #[unroll]
            for e in 0..2usize {
                let x = r ^ (c + e);
                let diagonal = product.t == product.s;
                let above = diagonal && c + e > r;
                let own = !diagonal
                    || (above && product.to == 1)
                    || (!above && x >= product.from && x < product.to);
                let value = select(above, f32::new(0.0), acc[2 * (tile + n) + half].extract(e));
                if own && row < len {
                    a[to + e] = E::cast_from(value);
                }
            }
        }
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
    /// On the diagonal, the elements that are this level's: row xor column from here
    from: usize,
    /// to here.
    to: usize,
}

/// What a plane multiplies.
#[derive(CubeType, Clone, Copy)]
struct Work {
    first: Product,
    second: Product,
    has_second: bool,
}

#[cube]
fn work_of(plane: usize) -> Work {
    let kind = plane / 4;
    let n = plane % 4;
    // kinds 0 and 1: two levels of a diagonal tile each; 2: its diagonal; 3: below the diagonal
    let inner = kind < 2;
    let low = 2 * kind;
    let level = select(n < 2, 4usize, 5usize);
    let t = select(n == 0, 1usize, select(n == 2, 2usize, 3usize));
    let s = select(n == 1, 2usize, 0usize);
    let left = select(inner, low, select(kind == 2, 6usize, level));
    let right = select(inner, low, select(kind == 2, 7usize, level));
    let from = select(inner, select(kind == 0, 1usize, 4usize), 0usize);
    let to = select(inner, select(kind == 0, 2usize, 8usize), 1usize);
    let row = select(kind < 3, n, t);
    let column = select(kind < 3, n, s);
    Work {
        first: Product { left, right, t: row, s: column, from, to },
        second: Product {
            left: select(inner, left + 1, left),
            right: select(inner, right + 1, right),
            t: row,
            s: select(inner, column, column + 1),
            from: 2 * from,
            to: 2 * to,
        },
        has_second: inner || (kind == 3 && n >= 2),
    }
}

#[cube]
fn add_product<E: Float>(
    tiles: &[E],
    product: &Product,
    j: usize,
    acc: &mut Array<Pair<f32>>,
    tile: usize,
) {
    let left = load_quad::<E>(tiles, product.left * CHUNK + product.t * 16, j * 16, STRIDE, false);
    let quad = load_quad::<E>(tiles, product.right * CHUNK + product.s * 16, j * 16, STRIDE, false);
    let r0 = right_of_plain::<E>(&quad, 0usize);
    let r1 = right_of_plain::<E>(&quad, 1usize);
    multiply::<E>(&left, &r0, acc, tile);
    multiply::<E>(&left, &r1, acc, tile + 1);
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
    let stride = comptime!(spec.dims.heads * spec.padded);
    let row0 = (UNIT_POS as usize / SLICE) * GROUP;
    #[unroll]
    for r in 0..GROUP {
        if row0 + r < len {
            qt[to + r * stride] = E::cast_from(x.q[r] * x.head[r] * before);
            kt[to + r * stride] = E::cast_from(x.k[r] * x.tail[r] * after);
        }
    }
}
