//! Layers, blocks and the language model on top of the [`gla`](fn@crate::gla) op.
//!
//! | module | what it is | state |
//! |---|---|---|
//! | [`GatedLinearAttention`] | drop-in for an attention layer | [`LayerState`] |
//! | [`Mixer`] | this layer or a sibling, see [`MixerConfig`] | [`LayerState`] |
//! | [`GlaBlock`] | pre-norm block: a mixer, then a SwiGLU [`GlaMlp`] | [`LayerState`] |
//! | [`GlaTransformer`] | token ids to logits | [`GlaState`] |
//!
//! Each has `forward` for training (whole sequences, no state), `prefill` (whole or partial
//! sequences, state in and out) and `step` (one token, state in and out); the three agree. The
//! sequences of a batch may also be packed or padded: a [`SequenceLayout`] says how they lie, and
//! each gets what it would get alone.
//!
//! One field of [`GlaTransformerConfig`] chooses the mixer of all blocks, another puts softmax
//! attention into some of them ([`HybridAttention`]):
//!
//! | kind of [`MixerConfig`] | layer | gate of the op |
//! |---|---|---|
//! | `Gla` | [`GatedLinearAttention`] | per key channel |
//! | `SimpleGla` | the same | per head |
//! | `Retention` | the same, with rotary positions | a constant per head: RetNet's, TransNormerLLM's |
//! | `LinearAttention` | the same, with a [`HeadFeatureMap`] or none | none |
//! | `Hgrn2` | [`Hgrn2`] | per key channel, the keys tied to it |
//! | `Mamba2` | [`Mamba2`] | per head |
//! | `Mamba` | [`Mamba`], slow here | per key channel, one head a channel |
//! | `SoftmaxAttention` | [`SoftmaxAttention`] | the op has no part in it |
//!
//! What a [`LayerState`] holds differs by kind; code that saves, selects or joins states goes
//! through [`LayerState::merge`] and knows none of them.
//!
//! [`linear_cross_entropy`] trains, [`Generator`] and [`Sampler`] serve.
//!
//! Parameters carry the names of flash-linear-attention's checkpoints, see [`fla_name`]. Its models
//! of Mamba and Mamba-2 have other names around the layer, and no feed-forward layers.

mod attention;
mod block;
mod feature_map;
mod gate;
mod generation;
mod gradient;
mod head_feature_map;
mod hybrid;
mod init;
mod layout;
mod loss;
mod mixer;
mod mlp;
mod model;
mod norm;
mod rotary;
mod rows;
mod short_conv;
mod state;
#[cfg(feature = "store")]
mod state_file;
mod state_rows;
mod swish;
mod transparent;

pub use attention::*;
pub use block::*;
pub use feature_map::*;
pub use gate::*;
pub use generation::*;
pub use head_feature_map::*;
pub use hybrid::*;
pub use layout::*;
pub use loss::*;
pub use mixer::*;
pub use mlp::*;
pub use model::*;
pub use norm::*;
pub use rotary::*;
pub use short_conv::*;
pub use state::*;
