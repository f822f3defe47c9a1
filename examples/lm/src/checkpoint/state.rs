//! `state.json`: what a checkpoint says about itself.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::hash::fnv1a;

/// `state.json`: what a checkpoint says about itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Steps done.
    pub step: usize,
    /// Validation score after them, in bits per byte.
    pub valid_bits: f64,
    /// Seconds of training up to here, over all parts of the run.
    pub seconds: f64,
    /// The records beside it.
    files: Vec<Stored>,
}

/// Size and hash of a record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Stored {
    name: String,
    bytes: u64,
    fnv1a: String,
}

impl State {
    /// A state whose records are yet to be written.
    pub fn new(step: usize, valid_bits: f64, seconds: f64) -> Self {
        Self { step, valid_bits, seconds, files: Vec::new() }
    }

    /// Errors do not name the file: the caller does.
    pub(super) fn read(path: &Path) -> Result<Self> {
        Ok(serde_json::from_str(&fs::read_to_string(path)?)?)
    }

    /// Note size and hash of the record `name`.
    pub(super) fn add(&mut self, name: &str, bytes: &[u8]) {
        self.files.push(Stored {
            name: name.to_string(),
            bytes: bytes.len() as u64,
            fnv1a: hash(bytes),
        });
    }

    pub(super) fn record(&self, name: &str) -> Option<&Stored> {
        self.files.iter().find(|stored| stored.name == name)
    }
}

impl Stored {
    /// Refuse a file that is not what was written.
    pub(super) fn compare(&self, file: &Path) -> Result<()> {
        let bytes = fs::read(file)
            .with_context(|| format!("cannot read checkpoint file {}", file.display()))?;
        ensure!(
            bytes.len() as u64 == self.bytes,
            "{} has {} bytes, but was written with {}: it is truncated or was altered",
            file.display(),
            bytes.len(),
            self.bytes
        );
        let hash = hash(&bytes);
        ensure!(
            hash == self.fnv1a,
            "{} has the hash {hash}, but was written with {}: it is damaged",
            file.display(),
            self.fnv1a
        );
        Ok(())
    }
}

fn hash(bytes: &[u8]) -> String {
    format!("{:016x}", fnv1a(bytes))
}
