//! What a run is: presets, the options that change them, and the file that remembers them.
//!
//! `cargo run --release -p gla-lm --bin train -- --help`
//!
//! `config.json` in the run's folder holds everything that decides the weights. A resumed run reads
//! it back; options that contradict it are refused, because they would train another model.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::{Args, ValueEnum};
use gla_burn::GlaTransformerConfig;
use serde::{Deserialize, Serialize};

use crate::device::DeviceChoice;
use crate::mixer::MixerKind;
use crate::schedule::Schedule;

/// One token per byte value; the value 0 separates documents.
pub const VOCAB: usize = 256;

/// Name of the file in the run's folder.
pub const CONFIG_FILE: &str = "config.json";

/// Options of `train`. Whatever is left out comes from the preset, or from the run that is resumed.
#[derive(Args, Clone, Debug, Default)]
pub struct TrainArgs {
    /// Size of model and run; cpu takes minutes on two cores, small and base want a GPU
    /// [default: cpu on a CPU, small on a GPU]
    #[arg(long, value_enum)]
    pub preset: Option<Preset>,
    /// Text file or folder to learn from [default: sources of this program's dependencies]
    #[arg(long)]
    pub data: Option<PathBuf>,
    /// Cap of the corpus in megabytes [default: 24 for the dependencies, none for --data]
    #[arg(long)]
    pub corpus_mb: Option<usize>,
    /// Folder for checkpoints, log and config.json [default: runs/PRESET]
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Move an earlier run in that folder aside and start anew; without this it is resumed
    #[arg(long)]
    pub fresh: bool,
    /// Where to compute; auto takes a real GPU if there is one, and says what it took
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    pub device: DeviceChoice,
    /// Steps of the whole run; the learning rate reaches its floor at the last
    #[arg(long)]
    pub steps: Option<usize>,
    /// Stop training after so many minutes, then score and save; the same command goes on later
    #[arg(long)]
    pub minutes: Option<f64>,
    /// Windows per step
    #[arg(long)]
    pub batch: Option<usize>,
    /// Bytes per window
    #[arg(long)]
    pub context: Option<usize>,
    /// Peak learning rate
    #[arg(long)]
    pub lr: Option<f64>,
    /// Width of the model
    #[arg(long)]
    pub hidden: Option<usize>,
    /// Number of blocks
    #[arg(long)]
    pub layers: Option<usize>,
    /// Heads per block
    #[arg(long)]
    pub heads: Option<usize>,
    /// What stands where attention stands [default: gla]
    #[arg(long, value_enum)]
    pub mixer: Option<MixerKind>,
    /// Seed of weights and data order [default: 42]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Steps between evaluations, each with a checkpoint
    #[arg(long)]
    pub checkpoint_every: Option<usize>,
    /// Latest checkpoints to keep, besides the best
    #[arg(long, default_value_t = 2)]
    pub keep: usize,
    /// Steps between lines of output and of log.jsonl
    #[arg(long, default_value_t = 10)]
    pub log_every: usize,
}

/// Size of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Preset {
    /// A model for two cores and some minutes.
    Cpu,
    /// A model for one GPU and some minutes.
    Small,
    /// A model for one large GPU and some hours.
    Base,
}

/// Everything that decides the weights of a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunConfig {
    /// What the numbers below started from.
    pub preset: Preset,
    /// The model.
    pub model: GlaTransformerConfig,
    /// `--data`, or `None` for the dependencies' sources.
    pub data: Option<PathBuf>,
    /// `--corpus-mb`.
    pub corpus_mb: Option<usize>,
    /// Hash of the corpus, empty until it has been read.
    pub corpus_hash: String,
    /// Windows per step.
    pub batch: usize,
    /// Bytes per window.
    pub context: usize,
    /// Learning rate over the steps.
    pub schedule: Schedule,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f32,
    /// Largest global norm of the gradients.
    pub clip: f32,
    /// Seed of weights and data order.
    pub seed: u64,
    /// Steps between evaluations and checkpoints.
    pub checkpoint_every: usize,
    /// Windows that an evaluation scores.
    pub valid_windows: usize,
}

impl Preset {
    /// The run that this preset stands for.
    pub fn config(self) -> RunConfig {
        // hidden, layers, heads, batch, context, steps, rate, checkpoint_every, valid_windows
        let (hidden, layers, heads, batch, context, steps, peak, every, windows) = match self {
            Self::Cpu => (128, 3, 4, 4, 256, 1000, 4e-3, 200, 64),
            Self::Small => (512, 8, 4, 32, 512, 4000, 1e-3, 250, 128),
            Self::Base => (768, 16, 6, 32, 1024, 30_000, 6e-4, 1000, 128),
        };
        // fla's 0.02 suits a width of about 2000; keep the variance of a layer's output instead
        let initializer_range = 0.02 * (2048.0 / hidden as f64).sqrt();
        RunConfig {
            preset: self,
            model: GlaTransformerConfig::new(VOCAB, hidden, layers)
                .with_num_heads(heads)
                .with_use_short_conv(true)
                .with_tie_word_embeddings(true)
                .with_initializer_range(initializer_range),
            data: None,
            corpus_mb: None,
            corpus_hash: String::new(),
            batch,
            context,
            schedule: Schedule { peak, warmup: (steps / 20).min(500), steps },
            weight_decay: 0.1,
            clip: 1.0,
            seed: 42,
            checkpoint_every: every,
            valid_windows: windows,
        }
    }
}

