//! From a problem, a strategy and a device to a blueprint.

use crate::{
    Blueprint, CHUNKS, COLS, DeviceLimits, GlaError, Instruction, LEAST_CHUNKS, MAX_SEGMENTS, Plan,
    Problem, SCAN_CHUNK, ScanBlueprint, SplitBlueprint, Strategy,
};

/// Chooses the blueprint: the scan plan where the device multiplies the type on tensor cores, else
/// the split plan.
///
/// # Errors
///
/// What [`Blueprint::validate`] returns of a blueprint that was forced, of the scan plan if it was asked for,
/// and of the split plan if no choice of its tiles fits the device: then of the first choice.
pub fn select(
    strategy: Strategy,
    problem: &Problem,
    limits: &DeviceLimits,
) -> Result<Blueprint, GlaError> {
    let scan = Blueprint::Scan(scan_blueprint(problem, limits));
    match strategy {
        Strategy::Forced(blueprint) => {
            blueprint.validate(problem, limits)?;
            Ok(blueprint)
        }
        Strategy::Plan(Plan::Scan) => {
            scan.validate(problem, limits)?;
            Ok(scan)
        }
        Strategy::Inferred | Strategy::Chunk(SCAN_CHUNK)
            if scan.validate(problem, limits).is_ok() =>
        {
            Ok(scan)
        }
        Strategy::Inferred | Strategy::Plan(Plan::Split) => split(problem, None, limits),
        Strategy::Chunk(chunk) => split(problem, Some(chunk), limits),
    }
}

/// Sequences in one piece if they make enough cubes to keep the device busy, else cut so that they do.
fn scan_blueprint(problem: &Problem, limits: &DeviceLimits) -> ScanBlueprint {
    let cubes = problem.num_sequences() * problem.dims.heads * problem.dims.value_dim.div_ceil(64);
    let chunks = problem.sequences.longest().div_ceil(SCAN_CHUNK);
    let wanted =
        if 5 * cubes >= 3 * limits.processors { 1 } else { 2 * limits.processors / cubes.max(1) };
    // as many as are wanted, if they have enough chunks each
    let segments = wanted.clamp(1, (chunks / LEAST_CHUNKS).clamp(1, MAX_SEGMENTS));
    let segment = chunks.div_ceil(segments).max(1);
    let mma = ScanBlueprint { segment, instruction: Instruction::Mma };
    let cmma = ScanBlueprint { segment, instruction: Instruction::Cmma };
    let fits = |blueprint: &ScanBlueprint| blueprint.validate(problem, limits).is_ok();
    let has_mma = limits.mma.contains(&problem.dtype);
    // of two that do not fit, the one that the device has says why
    [mma, cmma].into_iter().find(fits).unwrap_or(if has_mma { mma } else { cmma })
}

/// The shortest chunk that holds the longest sequence, else the longest one; tiles as wide as the
/// heads need; both shrink until the device has room.
fn split(
    problem: &Problem,
    chunk: Option<usize>,
    limits: &DeviceLimits,
) -> Result<Blueprint, GlaError> {
    let (dims, longest) = (problem.dims, problem.sequences.longest());
    let widest = dims.key_dim.max(dims.value_dim);
    let cols = [16, 32].into_iter().find(|&cols| widest <= cols).unwrap_or(64);
    let wanted = CHUNKS.iter().copied().find(|&chunk| longest <= chunk);
    let wanted = wanted.unwrap_or(CHUNKS[CHUNKS.len() - 1]);
    let choices = if chunk.is_some() { 1 } else { CHUNKS.len() };
    let first = (chunk.unwrap_or(wanted), cols);
    shrink(first, choices, limits).map(Blueprint::Split)
}

