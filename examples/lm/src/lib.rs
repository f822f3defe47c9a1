//! Train and sample a small language model of gated linear attention, on bytes.
//!
//! ```text
//! cargo run --release -p gla-lm --bin train
//! cargo run --release -p gla-lm --bin generate -- --prompt "pub fn " --tokens 300
//! cargo run --release -p gla-lm --bin lm -- --help
//! ```
//!
//! The files, in the order in which a run passes through them:
//!
//! * [`config`]: presets, command line options, what a run writes down about itself; [`mixer`]: the
//!   kinds of `--mixer`
//! * [`device`]: `--device auto` and its siblings; [`tuning`]: what a GPU tries before the first step
//! * [`corpus`]: bytes for training and validation, split by crate or by file
//! * [`dataset`]: windows of the corpus as a pure function of (seed, step)
//! * [`schedule`]: learning rate as a pure function of the step
//! * [`optimizer`]: AdamW with its parameter groups, and the clip of the global gradient norm
//! * [`training`]: the loop; [`loss`]: bits per byte
//! * [`checkpoint`]: atomic step checkpoints, resume; [`progress`]: what the loop prints and logs
//! * [`sampling`]: options of the choice; [`generation`]: prompt, prefill, recurrent steps
//! * [`tokenizer`]: bytes, or the tokenizer of a checkpoint; [`pretrained`]: checkpoints of
//!   flash-linear-attention
//! * [`commands`]: what the program `lm` does besides training
#![recursion_limit = "256"]

pub mod checkpoint;
pub mod commands;
pub mod config;
pub mod corpus;
pub mod dataset;
pub mod device;
pub mod generation;
pub mod hash;
pub mod loss;
pub mod mixer;
pub mod optimizer;
pub mod pretrained;
pub mod progress;
pub mod sampling;
pub mod schedule;
pub mod tokenizer;
pub mod training;
pub mod tuning;
