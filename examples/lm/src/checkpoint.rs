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

use anyhow::{Context, Result, anyhow, bail};
use burn::module::Module;
use burn::optim::ModuleOptimizer;
use burn::store::ModuleRecord;

use crate::config::CONFIG_FILE;
use crate::progress::LOG_FILE;

mod state;

pub use state::State;

const MODEL: &str = "model.bpk";
const OPTIMIZER: &str = "optimizer.bpk";
const STATE: &str = "state.json";
/// Ends the name of a checkpoint that makes room for a newer one of the same step.
const REPLACED: &str = ".replaced";

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
                state.add(file, &fs::read(&path)?);
                // the folder must not get its name before its content is on disk; some systems sync
                // only what is open for writing
                File::options().write(true).open(&path)?.sync_all()?;
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
        write().map_err(|error| named("cannot write checkpoint", &partial, &error))?;
        self.prune(keep.max(1))
    }

    fn prune(&self, keep: usize) -> Result<()> {
        let mut old = list(&self.path)?;
        old.truncate(old.len().saturating_sub(keep));
        // a checkpoint without a readable state has no score to be kept for
        let best = best(&self.path, |_, _| {})?;
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

impl Checkpoint {
    /// Read the state of the checkpoint at `path` and compare both records with it.
    ///
    /// # Errors
    ///
    /// Names the file that is missing, truncated or altered, and the sizes.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_records(path, &[MODEL, OPTIMIZER])
    }

    /// As [`open`](Self::open), for [`load_model`](Self::load_model) alone: the optimizer may be
    /// damaged or missing.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open), but not about the optimizer.
    pub fn open_model(path: &Path) -> Result<Self> {
        Self::open_records(path, &[MODEL])
    }

    fn open_records(path: &Path, records: &[&str]) -> Result<Self> {
        let state_path = path.join(STATE);
        let state = State::read(&state_path)
            .with_context(|| format!("cannot read checkpoint file {}", state_path.display()))?;
        for name in records {
            let stored = state.record(name);
            let stored =
                stored.with_context(|| format!("{} does not list {name}", state_path.display()))?;
            stored.compare(&path.join(name))?;
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
        let opened = Self::open(&latest).map_err(|error| {
            let earlier = match all.last() {
                Some((_, path)) => format!("remove its folder to go on from {}", path.display()),
                None => "start anew with --fresh".to_string(),
            };
            // the error names the folder already
            anyhow!("{error:#}; {earlier}")
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
        let loaded = ModuleRecord::load(&path).and_then(|record| model.try_load_record(record));
        loaded.map_err(|error| named("cannot load", &path, &error.into()))
    }

    /// Put the stored moments into `optimizer`.
    ///
    /// # Errors
    ///
    /// When the record cannot be read.
    pub fn load_optimizer(&self, optimizer: ModuleOptimizer) -> Result<ModuleOptimizer> {
        let path = self.path.join(OPTIMIZER);
        optimizer.load(&path).map_err(|error| named("cannot load", &path, &error.into()))
    }
}

/// The checkpoint to generate from: `path` itself, or the one with the best score in the folder of
/// a run. Says on stderr which ones it passed over because their states cannot be read.
///
/// # Errors
///
/// When `path` is neither.
pub fn find(path: &Path) -> Result<PathBuf> {
    if path.join(STATE).is_file() {
        return Ok(path.to_path_buf());
    }
    let mut passed_over = 0;
    let found = best(path, |state, reason| {
        eprintln!("passed over {}: {reason:#}", state.display());
        passed_over += 1;
    })?;
    found.ok_or_else(|| match passed_over {
        0 => anyhow!(
            "{} holds no checkpoint: train one first, or name its folder with --checkpoint",
            path.display()
        ),
        n => anyhow!("{}: passed over {n} of {n} checkpoints, none is left", path.display()),
    })
}

/// The checkpoint with the lowest score, the later one of equals. A state that cannot be read goes
/// to `unreadable`, with the reason.
fn best(run: &Path, mut unreadable: impl FnMut(&Path, anyhow::Error)) -> Result<Option<PathBuf>> {
    let mut scored = Vec::new();
    for (_, path) in list(run)? {
        let state_path = path.join(STATE);
        match State::read(&state_path) {
            Ok(state) => scored.push((state.valid_bits, path)),
            Err(error) => unreadable(&state_path, error),
        }
    }
    scored.reverse();
    Ok(scored.into_iter().min_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, path)| path))
}

/// `what`, the name of the file and the error. Some errors of Burn's name the file, some do not;
/// once is enough.
fn named(what: &str, path: &Path, error: &anyhow::Error) -> anyhow::Error {
    let (path, reason) = (path.display().to_string(), format!("{error:#}"));
    match reason.contains(&path) {
        true => anyhow!("{what}: {reason}"),
        false => anyhow!("{what} {path}: {reason}"),
    }
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
