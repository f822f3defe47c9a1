//! Whole sequences.

use burn::backend::Dispatch;
use burn::tensor::{DType, Tensor};
use gla_kernels::{Blueprint, GateKind, GlaError, Plan, Strategy};

use super::{check, device};
use crate::{GlaOps, GlaSpec, OptionalTensor};

/// The gate of [`gla`]: logarithms of the decay, finite and at most 0.
#[derive(Clone, Debug, Default)]
pub enum Gate {
    /// No decay: linear attention.
    #[default]
    None,
    /// `[H]`, one constant a head: RetNet, TransNormerLLM.
    Fixed(Tensor<1>),
    /// `[B, T, Hk]`, one value a step: Mamba-2's SSD, gated RetNet.
    Scalar(Tensor<3>),
    /// `[B, T, Hk, K]`, one value a step and key channel: GLA, HGRN2.
    Vector(Tensor<4>),
}

impl Gate {
    /// What the gate depends on.
    pub fn kind(&self) -> GateKind {
        match self {
            Gate::None => GateKind::None,
            Gate::Fixed(_) => GateKind::Fixed,
            Gate::Scalar(_) => GateKind::Scalar,
            Gate::Vector(_) => GateKind::Vector,
        }
    }

    fn dtype(&self) -> Option<DType> {
        match self {
            Gate::None => None,
            Gate::Fixed(gate) => Some(gate.dtype()),
            Gate::Scalar(gate) => Some(gate.dtype()),
            Gate::Vector(gate) => Some(gate.dtype()),
        }
    }
}

/// How the forward of [`gla`] is computed. All forms give the same numbers within rounding; the
/// backward is chunked in each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Form {
    /// Recurrent for sequences of up to 16 steps if neither chunk nor plan is given, else chunked.
    #[default]
    Auto,
    /// By chunks, in parallel: training and prefill.
    Chunk,
    /// Step by step.
    Recurrent,
}

/// Sequences up to this length run in recurrent form under [`Form::Auto`]: one sub-chunk.
const RECURRENT_UP_TO: usize = 16;

/// What [`gla`] may be told besides its tensors.
#[derive(Clone, Debug, Default)]
pub struct GlaOptions {
    /// Factor on the queries; `K^-0.5` if absent.
    pub scale: Option<f64>,
    /// `[N, H, K, V]` f32: the state before the first step; zero if absent.
    pub initial_state: Option<Tensor<4>>,
    /// Whether to return the final state, differentiable.
    pub final_state: bool,
    /// Bounds of packed sequences (`B = 1`): `N + 1` rising offsets from 0 to `T`. Equal neighbours
    /// make an empty sequence, whose state stays as it is.
    pub cu_seqlens: Option<Vec<usize>>,
    /// Chunk length of the kernels, 16, 32 or 64; chosen by problem and device if absent. The scan
    /// plan, which runs on tensor cores, has 64 only. The portable path on the CPU has its own.
    pub chunk: Option<usize>,
    /// Plan of the chunked kernels; chosen by problem and device if absent. Not to be given with
    /// `chunk`. The scan plan needs tensor cores that multiply the type of q, and up to 256 key
    /// channels. The portable path on the CPU has no plans, the recurrent form only in its backward.
    pub plan: Option<Plan>,
    /// How the forward is computed.
    pub form: Form,
}

impl GlaOptions {
    /// Sets the factor on the queries.
    pub fn with_scale(mut self, scale: f64) -> Self {
        self.scale = Some(scale);
        self
    }

    /// Sets the state before the first step, `[N, H, K, V]`.
    pub fn with_initial_state(mut self, state: Tensor<4>) -> Self {
        self.initial_state = Some(state);
        self
    }

    /// Asks for the final state.
    pub fn with_final_state(mut self) -> Self {
        self.final_state = true;
        self
    }

    /// Declares the rows to be packed sequences.
    pub fn with_cu_seqlens(mut self, cu_seqlens: Vec<usize>) -> Self {
        self.cu_seqlens = Some(cu_seqlens);
        self
    }

    /// Sets the chunk length of the kernels.
    pub fn with_chunk(mut self, chunk: usize) -> Self {
        self.chunk = Some(chunk);
        self
    }

    /// Sets the plan of the chunked kernels.
    pub fn with_plan(mut self, plan: Plan) -> Self {
        self.plan = Some(plan);
        self
    }

    /// Sets how the forward is computed.
    pub fn with_form(mut self, form: Form) -> Self {
        self.form = form;
        self
    }
}

/// What [`gla`] returns.
#[derive(Clone, Debug)]
pub struct GlaOutput {
    /// `[B, T, H, V]`, in the type of v.
    pub output: Tensor<4>,
    /// `[N, H, K, V]` f32, if asked for.
    pub final_state: Option<Tensor<4>>,
}

