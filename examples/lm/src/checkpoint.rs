//! Checkpoints that are either whole or not there.
//!
//! `cargo run --release -p gla-lm --bin generate -- --checkpoint runs/cpu/step-00001000`
//!
//! ```text
//! runs/cpu/config.json             what decides the weights, see `config`
//! runs/cpu/log.jsonl               a line per logged step
//! runs/cpu/step-00001000/          written under another name, then renamed
//!     model.bpk  optimizer.bpk     burnpack records
//!     state.json                   step, score, size and hash of the two
//! ```
//!
//! Data order and learning rate are functions of the step, so the step is all that a resumed run
//! needs besides the two records.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use burn::module::Module;
use burn::optim::ModuleOptimizer;
use burn::store::ModuleRecord;
use serde::{Deserialize, Serialize};

use crate::config::CONFIG_FILE;
use crate::hash::fnv1a;
use crate::progress::LOG_FILE;

const MODEL: &str = "model.bpk";
const OPTIMIZER: &str = "optimizer.bpk";
const STATE: &str = "state.json";
/// Ends the name of a checkpoint that makes room for a newer one of the same step.
const REPLACED: &str = ".replaced";

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

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Stored {
    name: String,
    bytes: u64,
    fnv1a: String,
}

/// A checkpoint whose records have been compared with its state.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    /// What it says about itself.
    pub state: State,
}

/// The folder of a run.
pub struct RunFolder {
    path: PathBuf,
    _lock: File,
}

impl RunFolder {
    /// Create or open the folder, for one process at a time.
    ///
    /// # Errors
    ///
    /// When it cannot be written to, or another process trains in it.
    pub fn open(path: &Path) -> Result<Self> {
        fs::create_dir_all(path).with_context(|| format!("cannot create {}", path.display()))?;
        let lock_path = path.join("lock");
        let lock = File::create(&lock_path)
            .with_context(|| format!("cannot write to {}", lock_path.display()))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                bail!("another process trains in {}", path.display())
            }
            Err(fs::TryLockError::Error(error)) => {
                return Err(error).context(format!("cannot lock {}", lock_path.display()));
            }
        }
        for entry in entries(path)? {
            let name = entry.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let replaced = name.strip_prefix('.').and_then(|n| n.strip_suffix(REPLACED));
            if let Some(target) = replaced.map(|name| path.join(name)).filter(|t| !t.exists()) {
                fs::rename(&entry, &target)
                    .with_context(|| format!("cannot put back {}", target.display()))?;
                continue;
            }
            // halves of a checkpoint that was being written or deleted when its process died
            if name.starts_with(".step-") {
                fs::remove_dir_all(&entry)
                    .with_context(|| format!("cannot remove {}", entry.display()))?;
            }
        }
        Ok(Self { path: path.to_path_buf(), _lock: lock })
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Write a checkpoint, then drop all but the `keep` latest and the one with the best score.
    ///
    /// # Errors
    ///
    /// When something cannot be written; what was there before is untouched then.
    pub fn save<M: Module>(
        &self,
        mut state: State,
        model: M,
        optimizer: &ModuleOptimizer,
        keep: usize,
    ) -> Result<()> {
        let name = folder_name(state.step);
        let partial = self.path.join(format!(".{name}"));
        let write = || -> Result<()> {
            fs::create_dir_all(&partial)?;
            model.into_record().save(partial.join(MODEL))?;
            optimizer.save(partial.join(OPTIMIZER))?;
            for file in [MODEL, OPTIMIZER] {
                let path = partial.join(file);
                let bytes = fs::read(&path)?;
                // the folder must not get its name before its content is on disk; some systems sync
                // only what is open for writing
                File::options().write(true).open(&path)?.sync_all()?;
                state.files.push(Stored {
                    name: file.to_string(),
                    bytes: bytes.len() as u64,
                    fnv1a: format!("{:016x}", fnv1a(&bytes)),
                });
            }
            let json = serde_json::to_string_pretty(&state)?;
            write_file(&partial.join(STATE), json.as_bytes())?;
            let target = self.path.join(&name);
            // a checkpoint of the same step, from a run that went on with more steps, makes room
            // only until the new one is there: `open` puts it back if we die in between
            let replaced = self.path.join(format!(".{name}{REPLACED}"));
            if target.exists() {
                fs::rename(&target, &replaced)?;
            }
            fs::rename(&partial, &target)?;
            sync_folder(&self.path)?;
            if replaced.exists() {
                fs::remove_dir_all(&replaced)?;
            }
            Ok(())
        };
        let result = write();
        result.with_context(|| format!("cannot write checkpoint {}", partial.display()))?;
        self.prune(keep.max(1))
    }

    fn prune(&self, keep: usize) -> Result<()> {
        let mut old = list(&self.path)?;
        old.truncate(old.len().saturating_sub(keep));
        let best = best(&self.path)?;
        for (_, path) in old {
            if Some(&path) != best.as_ref() {
                self.remove(&path)?;
            }
        }
        Ok(())
    }

    /// Rename before deleting: a folder that bears a checkpoint's name is always a whole one.
    fn remove(&self, checkpoint: &Path) -> Result<()> {
        let name = checkpoint.file_name().unwrap_or_default().to_string_lossy();
        let doomed = self.path.join(format!(".{name}.old"));
        fs::rename(checkpoint, &doomed)
            .and_then(|()| fs::remove_dir_all(&doomed))
            .with_context(|| format!("cannot remove {}", checkpoint.display()))
    }
}

