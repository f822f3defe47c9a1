//! States as values: cloned, saved, loaded, refused, and free of autodiff graphs.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use burn::module::Module;
use burn::tensor::{DType, Device, Int, Tensor};
use gla_burn::{
    GlaState, GlaStateError, GlaTransformer, GlaTransformerConfig, LayerState, MixerConfig,
    SoftmaxAttentionConfig,
};
use gla_tests::{Cast, relative_rms};

use crate::mixers::all;
use crate::{assert_close, cases, config, drawn, gla, ids};

fn file(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("gla-{}-{name}", std::process::id()))
}

fn filled_state(model: &GlaTransformer) -> GlaState {
    let mut state = model.init_state(2, &Device::flex());
    model.prefill(ids([2, 9], &Device::flex()), &mut state);
    state
}

#[test]
fn states_are_values() {
    let device = Device::flex();
    let path = file("roundtrip");
    for (name, config) in all() {
        let model = drawn(config.init(&device));
        let mut state = filled_state(&model);
        state.save(&path).unwrap();
        state.save(&path).unwrap();
        let mut loaded = GlaState::load(&path, &device).unwrap();
        model.check_state(&loaded).unwrap();
        assert_eq!((loaded.seen(), loaded.num_bytes()), (&[9, 9][..], state.num_bytes()), "{name}");

        let mut branch = state.clone();
        let next = |token| Tensor::<1, Int>::from_data([token, token], &device);
        model.step(next(3), &mut branch);
        let expected = model.step(next(5), &mut state);
        assert_close(name, model.step(next(5), &mut loaded), expected, 0.0);
    }
    let folder = path.parent().unwrap();
    let partial = path.file_name().unwrap().to_string_lossy().into_owned() + ".";
    let left = std::fs::read_dir(folder).unwrap().filter(|entry| {
        entry.as_ref().unwrap().file_name().to_string_lossy().starts_with(&format!(".{partial}"))
    });
    assert_eq!(left.count(), 0, "no partial file is left behind");
    std::fs::remove_file(&path).unwrap();

    let nowhere = folder.join("gla-no-such-folder").join("state");
    let error = filled_state(&config().init(&device)).save(&nowhere).unwrap_err();
    assert!(matches!(error, GlaStateError::Write { .. }), "{error}");
}

#[test]
fn bad_state_files_are_errors() {
    let device = Device::flex();
    let model = cases().pop().unwrap().1.init(&device);
    let path = file("truncated");
    assert!(matches!(GlaState::load(&path, &device), Err(GlaStateError::Read { .. })));
    filled_state(&model).save(&path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    for length in [0, 7, 100, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..length]).unwrap();
        let error = GlaState::load(&path, &device).unwrap_err();
        assert!(matches!(error, GlaStateError::Read { .. }), "{length} bytes: {error}");
    }
    let error = GlaState::load(&path, &device).unwrap_err().to_string();
    let expected = format!("the file has {} bytes, not what its header says", bytes.len() - 1);
    assert!(error.contains(&expected), "{error}");
    std::fs::remove_file(&path).unwrap();

    let state = filled_state(&model);
    let error = |config: GlaTransformerConfig| {
        config.init(&device).check_state(&state).unwrap_err().to_string()
    };
    let mut deep = config();
    deep.num_hidden_layers = 3;
    assert_eq!(error(deep), "the state has 2 layers, the model has 3");
    assert_eq!(error(config()), "conv.0 of the state is superfluous");
    let heads = config().with_num_heads(8);
    let message = "recurrent of the state has shape [2, 4, 4, 8], the layer needs [2, 8, 2, 4]";
    assert_eq!(error(heads), message);
}

#[test]
fn states_are_without_autodiff() {
    let plain = Device::flex();
    let config = cases().pop().unwrap().1;
    let checkpointing = plain.clone().autodiff().gradient_checkpointing();
    for training in [plain.clone().autodiff(), checkpointing] {
        let model = drawn(config.init(&training));
        let mut state = model.init_state(2, &training);
        for _ in 0..2 {
            let logits = model.prefill(ids([2, 7], &training), &mut state);
            assert!(logits.is_tracked());
            let layer = &state.layers[1];
            assert!(!layer.recurrent.as_ref().unwrap().is_autodiff());
            let mut convs = layer.conv.iter().flatten();
            assert!(convs.all(|conv| !conv.is_autodiff()));
        }

        // the same state serves the model without autodiff, and the other way round
        let token = Tensor::<1, Int>::from_data([1, 2], &plain);
        assert!(!model.valid().step(token, &mut state).is_autodiff());
        model.prefill(ids([2, 3], &training), &mut state);
    }
}

