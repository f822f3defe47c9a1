//! The calls that are timed, and the check of what they wrote.

use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use cubecl::MemoryScope;
use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;
use gla_benches::{median_ms, mib};
use gla_kernels::{BackwardArgs, Blueprint, ForwardArgs, Problem, RecurrentArgs, Strategy};
use rayon::prelude::*;

use crate::device::{noise, poisoned, read, upload};
use crate::reference::{Grads, Inputs, Reference, compare_step};

/// One pass.
pub struct Timed {
    /// None where nothing is timed.
    pub ms: Option<f64>,
    /// Its first call, which compiles.
    pub first_ms: f64,
    /// What it allocates, see [`apart`].
    pub mib: f64,
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
    let values = finite(client, name, handle, dtype)?;
    ensure!(values.par_iter().any(|&x| x != 0.0), "{name} is all zero");
    Ok(values)
}

fn finite(client: &Client, name: &str, handle: &Handle, dtype: ElemType) -> Result<Vec<f32>> {
    let values = read(client, handle, dtype)?;
    ensure!(values.par_iter().all(|x| x.is_finite()), "{name} has NaN or infinities");
    Ok(values)
}

/// A problem, its tensors, and what they should become.
struct Chunked<'a> {
    client: &'a Client,
    problem: &'a Problem,
    strategy: Strategy,
    /// Bytes in the pool before.
    before: u64,
    host: Inputs,
    x: Tensors,
    reference: Reference<'a>,
}

/// Times forward, and forward + backward, after a first call of each that is checked: all outputs are finite, and
/// `o`, `dq`, `dk` and `dv` of one head are those of the reference at both ends of the sequence. Unless `times`
/// nothing is timed, and more is compared. `done` gets each pass as it ends.
pub fn chunked(
    client: &Client,
    problem: &Problem,
    blueprint: Blueprint,
    times: bool,
    done: &mut Vec<Timed>,
) -> Result<()> {
    let before = clean(client)?;
    let host = Inputs::new(problem);
    let reference = Reference::new(problem, &host, !times);
    let x = apart(client, || {
        let state = poisoned(client, problem.state_len(), f32::elem_type_native());
        Tensors::new(client, problem, &host, state)
    });
    let strategy = Strategy::Forced(blueprint);
    let call = Chunked { client, problem, strategy, before, host, x, reference };
    let forward = call.time_forward(times).context("forward")?;
    let (first_ms, mib) = (forward.first_ms, forward.mib);
    done.push(forward);
    let both = call.time_both(times).context("backward")?;
    let seconds = [first_ms, both.first_ms].map(|ms| ms / 1e3);
    println!(
        "first calls, which compile: {:.1} s forward, {:.1} s backward",
        seconds[0], seconds[1]
    );
    done.push(Timed { first_ms: first_ms + both.first_ms, mib: both.mib.max(mib), ..both });
    Ok(())
}

impl Chunked<'_> {
    fn forward(&self) -> Result<(), gla_kernels::GlaError> {
        let x = &self.x;
        let args = ForwardArgs {
            q: x.q.clone(),
            k: x.k.clone(),
            v: x.v.clone(),
            gate: x.gate.clone(),
            initial_state: None,
            o: x.o.clone(),
            final_state: x.state.clone(),
        };
        gla_kernels::forward(self.client, self.problem, self.strategy, args).map(drop)
    }

    fn time_forward(&self, times: bool) -> Result<Timed> {
        let Chunked { client, problem, x, .. } = self;
        let began = Instant::now();
        apart(client, || self.forward())?;
        let allocated = mib(held(client) - self.before);
        let state = check(client, "the final state", &x.state, f32::elem_type_native())?;
        let first_ms = milliseconds(began);
        let o = check(client, "o", &x.o, problem.dtype)?;
        self.reference.outputs(&o, &state)?;
        let call = || self.forward().expect("it has run before");
        Ok(Timed { ms: times.then(|| median_ms(client, call)), first_ms, mib: allocated })
    }

    /// Of the backward the first call, and forward + backward timed.
    fn time_both(&self, times: bool) -> Result<Timed> {
        let Chunked { client, problem, host, x, .. } = self;
        let (dtype, f32_type) = (problem.dtype, f32::elem_type_native());
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
            gla_kernels::backward(client, problem, self.strategy, args)
        };
        let began = Instant::now();
        apart(client, backward)?;
        let allocated = mib(held(client) - self.before);
        let read_dh0 = check(client, "dh0", &dh0, f32_type)?;
        let first_ms = milliseconds(began);
        // a gate before the first step decays nothing
        let of_gate = if problem.sequences.longest() > 1 { check } else { finite };
        let check_gate = |dgate: &Handle| of_gate(client, "dgate", dgate, f32_type);
        self.reference.grads(&Grads {
            dq: check(client, "dq", &dq, dtype)?,
            dk: check(client, "dk", &dk, dtype)?,
            dv: check(client, "dv", &dv, dtype)?,
            dgate: dgate.as_ref().map(check_gate).transpose()?,
            dh0: read_dh0,
        })?;
        let both = || {
            self.forward().expect("it has run before");
            backward().expect("it has run before");
        };
        Ok(Timed { ms: times.then(|| median_ms(client, both)), first_ms, mib: allocated })
    }
}

/// Times one decoding step with a state of that type, after a first that is compared with the reference. Only
/// that unless `times`.
pub fn decode(
    client: &Client,
    problem: &Problem,
    state_dtype: ElemType,
    times: bool,
) -> Result<Timed> {
    let before = clean(client)?;
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
    let began = Instant::now();
    apart(client, step)?;
    let allocated = mib(held(client) - before);
    let o = check(client, "o", &x.o, problem.dtype)?;
    let first_ms = milliseconds(began);
    let state = check(client, "the state", &x.state, state_dtype)?;
    compare_step(problem, &host, (&start, state_dtype), &o, &state)?;
    let call = || step().expect("it has run before");
    Ok(Timed { ms: times.then(|| median_ms(client, call)), first_ms, mib: allocated })
}

fn milliseconds(since: Instant) -> f64 {
    (since.elapsed().as_secs_f64() * 1e3).round()
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
