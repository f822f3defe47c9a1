//! The chunked loss against one in f64 on the host, and against the plain loss of a whole model.
//!
//! `cargo nextest run --release --workspace -E 'binary(loss)'`
#![cfg(feature = "flex")]

use burn::module::Module;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use gla_burn::{
    GlaTransformer, GlaTransformerConfig, IGNORE_INDEX, SequenceLayout, linear_cross_entropy,
    shift_labels,
};
use gla_kernels::eval::{ABS_FLOOR, check};
use gla_tests::{devices, tensor, values};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const ROWS: usize = 37;
const HIDDEN: usize = 12;
const VOCAB: usize = 29;

/// Numbers on the host.
struct Case {
    /// Rows, channels, tokens
    sizes: [usize; 3],
    hidden: Vec<f64>,
    weight: Vec<f64>,
    labels: Vec<i32>,
}

/// Value and gradients.
struct Expected {
    loss: f64,
    hidden: Vec<f64>,
    weight: Vec<f64>,
}

impl Case {
    /// Numbers that f16 and bf16 hold exactly; every fifth row is ignored.
    fn new(scale: f64) -> Self {
        Self::of([ROWS, HIDDEN, VOCAB], scale)
    }

    fn of(sizes: [usize; 3], scale: f64) -> Self {
        let [rows, channels, tokens] = sizes;
        let mut random = StdRng::seed_from_u64(3);
        let mut draw = |n: usize, scale: f64| -> Vec<f64> {
            (0..n).map(|_| f64::from(random.random_range(-16..=16)) / 16.0 * scale).collect()
        };
        let hidden = draw(rows * channels, scale);
        let weight = draw(channels * tokens, 1.0);
        let label = |row: usize| match row % 5 {
            2 => IGNORE_INDEX,
            _ => (row * 7 % tokens) as i32,
        };
        Self { sizes, hidden, weight, labels: (0..rows).map(label).collect() }
    }

    fn tensors(&self, dtype: DType, device: &Device) -> (Tensor<2>, Tensor<2>) {
        let [rows, channels, tokens] = self.sizes;
        let hidden = tensor(&self.hidden, [rows, channels], dtype, device);
        let weight = tensor(&self.weight, [channels, tokens], dtype, device);
        match device.is_autodiff() {
            true => (hidden.require_grad(), weight.require_grad()),
            false => (hidden, weight),
        }
    }

    fn labels(&self, device: &Device) -> Tensor<1, Int> {
        Tensor::from_data(TensorData::new(self.labels.clone(), [self.labels.len()]), device)
    }

    fn expected(&self) -> Expected {
        let [rows, channels, tokens] = self.sizes;
        let scored = self.labels.iter().filter(|&&label| label != IGNORE_INDEX).count().max(1);
        let mut expected = Expected {
            loss: 0.0,
            hidden: vec![0.0; rows * channels],
            weight: vec![0.0; channels * tokens],
        };
        for (row, &label) in self.labels.iter().enumerate().filter(|(_, l)| **l != IGNORE_INDEX) {
            let x = &self.hidden[row * channels..][..channels];
            let logit = |v: usize| (0..channels).map(|i| x[i] * self.weight[i * tokens + v]).sum();
            let logits: Vec<f64> = (0..tokens).map(logit).collect();
            let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let log_sum = max + logits.iter().map(|z| (z - max).exp()).sum::<f64>().ln();
            expected.loss += (log_sum - logits[label as usize]) / scored as f64;
            for (v, logit) in logits.iter().enumerate() {
                let target = f64::from(v == label as usize);
                let d = ((logit - log_sum).exp() - target) / scored as f64;
                for (i, x) in x.iter().enumerate() {
                    expected.hidden[row * channels + i] += d * self.weight[i * tokens + v];
                    expected.weight[i * tokens + v] += d * x;
                }
            }
        }
        expected
    }

    /// Value and gradients of `factor` times the loss, divided by `factor`.
    fn run(&self, dtype: DType, chunk: Option<usize>, factor: f64, device: &Device) -> Expected {
        let (hidden, weight) = self.tensors(dtype, device);
        let labels = self.labels(device);
        let loss = linear_cross_entropy(hidden.clone(), weight.clone(), labels, chunk);
        assert_eq!((loss.dims(), loss.dtype()), ([1], DType::F32));
        let grads = (loss.clone() * factor).backward();
        let grad = |x: &Tensor<2>| -> Vec<f64> {
            let grad = x.grad(&grads).expect("a tracked operand has a gradient");
            assert_eq!(grad.dtype(), dtype, "a gradient has the type of its tensor");
            values(grad).into_iter().map(|x| x / factor).collect()
        };
        Expected { loss: values(loss)[0], hidden: grad(&hidden), weight: grad(&weight) }
    }
}

