//! The layer, the block and the language model on top of the [`gla`](fn@crate::gla) op.
//!
//! | module | what it is | state |
//! |---|---|---|
//! | [`GatedLinearAttention`] | drop-in for an attention layer | [`LayerState`] |
//! | [`GlaBlock`] | pre-norm block: attention, then a SwiGLU [`GlaMlp`] | [`LayerState`] |
//! | [`GlaTransformer`] | token ids to logits | [`GlaState`] |
//!
//! Each of the three has `forward` for training (whole sequences, no state), `prefill` (whole or
//! partial sequences, state in and out) and `step` (one token, state in and out); the three agree.
//!
//! Parameters carry the names of flash-linear-attention's checkpoints, see [`fla_name`].

mod attention;
mod block;
mod feature_map;
mod gate;
mod hybrid;
mod init;
mod layout;
mod mixer;
mod mlp;
mod model;
mod norm;
mod presets;
mod rotary;
mod short_conv;
mod state;
#[cfg(feature = "store")]
mod state_file;
mod transparent;

pub use attention::*;
pub use block::*;
pub use feature_map::*;
pub use gate::*;
pub use hybrid::*;
pub use layout::*;
pub use mixer::*;
pub use mlp::*;
pub use model::*;
pub use norm::*;
pub use rotary::*;
pub use short_conv::*;
pub use state::*;
