//! The tensor-core seam: products of 16 x 16 blocks with f32 accumulators, operands from shared memory.
//!
//! Two instructions stand behind it, see [`Instruction`]: `mma.m16n8k16`, whose registers are the
//! kernel's own, and matrices of a plane (`cmma`: Vulkan's cooperative matrices, CUDA's `wmma`),
//! whose elements no kernel sees but through shared memory. The kernels know one layout, that of
//! `mma`: a plane of 32 lanes holds a 16 x 16 accumulator as four pairs of neighbouring columns a lane,
//! pair `2 n + half` in row `lane / 4 + 8 half` and columns `8 n + 2 (lane % 4)` and the next.
//! [`add_to`] gives them, [`Right::of_pairs`] takes them: at no cost with `mma`, through a scratch of
//! the plane with `cmma`.

use cubecl::cmma::{self, Matrix, MatrixIdent, MatrixLayout, MmaDefinition};
use cubecl::prelude::*;

use crate::Instruction;

/// Two neighbouring columns of an accumulator or operand row, as a lane holds them.
pub type Pair<E> = Vector<E, Const<2>>;

/// A 16 x 16 block as `ldmatrix` reads it: four 8 x 8 matrices `(row half, column half)`, each
/// transposed or not.
pub type Quad<E> = Array<Pair<E>>;

/// A right operand or accumulator of 16 columns as `mma` takes it, 8 columns at a time: twice two pairs. (In
/// one array they were copied out and back for each product, and compiling a walk took a half longer.)
pub type Halves<E> = Sequence<Array<Pair<E>>>;

/// A left operand.
#[allow(dead_code, reason = "made by their expansion alone")]
#[derive(CubeType)]
pub enum Left<E: Float> {
    /// The four 8 x 8 matrices of the block, column by column.
    Mma(Quad<E>),
    /// A matrix of the plane.
    Cmma(Matrix<E>),
}

/// A right operand.
#[allow(dead_code, reason = "made by their expansion alone")]
#[derive(CubeType)]
pub enum Right<E: Float> {
    /// Two operands of 8 columns, each in two halves of the depth.
    Mma(Halves<E>),
    /// A matrix of the plane.
    Cmma(Matrix<E>),
}

/// An accumulator.
#[allow(dead_code, reason = "made by their expansion alone")]
#[derive(CubeType)]
pub enum Acc {
    /// The pairs.
    Mma(Halves<f32>),
    /// A matrix of the plane.
    Cmma(Matrix<f32>),
}

/// Pairs between the rows of a plane's scratch: no more than there are, shared memory is short.
const PITCH: usize = 8;

/// Blocks that a plane passes between registers and matrices at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Slots {
    /// Accumulators.
    pub floats: usize,
    /// Operands.
    pub halves: usize,
}

impl Slots {
    /// Bytes of shared memory for so many planes and operands of two bytes; more for operands if that is
    /// what `least` pairs of them take.
    pub const fn bytes(self, planes: usize, least: usize, by: Instruction) -> usize {
        match by {
            Instruction::Cmma => {
                let (floats, halves) = (planes * self.floats * BLOCK, self.halves(planes, least));
                32 + 8 * floats + 4 * halves
            }
            _ => 32,
        }
    }

    const fn halves(self, planes: usize, least: usize) -> usize {
        let own = planes * self.halves * BLOCK;
        if own < least { least } else { own }
    }
}

/// Pairs of a block.
const BLOCK: usize = 16 * PITCH;

/// What a plane passes between registers and matrices through: nothing with `mma`.
#[derive(CubeType)]
pub struct Scratch<E: Float> {
    floats: Shared<[Pair<f32>]>,
    /// For [`Right::of_pairs`]; a kernel may use them for its own in between.
    pub halves: Shared<[Pair<E>]>,
    #[cube(comptime)]
    slots: Slots,
}

#[cube]
impl<E: Float> Scratch<E> {
    /// For so many planes; at least so many pairs of operands.
    pub fn new(
        #[comptime] planes: usize,
        #[comptime] slots: Slots,
        #[comptime] least: usize,
        #[comptime] by: Instruction,
    ) -> Self {
        let used = comptime!(by == Instruction::Cmma);
        let floats = comptime!(if used { planes * slots.floats * BLOCK } else { 1 });
        let halves = comptime!(if used { slots.halves(planes, least).max(1) } else { 1 });
        Scratch::<E> {
            floats: Shared::new_aligned_slice(floats, 16usize),
            halves: Shared::new_aligned_slice(halves, 16usize),
            slots,
        }
    }
}

