//! Devices to test on, and cases of the catalogue as Burn tensors.

/// The ten lines of the README compile and run.
#[cfg(all(doctest, feature = "flex"))]
#[doc = include_str!("../../README.md")]
struct Readme;

use burn::module::{ModuleMapper, Param};
use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use gla_burn::{Gate, GlaOptions, gla};
use gla_kernels::eval::{self, ABS_FLOOR, Case, RefDType, RefGate, RefInputs};

/// A Burn device with the name it is required and reported by.
pub struct TestDevice {
    /// `flex`, `wgpu`, `vulkan` or `cuda`.
    pub name: &'static str,
    /// Without autodiff.
    pub device: Device,
}

impl TestDevice {
    /// Whether it computes in a type; says so if not.
    pub fn has(&self, dtype: DType) -> bool {
        let has = self.device.supports_dtype(dtype);
        if !has {
            println!("SKIPPED {} {dtype:?}: no such type", self.name);
        }
        has
    }

    /// Whether the device is a CPU that plays a GPU.
    pub fn is_software(&self) -> bool {
        #[cfg(any(feature = "wgpu", feature = "vulkan", feature = "cuda"))]
        if let Some(identity) = self.device.identity() {
            let name = identity.name.to_lowercase();
            return ["llvmpipe", "lavapipe", "swiftshader"].iter().any(|part| name.contains(part));
        }
        false
    }
}

/// A process that ends while its device still compiles or computes takes the driver's threads down under
/// it, and crashes there.
impl Drop for TestDevice {
    fn drop(&mut self) {
        // a panic here, while another unwinds, would abort the process and lose its message
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.device.sync()));
    }
}

/// Every device compiled in and present. One that is compiled in but absent is reported, and is a
/// failure if `GLA_REQUIRE` (comma-separated names) lists it; `GLA_DEVICES` narrows the choice.
///
/// # Panics
///
/// If a required device is absent.
pub fn devices() -> Vec<TestDevice> {
    opened(|_| true)
}

/// Those of [`devices`] that have bf16 or f16, with this as the type of new tensors: what models in half
/// precision are trained on. Only before a tensor is made in the process.
///
/// # Panics
///
/// As [`devices`].
pub fn half_devices() -> Vec<TestDevice> {
    let half = |device: &mut Device| {
        let types = [(DType::BF16, FloatDType::BF16), (DType::F16, FloatDType::F16)];
        let own = types.into_iter().find(|(dtype, _)| device.supports_dtype(*dtype));
        own.map(|(_, dtype)| device.configure(dtype).expect("no tensor was made before")).is_some()
    };
    opened(half)
}

/// The devices that `configure` takes.
fn opened(configure: fn(&mut Device) -> bool) -> Vec<TestDevice> {
    let listed = |var: &str, name: &str| {
        let list = std::env::var(var).ok()?;
        Some(list.split(',').any(|n| n == name))
    };
    let mut found = Vec::new();
    for (name, open) in candidates() {
        if listed("GLA_DEVICES", name) == Some(false) {
            continue;
        }
        // a back-end says that it has no device by panicking
        let opened = std::panic::catch_unwind(|| {
            let mut device = open();
            let has = configure(&mut device);
            // a device that is not there says so no earlier
            let one = Tensor::<1>::ones([1], &device).into_scalar::<f32>();
            assert_eq!(one, 1.0);
            has.then_some(device)
        });
        match opened {
            Ok(Some(device)) => found.push(TestDevice { name, device }),
            Ok(None) => println!("SKIPPED {name}: no type of half precision"),
            Err(_) if listed("GLA_REQUIRE", name) == Some(true) => {
                panic!("GLA_REQUIRE lists {name}, but there is no such device")
            }
            Err(_) => println!("SKIPPED {name}: no such device"),
        }
    }
    let required = std::env::var("GLA_REQUIRE").unwrap_or_default();
    for name in required.split(',').filter(|name| BURN_DEVICES.contains(name)) {
        let skipped = listed("GLA_DEVICES", name) == Some(false);
        let here = found.iter().any(|device| device.name == name);
        assert!(here || skipped, "GLA_REQUIRE lists {name}, which is not compiled in");
    }
    found
}

