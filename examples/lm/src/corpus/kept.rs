//! A copy of the default corpus in the folder of the run.
//!
//! What crates lie on a disk changes with every build, and a run that is resumed must read the same
//! bytes: so the first start keeps them. `--data` is the user's own and is not copied.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::Corpus;
use crate::checkpoint::write_file;

const FILE: &str = "corpus.bin";

impl Corpus {
    /// Write a copy into `folder`, unless this very corpus is there: 8 bytes with the length of the
    /// training part, little-endian, then both parts.
    ///
    /// # Errors
    ///
    /// When the folder cannot be written.
    pub fn keep(&self, folder: &Path) -> Result<()> {
        let path = folder.join(FILE);
        let len = 8 + self.train.len() + self.valid.len();
        if fs::metadata(&path).is_ok_and(|file| file.len() == len as u64) {
            return Ok(());
        }
        let mut bytes = Vec::with_capacity(len);
        bytes.extend_from_slice(&(self.train.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&self.train);
        bytes.extend_from_slice(&self.valid);
        write_file(&path, &bytes)
    }

    /// The copy in `folder`, if there is one.
    ///
    /// # Errors
    ///
    /// When it is damaged: its hash is not `hash`.
    pub fn kept(folder: &Path, hash: &str) -> Result<Option<Self>> {
        let path = folder.join(FILE);
        if !path.exists() {
            return Ok(None);
        }
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let parts = bytes.split_first_chunk::<8>().and_then(|(len, rest)| {
            let len = usize::try_from(u64::from_le_bytes(*len)).ok()?;
            rest.split_at_checked(len)
        });
        let (train, valid) =
            parts.with_context(|| format!("{} is cut: {} bytes", path.display(), bytes.len()))?;
        let found = Self::hash_of(train, valid);
        ensure!(
            found == hash,
            "{} has the hash {found}, the run was trained on {hash}: the file is damaged",
            path.display()
        );
        let summary = format!(
            "kept with the run: {:.1} MB to train, {:.1} MB to validate, hash {hash}",
            train.len() as f64 / 1e6,
            valid.len() as f64 / 1e6,
        );
        let (train, valid) = (train.to_vec(), valid.to_vec());
        Ok(Some(Self { train, valid, summary, hash: hash.to_string() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kept_corpus_comes_back_and_damage_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let (train, valid) = (vec![1u8; 1000], vec![2u8; 50]);
        let hash = Corpus::hash_of(&train, &valid);
        let corpus = Corpus { train, valid, summary: String::new(), hash: hash.clone() };
        assert!(Corpus::kept(folder.path(), &hash).unwrap().is_none());
        corpus.keep(folder.path()).unwrap();
        let kept = Corpus::kept(folder.path(), &hash).unwrap().expect("it was kept");
        assert_eq!((kept.train, kept.valid), (corpus.train.clone(), corpus.valid.clone()));

        let path = folder.path().join(FILE);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..500]).unwrap();
        let error = Corpus::kept(folder.path(), &hash).err().expect("cut").to_string();
        assert!(error.ends_with("is cut: 500 bytes"), "{error}");
        fs::write(&path, &whole[..1040]).unwrap();
        let error = Corpus::kept(folder.path(), &hash).err().expect("damaged").to_string();
        assert!(error.contains(&hash) && error.contains("damaged"), "{error}");
        // the next start writes it anew
        corpus.keep(folder.path()).unwrap();
        assert!(Corpus::kept(folder.path(), &hash).unwrap().is_some());
    }
}
