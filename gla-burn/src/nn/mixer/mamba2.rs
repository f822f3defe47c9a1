//! Mamba-2: a state space model with a scalar decay per head.

// A_log and D are names in checkpoints; the derived code repeats them
#![allow(non_snake_case)]

use burn::config::Config;
use burn::module::{Content, DisplaySettings, Module, ModuleDisplay, Param};
use burn::nn::{Initializer, Linear};
use burn::tensor::{DType, Device, Tensor, assert_shape};

use super::ssm::{TimeSteps, pieces, softplus, uniform};
use super::{Mix, Operands, Pass, mixer_methods, recur};
use crate::Gate;
use crate::nn::init::{projection, projection_with_bias};
use crate::nn::norm::check_norm_eps;
use crate::nn::rows::{project_rows, scale_rows, shift_rows};
use crate::nn::swish::swish_gate;
use crate::nn::{
    LayerState, LayerStateShape, RmsNorm, RmsNormConfig, SequenceLayout, ShortConv, ShortConvConfig,
};

/// Configuration to create a [`Mamba2`] layer using the [init function](Mamba2Config::init).
#[derive(Config, Debug)]
pub struct Mamba2Config {
    /// Width of the input and the output.
    pub hidden_size: usize,
    /// Width inside, relative to `hidden_size`. Default: 2
    #[config(default = 2)]
    pub expand: usize,
    /// Width of a head. Default: 64
    #[config(default = 64)]
    pub head_dim: usize,
    /// Width of the state of a channel. Default: 128
    #[config(default = 128)]
    pub state_size: usize,
    /// How many groups of heads have their own B and C. Default: 1
    #[config(default = 1)]
    pub n_groups: usize,
    /// Kernel size of the short convolution. Default: 4
    #[config(default = 4)]
    pub conv_kernel: usize,
    /// Whether the short convolution has a bias. Default: true
    #[config(default = true)]
    pub use_conv_bias: bool,
    /// Whether the projections have a bias. Default: false
    #[config(default = false)]
    pub use_bias: bool,
    /// The initial time steps. Default: 0.001 to 0.1
    #[config(default = "TimeSteps::default()")]
    pub time_steps: TimeSteps,
    /// Epsilon of the output norm. Default: 1e-5
    #[config(default = 1e-5)]
    pub norm_eps: f64,
    /// Standard deviation of the initial weights. Default: 0.02
    #[config(default = 0.02)]
    pub initializer_range: f64,
}

impl Mamba2Config {
    /// Initialize a new [`Mamba2`] module. Decay rates are drawn from 1 to 16.
    ///
    /// # Panics
    ///
    /// Panics if `hidden_size * expand` is not a positive multiple of `head_dim`, if the number of
    /// heads is not a multiple of `n_groups`, if a size is 0, if `norm_eps` is not positive, or if
    /// the time steps do not rise from above 0.
    pub fn init(&self, device: &Device) -> Mamba2 {
        let (hidden, std) = (self.hidden_size, self.initializer_range);
        let [inner, heads, conv_dim] = self.widths();
        let linear = |d_input, d_output| match self.use_bias {
            true => projection_with_bias(d_input, d_output, std, device),
            false => projection(d_input, d_output, std, device),
        };
        Mamba2 {
            in_proj: linear(hidden, inner + conv_dim + heads),
            conv1d: self.conv(conv_dim).init(device),
            dt_bias: Param::from_tensor(self.time_steps.draw_bias(heads, device)),
            A_log: Param::from_tensor(uniform(heads, [1.0, 16.0], device).log()),
            D: Initializer::Ones.init([heads], device),
            norm: RmsNormConfig::new(inner).with_epsilon(self.norm_eps).init(device),
            out_proj: linear(inner, hidden),
            head_dim: self.head_dim,
            state_size: self.state_size,
            n_groups: self.n_groups,
        }
    }

    /// Number of parameters of the module, without making it.
    ///
    /// # Panics
    ///
    /// As [`init`](Self::init).
    pub fn num_params(&self) -> usize {
        let [inner, heads, conv_dim] = self.widths();
        let (hidden, projected) = (self.hidden_size, inner + conv_dim + heads);
        let bias = usize::from(self.use_bias) * (projected + hidden);
        let conv = self.conv(conv_dim).num_params();
        hidden * projected + conv + 3 * heads + inner + inner * hidden + bias
    }

    fn conv(&self, channels: usize) -> ShortConvConfig {
        ShortConvConfig::new(channels)
            .with_kernel_size(self.conv_kernel)
            .with_bias(self.use_conv_bias)
            .with_initializer_range(self.initializer_range)
    }

    /// Says what is wrong with the configuration, if anything is.
    ///
    /// # Errors
    ///
    /// What [`init`](Self::init) would panic with.
    pub fn check(&self) -> Result<(), String> {
        self.try_widths().map(drop)
    }

    fn widths(&self) -> [usize; 3] {
        self.try_widths().unwrap_or_else(|reason| panic!("Mamba2Config: {reason}"))
    }

    /// Checks the configuration and derives the width inside, the number of heads, and the width of
    /// what is convolved.
    fn try_widths(&self) -> Result<[usize; 3], String> {
        let inner = self.hidden_size * self.expand;
        let (dim, groups, state) = (self.head_dim, self.n_groups, self.state_size);
        if inner == 0 || dim == 0 || !inner.is_multiple_of(dim) {
            return Err(format!(
                "hidden_size * expand = {inner} must be a positive multiple of head_dim = {dim}"
            ));
        }
        let heads = inner / dim;
        if groups == 0 || !heads.is_multiple_of(groups) {
            Err(format!("the number of heads, {heads}, must be a multiple of n_groups = {groups}"))
        } else if state == 0 {
            Err("state_size must be at least 1, got 0".into())
        } else if self.conv_kernel == 0 {
            Err("conv_kernel must be at least 1, got 0".into())
        } else {
            check_norm_eps(self.norm_eps)?;
            self.time_steps.check()?;
            Ok([inner, heads, inner + 2 * groups * state])
        }
    }
}

