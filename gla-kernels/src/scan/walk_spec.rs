//! What a walk is compiled for: its operands and its tiles.

use super::intra::BLOCK_PAIRS;
use super::stage::{DecayLine, Factors, Stage};
use super::{CHUNK, padded};
use crate::components::Slots;
use crate::{DeviceLimits, Dims, GateKind, Instruction};

/// Which side of the state the key channels, and with them the decay, lie on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KeyAxis {
    /// The depth: `o` and `dv`.
    Depth,
    /// The columns: `dq` and `dk`.
    Columns,
}

/// The order of the chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// First to last: `o` and `dq`.
    Forward,
    /// Last to first: `dv` and `dk`.
    Backward,
    /// As an argument says: the kernel is compiled once for both.
    Told,
}

impl Direction {
    /// `shares`: whether one kernel for both is worth it. With fewer key heads they are always two.
    fn of(dims: Dims, reversed: bool, shares: bool) -> Self {
        match (shares && dims.heads == dims.kv_heads, reversed) {
            (true, _) => Direction::Told,
            (false, false) => Direction::Forward,
            (false, true) => Direction::Backward,
        }
    }
}

/// Where the decay lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Decay {
    /// There is none: the operands are queries and keys as they are, and `scale` is yet to come.
    None,
    /// In the rows. The operands are as without; a line of the decays holds, for the rows of a chunk,
    /// `scale` times the decay from its start through the row, that from after the row to its end,
    /// and at [`TOTAL`] that of all.
    Rows,
    /// In the key channels. The operands hold it; a line of the decays is that of the whole chunk.
    Channels,
}

impl Decay {
    /// Of a gate.
    pub fn of(gate: GateKind) -> Self {
        match gate {
            GateKind::None => Decay::None,
            GateKind::Fixed | GateKind::Scalar => Decay::Rows,
            GateKind::Vector => Decay::Channels,
        }
    }

    /// The factors of the chunk's rows in an update of the state: their decay to the end of the chunk, or the
    /// scale, which in a call without a gate no operand holds, backward (1 forward, in a kernel that is told).
    pub fn of_rows(self, direction: Direction) -> Factors {
        match (self, direction) {
            (Decay::Rows, _) => Factors::Rows,
            (Decay::Channels, _) | (Decay::None, Direction::Forward) => Factors::None,
            (Decay::None, Direction::Backward | Direction::Told) => Factors::Scale,
        }
    }
}

/// Where the rows' decays have that of the whole chunk.
pub const TOTAL: usize = 2 * CHUNK;

/// Length of a line of the rows' decays: a multiple of four.
pub const ROWS_LEN: usize = TOTAL + 4;

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
    /// Heads of `probe`.
    pub probe_heads: usize,
    /// Width of `left` and `update`.
    pub depth_width: usize,
    /// Width of `right` and `out`.
    pub width: usize,
    /// Depth that a plane owns, a multiple of 16.
    pub plane_depth: usize,
    /// Planes that share the depth of a cube.
    pub depth_planes: usize,
    /// Planes that share its columns.
    pub column_planes: usize,
    /// Cubes that share the depth; each writes its own part of the output.
    pub parts: usize,
    /// Key channels `K` and value channels `V` of the state `[lines, H, K, V]`.
    pub state: (usize, usize),
    /// Width of the products for `dg`.
    pub padded: usize,
    /// Where the decay lies.
    pub decay: Decay,
    /// Where the key channels are.
    pub keys: KeyAxis,
    /// The order of the chunks.
    pub direction: Direction,
    /// Whether the output has the intra-chunk matrix: forward `A`, lower triangular, backward `A^T`.
    pub intra: bool,
    /// Whether the products of states and their gradients are formed, for `dg`: backward the states before
    /// each chunk are written, forward they are read, and multiplied with the own.
    pub traced: bool,
    /// Whether the rows of `left state` are multiplied with those of `probe`: for `dg` as well.
    pub dots: bool,
    /// Whether `dg` sees the state in twice the precision of the operands. The gradient of a fixed gate
    /// is one number a head, what is left of the terms of all its rows: rounding would show.
    pub precise: bool,
    /// The tile instruction.
    pub instruction: Instruction,
}

/// Depth that a cube holds at most.
const fn max_depth(instruction: Instruction) -> usize {
    match instruction {
        // one plane has it all
        Instruction::Cmma => 128,
        _ => 256,
    }
}

