//! A training step of a language model: forward, loss, backward, AdamW.
//!
//! ```text
//! cargo bench --workspace --bench model --features gla-benches/cuda -- --device cuda --dtype bf16
//! ```
//!
//! Beside the step its parts are timed alone, forward and backward: the op of all layers, and the products
//! with all weights. What is left is norms, gates, the feed-forward's elementwise part, the softmax, the
//! optimizer, and what the launches cost.
//! With the feature `autotune` Burn times several kernels for each of its products first, which takes
//! minutes.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::module::linear;
use burn::tensor::{Device, Distribution, Int, Tensor};
use clap::Parser;
use gla_benches::{
    ModelRow, Peer, Peers, arguments, caught, device, float_dtype, is_bench, median, mib, short,
    timed,
};
use gla_burn::{Gate, GlaOptions, GlaTransformerConfig, gla, loss_chunk, shift_labels};

#[derive(Parser)]
struct Args {
    /// cuda, vulkan, wgpu or cpu
    #[arg(long, default_value = "wgpu")]
    device: String,
    /// f32, f16 or bf16: of weights, activations and the optimizer's moments; f16 scales the loss
    #[arg(long, default_value = "f32")]
    dtype: String,
    /// 340M, 1.3B or 2.7B; a model of two narrow layers if none is given
    #[arg(long)]
    preset: Option<String>,
    /// Sequences of a step
    #[arg(long, default_value_t = 2)]
    batch: usize,
    /// Their length
    #[arg(long, default_value_t = 128)]
    time: usize,
    /// Steps that are timed, after two that are not
    #[arg(long, default_value_t = 5)]
    steps: usize,
    /// Elementwise results are computed again in the backward, not kept
    #[arg(long)]
    checkpointing: bool,
    /// Times of peers in the same run
    #[arg(long)]
    peers: Option<PathBuf>,
    /// Write the row to this file, as a JSON array, and beside it NAME.md
    #[arg(long)]
    out: Option<PathBuf>,
    /// Day of the run, for the row
    #[arg(long, default_value = "")]
    date: String,
    /// Of the sources, for the row
    #[arg(long, default_value = "")]
    commit: String,
}

fn main() -> Result<()> {
    if !is_bench() {
        return Ok(());
    }
    let args = Args::parse_from(arguments());
    let config = match &args.preset {
        Some(name) => GlaTransformerConfig::preset(name)
            .with_context(|| format!("--preset {name}: expected 340M, 1.3B or 2.7B"))?,
        None => GlaTransformerConfig::new(256, 64, 2),
    };
    let (batch, time) = (args.batch, args.time);
    ensure!(batch * time > 0, "--batch and --time must be at least 1, got {batch} and {time}");
    ensure!(args.steps > 0, "--steps must be at least 1, got 0");
    let mut device = device(&args.device)?;
    device.configure(float_dtype(&args.dtype)?)?;
    let mut device = device.autodiff();
    if args.checkpointing {
        device = device.gradient_checkpointing();
    }
    let peers = args.peers.as_deref().map(Peers::read).transpose()?.unwrap_or_default();

    let mut row = ModelRow {
        op: "training step".into(),
        model: args.preset.clone().unwrap_or_else(|| "2 x 64".into()),
        device: args.device.clone(),
        batch,
        time,
        dtype: args.dtype.clone(),
        autotune: cfg!(feature = "autotune"),
        checkpointing: args.checkpointing,
        date: args.date.clone(),
        commit: args.commit.clone(),
        ..ModelRow::default()
    };
    let outcome = caught(|| measure(&config, &args, &device, &mut row));
    // what was measured before is kept, and what a GPU said goes to the file too
    row.error = outcome.as_ref().err().map(|error| short(format!("{error:#}")));
    if let Some(peer) = peers.all().iter().find(|peer| is_alike(peer, &args)) {
        row.peer = Some(peer.name.clone());
        row.peer_dtype = peer.dtype.clone();
        row.peer_ms = peer.ms;
        row.peer_error = peer.error.as_ref().map(short);
        row.ratio = peer.ms.zip(row.ms).map(|(peer, own)| peer / own);
    }
    println!("{row}");
    if let Some(path) = &args.out {
        gla_benches::write_rows(path, std::slice::from_ref(&row))?;
        gla_benches::write_text(&path.with_extension("md"), row.markdown())?;
    }
    outcome
}

/// Whether a peer did the same: they train the model of 340M, in half precision.
fn is_alike(peer: &Peer, args: &Args) -> bool {
    let sizes = (peer.shape.batch, peer.shape.time);
    peer.pass == "train"
        && sizes == (args.batch, args.time)
        && args.preset.as_deref() == Some("340M")
        && args.dtype != "f32"
}

/// The step and its parts, each kept in the row as it ends.
fn measure(
    config: &GlaTransformerConfig,
    args: &Args,
    device: &Device,
    row: &mut ModelRow,
) -> Result<()> {
    let step = train(config, args, device).context("training step")?;
    row.ms = Some(step.ms);
    row.first_ms = Some(step.first_ms);
    row.tokens_per_s = Some((args.batch * args.time) as f64 / step.ms * 1e3);
    row.peak_mib = step.peak_mib;
    row.op_ms = Some(op(config, args, device).context("the op alone")?);
    let products = products(config, args, device).context("the products alone")?;
    row.products_ms = Some(products.ms);
    row.products_tflops = Some(products.operations / products.ms / 1e9);
    Ok(())
}

struct Step {
    ms: f64,
    first_ms: f64,
    peak_mib: Option<f64>,
}

