//! What a call is checked for before anything is launched: the problem on the device, then the
//! buffers. The first needs no buffer, so that a caller whose launches are queued can ask early.

use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::{
    Blueprint, DeviceLimits, GlaError, MAX_BINDINGS, Problem, Strategy, check_addressable, scan,
    select, split,
};

/// Checks that [`forward`](fn@crate::forward), and [`backward`](fn@crate::backward) with `grads`, can run a
/// problem on a device; returns the blueprint that they would run.
///
/// # Errors
///
/// What [`Problem::validate`] and [the choice of a blueprint](fn@crate::select) return,
/// [`GlaError::UnsupportedDtype`] for a type of the inputs or the gate, [`GlaError::TooLarge`] and
/// [`GlaError::Allocation`] for outputs and scratch, and [`GlaError::Argument`] that names `device` where its
/// driver cannot run the kernels.
pub fn check_chunked(
    client: &Client,
    problem: &Problem,
    strategy: Strategy,
    grads: bool,
) -> Result<Blueprint, GlaError> {
    check_problem(client, problem)?;
    let limits = DeviceLimits::of(client);
    let blueprint = select(strategy, problem, &limits)?;
    let scratch = match blueprint {
        Blueprint::Scan(own) => scan::scratch(problem, own, &limits, grads),
        Blueprint::Split(own) => split::scratch(problem, own, &limits, grads),
    };
    for (what, elements, size) in scratch {
        check_allocation(client, what, elements, size)?;
    }
    Ok(blueprint)
}

/// Checks that [`recurrent`](fn@crate::recurrent) can run a problem on a device.
///
/// # Errors
///
/// What [`Problem::validate`] returns, [`GlaError::UnsupportedDtype`] for a type of the inputs or the gate,
/// [`GlaError::TooLarge`] and [`GlaError::Allocation`] for outputs, [`GlaError::Argument`] that names `device`
/// where its driver cannot run the kernels, and [`GlaError::Bindings`].
pub fn check_recurrent(client: &Client, problem: &Problem) -> Result<(), GlaError> {
    check_problem(client, problem)?;
    DeviceLimits::of(client).check_bindings(MAX_BINDINGS)
}

/// Checks the problem, the device, its types there, and the outputs of every form.
fn check_problem(client: &Client, problem: &Problem) -> Result<(), GlaError> {
    problem.validate()?;
    let adapter = &client.properties().identity.name;
    let has_matrices = !client.features().matmul.cmma.is_empty();
    if crashes_on_shared_memory(client.name(), adapter, has_matrices) {
        return Err(GlaError::Argument {
            name: "device",
            message: format!(
                "{adapter} of this Mesa cannot run CubeCL's SPIR-V kernels with shared memory; build with \
                 the feature `wgpu` (WGSL) instead of `vulkan`, or use Mesa 26"
            ),
        });
    }
    let dims = problem.dims;
    let mut types = vec![("q", problem.dtype)];
    if dims.gate.is_some() {
        types.push(("gate", problem.gate_dtype));
    }
    let half = ElemType::Float(FloatKind::F16);
    let brain = ElemType::Float(FloatKind::BF16);
    let known = [f32::elem_type_native(), half, brain];
    // an adapter opened for SPIR-V lists bf16, but WGSL has none
    let wgsl = client.name() == "wgpu<wgsl>";
    for (name, dtype) in types {
        let supported = known.contains(&dtype)
            && !(wgsl && dtype == brain)
            && client.properties().supports_type(dtype);
        if !supported {
            return Err(GlaError::UnsupportedDtype {
                name,
                dtype: dtype.to_string(),
                device: client.properties().identity.name.clone(),
            });
        }
    }
    let output = problem.rows() * dims.heads * dims.value_dim;
    check_allocation(client, "the output", output, problem.dtype.size())?;
    check_allocation(client, "the state", problem.state_len(), 4)
}

/// Checks that kernels can address a buffer and that the device allocates one of its size.
fn check_allocation(
    client: &Client,
    what: &'static str,
    elements: usize,
    size: usize,
) -> Result<(), GlaError> {
    check_addressable(what, elements)?;
    let (requested, available) =
        (elements as u64 * size as u64, client.properties().memory.max_page_size);
    if requested > available {
        return Err(GlaError::Allocation { what, requested, available });
    }
    Ok(())
}

/// Checks that gate and gate kind agree.
pub(crate) fn check_gate(problem: &Problem, has_gate: bool) -> Result<(), GlaError> {
    let kind = problem.dims.gate;
    if has_gate != kind.is_some() {
        let message = format!("gate kind is {kind:?}, but a gate tensor was given: {has_gate}");
        return Err(GlaError::Argument { name: "gate", message });
    }
    Ok(())
}

/// Bytes of the widest vector that kernels read and write.
const VECTOR: u64 = 16;

/// Checks that a device buffer holds at least `expected` bytes, and begins where vectors, and bindings, may.
pub(crate) fn buffer(
    client: &Client,
    name: &'static str,
    handle: &Handle,
    expected: usize,
) -> Result<(), GlaError> {
    let start = handle.offset_start.unwrap_or(0);
    // wgpu binds at an offset what others are given a pointer to
    let step = match client.name().starts_with("wgpu") {
        true => client.properties().memory.alignment.max(VECTOR),
        false => VECTOR,
    };
    if !start.is_multiple_of(step) {
        let message =
            format!("begins at byte {start} of its buffer, expected a multiple of {step}");
        return Err(GlaError::Argument { name, message });
    }
    let got = handle.size_in_used() as usize;
    if got < expected {
        return Err(GlaError::BufferSize { name, expected, got });
    }
    Ok(())
}

/// Checks the sizes of the inputs that every form has.
pub(crate) fn check_inputs(
    client: &Client,
    problem: &Problem,
    [q, k, v]: [&Handle; 3],
    gate: Option<&Handle>,
) -> Result<(), GlaError> {
    let (rows, dims, size) = (problem.rows(), problem.dims, problem.dtype.size());
    buffer(client, "q", q, rows * dims.heads * dims.key_dim * size)?;
    buffer(client, "k", k, rows * dims.kv_heads * dims.key_dim * size)?;
    buffer(client, "v", v, rows * dims.kv_heads * dims.value_dim * size)?;
    match gate {
        Some(gate) => buffer(client, "gate", gate, problem.gate_len() * problem.gate_dtype.size()),
        None => Ok(()),
    }
}

/// CubeCL 0.11 declares shared memory wrongly in SPIR-V where the driver lacks
/// `VK_KHR_workgroup_memory_explicit_layout`, and Mesa's software adapter crashes on it. CubeCL does not pass
/// on whether that is there; of Mesa's releases 22.3 and 25.0 have neither it nor cooperative matrices, 26.2 both.
fn crashes_on_shared_memory(runtime: &str, adapter: &str, has_matrices: bool) -> bool {
    runtime == "wgpu<spirv>" && adapter.to_lowercase().contains("llvmpipe") && !has_matrices
}

#[cfg(test)]
mod tests {
    use super::crashes_on_shared_memory;

    #[test]
    fn only_spirv_on_old_llvmpipe_is_refused() {
        let llvmpipe = "llvmpipe (LLVM 15.0.6, 256 bits)";
        assert!(crashes_on_shared_memory("wgpu<spirv>", llvmpipe, false));
        assert!(!crashes_on_shared_memory("wgpu<spirv>", llvmpipe, true));
        assert!(!crashes_on_shared_memory("wgpu<wgsl>", llvmpipe, false));
        assert!(!crashes_on_shared_memory("wgpu<spirv>", "NVIDIA H100 80GB HBM3", false));
    }
}
