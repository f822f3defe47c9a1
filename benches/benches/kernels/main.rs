//! Kernel times: forward, forward + backward, and one decoding step.
//!
//! ```sh
//! cargo bench --workspace --bench kernels --features gla-benches/cuda -- --device cuda --suite --out rows.json
//! ```
//!
//! Before anything is timed its outputs, NaN until they are written, are read: all must be finite, and some
//! of one head those of the f64 reference. Rows go to the terminal as they come and, as one JSON array, to
//! `--out`, beside which a table (`.md`) and charts (`.svg`) are written; with `--peers`, the file that
//! `benches/peers.py` writes in the same run, beside the times of other implementations.

mod calls;
mod device;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Parser;
use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use gla_benches::{Ceilings, Peers, Row, Shape, Work, write_text};
use gla_kernels::{
    Blueprint, Dims, GateKind, Instruction, Plan, Problem, ScanBlueprint, Sequences,
    SplitBlueprint, Strategy, check_chunked,
};
use half::{bf16, f16};

use calls::{Timed, chunked, decode};
use device::{client, copy_gbps};

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
    /// The tile instruction of the scan plan, mma or cmma, instead of the one that fits best
    #[arg(long)]
    instruction: Option<String>,
    /// Chunks of a segment, instead of what fits best
    #[arg(long)]
    segment: Option<usize>,
    /// The shapes, gates and steps of the committed results, beside what is given
    #[arg(long)]
    suite: bool,
    /// As many steps in all, in fewer and longer sequences: for the chart of time against length
    #[arg(long)]
    sweep: bool,
    /// Three shapes with every gate, plan, instruction and type that the device has
    #[arg(long)]
    catalogue: bool,
    /// Compare more of the outputs, and time nothing: what is compiled is kept for a next process that times it,
    /// with the feature `persistence`
    #[arg(long, conflicts_with = "out")]
    check: bool,
    /// Print what the device reports, and measure nothing
    #[arg(long)]
    limits: bool,
    /// Times of peers in the same run
    #[arg(long)]
    peers: Option<PathBuf>,
    /// Write the rows to this file, and beside it NAME.md, NAME.svg, NAME-lines.svg, NAME-roofline.svg
    #[arg(long)]
    out: Option<PathBuf>,
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

/// Of the catalogue: many heads and long sequences, few and very long ones, many and short ones.
const CATALOGUE: [&str; 3] = [SUITE[0], SUITE[3], UNGATED[0]];

/// Without a gate, beside attention.
const UNGATED: [&str; 2] = ["8,1024,16,128,128", "8,2048,16,128,128"];

const SWEEP: [&str; 5] = [
    "16,1024,16,128,128",
    "8,2048,16,128,128",
    "4,4096,16,128,128",
    "2,8192,16,128,128",
    "1,16384,16,128,128",
];

const DECODE: [&str; 3] = ["1,4,256,512", "32,4,256,512", "256,4,256,512"];

const GATES: [&str; 4] = ["vector", "scalar", "fixed", "none"];

/// One problem, and how it is run.
#[derive(Clone, PartialEq)]
struct Run {
    shape: Shape,
    gate: String,
    dtype: String,
    plan: Option<String>,
    instruction: Option<String>,
    segment: Option<usize>,
    /// Left out, and told, where the device has no such plan, instruction or type.
    of_catalogue: bool,
}

impl Args {
    fn run(&self, shape: &str, gate: &str) -> Run {
        Run {
            shape: shape.parse().expect("a shape"),
            gate: gate.into(),
            dtype: self.dtype.clone(),
            plan: self.plan.clone(),
            instruction: self.instruction.clone(),
            segment: self.segment,
            of_catalogue: false,
        }
    }

