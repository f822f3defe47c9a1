//! Checks of arguments against each other, before anything is launched.

use burn::tensor::{DType, Device, Tensor};
use gla_kernels::{CHUNKS, GlaError, Sequences, Strategy};

use super::{Gate, GlaOptions, StepGate};

/// The arguments of `gla`.
pub(super) fn sequences(
    q: &Tensor<4>,
    k: &Tensor<4>,
    v: &Tensor<4>,
    gate: &Gate,
    options: &GlaOptions,
) -> Result<(), GlaError> {
    let [batch, time, heads, key_dim] = q.dims();
    let [_, _, kv_heads, value_dim] = v.dims();
    groups(heads, kv_heads, key_dim, value_dim)?;
    type_of_q(q)?;
    shape("k", k, [batch, time, kv_heads, key_dim])?;
    shape("v", v, [batch, time, kv_heads, value_dim])?;
    same_type("k", k, q)?;
    same_type("v", v, q)?;
    match gate {
        Gate::None => {}
        Gate::Fixed(gate) => gate_of(gate, [heads], q)?,
        Gate::Scalar(gate) => gate_of(gate, [batch, time, kv_heads], q)?,
        Gate::Vector(gate) => gate_of(gate, [batch, time, kv_heads, key_dim], q)?,
    }
    let sequences = match &options.cu_seqlens {
        None => batch,
        Some(_) if batch != 1 => return Err(GlaError::CuSeqlensBatch { batch }),
        Some(cu) => {
            Sequences::Packed { cu_seqlens: cu.clone(), time }.validate()?;
            cu.len() - 1
        }
    };
    if let Some(state) = &options.initial_state {
        let shape = [sequences, heads, key_dim, value_dim];
        state_of("initial_state", state, shape, &[DType::F32], q)?;
    }
    Ok(())
}

/// Who chooses plan and tiles, from what the caller has chosen of them.
pub(super) fn strategy(options: &GlaOptions) -> Result<Strategy, GlaError> {
    match (options.plan, options.chunk) {
        (None, None) => Ok(Strategy::Inferred),
        (Some(plan), None) => Ok(Strategy::Plan(plan)),
        (None, Some(chunk)) if CHUNKS.contains(&chunk) => Ok(Strategy::Chunk(chunk)),
        (None, Some(got)) => Err(GlaError::Chunk { allowed: CHUNKS, got }),
        (Some(plan), Some(chunk)) => {
            let message = format!("must not be given with chunk, got {plan:?} and {chunk}");
            Err(GlaError::Argument { name: "plan", message })
        }
    }
}

/// The arguments of `gla_step`.
pub(super) fn step(
    q: &Tensor<3>,
    k: &Tensor<3>,
    v: &Tensor<3>,
    gate: &StepGate,
    state: &Tensor<4>,
) -> Result<(), GlaError> {
    let [batch, heads, key_dim] = q.dims();
    let [_, kv_heads, value_dim] = v.dims();
    groups(heads, kv_heads, key_dim, value_dim)?;
    type_of_q(q)?;
    shape("k", k, [batch, kv_heads, key_dim])?;
    shape("v", v, [batch, kv_heads, value_dim])?;
    same_type("k", k, q)?;
    same_type("v", v, q)?;
    match gate {
        StepGate::None => {}
        StepGate::Fixed(gate) => gate_of(gate, [heads], q)?,
        StepGate::Scalar(gate) => gate_of(gate, [batch, kv_heads], q)?,
        StepGate::Vector(gate) => gate_of(gate, [batch, kv_heads, key_dim], q)?,
    }
    // half of what a step of decoding reads and writes is the state
    let types = [DType::F32, q.dtype()];
    state_of("state", state, [batch, heads, key_dim, value_dim], &types, q)
}