/// What loading says of a file with other tensors or metadata than those of a state.
#[test]
fn files_of_something_else_are_errors() {
    use safetensors::tensor::{Dtype, TensorView};
    let path = file("else");
    let zeros = [0u8; 64];
    let load = |tensors: &[(&str, Dtype, &[usize])], format: &str| {
        let views = tensors.iter().map(|(name, dtype, shape)| {
            let len = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            (*name, TensorView::new(*dtype, shape.to_vec(), &zeros[..len]).unwrap())
        });
        let metadata = [("format", format), ("layers", "1")];
        let metadata = metadata.map(|(key, value)| (key.to_string(), value.to_string()));
        let bytes = safetensors::serialize(views, Some(metadata.into())).unwrap();
        std::fs::write(&path, bytes).unwrap();
        match GlaState::load(&path, &Device::flex()) {
            Ok(state) => format!("{:?}", state.seen()),
            Err(error @ GlaStateError::Content { .. }) => {
                let error = error.to_string();
                let (_, reason) = error.split_once(": ").expect("a reason");
                reason.to_string()
            }
            Err(error) => panic!("{error}"),
        }
    };
    let seen = ("layers.0.seen", Dtype::I64, &[2][..]);
    let recurrent = ("layers.0.recurrent", Dtype::F32, &[2, 1, 2, 2][..]);
    let format = "gla-state-1";
    assert_eq!(load(&[seen, recurrent], format), "[0, 0]");
    assert_eq!(load(&[seen, recurrent], "pt"), "the format is pt, expected gla-state-1");
    assert_eq!(load(&[recurrent], format), "tensor layers.0.seen is missing");
    let half = ("layers.0.recurrent", Dtype::F16, &[2, 1, 2, 2][..]);
    assert_eq!(load(&[seen, half], format), "tensor layers.0.recurrent is F16, expected F32");
    let flat = ("layers.0.recurrent", Dtype::F32, &[2, 2, 2][..]);
    assert_eq!(load(&[seen, flat], format), "tensor layers.0.recurrent has rank 3, expected 4");
    let other = ("layers.1.seen", Dtype::I64, &[2][..]);
    assert_eq!(load(&[seen, other], format), "tensor layers.1.seen is not of a state");
    let float = ("layers.0.seen", Dtype::F32, &[2][..]);
    assert_eq!(load(&[float, recurrent], format), "tensor layers.0.seen is F32, expected I64");
    std::fs::remove_file(&path).unwrap();
}

/// Logits after the next token of each sequence.
fn next(model: &GlaTransformer, state: &GlaState) -> Tensor<2> {
    let tokens: Vec<i32> = state.seen().iter().map(|&seen| seen as i32 % 5).collect();
    let tokens = Tensor::<1, Int>::from_data(tokens.as_slice(), &Device::flex());
    model.step(tokens, &mut state.clone())
}

#[test]
fn sequences_are_rows_of_a_batch() {
    for (name, config) in all() {
        rows_of(name, &drawn(config.init(&Device::flex())));
    }
}

