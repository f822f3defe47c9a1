//! The catalogue of problems that the tests share.
//!
//! The id of a case is the case: [`Case::parse`] turns it into sizes and numbers, so a failure is
//! repeated from its id alone. Numbers depend on the id only, not on the place in the list.
//!
//! ```text
//! vector-m50-b2-t65-k33-v20-h4-kv2-init-final
//! ```
//!
//! * `none`, `fixed`, `scalar`, `vector`: the kind of gate; all but `none` are followed by values:
//!   `m<x>` constant `-x`, `ls<x>` log sigmoid over `x`, `alt` 0 next to -50, `mixed` from 0 to -1e4.
//! * `b` batch (1), `t` steps, `k` key channels, `v` value channels, `h` heads, `kv` key heads (`h`).
//! * `cu<bound>.<bound>...`: packed sequences, in the place of `t`.
//! * `s<x>`, `sm<x>`: the scale, `x` or `-x`, in the place of one over the root of `k`.
//! * `init`: with an initial state; `final`: with a gradient of the final state.

pub use crate::eval::compare::RefDType;
use crate::eval::reference::{RefGate, RefInputs};
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};

/// Problems for every device, software adapters included: each gate kind with each strength,
/// each length around a chunk boundary, uneven widths, grouped heads and packed sequences.
const SMALL: &str = "
    none-b2-t1-k16-v32-h3-init none-b2-t2-k33-v20-h4-kv2 none-t15-k33-v20-h3-final
    none-b2-t16-k60-v64-h3-init-final none-b2-t17-k60-v64-h1-final none-t31-k64-v60-h2-sm0.3
    none-b2-t63-k64-v60-h2-init-final none-t64-k16-v32-h4-kv2 none-t65-k8-v8-h3
    none-b2-t100-k8-v8-h3-init none-t130-k100-v36-h4-kv2-init-final none-cu0.15-k100-v36-h2
    none-cu0.1.100.130-k16-v32-h6-kv2-init none-cu0.0.16-k64-v60-h1-final
    none-cu0.5.5.64.130-k60-v64-h3-init-final
    fixed-m0-b2-t16-k8-v8-h4-kv2 fixed-m0-t31-k16-v32-h6-kv2-init
    fixed-m0-b2-t63-k33-v20-h4-kv2-init-final fixed-m0.03-b2-t1-k8-v8-h6-kv2-final
    fixed-m0.03-t65-k100-v36-h2-init
    fixed-m0.7-t2-k16-v32-h2-init fixed-m0.7-b2-t16-k64-v60-h3-final
    fixed-m0.7-cu0.1.100.130-k60-v64-h1-init-final fixed-m7-b2-t31-k60-v64-h1
    fixed-m7-t63-k100-v36-h3-init fixed-m7-t100-k16-v32-h2-final fixed-m50-b2-t64-k100-v36-h1
    fixed-m1e4-cu0.5.5.64.130-k64-v60-h4-kv2 fixed-ls0.1-cu0.15-k33-v20-h3-init
    fixed-ls1-cu0.0.16-k100-v36-h2-init-final fixed-ls16-b2-t16-k16-v32-h6-kv2-final
    fixed-alt-t130-k33-v20-h2 fixed-mixed-b2-t15-k8-v8-h6-kv2-final fixed-mixed-t17-k16-v32-h3
    fixed-mixed-t65-k33-v20-h6-kv2-s0.5
    scalar-m0-t17-k64-v60-h2-init-final scalar-m0.03-b2-t130-k16-v32-h1
    scalar-m0.7-t63-k8-v8-h6-kv2-s0-init-final scalar-m0.7-cu0.5.5.64.130-k33-v20-h1-init
    scalar-m7-cu0.1.100.130-k8-v8-h4-kv2-final scalar-m50-cu0.0.16-k33-v20-h6-kv2-init
    scalar-m50-cu0.15-k16-v32-h4-kv2-init-final scalar-m1e4-b2-t64-k8-v8-h3-init-final
    scalar-ls0.1-t64-k64-v60-h2-final scalar-ls0.1-b2-t65-k60-v64-h1-init-final
    scalar-ls0.1-cu0.0.16-k16-v32-h3 scalar-ls1-b2-t1-k60-v64-h4-kv2-init
    scalar-ls1-t16-k33-v20-h1-final scalar-ls1-cu0.15-k8-v8-h6-kv2-final scalar-ls16-t2-k8-v8-h1
    scalar-ls16-t15-k64-v60-h2-final scalar-alt-t31-k100-v36-h3-init-final
    scalar-mixed-b2-t100-k60-v64-h4-kv2-init
    vector-m0-t2-k60-v64-h1 vector-m0-cu0.1.100.130-k100-v36-h3
    vector-m0.03-t2-k64-v60-h3-init-final vector-m0.03-t15-k60-v64-h4-kv2
    vector-m0.7-b2-t17-k100-v36-h4-kv2-final vector-m7-t64-k33-v20-h6-kv2-init
    vector-m7-b2-t130-k16-v32-h3-init-final
    vector-m50-t130-k64-v60-h3-init vector-m50-cu0.0.16-k60-v64-h2-final
    vector-m1e4-b2-t100-k33-v20-h6-kv2-init-final vector-m1e4-t130-k60-v64-h2-init-final
    vector-m1e4-cu0.15-k64-v60-h1-init-final vector-ls0.1-b2-t65-k100-v36-h2-init-final
    vector-ls0.1-cu0.5.5.64.130-k8-v8-h2-final vector-ls1-b2-t1-k64-v60-h1-init
    vector-ls1-t63-k16-v32-h3 vector-ls1-t65-k60-v64-h4-kv2-init-final
    vector-ls1-cu0.1.100.130-k64-v60-h2 vector-ls16-b2-t31-k33-v20-h4-kv2-sm0.002-init
    vector-ls16-b2-t100-k100-v36-h3-init vector-alt-b2-t63-k60-v64-h1-init
    vector-alt-b2-t65-k16-v32-h4-kv2 vector-alt-t100-k64-v60-h1-init-final
    vector-alt-t130-k8-v8-h6-kv2-final vector-mixed-b2-t16-k100-v36-h2-final
    vector-mixed-t130-k33-v20-h3-init-final vector-mixed-cu0.1.100.130-k16-v32-h2-init-final
