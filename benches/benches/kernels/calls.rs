//! The calls that are timed, and the check of what they wrote.

use std::ops::Range;
use std::time::Instant;

use anyhow::{Result, anyhow, ensure};
use cubecl::MemoryScope;
use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;
use gla_benches::{median_ms, mib};
use gla_kernels::eval::{self, RefDType, RefGate, RefInputs};
use gla_kernels::{
    BackwardArgs, Blueprint, Dims, ForwardArgs, GateKind, Problem, RecurrentArgs, Strategy,
};
use half::{bf16, f16};
use rayon::prelude::*;

use crate::device::{noise, poisoned, read, upload};

/// Steps at the beginning and at the end of a sequence that are compared with the reference.
const COMPARED: usize = 200;

/// Numbers of a head's state, times steps, that the reference goes through for the last state, and for the
/// gradient of the first: a few seconds. All steps where there are no more; else gates have to have forgotten
/// the rest.
const CARRIED: [usize; 2] = [600_000_000, 200_000_000];

/// Steps after which the gates of [`Inputs`] have forgotten all: by e^-30 in the mean.
const FORGOTTEN: usize = 600;

/// One pass.
pub struct Timed {
    pub pass: &'static str,
    pub ms: f64,
    /// What it allocates, see [`apart`].
    pub mib: f64,
}

/// What is timed of a problem.
pub struct Measured {
    pub passes: [Timed; 2],
    pub blueprint: Blueprint,
}

/// The inputs of a call, on the host too.
struct Inputs {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    gate: Option<Vec<f32>>,
    d_o: Vec<f32>,
}

impl Inputs {
    fn new(problem: &Problem) -> Self {
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

/// The tensors of a call on the device.
struct Tensors {
    q: Handle,
    k: Handle,
    v: Handle,
    gate: Option<Handle>,
    o: Handle,
    state: Handle,
}

impl Tensors {
    fn new(client: &Client, problem: &Problem, x: &Inputs, state: Handle) -> Self {
        let f32_type = f32::elem_type_native();
        Tensors {
            q: upload(client, &x.q, problem.dtype),
            k: upload(client, &x.k, problem.dtype),
            v: upload(client, &x.v, problem.dtype),
            gate: x.gate.as_ref().map(|gate| upload(client, gate, f32_type)),
            o: poisoned(client, x.v.len(), problem.dtype),
            state,
        }
    }
}

/// Fails if a tensor has a NaN or an infinity, or is all zero.
fn check(client: &Client, name: &str, handle: &Handle, dtype: ElemType) -> Result<Vec<f32>> {
    let values = read(client, handle, dtype)?;
    ensure!(values.par_iter().all(|x| x.is_finite()), "{name} has NaN or infinities");
    ensure!(values.par_iter().any(|&x| x != 0.0), "{name} is all zero");
    Ok(values)
}

/// Some steps of the first head of the first sequence, as a problem of the reference.
struct Piece<'a> {
    problem: &'a Problem,
    steps: Range<usize>,
}

impl Piece<'_> {
    fn of(&self, x: &[f32], width: usize) -> Vec<f64> {
        let heads = self.problem.dims.heads;
        let step = |t: usize| &x[t * heads * width..][..width];
        self.steps.clone().flat_map(step).map(|&x| f64::from(x)).collect()
    }

    /// Steps from the beginning, or from the end, after which the state does not know of the others.
    fn enough(problem: &Problem, most: usize, from_end: bool) -> Option<Piece<'_>> {
        let Dims { key_dim, value_dim, gate, .. } = problem.dims;
        let time = problem.sequences.longest();
        let steps = time.min(most / (key_dim * value_dim));
        let steps = if from_end { time - steps..time } else { 0..steps };
        (gate.is_some() || steps.len() == time).then_some(Piece { problem, steps })
    }

    fn rounded(&self, x: &[f32], width: usize) -> Vec<f64> {
        let mut x = self.of(x, width);
        precision(self.problem.dtype).round_all(&mut x);
        x
    }

    fn inputs(&self, x: &Inputs) -> RefInputs {
        let Dims { key_dim, value_dim, gate, .. } = self.problem.dims;
        let numbers = x.gate.as_deref().unwrap_or_default();
        RefInputs {
            batch: 1,
            time: self.steps.len(),
            heads: 1,
            kv_heads: 1,
            key_dim,
            value_dim,
            scale: f64::from(self.problem.scale),
            cu_seqlens: None,
            q: self.rounded(&x.q, key_dim),
            k: self.rounded(&x.k, key_dim),
            v: self.rounded(&x.v, value_dim),
            gate: match gate {
                GateKind::None => RefGate::None,
                GateKind::Fixed => RefGate::Fixed(vec![f64::from(numbers[0])]),
                GateKind::Scalar => RefGate::Scalar(self.of(numbers, 1)),
                GateKind::Vector => RefGate::Vector(self.of(numbers, key_dim)),
            },
            initial_state: None,
        }
    }

    /// With the tolerances of the tests.
    fn compare(&self, name: &str, expected: &[f64], got: &[f32], width: usize) -> Result<()> {
        compare(self.problem, name, expected, &self.of(got, width))
    }
}

