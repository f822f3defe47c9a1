use std::fmt;
use std::path::{Path, PathBuf};

use burn::tensor::DType;

/// Why a checkpoint cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file that a checkpoint must have is not there.
    #[error("{path} is missing: {reason}")]
    Missing {
        /// The file or folder.
        path: PathBuf,
        /// What it is needed for, and what was found instead.
        reason: String,
    },
    /// A file cannot be read, is truncated, or is not what its name says.
    #[error("cannot read {path}: {reason}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        reason: String,
    },
    /// `config.json` is of another kind of model.
    #[error("{path} is of model_type {found}, expected one of: {}", .known.join(", "))]
    ModelType {
        /// The file.
        path: PathBuf,
        /// What it says, or `none`.
        found: String,
        /// Types that can be loaded.
        known: &'static [&'static str],
    },
    /// `config.json` asks for sizes that do not fit each other.
    #[error("{path} describes no model: {reason}")]
    Config {
        /// The file.
        path: PathBuf,
        /// Which sizes, and what they should be.
        reason: String,
    },
    /// The checkpoint needs something that this library does not have, or the model something that
    /// fla does not have.
    #[error("{path}: {what} is not supported")]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// Key and value, or the tensor.
        what: String,
    },
    /// The tensors are not those that `config.json` describes.
    #[error("the tensors of {path} do not fit its config.json:{}", listed(.problems))]
    Tensors {
        /// The folder.
        path: PathBuf,
        /// Everything that is wrong with them.
        problems: Vec<TensorProblem>,
    },
    /// The folder to write to holds something already.
    #[error("{path} is there already and not empty: remove it or choose another folder")]
    Exists {
        /// The folder.
        path: PathBuf,
    },
    /// The checkpoint cannot be written.
    #[error("cannot write {path}: {reason}")]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        reason: String,
    },
}

impl CheckpointError {
    pub(super) fn read(path: &Path, reason: impl fmt::Display) -> Self {
        Self::Read { path: path.to_path_buf(), reason: reason.to_string() }
    }

    pub(super) fn write(path: &Path, reason: impl fmt::Display) -> Self {
        Self::Write { path: path.to_path_buf(), reason: reason.to_string() }
    }
}

/// What is wrong with one tensor of a checkpoint; shapes are fla's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TensorProblem {
    /// The model has it, the files do not.
    #[error("{name} {expected:?} is missing")]
    Missing {
        /// Name in today's checkpoints.
        name: String,
        /// Shape that the model needs.
        expected: Vec<usize>,
    },
    /// The files have it, the model does not.
    #[error("{name} {found:?} is unknown")]
    Unknown {
        /// Name in the files.
        name: String,
        /// Shape in the files.
        found: Vec<usize>,
    },
    /// The shapes differ.
    #[error("{name} has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Name in the files.
        name: String,
        /// Shape in the files.
        found: Vec<usize>,
        /// Shape that the model needs.
        expected: Vec<usize>,
    },
    /// The type is not one that weights come in.
    #[error("{name} is {found:?}, expected F32, F16 or BF16")]
    Type {
        /// Name in the files.
        name: String,
        /// Type in the files.
        found: DType,
    },
    /// Two tensors of the files are the same parameter.
    #[error("{name} and {other} are the same tensor")]
    Twice {
        /// One name in the files.
        name: String,
        /// The other.
        other: String,
    },
}

/// One problem per line.
fn listed(problems: &[TensorProblem]) -> impl fmt::Display {
    fmt::from_fn(move |f| problems.iter().try_for_each(|problem| write!(f, "\n  {problem}")))
}