/// Depth that a plane holds at most, and columns of a cube in planes. The third makes the most cubes,
/// those after it take less and less shared memory.
const TILES: &[(usize, usize)] = &[(128, 4), (64, 4), (64, 2), (128, 2), (128, 1)];

/// The same for [`Instruction::Cmma`], where planes do not share a depth.
const MATRIX_TILES: &[(usize, usize)] = &[(128, 8), (128, 4), (128, 2), (128, 1)];

/// What a walk depends on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WalkShape {
    /// Heads, widths and gate kind.
    pub dims: Dims,
    /// The tile instruction.
    pub instruction: Instruction,
    /// Walks for each head: sequences, or segments.
    pub count: usize,
    /// Multiprocessors of the device.
    pub processors: usize,
    /// Bytes of shared memory that a cube may use.
    pub shared_memory: usize,
    /// Units that a cube may have.
    pub units: usize,
    /// Last chunk first.
    pub reversed: bool,
    /// Whether the walks go along segments, whose states other kernels find first.
    pub segmented: bool,
}

impl WalkShape {
    /// `count` walks for each head on a device, along sequences.
    pub fn new(
        dims: Dims,
        instruction: Instruction,
        limits: &DeviceLimits,
        count: usize,
        reversed: bool,
    ) -> Self {
        WalkShape {
            dims,
            instruction,
            count,
            processors: limits.processors,
            shared_memory: limits.shared_memory,
            units: limits.units,
            reversed,
            segmented: false,
        }
    }
}

impl WalkSpec {
    /// The walk for `o`, or `dv` if `reversed`.
    pub fn values(shape: WalkShape) -> Self {
        Self::chosen(shape, Self::values_with)
    }

    /// The walk for `dq`, or `dk` if `reversed`.
    pub fn keys(shape: WalkShape) -> Self {
        Self::chosen(shape, Self::keys_with)
    }

    /// The widest tile with enough cubes for the device among those that fit it; measured, see the
    /// log of the benches.
    fn chosen(shape: WalkShape, make: impl Fn(WalkShape, (usize, usize)) -> Self) -> Self {
        let tiles = match shape.instruction {
            Instruction::Cmma => MATRIX_TILES,
            _ => TILES,
        };
        let specs: Vec<_> = tiles.iter().map(|&tile| make(shape, tile)).collect();
        let fits = |spec: &&WalkSpec| {
            spec.shared_memory() <= shape.shared_memory && spec.units() <= shape.units
        };
        let enough = |spec: &&WalkSpec| {
            let cubes = shape.count * spec.heads * spec.parts * spec.tiles();
            // with the depth in one or two planes a processor takes two cubes. With `Cmma`, whose cubes take
            // their time for what they stage, wider ones are still better
            let two = spec.plane_depth > 64 && spec.instruction != Instruction::Cmma;
            let wanted = match two {
                true => 3 * shape.processors / 2,
                false => 7 * shape.processors / 8,
            };
            cubes >= wanted
        };
        let first = specs[..3].iter().filter(fits).find(enough);
        *first.or(specs[2..].iter().find(fits)).unwrap_or(&specs[specs.len() - 1])
    }

    fn values_with(shape: WalkShape, tile: (usize, usize)) -> Self {
        let WalkShape { dims, reversed, segmented, .. } = shape;
        let [q, k, depth] = operands(dims);
        let shares = match Decay::of(dims.gate) {
            // the branch on `A` or `A^T` keeps the compiler from reading the next chunk early: with scalar and
            // fixed gates a short walk takes up to a tenth longer, one along segments, of which a call
            // compiles more, a fiftieth; a vector gate's takes as long as without
            Decay::None | Decay::Rows => segmented,
            Decay::Channels => true,
        };
        WalkSpec {
            left_heads: if reversed { k } else { q },
            update_heads: if reversed { q } else { k },
            right_heads: if reversed { dims.heads } else { dims.kv_heads },
            keys: KeyAxis::Depth,
            direction: Direction::of(dims, reversed, shares),
            intra: true,
            ..Self::tiled(shape, tile, depth, dims.value_dim)
        }
    }