/// Trains on random tokens; the loss must be that of a model that knows nothing, and fall.
fn train(config: &GlaTransformerConfig, args: &Args, device: &Device) -> Result<Step> {
    let mut model = config.init(device);
    // In f16 gradients of a mean over the tokens end below its smallest number, and Vulkan promises no
    // quotient by less than 6e-5. AdamW's steps are the same for any scale, if its epsilon has it too.
    let loss_scale = match args.dtype.as_str() {
        "f16" => (args.batch * args.time) as f32,
        _ => 1.0,
    };
    let optimizer = AdamWConfig::new().with_beta_1(0.9).with_beta_2(0.95).with_weight_decay(0.1);
    let mut optimizer = optimizer.with_epsilon(1e-5 * loss_scale).init();
    let shape = [args.batch, args.time];
    let top = config.vocab_size as f64;
    let ids = Tensor::<2, Int>::random(shape, Distribution::Uniform(0.0, top), device);
    let ids = ids.clamp(0, config.vocab_size as i64 - 1);
    let labels = shift_labels(ids.clone(), None);

    let mut losses = Vec::new();
    let mut times = Vec::new();
    for _ in 0..args.steps + 2 {
        let start = Instant::now();
        let loss = model.loss(ids.clone(), labels.clone());
        let scaled = loss.clone() * loss_scale;
        let grads = GradientsParams::from_grads(scaled.backward(), &model);
        model = optimizer.step(1e-3, model, grads);
        device.sync()?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
        losses.push(loss.into_scalar::<f32>());
    }
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    let ignorant = (config.vocab_size as f32).ln();
    ensure!((first - ignorant).abs() < 0.5, "the first loss is {first}, expected {ignorant}");
    ensure!(last < first, "the loss goes from {first} to {last}");
    let peak_mib = device.memory_pool_usage().map(|usage| mib(usage.bytes_reserved));
    let first_ms = times[0];
    Ok(Step { ms: median(times.split_off(2)), first_ms, peak_mib })
}

/// The op of all layers, forward and backward.
fn op(config: &GlaTransformerConfig, args: &Args, device: &Device) -> Result<f64> {
    let heads = config.num_heads;
    let width = |expand: f64| (config.hidden_size as f64 * expand) as usize / heads;
    let (key_dim, value_dim) = (width(config.expand_k), width(config.expand_v));
    let random = |dim: usize| {
        let shape = [args.batch, args.time, heads, dim];
        Tensor::<4>::random(shape, Distribution::Default, device).require_grad()
    };
    let (q, k, v) = (random(key_dim), random(key_dim), random(value_dim));
    let gate = gla_burn::log_sigmoid(random(key_dim)).detach() / 16.0;
    let gate = gate.require_grad();
    let one = timed(device, args.steps, || {
        let gate = Gate::Vector(gate.clone());
        // the gradient of the output is 1 everywhere
        gla(q.clone(), k.clone(), v.clone(), gate, GlaOptions::default()).output.backward();
    })?;
    Ok(one * config.num_hidden_layers as f64)
}

struct Products {
    ms: f64,
    operations: f64,
}

/// The products with all weights of two dimensions, forward and backward.
fn products(config: &GlaTransformerConfig, args: &Args, device: &Device) -> Result<Products> {
    struct Shapes(Vec<[usize; 2]>);
    impl ModuleVisitor for Shapes {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Ok(shape) = param.lazy_shape().as_slice().try_into() {
                self.0.push(shape);
            }
        }
    }
    let mut shapes = Shapes(Vec::new());
    config.init(device).visit(&mut shapes);
    // an untied embedding multiplies nothing
    let lookup = usize::from(!config.tie_word_embeddings);
    let mut counted: Vec<([usize; 2], usize)> = Vec::new();
    for mut shape in shapes.0.into_iter().skip(lookup) {
        if shape[0] == config.vocab_size {
            shape.swap(0, 1);
        }
        match counted.iter_mut().find(|(known, _)| *known == shape) {
            Some((_, count)) => *count += 1,
            None => counted.push((shape, 1)),
        }
    }
    let rows = args.batch * args.time;
    let mut sum = Products { ms: 0.0, operations: 0.0 };
    for ([d_input, d_output], count) in counted {
        // sequence by sequence, as the layers do; the loss takes so many rows at a time
        let is_head = d_output == config.vocab_size;
        let (batch, part) = if is_head {
            (1, loss_chunk(rows, d_input, d_output).min(rows))
        } else {
            (args.batch, args.time)
        };
        let x = Tensor::<3>::random([batch, part, d_input], Distribution::Default, device);
        let tied = is_head && config.tie_word_embeddings;
        let stored = if tied { [d_output, d_input] } else { [d_input, d_output] };
        let weight = Tensor::<2>::random(stored, Distribution::Default, device);
        let one = if is_head {
            let plain = |x: Tensor<3>| x.squeeze_dim::<2>(0).without_autodiff();
            let (x, weight) = (plain(x), weight.without_autodiff());
            let weight = if tied { weight.transpose() } else { weight };
            timed(device, args.steps, || {
                let logits = x.clone().matmul(weight.clone());
                drop(logits.clone().matmul(weight.clone().transpose()));
                drop(logits.transpose().matmul(x.clone()));
            })?
        } else {
            let (x, weight) = (x.require_grad(), weight.require_grad());
            timed(device, args.steps, || {
                linear(x.clone(), weight.clone(), None).backward();
            })?
        };
        sum.ms += one * count as f64 * (rows as f64 / (batch * part) as f64);
        sum.operations += (6 * rows * d_input * d_output * count) as f64;
    }
    Ok(sum)
}
