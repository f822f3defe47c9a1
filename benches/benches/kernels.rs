//! Kernel times: forward, forward + backward, and one decoding step.
//!
//! ```sh
//! cargo bench -p gla-benches --bench kernels --features cuda -- --device cuda --out kernels.json
//! ```
//!
//! Prints one JSON row a measurement. Outputs start as NaN and are read and checked before anything
//! is timed; that they are right is what the tests check, on the same devices.

use anyhow::{Context, Result, ensure};
use clap::Parser;
use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;
use gla_benches::median_ms;
use gla_kernels::{
    BackwardArgs, Dims, ForwardArgs, GateKind, Problem, RecurrentArgs, Sequences, Strategy,
};
use half::{bf16, f16};
use serde_json::json;

#[derive(Parser)]
struct Args {
    /// cuda, vulkan or wgpu
    #[arg(long, default_value = "wgpu")]
    device: String,
    /// f32, f16 or bf16
    #[arg(long, default_value = "f32")]
    dtype: String,
    /// B,T,H,K,V; may be given several times
    #[arg(long = "shape")]
    shapes: Vec<String>,
    /// none, fixed, scalar or vector
    #[arg(long, default_value = "vector")]
    gate: String,
    /// Append the rows to this file
    #[arg(long)]
    out: Option<std::path::PathBuf>,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

fn client(name: &str) -> Result<Client> {
    let device = match name {
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
        let x: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x)).collect();
        client.create_from_slice(bf16::as_bytes(&x))
    } else if dtype == f16::elem_type_native() {
        let x: Vec<f16> = values.iter().map(|&x| f16::from_f32(x)).collect();
        client.create_from_slice(f16::as_bytes(&x))
    } else {
        client.create_from_slice(f32::as_bytes(values))
    }
}

fn read(client: &Client, handle: Handle, dtype: ElemType) -> Result<Vec<f32>> {
    let bytes = client.read_one(handle).map_err(|e| anyhow::anyhow!("launch failed: {e:?}"))?;
    Ok(if dtype == bf16::elem_type_native() {
        bf16::from_bytes(&bytes).iter().map(|x| x.to_f32()).collect()
    } else if dtype == f16::elem_type_native() {
        f16::from_bytes(&bytes).iter().map(|x| x.to_f32()).collect()
    } else {
        f32::from_bytes(&bytes).to_vec()
    })
}

/// Deterministic noise in -1..1 that looks like nothing in particular.
fn noise(len: usize, seed: u32) -> Vec<f32> {
    let mut x = seed.wrapping_mul(2654435761).max(1);
    (0..len)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 17;
            x ^= x << 5;
            x as f32 / u32::MAX as f32 * 2.0 - 1.0
        })
        .collect()
}

fn main() -> Result<()> {
    // test runners start benches too, to list their tests: there are none
    if !std::env::args().any(|arg| arg == "--bench") {
        return Ok(());
    }
    let args = Args::parse();
    let client = client(&args.device)?;
    let dtype = match args.dtype.as_str() {
        "f32" => f32::elem_type_native(),
        "f16" => f16::elem_type_native(),
        "bf16" => bf16::elem_type_native(),
        other => anyhow::bail!("--dtype {other}: expected f32, f16 or bf16"),
    };
    let gate = match args.gate.as_str() {
        "none" => GateKind::None,
        "fixed" => GateKind::Fixed,
        "scalar" => GateKind::Scalar,
        "vector" => GateKind::Vector,
        other => anyhow::bail!("--gate {other}: expected none, fixed, scalar or vector"),
    };
    let shapes = if args.shapes.is_empty() {
        vec!["1,256,2,64,64".to_string()]
    } else {
        args.shapes.clone()
    };
    for shape in &shapes {
        let sizes: Vec<usize> = shape.split(',').map(str::parse).collect::<Result<_, _>>()?;
        let [b, t, h, k, v] = sizes[..] else {
            anyhow::bail!("--shape {shape}: expected B,T,H,K,V");
        };
        let dims = Dims { heads: h, kv_heads: h, key_dim: k, value_dim: v, gate };
        let problem = Problem {
            dims,
            sequences: Sequences::Uniform { batch: b, time: t },
            scale: (k as f32).powf(-0.5),
            dtype,
            gate_dtype: f32::elem_type_native(),
        };
        for Row { pass, ms, plan, instruction } in
            measure(&client, &problem).with_context(|| shape.clone())?
        {
            let row = json!({
                "device": args.device, "name": client.properties().identity.name,
                "op": "gla", "gate": args.gate, "pass": pass, "B": b, "T": t, "H": h, "K": k, "V": v,
                "dtype": args.dtype, "plan": plan, "instruction": instruction, "ms": ms,
            });
            println!("{row}");
            if let Some(path) = &args.out {
                use std::io::Write;
                let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path)?;
                writeln!(file, "{row}")?;
            }
        }
    }
    Ok(())
}

