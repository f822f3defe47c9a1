//! What is measured: the shapes of the committed results, and each as a problem of the kernels.

use anyhow::{Result, bail};
use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use gla_benches::{Shape, Work};
use gla_kernels::{
    Blueprint, Dims, GateKind, Instruction, Plan, Problem, Sequences, Strategy, check_chunked,
};
use half::{bf16, f16};

use crate::Args;

/// Shapes of the committed results; the first is also measured with every gate.
const SUITE: [&str; 5] = [
    "8,2048,4,128,256",
    "8,4096,4,256,512",
    "2,16384,4,256,512",
    "1,65536,4,128,256",
    "8,2048,16,128,128",
];

/// Without a gate, beside attention.
const UNGATED: [&str; 2] = ["8,1024,16,128,128", "8,2048,16,128,128"];

const SWEEP: [&str; 5] = [
    "16,1024,16,128,128",
    "8,2048,16,128,128",
    "4,4096,16,128,128",
    "2,8192,16,128,128",
    "1,16384,16,128,128",
];

/// Of the catalogue: many heads and long sequences, few and very long ones, many and short ones.
const CATALOGUE: [&str; 3] = [SUITE[0], SUITE[3], UNGATED[0]];

const DECODE: [&str; 3] = ["1,4,256,512", "32,4,256,512", "256,4,256,512"];

const GATES: [&str; 4] = ["vector", "scalar", "fixed", "none"];

/// One problem, and how it is run.
pub struct Run {
    pub shape: Shape,
    pub gate: String,
    pub dtype: String,
    pub plan: Option<String>,
    pub instruction: Option<String>,
    pub segment: Option<usize>,
    /// Left out, and told, where the device has no such plan, instruction or type.
    pub of_catalogue: bool,
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

    /// What is given, and the suite; a small one if nothing is asked for.
    pub fn runs(&self) -> Vec<Run> {
        let mut runs = Vec::new();
        for shape in &self.shapes {
            runs.extend(self.gates.iter().map(|gate| self.run(&shape.to_string(), gate)));
        }
        if self.suite {
            runs.extend(SUITE.map(|shape| self.run(shape, "vector")));
            runs.extend(GATES.map(|gate| self.run(SUITE[0], gate)));
            runs.extend(UNGATED.map(|shape| self.run(shape, "none")));
        }
        let others = self.sweep || self.catalogue || !self.decode.is_empty();
        if runs.is_empty() && !others {
            runs.push(self.run("1,256,2,64,64", &self.gates[0]));
        }
        runs
    }

    /// Steps of decoding.
    pub fn steps(&self) -> Result<Vec<Shape>> {
        let suite = if self.suite { &DECODE[..] } else { &[] };
        let all = self.decode.iter().map(String::as_str).chain(suite.iter().copied());
        all.map(|step| {
            let sizes: Vec<usize> = step.split(',').map(str::parse).collect::<Result<_, _>>()?;
            match sizes[..] {
                [batch, heads, key_dim, value_dim] => {
                    Ok(Shape { batch, time: 1, heads, key_dim, value_dim })
                }
                _ => bail!("--decode {step}: expected B,H,K,V"),
            }
        })
        .collect()
    }

    /// As many steps in all, in fewer and longer sequences.
    pub fn sweep(&self) -> Vec<Run> {
        let gates = if self.sweep { &["vector", "none"][..] } else { &[] };
        gates.iter().flat_map(|gate| SWEEP.map(|shape| self.run(shape, gate))).collect()
    }

    /// Every gate, type, plan and instruction.
    pub fn catalogue(&self) -> Vec<Run> {
        let mut runs = Vec::new();
        let shapes = if self.catalogue { &CATALOGUE[..] } else { &[] };
        for (shape, gate) in shapes.iter().flat_map(|shape| GATES.map(|gate| (shape, gate))) {
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
        runs
    }
}

impl Run {
    pub fn problem(&self) -> Result<Problem> {
        Ok(problem(self.shape, gate_kind(&self.gate)?, elem_type(&self.dtype)?))
    }

    /// What it asks for; an error if the device does not have it.
    pub fn blueprint(&self, client: &Client, problem: &Problem) -> Result<Blueprint> {
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
        match (&mut blueprint, self.segment) {
            (_, None) => {}
            (Blueprint::Scan(scan), Some(chunks)) => scan.segment = chunks,
            (Blueprint::Split(_), Some(_)) => bail!("--segment: the split plan has none"),
        }
        check_chunked(client, problem, Strategy::Forced(blueprint), true)?;
        Ok(blueprint)
    }
}

pub fn elem_type(name: &str) -> Result<ElemType> {
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

pub fn problem(shape: Shape, gate: GateKind, dtype: ElemType) -> Problem {
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
pub fn work(problem: &Problem, pass: &str, state_size: usize) -> Work {
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
