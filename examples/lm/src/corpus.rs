//! Bytes to learn from: the sources of this example's own dependencies, or `--data`.
//!
//! `cargo run --release -p gla-lm --bin train -- --steps 0` prints what it finds.
//!
//! A document is a file; a zero byte stands before each. No text holds one, so it can be the
//! separator without a 257th token. Training and validation share no crate (or, with `--data <dir>`,
//! no file), as neighbouring files of one crate repeat each other; unless there are too few of them,
//! then the end of the largest is for validation.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use ignore::WalkBuilder;

use crate::hash::{fnv1a, fnv1a_named};

mod crates;
mod kept;

/// Stands before every document, and before every prompt.
pub const SEPARATOR: u8 = 0;

/// Part of the bytes that is kept for validation.
const VALID_SHARE: f64 = 0.05;

/// Cap of the default corpus: what two minutes on two cores can use many times over, and read in
/// well under a second.
pub const DEFAULT_MB: usize = 24;

/// Bytes for training and validation.
pub struct Corpus {
    /// Documents to train on.
    pub train: Vec<u8>,
    /// Documents to score.
    pub valid: Vec<u8>,
    /// One line: where it came from, how much of it, which hash.
    pub summary: String,
    /// Hash over both parts, as 16 hexadecimal digits.
    pub hash: String,
}

/// A crate or a file: the unit that goes to training or to validation as a whole.
struct Source {
    name: String,
    documents: Vec<u8>,
}

impl Corpus {
    /// Read `data` (a file or a folder), or the dependencies' sources if it is `None`.
    ///
    /// `max_mb` caps the size in megabytes.
    ///
    /// # Errors
    ///
    /// When nothing can be read, or one part is too short for windows of `context + 1` bytes.
    pub fn load(data: Option<&Path>, max_mb: Option<usize>, context: usize) -> Result<Self> {
        let megabytes = |mb: usize| mb.saturating_mul(1_000_000);
        let limit = max_mb.map_or(usize::MAX, megabytes);
        let (sources, unit, origin) = match data {
            Some(path) if path.is_dir() => {
                (read_folder(path, limit)?, "files", path.display().to_string())
            }
            Some(path) => (vec![read_file(path, limit)?], "file", path.display().to_string()),
            None => {
                let (sources, origin) = crates::read(megabytes(max_mb.unwrap_or(DEFAULT_MB)))?;
                (sources, "crates", origin)
            }
        };
        let names = sources.len();
        let (train, valid) = split(sources);
        let hash = Self::hash_of(&train, &valid);
        let summary = format!(
            "{origin}: {names} {unit}, {:.1} MB to train, {:.1} MB to validate, hash {hash}",
            train.len() as f64 / 1e6,
            valid.len() as f64 / 1e6,
        );
        for (part, bytes) in [("training", &train), ("validation", &valid)] {
            ensure!(
                bytes.len() > context,
                "the corpus is too small: {} {part} bytes from {origin}, but --context {context} \
                 needs at least {}",
                bytes.len(),
                context + 1
            );
        }
        Ok(Self { train, valid, summary, hash })
    }

    fn hash_of(train: &[u8], valid: &[u8]) -> String {
        format!("{:016x}", fnv1a(train) ^ fnv1a(valid).rotate_left(1))
    }
}

