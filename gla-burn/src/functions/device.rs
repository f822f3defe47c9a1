//! What a device allows, checked in the call: under fusion the launch is queued, and its own check
//! would be seen only when something is read.

#[cfg(feature = "cubecl-backend")]
use burn::backend::DispatchDevice;
use burn::tensor::{DType, Device};
#[cfg(feature = "cubecl-backend")]
use cubecl::client::Client;
use gla_kernels::{Blueprint, DeviceLimits, GlaError};

use crate::GlaSpec;

/// The limits of a device that decide how the kernels run on it. `None` for a device that runs no
/// kernels: the CPU path has no limits.
#[cfg_attr(not(feature = "cubecl-backend"), allow(unused_variables))]
pub fn device_limits(device: &Device) -> Option<DeviceLimits> {
    #[cfg(feature = "cubecl-backend")]
    if let Some(client) = client(device) {
        return Some(DeviceLimits::of(&client));
    }
    None
}

/// Checks all that the launch of a call with q `[B, T, H, K]` and v `[B, T, Hk, V]` will check; returns
/// the blueprint of the forward if it runs chunked kernels.
#[cfg_attr(not(feature = "cubecl-backend"), allow(unused_variables))]
pub(super) fn check(
    device: &Device,
    spec: &GlaSpec,
    q: [usize; 4],
    v: [usize; 4],
    dtype: DType,
    gate_dtype: Option<DType>,
) -> Result<Option<Blueprint>, GlaError> {
    #[cfg(feature = "cubecl-backend")]
    if let Some(client) = client(device) {
        let problem = spec.problem(q, v, dtype, gate_dtype);
        if spec.recurrent {
            gla_kernels::check_recurrent(&client, &problem)?;
        }
        // the backward is chunked in every form
        let grads = device.is_autodiff();
        if !spec.recurrent || grads {
            let blueprint = gla_kernels::check_chunked(&client, &problem, spec.strategy, grads)?;
            return Ok((!spec.recurrent).then_some(blueprint));
        }
    }
    Ok(None)
}

/// Not kept: a device hands out its client as fast as it answers for a type.
#[cfg(feature = "cubecl-backend")]
fn client(device: &Device) -> Option<Client> {
    match device.clone().without_autodiff().as_dispatch() {
        DispatchDevice::Cube(device) => Some(device.client()),
        #[allow(unreachable_patterns)]
        _ => None,
    }
}
