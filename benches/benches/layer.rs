//! One layer, forward and forward + backward, of every kind that stands where attention stands.
//!
//! ```text
//! cargo bench --workspace --bench layer --features gla-benches/cuda -- --device cuda --dtype bf16 --out "$PWD/layer.json"
//! ```
//!
//! As many tokens in all, in fewer and longer sequences, so that what depends on the length shows. Before anything is
//! timed the outputs are read: all are finite, none depends on a later token, and the input's gradient is finite.
//! Here `--device cpu --tokens 256 --time 64 --time 128 --width 64` takes seconds.

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, ensure};
use burn::tensor::{DType, Device, Distribution, Tensor};
use clap::Parser;
use gla_benches::{
    LayerRow, adapter, arguments, caught, compare, device, float_dtype, is_bench, layer_table,
    short, timed, write_layers,
};
use gla_burn::{
    GatedLinearAttentionConfig, Hgrn2Config, LinearAttentionConfig, Mamba2Config, Mixer,
    MixerConfig, RetentionConfig, SequenceLayout, SimpleGlaConfig, SoftmaxAttentionConfig,
};

#[derive(Parser)]
struct Args {
    /// cuda, vulkan, wgpu or cpu
    #[arg(long, default_value = "wgpu")]
    device: String,
    /// f32, f16 or bf16: of weights and activations
    #[arg(long, default_value = "f32")]
    dtype: String,
    /// Channels of a token
    #[arg(long, default_value_t = 1024)]
    width: usize,
    /// Heads; softmax attention has heads of 64 channels
    #[arg(long, default_value_t = 4)]
    heads: usize,
    /// Length of the sequences; may be given several times
    #[arg(long = "time", default_values_t = [512, 2048, 8192])]
    times: Vec<usize>,
    /// Tokens of a call, in as many sequences as they fill
    #[arg(long, default_value_t = 16384)]
    tokens: usize,
    /// Rounds that are timed, after two that are not
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Write the rows to this file, as a JSON array, and beside it NAME.md and NAME.svg
    #[arg(long)]
    out: Option<PathBuf>,
    /// Day of the run, for the rows
    #[arg(long, default_value = "")]
    date: String,
    /// Of the sources, for the rows
    #[arg(long, default_value = "")]
    commit: String,
}

/// What the others are compared with.
const ATTENTION: &str = "softmax attention";

fn main() -> Result<()> {
    if !is_bench() {
        return Ok(());
    }
    let args = Args::parse_from(arguments());
    let sizes = [args.width, args.heads, args.tokens];
    ensure!(!sizes.contains(&0) && !args.times.contains(&0), "sizes must be at least 1");
    ensure!(args.rounds > 0, "--rounds must be at least 1, got 0");
    let mixers = mixers(args.width, args.heads);
    for (mixer, config) in &mixers {
        config.check().map_err(|why| anyhow!("{mixer}: {why}"))?;
    }
    let mut device = device(&args.device)?;
    device.configure(float_dtype(&args.dtype)?)?;
    let common = LayerRow {
        op: "layer".into(),
        width: args.width,
        dtype: args.dtype.clone(),
        device: adapter(&args.device, &device),
        backend: args.device.clone(),
        autotune: cfg!(feature = "autotune"),
        date: args.date.clone(),
        commit: args.commit.clone(),
        ..LayerRow::default()
    };
    println!("{}: {}", args.device, common.device);

    let mut rows: Vec<LayerRow> = Vec::new();
    for &time in &args.times {
        let batch = (args.tokens / time).max(1);
        for (mixer, config) in &mixers {
            let mut done = Vec::new();
            let sizes = [batch, time];
            let outcome = caught(|| measure(config, sizes, args.rounds, &device, &mut done));
            for (n, pass) in ["fwd", "fwdbwd"].into_iter().enumerate() {
                let mut row = LayerRow {
                    mixer: mixer.to_string(),
                    pass: pass.into(),
                    batch,
                    time,
                    params: config.num_params(),
                    ..common.clone()
                };
                match (done.get(n), &outcome) {
                    (Some(&ms), _) => row = row.timed(ms),
                    (None, Err(error)) => row.error = Some(short(format!("{error:#}"))),
                    (None, Ok(())) => unreachable!("it has ended"),
                }
                println!("{row}");
                rows.push(row);
            }
            compare(&mut rows, ATTENTION);
            // what is measured is kept, should the run end early
            if let Some(path) = &args.out {
                write_layers(path, &rows)?;
            }
        }
    }
    println!("\n{}", layer_table(&rows));
    let failed = rows.iter().filter(|row| row.error.is_some()).count();
    ensure!(failed == 0, "{failed} of {} calls failed", rows.len());
    Ok(())
}