/// Whole sources to validation until it has its share, the rest to training.
///
/// One that would make it more than twice its share is passed over. Where that leaves less than
/// half, the sources are too coarse: the largest is cut, and its end is scored. Neighbours with one
/// name stay together: two versions of a crate are one crate.
fn split(sources: Vec<Source>) -> (Vec<u8>, Vec<u8>) {
    let total: usize = sources.iter().map(|s| s.documents.len()).sum();
    let share = (total as f64 * VALID_SHARE) as usize;
    let mut units: Vec<Source> = Vec::new();
    for source in sources {
        match units.last_mut() {
            Some(last) if last.name == source.name => last.documents.extend(source.documents),
            _ => units.push(source),
        }
    }
    let (mut kept, mut valid) = (Vec::new(), Vec::new());
    for Source { documents, .. } in units {
        if valid.len() < share && valid.len() + documents.len() <= 2 * share {
            valid.extend(documents);
        } else {
            kept.push(documents);
        }
    }
    if 2 * valid.len() < share
        && let Some(largest) = kept.iter_mut().max_by_key(|documents| documents.len())
    {
        // all that was passed over is longer than what is missing
        let missing = share - valid.len();
        valid.extend(largest.split_off(largest.len() - missing));
    }
    (kept.concat(), valid)
}

fn read_file(path: &Path, limit: usize) -> Result<Source> {
    let mut bytes =
        std::fs::read(path).with_context(|| format!("cannot read --data {}", path.display()))?;
    ensure!(!bytes.is_empty(), "--data {} is empty", path.display());
    bytes.truncate(limit);
    bytes.insert(0, SEPARATOR);
    Ok(Source { name: path.display().to_string(), documents: bytes })
}

/// Every text file under `root`, in an order that depends on the names alone. What git ignores and
/// hidden files are left out.
fn read_folder(root: &Path, limit: usize) -> Result<Vec<Source>> {
    let mut files = Vec::new();
    for entry in WalkBuilder::new(root).require_git(false).build() {
        let entry = entry.with_context(|| format!("cannot read --data {}", root.display()))?;
        if entry.file_type().is_some_and(|t| t.is_file()) {
            let name = entry.path().strip_prefix(root).unwrap_or(entry.path());
            files.push((name.to_string_lossy().into_owned(), entry.into_path()));
        }
    }
    files.sort_by_key(|(name, _)| (fnv1a(name.as_bytes()), name.clone()));

    let mut seen = Seen::default();
    let mut sources = Vec::new();
    for (name, path) in files {
        let mut documents = Vec::new();
        seen.append(&path, limit - seen.bytes, &mut documents)?;
        if !documents.is_empty() {
            sources.push(Source { name, documents });
        }
    }
    if sources.is_empty() {
        match limit {
            usize::MAX => bail!("--data {} holds no text files", root.display()),
            _ => bail!("--data {} holds no text file of less than {limit} bytes", root.display()),
        }
    }
    Ok(sources)
}

/// What is in the corpus so far.
#[derive(Default)]
struct Seen {
    bytes: usize,
    hashes: HashSet<u64>,
}

impl Seen {
    /// Append the file as a document if it is text, new, and no longer than `room`.
    fn append(&mut self, path: &Path, room: usize, documents: &mut Vec<u8>) -> Result<()> {
        let text =
            std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let is_text = !text.contains(&SEPARATOR) && std::str::from_utf8(&text).is_ok();
        if text.is_empty() || text.len() >= room || !is_text {
            return Ok(());
        }
        // the extension counts, so that an equal text under another kind of name is kept
        let kind = path.extension().unwrap_or_default().to_string_lossy();
        if self.hashes.insert(fnv1a_named(&kind, &text)) {
            documents.push(SEPARATOR);
            documents.extend_from_slice(&text);
            self.bytes += text.len() + 1;
        }
        Ok(())
    }
}