impl State {
    /// A state whose records are yet to be written.
    pub fn new(step: usize, valid_bits: f64, seconds: f64) -> Self {
        Self { step, valid_bits, seconds, files: Vec::new() }
    }
}

impl Checkpoint {
    /// Read the state of the checkpoint at `path` and compare its records with it.
    ///
    /// # Errors
    ///
    /// Names the file that is missing, truncated or altered, and the sizes.
    pub fn open(path: &Path) -> Result<Self> {
        let state_path = path.join(STATE);
        let text = fs::read_to_string(&state_path)
            .with_context(|| format!("cannot read checkpoint file {}", state_path.display()))?;
        let state: State = serde_json::from_str(&text)
            .with_context(|| format!("{} is no state of a checkpoint", state_path.display()))?;
        for stored in &state.files {
            let file = path.join(&stored.name);
            let bytes = fs::read(&file)
                .with_context(|| format!("cannot read checkpoint file {}", file.display()))?;
            ensure!(
                bytes.len() as u64 == stored.bytes,
                "{} has {} bytes, but was written with {}: it is truncated or was altered",
                file.display(),
                bytes.len(),
                stored.bytes
            );
            let hash = format!("{:016x}", fnv1a(&bytes));
            ensure!(
                hash == stored.fnv1a,
                "{} has the hash {hash}, but was written with {}: it is damaged",
                file.display(),
                stored.fnv1a
            );
        }
        Ok(Self { path: path.to_path_buf(), state })
    }

    /// The latest checkpoint in the folder of a run; `None` if there is none.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open), with the checkpoint to go back to if there is one.
    pub fn latest(run: &Path) -> Result<Option<Self>> {
        let mut all = list(run)?;
        let Some((_, latest)) = all.pop() else {
            return Ok(None);
        };
        let opened = Self::open(&latest).with_context(|| {
            let earlier = match all.last() {
                Some((_, path)) => format!(" to go on from {}", path.display()),
                None => " and start anew with --fresh".to_string(),
            };
            format!("{} cannot be resumed; remove that folder{earlier}", latest.display())
        })?;
        Ok(Some(opened))
    }

    /// Folder of the checkpoint.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Put the stored weights, and their ids, into `model`.
    ///
    /// # Errors
    ///
    /// When the record does not fit the model.
    pub fn load_model<M: Module>(&self, model: M) -> Result<M> {
        let path = self.path.join(MODEL);
        let context = || format!("cannot load {}", path.display());
        let record = ModuleRecord::load(&path).with_context(context)?;
        model.try_load_record(record).with_context(context)
    }

    /// Put the stored moments into `optimizer`.
    ///
    /// # Errors
    ///
    /// When the record cannot be read.
    pub fn load_optimizer(&self, optimizer: ModuleOptimizer) -> Result<ModuleOptimizer> {
        let path = self.path.join(OPTIMIZER);
        optimizer.load(&path).with_context(|| format!("cannot load {}", path.display()))
    }
}

/// The checkpoint to generate from: `path` itself, or the one with the best score in the folder of
/// a run.
///
/// # Errors
///
/// When `path` is neither.
pub fn find(path: &Path) -> Result<PathBuf> {
    if path.join(STATE).is_file() {
        return Ok(path.to_path_buf());
    }
    best(path)?.ok_or_else(|| {
        anyhow!(
            "{} holds no checkpoint: train one first, or name its folder with --checkpoint",
            path.display()
        )
    })
}

/// The checkpoint with the lowest score, the later one of equals. One whose state cannot be read is
/// passed over.
fn best(run: &Path) -> Result<Option<PathBuf>> {
    let mut scored = Vec::new();
    for (_, path) in list(run)? {
        let text = fs::read_to_string(path.join(STATE)).unwrap_or_default();
        if let Ok(state) = serde_json::from_str::<State>(&text) {
            scored.push((state.valid_bits, path));
        }
    }
    scored.reverse();
    Ok(scored.into_iter().min_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, path)| path))
}

/// Whether a run has begun in `folder`.
pub fn is_run(folder: &Path) -> bool {
    folder.join(CONFIG_FILE).is_file() || list(folder).is_ok_and(|all| !all.is_empty())
}

/// The run under `folder` that was trained last; `None` if there is none.
pub fn last_run(folder: &Path) -> Option<PathBuf> {
    let trained = |run: &PathBuf| fs::metadata(run.join(LOG_FILE)).and_then(|m| m.modified()).ok();
    let runs = entries(folder).ok()?.into_iter();
    runs.filter(|run| trained(run).is_some()).max_by_key(trained)
}

/// Steps and folders of all checkpoints of a run, by step.
fn list(run: &Path) -> Result<Vec<(usize, PathBuf)>> {
    let mut found: Vec<(usize, PathBuf)> = entries(run)?
        .into_iter()
        .filter_map(|path| {
            let step = path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()?;
            path.is_dir().then_some((step, path))
        })
        .collect();
    found.sort();
    Ok(found)
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let read = || -> std::io::Result<Vec<PathBuf>> {
        fs::read_dir(folder)?.map(|e| Ok(e?.path())).collect()
    };
    read().with_context(|| format!("cannot list {}", folder.display()))
}

fn folder_name(step: usize) -> String {
    format!("step-{step:08}")
}

/// Write a file so that it holds either the old content or the new, also after a power cut.
///
/// # Errors
///
/// When it cannot be written.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let partial = path.with_extension("partial");
    let write = || -> Result<()> {
        let mut file = File::create(&partial)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&partial, path)?;
        path.parent().map_or(Ok(()), sync_folder)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// A rename lasts once its folder is on disk. Only Unix lets us ask for that.
fn sync_folder(folder: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