fn rows_of(name: &str, model: &GlaTransformer) {
    let device = Device::flex();
    let close = |what: &str, found: Tensor<2>, expected: Tensor<2>| {
        assert_close(&format!("{name}: {what}"), found, expected, 1e-5);
    };
    let row = |logits: &Tensor<2>, row: usize| logits.clone().narrow(0, row, 1);
    let state = {
        let mut state = model.init_state(3, &device);
        model.prefill(ids([3, 9], &device), &mut state);
        state
    };
    let logits = next(model, &state);

    let chosen = next(model, &state.select(&[2, 0, 2]));
    for (to, from) in [2, 0, 2].into_iter().enumerate() {
        close("select", row(&chosen, to), row(&logits, from));
    }
    let branched = state.select(&[1]).repeat(4);
    assert_eq!((branched.batch(), branched.num_bytes()), (4, state.num_bytes() / 3 * 4));
    let branched = next(model, &branched);
    (0..4).for_each(|to| close("repeat", row(&branched, to), row(&logits, 1)));

    // a row that is further than the others replaces one, and one starts anew
    let mut further = state.select(&[1]);
    model.prefill(ids([1, 4], &device), &mut further);
    let alone = next(model, &further);
    let mut slots = state.clone();
    slots.put(0, further.clone());
    let taken = slots.take(2);
    assert_eq!((slots.seen(), taken.seen()), (&[13, 9, 0][..], &[9][..]));
    model.check_state(&slots).unwrap();
    let after = next(model, &slots);
    close("put", row(&after, 0), alone.clone());
    close("untouched", row(&after, 1), row(&logits, 1));
    let start = model.init_state(1, &device);
    let first = next(model, &start);
    close("reset", row(&after, 2), first.clone());
    close("take", next(model, &taken), row(&logits, 2));
    close("the clone", next(model, &state), logits.clone());

    let joined = GlaState::cat(vec![taken, further, start, state.select(&[0, 1])]);
    assert_eq!(joined.seen(), [9, 13, 0, 9, 9]);
    model.check_state(&joined).unwrap();
    let rest = logits.clone().narrow(0, 0, 2);
    let expected = Tensor::cat(vec![row(&logits, 2), alone, first, rest], 0);
    close("cat", next(model, &joined), expected);
}

/// Tensors that grow with time are filled up in front; a sequence without tokens may have none.
#[test]
fn rows_of_different_lengths_are_joined() {
    let device = Device::flex();
    let state = |seen: &[usize], keys: Option<Tensor<4>>| GlaState {
        layers: vec![LayerState {
            seen: seen.to_vec(),
            values: keys.clone(),
            keys,
            ..Default::default()
        }],
    };
    let keys = |values: &[&[f32]]| {
        let data: Vec<f32> = values.concat();
        let shape = [values.len(), values[0].len(), 1, 1];
        Some(Tensor::from_data(burn::tensor::TensorData::new(data, shape), &device))
    };
    let found = |state: &GlaState| -> Vec<f32> {
        let keys = state.layers[0].keys.clone().unwrap();
        assert_eq!(keys.dims()[0], state.batch());
        keys.try_into_vec_as().unwrap()
    };
    let (short, long) = (state(&[1], keys(&[&[1.0]])), state(&[3], keys(&[&[2.0, 3.0, 4.0]])));
    let joined = GlaState::cat(vec![short.clone(), state(&[0], None), long.clone()]);
    assert_eq!(joined.seen(), [1, 0, 3]);
    assert_eq!(found(&joined), [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 2.0, 3.0, 4.0]);

    let mut slots = GlaState::cat(vec![short.clone(), short]);
    slots.put(1, long);
    assert_eq!(found(&slots), [0.0, 0.0, 1.0, 2.0, 3.0, 4.0]);
    slots.put(1, state(&[0], None));
    slots.reset(0);
    assert_eq!(slots.seen(), [0, 0]);
}

#[test]
#[should_panic(expected = "GlaState: no row 2 in a state of 2 sequences")]
fn a_row_beyond_the_batch_is_refused() {
    filled_state(&config().init(&Device::flex())).reset(2);
}

#[test]
#[should_panic(
    expected = "GlaState: recurrent of the states has shapes [2, 4, 4, 8] and [2, 8, 2, 4]"
)]
fn states_of_other_models_are_not_joined() {
    let heads = config().with_num_heads(8);
    let states = [config(), heads].map(|config| filled_state(&config.init(&Device::flex())));
    GlaState::cat(states.into());
}

/// A state is saved by a model of one type and serves the same model in another.
#[test]
fn states_serve_models_of_another_type() {
    let device = Device::flex();
    let path = file("another-type");
    for (name, config) in all() {
        let half = drawn(config.init(&device)).map(&mut Cast(DType::BF16));
        let full = half.clone().map(&mut Cast(DType::F32));
        for (from, to) in [(&half, &full), (&full, &half)] {
            filled_state(from).save(&path).unwrap();
            let mut state = GlaState::load(&path, &device).unwrap();
            to.check_state(&state).unwrap();
            let step = |model: &GlaTransformer, state: &mut GlaState| {
                let ids = Tensor::<1, Int>::full([state.batch()], 3, &device);
                model.step(ids, state).cast(DType::F32)
            };
            let expected = step(from, &mut state.clone());
            let mut joined = GlaState::cat(vec![filled_state(to), state.clone()]);
            let close = |found| {
                let error = relative_rms(found, expected.clone());
                assert!(error < 1e-1, "{name}: {error}");
            };
            close(step(to, &mut state));
            close(step(to, &mut joined).narrow(0, 2, 2));
            let layer = &state.layers[0];
            let mut own = layer.conv.iter().flatten().map(Tensor::dtype).collect::<Vec<_>>();
            own.extend(layer.keys.iter().chain(&layer.values).map(Tensor::dtype));
            assert!(own.iter().all(|dtype| *dtype == to.embeddings.weight.val().dtype()), "{name}");
        }
    }
    std::fs::remove_file(&path).unwrap();
}

