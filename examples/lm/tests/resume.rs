//! `train` and `generate` as processes: killed, resumed, damaged, misused.
//!
//! `cargo test --release -p gla-lm --test resume`

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const SOURCES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src");
const STEPS: usize = 60;

const SIZES: &str = "--hidden 32 --layers 2 --heads 2 --batch 4 --context 48 --seed 3";
const PACE: &str = "--steps 60 --checkpoint-every 10 --log-every 1";

/// A tiny run on this crate's own sources, on the CPU.
fn train(out: &Path) -> Command {
    train_on(SOURCES.as_ref(), out)
}

fn train_on(data: &Path, out: &Path) -> Command {
    let mut command = train_at(PACE, out);
    command.arg("--data").arg(data);
    command
}

/// On the default corpus, if nobody adds another.
fn train_at(pace: &str, out: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_train"));
    command.args(["--device", "cpu", "--out"]).arg(out);
    command.args(SIZES.split_whitespace()).args(pace.split_whitespace());
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
fn runs_of_other_mixers_resume_too() {
    let dir = tempfile::tempdir().unwrap();
    let kinds = ["retention", "linear-attention", "hgrn2", "mamba2", "mamba", "softmax-attention"];
    for kind in kinds {
        let out = dir.path().join(kind);
        let command = |kind: &str| {
            let mut command = train_at("--steps 20 --checkpoint-every 10 --log-every 1", &out);
            command.args(["--data", SOURCES, "--mixer", kind]);
            command
        };
        let sample = |stdout: &str| stdout.split_once("sample:").unwrap().1.to_string();
        let whole = sample(&success(&mut command(kind)));
        let config = fs::read_to_string(out.join("config.json")).unwrap();
        assert!(config.contains(&format!("\"{}\": {{", kind.replace('-', "_"))), "{config}");
        let weights = || fs::read(step(&out, 20).join("model.bpk")).unwrap();
        let expected = weights();

        fs::remove_dir_all(step(&out, 20)).unwrap();
        assert!(step(&out, 10).is_dir());
        assert_eq!(sample(&success(&mut command(kind))), whole, "{kind}");
        assert!(weights() == expected, "{kind}: weights differ");
        let error = failure(&mut command("simple-gla"));
        assert!(error.contains(&format!("--mixer simple-gla (the run has {kind})")), "{error}");
    }
}

#[test]
fn damage_and_misuse_are_explained() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    success(&mut train(&out));

    // options that contradict the run
    let error = failure(train(&out).args(["--lr", "0.5"]));
    assert!(error.contains("--lr 0.5 (the run has"), "{error}");

    let error = failure(train(&out).args(["--corpus-mb", "7"]));
    assert!(error.contains("--corpus-mb 7 (the run has the default)"), "{error}");

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
    let two = success(&mut generate(&earlier, &format!("{options} --samples 2")));
    assert!(two.starts_with(&format!("--- sample 1 of 2\n{}", text.trim_end())), "{two}");
    assert!(two.contains("--- sample 2 of 2\nfn"), "{two}");

    // damage that sampling can do without: it says what it passes over, and leaves the optimizer
    fs::write(earlier.join("optimizer.bpk"), "damaged").unwrap();
    assert_eq!(text, success(&mut generate(&earlier, options)));
    let state = latest.join("state.json");
    fs::write(&state, "{").unwrap();
    let sampled = run(&mut generate(&out, options));
    let stderr = String::from_utf8_lossy(&sampled.stderr);
    assert!(sampled.status.success(), "{stderr}");
    let passed_over = format!("passed over {}: EOF while parsing", state.display());
    assert_eq!(stderr.matches(&passed_over).count(), 1, "{stderr}");

    for spoilt in [&latest, &earlier] {
        fs::remove_dir_all(spoilt).unwrap();
    }
    success(&mut train(&out));
    assert!(fs::read(&file).unwrap() == bytes, "the last steps were redone");

    // --fresh keeps the old run under another name
    success(train(&out.join("")).args(["--fresh", "--minutes", "0.0001"]));
    assert!(dir.path().join("run.old-1").join("config.json").is_file());
    // which a folder needs for that
    let error = failure(train(Path::new(".")).current_dir(&out).arg("--fresh"));
    assert!(error.contains("call . by its own"), "{error}");
    assert!(!file.exists());
}