";

/// Problems of real size, for GPUs and nightly runs.
const LARGE: &str = "
    none-b2-t1000-k128-v128-h2-final
    fixed-m0.03-t1000-k128-v256-h4-init-final
    scalar-ls1-b2-t512-k128-v128-h4-init-final scalar-mixed-t1000-k60-v100-h4-kv2-init-final
    vector-ls16-t512-k256-v256-h2-init-final vector-ls1-b2-t1000-k60-v60-h4-init-final
    vector-ls0.1-t1000-k128-v256-h3-init-final vector-m0.03-t512-k128-v256-h4-kv2
    vector-mixed-t1000-k100-v100-h3-init-final vector-alt-t1000-k128-v128-h2-init-final
    vector-ls16-cu0.15.100.300.301.1000-k100-v128-h4-kv2-init-final
    vector-m1e4-t512-k128-v128-h4-init-final
";

/// What [`GateValues::MixedTime`] draws from.
const MIXED: [f64; 7] = [0.0, -1e-6, -0.03, -0.7, -7.0, -50.0, -1e4];

/// The kind of gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CaseGate {
    /// No gate.
    None,
    /// `[H]`.
    Fixed,
    /// `[B, T, Hk]`.
    Scalar,
    /// `[B, T, Hk, K]`.
    Vector,
}

