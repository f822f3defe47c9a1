//! Text to token ids and back: one token per byte, or the `tokenizer.json` of a checkpoint.
//!
//! `cargo run --release -p gla-lm --bin lm -- generate --model gla-340M-15B --prompt "Once upon"`

use std::path::Path;

use anyhow::{Result, anyhow, bail, ensure};
use gla_burn::checkpoint::CheckpointConfig;
use tokenizers::{
    DecoderWrapper, ModelWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
};

use crate::config::VOCAB;
use crate::corpus::SEPARATOR;

/// Turns text into ids.
pub struct Tokenizer {
    kind: Kind,
    /// Before bytes, or in place of an empty prompt.
    start: Option<usize>,
    ends: Vec<usize>,
}

enum Kind {
    Bytes,
    Trained(Box<tokenizers::Tokenizer>),
}

/// Turns ids into the bytes of text, one by one.
pub struct Decoder<'a>(Option<Box<TrainedDecoder<'a>>>);

type TrainedDecoder<'a> = tokenizers::DecodeStream<
    'a,
    ModelWrapper,
    NormalizerWrapper,
    PreTokenizerWrapper,
    PostProcessorWrapper,
    DecoderWrapper,
>;

impl Tokenizer {
    /// One token per byte, with the separator of documents before each text and at its end.
    pub fn bytes() -> Self {
        let separator = usize::from(SEPARATOR);
        Self { kind: Kind::Bytes, start: Some(separator), ends: vec![separator] }
    }

    /// The tokenizer of the checkpoint in `folder`: `tokenizer.json`, or bytes if it has none and
    /// the model knows 256 tokens.
    ///
    /// # Errors
    ///
    /// When there is neither, or the tokenizer has tokens that the model does not know.
    pub fn open(folder: &Path, config: &CheckpointConfig) -> Result<Self> {
        let vocabulary = config.model.vocab_size;
        let path = folder.join("tokenizer.json");
        let kind = if path.is_file() {
            let tokenizer = tokenizers::Tokenizer::from_file(&path)
                .map_err(|error| anyhow!("cannot read {}: {error}", path.display()))?;
            let largest = tokenizer.get_vocab(true).into_values().max().unwrap_or(0);
            ensure!(
                (largest as usize) < vocabulary,
                "{} has the token {largest}, but the model knows {vocabulary} tokens",
                path.display()
            );
            Kind::Trained(Box::new(tokenizer))
        } else {
            ensure!(
                vocabulary == VOCAB,
                "{} is missing, and a model of {vocabulary} tokens is not one of bytes",
                path.display()
            );
            Kind::Bytes
        };
        let known = |id: &u32| (*id as usize) < vocabulary;
        let start = config.bos_token_id.filter(known).map(|id| id as usize);
        let ends = config.eos_token_ids.iter().filter(|id| known(id)).map(|id| *id as usize);
        Ok(Self { kind, start, ends: ends.collect() })
    }

    /// Ids of a prompt, never none.
    ///
    /// # Errors
    ///
    /// When the text cannot be encoded, or there is none and no token to start one with.
    pub fn encode(&self, text: &str) -> Result<Vec<usize>> {
        let ids: Vec<usize> = match &self.kind {
            Kind::Bytes => self.start.into_iter().chain(text.bytes().map(usize::from)).collect(),
            Kind::Trained(tokenizer) => {
                let encoding = tokenizer
                    .encode(text, true)
                    .map_err(|error| anyhow!("cannot encode the prompt: {error}"))?;
                encoding.get_ids().iter().map(|id| *id as usize).collect()
            }
        };
        match (ids.is_empty(), self.start) {
            (false, _) => Ok(ids),
            (true, Some(start)) => Ok(vec![start]),
            (true, None) => bail!("this model has no token to start a text with: give it a prompt"),
        }
    }

    /// Tokens that end a text.
    pub fn ends(&self) -> &[usize] {
        &self.ends
    }

    /// Whether a text must end at such a token. A model of bytes may be kept from drawing it instead.
    pub fn always_ends(&self) -> bool {
        matches!(self.kind, Kind::Trained(_))
    }

    /// A decoder of what follows `prompt`.
    ///
    /// # Errors
    ///
    /// When the prompt cannot be decoded.
    pub fn decoder(&self, prompt: &[usize]) -> Result<Decoder<'_>> {
        let Kind::Trained(tokenizer) = &self.kind else {
            return Ok(Decoder(None));
        };
        let mut decoder = Decoder(Some(Box::new(tokenizer.decode_stream(true))));
        // the space before a word depends on what comes before it
        for id in prompt {
            decoder.push(*id)?;
        }
        Ok(decoder)
    }
}

impl Decoder<'_> {
    /// Bytes that the token completes. A tokenizer's are whole characters; what is left of one at the
    /// end of a text is lost.
    ///
    /// # Errors
    ///
    /// When the token is none of the tokenizer's.
    pub fn push(&mut self, id: usize) -> Result<Vec<u8>> {
        let unknown = || anyhow!("token {id} is none of the tokenizer's");
        match &mut self.0 {
            None => Ok(vec![u8::try_from(id).map_err(|_| unknown())?]),
            Some(decoder) => {
                let text = decoder.step(u32::try_from(id).map_err(|_| unknown())?);
                let text = text.map_err(|error| anyhow!("cannot decode token {id}: {error}"))?;
                Ok(text.unwrap_or_default().into_bytes())
            }
        }
    }
}