/// The line of `config.json` or of the output that names a hash, cut down to the hash.
fn hash_after(text: &str, label: &str) -> String {
    let (_, rest) = text.split_once(label).unwrap_or_else(|| panic!("no {label} in {text}"));
    rest.chars().filter(char::is_ascii_hexdigit).take(16).collect()
}

fn hash_of_run(out: &Path) -> String {
    hash_after(&fs::read_to_string(out.join("config.json")).unwrap(), "\"corpus_hash\":")
}

#[test]
fn a_run_refuses_another_text() {
    let dir = tempfile::tempdir().unwrap();
    let (out, data) = (dir.path().join("run"), dir.path().join("text"));
    fs::write(&data, "one line of text\n".repeat(200)).unwrap();
    let stop = ["--minutes", "0.0001"];
    success(train_on(&data, &out).args(stop));
    let trained_on = hash_of_run(&out);

    let other = dir.path().join("other");
    fs::copy(&data, &other).unwrap();
    let error = failure(&mut train_on(&other, &out));
    let paths = format!("--data {} (the run has {})", other.display(), data.display());
    assert!(error.contains(&paths), "{error}");

    fs::write(&data, "one line of prose\n".repeat(200)).unwrap();
    let scan = run(train_at("--steps 0", &dir.path().join("scan")).arg("--data").arg(&data));
    let changed = hash_after(&String::from_utf8_lossy(&scan.stderr), ", hash ");
    let error = failure(&mut train_on(&data, &out));
    let expected = format!("--data {} has the hash {changed}, but", data.display());
    assert!(error.contains(&expected), "{error}");
    assert!(error.contains(&format!("trained on one with {trained_on}")), "{error}");
    assert!(error.contains("--fresh"), "{error}");
}

#[test]
fn damage_of_the_kept_corpus_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let default_corpus = || train_at("--corpus-mb 1 --minutes 0.0001", &out);
    success(&mut default_corpus());
    let (file, trained_on) = (out.join("corpus.bin"), hash_of_run(&out));
    let whole = fs::read(&file).unwrap();

    fs::write(&file, &whole[..whole.len() - 1]).unwrap();
    let error = failure(&mut default_corpus());
    let sizes = format!("has {} bytes, but was written with {}", whole.len() - 1, whole.len());
    assert!(error.contains("corpus.bin") && error.contains(&sizes), "{error}");

    let mut altered = whole.clone();
    *altered.last_mut().unwrap() ^= 1;
    fs::write(&file, altered).unwrap();
    let error = failure(&mut default_corpus());
    assert!(error.contains("corpus.bin has the hash"), "{error}");
    assert!(error.contains(&format!("trained on {trained_on}: the file is damaged")), "{error}");

    fs::write(&file, whole).unwrap();
    success(&mut default_corpus());
}

#[test]
fn a_run_stops_on_time_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    // no line of output and no checkpoint falls into the time
    let pace = "--steps 1000000 --checkpoint-every 1000000 --log-every 1000000";
    let mut command = train_at(pace, &out);
    command.args(["--minutes", "0.02", "--data", SOURCES]);
    let log = |command: &mut Command| -> Vec<(u64, bool)> {
        success(command);
        let text = fs::read_to_string(out.join("log.jsonl")).unwrap();
        let entries = text.lines().map(|line| serde_json::from_str(line).unwrap());
        entries
            .map(|e: serde_json::Value| (e["step"].as_u64().unwrap(), e["valid_bits"].is_f64()))
            .collect()
    };
    let first = log(&mut command);
    let [(1, false), (stopped, true)] = first[..] else { panic!("{first:?}") };
    assert!(stopped < 1_000_000 && step(&out, stopped as usize).is_dir());
    let state = fs::read_to_string(step(&out, stopped as usize).join("state.json")).unwrap();
    let state: serde_json::Value = serde_json::from_str(&state).unwrap();
    let seconds = state["seconds"].as_f64().unwrap();
    // one step of this model takes some milliseconds, even on a machine with other work
    assert!((1.0..4.0).contains(&seconds), "{seconds} s instead of 1.2");

    let second = log(&mut command);
    assert_eq!(second[..2], first[..]);
    assert!(second.last().unwrap().0 > stopped, "{second:?}");

    for minutes in ["0", "-1", "inf", "NaN", "1e300"] {
        let error = failure(train(&out).arg(format!("--minutes={minutes}")));
        assert!(error.contains("--minutes is "), "{error}");
    }
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
    assert!(error.contains("top_p is 2, expected above 0 and at most 1"), "{error}");
}
