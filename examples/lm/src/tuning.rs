//! What a GPU back-end keeps and what it tries: kernels are compiled once per machine, and with the
//! feature `autotune` it tunes as little as it can, unless you say otherwise.
//!
//! With `autotune`, Burn compiles and times several kernels for every shape of a matrix product before
//! it takes one. A run of many hours may want that, and a level that tries more:
//!
//! `CUBECL_AUTOTUNE_LEVEL=balanced cargo run --release -p gla-lm --bin train --features cuda,autotune`

use std::path::Path;

#[cfg(feature = "autotune")]
use cubecl::config::autotune::AutotuneLevel;
use cubecl::config::{CubeClRuntimeConfig, RuntimeConfig};

/// Environment variable that CubeCL reads the level from.
#[cfg(feature = "autotune")]
const VARIABLE: &str = "CUBECL_AUTOTUNE_LEVEL";

/// Settles the configuration, once per process and before the first use of a GPU, which reads it. A
/// configuration file of the user's stands as it is.
pub fn settle() {
    let folder = std::env::current_dir().unwrap_or_default();
    if has_file(&folder) {
        return;
    }
    #[allow(unused_mut)]
    let mut config = CubeClRuntimeConfig::default().override_from_env();
    #[cfg(feature = "persistence")]
    {
        config.compilation.cache = true;
    }
    #[cfg(feature = "autotune")]
    if std::env::var_os(VARIABLE).is_none() {
        config.autotune.level = AutotuneLevel::Minimal;
    }
    CubeClRuntimeConfig::try_set(config);
}

/// What is kept and tried on the back-end of that name. Fixes it if [`settle`] was not called.
#[cfg_attr(not(feature = "persistence"), allow(unused_variables))]
pub fn describe(back_end: &str) -> String {
    let config = CubeClRuntimeConfig::get();
    #[allow(unused_mut)]
    let mut said: Vec<String> = Vec::new();
    #[cfg(feature = "persistence")]
    said.push(match config.compilation.cache {
        _ if !keeps(back_end) => "kernels left to the driver's cache".to_string(),
        true => format!("kernels kept in {}", config.environment.path.root().display()),
        false => "kernels not kept".to_string(),
    });
    #[cfg(feature = "autotune")]
    said.push({
        let level = format!("{:?}", config.autotune.level).to_lowercase();
        format!("autotune {level} ({VARIABLE} or cubecl.toml change it)")
    });
    let _ = config;
    said.join(", ")
}

/// Whether CubeCL can keep the kernels of a back-end: PTX and SPIR-V, but neither WGSL nor MSL. What
/// `wgpu` opens takes SPIR-V where that is compiled in.
#[cfg(feature = "persistence")]
fn keeps(back_end: &str) -> bool {
    match back_end {
        "cuda" | "vulkan" => true,
        "wgpu" => cfg!(feature = "vulkan"),
        _ => false,
    }
}

/// Whether CubeCL finds a configuration for programs that run in `folder`, and so reads the level
/// from there.
fn has_file(folder: &Path) -> bool {
    folder.ancestors().any(|folder| {
        let whole = CubeClRuntimeConfig::file_names().iter().map(|name| folder.join(name));
        let mut parts = CubeClRuntimeConfig::section_file_names().iter();
        whole.into_iter().any(|path| path.is_file())
            || parts.any(|(name, section)| {
                CubeClRuntimeConfig::from_section_file_path(folder.join(name), section).is_ok()
            })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(feature = "autotune")]
    #[test]
    fn the_level_is_minimal_unless_someone_chose_another() {
        settle();
        let level = &CubeClRuntimeConfig::get().autotune.level;
        let folder = std::env::current_dir().unwrap();
        if std::env::var_os(VARIABLE).is_none() && !has_file(&folder) {
            assert!(matches!(level, AutotuneLevel::Minimal), "{level:?}");
        }
        let name = format!("autotune {level:?} ").to_lowercase();
        assert!(describe("cuda").contains(&name), "{}", describe("cuda"));
    }

    #[cfg(feature = "persistence")]
    #[test]
    fn kernels_are_kept_unless_a_file_says_otherwise() {
        settle();
        let folder = std::env::current_dir().unwrap();
        assert!(CubeClRuntimeConfig::get().compilation.cache || has_file(&folder));
        for back_end in ["cuda", "vulkan", "wgpu", "metal"] {
            assert!(describe(back_end).starts_with("kernels "), "{}", describe(back_end));
        }
        let driver = "kernels left to the driver's cache";
        assert!(describe("metal").starts_with(driver), "{}", describe("metal"));
        assert_eq!(describe("wgpu").starts_with(driver), !cfg!(feature = "vulkan"));
        assert!(!describe("vulkan").starts_with(driver), "{}", describe("vulkan"));
    }

    #[test]
    fn files_of_the_user_are_seen_from_below() {
        let dir = tempfile::tempdir().unwrap();
        let below = dir.path().join("a").join("b");
        std::fs::create_dir_all(&below).unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        assert!(!has_file(&below));
        write("burn.toml", "[fusion]\n");
        assert!(!has_file(&below), "nothing about CubeCL");
        write("burn.toml", "[cubecl.autotune]\nlevel = \"full\"\n");
        assert!(has_file(&below));
        std::fs::remove_file(dir.path().join("burn.toml")).unwrap();
        write("cubecl.toml", "[autotune]\nlevel = \"balanced\"\n");
        assert!(has_file(&below));
    }
}
