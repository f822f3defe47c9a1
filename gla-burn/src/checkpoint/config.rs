//! `config.json`: fla's configurations as a [`GlaTransformerConfig`], and back.

mod gla;
mod retnet;
mod transformer;

use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::CheckpointError;
use super::files::text;
use crate::nn::{GlaTransformerConfig, HybridAttention, MixerConfig};

/// Values of `model_type` that can be loaded.
const MODEL_TYPES: &[&str] = &["gla", "retnet", "transformer"];

/// What the `config.json` of a checkpoint says.
#[derive(Clone, Debug)]
pub struct CheckpointConfig {
    /// The model.
    pub model: GlaTransformerConfig,
    /// Token that starts a text.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// Token that fills up short rows.
    pub pad_token_id: Option<u32>,
}

/// The keys that all models have, with fla's defaults for those that are not there.
#[derive(Deserialize)]
#[serde(default)]
struct Keys {
    model_type: Option<String>,
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    hidden_ratio: Option<f64>,
    intermediate_size: Option<usize>,
    hidden_act: String,
    elementwise_affine: bool,
    norm_eps: Option<f64>,
    /// The name of `norm_eps` until 2024-04-28.
    rms_norm_eps: Option<f64>,
    attn: Option<HybridAttention>,
    attnres_block_size: Value,
    bos_token_id: Option<i64>,
    eos_token_id: TokenIds,
    pad_token_id: Option<i64>,
    tie_word_embeddings: bool,
    initializer_range: f64,
}

/// Hugging Face allows one and several.
#[derive(Deserialize)]
#[serde(untagged, expecting = "eos_token_id: expected an id or a list of ids")]
enum TokenIds {
    Several(Vec<i64>),
    One(Option<i64>),
}

impl Default for Keys {
    fn default() -> Self {
        Self {
            model_type: None,
            vocab_size: 32000,
            hidden_size: 2048,
            num_hidden_layers: 24,
            hidden_ratio: None,
            intermediate_size: None,
            hidden_act: "swish".into(),
            elementwise_affine: true,
            norm_eps: None,
            rms_norm_eps: None,
            attn: None,
            attnres_block_size: Value::Null,
            bos_token_id: Some(1),
            eos_token_id: TokenIds::One(Some(2)),
            pad_token_id: None,
            tie_word_embeddings: false,
            initializer_range: 0.02,
        }
    }
}