    fn keys_with(shape: WalkShape, tile: (usize, usize)) -> Self {
        let WalkShape { dims, reversed, segmented, .. } = shape;
        let [q, k, width] = operands(dims);
        let decay = Decay::of(dims.gate);
        let tiled = Self::tiled(shape, tile, dims.value_dim, width);
        // the sums for `dots` leave no registers for both directions, nor do cubes of more units; without a
        // gate as for the values
        let shares = tiled.units() <= 256
            && match decay {
                Decay::None => segmented,
                Decay::Rows => false,
                Decay::Channels => true,
            };
        WalkSpec {
            left_heads: if reversed { dims.kv_heads } else { dims.heads },
            update_heads: if reversed { dims.heads } else { dims.kv_heads },
            right_heads: if reversed { q } else { k },
            probe_heads: if reversed { k } else { q },
            keys: KeyAxis::Columns,
            direction: Direction::of(dims, reversed, shares),
            intra: decay != Decay::Channels,
            traced: decay != Decay::None,
            dots: decay == Decay::Rows,
            precise: dims.gate == GateKind::Fixed,
            ..tiled
        }
    }

    /// Tiles for a depth and a width; the operands are still to be told.
    fn tiled(shape: WalkShape, tile: (usize, usize), depth: usize, width: usize) -> Self {
        let parts = depth.div_ceil(max_depth(shape.instruction));
        let part_depth = depth.div_ceil(parts);
        let depth_planes = part_depth.div_ceil(tile.0);
        WalkSpec {
            heads: shape.dims.heads,
            left_heads: 0,
            update_heads: 0,
            right_heads: 0,
            probe_heads: 1,
            depth_width: depth,
            width,
            plane_depth: part_depth.div_ceil(depth_planes).next_multiple_of(16),
            depth_planes,
            column_planes: width.div_ceil(16).min(tile.1),
            parts,
            state: (shape.dims.key_dim, shape.dims.value_dim),
            padded: padded(shape.dims),
            decay: Decay::of(shape.dims.gate),
            keys: KeyAxis::Depth,
            direction: Direction::of(shape.dims, shape.reversed, false),
            intra: false,
            traced: false,
            dots: false,
            precise: false,
            instruction: shape.instruction,
        }
    }

    /// Depth of a cube.
    pub const fn depth(&self) -> usize {
        self.plane_depth * self.depth_planes
    }

    /// Columns of a cube.
    pub const fn columns(&self) -> usize {
        16 * self.column_planes
    }

    /// Units of a cube.
    pub const fn units(&self) -> usize {
        32 * self.column_planes * self.depth_planes
    }

    /// Column tiles.
    pub const fn tiles(&self) -> usize {
        self.width.div_ceil(self.columns())
    }

    /// Sums that a walk forward leaves for each key channel, if `traced`.
    pub const fn shares(&self) -> usize {
        self.parts * self.depth_planes
    }

    /// Shares of the rows' products with `probe`.
    pub const fn dot_shares(&self) -> usize {
        self.parts * self.tiles()
    }

    /// Numbers that a walk backward leaves of a unit.
    pub const fn traces(&self) -> usize {
        self.plane_depth / if self.precise { 1 } else { 2 }
    }

    /// Numbers that it leaves of one chunk and head.
    pub const fn trace_len(&self) -> usize {
        self.tiles() * self.parts * self.traces() * self.units()
    }

    /// Whether the output is `[channels, rows]` of each chunk, for `intra_grad`.
    pub fn by_channel(&self) -> bool {
        self.keys == KeyAxis::Columns && self.decay == Decay::Channels
    }

    /// Whether the state takes the scale as an operand: in walks forward whose operands hold none. (In
    /// those backward the update takes it, or the queries hold it; a line of rows' decays holds it.)
    pub fn scales_state(&self) -> bool {
        let held = self.decay == Decay::Channels && self.keys == KeyAxis::Depth;
        self.direction != Direction::Backward && self.decay != Decay::Rows && !held
    }

    /// Elements of the output for so many rows and chunks.
    pub fn out_len(&self, rows: usize, chunks: usize) -> usize {
        let lines = if self.by_channel() { chunks * CHUNK } else { rows };
        self.parts * lines * self.heads * self.width
    }

    /// Length of a line of the decays.
    pub fn decay_stride(&self) -> usize {
        if self.decay == Decay::Rows { ROWS_LEN } else { self.padded }
    }

    /// Decays that a cube reads of a chunk.
    pub fn decay_len(&self) -> usize {
        match (self.decay, self.keys) {
            (Decay::None, _) => 1,
            (Decay::Rows, _) => ROWS_LEN,
            (Decay::Channels, KeyAxis::Depth) => self.depth(),
            (Decay::Channels, KeyAxis::Columns) => self.columns(),
        }
    }

