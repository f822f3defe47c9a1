//! What the f64 reference gives for a part of the outputs, and how far the device's are from it.
//!
//! Of a chunked call these are the first and the last steps of the first head. The state that the last ones start
//! from, and the gradient of the one that the first ones leave, come from as many steps beyond as the gates
//! remember: so pieces of a sequence that were walked in parallel are compared as they were joined.

use std::ops::Range;

use anyhow::{Result, anyhow};
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use gla_kernels::eval::{self, RefDType, RefGate, RefGrads, RefInputs, RefOutputs};
use gla_kernels::{Dims, GateKind, Problem};
use half::{bf16, f16};
use rayon::prelude::*;

use crate::device::noise;

/// Steps at each end that are compared.
const COMPARED: usize = 200;

/// Numbers of a state, times steps, that the reference carries it over, to the last steps and back to the first:
/// the longest shape of the suite without a gate, about a second on 16 cores.
const CARRIED: usize = 2_200_000_000;

/// Steps, and columns of a state, that are carried in one go: columns do not know of each other.
const STEPS: usize = 64;
const COLUMNS: usize = 16;

/// The inputs of a call.
pub struct Inputs {
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    pub gate: Option<Vec<f32>>,
    pub d_o: Vec<f32>,
}

impl Inputs {
    pub fn new(problem: &Problem) -> Self {
        let Dims { heads, key_dim, value_dim, gate, .. } = problem.dims;
        let keys = problem.rows() * heads * key_dim;
        let values = problem.rows() * heads * value_dim;
        let log_gate = |x: &f32| -(1.0 + (-2.0 * x).exp()).ln() / 16.0;
        Inputs {
            q: noise(keys, 1),
            k: noise(keys, 2),
            v: noise(values, 3),
            gate: gate
                .is_some()
                .then(|| noise(problem.gate_len(), 5).par_iter().map(log_gate).collect()),
            d_o: noise(values, 4),
        }
    }
}

/// Gradients as they were read.
pub struct Grads {
    pub dq: Vec<f32>,
    pub dk: Vec<f32>,
    pub dv: Vec<f32>,
    pub dgate: Option<Vec<f32>>,
    pub dh0: Vec<f32>,
}

/// Some steps of the first head of the first sequence, and columns of its values, as a problem of the reference.
struct Piece<'a> {
    problem: &'a Problem,
    steps: Range<usize>,
    columns: Range<usize>,
}

impl Piece<'_> {
    fn of(&self, x: &[f32], width: usize, columns: Range<usize>) -> Vec<f64> {
        let heads = self.problem.dims.heads;
        let step = |t: usize| &x[t * heads * width..][columns.clone()];
        self.steps.clone().flat_map(step).map(|&x| f64::from(x)).collect()
    }

    fn rounded(&self, x: &[f32], width: usize, columns: Range<usize>) -> Vec<f64> {
        let mut x = self.of(x, width, columns);
        precision(self.problem.dtype).round_all(&mut x);
        x
    }

    fn d_o(&self, x: &Inputs) -> Vec<f64> {
        self.rounded(&x.d_o, self.problem.dims.value_dim, self.columns.clone())
    }

    fn inputs(&self, x: &Inputs, initial_state: Option<Vec<f64>>) -> RefInputs {
        let Dims { key_dim, value_dim, gate, .. } = self.problem.dims;
        let numbers = x.gate.as_deref().unwrap_or_default();
        RefInputs {
            batch: 1,
            time: self.steps.len(),
            heads: 1,
            kv_heads: 1,
            key_dim,
            value_dim: self.columns.len(),
            scale: f64::from(self.problem.scale),
            cu_seqlens: None,
            q: self.rounded(&x.q, key_dim, 0..key_dim),
            k: self.rounded(&x.k, key_dim, 0..key_dim),
            v: self.rounded(&x.v, value_dim, self.columns.clone()),
            gate: match gate {
                GateKind::None => RefGate::None,
                GateKind::Fixed => RefGate::Fixed(vec![f64::from(numbers[0])]),
                GateKind::Scalar => RefGate::Scalar(self.of(numbers, 1, 0..1)),
                GateKind::Vector => RefGate::Vector(self.of(numbers, key_dim, 0..key_dim)),
            },
            initial_state,
        }
    }
}