/// Keys that fla accepts and ignores, with what it uses instead.
type Ignored = Vec<(String, &'static str)>;

/// The keys of one kind of model.
trait LayerKeys: DeserializeOwned {
    /// fla's default of `hidden_ratio`.
    const HIDDEN_RATIO: f64;

    /// What would give other numbers than fla's.
    fn refuse(&self, model: &GlaTransformerConfig) -> Option<String>;

    /// The keys that are not followed.
    fn ignored(&self) -> Ignored;

    /// Puts what they say into the model.
    fn apply(self, model: &mut GlaTransformerConfig);
}

impl CheckpointConfig {
    /// A model with fla's default tokens: 1 starts a text and 2 ends it.
    pub fn new(model: GlaTransformerConfig) -> Self {
        Self { model, bos_token_id: Some(1), eos_token_ids: vec![2], pad_token_id: None }
    }

    /// Reads a `config.json`; the second value warns of keys that are not followed.
    pub(super) fn read(path: &Path) -> Result<(Self, Vec<String>), CheckpointError> {
        let text = text(path)?;
        let keys: Keys = parse(path, &text)?;
        let model_of = match keys.model_type.as_deref() {
            Some("gla") => Self::of::<gla::Keys>,
            Some("retnet") => Self::of::<retnet::Keys>,
            Some("transformer") => Self::of::<transformer::Keys>,
            found => {
                return Err(CheckpointError::ModelType {
                    path: path.to_path_buf(),
                    found: found.unwrap_or("none").to_string(),
                    known: MODEL_TYPES,
                });
            }
        };
        if let Some(what) = keys.refuse() {
            return Err(CheckpointError::Unsupported { path: path.to_path_buf(), what });
        }
        let (config, ignored) = model_of(keys, path, &text)?;
        let invalid = |reason| CheckpointError::Config { path: path.to_path_buf(), reason };
        config.model.check().map_err(invalid)?;
        let warning = |(key, used)| {
            format!(
                "{}: {key} is ignored, as flash-linear-attention ignores it: it is always {used}",
                path.display()
            )
        };
        Ok((config, ignored.into_iter().map(warning).collect()))
    }

    /// A model of one kind, and the keys that are ignored.
    fn of<K: LayerKeys>(
        keys: Keys,
        path: &Path,
        text: &str,
    ) -> Result<(Self, Ignored), CheckpointError> {
        let layer: K = parse(path, text)?;
        let mut config = keys.into_config(K::HIDDEN_RATIO);
        if let Some(what) = layer.refuse(&config.model) {
            return Err(CheckpointError::Unsupported { path: path.to_path_buf(), what });
        }
        let ignored = layer.ignored();
        layer.apply(&mut config.model);
        Ok((config, ignored))
    }

    /// The `config.json` of a model with weights of the type `torch_dtype`, or what fla does not
    /// have.
    pub(super) fn json(&self, torch_dtype: &str) -> Result<String, String> {
        let model = &self.model;
        let plain = model.clone().with_attn(None);
        let layer = match plain.block(0).attn {
            MixerConfig::Gla(layer) => gla::json(&layer, model)?,
            MixerConfig::Retention(layer) => retnet::json(&layer, model)?,
            MixerConfig::SoftmaxAttention(layer) => transformer::json(&layer, model)?,
            other => return Err(format!("a model of {}", kind(&other))),
        };
        let ratio = model.hidden_ratio;
        let eos = match self.eos_token_ids.as_slice() {
            [] => Value::Null,
            [id] => json!(id),
            ids => json!(ids),
        };
        let keys = json!({
            "torch_dtype": torch_dtype,
            "vocab_size": model.vocab_size,
            "hidden_size": model.hidden_size,
            "num_hidden_layers": model.num_hidden_layers,
            // fla's is an integer
            "hidden_ratio": if ratio.fract() == 0.0 { json!(ratio as u64) } else { json!(ratio) },
            "intermediate_size": model.intermediate_size,
            "hidden_act": "swish",
            "elementwise_affine": true,
            "norm_eps": model.norm_eps,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
            "pad_token_id": self.pad_token_id,
            "tie_word_embeddings": model.tie_word_embeddings,
            "initializer_range": model.initializer_range,
            // the name of an output norm's weight depends on it
            "fuse_norm": true,
        });
        let object = |keys| match keys {
            Value::Object(keys) => keys,
            _ => Map::new(),
        };
        let keys: Map<_, _> = object(keys).into_iter().chain(object(layer)).collect();
        Ok(format!("{:#}\n", Value::Object(keys)))
    }
}

/// The name of a kind of mixer.
fn kind(mixer: &MixerConfig) -> String {
    let keys = json!(mixer).as_object().and_then(|keys| keys.keys().next().cloned());
    keys.unwrap_or_default()
}

fn parse<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T, CheckpointError> {
    serde_json::from_str(text).map_err(|error| CheckpointError::read(path, error))
}

impl Keys {
    /// As [`LayerKeys::refuse`].
    fn refuse(&self) -> Option<String> {
        if self.hidden_act != "swish" {
            Some(format!("hidden_act = {:?} (swish is)", self.hidden_act))
        } else if !self.elementwise_affine {
            Some("elementwise_affine = false (norms without a weight)".into())
        } else if !self.attnres_block_size.is_null() {
            Some(format!("attnres_block_size = {} (attention residuals)", self.attnres_block_size))
        } else {
            None
        }
    }

    /// The configuration without what the layers are.
    fn into_config(self, hidden_ratio: f64) -> CheckpointConfig {
        let model =
            GlaTransformerConfig::new(self.vocab_size, self.hidden_size, self.num_hidden_layers)
                .with_hidden_ratio(self.hidden_ratio.unwrap_or(hidden_ratio))
                .with_intermediate_size(self.intermediate_size)
                .with_norm_eps(self.norm_eps.or(self.rms_norm_eps).unwrap_or(1e-6))
                .with_tie_word_embeddings(self.tie_word_embeddings)
                .with_initializer_range(self.initializer_range)
                .with_attn(self.attn);
        // some configurations say -1 for none
        let token = |id: i64| u32::try_from(id).ok();
        CheckpointConfig {
            model,
            bos_token_id: self.bos_token_id.and_then(token),
            eos_token_ids: match self.eos_token_id {
                TokenIds::Several(ids) => ids.into_iter().filter_map(token).collect(),
                TokenIds::One(id) => id.and_then(token).into_iter().collect(),
            },
            pad_token_id: self.pad_token_id.and_then(token),
        }
    }
}