fn compare(name: &str, expected: &Expected, got: &Expected, tolerance: f64) {
    check(&format!("{name} loss"), &[expected.loss], &[got.loss], tolerance, ABS_FLOOR).unwrap();
    for (what, expected, got) in
        [("d_hidden", &expected.hidden, &got.hidden), ("d_weight", &expected.weight, &got.weight)]
    {
        check(&format!("{name} {what}"), expected, got, tolerance, ABS_FLOOR).unwrap();
    }
}

/// TF32 on CUDA, see `model.rs`.
fn tolerance(device: &str) -> f64 {
    if device == "cuda" { 1e-2 } else { 1e-5 }
}

#[test]
fn value_and_gradients_are_those_of_the_plain_loss() {
    for device in devices() {
        let autodiff = device.device.clone().autodiff();
        // the largest logits are 700 apart: f32 has no exponential of that
        for scale in [1.0, 100.0] {
            let case = Case::new(scale);
            let expected = case.expected();
            for chunk in [None, Some(1), Some(8), Some(ROWS - 1), Some(ROWS), Some(1000)] {
                let got = case.run(DType::F32, chunk, 1.0, &autodiff);
                let name = format!("{} scale {scale} chunk {chunk:?}", device.name);
                compare(&name, &expected, &got, tolerance(device.name));
            }
        }
    }
}

/// With as many rows at a time as there are channels, the gradient of the weight has the shape of the
/// logits, so that a fuser may join what has nothing to do with each other, and differently once it
/// has seen a step.
#[test]
fn steps_with_as_many_rows_as_channels_agree() {
    for device in devices() {
        let autodiff = device.device.clone().autodiff();
        let case = Case::of([256, 64, 512], 0.25);
        let expected = case.expected();
        let types = [(DType::F32, tolerance(device.name)), (DType::F16, 2e-3), (DType::BF16, 2e-2)];
        for (dtype, tolerance) in types {
            if !device.has(dtype) {
                continue;
            }
            for step in 0..4 {
                let got = case.run(dtype, Some(64), 1024.0, &autodiff);
                let name = format!("{} {dtype:?} step {step}", device.name);
                compare(&name, &expected, &got, tolerance);
            }
        }
    }
}

#[test]
fn labels_may_have_any_integer_type() {
    for device in devices() {
        let case = Case::new(1.0);
        let expected = case.expected().loss;
        let (hidden, weight) = case.tensors(DType::F32, &device.device);
        for dtype in [DType::I64, DType::I32] {
            if !device.has(dtype) {
                continue;
            }
            let labels = case.labels(&device.device).cast(dtype);
            let loss = linear_cross_entropy(hidden.clone(), weight.clone(), labels, Some(8));
            let name = format!("{} {dtype:?}", device.name);
            check(&name, &[expected], &values(loss), tolerance(device.name), 0.0).unwrap();
        }
    }
}

#[test]
fn a_label_out_of_range_makes_the_loss_nan_where_it_is_not_refused() {
    for device in devices().iter().filter(|device| device.name != "flex") {
        for label in [-1, VOCAB as i32] {
            let mut case = Case::new(1.0);
            case.labels[4] = label;
            let (hidden, weight) = case.tensors(DType::F32, &device.device);
            let labels = case.labels(&device.device);
            let loss = values(linear_cross_entropy(hidden, weight, labels, Some(8)))[0];
            assert!(loss.is_nan(), "{} label {label}: {loss}", device.name);
        }
    }
}

#[test]
fn what_follows_the_loss_scales_the_gradients() {
    for device in devices() {
        let case = Case::new(1.0);
        let checkpointing = device.device.clone().autodiff().gradient_checkpointing();
        for autodiff in [device.device.clone().autodiff(), checkpointing] {
            let got = case.run(DType::F32, Some(8), 3.0, &autodiff);
            compare(device.name, &case.expected(), &got, tolerance(device.name));
        }
    }
}

#[test]
fn half_precision_is_summed_in_f32() {
    for device in devices() {
        for (dtype, tolerance) in [(DType::F16, 2e-3), (DType::BF16, 2e-2)] {
            if !device.has(dtype) {
                continue;
            }
            let autodiff = device.device.clone().autodiff();
            let case = Case::new(1.0);
            // a loss scale beyond the range of f16 is applied before the gradients are rounded to it
            let got = case.run(dtype, Some(8), 131_072.0, &autodiff);
            let name = format!("{} {dtype:?}", device.name);
            compare(&name, &case.expected(), &got, tolerance);

            // 4096 equal logits: a sum in bf16 would stop at 256
            let zeros = |shape: [usize; 2]| Tensor::<2>::zeros(shape, (&device.device, dtype));
            let labels = Tensor::<1, Int>::zeros([2], &device.device);
            let loss = linear_cross_entropy(zeros([2, 4]), zeros([4, 4096]), labels, None);
            let error = values(loss)[0] - 4096f64.ln();
            assert!(error.abs() < 1e-5, "{name}: off by {error}");
        }
    }
}

