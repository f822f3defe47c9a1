//! The compile-time choices of the kernels, and what they need from a device.

use cubecl::client::Client;
use cubecl::ir::features::MatmulFeatures;
use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;

use crate::components::{PATCH, PATCH_ROWS, PITCH};
use crate::{GlaError, Problem, reduce, scan};

/// Rows of a sub-chunk: the unit of secondary chunking. Decay is factored between sub-chunks and
/// walked step by step inside one.
pub const SUB: usize = 16;

/// Chunk lengths that exist.
pub const CHUNKS: &[usize] = &[16, 32, 64];

/// Tile widths that exist.
pub const COLS: &[usize] = &[64, 32, 16];

/// Storage buffers that the largest kernel of the split plan and the recurrent one bind, metadata
/// included: WebGPU's guaranteed 8.
pub const MAX_BINDINGS: usize = 8;

/// How tiles are multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Instruction {
    /// f32 multiply-adds, accumulators in the registers of each unit. Runs everywhere.
    Registers,
    /// Tensor cores through `mma.m16n8k16`, f32 accumulators in registers: half precision on CUDA.
    Mma,
    /// Tensor cores through 16 x 16 x 16 matrices of a plane, with accumulators in f32 and f16: f16 on Vulkan,
    /// where a device with planes of 32 has such cooperative matrices, and by request on CUDA.
    Cmma,
}

/// How work between chunks is ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Plan {
    /// The state stays on chip along a sequence.
    Scan,
    /// The state of every chunk is stored, and chunks are worked on in parallel.
    Split,
}

/// What the chunked kernels are compiled with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Blueprint {
    /// Of [`Plan::Scan`].
    Scan(ScanBlueprint),
    /// Of [`Plan::Split`].
    Split(SplitBlueprint),
}

impl Blueprint {
    /// The plan that it is of.
    pub const fn plan(&self) -> Plan {
        match self {
            Blueprint::Scan(_) => Plan::Scan,
            Blueprint::Split(_) => Plan::Split,
        }
    }

    /// The tile instruction.
    pub const fn instruction(&self) -> Instruction {
        match self {
            Blueprint::Scan(blueprint) => blueprint.instruction,
            Blueprint::Split(_) => Instruction::Registers,
        }
    }

    /// Rows of a chunk.
    pub const fn chunk(&self) -> usize {
        match self {
            Blueprint::Scan(_) => SCAN_CHUNK,
            Blueprint::Split(blueprint) => blueprint.chunk,
        }
    }

    /// Rows of a chunk, and chunks that are walked in one go, see [`ScanBlueprint::segment`].
    pub(crate) const fn cut(&self) -> (usize, usize) {
        let segment = match self {
            Blueprint::Scan(blueprint) => blueprint.segment,
            Blueprint::Split(_) => usize::MAX,
        };
        (self.chunk(), segment)
    }

    /// Checks the blueprint against a device and a problem.
    ///
    /// # Errors
    ///
    /// What [`ScanBlueprint::validate`] or [`SplitBlueprint::validate`] returns.
    pub fn validate(&self, problem: &Problem, limits: &DeviceLimits) -> Result<(), GlaError> {
        match self {
            Blueprint::Scan(blueprint) => blueprint.validate(problem, limits),
            Blueprint::Split(blueprint) => blueprint.validate(limits),
        }
    }
}

/// Rows of a chunk of the scan plan.
pub const SCAN_CHUNK: usize = 64;

/// Most key channels that the scan plan takes: its cubes hold the state for all of them.
pub const SCAN_MAX_KEYS: usize = 256;

/// Most segments of a sequence in the scan plan.
pub const MAX_SEGMENTS: usize = 64;

/// Chunks that a segment of the scan plan has at least: shorter ones would not repay the first walk.
pub const LEAST_CHUNKS: usize = 8;

/// Choices of the scan plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ScanBlueprint {
    /// Chunks that are walked in one go. Longer sequences are cut into segments of so many chunks
    /// that are walked in parallel, after a first walk for the states they start from.
    pub segment: usize,
    /// The tile instruction.
    pub instruction: Instruction,
}

impl ScanBlueprint {
    /// Checks the blueprint against a device and a problem.
    ///
    /// # Errors
    ///
    /// [`GlaError::Argument`] that names `plan` where the device does not multiply the type or the keys are
    /// too wide, `instruction` where it is not the device's, `segment` where segments have no chunks or are
    /// too many; [`GlaError::SharedMemory`], [`GlaError::Units`] and [`GlaError::Bindings`] where a kernel does not
    /// fit the device.
    pub fn validate(&self, problem: &Problem, limits: &DeviceLimits) -> Result<(), GlaError> {
        let has = |types: &[ElemType]| types.contains(&problem.dtype);
        if !has(&limits.mma) && !has(&limits.cmma) {
            let message = format!(
                "the scan plan needs tensor cores for {}, the device has none",
                problem.dtype
            );
            return Err(GlaError::Argument { name: "plan", message });
        }
        let multiplies = match self.instruction {
            Instruction::Registers => false,
            Instruction::Mma => has(&limits.mma),
            Instruction::Cmma => has(&limits.cmma),
        };
        if !multiplies {
            let message = format!(
                "the scan plan does not multiply {} with {:?} on this device",
                problem.dtype, self.instruction
            );
            return Err(GlaError::Argument { name: "instruction", message });
        }
        if problem.dims.key_dim > SCAN_MAX_KEYS {
            let (got, most) = (problem.dims.key_dim, SCAN_MAX_KEYS);
            let message = format!("the scan plan takes at most {most} key channels, got {got}");
            return Err(GlaError::Argument { name: "plan", message });
        }
        scan::validate(problem.dims, self.instruction, limits)?;
        check_segment(problem, self.segment)
    }
}