impl RunConfig {
    /// The preset with the given options over it.
    ///
    /// # Errors
    ///
    /// When a size is zero or the heads do not fit the width.
    pub fn from_args(args: &TrainArgs, preset: Preset) -> Result<Self> {
        let mut config = preset.config();
        let set = |to: &mut usize, from: Option<usize>| *to = from.unwrap_or(*to);
        set(&mut config.model.hidden_size, args.hidden);
        set(&mut config.model.num_hidden_layers, args.layers);
        set(&mut config.model.num_heads, args.heads);
        args.mixer.unwrap_or(MixerKind::Gla).set(&mut config.model);
        set(&mut config.batch, args.batch);
        set(&mut config.context, args.context);
        set(&mut config.checkpoint_every, args.checkpoint_every);
        if let Some(steps) = args.steps {
            config.set_steps(steps);
        }
        config.schedule.peak = args.lr.unwrap_or(config.schedule.peak);
        config.seed = args.seed.unwrap_or(config.seed);
        config.data = args.data.clone();
        config.corpus_mb = args.corpus_mb;
        config.check()?;
        Ok(config)
    }

    /// Change the length of the run, and of the warm-up with it.
    fn set_steps(&mut self, steps: usize) {
        self.schedule.steps = steps;
        self.schedule.warmup = (steps / 20).min(500);
    }

    fn check(&self) -> Result<()> {
        let positive = [
            ("--hidden", self.model.hidden_size),
            ("--layers", self.model.num_hidden_layers),
            ("--heads", self.model.num_heads),
            ("--batch", self.batch),
            ("--context", self.context),
            ("--checkpoint-every", self.checkpoint_every),
            ("--corpus-mb", self.corpus_mb.unwrap_or(1)),
        ];
        for (name, value) in positive {
            ensure!(value > 0, "{name} is 0, but must be at least 1");
        }
        let (hidden, heads) = (self.model.hidden_size, self.model.num_heads);
        // keys have half the width of values, so each head needs an even part of the width
        ensure!(
            hidden.is_multiple_of(2 * heads),
            "--hidden {hidden} must be a multiple of twice --heads {heads}"
        );
        let kind = MixerKind::of(&self.model).name();
        self.model.check().map_err(|why| anyhow!("a model of {kind}: {why}"))?;
        let peak = self.schedule.peak;
        ensure!(peak > 0.0 && peak.is_finite(), "--lr is {peak}, but must be positive");
        Ok(())
    }

    /// Take over from the options of a resumed run what may change, and refuse the rest.
    ///
    /// # Errors
    ///
    /// Names every option that contradicts this configuration.
    pub fn resume_with(&mut self, args: &TrainArgs, folder: &Path) -> Result<()> {
        let mut conflicts = Vec::new();
        let mut check = |name: &str, given: Option<String>, used: String| {
            if let Some(given) = given.filter(|given| *given != used) {
                conflicts.push(format!("{name} {given} (the run has {used})"));
            }
        };
        let text = |value: Option<usize>| value.map(|v| v.to_string());
        let model = &self.model;
        let preset = |p: Preset| format!("{p:?}").to_lowercase();
        check("--preset", args.preset.map(preset), preset(self.preset));
        check("--hidden", text(args.hidden), model.hidden_size.to_string());
        let layers = model.num_hidden_layers.to_string();
        check("--layers", text(args.layers), layers);
        check("--heads", text(args.heads), model.num_heads.to_string());
        let mixer = MixerKind::of(model).name();
        check("--mixer", args.mixer.map(MixerKind::name), mixer);
        check("--batch", text(args.batch), self.batch.to_string());
        check("--context", text(args.context), self.context.to_string());
        let seed = args.seed.map(|seed| seed.to_string());
        check("--seed", seed, self.seed.to_string());
        let rate = args.lr.map(|lr| lr.to_string());
        check("--lr", rate, self.schedule.peak.to_string());
        let show = |path: &Option<PathBuf>| path.as_ref().map(|p| p.display().to_string());
        let data = show(&self.data).unwrap_or_else(|| "the default corpus".into());
        check("--data", show(&args.data), data);
        let cap = text(self.corpus_mb).unwrap_or_else(|| "the default".into());
        check("--corpus-mb", text(args.corpus_mb), cap);
        if !conflicts.is_empty() {
            bail!(
                "{} holds a run with other options: {}. Leave them out to resume it, or start \
                 anew with --fresh or another --out",
                folder.display(),
                conflicts.join(", ")
            );
        }
        if let Some(steps) = args.steps.filter(|steps| *steps != self.schedule.steps) {
            eprintln!(
                "the run was set up for {} steps; its schedule now ends at step {steps}",
                self.schedule.steps
            );
            self.schedule.steps = steps;
        }
        self.checkpoint_every = args.checkpoint_every.unwrap_or(self.checkpoint_every);
        self.check()
    }