#[test]
fn without_a_label_there_is_nothing_to_learn() {
    for device in devices() {
        let mut case = Case::new(1.0);
        case.labels.fill(IGNORE_INDEX);
        let got = case.run(DType::F32, Some(8), 1.0, &device.device.clone().autodiff());
        assert_eq!(got.loss, 0.0, "{}", device.name);
        let mut grads = got.hidden.iter().chain(&got.weight);
        assert!(grads.all(|&x| x == 0.0), "{}", device.name);
    }
}

#[test]
fn only_what_is_tracked_is_differentiated() {
    let case = Case::new(1.0);
    let expected = case.expected();
    let (plain, autodiff) = (Device::flex(), Device::flex().autodiff());
    let (hidden, weight) = case.tensors(DType::F32, &plain);
    let loss = linear_cross_entropy(hidden, weight, case.labels(&plain), Some(8));
    assert!(!loss.is_autodiff());
    check("without autodiff", &[expected.loss], &values(loss), 1e-5, 0.0).unwrap();

    let (hidden, weight) = case.tensors(DType::F32, &autodiff);
    let (constant, labels) =
        (weight.clone().detach().set_require_grad(false), case.labels(&autodiff));
    let grads = linear_cross_entropy(hidden.clone(), constant, labels.clone(), Some(8)).backward();
    let d_hidden = values(hidden.grad(&grads).unwrap());
    check("frozen weight", &expected.hidden, &d_hidden, 1e-5, ABS_FLOOR).unwrap();

    let constant = hidden.detach().set_require_grad(false);
    let grads = linear_cross_entropy(constant, weight.clone(), labels, Some(8)).backward();
    let d_weight = values(weight.grad(&grads).unwrap());
    check("frozen hidden", &expected.weight, &d_weight, 1e-5, ABS_FLOOR).unwrap();
}

fn plain_loss(model: &GlaTransformer, ids: Tensor<2, Int>, labels: Tensor<2, Int>) -> Tensor<1> {
    let logits = model.forward(ids).flatten::<2>(0, 1);
    // Burn's loss masks one class; none of ours is left for it, so a class more is masked
    let [rows, vocab] = logits.dims();
    let none = Tensor::full([rows, 1], -1e9, &logits.device());
    let ignored = labels.clone().equal_elem(IGNORE_INDEX);
    let labels = labels.mask_fill(ignored, vocab as i32).flatten::<1>(0, 1);
    let loss = CrossEntropyLossConfig::new().with_pad_tokens(Some(vec![vocab]));
    loss.init(&logits.device()).forward(Tensor::cat(vec![logits, none], 1), labels)
}

#[test]
fn the_models_loss_is_that_of_its_logits() {
    let device = Device::flex().autodiff();
    for tied in [false, true] {
        device.seed(7);
        let config = GlaTransformerConfig::new(VOCAB, 32, 2)
            .with_intermediate_size(Some(48))
            .with_initializer_range(0.2)
            .with_tie_word_embeddings(tied);
        let model = config.init(&device);
        let ids: Vec<i32> = (0..3 * 40).map(|i| i * i % VOCAB as i32).collect();
        let ids = Tensor::from_data(TensorData::new(ids, [3, 40]), &device);
        let labels = shift_labels(ids.clone(), None);

        let plain = plain_loss(&model, ids.clone(), labels.clone());
        let loss = model.loss(ids, labels);
        check("loss", &values(plain.clone()), &values(loss.clone()), 1e-5, 0.0).unwrap();
        let of = |loss: Tensor<1>| GradientsParams::from_grads(loss.backward(), &model);
        let grads = [of(plain), of(loss)];
        assert_eq!(grads[1].len(), if tied { 2 + 2 * 14 } else { 3 + 2 * 14 });
        let mut compare = Compare { grads };
        model.visit(&mut compare);
    }
}

/// Compares the gradients of each parameter.
struct Compare {
    grads: [GradientsParams; 2],
}

impl burn::module::ModuleVisitor for Compare {
    fn visit_float<const D: usize>(&mut self, param: &burn::module::Param<Tensor<D>>) {
        let [expected, got] = self
            .grads
            .each_ref()
            .map(|grads| values(grads.get::<D>(param.id).expect("every parameter has a gradient")));
        check(&format!("parameter {:?}", param.dims()), &expected, &got, 1e-4, ABS_FLOOR).unwrap();
    }
}