/// What a model without a window would read is no longer there.
#[test]
fn a_state_of_a_shorter_window_is_refused() {
    let device = Device::flex();
    let model = |window| {
        let attention = SoftmaxAttentionConfig::new(32, 4).with_window_size(window);
        config().with_mixer(Some(MixerConfig::SoftmaxAttention(attention))).init(&device)
    };
    let (narrow, wide, unbounded) = (model(Some(5)), model(Some(7)), model(None));
    let state = filled_state(&narrow);
    let error = |model: &GlaTransformer| model.check_state(&state).unwrap_err().to_string();
    let needs = |length| {
        format!("keys of the state has shape [2, 5, 4, 8], the layer needs [2, {length}, 4, 8]")
    };
    assert_eq!((error(&wide), error(&unbounded)), (needs(7), needs(9)));

    // a longer one holds all that is read, and so does one of fewer tokens
    narrow.check_state(&filled_state(&unbounded)).unwrap();
    let mut short = narrow.init_state(2, &device);
    narrow.prefill(ids([2, 4], &device), &mut short);
    unbounded.check_state(&short).unwrap();
    // the longest sequence of a batch may have left it
    let mut rest = filled_state(&unbounded);
    rest.reset(0);
    rest.reset(1);
    unbounded.check_state(&rest).unwrap();
}

/// After a panic between two layers, some have seen a token and some have not.
#[test]
fn a_state_whose_layers_have_seen_different_tokens_is_refused() {
    let device = Device::flex();
    let model = config().init(&device);
    let mut state = filled_state(&model);
    state.layers[1].seen = vec![9, 8];
    let expected = "layer 1 of the state has seen [9, 8] tokens, layer 0 has seen [9, 9]";
    assert_eq!(model.check_state(&state).unwrap_err().to_string(), expected);
    let step = || drop(model.step(Tensor::from_data([1, 1], &device), &mut state));
    let panic = catch_unwind(AssertUnwindSafe(step)).expect_err("refused");
    assert_eq!(*panic.downcast::<String>().unwrap(), format!("GlaTransformer: {expected}"));
}

/// A step that panics has taken the recurrent state out; zeros must not take its place.
#[test]
fn a_state_that_lost_its_memory_is_refused() {
    let device = Device::flex();
    let layer = drawn(gla(&config()).init(&device));
    let text = |result: std::thread::Result<()>| -> String {
        *result.expect_err("refused").downcast().expect("a message")
    };
    let step = |width: usize, state: &mut LayerState| {
        let x = Tensor::zeros([2, width], &device);
        text(catch_unwind(AssertUnwindSafe(|| drop(layer.step(x, state)))))
    };
    let mut state = layer.init_state(2, &device);
    step(31, &mut state);
    assert!(state.recurrent.is_some(), "a wrong input leaves the state alone");
    // a gate that grows: the op refuses it after the state was taken
    let mut broken = layer.clone();
    broken.gate_logit_normalizer = -1.0;
    let x = Tensor::zeros([2, 32], &device);
    let found = text(catch_unwind(AssertUnwindSafe(|| drop(broken.step(x, &mut state)))));
    assert!(found.starts_with("gla_step: gate: must be at most 0, the largest is "), "{found}");

    let expected = "GatedLinearAttention: recurrent of the state is missing";
    assert_eq!(step(32, &mut state), expected);
    let x = Tensor::zeros([2, 3, 32], &device);
    let prefill = catch_unwind(AssertUnwindSafe(|| drop(layer.prefill(x, &mut state))));
    assert_eq!(text(prefill), expected);
    state.recurrent = layer.init_state(2, &device).recurrent;
    layer.step(Tensor::zeros([2, 32], &device), &mut state);
}
