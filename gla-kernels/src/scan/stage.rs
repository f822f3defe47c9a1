//! Tiles on their way to shared memory: read into registers early, put down when there is room.

use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;

use super::walk_spec::ROWS_LEN;
use super::{CHUNK, ChunkSpec};
use crate::Instruction;
use crate::components::ChunkRows;

/// A tile `[64, cols]` of a tensor `[rows, own_heads, width]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stage {
    /// Heads of the tensor.
    pub own_heads: usize,
    /// Query heads for each of them.
    pub group: usize,
    /// Its last dimension.
    pub width: usize,
    /// Columns of the tile.
    pub cols: usize,
    /// Units that share the work.
    pub units: usize,
}

impl Stage {
    /// Tiles of `cols` columns of a tensor that `heads` query heads read.
    pub fn new(heads: usize, own_heads: usize, width: usize, cols: usize, units: usize) -> Self {
        Stage { own_heads, group: heads / own_heads, width, cols, units }
    }

    /// Whether tiles never reach beyond the width.
    pub const fn fills(&self) -> bool {
        self.width.is_multiple_of(self.cols)
    }

    /// Tiles of a slice.
    pub fn slice(spec: ChunkSpec, own_heads: usize, width: usize, units: usize) -> Self {
        Stage::new(spec.dims.heads, own_heads, width, spec.slice(), units)
    }
}

/// Vectors that each unit holds of a tile.
#[cube]
pub(crate) fn held<N: Size>(#[comptime] from: Stage) -> comptime_type!(usize) {
    let size = N::value();
    comptime!((CHUNK * (from.cols / size)).div_ceil(from.units))
}

/// Reads a unit's share of the tile from column `col0` on, which lies within the width, into registers. What
/// the tile has outside is read from elsewhere in the tensor and [`put`] zeroes it: a use of the values here
/// would wait for them.
#[cube]
pub(crate) fn fetch<E: Float, N: Size>(
    x: &[Vector<E, N>],
    out: &mut Array<Vector<E, N>>,
    rows: &ChunkRows,
    head: usize,
    col0: usize,
    #[comptime] from: Stage,
) {
    let size = N::value();
    let wide = comptime!(from.width / size);
    let line = comptime!(from.own_heads * wide);
    // beyond the last row that one again; of no rows the tensor's first
    let start = select(rows.len > 0, rows.start, 0usize);
    let last = select(rows.len > 0, rows.len - 1, 0usize);
    let first = start * line + (head / from.group) * wide;
    #[unroll]
    for n in 0..held::<N>(from) {
        let (r, c) = place::<N>(n, from);
        let mut column = col0 / size + c;
        if comptime!(!from.fills()) {
            column = select(column < wide, column, 0usize);
        }
        out[n] = x[first + select(r < last, r, last) * line + column];
    }
}

/// Writes a unit's share of a tile to shared memory, rows 8 elements longer than the tile; zero
/// beyond the `len` rows of the chunk and the width of the tensor.
#[cube]
pub(crate) fn put<E: Float, N: Size>(
    x: &Array<Vector<E, N>>,
    out: &mut [Vector<E, N>],
    len: usize,
    col0: usize,
    #[comptime] from: Stage,
) {
    let size = N::value();
    let stride = comptime!((from.cols + 8) / size);
    let held = held::<N>(from);
    let all_inside = comptime!((CHUNK * (from.cols / size)).is_multiple_of(from.units));
    #[unroll]
    for n in 0..held {
        let (r, c) = place::<N>(n, from);
        if comptime!(all_inside) || r < CHUNK {
            out[r * stride + c] = x[n];
        }
    }
    // a mask would take apart and join again every element, of chunks that are whole too
    if comptime!(!from.fills()) || len < CHUNK {
        // in a loop, for there is mostly nothing to do
        let across = comptime!(from.cols / size);
        for at in range_stepped(UNIT_POS as usize, comptime!(CHUNK * across), from.units) {
            let (r, c) = (at / across, at % across);
            if r >= len || col0 / size + c >= comptime!(from.width / size) {
                out[r * stride + c] = Vector::new(E::from_int(0));
            }
        }
    }
}

/// The same into a tile of vectors of any size. With `cmma` that is the own one or one element: not
/// every driver takes shared memory seen as vectors of another size than it is declared with.
#[cube]
pub(crate) fn put_any<E: Float, N: Size, T: Size>(
    x: &Array<Vector<E, N>>,
    out: &mut [Vector<E, T>],
    len: usize,
    col0: usize,
    #[comptime] from: Stage,
    #[comptime] by: Instruction,
) {
    let (size, of_tile) = (N::value(), T::value());
    if comptime!(by == Instruction::Cmma && of_tile != size) {
        let stride = comptime!(from.cols + 8);
        #[unroll]
        for n in 0..held::<N>(from) {
            let (r, c) = place::<N>(n, from);
            if r < CHUNK {
                let value = masked::<E, N>(x, n, len, col0, from);
                #[unroll]
                for e in 0..size {
                    out[r * stride + c * size + e] = Vector::new(value.extract(e));
                }
            }
        }
    } else {
        put::<E, N>(x, out.with_vector_size_mut::<N>(), len, col0, from);
    }
}

