//! Causal softmax attention.

use burn::config::Config;
use burn::module::{Content, DisplaySettings, Module, ModuleDisplay};
use burn::nn::Linear;
use burn::tensor::module::attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Bool, DType, Device, Int, Tensor, TensorData, assert_shape};

use super::{Mix, Pass, mixer_methods};
use crate::nn::init::{projection, projection_with_bias};
use crate::nn::rows::project_rows;
use crate::nn::state::newest;
use crate::nn::state_rows::aligned;
use crate::nn::{LayerState, LayerStateShape, Rotary, SequenceLayout, StateAxis};

/// Configuration to create a [`SoftmaxAttention`] layer using the
/// [init function](SoftmaxAttentionConfig::init).
#[derive(Config, Debug)]
pub struct SoftmaxAttentionConfig {
    /// Width of the input and the output.
    pub hidden_size: usize,
    /// Number of heads.
    pub num_heads: usize,
    /// Number of heads of keys and values; as many as `num_heads` if `None`.
    pub num_kv_heads: Option<usize>,
    /// Whether queries, keys and values have a bias. Default: false
    #[config(default = false)]
    pub qkv_bias: bool,
    /// How many tokens a token sees, itself included; all before it if `None`.
    pub window_size: Option<usize>,
    /// Base of the rotary embedding. Default: 10000.0
    #[config(default = 10000.0)]
    pub rope_theta: f64,
    /// Standard deviation of the initial weights. Default: 0.02
    #[config(default = 0.02)]
    pub initializer_range: f64,
}

impl SoftmaxAttentionConfig {
    /// Initialize a new [`SoftmaxAttention`] module.
    ///
    /// # Panics
    ///
    /// Panics if `hidden_size` is not an even multiple of `num_heads`, if `num_heads` is not a
    /// multiple of `num_kv_heads`, if `window_size` is 0, or if `rope_theta` is not a positive
    /// number.
    pub fn init(&self, device: &Device) -> SoftmaxAttention {
        let [num_kv_heads, head_dim] = self.heads();
        let (hidden, std) = (self.hidden_size, self.initializer_range);
        let linear = |d_output| match self.qkv_bias {
            true => projection_with_bias(hidden, d_output, std, device),
            false => projection(hidden, d_output, std, device),
        };
        SoftmaxAttention {
            q_proj: linear(hidden),
            k_proj: linear(num_kv_heads * head_dim),
            v_proj: linear(num_kv_heads * head_dim),
            o_proj: projection(hidden, hidden, std, device),
            num_heads: self.num_heads,
            num_kv_heads,
            head_dim,
            window_size: self.window_size,
            rotary: Rotary { theta: self.rope_theta },
        }
    }

    /// Number of parameters of the module, without making it.
    ///
    /// # Panics
    ///
    /// As [`init`](Self::init).
    pub fn num_params(&self) -> usize {
        let [num_kv_heads, head_dim] = self.heads();
        let qkv = self.hidden_size + 2 * num_kv_heads * head_dim;
        let bias = usize::from(self.qkv_bias) * qkv;
        self.hidden_size * qkv + bias + self.hidden_size * self.hidden_size
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
        self.try_heads().unwrap_or_else(|reason| panic!("SoftmaxAttentionConfig: {reason}"))
    }

    /// Checks the configuration and derives the heads of keys and values, and their width.
    fn try_heads(&self) -> Result<[usize; 2], String> {
        let (hidden, heads) = (self.hidden_size, self.num_heads);
        let kv_heads = self.num_kv_heads.unwrap_or(heads);
        if heads == 0 || hidden == 0 || !hidden.is_multiple_of(2 * heads) {
            Err(format!("hidden_size = {hidden} must be an even multiple of num_heads = {heads}"))
        } else if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            Err(format!("num_heads = {heads} must be a multiple of num_kv_heads = {kv_heads}"))
        } else if self.window_size == Some(0) {
            Err("window_size must be at least 1, got 0".into())
        } else {
            Rotary { theta: self.rope_theta }.check(hidden / heads)?;
            Ok([kv_heads, hidden / heads])
        }
    }
}

