//! Kernel times: forward, forward + backward, and one decoding step.
//!
//! ```sh
//! cargo bench --workspace --bench kernels --features gla-benches/cuda -- --device cuda --suite --out "$PWD/rows.json"
//! ```
//!
//! (cargo runs benches in their package's folder, which relative paths are then of.)
//!
//! Before anything is timed its outputs, NaN until they are written, are read: all must be finite, and those of
//! one head at both ends of the sequence, of a step of decoding all, those of the f64 reference. Rows go to the
//! terminal as they come and, as one JSON array, to `--out`, beside which a table (`.md`) and charts (`.svg`) are
//! written; with `--peers`, the file that `benches/peers.py` writes in the same run, beside the times of other
//! implementations. What fails has a row that says why; the rest goes on, and the exit status is 1.

mod calls;
mod device;
mod reference;
mod runs;

use std::collections::HashSet;
use std::path::PathBuf;

use anyhow::{Error, Result, ensure};
use clap::Parser;
use cubecl::client::Client;
use cubecl::prelude::*;
use gla_benches::{Peers, Row, Shape, Work, arguments, caught, is_bench, report, short};
use gla_kernels::{Blueprint, GateKind};

use calls::{Timed, chunked, decode};
use device::{client, copy_gbps};
use runs::{Run, elem_type, problem, work};

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
    /// Chunks of a segment of the scan plan, instead of what fits best
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
    /// Of the sources, for the rows
    #[arg(long, default_value = "")]
    commit: String,
    /// Write once more what shows the rows of this file, as beside --out, and measure nothing
    #[arg(long, exclusive = true)]
    redraw: Option<PathBuf>,
}

fn main() -> Result<()> {
    if !is_bench() {
        return Ok(());
    }
    let args = Args::parse_from(arguments());
    if let Some(path) = &args.redraw {
        return report::draw(path, &gla_benches::read_rows(path)?);
    }
    let client = client(&args.device)?;
    if args.limits {
        let properties = client.properties();
        println!("{:#?}\n{:#?}", properties.hardware, client.features().matmul);
        return Ok(());
    }
    let mut bench = Bench::new(&args, &client)?;
    // in the order in which a run that is cut short would miss them
    for run in args.runs() {
        bench.chunked(&run)?;
    }
    for shape in args.steps()? {
        bench.decode(shape)?;
    }
    for run in args.sweep().into_iter().chain(args.catalogue()) {
        bench.chunked(&run)?;
    }
    ensure!(bench.failed == 0, "{} of {} calls failed", bench.failed, bench.calls);
    Ok(())
}

/// What is measured, and where it goes.
struct Bench<'a> {
    args: &'a Args,
    client: &'a Client,
    peers: Peers,
    /// What all rows have in common.
    common: Row,
    rows: Vec<Row>,
    /// What ran, or was refused: the catalogue meets the suite.
    seen: HashSet<(Shape, String, String, Option<Blueprint>)>,
    calls: usize,
    failed: usize,
}

impl<'a> Bench<'a> {
    /// Measures the ceilings.
    fn new(args: &'a Args, client: &'a Client) -> Result<Self> {
        let peers = args.peers.as_deref().map(Peers::read).transpose()?.unwrap_or_default();
        let device = client.properties().identity.name.clone();
        println!("{}: {device}", args.device);
        let (mut copy, matmul_tflops) = (None, peers.matmul_tflops());
        if !args.check {
            let (own, peer) = (copy_gbps(client)?, peers.copy_gbps());
            println!("copy: {own:.0} GB/s");
            if let Some(peer) = peer {
                println!("a peer's copy: {peer:.0} GB/s");
            }
            match matmul_tflops {
                Some(tflops) => println!("a peer's matrix product: {tflops:.0} TFLOP/s"),
                None => println!("no peer's matrix product: shares of the copy alone"),
            }
            copy = Some((own.max(peer.unwrap_or(own)) * 10.0).round() / 10.0);
        }
        let common = Row {
            op: "gla".into(),
            copy_gbps: copy,
            matmul_tflops: matmul_tflops.map(|tflops| (tflops * 10.0).round() / 10.0),
            device,
            date: args.date.clone(),
            commit: args.commit.clone(),
            ..Row::default()
        };
        let (rows, seen) = (Vec::new(), HashSet::new());
        Ok(Bench { args, client, peers, common, rows, seen, calls: 0, failed: 0 })
    }

