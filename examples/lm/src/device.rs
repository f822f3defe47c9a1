//! `--device`: where to compute. `auto` takes a real GPU if one is compiled in and present, else the
//! CPU.
//!
//! `cargo run --release -p gla-lm --bin train --features vulkan -- --device vulkan`
//!
//! Burn's own default device is the first back-end compiled in, present or not, and a software
//! Vulkan adapter is as good to it as a GPU. So we look before we choose.

use anyhow::{Result, bail};
use burn::tensor::Device;
use clap::ValueEnum;

use crate::tuning;

/// Value of `--device`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DeviceChoice {
    /// A real GPU if there is one, else the CPU.
    #[default]
    Auto,
    /// NVIDIA, through CUDA.
    Cuda,
    /// Any GPU with a Vulkan driver.
    Vulkan,
    /// Any GPU that wgpu finds; `webgpu` means the same.
    #[value(alias = "webgpu")]
    Wgpu,
    /// Apple.
    Metal,
    /// The processor.
    Cpu,
}

/// The device of a run.
pub struct Chosen {
    /// Without autodiff.
    pub device: Device,
    /// For people: back-end, name of the part, tuning.
    pub label: String,
    /// Whether it is more than a CPU.
    pub is_gpu: bool,
}

/// A back-end for `--device`: whether it is compiled in, and the device if it is there.
struct Backend {
    choice: DeviceChoice,
    /// Cargo feature and value of `--device`.
    name: &'static str,
    /// `None` if the feature is off. The flag asks for software adapters too.
    find: Option<fn(bool) -> Option<Device>>,
}

/// GPU back-ends in the order in which `auto` tries them.
fn backends() -> [Backend; 4] {
    let backend = |choice, name, find| Backend { choice, name, find };
    [
        backend(DeviceChoice::Cuda, "cuda", gpu::CUDA),
        backend(DeviceChoice::Metal, "metal", gpu::METAL),
        backend(DeviceChoice::Vulkan, "vulkan", gpu::VULKAN),
        backend(DeviceChoice::Wgpu, "wgpu", gpu::WGPU),
    ]
}

/// Find the device of `choice`.
///
/// Call it before anything else computes: it also settles how much a GPU's back-end tunes itself.
///
/// # Errors
///
/// When the back-end is not compiled in, or finds nothing to compute on.
pub fn choose(choice: DeviceChoice) -> Result<Chosen> {
    if choice == DeviceChoice::Cpu {
        return match cpu() {
            Some(device) => Ok(on_cpu(device, "--device cpu")),
            None => bail!("--device cpu is not compiled in: build with --features flex"),
        };
    }
    tuning::settle();
    if choice == DeviceChoice::Auto {
        return automatic();
    }
    let Some(backend) = backends().into_iter().find(|b| b.choice == choice) else {
        bail!("--device {choice:?} is unknown");
    };
    let name = backend.name;
    let Some(find) = backend.find else {
        bail!("--device {name} is not compiled in: build with --features {name}");
    };
    match find(true) {
        Some(device) => Ok(on_gpu(device, name)),
        None => bail!("--device {name}: found no such device"),
    }
}

fn automatic() -> Result<Chosen> {
    let compiled: Vec<_> = backends().into_iter().filter_map(|b| Some((b.name, b.find?))).collect();
    for (name, find) in &compiled {
        if let Some(device) = find(false) {
            return Ok(on_gpu(device, name));
        }
    }
    let names: Vec<_> = compiled.iter().map(|(name, _)| *name).collect();
    let reason = match names.is_empty() {
        true => "no GPU back-end compiled in".to_string(),
        false => format!("no GPU found with {}", names.join(", ")),
    };
    match cpu() {
        Some(device) => Ok(on_cpu(device, &reason)),
        None => bail!("{reason}, and the CPU is not compiled in: build with --features flex"),
    }
}

fn on_cpu(device: Device, reason: &str) -> Chosen {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    Chosen { device, label: format!("CPU, {threads} threads ({reason})"), is_gpu: false }
}

fn on_gpu(device: Device, name: &str) -> Chosen {
    let facts = [name.to_string(), gpu::part(&device), tuning::describe(name)];
    let facts: Vec<_> = facts.into_iter().filter(|fact| !fact.is_empty()).collect();
    let label = facts.join(", ");
    Chosen { device, label, is_gpu: true }
}

