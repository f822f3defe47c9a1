//! What benches of Burn's tensors share.

use std::time::Instant;

use anyhow::{Result, bail};
use burn::tensor::{Device, FloatDType};

use crate::median;

/// Calls between two waits for the device: in a model nothing waits, and short calls are over before the next
/// one is launched.
const CALLS: usize = 8;

/// Milliseconds of a call beside which a wait is nothing.
const LONG: f64 = 50.0;

/// The device of a name.
///
/// # Errors
///
/// If its back-end is not compiled in.
// without a back-end every name is refused
#[allow(unreachable_code)]
pub fn device(name: &str) -> Result<Device> {
    Ok(match name {
        #[cfg(feature = "cuda")]
        "cuda" => Device::cuda(0),
        #[cfg(feature = "wgpu")]
        "wgpu" => Device::wgpu(burn::tensor::DeviceKind::DefaultDevice),
        #[cfg(feature = "vulkan")]
        "vulkan" => Device::vulkan(burn::tensor::DeviceKind::DefaultDevice),
        #[cfg(feature = "flex")]
        "cpu" => Device::flex(),
        other => bail!("--device {other}: not compiled in"),
    })
}

/// The adapter's name, or that of the back-end where it has none.
#[allow(unused_variables)]
pub fn adapter(name: &str, device: &Device) -> String {
    #[cfg(any(feature = "cuda", feature = "vulkan", feature = "wgpu"))]
    if let Some(identity) = device.identity() {
        return identity.name;
    }
    name.into()
}

/// The type of a name.
///
/// # Errors
///
/// If it is none of f32, f16 and bf16.
pub fn float_dtype(name: &str) -> Result<FloatDType> {
    Ok(match name {
        "f32" => FloatDType::F32,
        "f16" => FloatDType::F16,
        "bf16" => FloatDType::BF16,
        other => bail!("--dtype {other}: expected f32, f16 or bf16"),
    })
}

/// Median milliseconds of a call, of so many rounds after two calls that are not timed.
///
/// # Errors
///
/// If the device fails.
pub fn timed(device: &Device, rounds: usize, mut call: impl FnMut()) -> Result<f64> {
    let mut round = |calls: usize| -> Result<f64> {
        let start = Instant::now();
        for _ in 0..calls {
            call();
        }
        device.sync()?;
        Ok(start.elapsed().as_secs_f64() * 1e3 / calls as f64)
    };
    round(1)?;
    let calls = if round(1)? < LONG { CALLS } else { 1 };
    Ok(median((0..rounds).map(|_| round(calls)).collect::<Result<_>>()?))
}
