//! The training loop: batch, loss, gradients, clip, step; now and then a score and a checkpoint.
//!
//! `cargo run --release -p gla-lm --bin train -- --preset cpu`

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use burn::module::Module;
use burn::optim::{GradientsParams, ModuleOptimizer};
use burn::tensor::{Device, Tensor};
use gla_burn::GlaTransformer;

use crate::checkpoint::{self, Checkpoint, RunFolder, State};
use crate::config::{CONFIG_FILE, Preset, RunConfig, TrainArgs};
use crate::corpus::Corpus;
use crate::dataset::{self, Batch};
use crate::device;
use crate::generation::{Request, generate};
use crate::loss::bits_per_byte;
use crate::mixer::MixerKind;
use crate::optimizer::{adamw, clip_global_norm, with_stable_ids};
use crate::progress::{Entry, Progress, minutes};
use crate::sampling::SamplingArgs;
use crate::tokenizer::Tokenizer;

/// Bytes of the sample at the end of a run.
const SAMPLE: usize = 400;

/// Steps after which the loop waits for the device at the latest. A GPU takes launches without
/// doing them yet, and `--minutes` is about steps done. Waiting at every step would leave the GPU
/// idle while the next one is launched.
const IN_FLIGHT: usize = 4;

/// Train, or go on training, as `args` say; ends with the score and a sample on stdout.
///
/// # Errors
///
/// With what is wrong, and where: options, corpus, checkpoint, device, or a loss that is no number.
pub fn train(args: &TrainArgs) -> Result<()> {
    let limit = args.minutes.map(time_limit).transpose()?;
    let chosen = device::choose(args.device)?;
    eprintln!("device: {}", chosen.label);
    let device = chosen.device;
    let preset = args.preset.unwrap_or(match chosen.is_gpu {
        true => Preset::Small,
        false => Preset::Cpu,
    });
    let folder = args.out.clone().unwrap_or_else(|| {
        let name = format!("{preset:?}").to_lowercase();
        Path::new("runs").join(name)
    });
    if args.fresh {
        set_aside(&folder)?;
    }
    let run = RunFolder::open(&folder)?;
    let checkpoint = Checkpoint::latest(&folder)?;
    let mut config = configure(args, preset, &folder, checkpoint.is_some())?;
    let kept = match checkpoint {
        Some(_) if config.data.is_none() => Corpus::kept(&folder, &config.corpus_hash)?,
        _ => None,
    };
    let corpus = match kept {
        Some(corpus) => corpus,
        None => Corpus::load(config.data.as_deref(), config.corpus_mb, config.context)?,
    };
    eprintln!("corpus: {}", corpus.summary);
    if checkpoint.is_some() && config.corpus_hash != corpus.hash {
        let origin = match &config.data {
            Some(path) => format!("--data {}", path.display()),
            None => "the default corpus".to_string(),
        };
        bail!(
            "{origin} has the hash {}, but {} was trained on one with {}: give it back, or start \
             anew with --fresh or another --out",
            corpus.hash,
            folder.display(),
            config.corpus_hash
        );
    }
    config.corpus_hash = corpus.hash.clone();

    let learner = Learner::new(&config, checkpoint.as_ref(), &device)?;
    eprintln!(
        "model: {:.2} M parameters, {} layers of {}, width {}",
        learner.model.num_params() as f64 / 1e6,
        config.model.num_hidden_layers,
        MixerKind::of(&config.model).name(),
        config.model.hidden_size,
    );
    if config.schedule.steps == 0 {
        return Ok(());
    }
    config.save(&folder)?;
    if config.data.is_none() {
        corpus.keep(&folder)?;
    }
    let start = checkpoint.map(|checkpoint| {
        eprintln!("resuming {}", checkpoint.path().display());
        checkpoint.state
    });

    let (config, corpus, device, run) = (&config, &corpus, &device, &run);
    let session = Session { args, limit, config, corpus, device, run };
    let (model, state) = session.run(learner, start)?;
    report(config, &model, &state)
}

