//! `lm` as a process: a run becomes a checkpoint of flash-linear-attention, which generates the same
//! text; logits of given ids; a checkpoint with a tokenizer.
//!
//! `cargo test --release -p gla-lm --test pretrained`

#![cfg(feature = "flex")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use burn::tensor::{Device, Int, Tensor, TensorData};
use gla_burn::checkpoint::{Checkpoint, CheckpointConfig, SaveOptions, save};
use gla_burn::{GlaTransformer, GlaTransformerConfig};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use tempfile::TempDir;
use tokenizers::Tokenizer;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

const SOURCES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/bin");

fn lm(subcommand: &str, options: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lm"));
    command.arg(subcommand).args(options);
    command
}

fn run(mut command: Command) -> Output {
    command.output().expect("the program starts")
}

fn success(command: Command) -> String {
    let name = format!("{command:?}");
    let output = run(command);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name}\n{stderr}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn failure(command: Command) -> String {
    let output = run(command);
    assert!(!output.status.success());
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!stderr.contains("panicked"), "{stderr}");
    stderr
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a temporary folder is UTF-8")
}

/// A model with random weights of some size, and the folder that it was saved to.
fn pretrained(config: &CheckpointConfig) -> (GlaTransformer, TempDir) {
    let device = Device::flex();
    device.seed(11);
    let model = config.model.init(&device);
    let folder = tempfile::tempdir().unwrap();
    save(&model, config, folder.path(), &SaveOptions::default()).unwrap();
    (model, folder)
}

fn config(vocabulary: usize) -> CheckpointConfig {
    let model = GlaTransformerConfig::new(vocabulary, 16, 2).with_initializer_range(0.5);
    CheckpointConfig::new(model.with_num_heads(2))
}

fn forward(model: &GlaTransformer, ids: &[i32]) -> Vec<f32> {
    let ids = TensorData::new(ids.to_vec(), [1, ids.len()]);
    let logits = model.forward(Tensor::<2, Int>::from_data(ids, &Device::flex()));
    logits.into_data().try_into_vec().unwrap()
}

#[test]
fn an_exported_run_says_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let (run, exported) = (dir.path().join("run"), dir.path().join("exported"));
    let sizes = "--hidden 32 --layers 2 --heads 2 --batch 4 --context 48 --steps 20";
    let mut train = lm("train", &["--device", "cpu", "--data", SOURCES, "--out", text(&run)]);
    train.args(sizes.split_whitespace());
    success(train);
    let export = ["--checkpoint", text(&run), "--output", text(&exported)];
    assert!(success(lm("export", &export)).contains("wrote"));
    let error = failure(lm("export", &export));
    assert!(error.contains("is there already and not empty"), "{error}");

    let prompt = ["--prompt", "pub fn ", "--tokens", "40", "--device", "cpu"];
    let mut before = lm("generate", &prompt);
    let mut after = lm("generate", &prompt);
    before.arg("--checkpoint").arg(&run);
    after.arg("--model").arg(&exported);
    let expected = success(before);
    assert!(expected.starts_with("pub fn "), "{expected}");
    assert_eq!(success(after), expected);

    let config = Checkpoint::open(&exported).unwrap().config().clone();
    assert_eq!((config.bos_token_id, config.eos_token_ids), (Some(0), vec![0]));
}

#[test]
fn logits_are_the_models() {
    let (model, folder) = pretrained(&config(40));
    let [input, output] = ["in.safetensors", "out.safetensors"].map(|f| folder.path().join(f));
    let logits = || {
        let paths = [text(folder.path()), text(&input), text(&output)];
        let [m, i, o] = paths;
        lm("logits", &["--model", m, "--input", i, "--output", o, "--device", "cpu"])
    };
    let write = |name: &str, dtype: Dtype, shape: &[usize], bytes: Vec<u8>| {
        let view = TensorView::new(dtype, shape.to_vec(), &bytes).unwrap();
        safetensors::serialize_to_file([(name, view)], None, &input).unwrap();
    };
    let ids: Vec<i32> = (0..66).map(|i| i * i % 40).collect();
    let narrow = |ids: &[i32]| ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>();
    let wide = ids.iter().flat_map(|id| i64::from(*id).to_le_bytes()).collect();

    let expected = [forward(&model, &ids[..33]), forward(&model, &ids[33..])].concat();
    for (dtype, bytes) in [(Dtype::I32, narrow(&ids)), (Dtype::I64, wide)] {
        write("ids", dtype, &[2, 33], bytes);
        assert!(success(logits()).contains("wrote logits [2, 33, 40]"));
        let file = fs::read(&output).unwrap();
        let tensors = SafeTensors::deserialize(&file).unwrap();
        let found = tensors.tensor("logits").unwrap();
        assert_eq!((found.dtype(), found.shape()), (Dtype::F32, &[2, 33, 40][..]));
        let found = found.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b));
        let error = found.zip(&expected).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
        assert!(error < 1e-4, "{error}");
    }

    write("ids", Dtype::I32, &[2, 3], narrow(&[1, 2, 3, 4, 40, 5]));
    let unknown = failure(logits());
    assert!(
        unknown.contains("ids[1, 1] is 40, but the model knows the tokens 0 to 39"),
        "{unknown}"
    );
    write("ids", Dtype::I64, &[1, 1], (1_i64 << 40).to_le_bytes().to_vec());
    assert!(failure(logits()).contains("ids[0, 0] is 1099511627776, but the model"));
    write("ids", Dtype::I32, &[6], narrow(&[0; 6]));
    assert!(failure(logits()).contains("ids has shape [6], expected [B, T]"));
    write("ids", Dtype::F32, &[1, 6], vec![0; 24]);
    assert!(failure(logits()).contains("ids is F32, expected I32 or I64"));
    write("tokens", Dtype::I32, &[1, 6], vec![0; 24]);
    assert!(failure(logits()).contains("in.safetensors is no safetensors file with a tensor ids"));
}