/// Names in `GLA_REQUIRE` that mean a Burn device; `wgsl` is one of the kernels' own tests.
const BURN_DEVICES: [&str; 4] = ["flex", "wgpu", "vulkan", "cuda"];

type Open = fn() -> Device;

fn candidates() -> Vec<(&'static str, Open)> {
    vec![
        #[cfg(feature = "flex")]
        ("flex", Device::flex as Open),
        #[cfg(feature = "wgpu")]
        ("wgpu", (|| Device::wgpu(burn::tensor::DeviceKind::DefaultDevice)) as Open),
        #[cfg(feature = "vulkan")]
        ("vulkan", (|| Device::vulkan(burn::tensor::DeviceKind::DefaultDevice)) as Open),
        #[cfg(feature = "cuda")]
        ("cuda", (|| Device::cuda(0)) as Open),
    ]
}

/// Gives all parameters a type.
pub struct Cast(pub DType);

impl ModuleMapper for Cast {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| tensor.cast(self.0))
    }
}

/// Root mean square of the difference, relative to that of `expected`.
pub fn relative_rms<const D: usize>(found: Tensor<D>, expected: Tensor<D>) -> f32 {
    let square = |x: Tensor<D>| x.square().mean().into_scalar::<f32>();
    let expected = expected.cast(DType::F32);
    let difference = found.cast(DType::F32) - expected.clone();
    (square(difference) / square(expected)).sqrt()
}

/// The tensors of a case on a device, tracked if the device differentiates.
pub struct CaseTensors {
    /// `[B, T, H, K]`
    pub q: Tensor<4>,
    /// `[B, T, Hk, K]`
    pub k: Tensor<4>,
    /// `[B, T, Hk, V]`
    pub v: Tensor<4>,
    /// The gate.
    pub gate: Gate,
    /// `[N, H, K, V]`
    pub h0: Option<Tensor<4>>,
    /// The numbers that the tensors hold.
    pub inputs: RefInputs,
    /// `[B, T, H, V]`
    pub d_o: Vec<f64>,
    /// `[N, H, K, V]`
    pub d_final: Option<Vec<f64>>,
    dtype: RefDType,
}

/// A tensor of f64 values in a type.
pub fn tensor<const D: usize>(
    values: &[f64],
    shape: [usize; D],
    dtype: DType,
    device: &Device,
) -> Tensor<D> {
    let data = TensorData::new(values.to_vec(), shape).convert_dtype(dtype);
    Tensor::from_data(data, (device, dtype))
}

/// The Burn name of a type.
pub fn burn_type(dtype: RefDType) -> DType {
    match dtype {
        RefDType::F32 => DType::F32,
        RefDType::F16 => DType::F16,
        RefDType::BF16 => DType::BF16,
    }
}

/// Reads a tensor back.
///
/// # Panics
///
/// If a launch that it depends on has failed.
pub fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    let data = tensor.into_data().convert_dtype(DType::F64);
    data.try_into_vec().expect("f64 after the conversion")
}

impl CaseTensors {
    /// Puts a case on a device, with the gate in f32.
    pub fn new(case: &Case, dtype: RefDType, device: &Device) -> Self {
        Self::with_gate_type(case, dtype, RefDType::F32, device)
    }

