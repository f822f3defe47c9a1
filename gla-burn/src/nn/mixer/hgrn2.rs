//! HGRN2: keys tied to the gate.

use burn::config::Config;
use burn::module::{Content, DisplaySettings, Module, ModuleDisplay};
use burn::nn::Linear;
use burn::tensor::activation::{sigmoid, silu};
use burn::tensor::{DType, Device, Tensor, assert_shape};

use super::{Mix, Operands, Pass, conv_shapes, convolve, mixer_methods, recur};
use crate::Gate;
use crate::nn::init::projection;
use crate::nn::norm::check_norm_eps;
use crate::nn::rows::{scale_rows, shift_rows};
use crate::nn::{
    LayerState, LayerStateShape, RmsNorm, RmsNormConfig, SequenceLayout, ShortConv,
    ShortConvConfig, log_sigmoid,
};

/// Configuration to create a [`Hgrn2`] layer using the [init function](Hgrn2Config::init).
#[derive(Config, Debug)]
pub struct Hgrn2Config {
    /// Width of the input and the output.
    pub hidden_size: usize,
    /// Number of heads; `hidden_size / expand_ratio` if `None`.
    pub num_heads: Option<usize>,
    /// Width of a query and of a key. Default: 128
    #[config(default = 128)]
    pub expand_ratio: usize,
    /// Whether a model bounds the decay of its layers from below. Default: true
    #[config(default = true)]
    pub use_lower_bound: bool,
    /// Whether queries, gates and inputs pass a [`ShortConv`], without its swish. Default: false
    #[config(default = false)]
    pub use_short_conv: bool,
    /// Kernel size of the short convolutions. Default: 4
    #[config(default = 4)]
    pub conv_size: usize,
    /// Epsilon of the output norm. Default: 1e-5
    #[config(default = 1e-5)]
    pub norm_eps: f64,
    /// Standard deviation of the initial weights. Default: 0.02
    #[config(default = 0.02)]
    pub initializer_range: f64,
}

impl Hgrn2Config {
    /// Initialize a new [`Hgrn2`] module.
    ///
    /// # Panics
    ///
    /// Panics if `hidden_size` is not a positive multiple of the number of heads, if a size is 0, or
    /// if `norm_eps` is not positive.
    pub fn init(&self, device: &Device) -> Hgrn2 {
        let (hidden, std) = (self.hidden_size, self.initializer_range);
        let [num_heads, forget_dim] = self.heads();
        let conv = |channels| {
            let config = ShortConvConfig::new(channels).with_kernel_size(self.conv_size);
            let config = config.with_swish(false).with_initializer_range(std);
            self.use_short_conv.then(|| config.init(device))
        };
        Hgrn2 {
            q_proj: projection(hidden, forget_dim, std, device),
            f_proj: projection(hidden, forget_dim, std, device),
            i_proj: projection(hidden, hidden, std, device),
            q_conv1d: conv(forget_dim),
            f_conv1d: conv(forget_dim),
            i_conv1d: conv(hidden),
            g_norm: RmsNormConfig::new(hidden).with_epsilon(self.norm_eps).init(device),
            o_proj: projection(hidden, hidden, std, device),
            num_heads,
        }
    }

    /// Number of parameters of the module, without making it. The lower bounds are the model's.
    ///
    /// # Panics
    ///
    /// As [`init`](Self::init).
    pub fn num_params(&self) -> usize {
        let (hidden, [_, forget_dim]) = (self.hidden_size, self.heads());
        let convs = usize::from(self.use_short_conv) * self.conv_size * (2 * forget_dim + hidden);
        2 * hidden * forget_dim + 2 * hidden * hidden + convs + hidden
    }

    /// Width of all gates.
    pub(in crate::nn) fn forget_dim(&self) -> usize {
        self.heads()[1]
    }

    /// Says what is wrong with the configuration, if anything is.
    ///
    /// # Errors
    ///
    /// What [`init`](Self::init) would panic with.
    pub fn check(&self) -> Result<(), String> {
        self.try_heads().map(drop)
    }

    fn heads(&self) -> [usize; 2] {
        self.try_heads().unwrap_or_else(|reason| panic!("Hgrn2Config: {reason}"))
    }

    /// Checks the configuration and derives the number of heads and the width of all gates.
    fn try_heads(&self) -> Result<[usize; 2], String> {
        let (hidden, ratio) = (self.hidden_size, self.expand_ratio);
        let heads = self.num_heads.unwrap_or(hidden / ratio.max(1));
        if ratio == 0 {
            Err("expand_ratio must be at least 1, got 0".into())
        } else if heads == 0 || hidden == 0 || !hidden.is_multiple_of(heads) {
            Err(format!(
                "hidden_size = {hidden} must be a positive multiple of num_heads = {heads}"
            ))
        } else if self.conv_size == 0 {
            Err("conv_size must be at least 1, got 0".into())
        } else {
            check_norm_eps(self.norm_eps)?;
            Ok([heads, heads * ratio])
        }
    }
}

