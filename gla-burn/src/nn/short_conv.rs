use burn::config::Config;
use burn::module::{Content, DisplaySettings, Module, ModuleDisplay, Param};
use burn::nn::Initializer;
use burn::tensor::activation::silu;
use burn::tensor::{DType, Device, Tensor, assert_shape};

use super::SequenceLayout;
use super::init::normal;
use super::layout::Packed;
use super::rows::{scale_rows_in_place, shift_rows};
use super::state::newest;

/// Configuration to create a [`ShortConv`] layer using the [init function](ShortConvConfig::init).
#[derive(Config, Debug)]
pub struct ShortConvConfig {
    /// The number of channels.
    pub channels: usize,
    /// The number of inputs each output sees, its own included. Default: 4
    #[config(default = 4)]
    pub kernel_size: usize,
    /// Whether there is a bias. Default: false
    #[config(default = false)]
    pub bias: bool,
    /// Whether a swish follows. Default: true
    #[config(default = true)]
    pub swish: bool,
    /// Standard deviation of the initial weight. Default: 0.02
    #[config(default = 0.02)]
    pub initializer_range: f64,
}

impl ShortConvConfig {
    /// Initialize a new [`ShortConv`] module.
    ///
    /// # Panics
    ///
    /// Panics if `kernel_size` is 0.
    pub fn init(&self, device: &Device) -> ShortConv {
        assert!(
            self.kernel_size >= 1,
            "ShortConvConfig: kernel_size must be at least 1, got {}",
            self.kernel_size
        );

        ShortConv {
            weight: normal(self.initializer_range)
                .init([self.channels, 1, self.kernel_size], device),
            bias: self.bias.then(|| Initializer::Zeros.init([self.channels], device)),
            swish: self.swish,
        }
    }

    /// Number of parameters of the module, without making it.
    pub fn num_params(&self) -> usize {
        self.channels * (self.kernel_size + usize::from(self.bias))
    }
}

/// Causal depthwise convolution along time, followed by a swish, computed in f32.
///
/// `Y[t, d] = silu(bias[d] + sum_j weight[d, j] * X[t - W + 1 + j, d])`, with zeros before the first
/// token. Bias and swish are as the configuration says.
///
/// `W` shifted multiply-adds on the `[B, T, D]` layout: for `W = 4` and one channel per group this
/// needs neither the transposes nor the patch matrix of a general convolution.
///
/// Should be created using [`ShortConvConfig`].
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct ShortConv {
    /// Filter taps, oldest input first, `[channels, 1, kernel_size]`.
    pub weight: Param<Tensor<3>>,
    /// `[channels]`
    pub bias: Option<Param<Tensor<1>>>,
    /// Whether a swish follows.
    pub swish: bool,
}

impl ShortConv {
    /// Convolves whole sequences.
    ///
    /// # Shapes
    ///
    /// - x: `[B, T, channels]`, `T >= 1`
    /// - output: `[B, T, channels]`
    ///
    /// # Panics
    ///
    /// Panics if the last axis of `x` is not `channels`.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [channels, _, kernel_size] = self.weight.dims();
        assert_shape!(x, [.., channels]);