/// Checks that a sequence has no more segments, of so many chunks, than can be combined.
fn check_segment(problem: &Problem, segment: usize) -> Result<(), GlaError> {
    if segment == 0 {
        let message = "must be at least 1 chunk, got 0".to_string();
        return Err(GlaError::Argument { name: "segment", message });
    }
    let chunks = problem.sequences.longest().div_ceil(SCAN_CHUNK);
    if chunks.div_ceil(segment) > MAX_SEGMENTS {
        let message = format!(
            "{chunks} chunks in segments of {segment}: a sequence has at most {MAX_SEGMENTS}"
        );
        return Err(GlaError::Argument { name: "segment", message });
    }
    Ok(())
}

/// Choices of the split plan, which multiplies in registers.
///
/// A unit owns 16 rows of one column, `chunk / 16 * cols` units a cube (`scores`: `chunk / 16 * chunk`), or in
/// `chunk_state`, `output` and `project` a patch of 8 x 4, half as many units.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SplitBlueprint {
    /// Rows of a chunk, one of [`CHUNKS`]. Also the key channels of a state tile.
    pub chunk: usize,
    /// Columns of an output tile, one of [`COLS`].
    pub cols: usize,
}

/// The limits of a device that decide what fits.
#[derive(Clone, Debug)]
pub struct DeviceLimits {
    /// Bytes of shared memory a cube may use.
    pub shared_memory: usize,
    /// Units a cube may have.
    pub units: usize,
    /// Storage buffers a kernel may bind.
    pub bindings: usize,
    /// Cubes along the first two axes of a launch.
    pub cubes: (u32, u32),
    /// Multiprocessors, or cores of a CPU; where the device does not tell (wgpu), those of a large one: too many
    /// cubes cost less than too few.
    pub processors: usize,
    /// Of f16 and bf16, those that `mma.m16n8k16` multiplies into f32, with matrix loads from shared memory.
    /// Empty where planes are not all of 32 units.
    pub mma: Vec<ElemType>,
    /// Of f16 and bf16, those that 16 x 16 x 16 matrices of a plane multiply, with accumulators in f32 and in
    /// the type itself. Empty where planes are not all of 32 units, and on every run time but SPIR-V and, where
    /// there is `mma` too, CUDA: the kernels were compared with the reference there alone.
    pub cmma: Vec<ElemType>,
    /// Whether a number that is stored in bf16 is known to be rounded to the nearest: on CUDA, which was compared with
    /// the reference. SPIR-V leaves it to the driver, and NVIDIA's cuts off what does not fit.
    pub rounds_bf16: bool,
}

impl DeviceLimits {
    /// Checks that the device binds as many buffers as the kernels need.
    ///
    /// # Errors
    ///
    /// [`GlaError::Bindings`] if not.
    pub fn check_bindings(&self, requested: usize) -> Result<(), GlaError> {
        match self.bindings {
            available if requested > available => Err(GlaError::Bindings { requested, available }),
            _ => Ok(()),
        }
    }

    /// Checks that a cube has as much shared memory as a kernel needs.
    ///
    /// # Errors
    ///
    /// [`GlaError::SharedMemory`] if not.
    pub fn check_shared_memory(
        &self,
        kernel: &'static str,
        requested: usize,
    ) -> Result<(), GlaError> {
        match self.shared_memory {
            available if requested > available => {
                Err(GlaError::SharedMemory { kernel, requested, available })
            }
            _ => Ok(()),
        }
    }

    /// Checks that a cube may have as many units as a kernel needs.
    ///
    /// # Errors
    ///
    /// [`GlaError::Units`] if not.
    pub fn check_units(&self, kernel: &'static str, requested: usize) -> Result<(), GlaError> {
        match self.units {
            available if requested > available => {
                Err(GlaError::Units { kernel, requested, available })
            }
            _ => Ok(()),
        }
    }