/// The first of the blueprints that fits: narrower tiles before shorter chunks.
fn shrink(
    first: (usize, usize),
    chunk_choices: usize,
    limits: &DeviceLimits,
) -> Result<SplitBlueprint, GlaError> {
    let mut error = None;
    for halvings in 0..chunk_choices {
        for &cols in COLS {
            let chunk = first.0 >> halvings;
            if cols > first.1 {
                continue;
            }
            let candidate = SplitBlueprint { chunk, cols };
            match candidate.validate(limits) {
                Ok(()) => return Ok(candidate),
                Err(e) => error = error.or(Some(e)),
            }
        }
    }
    Err(error.unwrap_or(GlaError::Chunk { allowed: CHUNKS, got: first.0 }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Dims, GateKind, Sequences};
    use cubecl::ir::{ElemType, FloatKind};

    fn problem(time: usize, key_dim: usize, value_dim: usize) -> Problem {
        Problem {
            dims: Dims { heads: 4, kv_heads: 4, key_dim, value_dim, gate: GateKind::Vector },
            sequences: Sequences::Uniform { batch: 1, time },
            scale: 1.0,
            dtype: ElemType::Float(FloatKind::F32),
            gate_dtype: ElemType::Float(FloatKind::F32),
        }
    }

    fn limits(shared_memory: usize, units: usize) -> DeviceLimits {
        DeviceLimits {
            shared_memory,
            units,
            bindings: 32,
            cubes: (65535, 65535),
            processors: 132,
            mma: vec![],
            cmma: vec![],
            rounds_bf16: true,
        }
    }

    #[test]
    fn tiles_follow_the_problem_and_the_device() {
        let big = limits(48 << 10, 1024);
        let choose =
            |t, k, v, l: &DeviceLimits| match select(Strategy::Inferred, &problem(t, k, v), l)
                .unwrap()
            {
                Blueprint::Split(bp) => (bp.chunk, bp.cols),
                scan => panic!("{scan:?}"),
            };
        assert_eq!(choose(2048, 128, 256, &big), (64, 64));
        assert_eq!(choose(10, 16, 20, &big), (16, 32));
        assert_eq!(choose(2048, 128, 256, &limits(16 << 10, 256)), (64, 32));
        assert_eq!(choose(2048, 128, 256, &limits(16 << 10, 128)), (32, 64));
    }

    #[test]
    fn tiles_fit_the_least_webgpu() {
        let most = |chunk, cols| {
            let blueprint = SplitBlueprint { chunk, cols };
            let (_, bytes) = blueprint.shared_memory().into_iter().max_by_key(|x| x.1).unwrap();
            (bytes, blueprint.units())
        };
        assert_eq!(most(64, 64), (27_648, 256));
        assert_eq!(most(64, 32), (16 << 10, 128));
    }

    #[test]
    fn long_sequences_of_few_heads_are_cut() {
        let half = ElemType::Float(FloatKind::BF16);
        let device = DeviceLimits { mma: vec![half], ..limits(227 << 10, 1024) };
        let cut = |batch, time| {
            let sequences = Sequences::Uniform { batch, time };
            let problem = Problem { sequences, dtype: half, ..problem(time, 128, 256) };
            let blueprint = select(Strategy::Inferred, &problem, &device).unwrap();
            let (chunk, segment) = blueprint.cut();
            time.div_ceil(chunk).div_ceil(segment)
        };
        assert_eq!((cut(1, 65_536), cut(1, 4096), cut(4, 65_536)), (16, 8, 4));
        // nothing to cut, too little, cubes enough
        assert_eq!((cut(1, 0), cut(1, 512), cut(8, 65_536)), (0, 1, 1));
    }

    #[test]
    fn what_does_not_fit_says_so() {
        let chunk = select(Strategy::Chunk(48), &problem(100, 8, 8), &limits(48 << 10, 1024));
        assert_eq!(chunk.unwrap_err().to_string(), "chunk: must be one of [16, 32, 64], got 48");
        let none = select(Strategy::Chunk(0), &problem(100, 8, 8), &limits(48 << 10, 1024));
        assert_eq!(none.unwrap_err().to_string(), "chunk: must be one of [16, 32, 64], got 0");
        let half = ElemType::Float(FloatKind::BF16);
        let cores = DeviceLimits { mma: vec![half], ..limits(227 << 10, 1024) };
        let cut = |segment| {
            let blueprint = ScanBlueprint { segment, instruction: Instruction::Mma };
            let strategy = Strategy::Forced(Blueprint::Scan(blueprint));
            let problem = Problem { dtype: half, ..problem(4400, 8, 8) };
            select(strategy, &problem, &cores).unwrap_err().to_string()
        };
        assert_eq!(cut(0), "segment: must be at least 1 chunk, got 0");
        let many = "segment: 69 chunks in segments of 1: a sequence has at most 64";
        assert_eq!(cut(1), many);
        let small = select(Strategy::Inferred, &problem(10, 8, 8), &limits(1 << 10, 1024));
        assert_eq!(
            small.unwrap_err().to_string(),
            "chunk_state: needs 2304 bytes of shared memory, the device has 1024"
        );
        let odd = SplitBlueprint { chunk: 64, cols: 0 };
        let odd = select(
            Strategy::Forced(Blueprint::Split(odd)),
            &problem(10, 8, 8),
            &limits(48 << 10, 1024),
        );
        assert_eq!(odd.unwrap_err().to_string(), "cols: must be one of [64, 32, 16], got 0");
        let narrow = select(Strategy::Chunk(64), &problem(10, 8, 8), &limits(48 << 10, 128));
        assert_eq!(
            narrow.unwrap_err().to_string(),
            "scores: needs 256 units per cube, the device allows 128"
        );
        let few = DeviceLimits { bindings: 4, ..limits(48 << 10, 1024) };
        let few = select(Strategy::Inferred, &problem(10, 8, 8), &few).unwrap_err();
        assert_eq!(few.to_string(), "kernels: need 8 storage buffers, the device binds 4");
    }

    #[test]
    fn tensor_cores_take_the_scan_plan() {
        let half = ElemType::Float(FloatKind::BF16);
        let cuda = DeviceLimits { mma: vec![half], ..limits(227 << 10, 1024) };
        let brain = Problem { dtype: half, ..problem(100, 128, 256) };
        let plan = |problem: &Problem| select(Strategy::Inferred, problem, &cuda).unwrap().plan();
        assert_eq!(plan(&brain), Plan::Scan);
        let chunk = |chunk| select(Strategy::Chunk(chunk), &brain, &cuda).unwrap().plan();
        assert_eq!((chunk(64), chunk(32)), (Plan::Scan, Plan::Split));
        assert_eq!(plan(&problem(100, 128, 256)), Plan::Split);
        assert_eq!(plan(&Problem { dtype: half, ..problem(100, 512, 64) }), Plan::Split);
        let forced = |problem: &Problem, limits: &DeviceLimits| {
            select(Strategy::Plan(Plan::Scan), problem, limits).unwrap_err().to_string()
        };
        assert_eq!(
            forced(&Problem { dtype: half, ..problem(100, 512, 64) }, &cuda),
            "plan: the scan plan takes at most 256 key channels, got 512"
        );
        assert_eq!(
            forced(&brain, &limits(48 << 10, 1024)),
            "plan: the scan plan needs tensor cores for bf16, the device has none"
        );
    }

    #[test]
    fn planes_without_mma_take_cmma() {
        let half = ElemType::Float(FloatKind::F16);
        let vulkan = DeviceLimits { cmma: vec![half], ..limits(48 << 10, 1024) };
        let small = Problem { dtype: half, ..problem(100, 64, 64) };
        let chosen = select(Strategy::Inferred, &small, &vulkan).unwrap();
        assert_eq!((chosen.plan(), chosen.instruction()), (Plan::Scan, Instruction::Cmma));
        let both = DeviceLimits { mma: vec![half], ..vulkan.clone() };
        let chosen = |limits| select(Strategy::Inferred, &small, &limits).unwrap().instruction();
        assert_eq!(chosen(both.clone()), Instruction::Cmma, "mma's tiles do not fit");
        assert_eq!(chosen(DeviceLimits { shared_memory: 227 << 10, ..both }), Instruction::Mma);
        let wide = Problem { dtype: half, ..problem(100, 256, 512) };
        let chosen = select(Strategy::Inferred, &wide, &vulkan).unwrap();
        assert_eq!((chosen.plan(), chosen.instruction()), (Plan::Scan, Instruction::Cmma));
        let narrow = DeviceLimits { shared_memory: 16 << 10, ..vulkan };
        let chosen = select(Strategy::Inferred, &small, &narrow).unwrap();
        assert_eq!(chosen.plan(), Plan::Split);
    }

    /// Whatever the tiles, the walks that are launched fit the device that was asked for.
    #[test]
    fn walks_fit_the_device() {
        let half = ElemType::Float(FloatKind::BF16);
        for (instruction, shared_memory) in [
            (Instruction::Mma, 99 << 10),
            (Instruction::Mma, 163 << 10),
            (Instruction::Mma, 227 << 10),
            (Instruction::Cmma, 48 << 10),
        ] {
            let mut device = limits(shared_memory, 1024);
            match instruction {
                Instruction::Mma => device.mma.push(half),
                _ => device.cmma.push(half),
            }
            let gates = [GateKind::None, GateKind::Fixed, GateKind::Scalar, GateKind::Vector];
            let widths = (16..=256).step_by(16).flat_map(|k| {
                (16..=1024).step_by(48).flat_map(move |v| gates.map(|gate| (k, v, gate)))
            });
            for (key_dim, value_dim, gate) in widths {
                let mut problem = Problem { dtype: half, ..problem(4096, key_dim, value_dim) };
                problem.dims.gate = gate;
                select(Strategy::Plan(Plan::Scan), &problem, &device).unwrap_or_else(|e| {
                    panic!("{instruction:?} {key_dim} {value_dim} {gate:?}: {e}")
                });
                for count in [1, 8, 64, 512] {
                    let largest =
                        crate::scan::largest_walk(problem.dims, count, instruction, &device);
                    assert!(largest <= shared_memory, "{key_dim} {value_dim} {count}: {largest}");
                }
            }
        }
    }
}