/// HGRN2 (Qin et al., arXiv 2404.07904): gated linear attention whose keys are what the gate
/// forgets.
///
/// ```text
/// q, f, v = silu(x W_q), x W_f, x W_i     through short convolutions, before the swish
/// alpha   = b + (1 - b) sigmoid(f)        b the layer's lower bound, 0 without one
/// k       = 1 - alpha
/// S_t     = diag(alpha_t) S_{t-1} + k_t v_t^T
/// o_t     = expand_ratio^-0.5 S_t^T q_t
/// y       = RMSNorm(o) W_o                norm over all heads together
/// ```
///
/// A model holds the lower bounds of its layers: the running sums of a softmax over the layers, so
/// that later layers forget less. On its own a layer has none.
///
/// Should be created using [`Hgrn2Config`].
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct Hgrn2 {
    /// Queries, `hidden_size -> num_heads * expand_ratio`.
    pub q_proj: Linear,
    /// Gates, `hidden_size -> num_heads * expand_ratio`.
    pub f_proj: Linear,
    /// Values, `hidden_size -> hidden_size`.
    pub i_proj: Linear,
    /// Short convolution of the queries.
    pub q_conv1d: Option<ShortConv>,
    /// Short convolution of the gates.
    pub f_conv1d: Option<ShortConv>,
    /// Short convolution of the values.
    pub i_conv1d: Option<ShortConv>,
    /// Output norm.
    pub g_norm: RmsNorm,
    /// Output, `hidden_size -> hidden_size`.
    pub o_proj: Linear,
    /// Number of heads.
    pub num_heads: usize,
}

mixer_methods!(Hgrn2);

impl Mix for Hgrn2 {
    const NAME: &'static str = "Hgrn2";

    fn mix(&self, x: Tensor<3>, pass: &Pass, mut state: Option<&mut LayerState>) -> Tensor<3> {
        let [batch, tokens, _] = x.dims();
        let [hidden, _] = self.q_proj.weight.dims();
        assert_shape!(x, [_, _, hidden]);

        let qfi = [&self.q_proj, &self.f_proj, &self.i_proj].map(|proj| proj.forward(x.clone()));
        let convs = [&self.q_conv1d, &self.f_conv1d, &self.i_conv1d];
        let [q, f, v] = convolve(convs, qfi, pass.layout, state.as_deref_mut());
        let (log_gate, k) = gate(f, pass.lower_bound.clone());

        let heads = |x: Tensor<3>| {
            let [.., width] = x.dims();
            x.reshape([batch, tokens, self.num_heads, width / self.num_heads])
        };
        let operands = Operands {
            q: heads(silu(q)),
            k: heads(k.cast(v.dtype())),
            v: heads(v),
            gate: Gate::Vector(heads(log_gate)),
            scale: None,
        };
        let output = recur(operands, pass.layout, state).reshape([batch, tokens, hidden]);
        self.o_proj.forward(self.g_norm.forward(output))
    }

    fn state_shape(&self, batch: usize) -> LayerStateShape {
        let [hidden, forget_dim] = self.q_proj.weight.lazy_shape().dims();
        let width = |width: usize| width / self.num_heads;
        LayerStateShape {
            batch,
            recurrent: Some([self.num_heads, width(forget_dim), width(hidden)]),
            conv: conv_shapes([&self.q_conv1d, &self.f_conv1d, &self.i_conv1d]),
            ..LayerStateShape::default()
        }
    }

    fn dtype(&self) -> DType {
        self.q_proj.weight.val().dtype()
    }
}

/// `ln alpha` and `1 - alpha`, in f32; the latter without a difference of nearly equal numbers.
fn gate(f: Tensor<3>, lower_bound: Option<Tensor<1>>) -> (Tensor<3>, Tensor<3>) {
    let f = f.cast(DType::F32);
    let rest = sigmoid(-f.clone());
    let Some(bound) = lower_bound else {
        return (log_sigmoid(f), rest);
    };
    let bound = bound.cast(DType::F32);
    let free = -bound.clone() + 1.0;
    let alpha = shift_rows(scale_rows(sigmoid(f), free.clone()), bound);
    // rounding may have left it a little above 1
    (alpha.clamp_max(1.0).log(), scale_rows(rest, free))
}

impl ModuleDisplay for Hgrn2 {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new().with_new_line_after_attribute(false).optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        let [hidden_size, forget_dim] = self.q_proj.weight.lazy_shape().dims();
        content
            .add("hidden_size", &hidden_size)
            .add("num_heads", &self.num_heads)
            .add("expand_ratio", &(forget_dim / self.num_heads))
            .add("short_conv", &self.q_conv1d.is_some())
            .optional()
    }
}