/// How many of `steps`, in their order, the gates of the first head remember in `problem`'s precision.
fn remembered(problem: &Problem, x: &Inputs, steps: impl Iterator<Item = usize>) -> usize {
    let Dims { heads, key_dim, gate, .. } = problem.dims;
    let numbers = x.gate.as_deref().unwrap_or_default();
    // far below what is compared
    let forgotten = if precision(problem.dtype) == RefDType::F32 { -16.0 } else { -12.0 };
    let mut decay = vec![0.0; if gate == GateKind::Vector { key_dim } else { 1 }];
    let mut count = 0;
    for step in steps {
        let row = match gate {
            GateKind::None => &[0.0],
            GateKind::Fixed => &numbers[..1],
            GateKind::Scalar => &numbers[step * heads..][..1],
            GateKind::Vector => &numbers[step * heads * key_dim..][..key_dim],
        };
        for (sum, &log_gate) in decay.iter_mut().zip(row) {
            *sum += f64::from(log_gate);
        }
        count += 1;
        if decay.iter().all(|&sum| sum < forgotten) {
            break;
        }
    }
    count
}

/// A state, or its gradient, that starts from zero and that `over` takes over one piece after the other; none if
/// that takes too long.
fn carried<'a>(
    problem: &'a Problem,
    pieces: &[Range<usize>],
    over: impl Fn(Piece<'a>, Vec<f64>) -> Vec<f64> + Sync,
) -> Option<Vec<f64>> {
    let Dims { key_dim, value_dim, .. } = problem.dims;
    if pieces.iter().map(Range::len).sum::<usize>() * key_dim * value_dim > CARRIED {
        return None;
    }
    let part = |first: usize| {
        let columns = first..value_dim.min(first + COLUMNS);
        let zero = vec![0.0; key_dim * columns.len()];
        pieces.iter().fold(zero, |state, steps| {
            over(Piece { problem, steps: steps.clone(), columns: columns.clone() }, state)
        })
    };
    let parts: Vec<_> = (0..value_dim).into_par_iter().step_by(COLUMNS).map(part).collect();
    let row = |i: usize| {
        parts.iter().flat_map(move |part| part.chunks_exact(part.len() / key_dim).nth(i))
    };
    Some((0..key_dim).flat_map(row).flatten().copied().collect())
}

fn cut(steps: Range<usize>) -> Vec<Range<usize>> {
    let piece = |first| first..steps.end.min(first + STEPS);
    steps.clone().step_by(STEPS).map(piece).collect()
}

/// Steps at one end of the sequence.
struct End {
    steps: Range<usize>,
    outputs: RefOutputs,
    grads: RefGrads,
    /// Whether the reference knows the state that they start from.
    past: bool,
    /// Whether it knows the gradient of the one that they leave.
    future: bool,
}

impl End {
    fn new(problem: &Problem, x: &Inputs, steps: Range<usize>) -> Self {
        let time = problem.sequences.longest();
        let before = remembered(problem, x, (0..steps.start).rev());
        let after = remembered(problem, x, steps.end..time);
        let past = || {
            carried(problem, &cut(steps.start - before..steps.start), |piece, state| {
                eval::forward(&piece.inputs(x, Some(state))).final_state
            })
        };
        let future = || {
            let mut pieces = cut(steps.end..steps.end + after);
            pieces.reverse();
            carried(problem, &pieces, |piece, d_state| {
                eval::backward(&piece.inputs(x, None), &piece.d_o(x), Some(&d_state)).dh0
            })
        };
        let (past, future) = rayon::join(past, future);
        let piece = Piece { problem, steps: steps.clone(), columns: 0..problem.dims.value_dim };
        let known = (past.is_some(), future.is_some());
        let inputs = piece.inputs(x, past);
        let (outputs, grads) = rayon::join(
            || eval::forward(&inputs),
            || eval::backward(&inputs, &piece.d_o(x), future.as_deref()),
        );
        End { steps, outputs, grads, past: known.0, future: known.1 }
    }
}

/// Both ends of the first head of the first sequence.
pub struct Reference<'a> {
    problem: &'a Problem,
    ends: Vec<End>,
    /// Whether the last state, the gradient of the first and of a gate of steps are compared too.
    all: bool,
}

impl<'a> Reference<'a> {
    /// Tells what cannot be compared.
    pub fn new(problem: &'a Problem, x: &Inputs, all: bool) -> Self {
        let time = problem.sequences.longest();
        let steps = time.min(COMPARED);
        let mut ends = vec![0..steps, time - steps..time];
        ends.dedup();
        let ends: Vec<End> =
            ends.into_par_iter().map(|steps| End::new(problem, x, steps)).collect();
        for End { steps, past, future, .. } in &ends {
            let names = match (past, future) {
                (true, true) => continue,
                (false, true) => "o, dq",
                (true, false) => "dk, dv",
                (false, false) => "outputs",
            };
            println!("not compared, too many steps for the reference: {names} of steps {steps:?}");
        }
        Reference { problem, ends, all }
    }

