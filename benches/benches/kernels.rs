//! Kernel times: forward, forward + backward, and one decoding step.
//!
//! ```sh
//! cargo bench -p gla-benches --bench kernels --features cuda -- --device cuda --suite --out rows.json
//! ```
//!
//! Outputs start as NaN and are read and checked before anything is timed; that they are right is what
//! the tests check, on the same devices. Rows go to the terminal as they come and, as one JSON array, to
//! `--out`; with `--peers`, the file that `benches/peers.py` writes in the same run, beside the
//! times of other implementations.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use cubecl::MemoryScope;
use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;
use gla_benches::{Ceilings, Peers, Row, Shape, Work, median_ms, mib};
use gla_kernels::{
    BackwardArgs, Dims, ForwardArgs, GateKind, Plan, Problem, RecurrentArgs, Sequences, Strategy,
};
use half::{bf16, f16};
use rayon::prelude::*;

#[derive(Parser)]
struct Args {
    /// cuda, vulkan or wgpu
    #[arg(long, default_value = "wgpu")]
    device: String,
    /// f32, f16 or bf16
    #[arg(long, default_value = "f32")]
    dtype: String,
    /// B,T,H,K,V of forward and backward; may be given several times
    #[arg(long = "shape")]
    shapes: Vec<Shape>,
    /// B,H,K,V of one decoding step; may be given several times
    #[arg(long = "decode")]
    decode: Vec<String>,
    /// none, fixed, scalar or vector; may be given several times
    #[arg(long = "gate", default_value = "vector")]
    gates: Vec<String>,
    /// scan or split instead of what fits best
    #[arg(long)]
    plan: Option<String>,
    /// The shapes, gates and steps of the committed results, beside what is given
    #[arg(long)]
    suite: bool,
    /// Print what the device reports, and measure nothing
    #[arg(long)]
    limits: bool,
    /// Times of peers in the same run
    #[arg(long)]
    peers: Option<std::path::PathBuf>,
    /// Write the rows to this file
    #[arg(long)]
    out: Option<std::path::PathBuf>,
    /// Draw the rows that have peers to this file
    #[arg(long)]
    svg: Option<std::path::PathBuf>,
    /// Draw time against length to this file
    #[arg(long)]
    lines: Option<std::path::PathBuf>,
    /// Day of the run, for the rows
    #[arg(long, default_value = "")]
    date: String,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// Shapes of the committed results; the first is also measured with every gate.
const SUITE: [&str; 5] = [
    "8,2048,4,128,256",
    "8,4096,4,256,512",
    "2,16384,4,256,512",
    "1,65536,4,128,256",
    "8,2048,16,128,128",
];

/// Without a gate, beside attention.
/// As many steps in all, in fewer and longer sequences: for the chart of time against length.
const SWEEP: [&str; 5] = [
    "16,1024,16,128,128",
    "8,2048,16,128,128",
    "4,4096,16,128,128",
    "2,8192,16,128,128",
    "1,16384,16,128,128",
];

const UNGATED: [&str; 2] = ["8,1024,16,128,128", "8,2048,16,128,128"];

const DECODE: [&str; 3] = ["1,4,256,512", "32,4,256,512", "256,4,256,512"];

// without a back-end every name is refused
#[allow(unreachable_code, unused_variables)]
fn client(name: &str) -> Result<Client> {
    let device: cubecl::Device = match name {
        #[cfg(feature = "cuda")]
        "cuda" => cubecl::Device::cuda(0)?,
        #[cfg(any(feature = "wgpu", feature = "vulkan"))]
        "wgpu" | "vulkan" => cubecl::Device::wgpu(Default::default())?,
        other => anyhow::bail!("--device {other}: not compiled in"),
    };
    Ok(device.client())
}

fn upload(client: &Client, values: &[f32], dtype: ElemType) -> Handle {
    if dtype == bf16::elem_type_native() {
        let x: Vec<bf16> = values.par_iter().map(|&x| bf16::from_f32(x)).collect();
        client.create_from_slice(bf16::as_bytes(&x))
    } else if dtype == f16::elem_type_native() {
        let x: Vec<f16> = values.par_iter().map(|&x| f16::from_f32(x)).collect();
        client.create_from_slice(f16::as_bytes(&x))
    } else {
        client.create_from_slice(f32::as_bytes(values))
    }
}

fn read(client: &Client, handle: Handle, dtype: ElemType) -> Result<Vec<f32>> {
    let bytes = client.read_one(handle).map_err(|e| anyhow::anyhow!("launch failed: {e:?}"))?;
    Ok(if dtype == bf16::elem_type_native() {
        bf16::from_bytes(&bytes).par_iter().map(|x| x.to_f32()).collect()
    } else if dtype == f16::elem_type_native() {
        f16::from_bytes(&bytes).par_iter().map(|x| x.to_f32()).collect()
    } else {
        f32::from_bytes(&bytes).to_vec()
    })
}

/// Deterministic noise in -1..1 that looks like nothing in particular.
fn noise(len: usize, seed: u32) -> Vec<f32> {
    let mut values = vec![0.0; len];
    values.par_chunks_mut(1 << 16).enumerate().for_each(|(n, piece)| {
        let mut x = (16 * n as u32 + seed).wrapping_mul(2654435761).max(1);
        for value in piece {
            x ^= x << 13;
            x ^= x >> 17;
            x ^= x << 5;
            *value = x as f32 / u32::MAX as f32 * 2.0 - 1.0;
        }
    });
    values
}

fn elem_type(name: &str) -> Result<ElemType> {
    Ok(match name {
        "f32" => f32::elem_type_native(),
        "f16" => f16::elem_type_native(),
        "bf16" => bf16::elem_type_native(),
        other => anyhow::bail!("--dtype {other}: expected f32, f16 or bf16"),
    })
}

fn gate_kind(name: &str) -> Result<GateKind> {
    Ok(match name {
        "none" => GateKind::None,
        "fixed" => GateKind::Fixed,
        "scalar" => GateKind::Scalar,
        "vector" => GateKind::Vector,
        other => anyhow::bail!("--gate {other}: expected none, fixed, scalar or vector"),
    })
}

fn main() -> Result<()> {
    // test runners start benches too, to list their tests: there are none
    if !std::env::args().any(|arg| arg == "--bench") {
        return Ok(());
    }
    let args = Args::parse();
    let client = client(&args.device)?;
    if args.limits {
        let properties = client.properties();
        println!("{:#?}\n{:#?}", properties.hardware, client.features().matmul);
        return Ok(());
    }
    let peers = args.peers.as_deref().map(Peers::read).transpose()?.unwrap_or_default();
    let strategy = match args.plan.as_deref() {
        None => Strategy::Inferred,
        Some("scan") => Strategy::Plan(Plan::Scan),
        Some("split") => Strategy::Plan(Plan::Split),
        Some(other) => anyhow::bail!("--plan {other}: expected scan or split"),
    };
    let mut runs: Vec<(Shape, String)> = Vec::new();
    let mut steps = args.decode.clone();
    for shape in &args.shapes {
        runs.extend(args.gates.iter().map(|gate| (*shape, gate.clone())));
    }
    if args.suite {
        let shape = |text: &str| text.parse().expect("a shape");
        runs.extend(SUITE.map(|text| (shape(text), "vector".to_string())));
        runs.extend(["none", "fixed", "scalar"].map(|gate| (shape(SUITE[0]), gate.to_string())));
        runs.extend(UNGATED.map(|text| (shape(text), "none".to_string())));
        for gate in ["vector", "none"] {
            runs.extend(SWEEP.map(|text| (shape(text), gate.to_string())));
        }
        let mut seen: Vec<(Shape, String)> = Vec::new();
        runs.retain(|run| {
            let new = !seen.contains(run);
            seen.push(run.clone());
            new
        });
        steps.extend(DECODE.map(String::from));
    }
    if runs.is_empty() && steps.is_empty() {
        runs.push(("1,256,2,64,64".parse()?, "vector".to_string()));
    }
    println!("{}: {}", args.device, client.properties().identity.name);
    let ceilings = Ceilings { gbps: copy_gbps(&client)?, tflops: peers.matmul_tflops() };
    println!("copy: {:.0} GB/s; matrix product: {:?} TFLOP/s", ceilings.gbps, ceilings.tflops);
    let mut rows = Vec::new();
    // what is measured is kept, should the run end early
    let keep = |rows: &mut Vec<Row>, row: Row| {
        println!("{row}");
        rows.push(row);
        args.out.as_deref().map_or(Ok(()), |path| gla_benches::write_rows(path, rows))
    };
    for (shape, gate) in runs {
        let problem = problem(shape, gate_kind(&gate)?, elem_type(&args.dtype)?);
        // what earlier calls left in the pool is none of this one's
        client.memory_cleanup().map_err(|e| anyhow::anyhow!("cleanup: {e:?}"))?;
        let before = reserved(&client);
        for (pass, ms, plan, instruction) in
            chunked(&client, &problem, strategy).with_context(|| format!("{shape} {gate}"))?
        {
            let work = work(&problem, pass, 0);
            let mut row = Row::new(&gate, pass, shape, &args.dtype, ms, work, &args.date);
            (row.plan, row.instruction) = (plan, instruction);
            row.roofline = Some(share(work.floor_ms(&ceilings) / ms));
            if pass == "fwdbwd" {
                let bytes = reserved(&client).saturating_sub(before);
                row.peak_mib = Some(mib(bytes));
            }
            keep(&mut rows, peers.beside(row))?;
        }
    }
    for step in &steps {
        let [batch, heads, key_dim, value_dim] = numbers(step)?;
        let shape = Shape { batch, time: 1, heads, key_dim, value_dim };
        let problem = problem(shape, GateKind::Vector, elem_type(&args.dtype)?);
        let mut types = vec![f32::elem_type_native(), problem.dtype];
        types.dedup();
        for state in types {
            let ms = decode(&client, &problem, state).with_context(|| step.clone())?;
            let work = work(&problem, "decode", state.size());
            let mut row = Row::new("vector", "decode", shape, &args.dtype, ms, work, &args.date);
            row.roofline = Some(share(work.floor_ms(&ceilings) / ms));
            row.plan = format!("recurrent, {state} state");
            row.instruction = "registers".into();
            keep(&mut rows, peers.beside(row))?;
        }
    }
    if let Some(path) = &args.svg {
        let title = format!("{}, {}", client.properties().identity.name, args.dtype);
        std::fs::write(path, gla_benches::svg(&title, &rows))
            .with_context(|| path.display().to_string())?;
    }
    if let Some(path) = &args.lines {
        let total = SWEEP.map(|text| text.parse::<Shape>().expect("a shape"));
        let mut swept = rows.clone();
        swept.retain(|row| total.contains(&row.shape));
        let title = format!(
            "forward + backward of {} steps, 16 heads of 128, {}, {}",
            total[0].batch * total[0].time,
            args.dtype,
            client.properties().identity.name
        );
        std::fs::write(path, gla_benches::lines(&title, &swept, &peers))
            .with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// Bytes that the device's memory pools hold.
fn reserved(client: &Client) -> u64 {
    client.memory_report(MemoryScope::Device).usage().bytes_reserved
}

fn numbers<const N: usize>(text: &str) -> Result<[usize; N]> {
    let numbers: Vec<usize> = text.split(',').map(str::parse).collect::<Result<_, _>>()?;
    numbers.try_into().map_err(|_| anyhow::anyhow!("{text}: expected {N} numbers"))
}

fn problem(shape: Shape, gate: GateKind, dtype: ElemType) -> Problem {
    let Shape { batch, time, heads, key_dim, value_dim } = shape;
    Problem {
        dims: Dims { heads, kv_heads: heads, key_dim, value_dim, gate },
        sequences: Sequences::Uniform { batch, time },
        scale: (key_dim as f32).powf(-0.5),
        dtype,
        gate_dtype: f32::elem_type_native(),
    }
}

/// Three digits after the point.
fn share(x: f64) -> f64 {
    (x * 1e3).round() / 1e3
}

/// What a pass cannot do without; `state_size`: bytes of an element of the state that a step of decoding
/// reads and writes.
fn work(problem: &Problem, pass: &str, state_size: usize) -> Work {
    let Dims { heads, key_dim, value_dim, .. } = problem.dims;
    let size = problem.dtype.size();
    let (keys, values) = (problem.rows() * heads * key_dim, problem.rows() * heads * value_dim);
    let gate = problem.gate_len() * problem.gate_dtype.size();
    let forward = 2 * keys * size + gate + 2 * values * size;
    // of the recurrence: update and read, and in the backward rebuild the state, update its gradient,
    // read three gradients
    let products = (problem.rows() * heads * key_dim * value_dim) as f64;
    let (bytes, times) = match pass {
        "fwd" => (forward, 4.0),
        "decode" => (forward + 2 * state_size * problem.state_len(), 4.0),
        // the inputs and do once more, and the gradients
        _ => (2 * forward + 2 * keys * size + gate + values * size, 14.0),
    };
    Work { bytes: bytes as f64, operations: times * products }
}

#[cube(launch_unchecked)]
fn copy_kernel(x: &[Vector<f32, Const<4>>], out: &mut [Vector<f32, Const<4>>]) {
    let stride = CUBE_COUNT * CUBE_DIM as usize;
    for at in range_stepped(ABSOLUTE_POS, x.len(), stride) {
        out[at] = x[at];
    }
}

/// GB/s of a copy of buffers that no cache holds.
fn copy_gbps(client: &Client) -> Result<f64> {
    let bytes = (1usize << 29).min(client.properties().memory.max_page_size as usize);
    let (x, out) = (client.empty(bytes), client.empty(bytes));
    let call = || {
        // SAFETY: the kernel stays inside its buffers, which have this length.
        unsafe {
            copy_kernel::launch_unchecked(
                client,
                CubeCount::Static(1 << 12, 1, 1),
                CubeDim::new_1d(256),
                BufferArg::from_raw_parts(x.clone(), bytes / 16),
                BufferArg::from_raw_parts(out.clone(), bytes / 16),
            );
        }
    };
    call();
    // a launch that failed shows here
    read(client, out.clone().offset_end((bytes - 16) as u64), f32::elem_type_native())?;
    Ok(2.0 * bytes as f64 / median_ms(client, call) / 1e6)
}

/// The tensors of a call.
struct Tensors {
    q: Handle,
    k: Handle,
    v: Handle,
    gate: Option<Handle>,
    o: Handle,
    state: Handle,
}

impl Tensors {
    fn new(client: &Client, problem: &Problem) -> Self {
        let Dims { heads, key_dim, value_dim, gate, .. } = problem.dims;
        let keys = problem.rows() * heads * key_dim;
        let values = problem.rows() * heads * value_dim;
        let f32_type = f32::elem_type_native();
        let log_gate: Vec<f32> = noise(problem.gate_len(), 5)
            .par_iter()
            .map(|x| -(1.0 + (-2.0 * x).exp()).ln() / 16.0)
            .collect();
        Tensors {
            q: upload(client, &noise(keys, 1), problem.dtype),
            k: upload(client, &noise(keys, 2), problem.dtype),
            v: upload(client, &noise(values, 3), problem.dtype),
            gate: gate.is_some().then(|| upload(client, &log_gate, f32_type)),
            o: upload(client, &vec![f32::NAN; values], problem.dtype),
            state: upload(client, &vec![0.0; problem.state_len()], f32_type),
        }
    }
}

/// Fails if a tensor has a NaN or an infinity, or is all zero.
fn check(client: &Client, name: &str, handle: &Handle, dtype: ElemType) -> Result<()> {
    let values = read(client, handle.clone(), dtype)?;
    ensure!(values.par_iter().all(|x| x.is_finite()), "{name} has NaN or infinities");
    ensure!(values.par_iter().any(|&x| x != 0.0), "{name} is all zero");
    Ok(())
}

type Timed = (&'static str, f64, String, String);

fn chunked(client: &Client, problem: &Problem, strategy: Strategy) -> Result<Vec<Timed>> {
    let Dims { heads, key_dim, value_dim, .. } = problem.dims;
    let (dtype, f32_type) = (problem.dtype, f32::elem_type_native());
    let keys = problem.rows() * heads * key_dim;
    let values = problem.rows() * heads * value_dim;
    let x = Tensors::new(client, problem);
    let d_o = upload(client, &noise(values, 4), dtype);
    let poison = |len: usize, dtype| upload(client, &vec![f32::NAN; len], dtype);
    let (dq, dk, dv) = (poison(keys, dtype), poison(keys, dtype), poison(values, dtype));
    let dgate = x.gate.as_ref().map(|_| poison(problem.gate_len(), f32_type));
    let dh0 = poison(problem.state_len(), f32_type);

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
    let blueprint = forward()?;
    read(client, x.state.clone(), f32_type)?;
    let first = began.elapsed().as_secs_f64();
    backward()?;
    read(client, dh0.clone(), f32_type)?;
    let second = began.elapsed().as_secs_f64() - first;
    for (name, handle) in [("o", &x.o), ("dq", &dq), ("dk", &dk), ("dv", &dv)] {
        check(client, name, handle, dtype)?;
    }
    if let Some(dgate) = &dgate {
        check(client, "dgate", dgate, f32_type)?;
    }
    println!("first calls, which compile: forward {first:.1} s, backward {second:.1} s");
    let plan = format!("{:?}", blueprint.plan()).to_lowercase();
    let instruction = format!("{:?}", blueprint.instruction()).to_lowercase();
    let fwd = median_ms(client, || {
        forward().expect("it has run before");
    });
    let both = median_ms(client, || {
        forward().expect("it has run before");
        backward().expect("it has run before");
    });
    Ok(vec![("fwd", fwd, plan.clone(), instruction.clone()), ("fwdbwd", both, plan, instruction)])
}

fn decode(client: &Client, problem: &Problem, state_dtype: ElemType) -> Result<f64> {
    let mut x = Tensors::new(client, problem);
    x.state = upload(client, &vec![0.0; problem.state_len()], state_dtype);
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
    step()?;
    check(client, "o", &x.o, problem.dtype)?;
    check(client, "state", &x.state, state_dtype)?;
    Ok(median_ms(client, || step().expect("it has run before")))
}
