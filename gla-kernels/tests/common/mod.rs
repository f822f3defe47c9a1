//! Devices to test on, and how a case of the catalogue runs on one.
#![allow(dead_code)]

mod run;

pub use run::*;

use cubecl::client::Client;
#[cfg(any(feature = "wgpu", feature = "vulkan"))]
use cubecl_runtime::runtime::Runtime;
use gla_kernels::eval::RefDType;

/// A device with the name it is required and reported by.
pub struct TestDevice {
    pub name: &'static str,
    pub client: Client,
}

impl TestDevice {
    /// Whether the device is a CPU that plays a GPU.
    pub fn is_software(&self) -> bool {
        let name = self.client.properties().identity.name.to_lowercase();
        ["llvmpipe", "lavapipe", "swiftshader"].iter().any(|software| name.contains(software))
    }

    /// Whether the device holds the type. An adapter opened for SPIR-V lists bf16; opened with the
    /// WGSL compiler, as here, it cannot be told apart by name.
    pub fn supports(&self, dtype: RefDType) -> bool {
        let wgsl_bf16 = self.name == "wgsl" && dtype == RefDType::BF16;
        !wgsl_bf16 && self.client.properties().supports_type(elem_type(dtype))
    }
}

/// Every device compiled in and present. One that is compiled in but absent is reported, and is a
/// failure if `GLA_REQUIRE` (comma-separated names) lists it.
pub fn devices() -> Vec<TestDevice> {
    let required = std::env::var("GLA_REQUIRE").unwrap_or_default();
    let wanted = std::env::var("GLA_DEVICES").ok();
    let mut found = Vec::new();
    for (name, open) in candidates() {
        if wanted.as_ref().is_some_and(|list| !list.split(',').any(|n| n == name)) {
            continue;
        }
        match open() {
            Ok(client) => found.push(TestDevice { name, client }),
            Err(why) if required.split(',').any(|n| n == name) => {
                panic!("GLA_REQUIRE lists {name}, but: {why}")
            }
            Err(why) => println!("SKIPPED {name}: {why}"),
        }
    }
    for name in required.split(',').filter(|n| ["vulkan", "wgsl", "cuda"].contains(n)) {
        let compiled = candidates().iter().any(|(n, _)| *n == name);
        assert!(compiled, "GLA_REQUIRE lists {name}, which is not compiled in");
    }
    if found.is_empty() {
        println!("SKIPPED kernels: no device; build with the feature wgpu, vulkan or cuda");
    }
    found
}

type Open = fn() -> Result<Client, String>;

#[allow(unused_mut)]
fn candidates() -> Vec<(&'static str, Open)> {
    let mut all: Vec<(&'static str, Open)> = Vec::new();
    #[cfg(feature = "cuda")]
    all.push(("cuda", || {
        let device = cubecl::Device::cuda(0).map_err(|e| e.to_string())?;
        Ok(device.client())
    }));
    #[cfg(feature = "vulkan")]
    all.push(("vulkan", || {
        use cubecl::wgpu::{AutoCompiler, WgpuRuntime};
        wgpu_client::<WgpuRuntime<AutoCompiler>>()
    }));
    // the same adapter through WGSL, what the browser and DirectX get
    #[cfg(any(feature = "wgpu", feature = "vulkan"))]
    all.push(("wgsl", || {
        use cubecl::wgpu::{WgpuRuntime, WgslCompiler};
        wgpu_client::<WgpuRuntime<WgslCompiler>>()
    }));
    all
}

#[cfg(any(feature = "wgpu", feature = "vulkan"))]
fn wgpu_client<R: Runtime<Device = cubecl::wgpu::WgpuDevice>>() -> Result<Client, String> {
    let open = || R::client(&cubecl::wgpu::WgpuDevice::default());
    std::panic::catch_unwind(open).map_err(|_| "no adapter".to_string())
}
