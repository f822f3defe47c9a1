//! Log-sigmoid and RMS norm against closed forms in f64, and a model in bf16 against itself in f32.

use burn::module::Module;
use burn::tensor::{DType, Device, Tensor, TensorData, Tolerance};
use gla_burn::{RmsNormConfig, log_sigmoid};
use gla_tests::{Cast, relative_rms};

use crate::mixers::all;
use crate::{drawn, ids, values};

#[test]
fn log_sigmoid_is_exact_in_both_tails() {
    let inputs: [f64; 14] =
        [-80.0, -20.0, -4.5, -1.0, -1e-3, -0.0, 0.0, 1e-3, 1.0, 4.1, 4.2, 8.0, 20.0, 80.0];
    let x = Tensor::<1>::from_data(inputs, &Device::flex().autodiff()).require_grad();
    let y = log_sigmoid(x.clone());
    let slopes = values(x.grad(&y.clone().sum().backward()).unwrap());
    let plain = values(log_sigmoid(x.without_autodiff()));
    for (((x, y), slope), plain) in inputs.iter().zip(values(y)).zip(slopes).zip(plain) {
        let expected = x.min(0.0) - (-x.abs()).exp().ln_1p();
        assert!((y / expected - 1.0).abs() < 2e-6, "x {x}: {y} for {expected}");
        assert_eq!(y, plain, "x {x}");
        let expected = 1.0 / (1.0 + x.exp());
        assert!((slope / expected - 1.0).abs() < 2e-6, "x {x}: {slope} for {expected}");
    }
}

#[test]
fn rms_norm_values_and_gradients() {
    let device = Device::flex().autodiff();
    let (x, w, c) = ([0.5, -2.0, 3.0], [1.0, 0.5, -2.0], [1.0, 2.0, -0.5]);
    let mut norm = RmsNormConfig::new(3).with_epsilon(0.1).init(&device);
    norm.weight = norm.weight.map(|_| Tensor::from_data(w, &device).require_grad());
    let input = Tensor::<2>::from_data([x], &device).require_grad();
    let output = norm.forward(input.clone());
    let grads = (output.clone() * Tensor::from_data([c], &device)).sum().backward();

    let r = (x.iter().map(|x| x * x).sum::<f64>() / 3.0 + 0.1).sqrt();
    let dot: f64 = (0..3).map(|i| c[i] * w[i] * x[i]).sum();
    let close = |found: Tensor<2>, expected: [f64; 3]| {
        let tolerance = Tolerance::<f32>::rel_abs(1e-5, 1e-6);
        let expected = TensorData::from([expected]).convert::<f32>();
        found.into_data().assert_approx_eq(&expected, tolerance);
    };
    close(output, [0, 1, 2].map(|i| x[i] * w[i] / r));
    let dx = [0, 1, 2].map(|i| c[i] * w[i] / r - x[i] * dot / (3.0 * r.powi(3)));
    close(input.grad(&grads).unwrap(), dx);
    let dw = norm.weight.grad(&grads).unwrap().unsqueeze();
    close(dw, [0, 1, 2].map(|i| c[i] * x[i] / r));

    // 300^2 overflows f16: the statistics must not be in it
    let half = Tensor::<1>::full([3], 300.0, (&device, DType::F16));
    let half = RmsNormConfig::new(3).init(&device).forward(half);
    assert_eq!((half.dtype(), values(half)), (DType::F16, vec![1.0; 3]));
    assert_eq!(norm.to_string(), "RmsNorm {d_model: 3, epsilon: 0.1, params: 3}");
}

#[test]
fn bf16_models_keep_their_states_in_f32() {
    let device = Device::flex();
    for (name, config) in all() {
        // limits from observed errors at these tiny widths: up to 3 % here, 6 % where the strong
        // gate multiplies the rounding of its logits by ten
        let limit = if name == "strong gate" { 1e-1 } else { 5e-2 };
        let half = drawn(config.init(&device)).map(&mut Cast(DType::BF16));
        let full = half.clone().map(&mut Cast(DType::F32));
        let ids = ids([2, 80], &device);
        let expected = full.forward(ids.clone());
        let logits = half.forward(ids.clone());
        assert_eq!(logits.dtype(), DType::BF16);
        let error = relative_rms(logits, expected.clone());
        assert!(error < limit, "{name}: forward {error}");

        let mut state = half.init_state(2, &device);
        half.prefill(ids.clone().narrow(1, 0, 79), &mut state);
        let last = half.step(ids.narrow(1, 79, 1).squeeze_dim(1), &mut state);
        let expected = expected.narrow(1, 79, 1).squeeze_dim(1);
        let error = relative_rms(last, expected);
        assert!(error < limit, "{name}: step {error}");

        let layer = &state.layers[0];
        assert!(layer.recurrent.iter().all(|state| state.dtype() == DType::F32));
        let mut convs = layer.conv.iter().flatten();
        assert!(convs.all(|conv| conv.dtype() == DType::BF16));
        let mut cached = layer.keys.iter().chain(&layer.values);
        assert!(cached.all(|tensor| tensor.dtype() == DType::BF16));
    }
}