    /// Each once.
    fn runs(&self) -> Vec<Run> {
        let mut runs = Vec::new();
        for shape in &self.shapes {
            runs.extend(self.gates.iter().map(|gate| self.run(&shape.to_string(), gate)));
        }
        if self.suite {
            runs.extend(SUITE.map(|shape| self.run(shape, "vector")));
            runs.extend(GATES.map(|gate| self.run(SUITE[0], gate)));
            runs.extend(UNGATED.map(|shape| self.run(shape, "none")));
        }
        if self.sweep {
            for gate in ["vector", "none"] {
                runs.extend(SWEEP.map(|shape| self.run(shape, gate)));
            }
        }
        if self.catalogue {
            for (shape, gate) in CATALOGUE.iter().flat_map(|shape| GATES.map(|gate| (shape, gate)))
            {
                for dtype in ["bf16", "f16", "f32"] {
                    for (plan, instruction) in
                        [("scan", Some("mma")), ("scan", Some("cmma")), ("split", None)]
                    {
                        runs.push(Run {
                            dtype: dtype.into(),
                            plan: Some(plan.into()),
                            instruction: instruction.map(String::from),
                            of_catalogue: true,
                            ..self.run(shape, gate)
                        });
                    }
                }
            }
        }
        let mut seen: Vec<Run> = Vec::new();
        for run in runs {
            if !seen.contains(&run) {
                seen.push(run);
            }
        }
        seen
    }
}

impl Run {
    fn problem(&self) -> Result<Problem> {
        Ok(problem(self.shape, gate_kind(&self.gate)?, elem_type(&self.dtype)?))
    }

    /// What it asks for; an error if the device does not have it.
    fn strategy(&self, client: &Client, problem: &Problem) -> Result<Strategy> {
        let strategy = match (self.plan.as_deref(), &self.instruction) {
            (None, None) => Strategy::Inferred,
            (None | Some("scan"), _) => Strategy::Plan(Plan::Scan),
            (Some("split"), None) => Strategy::Plan(Plan::Split),
            (Some("split"), Some(_)) => bail!("--instruction: the split plan has registers alone"),
            (Some(other), _) => bail!("--plan {other}: expected scan or split"),
        };
        let instruction = match self.instruction.as_deref() {
            None => None,
            Some("mma") => Some(Instruction::Mma),
            Some("cmma") => Some(Instruction::Cmma),
            Some(other) => bail!("--instruction {other}: expected mma or cmma"),
        };
        let mut blueprint = check_chunked(client, problem, strategy, true)?;
        if let (Blueprint::Scan(scan), Some(instruction)) = (&mut blueprint, instruction) {
            scan.instruction = instruction;
        }
        if let Some(chunks) = self.segment {
            let (Blueprint::Scan(ScanBlueprint { segment, .. })
            | Blueprint::Split(SplitBlueprint { segment, .. })) = &mut blueprint;
            *segment = chunks;
        }
        let strategy = Strategy::Forced(blueprint);
        check_chunked(client, problem, strategy, true)?;
        Ok(strategy)
    }
}