/// Gated linear attention.
///
/// Per sequence and head, with `S_0` the initial state or zero:
///
/// ```text
/// S_t = diag(exp g_t) S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t
/// ```
///
/// Differentiable in `q`, `k`, `v`, the gate and the initial state, through the output and, if it is
/// asked for, the final state. Gates must be at most 0: this is checked on the CPU back-end, where
/// it costs little; elsewhere a positive gate makes the state grow without bound.
///
/// # Shapes
///
/// - q: `[B, T, H, K]`
/// - k: `[B, T, Hk, K]`, `H` a multiple of `Hk`; query head `h` uses head `h / (H / Hk)`
/// - v: `[B, T, Hk, V]`
/// - gate: see [`Gate`], f32 or the type of q
/// - output: `[B, T, H, V]`
///
/// # Panics
///
/// If shapes, types, devices or `cu_seqlens` do not fit together, or if the device lacks what the
/// kernels need. The message names the argument, what it is and what it should be (the number of its
/// axes is for the compiler to check). Nothing has been queued then.
pub fn gla(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, gate: Gate, options: GlaOptions) -> GlaOutput {
    let (spec, _) =
        checked(&q, &k, &v, &gate, &options).unwrap_or_else(|error| panic!("gla: {error}"));
    let [batch, time, heads, key_dim] = q.dims();
    let value_dim = v.dims()[3];
    if batch * time == 0 {
        // nothing to compute, and back-ends differ in what they make of empty tensors
        let state = spec.state_shape([batch, time, heads, key_dim], value_dim);
        let device = q.device();
        let zeros = || Tensor::zeros(state, (&device, DType::F32));
        return GlaOutput {
            output: Tensor::zeros([batch, time, heads, value_dim], (&device, v.dtype())),
            final_state: options.final_state.then(|| options.initial_state.unwrap_or_else(zeros)),
        };
    }
    let gate = match gate {
        Gate::None => OptionalTensor::None,
        Gate::Fixed(gate) => OptionalTensor::Some(gate.into_dispatch()),
        Gate::Scalar(gate) => OptionalTensor::Some(gate.into_dispatch()),
        Gate::Vector(gate) => OptionalTensor::Some(gate.into_dispatch()),
    };
    let h0 = options.initial_state.map(Tensor::into_dispatch).into();
    let (output, final_state) = Dispatch::gla_forward(
        q.into_dispatch(),
        k.into_dispatch(),
        v.into_dispatch(),
        gate,
        h0,
        spec,
    );
    GlaOutput {
        output: Tensor::from_dispatch(output),
        final_state: options.final_state.then(|| Tensor::from_dispatch(final_state)),
    }
}

/// The blueprint that [`gla`] runs for these arguments: the plan, its tiles, and what multiplies them.
/// The backward runs the same. Nothing is launched.
///
/// `None` where the forward runs no chunked kernels: on the CPU, in recurrent form, without any
/// steps. The backward of the recurrent form runs what [`Form::Chunk`] is told here.
///
/// # Errors
///
/// Where [`gla`] panics, with the same message.
pub fn gla_blueprint(
    q: &Tensor<4>,
    k: &Tensor<4>,
    v: &Tensor<4>,
    gate: &Gate,
    options: &GlaOptions,
) -> Result<Option<Blueprint>, GlaError> {
    checked(q, k, v, gate, options).map(|(_, blueprint)| blueprint)
}

/// Makes all checks that come before a launch; returns what to launch, and with which blueprint.
fn checked(
    q: &Tensor<4>,
    k: &Tensor<4>,
    v: &Tensor<4>,
    gate: &Gate,
    options: &GlaOptions,
) -> Result<(GlaSpec, Option<Blueprint>), GlaError> {
    check::sequences(q, k, v, gate, options)?;
    let [batch, time, _, key_dim] = q.dims();
    let strategy = check::strategy(options)?;
    let spec = GlaSpec {
        gate: gate.kind(),
        scale: options.scale.unwrap_or((key_dim as f64).powf(-0.5)),
        cu_seqlens: options.cu_seqlens.as_deref().map(Into::into),
        strategy,
        recurrent: match options.form {
            // who names chunk or plan asks for the chunked form
            Form::Auto => time <= RECURRENT_UP_TO && strategy == Strategy::Inferred,
            Form::Chunk => false,
            Form::Recurrent => true,
        },
        state_gradient: options.final_state,
    };
    if batch * time == 0 {
        return Ok((spec, None));
    }
    let blueprint = device::check(&q.device(), &spec, q.dims(), v.dims(), q.dtype(), gate.dtype())?;
    Ok((spec, blueprint))
}
