//! `cargo test --release -p gla-lm --lib -- checkpoint`

use burn::nn::{Linear, LinearConfig};
use burn::optim::GradientsParams;

use super::*;
use crate::device::test_device;
use crate::optimizer::{adamw, with_stable_ids};

/// A model after one step, and its optimizer.
fn example() -> (Linear, ModuleOptimizer) {
    let model = with_stable_ids(LinearConfig::new(3, 2).init(&test_device().autodiff()));
    let mut optimizer = adamw(&model, 0.1);
    let loss = model.weight.val().square().sum();
    let grads = GradientsParams::from_grads(loss.backward(), &model);
    (optimizer.step(0.1, model, grads), optimizer)
}

fn weights(model: &Linear) -> Vec<f32> {
    model.weight.val().try_into_vec_as().unwrap()
}

fn steps(run: &Path) -> Vec<usize> {
    list(run).unwrap().into_iter().map(|(step, _)| step).collect()
}

fn save(run: &RunFolder, step: usize, bits: f64, keep: usize) {
    let (model, optimizer) = example();
    run.save(State::new(step, bits, 1.5), model, &optimizer, keep).unwrap();
}

#[test]
fn what_is_saved_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let run = RunFolder::open(dir.path()).unwrap();
    let (model, mut optimizer) = example();
    run.save(State::new(7, 2.5, 1.5), model.clone(), &optimizer, 2).unwrap();

    let checkpoint = Checkpoint::latest(dir.path()).unwrap().unwrap();
    assert_eq!((checkpoint.state.step, checkpoint.state.valid_bits), (7, 2.5));
    let (other, _) = example();
    let loaded = checkpoint.load_model(other).unwrap();
    assert_eq!(weights(&loaded), weights(&model));

    // the next step needs the moments and the ids as well
    let mut restored = checkpoint.load_optimizer(adamw(&loaded, 0.1)).unwrap();
    let next = |model: Linear, optimizer: &mut ModuleOptimizer| {
        let loss = model.weight.val().square().sum();
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        weights(&optimizer.step(0.1, model, grads))
    };
    assert_eq!(next(loaded, &mut restored), next(model, &mut optimizer));
}

#[test]
fn the_latest_and_the_best_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let run = RunFolder::open(dir.path()).unwrap();
    for (step, bits) in [(10, 3.0), (20, 2.0), (30, 2.5), (40, 2.2), (50, 2.1)] {
        save(&run, step, bits, 2);
    }
    assert_eq!(steps(dir.path()), [20, 40, 50]);
    assert!(find(dir.path()).unwrap().ends_with("step-00000020"));
    let direct = dir.path().join("step-00000040");
    assert_eq!(find(&direct).unwrap(), direct);

    // the best of those that can be read; `tests/resume.rs` looks at what is said about the other
    for (spoilt, left) in [(20, Some("step-00000050")), (50, Some("step-00000040")), (40, None)] {
        fs::write(dir.path().join(folder_name(spoilt)).join(STATE), "{").unwrap();
        match (left, find(dir.path())) {
            (Some(left), found) => assert!(found.unwrap().ends_with(left)),
            (None, found) => {
                let error = found.unwrap_err().to_string();
                assert!(error.ends_with("3 of 3 checkpoints, none is left"), "{error}");
            }
        }
    }
}

#[test]
fn leftovers_of_a_killed_process_are_no_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join(".step-00000010")).unwrap();
    fs::create_dir(dir.path().join("step-x")).unwrap();
    RunFolder::open(dir.path()).unwrap();
    assert!(!dir.path().join(".step-00000010").exists());
    assert!(Checkpoint::latest(dir.path()).unwrap().is_none());
    let error = find(dir.path()).unwrap_err().to_string();
    assert!(error.contains("holds no checkpoint"), "{error}");
}

#[test]
fn damage_is_named_and_the_earlier_checkpoint_still_loads() {
    let dir = tempfile::tempdir().unwrap();
    let run = RunFolder::open(dir.path()).unwrap();
    save(&run, 10, 3.0, 2);
    save(&run, 20, 2.0, 2);
    let file = dir.path().join("step-00000020").join(MODEL);
    let whole = fs::read(&file).unwrap();
    let message = |bytes: &[u8]| {
        fs::write(&file, bytes).unwrap();
        format!("{:#}", Checkpoint::latest(dir.path()).unwrap_err())
    };

    let error = message(&whole[..whole.len() / 2]);
    assert!(error.contains(MODEL), "{error}");
    let sizes = format!("{} bytes, but was written with {}", whole.len() / 2, whole.len());
    assert!(error.contains(&sizes), "{error}");
    assert!(error.contains("to go on from"), "{error}");
    assert!(error.contains("step-00000010"), "{error}");

    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;
    assert!(message(&flipped).contains("damaged"));

    fs::remove_file(&file).unwrap();
    let error = format!("{:#}", Checkpoint::latest(dir.path()).unwrap_err());
    assert!(error.contains("cannot read checkpoint file"), "{error}");

    let earlier = Checkpoint::open(&dir.path().join("step-00000010")).unwrap();
    let (model, _) = example();
    earlier.load_model(model).unwrap();
}