fn compare(problem: &Problem, name: &str, expected: &[f64], got: &[f64]) -> Result<()> {
    let most = match precision(problem.dtype) {
        RefDType::F32 => 1e-4,
        _ if name == "o" || name == "the final state" => 4e-3,
        _ => 5e-3,
    };
    eval::check(name, expected, got, most, eval::ABS_FLOOR).map_err(|e| anyhow!(e)).map(drop)
}

/// The state of the first sequence's first head.
fn first_state(problem: &Problem, states: &[f32]) -> Vec<f64> {
    let own = &states[..problem.dims.key_dim * problem.dims.value_dim];
    own.iter().map(|&x| f64::from(x)).collect()
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

/// Times forward, and forward + backward, after a first call of each that is checked: all outputs are
/// finite, and some of one head are those of the reference: `o` and `dq`, which know the past alone,
/// at the beginning; `dk` and `dv`, which know the future, at the end. Unless `times` nothing is timed, and
/// `o` at the end, the last state, the gradient of the first and of a gate of steps are compared too.
pub fn chunked(
    client: &Client,
    problem: &Problem,
    strategy: Strategy,
    times: bool,
) -> Result<Measured> {
    let before = clean(client)?;
    let Dims { key_dim, value_dim, .. } = problem.dims;
    let (dtype, f32_type) = (problem.dtype, f32::elem_type_native());
    let host = Inputs::new(problem);
    let x = apart(client, || {
        Tensors::new(client, problem, &host, poisoned(client, problem.state_len(), f32_type))
    });
    let time = problem.sequences.longest();
    let first = Piece { problem, steps: 0..time.min(COMPARED) };
    let last = Piece { problem, steps: time.saturating_sub(COMPARED)..time };

    let forward = || {
        let args = ForwardArgs {
            q: x.q.clone(),
            k: x.k.clone(),
            v: x.v.clone(),
            gate: x.gate.clone(),
            initial_state: None,
            o: x.o.clone(),
            final_state: x.state.clone(),
        };
        gla_kernels::forward(client, problem, strategy, args)
    };
    let began = Instant::now();
    let blueprint = apart(client, forward)?;
    let allocated = mib(held(client) - before);
    let state = check(client, "the final state", &x.state, f32_type)?;
    let first_forward = began.elapsed().as_secs_f64();
    let o = check(client, "o", &x.o, dtype)?;
    let inputs = first.inputs(&host);
    first.compare("o", &eval::forward(&inputs).o, &o, value_dim)?;
    if let (false, Some(piece)) = (times, Piece::enough(problem, CARRIED[0], true)) {
        let expected = eval::forward(&piece.inputs(&host));
        compare(problem, "the final state", &expected.final_state, &first_state(problem, &state))?;
        let own = expected.o.len().saturating_sub(last.steps.len() * value_dim);
        last.compare("o", &expected.o[own..], &o, value_dim)?;
    }
    let fwd = Timed {
        pass: "fwd",
        ms: median_if(times, client, || {
            forward().expect("it has run before");
        }),
        mib: allocated,
    };

    clean(client)?;
    let (d_o, [dq, dk, dv], dgate, dh0) = apart(client, || {
        let d_o = upload(client, &host.d_o, dtype);
        let grads = [&host.q, &host.k, &host.v].map(|x| poisoned(client, x.len(), dtype));
        let dgate = host.gate.as_ref().map(|gate| poisoned(client, gate.len(), f32_type));
        (d_o, grads, dgate, poisoned(client, problem.state_len(), f32_type))
    });
    let backward = || {
        let args = BackwardArgs {
            q: x.q.clone(),
            k: x.k.clone(),
            v: x.v.clone(),
            gate: x.gate.clone(),
            initial_state: None,
            d_o: d_o.clone(),
            d_final: None,
            dq: dq.clone(),
            dk: dk.clone(),
            dv: dv.clone(),
            dgate: dgate.clone(),
            dh0: dh0.clone(),
        };
        gla_kernels::backward(client, problem, strategy, args)
    };
    let began = Instant::now();
    apart(client, backward)?;
    let allocated = mib(held(client) - before).max(allocated);
    let dh0 = check(client, "dh0", &dh0, f32_type)?;
    let first_backward = began.elapsed().as_secs_f64();
    let dq = check(client, "dq", &dq, dtype)?;
    let dk = check(client, "dk", &dk, dtype)?;
    let dv = check(client, "dv", &dv, dtype)?;
    let of_gate =
        dgate.as_ref().map(|dgate| check(client, "dgate", dgate, f32_type)).transpose()?;
    let grads = eval::backward(&inputs, &first.rounded(&host.d_o, value_dim), None);
    first.compare("dq", &grads.dq, &dq, key_dim)?;
    let grads = eval::backward(&last.inputs(&host), &last.rounded(&host.d_o, value_dim), None);
    last.compare("dk", &grads.dk, &dk, key_dim)?;
    last.compare("dv", &grads.dv, &dv, value_dim)?;
    if let (false, Some(piece)) = (times, Piece::enough(problem, CARRIED[1], false)) {
        let d_o = piece.rounded(&host.d_o, value_dim);
        let expected = eval::backward(&piece.inputs(&host), &d_o, None);
        compare(problem, "dh0", &expected.dh0, &first_state(problem, &dh0))?;
        let width = match problem.dims.gate {
            GateKind::Vector => Some(key_dim),
            GateKind::Scalar => Some(1),
            // nothing, or a sum over all sequences
            GateKind::None | GateKind::Fixed => None,
        };
        if let (Some(width), Some(expected), Some(dgate)) = (width, &expected.dgate, &of_gate) {
            let unknown = if piece.steps.end == time { 0 } else { FORGOTTEN };
            let steps = 0..piece.steps.end.saturating_sub(unknown);
            let expected = &expected[..steps.len() * width];
            Piece { problem, steps }.compare("dgate", expected, dgate, width)?;
        }
    }
    println!(
        "first calls, which compile: {first_forward:.1} s forward, {first_backward:.1} s backward"
    );
    let both = Timed {
        pass: "fwdbwd",
        ms: median_if(times, client, || {
            forward().expect("it has run before");
            backward().expect("it has run before");
        }),
        mib: allocated,
    };
    Ok(Measured { passes: [fwd, both], blueprint })
}

/// Times one decoding step with a state of that type, checked first. Only that unless `times`.
pub fn decode(
    client: &Client,
    problem: &Problem,
    state_dtype: ElemType,
    times: bool,
) -> Result<Timed> {
    let before = clean(client)?;
    let Dims { value_dim, .. } = problem.dims;
    let host = Inputs::new(problem);
    let start = noise(problem.state_len(), 6);
    let x =
        apart(client, || Tensors::new(client, problem, &host, upload(client, &start, state_dtype)));
    let step = || {
        let args = RecurrentArgs {
            q: x.q.clone(),
            k: x.k.clone(),
            v: x.v.clone(),
            gate: x.gate.clone(),
            state: x.state.clone(),
            state_dtype,
            o: x.o.clone(),
        };
        gla_kernels::recurrent(client, problem, args)
    };
    apart(client, step)?;
    let allocated = mib(held(client) - before);
    let o = check(client, "o", &x.o, problem.dtype)?;
    let state = check(client, "the state", &x.state, state_dtype)?;
    // the step of the first sequence's first head
    let piece = Piece { problem, steps: 0..1 };
    let mut initial = first_state(problem, &start);
    precision(state_dtype).round_all(&mut initial);
    let expected =
        eval::forward(&RefInputs { initial_state: Some(initial), ..piece.inputs(&host) });
    piece.compare("o", &expected.o, &o, value_dim)?;
    let coarser = if state_dtype == f32::elem_type_native() { 1e-4 } else { 4e-3 };
    let own = first_state(problem, &state);
    eval::check("the state", &expected.final_state, &own, coarser, eval::ABS_FLOOR)
        .map_err(|e| anyhow!(e))?;
    Ok(Timed {
        pass: "decode",
        ms: median_if(times, client, || step().expect("it has run before")),
        mib: allocated,
    })
}

/// Not a number where nothing is timed.
fn median_if(times: bool, client: &Client, call: impl FnMut()) -> f64 {
    if times { median_ms(client, call) } else { f64::NAN }
}

/// Runs `call` with allocations of exactly their own size, in a pool apart: there a freed buffer serves
/// only others of its size. So what the pool holds in the end is what the call allocates, and at most by
/// the reuse among other sizes more than it needs at once. (The pools of daily use round up to pages,
/// which may be of hundreds of MiB.)
fn apart<Out: Send>(client: &Client, call: impl FnOnce() -> Out + Send) -> Out {
    client.memory_persistent_allocation((), |()| call())
}

/// Bytes in the pool of [`apart`].
fn held(client: &Client) -> u64 {
    let report = client.memory_report(MemoryScope::Device);
    report.streams.iter().map(|stream| stream.pools.persistent.usage.bytes_reserved).sum()
}

/// Gives back what earlier calls left in the pools: none of the next one's. What is held then.
fn clean(client: &Client) -> Result<u64> {
    client.memory_cleanup().map_err(|e| anyhow!("cleanup: {e:?}"))?;
    Ok(held(client))
}