    /// Write `config.json` into `folder`.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let json = serde_json::to_string_pretty(self).context("cannot express config.json")?;
        crate::checkpoint::write_file(&folder.join(CONFIG_FILE), json.as_bytes())
    }

    /// Read `config.json` from `folder`; `None` if there is none.
    ///
    /// # Errors
    ///
    /// When the file cannot be read or says something else.
    pub fn load(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(CONFIG_FILE);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).context(format!("cannot read {}", path.display())),
        };
        let context = || format!("{} is no configuration of a run", path.display());
        let config: Self = serde_json::from_str(&text).with_context(context)?;
        config.check().with_context(context)?;
        Ok(Some(config))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_go_over_the_preset() {
        let args =
            TrainArgs { hidden: Some(64), steps: Some(100), lr: Some(0.5), ..TrainArgs::default() };
        let config = RunConfig::from_args(&args, Preset::Cpu).unwrap();
        assert_eq!(config.model.hidden_size, 64);
        assert_eq!((config.schedule.steps, config.schedule.warmup), (100, 5));
        assert_eq!(config.schedule.peak, 0.5);
        assert_eq!(config.batch, Preset::Cpu.config().batch);
    }

    #[test]
    fn bad_sizes_are_named() {
        let message = |args: TrainArgs| match RunConfig::from_args(&args, Preset::Cpu) {
            Ok(_) => panic!("{args:?} was accepted"),
            Err(error) => error.to_string(),
        };
        let zero = TrainArgs { batch: Some(0), ..TrainArgs::default() };
        assert_eq!(message(zero), "--batch is 0, but must be at least 1");
        let uneven = TrainArgs { hidden: Some(100), heads: Some(3), ..TrainArgs::default() };
        assert!(message(uneven).contains("--hidden 100"));
        let narrow = TrainArgs {
            hidden: Some(32),
            heads: Some(16),
            mixer: Some(MixerKind::Retention),
            ..TrainArgs::default()
        };
        let expected = "a model of retention: rotary positions need heads of an even width, got 1";
        assert_eq!(message(narrow), expected);
    }

    #[test]
    fn the_file_gives_back_what_was_saved() {
        let dir = tempfile::tempdir().unwrap();
        assert!(RunConfig::load(dir.path()).unwrap().is_none());
        let config = Preset::Small.config();
        config.save(dir.path()).unwrap();
        let loaded = RunConfig::load(dir.path()).unwrap().unwrap();
        let json = |c: &RunConfig| serde_json::to_string(c).unwrap();
        assert_eq!(json(&loaded), json(&config));

        // as written before there was a choice
        let text = std::fs::read_to_string(dir.path().join(CONFIG_FILE)).unwrap();
        let old = text.replace("\"mixer\": null,", "");
        assert_ne!(old, text);
        std::fs::write(dir.path().join(CONFIG_FILE), old).unwrap();
        let loaded = RunConfig::load(dir.path()).unwrap().unwrap();
        assert_eq!(json(&loaded), json(&config));
        assert_eq!(MixerKind::of(&loaded.model), MixerKind::Gla);

        std::fs::write(dir.path().join(CONFIG_FILE), "{").unwrap();
        let error = format!("{:#}", RunConfig::load(dir.path()).unwrap_err());
        assert!(error.contains(CONFIG_FILE), "{error}");
    }

    #[test]
    fn a_resumed_run_refuses_another_model_and_takes_more_steps() {
        let mut config = Preset::Cpu.config();
        let folder = Path::new("runs/x");
        let same = TrainArgs {
            preset: Some(Preset::Cpu),
            batch: Some(config.batch),
            steps: Some(9999),
            ..TrainArgs::default()
        };
        config.resume_with(&same, folder).unwrap();
        assert_eq!(config.schedule.steps, 9999);
        let mixer = Some(MixerKind::Mamba2);
        let other = TrainArgs { batch: Some(1000), seed: Some(1), mixer, ..TrainArgs::default() };
        let error = config.resume_with(&other, folder).unwrap_err().to_string();
        assert!(error.contains("--batch 1000 (the run has"), "{error}");
        assert!(error.contains("--seed 1 (the run has 42)"), "{error}");
        assert!(error.contains("--mixer mamba2 (the run has gla)"), "{error}");
    }
}
