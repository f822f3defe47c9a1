//! States as values: cloned, saved, loaded, refused, and free of autodiff graphs.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use gla_burn::{GlaState, GlaStateError, GlaTransformer, GlaTransformerConfig, LayerState};

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
    let model = drawn(cases().pop().unwrap().1.init(&device));
    let mut state = filled_state(&model);
    let path = file("roundtrip");
    state.save(&path).unwrap();
    state.save(&path).unwrap();
    let mut loaded = GlaState::load(&path, &device).unwrap();
    std::fs::remove_file(&path).unwrap();
    model.check_state(&loaded).unwrap();
    assert_eq!((loaded.seen(), loaded.num_bytes()), (&[9, 9][..], state.num_bytes()));

    let mut branch = state.clone();
    let next = |token| Tensor::<1, Int>::from_data([token, token], &device);
    model.step(next(3), &mut branch);
    let expected = model.step(next(5), &mut state);
    assert_close("loaded", model.step(next(5), &mut loaded), expected, 0.0);
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
    assert!(error.contains("File truncated: expected at least"), "{error}");
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