/// Where a lane has pair `i`: row, and pair of columns.
#[cube]
fn place(#[comptime] i: usize) -> (usize, usize) {
    let lane = UNIT_POS_PLANE as usize;
    (lane / 4 + comptime!(8 * (i % 2)), lane % 4 + comptime!(4 * (i / 2)))
}

/// The registers of a block that is read transposed or not. Each eight lanes point at one 8 x 8 matrix, so
/// their order costs nothing: (0, 0), (1, 0), (0, 1), (1, 1), or that of a transpose if `permute`.
/// (`mma` wants its operand in neighbouring registers; exchanged afterwards, they are copied for each use.)
#[cube]
fn load_quad<E: Float, N: Size>(
    tile: &[Vector<E, N>],
    at: usize,
    #[comptime] stride: usize,
    #[comptime] transpose: bool,
    #[comptime] permute: bool,
) -> Quad<E> {
    let lane = UNIT_POS_PLANE as usize;
    let (row, col) = if permute {
        (lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8)
    } else {
        (lane % 16, lane / 16 * 8)
    };
    let from = at + row * stride + col;
    let def = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    let scalars = tile.with_vector_size::<Const<1>>();
    def.load_matrix::<Vector<E, Const<1>>, Const<2>>(
        &scalars[from..from + 8],
        MatrixIdent::A,
        4usize,
        transpose,
    )
}

#[cube]
fn load_matrix<E: Float, N: Size>(
    tile: &[Vector<E, N>],
    at: usize,
    #[comptime] stride: usize,
    #[comptime] ident: MatrixIdent,
    #[comptime] transpose: bool,
) -> Matrix<E> {
    let layout = comptime!(if transpose { MatrixLayout::ColMajor } else { MatrixLayout::RowMajor });
    // SAFETY: filled by the load.
    let mut x = unsafe { Matrix::<E>::uninitialized(ident, 16usize, 16usize, 16usize, layout) };
    cmma::load(&mut x, &tile[at / N::value()..tile.len()], comptime!(stride as u32));
    x
}

#[cube]
impl<E: Float> Left<E> {
    /// Of the block at `(row, col)` of a tile `[.., stride]` that has it as `[m, k]`, or as `[k, m]` if
    /// `transposed`. `stride` and `col` are multiples of 8.
    pub fn load<N: Size>(
        tile: &[Vector<E, N>],
        row: usize,
        col: usize,
        #[comptime] stride: usize,
        #[comptime] transposed: bool,
        #[comptime] by: Instruction,
    ) -> Self {
        let at = row * stride + col;
        if comptime!(by == Instruction::Cmma) {
            let x = load_matrix::<E, N>(tile, at, stride, MatrixIdent::A, transposed);
            Left::<E>::new_Cmma(x)
        } else {
            Left::<E>::new_Mma(load_quad::<E, N>(tile, at, stride, transposed, transposed))
        }
    }
}

/// An operand of `mma` with its columns times factors, of columns `8 half + 2 (lane % 4)` and the next.
#[cube]
pub fn scaled<E: Float>(left: &Left<E>, factors: &Array<Pair<f32>>) -> Left<E> {
    let mut out = Array::<Pair<E>>::new(4usize);
    match left {
        Left::Mma(quad) =>
        {
            #[unroll]
            for i in 0..4usize {
                let scaled = Pair::<f32>::cast_from(quad[i]) * factors[i / 2];
                out[i] = Vector::cast_from(scaled);
            }
        }
        Left::Cmma(_) => {}
    }
    Left::<E>::new_Mma(out)
}

/// Whether the highest bit in which row and column differ is `level`.
#[cube]
pub fn is_of_level(row: usize, col: usize, #[comptime] level: usize) -> bool {
    let x = row ^ col;
    x >= comptime!(1usize << level) && x < comptime!(2usize << level)
}

/// A block of `mma` with all but one level masked, see [`is_of_level`].
#[cube]
pub fn only_level<E: Float>(block: &Left<E>, #[comptime] level: usize) -> Left<E> {
    let mut left = Array::<Pair<E>>::new(4usize);
    match block {
        Left::Mma(block) =>
        {
            #[unroll]
            for i in 0..4usize {
                let (row, col) = pair_position(i);
                let mut pair = Pair::<E>::empty();
                #[unroll]
                for e in 0..2usize {
                    let keep = is_of_level(row, col + e, level);
                    pair.insert(e, select(keep, block[i].extract(e), E::from_int(0)));
                }
                left[i] = pair;
            }
        }
        Left::Cmma(_) => {}
    }
    Left::<E>::new_Mma(left)
}

