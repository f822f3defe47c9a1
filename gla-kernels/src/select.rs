//! From a problem, a strategy and a device to a blueprint.

use crate::{Blueprint, CHUNKS, COLS, DeviceLimits, Dims, GlaError, Instruction, Strategy};

/// Chooses the blueprint: the shortest chunk that holds the longest sequence, else the longest one;
/// tiles as wide as the heads need; both shrink until the device has room.
pub fn select(
    strategy: Strategy,
    dims: &Dims,
    longest: usize,
    limits: &DeviceLimits,
) -> Result<Blueprint, GlaError> {
    let widest = dims.key_dim.max(dims.value_dim);
    let cols = [16, 32].into_iter().find(|&cols| widest <= cols).unwrap_or(64);
    let wanted = CHUNKS.iter().copied().find(|&chunk| longest <= chunk);
    let wanted = wanted.unwrap_or(CHUNKS[CHUNKS.len() - 1]);
    let instruction = Instruction::Registers;
    match strategy {
        Strategy::Forced(blueprint) => {
            blueprint.validate(limits)?;
            Ok(blueprint)
        }
        Strategy::Chunk(chunk) => shrink(Blueprint { chunk, cols, instruction }, 1, limits),
        Strategy::Inferred => {
            shrink(Blueprint { chunk: wanted, cols, instruction }, CHUNKS.len(), limits)
        }
    }
}

/// The first of the blueprints that fits: narrower tiles before shorter chunks.
fn shrink(
    first: Blueprint,
    chunk_choices: usize,
    limits: &DeviceLimits,
) -> Result<Blueprint, GlaError> {
    let mut error = None;
    for halvings in 0..chunk_choices {
        for &cols in COLS {
            let candidate = Blueprint { chunk: first.chunk >> halvings, cols, ..first };
            if cols > first.cols {
                continue;
            }
            match candidate.validate(limits) {
                Ok(()) => return Ok(candidate),
                Err(e) => error = error.or(Some(e)),
            }
        }
    }
    Err(error.unwrap_or(GlaError::Chunk { allowed: CHUNKS, got: first.chunk }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::GateKind;

    fn dims(key_dim: usize, value_dim: usize) -> Dims {
        Dims { heads: 4, kv_heads: 4, key_dim, value_dim, gate: GateKind::Vector }
    }

    fn limits(shared_memory: usize, units: usize) -> DeviceLimits {
        DeviceLimits { shared_memory, units, bindings: 8, cubes: (65535, 65535) }
    }

    #[test]
    fn tiles_follow_the_problem_and_the_device() {
        let big = limits(48 << 10, 1024);
        let choose = |t, k, v, l: &DeviceLimits| {
            let bp = select(Strategy::Inferred, &dims(k, v), t, l).unwrap();
            (bp.chunk, bp.cols)
        };
        assert_eq!(choose(2048, 128, 256, &big), (64, 64));
        assert_eq!(choose(10, 16, 20, &big), (16, 32));
        assert_eq!(choose(2048, 128, 256, &limits(16 << 10, 256)), (64, 32));
        assert_eq!(choose(2048, 128, 256, &limits(16 << 10, 128)), (32, 64));
    }

    #[test]
    fn what_does_not_fit_says_so() {
        let chunk = select(Strategy::Chunk(48), &dims(8, 8), 100, &limits(48 << 10, 1024));
        assert_eq!(chunk.unwrap_err().to_string(), "chunk: must be one of [16, 32, 64], got 48");
        let small = select(Strategy::Inferred, &dims(8, 8), 10, &limits(1 << 10, 1024));
        assert_eq!(
            small.unwrap_err().to_string(),
            "state: needs 3136 bytes of shared memory, the device has 1024"
        );
        let odd = Blueprint { chunk: 64, cols: 0, instruction: Instruction::Registers };
        let odd = select(Strategy::Forced(odd), &dims(8, 8), 10, &limits(48 << 10, 1024));
        assert_eq!(odd.unwrap_err().to_string(), "cols: must be one of [64, 32, 16], got 0");
        let narrow = select(Strategy::Chunk(64), &dims(8, 8), 10, &limits(48 << 10, 128));
        assert_eq!(
            narrow.unwrap_err().to_string(),
            "scores: needs 256 units per cube, the device allows 128"
        );
        let few = DeviceLimits { bindings: 4, ..limits(48 << 10, 1024) };
        let few = select(Strategy::Inferred, &dims(8, 8), 10, &few).unwrap_err();
        assert_eq!(few.to_string(), "kernels: need 8 storage buffers, the device binds 4");
    }
}