/// A tokenizer of 256 bytes, `<s>`, `</s>` and some pairs.
fn tokenizer() -> Tokenizer {
    let mut alphabet: Vec<String> = ByteLevel::alphabet().into_iter().map(String::from).collect();
    alphabet.sort();
    let merges = [("t", "h"), ("th", "e"), ("i", "n")].map(|(a, b)| (a.into(), b.into()));
    let pairs = ["<s>", "</s>", "th", "the", "in"].map(String::from);
    let vocabulary: Vec<(String, u32)> = alphabet.into_iter().chain(pairs).zip(0..).collect();
    let vocabulary: [_; 261] = vocabulary.try_into().expect("256 bytes and 5 more");
    let model = BPE::builder().vocab_and_merges(vocabulary, merges.to_vec());
    let mut tokenizer = Tokenizer::new(model.build().unwrap());
    tokenizer
        .with_pre_tokenizer(Some(ByteLevel::new(false, true, false)))
        .with_decoder(Some(ByteLevel::default()));
    tokenizer
}

#[test]
fn a_tokenizer_beside_the_model_is_used() {
    let tokenizer = tokenizer();
    let vocabulary = tokenizer.get_vocab_size(true);
    assert_eq!(vocabulary, 261);
    let mut config = config(vocabulary);
    config.eos_token_ids.clear();
    let (model, folder) = pretrained(&config);
    let generate = |prompt: &str| {
        let options = ["--prompt", prompt, "--tokens", "8", "--temperature", "0"];
        let mut command = lm("generate", &options);
        command.args(["--device", "cpu", "--model", text(folder.path())]);
        command
    };
    let missing = failure(generate("x"));
    assert!(missing.contains("tokenizer.json is missing"), "{missing}");
    tokenizer.save(folder.path().join("tokenizer.json"), false).unwrap();

    let prompt = "in the é";
    let mut ids: Vec<i32> =
        tokenizer.encode(prompt, true).unwrap().get_ids().iter().map(|id| *id as i32).collect();
    assert!(ids.len() < prompt.len(), "pairs are single tokens");
    let given = ids.len();
    for _ in 0..8 {
        let logits = forward(&model, &ids);
        let last = &logits[logits.len() - vocabulary..];
        let likeliest = (0..vocabulary).max_by(|a, b| last[*a].total_cmp(&last[*b])).unwrap();
        ids.push(likeliest as i32);
    }
    let words: Vec<u32> = ids.iter().map(|id| *id as u32).collect();
    let expected = tokenizer.decode(&words, true).unwrap();
    // a character that is not complete at the end is left out
    let expected = expected.trim_end_matches(char::REPLACEMENT_CHARACTER);
    let found = success(generate(prompt));
    assert_eq!(found.trim_end_matches('\n'), expected.trim_end_matches('\n'));

    // the first token that follows now ends the text
    let json = fs::read_to_string(folder.path().join("config.json")).unwrap();
    let ends = format!("\"eos_token_id\": [2, {}]", ids[given]);
    fs::write(folder.path().join("config.json"), json.replace("\"eos_token_id\": null", &ends))
        .unwrap();
    assert_eq!(success(generate(prompt)), format!("{prompt}\n"));
}

#[test]
fn a_model_that_is_not_there_is_named() {
    let generate = |model: &str| failure(lm("generate", &["--device", "cpu", "--model", model]));
    let error = generate("/no/such/model");
    assert!(error.contains("--model /no/such/model: there is no such folder"), "{error}");
    let empty = tempfile::tempdir().unwrap();
    let error = generate(text(empty.path()));
    assert!(error.contains("config.json is missing"), "{error}");
    if cfg!(not(feature = "hub")) {
        let error = generate("fla-hub/gla-340M-15B");
        assert!(error.contains("with --features hub it would be fetched"), "{error}");
    }
    let both = ["--device", "cpu", "--model", "x", "--checkpoint", "y"];
    let error = failure(lm("generate", &both));
    assert!(error.contains("cannot be used with"), "{error}");
}