    /// Puts a case on a device, with the gate in a type of its own.
    pub fn with_gate_type(
        case: &Case,
        dtype: RefDType,
        gate_dtype: RefDType,
        device: &Device,
    ) -> Self {
        let mut inputs = case.inputs();
        inputs.round_to(dtype, gate_dtype);
        let (mut d_o, d_final) = case.grads_in();
        dtype.round_all(&mut d_o);
        let (burn_type, gate_type) = (burn_type(dtype), burn_type(gate_dtype));
        let (b, t, h, hk) = (case.batch, case.time, case.heads, case.kv_heads);
        let (key, value) = (case.key_dim, case.value_dim);
        let sequences = inputs.sequences().len();
        let gate = match &inputs.gate {
            RefGate::None => Gate::None,
            RefGate::Fixed(g) => Gate::Fixed(tensor(g, [h], gate_type, device)),
            RefGate::Scalar(g) => Gate::Scalar(tensor(g, [b, t, hk], gate_type, device)),
            RefGate::Vector(g) => Gate::Vector(tensor(g, [b, t, hk, key], gate_type, device)),
        };
        let h0 = inputs.initial_state.as_ref();
        let state = [sequences, h, key, value];
        let mut tensors = CaseTensors {
            q: tensor(&inputs.q, [b, t, h, key], burn_type, device),
            k: tensor(&inputs.k, [b, t, hk, key], burn_type, device),
            v: tensor(&inputs.v, [b, t, hk, value], burn_type, device),
            gate,
            h0: h0.map(|h0| tensor(h0, state, DType::F32, device)),
            inputs,
            d_o,
            d_final,
            dtype,
        };
        if device.is_autodiff() {
            tensors.q = tensors.q.require_grad();
            tensors.k = tensors.k.require_grad();
            tensors.v = tensors.v.require_grad();
            tensors.h0 = tensors.h0.map(Tensor::require_grad);
            tensors.gate = match tensors.gate {
                Gate::None => Gate::None,
                Gate::Fixed(g) => Gate::Fixed(g.require_grad()),
                Gate::Scalar(g) => Gate::Scalar(g.require_grad()),
                Gate::Vector(g) => Gate::Vector(g.require_grad()),
            };
        }
        tensors
    }

    /// Options of the case.
    pub fn options(&self) -> GlaOptions {
        GlaOptions {
            scale: Some(self.inputs.scale),
            initial_state: self.h0.clone(),
            final_state: true,
            cu_seqlens: self.inputs.cu_seqlens.clone(),
            ..Default::default()
        }
    }

    /// Runs the case through the public function and autodiff, and compares everything with the
    /// reference. Returns what does not agree.
    pub fn check(&self) -> Vec<String> {
        self.check_with(self.options())
    }

    /// As `check`, with other choices among the options of the case.
    pub fn check_with(&self, mut options: GlaOptions) -> Vec<String> {
        let (tol_o, tol_grad) = match self.dtype {
            RefDType::F32 => (1e-4, 1e-4),
            _ => (4e-3, 5e-3),
        };
        options.final_state = self.d_final.is_some();
        let out = gla(self.q.clone(), self.k.clone(), self.v.clone(), self.gate.clone(), options);
        let expected = eval::forward(&self.inputs);
        let mut errors = Vec::new();
        let mut compare = |name: &str, expected: &[f64], got: Vec<f64>, tolerance: f64| {
            errors.extend(eval::check(name, expected, &got, tolerance, ABS_FLOOR).err());
        };
        compare("o", &expected.o, values(out.output.clone()), tol_o);
        let device = self.q.device();
        let d_o = tensor(&self.d_o, out.output.dims(), self.q.dtype(), &device);
        let mut loss = (out.output * d_o).cast(DType::F32).sum();
        if let Some(state) = out.final_state {
            compare("final_state", &expected.final_state, values(state.clone()), tol_o);
            let d_final = self.d_final.as_ref().expect("asked for with its gradient");
            let d_final = tensor(d_final, state.dims(), DType::F32, &device);
            loss = loss + (state * d_final).sum();
        }
        let grads = loss.backward();
        let reference = eval::backward(&self.inputs, &self.d_o, self.d_final.as_deref());
        let grad = |x: &Tensor<4>| values(x.grad(&grads).expect("a tracked input has a gradient"));
        compare("dq", &reference.dq, grad(&self.q), tol_grad);
        compare("dk", &reference.dk, grad(&self.k), tol_grad);
        compare("dv", &reference.dv, grad(&self.v), tol_grad);
        if let Some(h0) = &self.h0 {
            compare("dh0", &reference.dh0, grad(h0), tol_grad);
        }
        let dgate = match &self.gate {
            Gate::None => None,
            Gate::Fixed(g) => g.grad(&grads).map(values),
            Gate::Scalar(g) => g.grad(&grads).map(values),
            Gate::Vector(g) => g.grad(&grads).map(values),
        };
        if let Some(expected) = &reference.dgate {
            compare("dgate", expected, dgate.expect("a tracked gate has a gradient"), tol_grad);
        }
        errors
    }
}