#[cube]
impl<E: Float> Right<E> {
    /// Of the block at `(row, col)` of a tile `[.., stride]` that has it as `[k, n]`, or as `[n, k]` if
    /// `transposed`.
    pub fn load<N: Size>(
        tile: &[Vector<E, N>],
        row: usize,
        col: usize,
        #[comptime] stride: usize,
        #[comptime] transposed: bool,
        #[comptime] by: Instruction,
    ) -> Self {
        let at = row * stride + col;
        if comptime!(by == Instruction::Cmma) {
            let x = load_matrix::<E, N>(tile, at, stride, MatrixIdent::B, transposed);
            Right::<E>::new_Cmma(x)
        } else {
            // the registers of a right operand are those of its transpose
            let transpose = comptime!(!transposed);
            let quad = load_quad::<E, N>(tile, at, stride, transpose, transposed);
            Right::<E>::new_Mma(halves(&quad, 0usize))
        }
    }

    /// Of the transposes of as many blocks, four pairs each, rounded: no more than the scratch has slots.
    pub fn of_pairs(
        pairs: &Array<Pair<f32>>,
        scratch: &mut Scratch<E>,
        #[comptime] count: usize,
        #[comptime] by: Instruction,
    ) -> Sequence<Self> {
        let mut out = Sequence::<Right<E>>::new();
        if comptime!(by == Instruction::Cmma) {
            let own = (UNIT_POS as usize / 32) * comptime!(scratch.slots.halves * BLOCK);
            #[unroll]
            for n in 0..count {
                #[unroll]
                for i in 0..4usize {
                    let (row, column) = place(i);
                    let at = own + n * BLOCK + row * PITCH + column;
                    scratch.halves[at] = Vector::cast_from(pairs[comptime!(4 * n + i)]);
                }
            }
            sync_plane();
            #[unroll]
            for n in 0..count {
                let at = (own + n * BLOCK) * 2;
                let stride = comptime!(2 * PITCH);
                let halves = &scratch.halves;
                let x = load_matrix::<E, Const<2>>(halves, at, stride, MatrixIdent::B, true);
                out.push(Right::<E>::new_Cmma(x));
            }
            sync_plane();
        } else {
            #[unroll]
            for n in 0..count {
                let mut quad = Array::<Pair<E>>::new(4usize);
                #[unroll]
                for i in 0..4usize {
                    quad[i] = Vector::cast_from(pairs[comptime!(4 * n + 2 * (i % 2) + i / 2)]);
                }
                out.push(Right::<E>::new_Mma(halves(&quad, 0usize)));
            }
        }
        out
    }
}

#[cube]
impl Acc {
    /// Zero.
    pub fn zero(#[comptime] by: Instruction) -> Self {
        if comptime!(by == Instruction::Cmma) {
            Acc::new_Cmma(Matrix::<f32>::from_value(
                MatrixIdent::Accumulator,
                16usize,
                16usize,
                16usize,
                MatrixLayout::Undefined,
                0.0f32,
            ))
        } else {
            Acc::new_Mma(halves(&zero_pairs(4usize), 0usize))
        }
    }

    /// What `add_to` is to add to the four pairs from `first`: with `mma` they are the accumulator.
    pub fn onto(pairs: &Array<Pair<f32>>, first: usize, #[comptime] by: Instruction) -> Self {
        if comptime!(by == Instruction::Cmma) {
            Acc::zero(by)
        } else {
            Acc::new_Mma(halves(pairs, first))
        }
    }

    /// Stores it, rounded, at `(row, col)` of a tile `[.., stride]`; `stride` is even.
    pub fn store<E: Float>(
        &self,
        tile: &mut [E],
        row: usize,
        col: usize,
        #[comptime] stride: usize,
    ) {
        let at = row * stride + col;
        match self {
            Acc::Mma(pairs) => {
                let pairs_of_tile = tile.as_vectorized_mut().with_vector_size_mut::<Const<2>>();
                #[unroll]
                for i in 0..4usize {
                    let (r, pair) = place(i);
                    let own = pairs.index(i / 2)[i % 2];
                    pairs_of_tile[(at + r * stride) / 2 + pair] = Vector::cast_from(own);
                }
            }
            Acc::Cmma(x) => {
                let rounded = cmma::cast::<f32, E, cmma::Plane>(x);
                let len = tile.len();
                let stride = comptime!(stride as u32);
                cmma::store(&mut tile[at..len], &rounded, stride, MatrixLayout::RowMajor);
            }
        }
    }