struct Row {
    pass: &'static str,
    ms: f64,
    plan: String,
    instruction: String,
}

fn measure(client: &Client, problem: &Problem) -> Result<Vec<Row>> {
    let Dims { heads, key_dim, value_dim, gate, .. } = problem.dims;
    let dtype = problem.dtype;
    let keys = problem.rows() * heads * key_dim;
    let outs = problem.rows() * heads * value_dim;
    let q = upload(client, &noise(keys, 1), dtype);
    let k = upload(client, &noise(keys, 2), dtype);
    let v = upload(client, &noise(outs, 3), dtype);
    let d_o = upload(client, &noise(outs, 4), dtype);
    let log_gate: Vec<f32> = noise(problem.gate_len(), 5)
        .iter()
        .map(|x| -(1.0 + (-2.0 * x).exp()).ln() / 16.0)
        .collect();
    let f32_type = f32::elem_type_native();
    let gate = gate.is_some().then(|| upload(client, &log_gate, f32_type));
    let empty = |len: usize, dtype: ElemType| client.empty(len * dtype.size());
    let o = upload(client, &vec![f32::NAN; outs], dtype);
    let final_state = empty(problem.state_len(), f32_type);
    let (dq, dk) = (upload(client, &vec![f32::NAN; keys], dtype), empty(keys, dtype));
    let dv = empty(outs, dtype);
    let dgate =
        gate.as_ref().map(|_| upload(client, &vec![f32::NAN; problem.gate_len()], f32_type));
    let dh0 = empty(problem.state_len(), f32_type);

    let forward = || {
        let args = ForwardArgs {
            q: q.clone(),
            k: k.clone(),
            v: v.clone(),
            gate: gate.clone(),
            initial_state: None,
            o: o.clone(),
            final_state: final_state.clone(),
        };
        gla_kernels::forward(client, problem, Strategy::Inferred, args)
    };
    let backward = || {
        let args = BackwardArgs {
            q: q.clone(),
            k: k.clone(),
            v: v.clone(),
            gate: gate.clone(),
            initial_state: None,
            d_o: d_o.clone(),
            d_final: None,
            dq: dq.clone(),
            dk: dk.clone(),
            dv: dv.clone(),
            dgate: dgate.clone(),
            dh0: dh0.clone(),
        };
        gla_kernels::backward(client, problem, Strategy::Inferred, args)
    };
    let blueprint = forward()?;
    backward()?;
    let finite = |name: &str, handle: &Handle, dtype: ElemType| -> Result<()> {
        let values = read(client, handle.clone(), dtype)?;
        ensure!(values.iter().all(|x| x.is_finite()), "{name} has NaN or infinities");
        ensure!(values.iter().any(|&x| x != 0.0), "{name} is all zero");
        Ok(())
    };
    finite("o", &o, dtype)?;
    finite("dq", &dq, dtype)?;
    if let Some(dgate) = &dgate {
        finite("dgate", dgate, f32_type)?;
    }
    let plan = format!("{:?}", blueprint.plan()).to_lowercase();
    let instruction = format!("{:?}", blueprint.instruction()).to_lowercase();
    let fwd = median_ms(client, || {
        forward().expect("it has run before");
    });
    let both = median_ms(client, || {
        forward().expect("it has run before");
        backward().expect("it has run before");
    });

    let step = Problem {
        sequences: Sequences::Uniform { batch: problem.num_sequences(), time: 1 },
        ..problem.clone()
    };
    let decode = median_ms(client, || {
        let args = RecurrentArgs {
            q: q.clone(),
            k: k.clone(),
            v: v.clone(),
            gate: gate.clone(),
            state: final_state.clone(),
            o: o.clone(),
        };
        gla_kernels::recurrent(client, &step, args).expect("it fits");
    });
    let row = |pass, ms, plan: &str, instruction: &str| Row {
        pass,
        ms,
        plan: plan.to_string(),
        instruction: instruction.to_string(),
    };
    Ok(vec![
        row("fwd", fwd, &plan, &instruction),
        row("fwdbwd", both, &plan, &instruction),
        row("decode", decode, "recurrent", "registers"),
    ])
}
