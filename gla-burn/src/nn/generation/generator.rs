use std::ops::Range;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use super::{Sampler, SamplingError};
use crate::nn::{GlaState, GlaTransformer};

/// Tokens of a prompt that are read at once. Memory for a prompt of any length is that of so many.
const PIECE: usize = 1024;

/// Continues sequences in one batch; each may start and end at any time.
///
/// ```
/// # use burn::tensor::Device;
/// # use gla_burn::{Generator, GlaTransformerConfig, SamplerConfig};
/// let model = GlaTransformerConfig::new(256, 64, 2).init(&Device::flex());
/// let mut generator = Generator::new(model);
/// // one prefix, read once, and two continuations of it
/// let samplers = [1, 2].map(|seed| SamplerConfig::new().with_seed(seed).init().unwrap());
/// let ids = generator.add(&[72, 101, 108, 108, 111], samplers.into());
/// let drawn = generator.step().unwrap();
/// assert_eq!(drawn.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [0, 1]);
/// generator.remove(ids.start);
/// assert_eq!(generator.step().unwrap().len(), 1);
/// ```
#[derive(Debug)]
pub struct Generator {
    model: GlaTransformer,
    /// One row for each running sequence, in their order.
    state: Option<GlaState>,
    running: Vec<Running>,
    next_id: usize,
}

#[derive(Debug)]
struct Running {
    id: usize,
    sampler: Sampler,
    /// The last token, which the state has not seen.
    token: usize,
}

impl Generator {
    /// A generator without sequences. The model should be without autodiff, see
    /// [`Module::valid`](burn::module::Module::valid).
    pub fn new(model: GlaTransformer) -> Self {
        Self { model, state: None, running: Vec::new(), next_id: 0 }
    }

    /// Number of running sequences.
    pub fn len(&self) -> usize {
        self.running.len()
    }

    /// Whether no sequence is running.
    pub fn is_empty(&self) -> bool {
        self.running.is_empty()
    }

    /// Starts one continuation of `prompt` for each sampler, and returns their ids, which count up.
    ///
    /// The prompt is read once, in pieces, whatever the number of continuations.
    ///
    /// # Panics
    ///
    /// Panics if the prompt is empty or holds a token that is not of the vocabulary.
    pub fn add(&mut self, prompt: &[usize], mut samplers: Vec<Sampler>) -> Range<usize> {
        let (&last, past) =
            prompt.split_last().expect("Generator: prompt must hold at least 1 token, got 0");
        let [vocab, _] = self.model.embeddings.weight.dims();
        if let Some(token) = prompt.iter().find(|&&token| token >= vocab) {
            panic!("Generator: token {token} of the prompt, the vocabulary has {vocab}");
        }
        samplers.iter_mut().for_each(|sampler| sampler.observe(prompt));
        let device = self.device();
        let mut state = self.model.init_state(1, &device);
        for piece in past.chunks(PIECE) {
            let ids = ids(piece, &device).unsqueeze_dim(0);
            self.model.prefill_hidden(ids, &mut state);
        }
        self.resume(state, last, samplers)
    }

    /// Starts one continuation for each sampler of a sequence whose past is in `state` but for its
    /// last token, and returns their ids: what [`remove`](Self::remove) gives goes on. A new sampler
    /// knows of earlier tokens only what it has [observed](Sampler::observe).
    ///
    /// # Panics
    ///
    /// Panics if `state` is not of this model and one sequence, or if `token` is not of the vocabulary.
    pub fn resume(
        &mut self,
        state: GlaState,
        token: usize,
        samplers: Vec<Sampler>,
    ) -> Range<usize> {
        self.model.check_state(&state).unwrap_or_else(|error| panic!("Generator: {error}"));
        let batch = state.batch();
        assert!(batch == 1, "Generator: a sequence goes on from a state of 1, got {batch}");
        let [vocab, _] = self.model.embeddings.weight.dims();
        assert!(token < vocab, "Generator: token is {token}, the vocabulary has {vocab}");
        let first = self.next_id;
        self.next_id += samplers.len();
        if !samplers.is_empty() {
            let new = state.repeat(samplers.len());
            self.state = Some(match self.state.take() {
                Some(state) => GlaState::cat(vec![state, new]),
                None => new,
            });
        }
        let ids = first..self.next_id;
        let running = ids.clone().zip(samplers);
        self.running.extend(running.map(|(id, sampler)| Running { id, sampler, token }));
        ids
    }

    /// Draws one token for each running sequence: their ids, in rising order, and tokens.
    ///
    /// # Errors
    ///
    /// As [`Sampler::sample`]; the sequences cannot go on then.
    ///
    /// # Panics
    ///
    /// Panics if the device fails.
    pub fn step(&mut self) -> Result<Vec<(usize, usize)>, SamplingError> {
        let device = self.device();
        let Some(state) = &mut self.state else {
            return Ok(Vec::new());
        };
        let tokens: Vec<usize> = self.running.iter().map(|running| running.token).collect();
        let logits = self.model.step(ids(&tokens, &device), state);
        let [_, vocab] = logits.dims();
        let logits = logits.cast(DType::F32).into_data().try_into_vec::<f32>();
        let logits = logits.expect("f32 after the cast");
        let rows = self.running.iter_mut().zip(logits.chunks(vocab));
        rows.map(|(running, logits)| {
            running.token = running.sampler.sample(logits)?;
            Ok((running.id, running.token))
        })
        .collect()
    }

    /// Ends a sequence. Returns its state and its last token, which the state has not seen;
    /// [`resume`](Self::resume) takes both. `None` if no such sequence is running.
    pub fn remove(&mut self, id: usize) -> Option<(GlaState, usize)> {
        let row = self.running.iter().position(|running| running.id == id)?;
        let state = self.state.take().expect("running sequences have a state");
        let Running { token, .. } = self.running.remove(row);
        if self.running.is_empty() {
            return Some((state, token));
        }
        let rest: Vec<usize> = (0..state.batch()).filter(|&other| other != row).collect();
        self.state = Some(state.select(&rest));
        Some((state.select(&[row]), token))
    }

    fn device(&self) -> Device {
        self.model.embeddings.weight.val().device()
    }
}

fn ids(tokens: &[usize], device: &Device) -> Tensor<1, Int> {
    let ids: Vec<i64> = tokens.iter().map(|&token| token as i64).collect();
    Tensor::from_data(TensorData::new(ids, [tokens.len()]), device)
}