    /// The piece of a chunk's decays that a cube reads.
    pub fn decay_line(&self) -> DecayLine {
        DecayLine {
            heads: self.heads,
            stride: self.decay_stride(),
            len: self.decay_len(),
            units: self.units(),
            gated: self.decay != Decay::None,
        }
    }

    /// Bytes of shared memory.
    pub fn shared_memory(&self) -> usize {
        let deep = self.left_len() + self.update_len();
        let wide = CHUNK * (self.columns() + 8);
        let floats = self.out_tile_len() + self.dots_len() + self.decay_tiles() * self.decay_len();
        let scratch = self.slots().bytes(self.units() / 32, self.least_halves(), self.instruction);
        2 * (deep + wide + self.pairs_len()) + 4 * floats + scratch
    }

    /// Whether `update` and the intra-chunk matrix take the places of `left` and of the scratch when those
    /// have been used: where shared memory is short.
    pub fn takes_turns(&self) -> bool {
        self.instruction == Instruction::Cmma
    }

    /// Elements of an own tile of the intra-chunk matrix.
    pub fn pairs_len(&self) -> usize {
        let own = self.intra && !self.takes_turns();
        if own { CHUNK * (CHUNK + 8) } else { 8 }
    }

    /// Blocks in the scratch of a plane.
    pub fn slots(&self) -> Slots {
        let terms = if self.precise { 2 } else { 1 };
        match self.takes_turns() && self.column_planes <= 4 {
            true => Slots { floats: 2, halves: 4 },
            // as few as there are: of wide cubes shared memory is full, and `mma` passes nothing through it
            false => Slots { floats: 1, halves: terms },
        }
    }

    /// Pairs of the scratch at least: it has the intra-chunk matrix too where tiles take turns.
    pub fn least_halves(&self) -> usize {
        if self.intra { BLOCK_PAIRS } else { 0 }
    }

    /// Pieces of decays in shared memory: this chunk's, and the next one's where no barrier ends a chunk.
    pub fn decay_tiles(&self) -> usize {
        if self.takes_turns() { 1 } else { 2 }
    }

    /// The factors that `update` takes on its way to shared memory. They belong to the rows of the queries or
    /// keys: small gradients times a scale would be subnormal in f16. Those are `update` where the keys are
    /// deep, else `right`, which takes them on its way to the product, see [`WalkSpec::of_right`]. Where tiles
    /// take turns `right` is in the intra-chunk product too, and `update` takes them all the same.
    pub fn of_update(&self) -> Factors {
        match self.takes_turns() || self.keys == KeyAxis::Depth {
            true => self.of_rows(),
            false => Factors::None,
        }
    }

    fn of_rows(&self) -> Factors {
        self.decay.of_rows(self.direction)
    }

    /// Those that `right` takes.
    pub fn of_right(&self) -> Factors {
        match self.of_update() {
            Factors::None => self.of_rows(),
            _ => Factors::None,
        }
    }

    /// Whether the power of two next to a scale that `update` takes is left to the products, when they are
    /// added to the state: where they are added, for `update` may be a small gradient.
    pub fn splits_scale(&self) -> bool {
        self.takes_turns()
            && self.direction != Direction::Forward
            && self.of_update() != Factors::None
    }

    /// The decays of its rows that `left` takes on its way to shared memory. Else the outputs take them, for
    /// which matrices have to become pairs; the dot products want them so anyway.
    pub fn of_left(&self) -> Factors {
        match self.takes_turns() && self.decay == Decay::Rows && !self.dots {
            true => Factors::Rows,
            false => Factors::None,
        }
    }

    /// Shares of the planes in `dots`.
    pub fn dots_len(&self) -> usize {
        if self.dots { CHUNK * self.units() / 32 } else { 1 }
    }

    /// Elements of the tile of `left`, and of `update` if they take turns.
    pub fn left_len(&self) -> usize {
        CHUNK * (self.depth() + 8)
    }

    /// Elements of the tile of `update`.
    pub fn update_len(&self) -> usize {
        if self.takes_turns() { 8 } else { CHUNK * (self.depth() + 8) }
    }

    /// Whether outputs are added up and written from shared memory: where there is room. Else a plane has
    /// all of the depth and writes them itself.
    pub fn stages_out(&self) -> bool {
        !self.takes_turns()
    }

