//! The default corpus: Rust and Markdown files of the crates that this example was built from.
//!
//! `cargo run --release -p gla-lm --bin train -- --steps 0` prints what it finds.
//!
//! Whoever built the example has them on disk, tens of megabytes, and nothing is downloaded.
//! `cargo metadata` names the exact dependency closure, but answers offline only where every crate
//! of Cargo.lock has been fetched; a plain build fetches fewer. Then the registry folder itself is
//! scanned: on a machine that built little else it holds just that closure.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use cargo_metadata::{DependencyKind, Metadata, MetadataCommand};

use super::{Seen, Source, walk};
use crate::hash::fnv1a;

/// No crate gives more, so that no crate decides what the model sounds like.
const CRATE_BYTES: usize = 2_000_000;

/// A longer file is a table or generated.
const FILE_BYTES: u64 = 512 * 1024;

/// Licences whose texts may be used freely; an unknown expression is left out.
const LICENCES: [&str; 14] = [
    "MIT",
    "MIT-0",
    "Apache-2.0",
    "BSD-1-Clause",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "0BSD",
    "ISC",
    "Zlib",
    "Unlicense",
    "CC0-1.0",
    "BSL-1.0",
    "Unicode-3.0",
    "Unicode-DFS-2016",
];

/// A crate in the registry folder.
#[derive(Clone, Debug, PartialEq)]
struct Crate {
    name: String,
    root: PathBuf,
}

/// Read at most `limit` bytes, crate by crate. Also returns where they come from.
pub(super) fn read(limit: usize) -> Result<(Vec<Source>, String)> {
    let (mut crates, origin) = match closure() {
        Ok(crates) if !crates.is_empty() => (crates, "crates of the dependency closure"),
        _ => (registry()?, "crates in the cargo registry"),
    };
    // by the hash of the name: a fixed order in which no family of crates comes first
    crates.sort_by_key(|c| (fnv1a(c.name.as_bytes()), c.name.clone(), c.root.clone()));

    let mut seen = Seen::default();
    let mut sources = Vec::new();
    for Crate { name, root } in crates {
        let left = limit - seen.bytes;
        if left < 4096 {
            break;
        }
        let room = CRATE_BYTES.min(left);
        let mut documents = Vec::new();
        for path in walk(&root, wanted) {
            seen.append(&path, room.saturating_sub(documents.len()), &mut documents)?;
        }
        if !documents.is_empty() {
            sources.push(Source { name, documents });
        }
    }
    ensure!(
        !sources.is_empty(),
        "found no Rust sources among the {origin}: name a text with --data <file or folder>"
    );
    Ok((sources, origin.to_string()))
}

/// Registry crates that this package needs to build and run, as `cargo metadata` tells.
fn closure() -> Result<Vec<Crate>> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
    let metadata = MetadataCommand::new()
        .manifest_path(manifest)
        .other_options(["--offline", "--filter-platform", "host-tuple"].map(String::from))
        .exec()?;
    let reached = reachable(&metadata).context("cargo metadata did not resolve this package")?;
    let crates = metadata
        .packages
        .iter()
        .filter(|p| p.source.is_some() && reached.contains(p.id.repr.as_str()))
        .filter(|p| p.license.as_deref().is_some_and(is_permissive))
        .filter(|p| !p.name.starts_with("windows"))
        .filter_map(|p| {
            Some(Crate {
                name: p.name.to_string(),
                root: p.manifest_path.parent()?.as_std_path().to_path_buf(),
            })
        })
        .filter(|c| c.root.is_dir())
        .collect();
    Ok(crates)
}

/// Ids of all packages that ours reaches other than for its tests.
fn reachable(metadata: &Metadata) -> Option<HashSet<&str>> {
    let resolve = metadata.resolve.as_ref()?;
    let own = metadata.packages.iter().find(|p| p.name.as_str() == env!("CARGO_PKG_NAME"))?;
    let mut reached = HashSet::new();
    let mut open = vec![own.id.repr.as_str()];
    while let Some(id) = open.pop() {
        if !reached.insert(id) {
            continue;
        }
        let node = resolve.nodes.iter().find(|n| n.id.repr == id)?;
        let needed = node.deps.iter().filter(|dep| {
            dep.dep_kinds.iter().any(|kind| kind.kind != DependencyKind::Development)
        });
        open.extend(needed.map(|dep| dep.pkg.repr.as_str()));
    }
    Some(reached)
}

