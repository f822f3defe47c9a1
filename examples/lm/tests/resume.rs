//! `train` and `generate` as processes: killed, resumed, damaged, misused.
//!
//! `cargo test --release -p gla-lm --test resume`

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const STEPS: usize = 60;

/// A tiny run on this crate's own sources, on the CPU.
fn train(out: &Path) -> Command {
    train_on(concat!(env!("CARGO_MANIFEST_DIR"), "/src").as_ref(), out)
}

fn train_on(data: &Path, out: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_train"));
    command.args(["--device", "cpu", "--data"]).arg(data);
    command.arg("--out").arg(out);
    let options = "--hidden 32 --layers 2 --heads 2 --batch 4 --context 48 --steps 60 \
                   --checkpoint-every 10 --log-every 1 --seed 3";
    command.args(options.split_whitespace());
    command
}

fn generate(checkpoint: &Path, options: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_generate"));
    command.args(["--device", "cpu", "--checkpoint"]);
    command.arg(checkpoint);
    command.args(options.split_whitespace());
    command
}

fn run(command: &mut Command) -> Output {
    command.output().expect("the program starts")
}

fn success(command: &mut Command) -> String {
    let output = run(command);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}\n{stderr}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn failure(command: &mut Command) -> String {
    let output = run(command);
    assert!(!output.status.success(), "{command:?} succeeded");
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!stderr.contains("panicked"), "{stderr}");
    stderr
}

fn step(out: &Path, step: usize) -> std::path::PathBuf {
    out.join(format!("step-{step:08}"))
}

/// Weights, losses and sample: all that must not depend on interruptions.
fn outcome(out: &Path, stdout: &str) -> (Vec<u8>, String, String) {
    let weights = fs::read(step(out, STEPS).join("model.bpk")).unwrap();
    let log = fs::read_to_string(out.join("log.jsonl")).unwrap();
    let sample = stdout.split_once("sample:").unwrap().1.to_string();
    (weights, log, sample)
}

/// Start a run and kill it as soon as the checkpoint of `at` is there.
fn kill_at(out: &Path, at: usize) {
    let mut child = train(out).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let begin = Instant::now();
    while !step(out, at).exists() {
        assert!(
            begin.elapsed() < Duration::from_secs(120),
            "no checkpoint of step {at} after two minutes"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    // SIGKILL on Unix
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!step(out, STEPS).exists(), "the run was over before the kill");
}

#[test]
fn a_killed_run_ends_like_an_uninterrupted_one() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, killed) = (dir.path().join("whole"), dir.path().join("killed"));
    let stdout = success(&mut train(&whole));
    let expected = outcome(&whole, &stdout);
    assert_eq!(expected.1.lines().count(), STEPS, "a log line per step");

    kill_at(&killed, 10);
    kill_at(&killed, 30);
    let stdout = success(&mut train(&killed));
    let resumed = outcome(&killed, &stdout);
    assert_eq!(resumed.1, expected.1, "losses");
    assert_eq!(resumed.2, expected.2, "sample");
    assert!(resumed.0 == expected.0, "weights differ");

    // a run that is complete only reports
    let again = success(&mut train(&killed));
    assert_eq!(again, stdout);
}

#[test]
fn damage_and_misuse_are_explained() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    success(&mut train(&out));

    // options that contradict the run
    let error = failure(train(&out).args(["--lr", "0.5"]));
    assert!(error.contains("--lr 0.5 (the run has"), "{error}");

    // a truncated checkpoint
    let latest = step(&out, STEPS);
    let file = latest.join("model.bpk");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..1000]).unwrap();
    for error in [failure(&mut train(&out)), failure(&mut generate(&latest, "--tokens 5"))] {
        assert!(error.contains("model.bpk has 1000 bytes"), "{error}");
        assert!(error.contains(&format!("written with {}", bytes.len())), "{error}");
    }
    assert_eq!(fs::read(&file).unwrap().len(), 1000, "nothing was repaired silently");

    // the one before it still works, for both programs
    let earlier = step(&out, STEPS - 10);
    let options = "--prompt fn --tokens 40 --seed 5 --top-k 20";
    let text = success(&mut generate(&earlier, options));
    assert!(text.starts_with("fn"), "{text}");
    assert!(text.len() >= 2 + 40, "{text}");
    assert_eq!(text, success(&mut generate(&earlier, options)));
    fs::remove_dir_all(&latest).unwrap();
    success(&mut train(&out));
    assert!(fs::read(&file).unwrap() == bytes, "the last steps were redone");

    // --fresh keeps the old run under another name
    success(train(&out).args(["--fresh", "--minutes", "0.0001"]));
    assert!(dir.path().join("run.old-1").join("config.json").is_file());
    assert!(!file.exists());
}

#[test]
fn missing_things_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let error = failure(&mut train_on("no/such/file".as_ref(), &out));
    assert!(error.contains("no/such/file"), "{error}");

    let short = dir.path().join("short.txt");
    fs::write(&short, "too short").unwrap();
    let error = failure(&mut train_on(&short, &out));
    assert!(error.contains("--context 48 needs at least 49"), "{error}");

    let error = failure(&mut generate(&out, "--tokens 5"));
    assert!(error.contains("holds no checkpoint"), "{error}");
    let error = failure(&mut generate(&dir.path().join("nowhere"), "--tokens 5"));
    assert!(error.contains("nowhere"), "{error}");
    let error = failure(&mut generate(&out, "--top-p 2"));
    assert!(error.contains("--top-p is 2"), "{error}");
}