/// Causal softmax attention as in LLaMA: rotary positions, grouped heads, a window if wanted.
///
/// ```text
/// q, k, v = x W_q, x W_k, x W_v          q and k turned by their positions
/// o_t     = sum_s softmax_s(head_dim^-0.5 q_t . k_s) v_s     over t - window_size < s <= t
/// y       = o W_o
/// ```
///
/// Query head `h` reads key and value head `h / (num_heads / num_kv_heads)`. Decoding keeps turned
/// keys and values of all tokens, or of the last `window_size`. Computed by Burn's
/// [`attention`], packed sequences one after the other.
///
/// Should be created using [`SoftmaxAttentionConfig`].
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct SoftmaxAttention {
    /// Queries, `hidden_size -> hidden_size`.
    pub q_proj: Linear,
    /// Keys, `hidden_size -> num_kv_heads * head_dim`.
    pub k_proj: Linear,
    /// Values, `hidden_size -> num_kv_heads * head_dim`.
    pub v_proj: Linear,
    /// Output, `hidden_size -> hidden_size`.
    pub o_proj: Linear,
    /// Number of heads.
    pub num_heads: usize,
    /// Number of heads of keys and values.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// How many tokens a token sees, itself included.
    pub window_size: Option<usize>,
    /// The position embedding.
    #[module(skip)]
    pub rotary: Rotary,
}

mixer_methods!(SoftmaxAttention);

impl Mix for SoftmaxAttention {
    const NAME: &'static str = "SoftmaxAttention";

    fn mix(&self, x: Tensor<3>, pass: &Pass, state: Option<&mut LayerState>) -> Tensor<3> {
        let layout = pass.layout;
        let [batch, tokens, _] = x.dims();
        let [hidden, _] = self.q_proj.weight.dims();
        assert_shape!(x, [_, _, hidden]);

        let heads = |proj: &Linear, num: usize| {
            project_rows(proj, x.clone()).reshape([batch, tokens, num, self.head_dim])
        };
        let q = heads(&self.q_proj, self.num_heads);
        let seen = state.as_deref().map(|state| state.seen.as_slice());
        let place = (&q.device(), q.dtype());
        let angles = self.rotary.angles(self.head_dim, layout, seen, tokens, place);
        let q = angles.apply(q);
        let k = angles.apply(heads(&self.k_proj, self.num_kv_heads));
        let v = heads(&self.v_proj, self.num_kv_heads);

        let output = match (layout.as_packed(), state) {
            (None, None) => self.attend(q, k, v, &[]),
            (None, Some(state)) => self.attend_cached(q, k, v, state),
            (Some(packed), mut state) => {
                let mut cached = Vec::new();
                let mut outputs = Vec::new();
                for (n, range) in packed.ranges().enumerate() {
                    let mut own = state.as_deref().map(|state| self.sequence(state, n));
                    if !range.is_empty() {
                        let piece = |x: &Tensor<4>| x.clone().narrow(1, range.start, range.len());
                        let (q, k, v) = (piece(&q), piece(&k), piece(&v));
                        outputs.push(match &mut own {
                            None => self.attend(q, k, v, &[]),
                            Some(own) => self.attend_cached(q, k, v, own),
                        });
                    }
                    cached.extend(own);
                }
                if let Some(state) = &mut state {
                    let (keys, values) = cached.into_iter().map(|s| (s.keys, s.values)).unzip();
                    state.keys = align("keys", keys);
                    state.values = align("values", values);
                }
                Tensor::cat(outputs, 1)
            }
        };
        self.o_proj.forward(output.reshape([batch, tokens, hidden]))
    }

    fn state_shape(&self, batch: usize) -> LayerStateShape {
        LayerStateShape {
            batch,
            keys_values: Some([self.num_kv_heads, self.head_dim]),
            window_size: self.window_size,
            ..LayerStateShape::default()
        }
    }

    fn dtype(&self) -> DType {
        self.q_proj.weight.val().dtype()
    }
}

impl SoftmaxAttention {
    /// Attention over the past in `state` and the new tokens; the state goes on to the last of them.
    fn attend_cached(
        &self,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        state: &mut LayerState,
    ) -> Tensor<4> {
        let join = |past: Option<Tensor<4>>, new: Tensor<4>| match past {
            Some(past) => Tensor::cat(vec![past, new], 1),
            None => new,
        };
        let past = state.keys.as_ref().map_or(0, |keys| keys.dims()[1]);
        let unread: Vec<usize> = state.seen.iter().map(|seen| past.saturating_sub(*seen)).collect();
        let (k, v) = (join(state.keys.take(), k), join(state.values.take(), v));
        state.keys = Some(self.last(k.clone().without_autodiff()));
        state.values = Some(self.last(v.clone().without_autodiff()));
        self.attend(q, k, v, &unread)
    }