    /// Writes a matrix of a plane from element `at` of `out` on, its rows, or columns, `stride` apart;
    /// rounded if that is of the operands' type. `at` and `stride` are multiples of 16 bytes. (Nothing
    /// with `mma`, whose outputs are staged.)
    pub fn write<O: Float, W: Size>(
        &self,
        out: &mut [Vector<O, W>],
        at: usize,
        #[comptime] stride: usize,
        #[comptime] by_column: bool,
        #[comptime] rounds: bool,
    ) {
        let layout = comptime!(match by_column {
            true => MatrixLayout::ColMajor,
            false => MatrixLayout::RowMajor,
        });
        let (from, len) = (at / W::value(), out.len());
        match self {
            Acc::Mma(_) => {}
            Acc::Cmma(x) => {
                if rounds {
                    let rounded = cmma::cast::<f32, O, cmma::Plane>(x);
                    cmma::store(&mut out[from..len], &rounded, comptime!(stride as u32), layout);
                } else {
                    cmma::store(&mut out[from..len], x, comptime!(stride as u32), layout);
                }
            }
        }
    }
}

/// Ends what [`Acc::onto`] began: of all `sums`, times `factor`, whose pairs are those from `first` on. With
/// `mma`, whose accumulators hold the pairs already, the factor is one.
#[cube]
pub fn add_to<E: Float>(
    sums: &Sequence<Acc>,
    pairs: &mut Array<Pair<f32>>,
    scratch: &mut Scratch<E>,
    factor: f32,
    #[comptime] first: usize,
    #[comptime] by: Instruction,
) {
    let slots = comptime!(scratch.slots.floats);
    let count = sums.len();
    if comptime!(by == Instruction::Cmma) {
        let own = (UNIT_POS as usize / 32) * comptime!(slots * BLOCK);
        #[unroll]
        for round in 0..comptime!(count.div_ceil(slots)) {
            let left = comptime!((count - round * slots).min(slots));
            #[unroll]
            for n in 0..left {
                let len = scratch.floats.len();
                let to = &mut scratch.floats[own + n * BLOCK..len];
                store_pairs(sums.index(comptime!(round * slots + n)), to);
            }
            sync_plane();
            #[unroll]
            for n in 0..left {
                #[unroll]
                for i in 0..4usize {
                    let (row, column) = place(i);
                    let sum = scratch.floats[own + n * BLOCK + row * PITCH + column];
                    pairs[comptime!(first + 4 * (round * slots + n) + i)] +=
                        sum * Vector::new(factor);
                }
            }
            sync_plane();
        }
    } else {
        #[unroll]
        for n in 0..count {
            match sums.index(n) {
                Acc::Mma(own) =>
                {
                    #[unroll]
                    for i in 0..4usize {
                        pairs[comptime!(first + 4 * n + i)] = own.index(i / 2)[i % 2];
                    }
                }
                Acc::Cmma(_) => {}
            }
        }
    }
}

#[cube]
fn store_pairs(acc: &Acc, to: &mut [Pair<f32>]) {
    match acc {
        Acc::Mma(_) => {}
        Acc::Cmma(x) => cmma::store(to, x, comptime!(2 * PITCH as u32), MatrixLayout::RowMajor),
    }
}

/// `acc += left right`
#[cube]
pub fn multiply<E: Float>(left: &Left<E>, right: &Right<E>, acc: &mut Acc) {
    match acc {
        Acc::Mma(acc) => match left {
            Left::Mma(left) => match right {
                Right::Mma(right) => {
                    let def = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
                    #[unroll]
                    for n in 0..2usize {
                        def.execute_inplace(left, right.index(n), acc.index_mut(n));
                    }
                }
                Right::Cmma(_) => {}
            },
            Left::Cmma(_) => {}
        },
        Acc::Cmma(acc) => match left {
            Left::Cmma(left) => match right {
                Right::Cmma(right) => cmma::execute(left, right, &*acc, &*acc),
                Right::Mma(_) => {}
            },
            Left::Mma(_) => {}
        },
    }
}

/// The four pairs from `first` on.
#[cube]
fn halves<E: Float>(pairs: &Array<Pair<E>>, first: usize) -> Halves<E> {
    let mut out = Halves::<E>::new();
    #[unroll]
    for half in 0..2usize {
        let mut own = Array::<Pair<E>>::new(2usize);
        #[unroll]
        for i in 0..2usize {
            own[i] = pairs[first + comptime!(2 * half + i)];
        }
        out.push(own);
    }
    out
}

/// `count` pairs at zero.
#[cube]
pub fn zero_pairs(#[comptime] count: usize) -> Array<Pair<f32>> {
    let mut pairs = Array::<Pair<f32>>::new(count);
    #[unroll]
    for i in 0..count {
        pairs[i] = Vector::new(0.0f32);
    }
    pairs
}

/// Row of pair `i` of a 16 x 16 block, and the first of its columns.
#[cube]
pub fn pair_position(#[comptime] i: usize) -> (usize, usize) {
    let (row, pair) = place(i);
    (row, 2 * pair)
}
