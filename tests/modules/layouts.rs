//! Packed and padded batches: every sequence gets what it gets alone, values and gradients.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Gradients, Int, Tensor, TensorData};
use gla_burn::{GlaTransformer, SequenceLayout};

use crate::mixers::all;
use crate::{VOCAB, assert_close, draw, drawn, ids, values};

const LENGTHS: [usize; 5] = [5, 19, 0, 1, 70];

/// Sequences, each `[1, length]`; the empty one is left out.
fn sequences(device: &Device) -> Vec<Option<Tensor<2, Int>>> {
    LENGTHS.map(|length| (length > 0).then(|| ids([1, length], device))).to_vec()
}

fn packed(sequences: &[Option<Tensor<2, Int>>]) -> Tensor<2, Int> {
    Tensor::cat(sequences.iter().flatten().cloned().collect(), 1)
}

fn bounds() -> Vec<usize> {
    let sums = LENGTHS.iter().scan(0, |sum, length| {
        *sum += length;
        Some(*sum)
    });
    std::iter::once(0).chain(sums).collect()
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Side {
    Left,
    Right,
}

/// Rows of 72 with something else where there is no token, and their mask.
fn padded(
    sequences: &[Option<Tensor<2, Int>>],
    side: Side,
    device: &Device,
) -> (Tensor<2, Int>, SequenceLayout) {
    let time = 72;
    let rows = sequences.iter().map(|sequence| {
        let length = sequence.as_ref().map_or(0, |s| s.dims()[1]);
        let filler = ids([1, time - length], device);
        let zeros = Tensor::<2, Int>::zeros([1, time - length], device);
        let ones = sequence.as_ref().map(|s| s.ones_like());
        let join = |token: Option<Tensor<2, Int>>, pad: Tensor<2, Int>| {
            let mut parts: Vec<_> = token.into_iter().chain([pad]).collect();
            if side == Side::Left {
                parts.reverse();
            }
            Tensor::cat(parts, 1)
        };
        (join(sequence.clone(), filler), join(ones, zeros))
    });
    let (ids, mask): (Vec<_>, Vec<_>) = rows.unzip();
    (Tensor::cat(ids, 0), SequenceLayout::padded(Tensor::cat(mask, 0)))
}

/// The tokens of row `n`.
fn tokens_of(x: &Tensor<3>, n: usize, side: Side) -> Tensor<3> {
    let [_, time, _] = x.dims();
    let start = if side == Side::Left { time - LENGTHS[n] } else { 0 };
    x.clone().narrow(0, n, 1).narrow(1, start, LENGTHS[n])
}

#[test]
fn packed_and_padded_sequences_are_as_alone() {
    let device = Device::flex();
    for (name, config) in all() {
        let model = drawn(config.init(&device));
        let sequences = sequences(&device);
        let alone: Vec<_> =
            sequences.iter().map(|s| s.as_ref().map(|s| model.forward(s.clone()))).collect();

        let layout = SequenceLayout::packed(&bounds(), &device);
        let logits = model.forward_with(packed(&sequences), &layout);
        let expected = Tensor::cat(alone.iter().flatten().cloned().collect(), 1);
        assert_close(&format!("{name}, packed"), logits, expected, 1e-4);

        for side in [Side::Left, Side::Right] {
            let (ids, layout) = padded(&sequences, side, &device);
            let logits = model.forward_with(ids, &layout);
            let mut rest = logits.clone().abs().sum().into_scalar::<f32>();
            for (n, alone) in alone.iter().enumerate() {
                let Some(alone) = alone else { continue };
                let row = tokens_of(&logits, n, side);
                rest -= row.clone().abs().sum().into_scalar::<f32>();
                assert_close(
                    &format!("{name}, {side:?} padding, row {n}"),
                    row,
                    alone.clone(),
                    1e-4,
                );
            }
            assert!(rest.abs() < 1e-2, "{name}, {side:?} padding: {rest} at the padding");
        }
    }
}

/// Prompts of different lengths in one batch, then further tokens for all: twice packed or padded,
/// then one by one.
#[test]
fn ragged_prompts_are_continued_as_alone() {
    let device = Device::flex();
    for (name, config) in all() {
        let model = drawn(config.init(&device));
        let (first, second) = (sequences(&device), sequences(&device));
        let steps = ids([LENGTHS.len(), 4], &device);
        for side in [None, Some(Side::Left), Some(Side::Right)] {
            let mut state = model.init_state(LENGTHS.len(), &device);
            for part in [&first, &second] {
                let (ids, layout) = match side {
                    None => (packed(part), SequenceLayout::packed(&bounds(), &device)),
                    Some(side) => padded(part, side, &device),
                };
                model.prefill_with(ids, &layout, &mut state);
            }
            model.check_state(&state).unwrap();
            assert_eq!(state.seen(), LENGTHS.map(|length| 2 * length));
            let logits = (0..4).map(|t| {
                let token = steps.clone().narrow(1, t, 1).squeeze_dim(1);
                model.step(token, &mut state).unsqueeze_dim(1)
            });
            let logits = Tensor::<3>::cat(logits.collect(), 1);
            for n in 0..LENGTHS.len() {
                let tokens = first[n].iter().chain(&second[n]).cloned();
                let tokens: Vec<_> = tokens.chain([steps.clone().narrow(0, n, 1)]).collect();
                let alone = model.forward(Tensor::cat(tokens, 1)).narrow(1, 2 * LENGTHS[n], 4);
                let found = logits.clone().narrow(0, n, 1);
                assert_close(&format!("{name}, {side:?}, row {n}"), found, alone, 1e-4);
            }
        }
    }
}

/// Gradients of all parameters, in order.
struct All<'a>(&'a Gradients, Vec<f64>);