#[cfg(feature = "flex")]
fn cpu() -> Option<Device> {
    Some(Device::flex())
}

#[cfg(not(feature = "flex"))]
fn cpu() -> Option<Device> {
    None
}

/// Make the CPU Burn's default device, unless `BURN_DEVICE` says otherwise.
///
/// Burn restores optimizer states on its default device before it moves them to the right one. The
/// CPU is always there; the first GPU back-end compiled in may not be.
///
/// # Safety
///
/// Writes to the environment: call it first in `main`, before there is a second thread.
pub unsafe fn pin_default_device() {
    if cfg!(feature = "flex") && std::env::var_os("BURN_DEVICE").is_none() {
        // SAFETY: the caller promises that no other thread reads the environment
        unsafe { std::env::set_var("BURN_DEVICE", "flex") };
    }
}

/// The device that unit tests compute on.
#[cfg(test)]
pub fn test_device() -> Device {
    cpu().unwrap_or_default()
}

mod gpu {
    use burn::tensor::Device;

    type Find = Option<fn(bool) -> Option<Device>>;

    #[cfg(feature = "cuda")]
    pub const CUDA: Find = Some(|_| {
        use burn::tensor::DeviceType;
        Device::enumerate(DeviceType::Cuda).into_vec().into_iter().next()
    });
    #[cfg(not(feature = "cuda"))]
    pub const CUDA: Find = None;

    #[cfg(feature = "metal")]
    pub const METAL: Find =
        Some(|software| adapter(burn::tensor::DeviceType::Metal, Device::metal, software));
    #[cfg(not(feature = "metal"))]
    pub const METAL: Find = None;

    #[cfg(feature = "vulkan")]
    pub const VULKAN: Find =
        Some(|software| adapter(burn::tensor::DeviceType::Vulkan, Device::vulkan, software));
    #[cfg(not(feature = "vulkan"))]
    pub const VULKAN: Find = None;

    #[cfg(feature = "wgpu")]
    pub const WGPU: Find =
        Some(|software| adapter(burn::tensor::DeviceType::Wgpu, Device::wgpu, software));
    #[cfg(not(feature = "wgpu"))]
    pub const WGPU: Find = None;

    /// The first adapter of the best kind. Listing them opens none.
    #[cfg(any(feature = "metal", feature = "vulkan", feature = "wgpu"))]
    fn adapter(
        api: burn::tensor::DeviceType,
        open: fn(burn::tensor::DeviceKind) -> Device,
        software: bool,
    ) -> Option<Device> {
        use burn::tensor::DeviceKind;
        let found = Device::enumerate(api);
        let hardware =
            [DeviceKind::DiscreteGpu(0), DeviceKind::IntegratedGpu(0), DeviceKind::VirtualGpu(0)];
        let last = software.then_some(DeviceKind::Cpu);
        hardware.into_iter().chain(last).map(open).find(|device| found.contains(device))
    }

    /// What the device calls itself. Opens it.
    #[cfg(any(feature = "cuda", feature = "metal", feature = "vulkan", feature = "wgpu"))]
    pub fn part(device: &Device) -> String {
        match device.identity() {
            Some(identity) if identity.physical.is_none() => {
                format!("{} (a software adapter, slow)", identity.name)
            }
            Some(identity) => identity.name,
            None => format!("{device:?}"),
        }
    }

    #[cfg(not(any(feature = "cuda", feature = "metal", feature = "vulkan", feature = "wgpu")))]
    pub fn part(device: &Device) -> String {
        format!("{device:?}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(feature = "flex")]
    fn the_cpu_is_there_when_asked_for() {
        let chosen = choose(DeviceChoice::Cpu).unwrap();
        assert!(!chosen.is_gpu);
        assert!(chosen.label.starts_with("CPU"), "{}", chosen.label);
    }

    #[test]
    fn wgpu_has_two_names() {
        for name in ["wgpu", "webgpu"] {
            assert_eq!(DeviceChoice::from_str(name, false), Ok(DeviceChoice::Wgpu));
        }
    }

    #[test]
    fn a_back_end_that_is_off_names_its_feature() {
        for backend in backends().iter().filter(|b| b.find.is_none()) {
            let error = match choose(backend.choice) {
                Ok(chosen) => panic!("got {}", chosen.label),
                Err(error) => error.to_string(),
            };
            assert!(error.contains(&format!("--features {}", backend.name)), "{error}");
        }
    }
}
