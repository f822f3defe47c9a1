//! Mamba: a state space model with a decay per channel and state.

// A_log and D are names in checkpoints; the derived code repeats them
#![allow(non_snake_case)]

use burn::config::Config;
use burn::module::{Content, DisplaySettings, Module, ModuleDisplay, Param};
use burn::nn::{Initializer, Linear, LinearConfig};
use burn::tensor::{DType, Device, FloatDType, Int, Tensor, assert_shape};

use super::ssm::{TimeSteps, pieces, softplus};
use super::{Mix, Operands, Pass, mixer_methods, recur};
use crate::Gate;
use crate::nn::init::projection;
use crate::nn::rows::{project_rows, scale_rows};
use crate::nn::swish::swish_gate;
use crate::nn::{LayerState, LayerStateShape, SequenceLayout, ShortConv, ShortConvConfig};

/// Configuration to create a [`Mamba`] layer using the [init function](MambaConfig::init).
#[derive(Config, Debug)]
pub struct MambaConfig {
    /// Width of the input and the output.
    pub hidden_size: usize,
    /// Width inside, relative to `hidden_size`. Default: 2
    #[config(default = 2)]
    pub expand: usize,
    /// Width of the state of a channel. Default: 16
    #[config(default = 16)]
    pub state_size: usize,
    /// Rank of the time steps' projection; `hidden_size / 16`, rounded up, if `None`.
    pub time_step_rank: Option<usize>,
    /// Kernel size of the short convolution. Default: 4
    #[config(default = 4)]
    pub conv_kernel: usize,
    /// Whether the short convolution has a bias. Default: true
    #[config(default = true)]
    pub use_conv_bias: bool,
    /// The initial time steps. Default: 0.001 to 0.1
    #[config(default = "TimeSteps::default()")]
    pub time_steps: TimeSteps,
    /// Standard deviation of the initial weights. Default: 0.02
    #[config(default = 0.02)]
    pub initializer_range: f64,
}

impl MambaConfig {
    /// Initialize a new [`Mamba`] module. Decay rates are 1, 2, .. over the states of a channel.
    ///
    /// # Panics
    ///
    /// Panics if a size is 0, or if the time steps do not rise from above 0.
    pub fn init(&self, device: &Device) -> Mamba {
        let (hidden, state, std) = (self.hidden_size, self.state_size, self.initializer_range);
        let [inner, rank] = self.widths();
        let rates = Tensor::<1, Int>::arange(1..state as i64 + 1, device).cast(FloatDType::F32);
        let spread = (rank as f64).powf(-0.5);
        let dt_proj = LinearConfig::new(rank, inner)
            .with_bias(false)
            .with_initializer(Initializer::Uniform { min: -spread, max: spread })
            .init(device);
        Mamba {
            in_proj: projection(hidden, 2 * inner, std, device),
            conv1d: self.conv(inner).init(device),
            x_proj: projection(inner, rank + 2 * state, std, device),
            dt_proj: Linear {
                bias: Some(Param::from_tensor(self.time_steps.draw_bias(inner, device))),
                ..dt_proj
            },
            A_log: Param::from_tensor(rates.log().unsqueeze::<2>().repeat_dim(0, inner)),
            D: Initializer::Ones.init([inner], device),
            out_proj: projection(inner, hidden, std, device),
        }
    }