impl ModuleVisitor for All<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.1.extend(values(param.val().grad(self.0).expect("every parameter has a gradient")));
    }
}

#[test]
fn packed_and_padded_gradients_are_sums() {
    let device = Device::flex().autodiff();
    for (name, config) in all() {
        let model: GlaTransformer = drawn(config.init(&device));
        let sequences = sequences(&device);
        let weights = LENGTHS.map(|length| draw([1, length.max(1), VOCAB], -1.0..1.0, &device));
        let gradients = |loss: Tensor<1>| {
            let grads = loss.backward();
            let mut all = All(&grads, Vec::new());
            model.visit(&mut all);
            let length = all.1.len();
            Tensor::<1>::from_data(TensorData::new(all.1, [length]), &Device::flex())
        };
        let tokens = || sequences.iter().zip(&weights).filter_map(|(s, w)| Some((s.as_ref()?, w)));
        let alone = tokens().map(|(s, w)| (model.forward(s.clone()) * w.clone()).sum());
        let alone = gradients(Tensor::cat(alone.collect(), 0).sum());

        // a layout serves with and without autodiff
        let layout = SequenceLayout::packed(&bounds(), &Device::flex());
        let logits = model.forward_with(packed(&sequences), &layout);
        let weight = Tensor::cat(tokens().map(|(_, w)| w.clone()).collect(), 1);
        assert_close(
            &format!("{name}, packed"),
            gradients((logits * weight).sum()),
            alone.clone(),
            1e-4,
        );

        let (ids, layout) = padded(&sequences, Side::Left, &device);
        let logits = model.forward_with(ids, &layout);
        let losses = weights.iter().enumerate().filter(|(n, _)| LENGTHS[*n] > 0);
        let losses = losses.map(|(n, w)| (tokens_of(&logits, n, Side::Left) * w.clone()).sum());
        let loss = Tensor::cat(losses.collect(), 0).sum();
        assert_close(&format!("{name}, padded"), gradients(loss), alone, 1e-4);
    }
}

/// A mixer on its own gives 0 where there is padding.
#[test]
fn mixers_give_zeros_for_padding() {
    let device = Device::flex();
    let mask = Tensor::<2, Int>::from_data([[0, 1, 1], [1, 0, 0], [1, 0, 1]], &device);
    let layout = SequenceLayout::padded(mask.clone());
    for (name, config) in all() {
        let mixer = drawn(config.block(1).attn.init(&device));
        let x = draw([3, 3, 32], -1.0..1.0, &device);
        let y = mixer.forward(x.clone(), &layout);
        let alone = mixer.forward(x.narrow(0, 0, 1).narrow(1, 1, 2), &SequenceLayout::rows());
        assert_close(name, y.clone().narrow(0, 0, 1).narrow(1, 1, 2), alone, 1e-5);
        let padding = mask.clone().equal_elem(0).float().unsqueeze_dim::<3>(2);
        assert_eq!((y * padding).abs().max().into_scalar::<f32>(), 0.0, "{name}");
    }
}

#[test]
#[should_panic(expected = "SequenceLayout: the mask must hold 0 and 1, got 2")]
fn masks_are_0_and_1() {
    SequenceLayout::padded(Tensor::from_data([[0, 1, 2]], &Device::flex()));
}

#[test]
#[should_panic(expected = "GlaTransformer: the layout has 5 packed tokens, the input is [1, 6]")]
fn layouts_are_of_the_input() {
    let device = Device::flex();
    let layout = SequenceLayout::packed(&[0, 5], &device);
    crate::config().init(&device).forward_with(ids([1, 6], &device), &layout);
}