/// Every kind of layer. Keys are as wide as those of gated linear attention where a gate or a decay is all that
/// differs; the rest is the kind's own.
fn mixers(width: usize, heads: usize) -> [(&'static str, MixerConfig); 7] {
    let simple = SimpleGlaConfig::new(width).with_num_heads(heads).with_expand_k(0.5);
    let retention = RetentionConfig::new(width).with_num_heads(heads).with_expand_k(0.5);
    let linear = LinearAttentionConfig::new(width).with_num_heads(heads).with_expand_k(0.5);
    let hgrn2 = Hgrn2Config::new(width).with_num_heads(Some(heads));
    let mamba2 = Mamba2Config::new(width);
    let head_dim = mamba2.expand * width / heads;
    let attention = SoftmaxAttentionConfig::new(width, (width / 64).max(1));
    [
        ("gla", MixerConfig::Gla(GatedLinearAttentionConfig::new(width).with_num_heads(heads))),
        ("simple gla", MixerConfig::SimpleGla(simple.with_use_short_conv(false))),
        ("retention", MixerConfig::Retention(retention.with_expand_v(1.0))),
        ("linear attention", MixerConfig::LinearAttention(linear)),
        ("hgrn2", MixerConfig::Hgrn2(hgrn2.with_expand_ratio((width / heads).max(1)))),
        ("mamba2", MixerConfig::Mamba2(mamba2.with_head_dim(head_dim))),
        // the one that may leave the device without memory
        (ATTENTION, MixerConfig::SoftmaxAttention(attention)),
    ]
}

/// Checks and times forward, then forward + backward; `done` gets the time of each as it ends.
fn measure(
    config: &MixerConfig,
    [batch, time]: [usize; 2],
    rounds: usize,
    device: &Device,
    done: &mut Vec<f64>,
) -> Result<()> {
    let random = |device| {
        let shape = [batch, time, config.hidden_size()];
        Tensor::<3>::random(shape, Distribution::Normal(0.0, 1.0), device)
    };
    let rows = SequenceLayout::rows();
    let layer = config.init(device);
    let x = random(device);
    check(&layer, x.clone()).context("forward")?;
    done.push(timed(device, rounds, || drop(layer.forward(x.clone(), &rows)))?);

    let device = device.clone().autodiff();
    let layer = config.init(&device);
    let x = random(&device).require_grad();
    let grads = layer.forward(x.clone(), &rows).backward();
    let dx = x.grad(&grads).context("the input has no gradient")?;
    check_finite("the input's gradient", &numbers(dx))?;
    // the gradient of the output is 1 everywhere
    done.push(timed(&device, rounds, || drop(layer.forward(x.clone(), &rows).backward()))?);
    Ok(())
}

/// Fails if an output is not finite, if all are zero, or if one knows of the last token before it comes.
fn check(layer: &Mixer, x: Tensor<3>) -> Result<()> {
    let [batch, time, width] = x.dims();
    let rows = SequenceLayout::rows();
    let y = layer.forward(x.clone(), &rows);
    check_finite("the output", &numbers(y.clone()))?;
    // louder than the others, so that it shows through any average
    let last = x.clone().narrow(1, time - 1, 1) * -8.0;
    let changed = layer.forward(x.slice_assign([0..batch, time - 1..time, 0..width], last), &rows);
    let difference = |from: usize, count: usize| {
        let part = |y: &Tensor<3>| numbers(y.clone().narrow(1, from, count));
        let pairs = part(&y).into_iter().zip(part(&changed));
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    };
    let own = difference(time - 1, 1);
    ensure!(own > 0.0, "the last output does not depend on its token");
    let before = if time > 1 { difference(0, time - 1) } else { 0.0 };
    // others are rounded anew where they share a block with it
    let most = if y.dtype() == DType::F32 { 1e-4 } else { 2e-2 } * own;
    ensure!(before <= most, "an output changes by {before} with a later token, its own by {own}");
    Ok(())
}

fn check_finite(name: &str, values: &[f32]) -> Result<()> {
    ensure!(values.iter().all(|x| x.is_finite()), "{name} has NaN or infinities");
    ensure!(values.iter().any(|&x| x != 0.0), "{name} is all zero");
    Ok(())
}

fn numbers(x: Tensor<3>) -> Vec<f32> {
    x.into_data().convert_dtype(DType::F32).try_into_vec().expect("f32 after the conversion")
}