    /// The tokens that a next one can see.
    fn last(&self, x: Tensor<4>) -> Tensor<4> {
        match self.window_size {
            Some(window) => newest(x, window),
            None => x,
        }
    }

    /// The state of one sequence, without what it does not read.
    fn sequence(&self, state: &LayerState, n: usize) -> LayerState {
        let seen = state.seen[n];
        let row = |x: &Option<Tensor<4>>| {
            let x = x.as_ref().filter(|_| seen > 0)?;
            let length = x.dims()[1];
            let read = seen.min(length);
            Some(x.clone().narrow(0, n, 1).narrow(1, length - read, read))
        };
        LayerState {
            seen: vec![seen],
            keys: row(&state.keys),
            values: row(&state.values),
            ..LayerState::default()
        }
    }

    /// Attention of queries `[B, T, H, D]`, the last of keys and values `[B, S, Hk, D]`, of which
    /// each row skips so many in front.
    fn attend(&self, q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, unread: &[usize]) -> Tensor<4> {
        let [batch, tokens, heads, dim] = q.dims();
        let [_, length, kv_heads, _] = k.dims();
        let repeat = |x: Tensor<4>| {
            let groups = heads / kv_heads;
            let x = x.swap_dims(1, 2);
            if groups == 1 {
                return x;
            }
            let x = x.unsqueeze_dim::<5>(2).expand([batch, kv_heads, groups, length, dim]);
            x.reshape([batch, heads, length, dim])
        };
        let mask = self.mask([tokens, length], unread, &q.device());
        let options = AttentionModuleOptions {
            scale: None,
            softcap: None,
            // a single token sees all; the rest is in the mask
            is_causal: mask.is_none() && tokens > 1,
        };
        let mask = mask.map(|mask| mask.expand([batch, heads, tokens, length]));
        attention(q.swap_dims(1, 2), repeat(k), repeat(v), mask, None, options).swap_dims(1, 2)
    }

    /// What is not seen, `[B or 1, 1, T, S]`; `None` if that is just what comes later.
    fn mask(
        &self,
        [tokens, length]: [usize; 2],
        unread: &[usize],
        device: &Device,
    ) -> Option<Tensor<4, Bool>> {
        let unread = Some(unread).filter(|unread| unread.iter().any(|&unread| unread > 0));
        let window = self.window_size.filter(|&window| window < length);
        let causal = tokens > 1 && tokens < length;
        if unread.is_none() && window.is_none() && !causal {
            return None;
        }

        let count =
            |from: usize, to: usize| Tensor::<1, Int>::arange(from as i64..to as i64, device);
        let keys = count(0, length).reshape([1, 1, 1, length]);
        let queries = count(length - tokens, length).reshape([1, 1, tokens, 1]);
        let distance = queries - keys.clone();
        let mut mask = distance.clone().lower_elem(0);
        if let Some(window) = window {
            mask = mask.bool_or(distance.greater_equal_elem(window as i64));
        }
        if let Some(unread) = unread {
            let counts: Vec<i64> = unread.iter().map(|&unread| unread as i64).collect();
            let counts = TensorData::new(counts, [unread.len(), 1, 1, 1]);
            let first = Tensor::<4, Int>::from_data(counts, device);
            let shape = [unread.len(), 1, tokens, length];
            let hidden = keys.expand(shape).lower(first.expand(shape));
            mask = mask.expand(shape).bool_or(hidden);
        }
        Some(mask)
    }
}

/// One tensor of those of single sequences, each filled up in front to the longest.
fn align(name: &str, rows: Vec<Option<Tensor<4>>>) -> Option<Tensor<4>> {
    let single = vec![1; rows.len()];
    Some(Tensor::cat(aligned(name, StateAxis::Time, rows, &single)?, 0))
}

impl ModuleDisplay for SoftmaxAttention {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new().with_new_line_after_attribute(false).optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        let [hidden_size, _] = self.q_proj.weight.lazy_shape().dims();
        content
            .add("hidden_size", &hidden_size)
            .add("num_heads", &self.num_heads)
            .add("num_kv_heads", &self.num_kv_heads)
            .add("head_dim", &self.head_dim)
            .add_debug_attribute("window_size", &self.window_size)
            .optional()
    }
}