    /// Reads them off a device.
    pub fn of(client: &Client) -> Self {
        let hardware = &client.properties().hardware;
        DeviceLimits {
            shared_memory: hardware.max_shared_memory_size,
            units: hardware.max_units_per_cube as usize,
            bindings: hardware.max_bindings as usize,
            cubes: (hardware.max_cube_count.0, hardware.max_cube_count.1),
            processors: hardware
                .num_streaming_multiprocessors
                .or(hardware.num_cpu_cores)
                .unwrap_or(128) as usize,
            mma: tensor_types(client, has_mma),
            // compared with the reference on these alone, on CUDA with compute capability 9.0. (An adapter
            // opened for WGSL in a build that has SPIR-V cannot be told from one opened for SPIR-V; there,
            // kernels do not compile.)
            cmma: match client.name() {
                "wgpu<spirv>" => tensor_types(client, has_cmma),
                "cuda" => tensor_types(client, |matmul, elem| {
                    has_mma(matmul, elem) && has_cmma(matmul, elem)
                }),
                _ => Vec::new(),
            },
            rounds_bf16: client.name() == "cuda",
        }
    }
}

fn tensor_types(client: &Client, has: fn(&MatmulFeatures, ElemType) -> bool) -> Vec<ElemType> {
    let hardware = &client.properties().hardware;
    let planes_of_32 = hardware.plane_size_min == 32 && hardware.plane_size_max == 32;
    let types = [ElemType::Float(FloatKind::F16), ElemType::Float(FloatKind::BF16)];
    let matmul = &client.features().matmul;
    types.into_iter().filter(|&elem| planes_of_32 && has(matmul, elem)).collect()
}

fn has_mma(matmul: &MatmulFeatures, elem: ElemType) -> bool {
    matmul.ldmatrix.contains(&elem)
        && matmul.mma.iter().any(|mma| {
            (mma.a_type, mma.b_type, mma.cd_type) == (elem, elem, f32::elem_type_native())
                && (mma.m, mma.n, mma.k) == (16, 8, 16)
        })
}

fn has_cmma(matmul: &MatmulFeatures, elem: ElemType) -> bool {
    let has = |cd_type: ElemType| {
        matmul.cmma.iter().any(|mma| {
            (mma.a_type, mma.b_type, mma.cd_type) == (elem, elem, cd_type)
                && (mma.m, mma.n, mma.k) == (16, 16, 16)
        })
    };
    // accumulators are stored rounded as well
    has(f32::elem_type_native()) && has(elem)
}

/// Who chooses the blueprint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Strategy {
    /// From the problem and the device.
    #[default]
    Inferred,
    /// Chunks of so many rows, one of [`CHUNKS`]. 64, the scan plan's own length, is the scan plan where
    /// that runs and else the split plan; 16 and 32 are the split plan.
    Chunk(usize),
    /// As inferred, with this plan.
    Plan(Plan),
    /// The caller.
    Forced(Blueprint),
}

impl SplitBlueprint {
    /// Sub-chunks of a chunk.
    pub const fn blocks(&self) -> usize {
        self.chunk / SUB
    }

    /// Units of a cube of `prepare` and `intra_grad`, each with 16 rows of a column.
    pub const fn units(&self) -> usize {
        self.blocks() * self.cols
    }

    /// Units of a cube of `chunk_state`, `output` and `project`, each with a patch.
    pub const fn patch_units(&self) -> usize {
        self.chunk * self.cols / PATCH
    }

    /// Shared memory of each kernel in bytes.
    pub const fn shared_memory(&self) -> [(&'static str, usize); 6] {
        let (chunk, cols, blocks) = (self.chunk, self.cols, self.blocks());
        [
            ("prepare", 4 * blocks * cols),
            ("chunk_state", 4 * (PITCH * chunk + SUB * cols)),
            ("scores", 4 * (3 * PITCH * chunk + SUB * blocks)),
            ("output", 4 * (PITCH * chunk + SUB * cols)),
            (
                "project",
                4 * (PITCH * chunk + 2 * SUB * (cols + 4) + chunk / PATCH_ROWS * cols + cols),
            ),
            ("intra_grad", 4 * (chunk * cols + PITCH * chunk + (2 + blocks) * blocks * cols)),
        ]
    }

    /// Checks the blueprint against a device.
    ///
    /// # Errors
    ///
    /// [`GlaError::Chunk`] and [`GlaError::Cols`] for lengths and widths that do not exist,
    /// [`GlaError::SharedMemory`], [`GlaError::Units`] and [`GlaError::Bindings`] where a kernel does not fit
    /// the device.
    pub fn validate(&self, limits: &DeviceLimits) -> Result<(), GlaError> {
        if !CHUNKS.contains(&self.chunk) {
            return Err(GlaError::Chunk { allowed: CHUNKS, got: self.chunk });
        }
        if !COLS.contains(&self.cols) {
            return Err(GlaError::Cols { allowed: COLS, got: self.cols });
        }
        for (kernel, requested) in self.shared_memory() {
            limits.check_shared_memory(kernel, requested)?;
        }
        limits.check_units("scores", self.blocks() * self.chunk)?;
        limits.check_units("intra_grad", self.units())?;
        limits.check_units("reduce", reduce::UNITS)?;
        limits.check_bindings(MAX_BINDINGS)
    }
}