    /// Forward, and forward + backward.
    fn chunked(&mut self, run: &Run) -> Result<()> {
        let problem = run.problem()?;
        let Run { shape, gate, dtype, .. } = run;
        let what = format!("{shape} {gate} {dtype}");
        let blueprint = run.blueprint(self.client, &problem);
        if let (true, Err(refused)) = (run.of_catalogue, &blueprint) {
            println!("{what}: left out: {refused}");
            return Ok(());
        }
        let chosen = blueprint.as_ref().ok().copied();
        if !self.seen.insert((*shape, gate.clone(), dtype.clone(), chosen)) {
            return Ok(());
        }
        let row = Row {
            gate: gate.clone(),
            shape: *shape,
            dtype: dtype.clone(),
            plan: chosen.map_or_else(
                || run.plan.clone().unwrap_or_default(),
                |chosen| format!("{:?}", chosen.plan()).to_lowercase(),
            ),
            instruction: chosen.map_or_else(
                || run.instruction.clone().unwrap_or_default(),
                |chosen| format!("{:?}", chosen.instruction()).to_lowercase(),
            ),
            ..self.common.clone()
        };
        let mut done = Vec::new();
        let times = !self.args.check;
        let outcome = caught(|| chunked(self.client, &problem, blueprint?, times, &mut done));
        for (n, pass) in ["fwd", "fwdbwd"].into_iter().enumerate() {
            let row = Row { pass: pass.into(), ..row.clone() };
            let measured = match &outcome {
                Err(error) => done.get(n).ok_or(error),
                Ok(()) => Ok(&done[n]),
            };
            self.keep(row, measured, work(&problem, pass, 0))?;
        }
        Ok(())
    }

    /// One step, with a state in f32 and in the type of the inputs.
    fn decode(&mut self, shape: Shape) -> Result<()> {
        let dtype = &self.args.dtype;
        let problem = problem(shape, GateKind::Vector, elem_type(dtype)?);
        let mut types = vec![f32::elem_type_native(), problem.dtype];
        types.dedup();
        for state in types {
            let row = Row {
                gate: "vector".into(),
                pass: "decode".into(),
                shape,
                dtype: dtype.clone(),
                state: Some(state.to_string()),
                plan: "recurrent".into(),
                instruction: "registers".into(),
                ..self.common.clone()
            };
            let timed = caught(|| decode(self.client, &problem, state, !self.args.check));
            self.keep(row, timed.as_ref(), work(&problem, "decode", state.size()))?;
        }
        Ok(())
    }

    /// Tells the row and writes all: what is measured is kept, should the run end early.
    fn keep(&mut self, row: Row, measured: Result<&Timed, &Error>, work: Work) -> Result<()> {
        self.calls += 1;
        let row = match measured {
            Ok(&Timed { ms, first_ms, mib }) => {
                let row = Row { first_ms: Some(first_ms), peak_mib: Some(mib), ..row };
                match ms {
                    Some(ms) => row.timed(ms, work),
                    None => row,
                }
            }
            Err(error) => {
                self.failed += 1;
                Row { error: Some(short(format!("{error:#}"))), ..row }
            }
        };
        for row in self.peers.beside(row) {
            let checked = self.args.check && row.error.is_none();
            println!("{row}{}", if checked { ", as the reference" } else { "" });
            self.rows.push(row);
        }
        match &self.args.out {
            Some(path) => report::write(path, &self.rows),
            None => Ok(()),
        }
    }
}