fn groups(heads: usize, kv_heads: usize, key_dim: usize, value_dim: usize) -> Result<(), GlaError> {
    let sizes = [("q heads", heads), ("v heads", kv_heads), ("K", key_dim), ("V", value_dim)];
    if let Some((name, _)) = sizes.into_iter().find(|&(_, size)| size == 0) {
        return Err(GlaError::EmptyDimension { name });
    }
    if !heads.is_multiple_of(kv_heads) {
        return Err(GlaError::HeadGroups { heads, kv_heads });
    }
    Ok(())
}

/// f32, f16 or bf16 where the device has it; the portable path takes f64 too.
fn type_of_q<const D: usize>(q: &Tensor<D>) -> Result<(), GlaError> {
    let device = q.device().without_autodiff();
    if !(is_portable(&device) && q.dtype() == DType::F64) {
        dtype("q", q.dtype(), &[DType::F32, DType::F16, DType::BF16])?;
    }
    if !device.supports_dtype(q.dtype()) {
        return Err(GlaError::UnsupportedDtype {
            name: "q",
            dtype: format!("{:?}", q.dtype()),
            device: format!("{device:?}"),
        });
    }
    Ok(())
}

fn shape<const D: usize>(
    name: &'static str,
    tensor: &Tensor<D>,
    expected: [usize; D],
) -> Result<(), GlaError> {
    if tensor.dims() != expected {
        let (expected, got) = (expected.to_vec(), tensor.dims().to_vec());
        return Err(GlaError::Shape { name, expected, got });
    }
    Ok(())
}

fn same_type<const D: usize, const E: usize>(
    name: &'static str,
    tensor: &Tensor<D>,
    q: &Tensor<E>,
) -> Result<(), GlaError> {
    dtype(name, tensor.dtype(), &[q.dtype()])?;
    on_device_of(name, tensor, q)
}

fn gate_of<const D: usize, const E: usize>(
    gate: &Tensor<D>,
    expected: [usize; D],
    q: &Tensor<E>,
) -> Result<(), GlaError> {
    shape("gate", gate, expected)?;
    dtype("gate", gate.dtype(), &[DType::F32, q.dtype()])?;
    on_device_of("gate", gate, q)?;
    // on a CPU the numbers are at hand; on a GPU the check would wait for them
    if is_portable(&q.device().without_autodiff()) && gate.shape().num_elements() > 0 {
        let largest = gate.clone().without_autodiff().max().cast(DType::F64).into_scalar::<f64>();
        if largest > 0.0 {
            return Err(GlaError::PositiveGate { largest });
        }
    }
    Ok(())
}

/// Whether the device runs the portable path instead of kernels.
pub(crate) fn is_portable(device: &Device) -> bool {
    #[cfg(feature = "flex")]
    return *device == Device::flex();
    #[cfg(not(feature = "flex"))]
    {
        let _ = device;
        false
    }
}

fn state_of<const E: usize>(
    name: &'static str,
    state: &Tensor<4>,
    expected: [usize; 4],
    types: &[DType],
    q: &Tensor<E>,
) -> Result<(), GlaError> {
    shape(name, state, expected)?;
    dtype(name, state.dtype(), types)?;
    on_device_of(name, state, q)
}

fn dtype(name: &'static str, got: DType, allowed: &[DType]) -> Result<(), GlaError> {
    if !allowed.contains(&got) {
        let mut expected: Vec<String> = allowed.iter().map(|dtype| format!("{dtype:?}")).collect();
        expected.dedup();
        return Err(GlaError::Dtype {
            name,
            expected: expected.join(" or "),
            got: format!("{got:?}"),
        });
    }
    Ok(())
}

fn on_device_of<const D: usize, const E: usize>(
    name: &'static str,
    tensor: &Tensor<D>,
    q: &Tensor<E>,
) -> Result<(), GlaError> {
    if tensor.device() != q.device() {
        let message = format!("is on {:?}, q is on {:?}", tensor.device(), q.device());
        return Err(GlaError::Argument { name, message });
    }
    Ok(())
}