    /// Numbers from a line of staged outputs to the next, so that the stores of a plane meet in no bank.
    pub fn out_stride(&self) -> usize {
        if self.by_channel() { CHUNK + 4 } else { self.columns() + 8 }
    }

    /// Numbers of the staged outputs.
    pub fn out_tile_len(&self) -> usize {
        let lines = if self.by_channel() { self.columns() } else { CHUNK };
        if self.stages_out() { self.depth_planes * lines * self.out_stride() } else { 4 }
    }

    /// Numbers of the output that are written at once, of lines that `most` divides.
    pub fn out_vector(&self, most: usize) -> usize {
        match (self.stages_out(), self.by_channel()) {
            (true, true) => 4,
            (true, false) => most.min(4),
            (false, true) => 4,
            (false, false) => most.min(2),
        }
    }

    pub fn stage(&self, own_heads: usize, width: usize, cols: usize) -> Stage {
        Stage::new(self.heads, own_heads, width, cols, self.units())
    }
}

/// Heads of the queries and the keys that are walked, and their width: the plan's own for a vector
/// gate, else the inputs themselves.
pub(super) fn operands(dims: Dims) -> [usize; 3] {
    match Decay::of(dims.gate) {
        Decay::Channels => [dims.heads, dims.heads, padded(dims)],
        _ => [dims.heads, dims.kv_heads, dims.key_dim],
    }
}

#[cfg(test)]
mod tests {
    use cubecl::ir::{ElemType, FloatKind};

    use super::*;
    use crate::scan::state_walk::StateSpec;

    fn dims(gate: GateKind) -> Dims {
        Dims { heads: 4, kv_heads: 4, key_dim: 256, value_dim: 512, gate }
    }

    fn limits(shared_memory: usize) -> DeviceLimits {
        DeviceLimits {
            shared_memory,
            units: 1024,
            bindings: 32,
            cubes: (65535, 65535),
            processors: 132,
            mma: vec![],
            rounds_bf16: true,
            cmma: vec![ElemType::Float(FloatKind::F16)],
        }
    }

    #[test]
    fn matrices_take_wide_cubes_where_there_are_enough() {
        let (dims, limits) = (dims(GateKind::Vector), limits(48 << 10));
        let planes = |count, reversed| {
            let shape = WalkShape::new(dims, Instruction::Cmma, &limits, count, reversed);
            let (values, keys) = (WalkSpec::values(shape), WalkSpec::keys(shape));
            assert!(values.shared_memory().max(keys.shared_memory()) <= limits.shared_memory);
            (values.column_planes, keys.column_planes)
        };
        assert_eq!((planes(8, false), planes(8, true)), ((8, 8), (8, 8)));
        assert_eq!(planes(1, false), (2, 2), "more cubes, of fewer planes");
    }

    #[test]
    fn both_directions_have_one_spec() {
        let limits = limits(227 << 10);
        let shared = |dims: Dims, instruction, segmented: bool| {
            let shape = |reversed| WalkShape {
                segmented,
                ..WalkShape::new(dims, instruction, &limits, 16, reversed)
            };
            let (forward, backward) = (shape(false), shape(true));
            [
                StateSpec::new(forward) == StateSpec::new(backward),
                WalkSpec::values(forward) == WalkSpec::values(backward),
                WalkSpec::keys(forward) == WalkSpec::keys(backward),
            ]
        };
        for instruction in [Instruction::Mma, Instruction::Cmma] {
            for gate in [GateKind::None, GateKind::Fixed, GateKind::Scalar, GateKind::Vector] {
                let (vector, rows) = (gate == GateKind::Vector, Decay::of(gate) == Decay::Rows);
                let shared = |segmented| shared(dims(gate), instruction, segmented);
                assert_eq!(shared(true), [true, true, !rows], "{instruction:?} {gate:?}");
                assert_eq!(shared(false)[1..], [vector, vector], "{instruction:?} {gate:?}, whole");
            }
            let grouped = Dims { kv_heads: 2, ..dims(GateKind::Vector) };
            assert_eq!(shared(grouped, instruction, true), [false; 3], "key heads of their own");
        }
        let wide = Dims { key_dim: 128, value_dim: 256, ..dims(GateKind::Vector) };
        assert_eq!(shared(wide, Instruction::Mma, true), [true, true, false], "512 units");
    }
}