/// Every crate in the registry folder of cargo.
fn registry() -> Result<Vec<Crate>> {
    let cargo_home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::home_dir().map(|home| home.join(".cargo")))
        .context("neither CARGO_HOME nor a home folder is known: name a text with --data")?;
    let src = cargo_home.join("registry").join("src");
    let folders = |path: &Path| -> Result<Vec<PathBuf>> {
        let entries = std::fs::read_dir(path).with_context(|| {
            format!(
                "cannot list {}, where cargo keeps sources: name a text with --data",
                path.display()
            )
        })?;
        Ok(entries.filter_map(|e| Some(e.ok()?.path())).collect())
    };
    let mut crates = Vec::new();
    for index in folders(&src)? {
        for root in folders(&index)? {
            crates.extend(named(root).filter(|c| {
                !c.name.starts_with("windows")
                    && licence(&c.root).is_some_and(|l| is_permissive(&l))
            }));
        }
    }
    Ok(crates)
}

/// `name-1.2.3` as a crate called `name`.
fn named(root: PathBuf) -> Option<Crate> {
    let folder = root.file_name()?.to_str()?;
    let digits = |rest: &str| rest.starts_with(|c: char| c.is_ascii_digit());
    let (at, _) = folder.match_indices('-').find(|(at, _)| digits(&folder[at + 1..]))?;
    Some(Crate { name: folder[..at].to_string(), root })
}

/// The `license` line of a published manifest, which cargo has normalised to one line.
fn licence(root: &Path) -> Option<String> {
    let manifest = std::fs::read_to_string(root.join("Cargo.toml")).ok()?;
    let line = manifest.lines().find(|l| l.starts_with("license = "))?;
    Some(line.split('"').nth(1)?.to_string())
}

/// Whether every `AND` part of an SPDX expression leaves a choice from [`LICENCES`].
fn is_permissive(expression: &str) -> bool {
    let expression = expression.replace(['(', ')'], " ").replace('/', " OR ");
    expression.split(" AND ").all(|part| {
        part.split(" OR ").any(|licence| {
            let name = licence.split(" WITH ").next().unwrap_or_default().trim();
            LICENCES.contains(&name)
        })
    })
}

/// Rust and Markdown, neither generated nor huge.
fn wanted(path: &Path) -> bool {
    let kind = path.extension().and_then(|e| e.to_str());
    let small = || std::fs::metadata(path).is_ok_and(|m| (64..=FILE_BYTES).contains(&m.len()));
    matches!(kind, Some("rs" | "md"))
        && path.file_name() != Some("bindings.rs".as_ref())
        && small()
        && !is_generated(path)
}

/// Generators say so in the first lines.
fn is_generated(path: &Path) -> bool {
    let text = std::fs::read(path).unwrap_or_default();
    let head = String::from_utf8_lossy(&text[..text.len().min(512)]).to_lowercase();
    ["@generated", "automatically generated", "auto-generated"]
        .iter()
        .any(|mark| head.contains(mark))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn licences_are_judged_part_by_part() {
        for good in [
            "MIT",
            "MIT OR Apache-2.0",
            "Apache-2.0/MIT",
            "GPL-3.0 OR MIT",
            "(MIT OR Apache-2.0) AND Unicode-3.0",
            "Apache-2.0 WITH LLVM-exception",
        ] {
            assert!(is_permissive(good), "{good}");
        }
        for bad in ["GPL-3.0", "MIT AND GPL-3.0", "LicenseRef-Own", ""] {
            assert!(!is_permissive(bad), "{bad}");
        }
    }

    #[test]
    fn folders_of_the_registry_give_names() {
        let name = |folder: &str| named(PathBuf::from(folder)).map(|c| c.name);
        assert_eq!(name("serde-1.0.2").as_deref(), Some("serde"));
        assert_eq!(name("linux-raw-sys-0.12.1").as_deref(), Some("linux-raw-sys"));
        assert_eq!(name("sha-1-0.10.1").as_deref(), Some("sha"));
        assert_eq!(name("README"), None);
    }

    #[test]
    fn generated_and_long_files_are_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let text = "fn f() {}\n".repeat(10);
        let keeps = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            wanted(&path)
        };
        assert!(keeps("lib.rs", &text));
        assert!(keeps("README.md", &text));
        assert!(!keeps("bindings.rs", &text));
        assert!(!keeps("data.txt", &text));
        assert!(!keeps("tiny.rs", "mod a;"));
        assert!(!keeps("made.rs", &format!("// @generated\n{text}")));
        assert!(!keeps("long.rs", &"x".repeat(600 * 1024)));
    }

    #[test]
    fn the_manifest_line_is_read() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(licence(dir.path()), None);
        let manifest = "[package]\nname = \"a\"\nlicense = \"MIT OR Apache-2.0\"\n";
        std::fs::write(dir.path().join("Cargo.toml"), manifest).unwrap();
        assert_eq!(licence(dir.path()).as_deref(), Some("MIT OR Apache-2.0"));
    }
}