    /// Compares the outputs.
    pub fn outputs(&self, o: &[f32], states: &[f32]) -> Result<()> {
        let value_dim = self.problem.dims.value_dim;
        for end in self.ends.iter().filter(|end| end.past) {
            self.compare("o", end, &end.outputs.o, o, value_dim)?;
            if self.all && end.steps.end == self.problem.sequences.longest() {
                self.compare_state("the final state", &end.outputs.final_state, states)?;
            }
        }
        Ok(())
    }

    /// Compares the gradients.
    pub fn grads(&self, got: &Grads) -> Result<()> {
        let Dims { key_dim, value_dim, gate, .. } = self.problem.dims;
        let gate_width = match gate {
            GateKind::Vector => Some(key_dim),
            GateKind::Scalar => Some(1),
            // nothing, or a sum over all sequences
            GateKind::None | GateKind::Fixed => None,
        };
        for end in &self.ends {
            let grads = &end.grads;
            if end.past {
                self.compare("dq", end, &grads.dq, &got.dq, key_dim)?;
            }
            if end.future {
                self.compare("dk", end, &grads.dk, &got.dk, key_dim)?;
                self.compare("dv", end, &grads.dv, &got.dv, value_dim)?;
            }
            if !self.all {
                continue;
            }
            if end.future && end.steps.start == 0 {
                self.compare_state("dh0", &grads.dh0, &got.dh0)?;
            }
            if let (true, true, Some(width), Some(expected), Some(dgate)) =
                (end.past, end.future, gate_width, &grads.dgate, &got.dgate)
            {
                self.compare("dgate", end, expected, dgate, width)?;
            }
        }
        Ok(())
    }

    fn compare(
        &self,
        name: &str,
        end: &End,
        expected: &[f64],
        got: &[f32],
        width: usize,
    ) -> Result<()> {
        let steps = end.steps.clone();
        let piece = Piece { problem: self.problem, steps, columns: 0..width };
        let name = format!("{name} of steps {:?}", end.steps);
        compare(&name, expected, &piece.of(got, width, 0..width), self.most(&name))
    }

    fn compare_state(&self, name: &str, expected: &[f64], got: &[f32]) -> Result<()> {
        compare(name, expected, &got[..expected.len()], self.most(name))
    }

    /// The tolerance of the tests.
    fn most(&self, name: &str) -> f64 {
        match precision(self.problem.dtype) {
            RefDType::F32 => 1e-4,
            _ if name.starts_with('d') => 5e-3,
            _ => 4e-3,
        }
    }
}

fn compare<T: Copy + Into<f64>>(name: &str, expected: &[f64], got: &[T], most: f64) -> Result<()> {
    eval::check(name, expected, got, most, eval::ABS_FLOOR).map_err(|e| anyhow!(e)).map(drop)
}

/// Compares a decoding step of all sequences and heads: what it wrote to `o`, and made of the states `start`.
pub fn compare_step(
    problem: &Problem,
    x: &Inputs,
    (start, state_dtype): (&[f32], ElemType),
    o: &[f32],
    states: &[f32],
) -> Result<()> {
    let Dims { heads, key_dim, value_dim, .. } = problem.dims;
    let tolerance = |dtype| if precision(dtype) == RefDType::F32 { 1e-4 } else { 4e-3 };
    (0..problem.num_sequences()).into_par_iter().try_for_each(|n| {
        let own = |all: &[f32], width: usize, dtype| {
            let own = &all[n * heads * width..][..heads * width];
            let mut own: Vec<f64> = own.iter().map(|&x| f64::from(x)).collect();
            precision(dtype).round_all(&mut own);
            own
        };
        let gate = x.gate.as_ref().expect("steps are measured with a gate per channel");
        let state_width = key_dim * value_dim;
        let expected = eval::forward(&RefInputs {
            batch: 1,
            time: 1,
            heads,
            kv_heads: heads,
            key_dim,
            value_dim,
            scale: f64::from(problem.scale),
            cu_seqlens: None,
            q: own(&x.q, key_dim, problem.dtype),
            k: own(&x.k, key_dim, problem.dtype),
            v: own(&x.v, value_dim, problem.dtype),
            gate: RefGate::Vector(own(gate, key_dim, problem.gate_dtype)),
            initial_state: Some(own(start, state_width, state_dtype)),
        });
        let o = own(o, value_dim, problem.dtype);
        let name = format!("o of sequence {n}");
        compare(&name, &expected.o, &o, tolerance(problem.dtype))?;
        let state = own(states, state_width, state_dtype);
        let name = format!("the state of sequence {n}");
        compare(&name, &expected.final_state, &state, tolerance(state_dtype))
    })
}

fn precision(dtype: ElemType) -> RefDType {
    if dtype == bf16::elem_type_native() {
        RefDType::BF16
    } else if dtype == f16::elem_type_native() {
        RefDType::F16
    } else {
        RefDType::F32
    }
}