/// Row and column, in vectors, of the unit's vector `n`. Where the units are whole rows that is the first one's
/// and a constant: one addition, of which no compiler is sure.
#[cube]
fn place<N: Size>(#[comptime] n: usize, #[comptime] from: Stage) -> (usize, usize) {
    let size = N::value();
    let across = comptime!(from.cols / size);
    let unit = UNIT_POS as usize;
    if comptime!(from.units.is_multiple_of(across)) {
        (unit / across + comptime!(n * (from.units / across)), unit % across)
    } else {
        let at = unit + comptime!(n * from.units);
        (at / across, at % across)
    }
}

/// The unit's vector `n`, zero outside.
#[cube]
fn masked<E: Float, N: Size>(
    x: &Array<Vector<E, N>>,
    #[comptime] n: usize,
    len: usize,
    col0: usize,
    #[comptime] from: Stage,
) -> Vector<E, N> {
    let size = N::value();
    let wide = comptime!(from.width / size);
    let (r, c) = place::<N>(n, from);
    let valid = r < len && col0 / size + c < wide;
    select(valid, x[n], Vector::new(E::from_int(0)))
}

/// What the rows of a tile are multiplied with on their way to shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Factors {
    /// Nothing.
    None,
    /// The scale.
    Scale,
    /// The rows' decays, see [`row_factors`].
    Rows,
}

/// Factors that each unit holds, one for each vector.
#[cube]
pub(crate) fn held_factors<N: Size>(
    #[comptime] factors: Factors,
    #[comptime] from: Stage,
) -> comptime_type!(usize) {
    let vectors = held::<N>(from);
    comptime!(if factors == Factors::None { 1 } else { vectors })
}

/// Where the line of a chunk's and head's rows' decays begins.
#[cube]
pub(crate) fn rows_line(chunk: usize, head: usize, #[comptime] heads: usize) -> usize {
    (chunk * heads + head) * ROWS_LEN
}

/// Where a line of the rows' decays has the factors of the outputs, and those of the update.
#[cube]
pub(crate) fn row_factors(reversed: bool) -> (usize, usize) {
    (select(reversed, CHUNK, 0usize), select(reversed, 0usize, CHUNK))
}

/// Reads the factors of a unit's share of a tile, times one more, into registers, from where those of the
/// rows begin.
#[cube]
pub(crate) fn fetch_factors<N: Size>(
    decays: &[f32],
    first: usize,
    out: &mut Array<f32>,
    scale: f32,
    times: f32,
    #[comptime] factors: Factors,
    #[comptime] from: Stage,
) {
    if comptime!(factors != Factors::None) {
        #[unroll]
        for n in 0..held::<N>(from) {
            if comptime!(factors == Factors::Rows) {
                let (row, _column) = place::<N>(n, from);
                out[n] = decays[first + select(row < CHUNK, row, 0usize)] * times;
            } else {
                out[n] = scale * times;
            }
        }
    }
}

/// Whether [`scale_rows`] may round the factors: f16 has bits enough for decays and a scale that is not far
/// from one.
pub(crate) fn scales_in_half(dtype: ElemType, scale: f32) -> bool {
    let near = scale == 0.0 || (1.0 / 256.0..=256.0).contains(&scale.abs());
    dtype == ElemType::Float(FloatKind::F16) && near
}

/// Multiplies a unit's share of a tile with them: in f32, or a factor rounded as the rows are if `in_half`.
#[cube]
pub(crate) fn scale_rows<E: Float, N: Size>(
    x: &mut Array<Vector<E, N>>,
    by: &Array<f32>,
    #[comptime] factors: Factors,
    #[comptime] in_half: bool,
    #[comptime] from: Stage,
) {
    if comptime!(factors != Factors::None) {
        #[unroll]
        for n in 0..held::<N>(from) {
            if in_half {
                x[n] *= Vector::new(E::cast_from(by[n]));
            } else {
                let product = Vector::<f32, N>::cast_from(x[n]) * Vector::new(by[n]);
                x[n] = Vector::cast_from(product);
            }
        }
    }
}

/// Multiplies a unit's share of a tile, whose vectors are all of the same columns, with factors of those: in
/// f32, or rounded as the rows are if `in_half`.
#[cube]
pub(crate) fn scale_columns<E: Float, N: Size>(
    x: &mut Array<Vector<E, N>>,
    by: &Vector<f32, N>,
    #[comptime] in_half: bool,
    #[comptime] from: Stage,
) {
    let rounded = Vector::<E, N>::cast_from(*by);
    #[unroll]
    for n in 0..held::<N>(from) {
        if in_half {
            x[n] *= rounded;
        } else {
            x[n] = Vector::cast_from(Vector::<f32, N>::cast_from(x[n]) * *by);
        }
    }
}