#[test]
fn packed_documents_are_scored_as_if_alone() {
    let device = Device::flex();
    let ids = Tensor::<2, Int>::from_data([[1, 2, 3, 4, 5, 6]], &device);
    let shifted = |bounds: Option<&[usize]>| {
        shift_labels(ids.clone(), bounds).try_into_vec_as::<i32>().unwrap()
    };
    let ignored = IGNORE_INDEX;
    assert_eq!(shifted(None), [2, 3, 4, 5, 6, ignored]);
    assert_eq!(shifted(Some(&[0, 2, 2, 6])), [2, ignored, 4, 5, 6, ignored]);
    assert_eq!(shifted(Some(&[0, 1, 6])), [ignored, 3, 4, 5, 6, ignored]);

    let case = Case::new(1.0);
    let (hidden, weight) = case.tensors(DType::F32, &device);
    let ids: Vec<i32> = (0..ROWS as i32).map(|i| i * 5 % VOCAB as i32).collect();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, ROWS]), &device);
    let loss = |start: usize, len: usize, bounds: Option<&[usize]>| {
        let labels = shift_labels(ids.clone().narrow(1, start, len), bounds).flatten(0, 1);
        let hidden = hidden.clone().narrow(0, start, len);
        values(linear_cross_entropy(hidden, weight.clone(), labels, Some(8)))[0]
    };
    let packed = loss(0, ROWS, Some(&[0, 10, 11, ROWS]));
    // documents of 10, 1 and 26 tokens have 9, 0 and 25 to predict
    assert_eq!(loss(10, 1, None), 0.0);
    let alone = (9.0 * loss(0, 10, None) + 25.0 * loss(11, ROWS - 11, None)) / 34.0;
    check("packed", &[alone], &[packed], 1e-5, 0.0).unwrap();
}

#[test]
fn packed_and_padded_documents_have_the_loss_of_rows() {
    let device = Device::flex();
    let model = GlaTransformerConfig::new(VOCAB, 32, 1).with_initializer_range(0.2).init(&device);
    let row = |tokens: &[i32]| {
        Tensor::<2, Int>::from_data(TensorData::new(tokens.to_vec(), [1, tokens.len()]), &device)
    };
    let loss = |tokens: &[i32]| {
        let ids = row(tokens);
        values(model.loss(ids.clone(), shift_labels(ids, None)))[0]
    };
    let expected = (2.0 * loss(&[1, 2, 3]) + 4.0 * loss(&[7, 4, 5, 6, 2])) / 6.0;

    let (ids, bounds) = (row(&[1, 2, 3, 7, 4, 5, 6, 2]), [0, 3, 8]);
    let labels = shift_labels(ids.clone(), Some(&bounds));
    let packed = model.loss_with(ids, labels, &SequenceLayout::packed(&bounds, &device));
    check("packed", &[expected], &values(packed), 1e-5, 0.0).unwrap();

    let ids = Tensor::cat(vec![row(&[1, 2, 3, 0, 0]), row(&[7, 4, 5, 6, 2])], 0);
    let i = IGNORE_INDEX;
    let labels = Tensor::cat(vec![row(&[2, 3, i, i, i]), row(&[4, 5, 6, 2, i])], 0);
    let mask = Tensor::cat(vec![row(&[1, 1, 1, 0, 0]), row(&[1, 1, 1, 1, 1])], 0);
    let padded = model.loss_with(ids, labels, &SequenceLayout::padded(mask));
    check("padded", &[expected], &values(padded), 1e-5, 0.0).unwrap();
}

fn with_labels(labels: Vec<i32>) {
    let device = Device::flex();
    let (hidden, weight) = (Tensor::zeros([3, 4], &device), Tensor::zeros([4, 5], &device));
    let shape = [labels.len()];
    let labels = Tensor::from_data(TensorData::new(labels, shape), &device);
    linear_cross_entropy(hidden, weight, labels, None);
}

#[test]
#[should_panic(expected = "labels from 0 to 5, expected -100 or 0 to 4")]
fn a_label_beyond_the_vocabulary_is_refused() {
    with_labels(vec![0, 5, -100]);
}

#[test]
#[should_panic(expected = "labels from -1 to 4, expected -100 or 0 to 4")]
fn a_negative_label_is_refused() {
    with_labels(vec![-1, 4, 0]);
}

#[test]
#[should_panic(expected = "2 labels for 3 rows of hidden")]
fn a_label_is_needed_for_each_row() {
    with_labels(vec![0, 1]);
}

#[test]
#[should_panic(expected = "labels have shape [3, 2], ids [2, 3]")]
fn labels_lie_as_the_tokens_do() {
    let device = Device::flex();
    let model = gla_burn::GlaTransformerConfig::new(5, 8, 1).with_num_heads(2).init(&device);
    model.loss(Tensor::zeros([2, 3], &device), Tensor::zeros([3, 2], &device));
}
