//! Tensors on the device, and what it can do.

use anyhow::Result;
use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;
use gla_benches::median_ms;
use half::{bf16, f16};
use rayon::prelude::*;

// without a back-end every name is refused
#[allow(unreachable_code, unused_variables)]
pub fn client(name: &str) -> Result<Client> {
    let device: cubecl::Device = match name {
        #[cfg(feature = "cuda")]
        "cuda" => cubecl::Device::cuda(0)?,
        #[cfg(feature = "vulkan")]
        "vulkan" => cubecl::Device::wgpu(Default::default())?,
        #[cfg(all(feature = "wgpu", not(feature = "vulkan")))]
        "wgpu" => cubecl::Device::wgpu(Default::default())?,
        other => anyhow::bail!("--device {other}: not compiled in"),
    };
    Ok(device.client())
}

pub fn upload(client: &Client, values: &[f32], dtype: ElemType) -> Handle {
    if dtype == bf16::elem_type_native() {
        let x: Vec<bf16> = values.par_iter().map(|&x| bf16::from_f32(x)).collect();
        client.create_from_slice(bf16::as_bytes(&x))
    } else if dtype == f16::elem_type_native() {
        let x: Vec<f16> = values.par_iter().map(|&x| f16::from_f32(x)).collect();
        client.create_from_slice(f16::as_bytes(&x))
    } else {
        client.create_from_slice(f32::as_bytes(values))
    }
}

/// A tensor that holds no number: what is not written shows.
pub fn poisoned(client: &Client, len: usize, dtype: ElemType) -> Handle {
    upload(client, &vec![f32::NAN; len], dtype)
}

pub fn read(client: &Client, handle: &Handle, dtype: ElemType) -> Result<Vec<f32>> {
    let read = client.read_one(handle.clone());
    let bytes = read.map_err(|e| anyhow::anyhow!("launch failed: {e:?}"))?;
    Ok(if dtype == bf16::elem_type_native() {
        bf16::from_bytes(&bytes).par_iter().map(|x| x.to_f32()).collect()
    } else if dtype == f16::elem_type_native() {
        f16::from_bytes(&bytes).par_iter().map(|x| x.to_f32()).collect()
    } else {
        f32::from_bytes(&bytes).to_vec()
    })
}

/// Deterministic noise in -1..1 that looks like nothing in particular.
pub fn noise(len: usize, seed: u32) -> Vec<f32> {
    let mut values = vec![0.0; len];
    values.par_chunks_mut(1 << 16).enumerate().for_each(|(n, piece)| {
        let mut x = (16 * n as u32 + seed).wrapping_mul(2654435761).max(1);
        for value in piece {
            x ^= x << 13;
            x ^= x >> 17;
            x ^= x << 5;
            *value = x as f32 / u32::MAX as f32 * 2.0 - 1.0;
        }
    });
    values
}

// of the copy; with one load in flight a unit measures latency
const CUBES: usize = 1 << 12;
const UNITS: usize = 256;
const LOADS: usize = 4;

/// The length is a multiple of what all units copy in one go.
#[cube(launch_unchecked)]
fn copy_kernel(x: &[Vector<f32, Const<4>>], out: &mut [Vector<f32, Const<4>>]) {
    let stride = CUBE_COUNT * CUBE_DIM as usize;
    for at in range_stepped(ABSOLUTE_POS, x.len(), LOADS * stride) {
        let a = x[at];
        let b = x[at + stride];
        let c = x[at + 2 * stride];
        let d = x[at + 3 * stride];
        out[at] = a;
        out[at + stride] = b;
        out[at + 2 * stride] = c;
        out[at + 3 * stride] = d;
    }
}

/// GB/s of a copy of buffers that no cache holds, of 1 GiB where the device has room.
pub fn copy_gbps(client: &Client) -> Result<f64> {
    let most = (1usize << 30).min(client.properties().memory.max_page_size as usize);
    let turn = 16 * LOADS * UNITS * CUBES;
    let bytes = most / turn * turn;
    anyhow::ensure!(bytes > 0, "buffers of {most} bytes are too small to time a copy");
    let (x, out) = (client.empty(bytes), client.empty(bytes));
    let call = || {
        // SAFETY: the kernel stays inside its buffers, which have this length, a multiple of `turn`.
        unsafe {
            copy_kernel::launch_unchecked(
                client,
                CubeCount::Static(CUBES as u32, 1, 1),
                CubeDim::new_1d(UNITS as u32),
                BufferArg::from_raw_parts(x.clone(), bytes / 16),
                BufferArg::from_raw_parts(out.clone(), bytes / 16),
            );
        }
    };
    call();
    // a launch that failed shows here
    read(client, &out.clone().offset_end((bytes - 16) as u64), f32::elem_type_native())?;
    Ok(2.0 * bytes as f64 / median_ms(client, call) / 1e6)
}