/// How the log decay is filled. The channels of a fixed or scalar gate are its heads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum GateValues {
    /// One number everywhere.
    Constant(f64),
    /// `logsigmoid(x) / normalizer` with x standard normal.
    LogSigmoid {
        /// Divisor; below 1 makes strong gates.
        normalizer: f64,
    },
    /// The first number in even channels, the second in odd ones.
    AlternatingChannels(f64, f64),
    /// Each step and channel draws from 0, -1e-6, -0.03, -0.7, -7, -50 and -1e4.
    MixedTime,
}

/// One problem of the catalogue.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// Stable name, see the module.
    pub id: String,
    /// B.
    pub batch: usize,
    /// T.
    pub time: usize,
    /// H.
    pub heads: usize,
    /// Hk.
    pub kv_heads: usize,
    /// K.
    pub key_dim: usize,
    /// V.
    pub value_dim: usize,
    /// Kind of gate.
    pub gate: CaseGate,
    /// Numbers of the gate; not read for [`CaseGate::None`].
    pub gate_values: GateValues,
    /// The scale.
    pub scale: f64,
    /// Whether there is an initial state.
    pub initial_state: bool,
    /// Whether the final state has a gradient.
    pub final_grad: bool,
    /// Bounds of packed sequences.
    pub cu_seqlens: Option<Vec<usize>>,
    /// Seed of the random numbers.
    pub seed: u64,
}

/// The problems for every device; see the list in the source.
pub fn small() -> Vec<Case> {
    catalogue(SMALL)
}

/// The problems of real size.
pub fn large() -> Vec<Case> {
    catalogue(LARGE)
}

fn catalogue(ids: &str) -> Vec<Case> {
    let parse = |id| Case::parse(id).expect("an id of the catalogue");
    ids.split_whitespace().map(parse).collect()
}

impl Case {
    /// The case that an id describes.
    ///
    /// # Errors
    ///
    /// A message that names the id and the part that is wrong or missing.
    pub fn parse(id: &str) -> Result<Self, String> {
        let wrong = |part: &str| format!("case {id}: {part:?} is not understood");
        let mut parts = id.split('-');
        let gate = match parts.next().unwrap_or_default() {
            "none" => CaseGate::None,
            "fixed" => CaseGate::Fixed,
            "scalar" => CaseGate::Scalar,
            "vector" => CaseGate::Vector,
            other => return Err(wrong(other)),
        };
        let mut gate_values = GateValues::Constant(0.0);
        if gate != CaseGate::None {
            let part = parts.next().unwrap_or_default();
            gate_values = GateValues::parse(part).ok_or_else(|| wrong(part))?;
        }
        let (mut batch, mut time, mut heads, mut kv_heads) = (1, None, None, None);
        let (mut key_dim, mut value_dim, mut cu_seqlens) = (None, None, None);
        let (mut initial_state, mut final_grad, mut scale) = (false, false, None);
        for part in parts {
            let digits = part.find(|c: char| c.is_ascii_digit()).unwrap_or(part.len());
            let (name, number) = part.split_at(digits);
            let size = || number.parse::<usize>().map_err(|_| wrong(part));
            match name {
                "b" => batch = size()?,
                "t" => time = Some(size()?),
                "k" => key_dim = Some(size()?),
                "v" => value_dim = Some(size()?),
                "h" => heads = Some(size()?),
                "kv" => kv_heads = Some(size()?),
                "s" | "sm" => {
                    let size = finite(number).ok_or_else(|| wrong(part))?;
                    scale = Some(RefDType::F32.round(if name == "s" { size } else { -size }));
                }
                "cu" => {
                    let bounds = number.split('.').map(|bound| bound.parse().ok());
                    let bounds: Vec<usize> =
                        bounds.collect::<Option<_>>().ok_or_else(|| wrong(part))?;
                    time = bounds.last().copied();
                    cu_seqlens = Some(bounds);
                }
                "init" if number.is_empty() => initial_state = true,
                "final" if number.is_empty() => final_grad = true,
                _ => return Err(wrong(part)),
            }
        }
        let needed = |name: &str, size: Option<usize>| {
            size.ok_or_else(|| format!("case {id}: {name} is missing"))
        };
        let (heads, key_dim) = (needed("h", heads)?, needed("k", key_dim)?);
        Ok(Self {
            id: id.to_owned(),
            batch,
            time: needed("t", time)?,
            heads,
            kv_heads: kv_heads.unwrap_or(heads),
            key_dim,
            value_dim: needed("v", value_dim)?,
            gate,
            gate_values,
            scale: scale.unwrap_or((key_dim as f64).sqrt().recip()),
            initial_state,
            final_grad,
            cu_seqlens,
            seed: hash(id),
        })
    }