/// Mamba-2 (Dao and Gu, arXiv 2405.21060): a selective state space model whose decay is a scalar per
/// head, which makes it gated linear attention with scalar gates.
///
/// ```text
/// z, u, dt = x W_in                                    dt = softplus(dt + dt_bias)
/// v, k, q  = silu(conv(u))                             k is B and q is C of a group of heads
/// S_t      = exp(-exp(A_log) dt_t) S_{t-1} + k_t (dt_t v_t)^T
/// o_t      = S_t^T q_t + D v_t
/// y        = RMSNorm(o * silu(z)) W_out                norm over all heads together
/// ```
///
/// B and C of a group are repeated for its heads: the op shares keys and values alike or not at all.
/// In this crate's models it takes the place of attention in a block; as published, blocks of it
/// have no feed-forward layer and there are twice as many.
///
/// Should be created using [`Mamba2Config`].
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct Mamba2 {
    /// Output gate, what is convolved, and time steps, from `hidden_size`.
    pub in_proj: Linear,
    /// Short convolution of values, B and C.
    pub conv1d: ShortConv,
    /// Bias of the time steps, `[heads]`.
    pub dt_bias: Param<Tensor<1>>,
    /// Logarithm of the decay rates, `[heads]`.
    pub A_log: Param<Tensor<1>>,
    /// Factor of the values in the output, `[heads]`.
    pub D: Param<Tensor<1>>,
    /// Output norm.
    pub norm: RmsNorm,
    /// Output, to `hidden_size`.
    pub out_proj: Linear,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of the state of a channel.
    pub state_size: usize,
    /// How many groups of heads have their own B and C.
    pub n_groups: usize,
}

mixer_methods!(Mamba2);

impl Mix for Mamba2 {
    const NAME: &'static str = "Mamba2";

    fn mix(&self, x: Tensor<3>, pass: &Pass, mut state: Option<&mut LayerState>) -> Tensor<3> {
        let [batch, tokens, _] = x.dims();
        let [hidden, _] = self.in_proj.weight.dims();
        assert_shape!(x, [_, _, hidden]);

        let [heads] = self.dt_bias.dims();
        let (inner, groups) = (heads * self.head_dim, self.n_groups);
        let shared = groups * self.state_size;
        let [z, u, dt] = pieces(project_rows(&self.in_proj, x), [inner, inner + 2 * shared, heads]);
        let cache = state.as_deref_mut().and_then(|state| state.conv[0].as_mut());
        let u = self.conv1d.forward_with(u, pass.layout, cache);
        let [v, b, c] = pieces(u, [inner, shared, shared]);

        let dtype = v.dtype();
        let of_head = |param: &Param<Tensor<1>>| param.val().cast(DType::F32);
        let dt = softplus(shift_rows(dt.cast(DType::F32), of_head(&self.dt_bias)));
        let v = v.cast(DType::F32).reshape([batch, tokens, heads, self.head_dim]);
        let repeat = |x: Tensor<3>| {
            let x = x.reshape([batch, tokens, groups, 1, self.state_size]);
            let x = x.expand([batch, tokens, groups, heads / groups, self.state_size]);
            x.reshape([batch, tokens, heads, self.state_size])
        };
        let operands = Operands {
            q: repeat(c),
            k: repeat(b),
            v: (v.clone() * dt.clone().unsqueeze_dim(3)).cast(dtype),
            gate: Gate::Scalar(scale_rows(dt, -of_head(&self.A_log).exp())),
            scale: Some(1.0),
        };
        let output = recur(operands, pass.layout, state).cast(DType::F32);
        let skip = of_head(&self.D).unsqueeze_dim::<2>(1).expand([heads, self.head_dim]);
        let skip = scale_rows(v.reshape([batch, tokens, inner]), skip.reshape([inner]));
        let output = output.reshape([batch, tokens, inner]) + skip;
        let gated = swish_gate(output, z, DType::F32);
        project_rows(&self.out_proj, self.norm.forward(gated).cast(dtype))
    }

    fn state_shape(&self, batch: usize) -> LayerStateShape {
        let [heads] = self.dt_bias.lazy_shape().dims();
        let [channels, _, kernel_size] = self.conv1d.weight.lazy_shape().dims();
        LayerStateShape {
            batch,
            recurrent: Some([heads, self.state_size, self.head_dim]),
            conv: [Some([channels, kernel_size]), None, None],
            ..LayerStateShape::default()
        }
    }

    fn dtype(&self) -> DType {
        self.in_proj.weight.val().dtype()
    }
}

impl ModuleDisplay for Mamba2 {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new().with_new_line_after_attribute(false).optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        let [hidden_size, _] = self.in_proj.weight.lazy_shape().dims();
        let [num_heads] = self.dt_bias.lazy_shape().dims();
        content
            .add("hidden_size", &hidden_size)
            .add("num_heads", &num_heads)
            .add("head_dim", &self.head_dim)
            .add("state_size", &self.state_size)
            .add("n_groups", &self.n_groups)
            .optional()
    }
}