/// The run's own configuration if it has begun, the options otherwise.
fn configure(args: &TrainArgs, preset: Preset, folder: &Path, resume: bool) -> Result<RunConfig> {
    if !resume {
        return RunConfig::from_args(args, preset);
    }
    let mut config = RunConfig::load(folder)?.with_context(|| {
        format!(
            "{} holds checkpoints but no {CONFIG_FILE}: start anew with --fresh",
            folder.display()
        )
    })?;
    config.resume_with(args, folder)?;
    Ok(config)
}

/// `--minutes` as a duration.
fn time_limit(minutes: f64) -> Result<Duration> {
    let limit = Duration::try_from_secs_f64(60.0 * minutes).ok().filter(|limit| !limit.is_zero());
    limit.with_context(|| format!("--minutes is {minutes}, but must be above 0 and finite"))
}

/// `--fresh`: move the run in `folder`, if there is one, to the first free name beside it.
fn set_aside(folder: &Path) -> Result<()> {
    if !checkpoint::is_run(folder) {
        return Ok(());
    }
    ensure!(
        folder.file_name().is_some(),
        "--fresh moves the earlier run to a name beside it: call {} by its own",
        folder.display()
    );
    // nobody may train in it; not every system renames a folder while its lock is open
    drop(RunFolder::open(folder)?);
    let target = (1..)
        .map(|n| folder.with_added_extension(format!("old-{n}")))
        .find(|path| !path.exists())
        .context("no free name to move the earlier run to")?;
    std::fs::rename(folder, &target)
        .with_context(|| format!("cannot move {} to {}", folder.display(), target.display()))?;
    eprintln!("moved the earlier run to {}", target.display());
    Ok(())
}

/// A model with its optimizer.
struct Learner {
    model: GlaTransformer,
    optimizer: ModuleOptimizer,
}

impl Learner {
    fn new(config: &RunConfig, checkpoint: Option<&Checkpoint>, device: &Device) -> Result<Self> {
        device.seed(config.seed);
        let autodiff = device.clone().autodiff();
        let mut model = with_stable_ids(config.model.init(&autodiff));
        if let Some(checkpoint) = checkpoint {
            model = checkpoint.load_model(model)?;
        }
        let mut optimizer = adamw(&model, config.weight_decay);
        if let Some(checkpoint) = checkpoint {
            optimizer = checkpoint.load_optimizer(optimizer)?;
        }
        Ok(Self { model, optimizer })
    }

    /// One step on `batch`. Loss and gradient norm stay on the device.
    fn step(mut self, batch: Batch, rate: f64, clip: f32) -> (Self, Tensor<1>, Tensor<1>) {
        let loss = self.model.loss(batch.inputs, batch.targets);
        let grads = GradientsParams::from_grads(loss.backward(), &self.model);
        let loss = loss.inner();
        let (grads, norm) = clip_global_norm(&self.model, grads, clip, &loss.device());
        self.model = self.optimizer.step(rate, self.model, grads);
        (self, loss, norm)
    }
}

/// What stays the same over a run.
struct Session<'a> {
    args: &'a TrainArgs,
    limit: Option<Duration>,
    config: &'a RunConfig,
    corpus: &'a Corpus,
    device: &'a Device,
    run: &'a RunFolder,
}