    /// Number of parameters of the module, without making it.
    ///
    /// # Panics
    ///
    /// As [`init`](Self::init).
    pub fn num_params(&self) -> usize {
        let (hidden, state) = (self.hidden_size, self.state_size);
        let [inner, rank] = self.widths();
        let projections = 3 * hidden * inner + inner * (rank + 2 * state) + (rank + 1) * inner;
        projections + self.conv(inner).num_params() + inner * state + inner
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

    fn widths(&self) -> [usize; 2] {
        self.try_widths().unwrap_or_else(|reason| panic!("MambaConfig: {reason}"))
    }

    /// Checks the configuration and derives the width inside and the rank.
    fn try_widths(&self) -> Result<[usize; 2], String> {
        let inner = self.hidden_size * self.expand;
        let rank = self.time_step_rank.unwrap_or(self.hidden_size.div_ceil(16));
        let sizes = [
            ("hidden_size * expand", inner),
            ("time_step_rank", rank),
            ("state_size", self.state_size),
            ("conv_kernel", self.conv_kernel),
        ];
        if let Some((name, _)) = sizes.into_iter().find(|(_, size)| *size == 0) {
            return Err(format!("{name} must be at least 1, got 0"));
        }
        self.time_steps.check()?;
        Ok([inner, rank])
    }
}

/// Mamba (Gu and Dao, arXiv 2312.00752): a selective state space model whose decay depends on the
/// channel and on the state.
///
/// ```text
/// u, z    = x W_in                    u = silu(conv(u))
/// r, k, q = u W_x                     k is B and q is C, dt = softplus(r W_dt + b)
/// S_t     = exp(-exp(A_log) dt_t) * S_{t-1} + k_t (dt_t u_t)^T      per channel a vector
/// o_t     = S_t^T q_t + D u_t
/// y       = (o * silu(z)) W_out
/// ```
///
/// A baseline for comparisons of quality, not of speed: to the op each channel is a head with values
/// of width 1, with the same keys and queries for all, and these and the gates lie in memory as
/// `[B, T, channels, state_size]`. That is what a scan of its own avoids, and no shape for tensor
/// cores. As published, blocks of it have no feed-forward layer and there are twice as many.
///
/// Should be created using [`MambaConfig`].
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct Mamba {
    /// Channels and output gate, from `hidden_size`.
    pub in_proj: Linear,
    /// Short convolution of the channels.
    pub conv1d: ShortConv,
    /// Channels to time steps of low rank, B and C.
    pub x_proj: Linear,
    /// Time steps of low rank to channels, with a bias.
    pub dt_proj: Linear,
    /// Logarithm of the decay rates, `[channels, state_size]`.
    pub A_log: Param<Tensor<2>>,
    /// Factor of the input in the output, `[channels]`.
    pub D: Param<Tensor<1>>,
    /// Output, to `hidden_size`.
    pub out_proj: Linear,
}

mixer_methods!(Mamba);

impl Mix for Mamba {
    const NAME: &'static str = "Mamba";

    fn mix(&self, x: Tensor<3>, pass: &Pass, mut state: Option<&mut LayerState>) -> Tensor<3> {
        let [batch, tokens, _] = x.dims();
        let [hidden, _] = self.in_proj.weight.dims();
        assert_shape!(x, [_, _, hidden]);

        let [inner, state_size] = self.A_log.dims();
        let [rank, _] = self.dt_proj.weight.dims();
        let [u, z] = pieces(self.in_proj.forward(x), [inner, inner]);
        let cache = state.as_deref_mut().and_then(|state| state.conv[0].as_mut());
        let u = self.conv1d.forward_with(u, pass.layout, cache);
        let [dt, b, c] = pieces(self.x_proj.forward(u.clone()), [rank, state_size, state_size]);

        let dtype = u.dtype();
        let u = u.cast(DType::F32);
        let dt = softplus(project_rows(&self.dt_proj, dt));
        let rates = self.A_log.val().cast(DType::F32).exp().unsqueeze::<4>();
        let repeat =
            |x: Tensor<3>| x.unsqueeze_dim::<4>(2).expand([batch, tokens, inner, state_size]);
        let operands = Operands {
            q: repeat(c),
            k: repeat(b),
            v: (u.clone() * dt.clone()).cast(dtype).unsqueeze_dim(3),
            gate: Gate::Vector(-dt.unsqueeze_dim::<4>(3) * rates),
            scale: Some(1.0),
        };
        let output = recur(operands, pass.layout, state).squeeze_dim::<3>(3).cast(DType::F32);
        let skip = scale_rows(u, self.D.val().cast(DType::F32));
        self.out_proj.forward(swish_gate(output + skip, z, dtype))
    }

    fn state_shape(&self, batch: usize) -> LayerStateShape {
        let [inner, state_size] = self.A_log.lazy_shape().dims();
        let [channels, _, kernel_size] = self.conv1d.weight.lazy_shape().dims();
        LayerStateShape {
            batch,
            recurrent: Some([inner, state_size, 1]),
            conv: [Some([channels, kernel_size]), None, None],
            ..LayerStateShape::default()
        }
    }

    fn dtype(&self) -> DType {
        self.in_proj.weight.val().dtype()
    }
}

impl ModuleDisplay for Mamba {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new().with_new_line_after_attribute(false).optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        let [hidden_size, _] = self.in_proj.weight.lazy_shape().dims();
        let [channels, state_size] = self.A_log.lazy_shape().dims();
        content
            .add("hidden_size", &hidden_size)
            .add("channels", &channels)
            .add("state_size", &state_size)
            .optional()
    }
}