    /// The tensors. Every number is exact in f32, so that f32 kernels see the same problem.
    ///
    /// q, v and the initial state are standard normal; k is divided by the root of the length (up
    /// to 64) to keep state and output of order 1 without decay too.
    pub fn inputs(&self) -> RefInputs {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(self.seed);
        let (steps, kv_steps) = (self.batch * self.time, self.batch * self.time * self.kv_heads);
        let k_size = (self.time.clamp(1, 64) as f64).sqrt().recip();
        RefInputs {
            batch: self.batch,
            time: self.time,
            heads: self.heads,
            kv_heads: self.kv_heads,
            key_dim: self.key_dim,
            value_dim: self.value_dim,
            scale: self.scale,
            cu_seqlens: self.cu_seqlens.clone(),
            q: normals(&mut rng, steps * self.heads * self.key_dim, 1.0),
            k: normals(&mut rng, kv_steps * self.key_dim, k_size),
            v: normals(&mut rng, kv_steps * self.value_dim, 1.0),
            initial_state: self.initial_state.then(|| normals(&mut rng, self.state_len(), 1.0)),
            gate: match self.gate {
                CaseGate::None => RefGate::None,
                CaseGate::Fixed => RefGate::Fixed(self.gate(&mut rng, 1, self.heads)),
                CaseGate::Scalar => RefGate::Scalar(self.gate(&mut rng, steps, self.kv_heads)),
                CaseGate::Vector => RefGate::Vector(self.gate(&mut rng, kv_steps, self.key_dim)),
            },
        }
    }

    /// Gradients that come in: d_o `[B, T, H, V]` and, if asked for, d_final `[N, H, K, V]`;
    /// standard normal, exact in f32.
    pub fn grads_in(&self) -> (Vec<f64>, Option<Vec<f64>>) {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(!self.seed);
        let d_o = normals(&mut rng, self.batch * self.time * self.heads * self.value_dim, 1.0);
        let d_final = self.final_grad.then(|| normals(&mut rng, self.state_len(), 1.0));
        (d_o, d_final)
    }

    fn state_len(&self) -> usize {
        let sequences = self.cu_seqlens.as_ref().map_or(self.batch, |bounds| bounds.len() - 1);
        sequences * self.heads * self.key_dim * self.value_dim
    }

    fn gate(&self, rng: &mut Xoshiro256PlusPlus, rows: usize, channels: usize) -> Vec<f64> {
        let value = |at: usize| match self.gate_values {
            GateValues::Constant(value) => value,
            GateValues::LogSigmoid { normalizer } => -(-normal(rng)).exp().ln_1p() / normalizer,
            GateValues::AlternatingChannels(even, _) if (at % channels).is_multiple_of(2) => even,
            GateValues::AlternatingChannels(_, odd) => odd,
            GateValues::MixedTime => MIXED[rng.random_range(0..MIXED.len())],
        };
        (0..rows * channels).map(value).map(|x| RefDType::F32.round(x)).collect()
    }
}

impl GateValues {
    fn parse(part: &str) -> Option<Self> {
        match part {
            "alt" => Some(Self::AlternatingChannels(0.0, -50.0)),
            "mixed" => Some(Self::MixedTime),
            _ => match part.strip_prefix("ls") {
                Some(digits) => finite(digits).map(|normalizer| Self::LogSigmoid { normalizer }),
                None => finite(part.strip_prefix('m')?).map(|x| Self::Constant(0.0 - x)),
            },
        }
    }
}