fn main() -> Result<()> {
    // test runners start benches too, to list their tests: there are none
    if !std::env::args().any(|arg| arg == "--bench") {
        return Ok(());
    }
    let args = Args::parse();
    let client = client(&args.device)?;
    let name = client.properties().identity.name.clone();
    if args.limits {
        let properties = client.properties();
        println!("{:#?}\n{:#?}", properties.hardware, client.features().matmul);
        return Ok(());
    }
    let peers = args.peers.as_deref().map(Peers::read).transpose()?.unwrap_or_default();
    let mut runs = args.runs();
    let mut steps = args.decode.clone();
    if args.suite {
        steps.extend(DECODE.map(String::from));
    }
    if runs.is_empty() && steps.is_empty() {
        runs.push(args.run("1,256,2,64,64", &args.gates[0]));
    }
    println!("{}: {name}", args.device);
    let gbps = if args.check { f64::NAN } else { copy_gbps(&client)? };
    let ceilings = Ceilings { gbps, tflops: peers.matmul_tflops() };
    if !args.check {
        match ceilings.tflops {
            Some(tflops) => println!("copy: {gbps:.0} GB/s; matrix product: {tflops:.0} TFLOP/s"),
            None => {
                println!("copy: {gbps:.0} GB/s; no peers' matrix product: shares of that alone")
            }
        }
    }

    let mut rows: Vec<Row> = Vec::new();
    let mut keep = |mut row: Row, work: Work, timed: &Timed| -> Result<()> {
        row.roofline = Some((work.floor_ms(&ceilings) / timed.ms * 1e3).round() / 1e3);
        row.peak_mib = Some(timed.mib);
        for row in peers.beside(row) {
            println!("{row}");
            rows.push(row);
        }
        // what is measured is kept, should the run end early
        match &args.out {
            Some(path) => write(path, &args, &name, &rows, &peers),
            None => Ok(()),
        }
    };
    for run in runs {
        let (problem, what) = (run.problem()?, format!("{} {} {}", run.shape, run.gate, run.dtype));
        let strategy = match run.strategy(&client, &problem) {
            Err(refused) if run.of_catalogue => {
                println!("{what}: left out: {refused}");
                continue;
            }
            strategy => strategy?,
        };
        let measured = chunked(&client, &problem, strategy, !args.check).context(what.clone())?;
        if args.check {
            let by = measured.blueprint;
            println!("{what}, {:?}, {:?}: as the reference", by.plan(), by.instruction());
            continue;
        }
        for timed in &measured.passes {
            let work = work(&problem, timed.pass, 0);
            let Run { shape, gate, dtype, .. } = &run;
            let mut row = Row::new(gate, timed.pass, *shape, dtype, timed.ms, work, &args.date);
            row.plan = format!("{:?}", measured.blueprint.plan()).to_lowercase();
            row.instruction = format!("{:?}", measured.blueprint.instruction()).to_lowercase();
            keep(row, work, timed)?;
        }
    }
    for step in &steps {
        let [batch, heads, key_dim, value_dim] = numbers(step)?;
        let shape = Shape { batch, time: 1, heads, key_dim, value_dim };
        let problem = problem(shape, GateKind::Vector, elem_type(&args.dtype)?);
        let mut types = vec![f32::elem_type_native(), problem.dtype];
        types.dedup();
        for state in types {
            let timed =
                decode(&client, &problem, state, !args.check).with_context(|| step.clone())?;
            if args.check {
                println!("{step}: as the reference");
                continue;
            }
            let work = work(&problem, timed.pass, state.size());
            let mut row =
                Row::new("vector", timed.pass, shape, &args.dtype, timed.ms, work, &args.date);
            row.state = Some(state.to_string());
            (row.plan, row.instruction) = ("recurrent".into(), "registers".into());
            keep(row, work, &timed)?;
        }
    }
    Ok(())
}

/// The rows, their table, and the charts.
fn write(path: &Path, args: &Args, device: &str, rows: &[Row], peers: &Peers) -> Result<()> {
    gla_benches::write_rows(path, rows)?;
    let beside = |suffix: &str| {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        path.with_file_name(format!("{stem}{suffix}"))
    };
    write_text(&beside(".md"), gla_benches::markdown(rows))?;
    write_text(&beside(".svg"), gla_benches::svg(&format!("{device}, {}", args.dtype), rows))?;
    let shares = format!("share of what {device} was measured to do");
    write_text(&beside("-roofline.svg"), gla_benches::roofline(&shares, rows))?;
    if args.sweep {
        let total = SWEEP.map(|text| text.parse::<Shape>().expect("a shape"));
        let mut swept = rows.to_vec();
        swept.retain(|row| total.contains(&row.shape));
        let title = format!(
            "forward + backward of {} steps, 16 heads of 128, {}, {device}",
            total[0].batch * total[0].time,
            args.dtype,
        );
        write_text(&beside("-lines.svg"), gla_benches::lines(&title, &swept, peers))?;
    }
    Ok(())
}

fn elem_type(name: &str) -> Result<ElemType> {
    Ok(match name {
        "f32" => f32::elem_type_native(),
        "f16" => f16::elem_type_native(),
        "bf16" => bf16::elem_type_native(),
        other => bail!("--dtype {other}: expected f32, f16 or bf16"),
    })
}

fn gate_kind(name: &str) -> Result<GateKind> {
    Ok(match name {
        "none" => GateKind::None,
        "fixed" => GateKind::Fixed,
        "scalar" => GateKind::Scalar,
        "vector" => GateKind::Vector,
        other => bail!("--gate {other}: expected none, fixed, scalar or vector"),
    })
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