#[test]
fn sampling_needs_the_model_alone() {
    let dir = tempfile::tempdir().unwrap();
    let run = RunFolder::open(dir.path()).unwrap();
    save(&run, 10, 3.0, 2);
    let path = dir.path().join("step-00000010");
    let model = || example().0;

    fs::write(path.join(OPTIMIZER), "damaged").unwrap();
    Checkpoint::open_model(&path).unwrap().load_model(model()).unwrap();
    let error = Checkpoint::open(&path).unwrap_err().to_string();
    assert!(error.contains("optimizer.bpk has 7 bytes"), "{error}");
    fs::remove_file(path.join(OPTIMIZER)).unwrap();
    Checkpoint::open_model(&path).unwrap().load_model(model()).unwrap();

    fs::write(path.join(MODEL), "damaged").unwrap();
    let error = Checkpoint::open_model(&path).unwrap_err().to_string();
    assert!(error.contains("model.bpk has 7 bytes"), "{error}");

    // nothing vouches for a record that the state does not list
    let unlisted = r#"{"step": 10, "valid_bits": 3.0, "seconds": 1.5, "files": []}"#;
    fs::write(path.join(STATE), unlisted).unwrap();
    let error = Checkpoint::open_model(&path).unwrap_err().to_string();
    assert!(error.contains("state.json does not list model.bpk"), "{error}");
}

#[test]
fn errors_name_a_file_once() {
    let dir = tempfile::tempdir().unwrap();
    let run = RunFolder::open(dir.path()).unwrap();
    save(&run, 10, 3.0, 2);
    let path = dir.path().join("step-00000010");
    let once = |error: anyhow::Error, file: &Path, reason: &str| {
        let text = format!("{error:#}");
        assert_eq!(text.matches(&file.display().to_string()).count(), 1, "{text}");
        assert_eq!(text.matches(reason).count(), 1, "{text}");
        text
    };

    let whole = Checkpoint::open(&path).unwrap();
    for (reason, spoil) in [
        ("os error", fs::remove_file as fn(PathBuf) -> _),
        ("magic", |file| fs::write(file, [b'x'; 99])),
    ] {
        let (model, optimizer) = example();
        spoil(path.join(OPTIMIZER)).unwrap();
        let error = whole.load_optimizer(optimizer).map(|_| ()).unwrap_err();
        once(error, &path.join(OPTIMIZER), reason);
        spoil(path.join(MODEL)).unwrap();
        once(whole.load_model(model).unwrap_err(), &path.join(MODEL), reason);
    }
    let latest = || Checkpoint::latest(dir.path()).unwrap_err();
    let text = once(latest(), &path, "has 99 bytes");
    assert!(text.ends_with("; start anew with --fresh"), "{text}");
    fs::write(path.join(STATE), "{").unwrap();
    once(latest(), &path, "EOF while parsing");

    // a folder cannot be replaced by a file
    let state = dir.path().join(".step-00000020").join(STATE);
    fs::create_dir_all(state.join("x")).unwrap();
    let (model, optimizer) = example();
    let error = run.save(State::new(20, 2.0, 1.5), model, &optimizer, 2).unwrap_err();
    once(error, &state, "cannot write checkpoint");
}

#[test]
fn one_process_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let first = RunFolder::open(dir.path()).unwrap();
    let error = RunFolder::open(dir.path()).err().unwrap().to_string();
    assert!(error.contains("another process trains in"), "{error}");
    drop(first);
    RunFolder::open(dir.path()).unwrap();
}

#[test]
fn a_replaced_checkpoint_is_put_back_if_its_successor_never_came() {
    let dir = tempfile::tempdir().unwrap();
    let run = RunFolder::open(dir.path()).unwrap();
    save(&run, 10, 3.0, 2);
    save(&run, 10, 2.0, 2);
    assert_eq!(Checkpoint::latest(dir.path()).unwrap().unwrap().state.valid_bits, 2.0);
    drop(run);
    // as a crash between the two renames leaves it
    let (target, aside) = (dir.path().join("step-00000010"), ".step-00000010.replaced");
    fs::rename(&target, dir.path().join(aside)).unwrap();
    assert!(Checkpoint::latest(dir.path()).unwrap().is_none());
    let _run = RunFolder::open(dir.path()).unwrap();
    assert_eq!(Checkpoint::latest(dir.path()).unwrap().unwrap().state.step, 10);
}