/// A piece of a chunk's line of decays `[chunks, H, stride]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DecayLine {
    /// Query heads.
    pub heads: usize,
    /// Length of a line; none is read if there is no gate.
    pub stride: usize,
    /// Length of the piece.
    pub len: usize,
    /// Units that share the work.
    pub units: usize,
    /// Whether there is a gate.
    pub gated: bool,
}

impl DecayLine {
    /// Decays that each unit holds.
    pub const fn held(&self) -> usize {
        self.len.div_ceil(self.units)
    }
}

/// Reads a unit's share of a piece into registers.
#[cube]
pub(crate) fn fetch_decays(
    decays: &[f32],
    out: &mut Array<f32>,
    chunk: usize,
    head: usize,
    first: usize,
    #[comptime] line: DecayLine,
) {
    if line.gated {
        let from = (chunk * line.heads + head) * line.stride;
        #[unroll]
        for n in 0..comptime!(line.held()) {
            let i = first + UNIT_POS as usize + n * line.units;
            out[n] = decays[from + select(i < line.stride, i, 0usize)];
        }
    }
}

/// Writes a unit's share to shared memory; one, which is no decay, beyond the line.
#[cube]
pub(crate) fn put_decays(
    x: &Array<f32>,
    out: &mut [f32],
    first: usize,
    #[comptime] line: DecayLine,
) {
    if line.gated {
        #[unroll]
        for n in 0..comptime!(line.held()) {
            let at = UNIT_POS as usize + n * line.units;
            if at < line.len {
                out[at] = select(first + at < line.stride, x[n], f32::new(1.0));
            }
        }
    }
}

#[cfg(all(test, feature = "wgpu"))]
mod tests {
    use cubecl::wgpu::{WgpuDevice, WgpuRuntime, WgslCompiler};
    use cubecl_runtime::runtime::Runtime;

    use super::*;
    use crate::launch::arg;

    const STRIDE_PAD: usize = 8;

    #[cube(launch_unchecked)]
    fn tile_kernel<N: Size>(
        x: &[Vector<f32, N>],
        out: &mut [Vector<f32, N>],
        start: usize,
        len: usize,
        head: usize,
        col0: usize,
        #[comptime] from: Stage,
    ) {
        let size = N::value();
        let tile_len = comptime!(CHUNK * (from.cols + STRIDE_PAD) / size);
        let mut tile = Shared::<[Vector<f32, N>]>::new_slice(tile_len);
        let mut own = Array::<Vector<f32, N>>::new(held::<N>(from));
        fetch::<f32, N>(x, &mut own, &ChunkRows { start, len }, head, col0, from);
        put::<f32, N>(&own, &mut tile, len, col0, from);
        sync_cube();
        for at in range_stepped(UNIT_POS as usize, tile_len, from.units) {
            out[at] = tile[at];
        }
    }

    /// Tiles that fill the width and that reach beyond it, whole and short chunks, more and fewer units than
    /// rows have vectors, in vectors of one and four.
    #[test]
    fn a_tile_is_a_piece_of_the_tensor() {
        let open = || WgpuRuntime::<WgslCompiler>::client(&WgpuDevice::default());
        let Ok(client) = std::panic::catch_unwind(open) else {
            println!("SKIPPED wgsl: no adapter");
            return;
        };
        let (rows, heads, own_heads, head) = (100usize, 4, 2, 3);
        for (width, cols, col0) in [(96usize, 32usize, 32usize), (40, 32, 32), (36, 48, 0)] {
            let number = |n: usize| n as f32 + 1.0;
            let host: Vec<f32> = (0..rows * own_heads * width).map(number).collect();
            let x = client.create_from_slice(f32::as_bytes(&host));
            for (start, len) in [(0, 64), (64, 36), (99, 1), (100, 0)] {
                for (units, size) in [(64, 4), (128, 1), (48, 4), (256, 4)] {
                    let from = Stage::new(heads, own_heads, width, cols, units);
                    let stride = cols + STRIDE_PAD;
                    let out = client.create_from_slice(f32::as_bytes(&vec![f32::NAN; 64 * stride]));
                    // SAFETY: the buffers are as long as they are told to be.
                    unsafe {
                        tile_kernel::launch_unchecked(
                            &client,
                            CubeCount::Static(1, 1, 1),
                            CubeDim::new_1d(units as u32),
                            size,
                            arg(&x, host.len() / size),
                            arg(&out, 64 * stride / size),
                            start,
                            len,
                            head,
                            col0,
                            from,
                        );
                    }
                    let bytes = client.read_one(out).expect("the kernel ran");
                    let tile = f32::from_bytes(&bytes);
                    for (r, c) in (0..64).flat_map(|r| (0..cols).map(move |c| (r, c))) {
                        let inside = r < len && col0 + c < width;
                        let at = ((start + r) * own_heads + head / 2) * width + col0 + c;
                        let expected = if inside { host[at] } else { 0.0 };
                        let case = format!("{width} {cols} {start} {len} {units} {size}: {r} {c}");
                        assert_eq!(tile[r * stride + c], expected, "{case}");
                    }
                }
            }
        }
    }
}