impl Session<'_> {
    /// Train from `start` to the last step or the last minute.
    fn run(&self, mut learner: Learner, start: Option<State>) -> Result<(GlaTransformer, State)> {
        let config = self.config;
        let steps = config.schedule.steps;
        let first = start.as_ref().map_or(0, |state| state.step);
        let before = start.as_ref().map_or(0.0, |state| state.seconds);
        let mut state = match start {
            Some(state) if first >= steps => {
                eprintln!("the run has reached step {first}; more --steps make it go on");
                return Ok((learner.model.valid(), state));
            }
            Some(state) => state,
            None => State::new(0, f64::NAN, 0.0),
        };
        let autodiff = self.device.clone().autodiff();
        let tokens = config.batch * config.context;
        let mut progress = Progress::new(self.run.path(), first, steps, tokens)?;

        for step in first..steps {
            let rate = config.schedule.rate(step);
            let batch = self.batch(step, &autodiff);
            let (next, loss, norm) = learner.step(batch, rate, config.clip);
            learner = next;

            let done = step + 1;
            if done.is_multiple_of(IN_FLIGHT) {
                self.device.sync().with_context(|| format!("step {done}: the device failed"))?;
            }
            let out_of_time = self.limit.is_some_and(|limit| progress.elapsed() >= limit);
            let save = done % config.checkpoint_every == 0 || done == steps || out_of_time;
            let show = done == 1 || done.is_multiple_of(self.args.log_every.max(1));
            if !save && !show {
                progress.tick();
                continue;
            }
            let mut entry =
                Entry { step: done, loss: read(loss)?, norm: read(norm)?, rate, valid_bits: None };
            ensure!(
                entry.loss.is_finite() && entry.norm.is_finite(),
                "step {done}: the loss is {} and the gradient norm {}; the last checkpoint is from \
                 step {}. Try a lower --lr than {}",
                entry.loss,
                entry.norm,
                state.step,
                config.schedule.peak,
            );
            if save {
                let bits = progress.pause(|| self.evaluate(&learner.model.valid()))?;
                ensure!(
                    bits.is_finite(),
                    "step {done}: the validation score is {bits}; the last checkpoint is from step {}",
                    state.step
                );
                entry.valid_bits = Some(bits);
                let seconds = before + progress.trained().as_secs_f64();
                state = State::new(done, bits, seconds);
            }
            progress.show(&entry)?;
            if save {
                let (model, keep) = (learner.model.clone(), self.args.keep);
                let optimizer = &learner.optimizer;
                progress.pause(|| self.run.save(state.clone(), model, optimizer, keep))?;
                progress.note(&format!(
                    "step {done}: validation {:.3} bits/byte, saved",
                    state.valid_bits
                ));
            }
            if out_of_time {
                break;
            }
        }
        progress.finish()?;
        Ok((learner.model.valid(), state))
    }

    fn batch(&self, step: usize, device: &Device) -> Batch {
        let (config, bytes) = (self.config, &self.corpus.train);
        let offsets =
            dataset::train_offsets(config.seed, step, config.batch, config.context, bytes.len());
        dataset::gather(bytes, &offsets, config.context, device)
    }

    /// Bits per byte over the validation windows.
    fn evaluate(&self, model: &GlaTransformer) -> Result<f64> {
        let (config, bytes) = (self.config, &self.corpus.valid);
        let offsets = dataset::valid_offsets(config.valid_windows, config.context, bytes.len());
        let mut nats = 0.0;
        for part in offsets.chunks(config.batch) {
            let batch = dataset::gather(bytes, part, config.context, self.device);
            let loss = model.loss(batch.inputs, batch.targets);
            nats += f64::from(read(loss)?) * part.len() as f64;
        }
        Ok(bits_per_byte(nats / offsets.len() as f64))
    }
}

fn read(value: Tensor<1>) -> Result<f32> {
    value.try_into_scalar::<f32>().context("cannot read a result from the device")
}

/// The score and a sample, on stdout.
fn report(config: &RunConfig, model: &GlaTransformer, state: &State) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "validation: {:.3} bits/byte after {} steps and {} of training",
        state.valid_bits,
        state.step,
        minutes(Duration::from_secs_f64(state.seconds)),
    )?;
    // a text of the user's may be about anything
    let prompt = match config.data {
        None => "/// Returns the ",
        Some(_) => "",
    };
    let request = Request {
        prompt: prompt.to_string(),
        tokens: SAMPLE,
        samples: 1,
        stop: Vec::new(),
        stop_at_end: false,
        sampling: (&SamplingArgs::default()).into(),
    };
    write!(out, "sample:\n{prompt}")?;
    let timing = generate(model, &Tokenizer::bytes(), &request, |_, text| {
        out.write_all(text.as_bytes())?;
        out.flush()
    })?;
    writeln!(out)?;
    eprintln!("{}", timing.summary());
    Ok(())
}