fn finite(digits: &str) -> Option<f64> {
    digits.parse().ok().filter(|x: &f64| x.is_finite())
}

fn normals(rng: &mut Xoshiro256PlusPlus, len: usize, size: f64) -> Vec<f64> {
    (0..len).map(|_| RefDType::F32.round(size * normal(rng))).collect()
}

/// Standard normal, by Box and Muller.
fn normal(rng: &mut Xoshiro256PlusPlus) -> f64 {
    let (radius, angle): (f64, f64) = rng.random();
    (-2.0 * (1.0 - radius).ln()).sqrt() * (std::f64::consts::TAU * angle).cos()
}

/// FNV-1a: the seed of a case follows from its id in every version of every library.
fn hash(id: &str) -> u64 {
    let mix = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    id.bytes().fold(0xcbf2_9ce4_8422_2325, mix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_read_back() {
        let case = Case::parse("vector-m50-b2-t65-k33-v20-h4-kv2-init").unwrap();
        assert_eq!((case.batch, case.time, case.key_dim, case.value_dim), (2, 65, 33, 20));
        assert_eq!((case.heads, case.kv_heads), (4, 2));
        assert_eq!((case.gate, case.gate_values), (CaseGate::Vector, GateValues::Constant(-50.0)));
        assert_eq!((case.initial_state, case.final_grad), (true, false));
        let packed = Case::parse("none-cu0.5.5.9-k3-v2-h1-final").unwrap();
        assert_eq!((packed.time, packed.kv_heads, packed.final_grad), (9, 1, true));
        assert_eq!(packed.cu_seqlens, Some(vec![0, 5, 5, 9]));
        let scale = |id| Case::parse(id).unwrap().inputs().scale;
        assert_eq!(scale("none-t1-k16-v1-h1"), 0.25);
        assert_eq!(scale("none-t1-k16-v1-h1-s0.5"), 0.5);
        assert_eq!(scale("none-t1-k16-v1-h1-sm3"), -3.0);
        let strong = Case::parse("fixed-m1e4-t1-k1-v1-h1").unwrap();
        assert_eq!(strong.inputs().gate, RefGate::Fixed(vec![-1e4]));
    }

    #[test]
    fn a_bad_id_is_named() {
        let bad = [
            ("tensor-t1-k1-v1-h1", "\"tensor\" is not understood"),
            ("vector-t1-k1-v1-h1", "\"t1\" is not understood"),
            ("none-t-k1-v1-h1", "\"t\" is not understood"),
            ("none-t1-k1-v1-h1-x2", "\"x2\" is not understood"),
            ("none-t1-k1-v1-h1-s", "\"s\" is not understood"),
            ("none-cu0..3-k1-v1-h1", "\"cu0..3\" is not understood"),
            ("none-t1-k1-h1", "v is missing"),
        ];
        for (id, message) in bad {
            assert_eq!(Case::parse(id), Err(format!("case {id}: {message}")));
        }
    }

    #[test]
    fn numbers_are_repeatable_and_exact_in_f32() {
        for id in ["vector-ls1-b2-t9-k5-v3-h2-init-final", "scalar-mixed-t40-k5-v3-h4-kv2"] {
            let case = Case::parse(id).unwrap();
            let inputs = case.inputs();
            assert_eq!(inputs, case.inputs());
            assert_eq!(case.grads_in(), case.grads_in());
            let mut rounded = inputs.clone();
            rounded.round_to(RefDType::F32, RefDType::F32);
            assert_eq!(inputs, rounded);
            assert!(inputs.gate.values().unwrap().iter().all(|&g| (-1e4..=0.0).contains(&g)));
        }
        let alternating = Case::parse("vector-alt-t2-k3-v1-h1").unwrap().inputs().gate;
        assert_eq!(alternating, RefGate::Vector(vec![0.0, -50.0, 0.0, 0.0, -50.0, 0.0]));
    }
}