/// Files under `root` with a given test on the path, sorted by path.
fn walk(root: &Path, keep: impl Fn(&Path) -> bool) -> Vec<PathBuf> {
    WalkBuilder::new(root)
        .standard_filters(false)
        .sort_by_file_path(|a, b| a.cmp(b))
        .build()
        .filter_map(Result::ok)
        .filter(|entry| entry.file_type().is_some_and(|t| t.is_file()))
        .map(|entry| entry.into_path())
        .filter(|path| keep(path))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(name: &str, len: usize) -> Source {
        Source { name: name.into(), documents: vec![name.as_bytes()[0]; len] }
    }

    fn has(part: &[u8], name: u8) -> bool {
        part.contains(&name)
    }

    #[test]
    fn no_source_is_on_both_sides() {
        let names: Vec<String> = ('a'..='z').map(String::from).collect();
        let (train, valid) = split(names.iter().map(|n| source(n, 100)).collect());
        assert_eq!((train.len(), valid.len()), (2400, 200));
        for name in b'a'..=b'z' {
            assert!(has(&train, name) != has(&valid, name), "{}", name as char);
        }
    }

    #[test]
    fn versions_of_one_crate_stay_together() {
        let sources = [("a", 50), ("a", 50), ("b", 900)].map(|(n, len)| source(n, len));
        let (train, valid) = split(sources.into());
        assert_eq!((train.len(), valid.len()), (900, 100));
        assert!(!has(&train, b'a'));
    }

    #[test]
    fn validation_keeps_near_its_share_of_uneven_sources() {
        let cases: [&[usize]; 8] = [
            &[1000],
            &[500, 500],
            &[950, 50],
            &[10, 990],
            &[990, 10],
            &[3, 900, 90, 7],
            &[100, 100, 100, 100, 100, 100, 100, 100, 100, 100],
            &[40, 960],
        ];
        for lengths in cases {
            // in any order of the names
            for turn in 0..lengths.len() {
                let mut sources: Vec<Source> = ('a'..)
                    .zip(lengths)
                    .map(|(name, len)| source(&name.to_string(), *len))
                    .collect();
                sources.rotate_left(turn);
                let (train, valid) = split(sources);
                assert_eq!(train.len() + valid.len(), 1000, "{lengths:?}");
                assert!((25..=100).contains(&valid.len()), "{lengths:?}: {}", valid.len());
            }
        }
    }

    #[test]
    fn too_coarse_a_source_is_cut_at_its_end() {
        let mut text = source("a", 1000);
        text.documents[950..].fill(b'z');
        let (train, valid) = split(vec![source("b", 2), text, source("c", 20)]);
        assert_eq!((train.len(), valid.len()), (971, 51));
        assert_eq!(valid[..22], [[b'b'; 2].as_slice(), &[b'c'; 20]].concat());
        assert!(valid[22..].iter().all(|byte| *byte == b'z'), "the end of the largest");
    }

    #[test]
    fn a_folder_is_read_by_name_without_binaries_and_twins() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &[u8]| std::fs::write(dir.path().join(name), text).unwrap();
        write("one.txt", b"first text");
        write("two.txt", b"second text");
        write("twin.txt", b"first text");
        write("image.bin", b"\x00\x01");
        write("latin.txt", b"caf\xe9");
        write("empty.txt", b"");
        let corpus = Corpus::load(Some(dir.path()), None, 0).unwrap();
        assert_eq!(corpus.train.len() + corpus.valid.len(), 11 + 12);
        let again = Corpus::load(Some(dir.path()), None, 0).unwrap();
        assert_eq!(corpus.hash, again.hash);
        write("three.txt", b"third text");
        let more = Corpus::load(Some(dir.path()), None, 0).unwrap();
        assert_ne!(corpus.hash, more.hash);
    }

    #[test]
    fn errors_name_the_path_and_the_sizes() {
        let message = |path: &Path, context| match Corpus::load(Some(path), None, context) {
            Ok(_) => panic!("{} was accepted", path.display()),
            Err(error) => format!("{error:#}"),
        };
        let dir = tempfile::tempdir().unwrap();
        assert!(message(dir.path(), 8).contains("holds no text files"));
        let missing = dir.path().join("missing.txt");
        assert!(message(&missing, 8).contains("missing.txt"));
        let short = dir.path().join("short.txt");
        std::fs::write(&short, vec![b'x'; 199]).unwrap();
        let error = message(&short, 64);
        assert!(error.contains("10 validation bytes"), "{error}");
        assert!(error.contains("--context 64 needs at least 65"), "{error}");
    }
}