        self.convolve(before(x, kernel_size - 1), None)
    }

    /// Convolves the next tokens of sequences whose last inputs are in `cache`, and updates it.
    ///
    /// The cache leaves without autodiff.
    ///
    /// # Shapes
    ///
    /// - x: `[B, T, channels]`, `T >= 1`
    /// - cache: `[B, channels, kernel_size]`, oldest input first
    /// - output: `[B, T, channels]`
    ///
    /// # Panics
    ///
    /// Panics if the last axis of `x` is not `channels`.
    pub fn forward_cached(&self, x: Tensor<3>, cache: &mut Tensor<3>) -> Tensor<3> {
        let [channels, _, kernel_size] = self.weight.dims();
        assert_shape!(x, [.., channels]);

        let inputs = match kernel_size - 1 {
            0 => x,
            past => {
                // the oldest cached input is out of reach of the next token
                let cached = cache.clone().narrow(2, 1, past).swap_dims(1, 2);
                Tensor::cat(vec![cached, x], 1)
            }
        };
        let last = newest(inputs.clone().without_autodiff(), kernel_size);
        *cache = last.swap_dims(1, 2);
        self.convolve(inputs, None)
    }

    /// [`forward`](Self::forward), or [`forward_cached`](Self::forward_cached) if there is a cache,
    /// of sequences that lie as `layout` says, which has no padding.
    pub(super) fn forward_with(
        &self,
        x: Tensor<3>,
        layout: &SequenceLayout,
        cache: Option<&mut Tensor<3>>,
    ) -> Tensor<3> {
        match (layout.as_packed(), cache) {
            (None, None) => self.forward(x),
            (None, Some(cache)) => self.forward_cached(x, cache),
            (Some(packed), None) => {
                let [channels, _, kernel_size] = self.weight.dims();
                assert_shape!(x, [.., channels]);
                self.convolve(before(x, kernel_size - 1), Some(packed))
            }
            (Some(packed), Some(cache)) => {
                let (mut outputs, mut caches) = (Vec::new(), Vec::new());
                for (n, tokens) in packed.ranges().enumerate() {
                    let mut cached = cache.clone().narrow(0, n, 1);
                    if !tokens.is_empty() {
                        let piece = x.clone().narrow(1, tokens.start, tokens.len());
                        outputs.push(self.forward_cached(piece, &mut cached));
                    }
                    caches.push(cached);
                }
                *cache = Tensor::cat(caches, 0);
                Tensor::cat(outputs, 1)
            }
        }
    }

    /// `[B, W - 1 + T, D]` to `[B, T, D]`. Tokens of packed sequences do not see those before their
    /// own sequence.
    fn convolve(&self, inputs: Tensor<3>, packed: Option<&Packed>) -> Tensor<3> {
        let [channels, _, kernel_size] = self.weight.dims();
        let [_, length, _] = inputs.dims();
        let tokens = length + 1 - kernel_size;

        let dtype = inputs.dtype();
        let inputs = inputs.cast(DType::F32);
        let weight = self.weight.val().cast(DType::F32);
        let tap = |j: usize| {
            let weight = weight.clone().narrow(2, j, 1).reshape([channels]);
            let product = scale_rows_in_place(inputs.clone().narrow(1, j, tokens), weight);
            match packed.filter(|_| j + 1 < kernel_size) {
                None => product,
                Some(packed) => {
                    let past = (kernel_size - 1 - j) as i64;
                    let seen = packed.positions.clone().greater_equal_elem(past);
                    let seen = seen.reshape([1, tokens, 1]).expand(product.dims());
                    product.mask_fill(seen.bool_not(), 0.0)
                }
            }
        };
        let sum = (1..kernel_size).fold(tap(0), |sum, j| sum + tap(j));
        let sum = match &self.bias {
            Some(bias) => shift_rows(sum, bias.val().cast(DType::F32)),
            None => sum,
        };
        if self.swish { silu(sum).cast(dtype) } else { sum.cast(dtype) }
    }
}

/// `past` zeros before the tokens of `x`.
fn before(x: Tensor<3>, past: usize) -> Tensor<3> {
    // no zero-sized tensors: not every back-end takes them
    if past == 0 {
        return x;
    }
    let [batch, _, channels] = x.dims();
    let zeros = Tensor::zeros([batch, past, channels], (&x.device(), x.dtype()));
    Tensor::cat(vec![zeros, x], 1)
}

impl ModuleDisplay for ShortConv {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new().with_new_line_after_attribute(false).optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        let [channels, _, kernel_size] = self.weight.lazy_shape().dims();
        content.add("channels", &channels).add("kernel_size", &kernel_size).optional()
    }
}
