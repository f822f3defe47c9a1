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

/// Bytes of the two lengths before the parts.
const HEADER: usize = 16;

impl Corpus {
    /// Write a copy into `folder`, unless this very corpus is there: the lengths of both parts, each
    /// in 8 bytes, little-endian, then the parts.
    ///
    /// # Errors
    ///
    /// When the folder cannot be written.
    pub fn keep(&self, folder: &Path) -> Result<()> {
        if matches!(Self::kept(folder, &self.hash), Ok(Some(_))) {
            return Ok(());
        }
        let mut bytes = Vec::with_capacity(HEADER + self.train.len() + self.valid.len());
        for part in [&self.train, &self.valid] {
            bytes.extend_from_slice(&(part.len() as u64).to_le_bytes());
        }
        bytes.extend_from_slice(&self.train);
        bytes.extend_from_slice(&self.valid);
        write_file(&folder.join(FILE), &bytes)
    }

    /// The copy in `folder`, if there is one.
    ///
    /// # Errors
    ///
    /// When it is damaged: its size is not the one it was written with, or its hash is not `hash`.
    pub fn kept(folder: &Path, hash: &str) -> Result<Option<Self>> {
        let path = folder.join(FILE);
        if !path.exists() {
            return Ok(None);
        }
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        // a file too short for a length is too short for what any length says
        let words = bytes.as_chunks::<8>().0;
        let length = |i: usize| words.get(i).map_or(0, |word| u64::from_le_bytes(*word));
        let (train, valid) = (length(0), length(1));
        let expected = train.saturating_add(valid).saturating_add(HEADER as u64);
        ensure!(
            bytes.len() as u64 == expected,
            "{} has {} bytes, but was written with {expected}: it is truncated or was altered",
            path.display(),
            bytes.len()
        );
        let (train, valid) = bytes[HEADER..].split_at(train as usize);
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
        let damage = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            Corpus::kept(folder.path(), &hash).err().expect("damaged").to_string()
        };
        for cut in [500, 1040] {
            let error = damage(&whole[..cut]);
            let sizes = format!("has {cut} bytes, but was written with 1066:");
            assert!(error.contains("corpus.bin") && error.contains(&sizes), "{error}");
        }
        assert!(damage(&[]).contains("has 0 bytes"));
        let mut flipped = whole.clone();
        flipped[700] ^= 1;
        let error = damage(&flipped);
        assert!(error.contains(&hash) && error.contains("damaged"), "{error}");
        // a new run in that folder writes it anew
        corpus.keep(folder.path()).unwrap();
        assert_eq!(fs::read(&path).unwrap(), whole);
    }
}
