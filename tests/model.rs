//! The model on every device against the same weights on the CPU: logits, parameter gradients, and
//! decoding by prefill and steps.
#![cfg(feature = "flex")]

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use gla_burn::{GateProjection, GlaTransformer, GlaTransformerConfig, Mixer};
use gla_kernels::eval::{ABS_FLOOR, check};
use gla_tests::{devices, values};

const TIME: usize = 20;

fn ids(device: &Device) -> Tensor<2, Int> {
    let ids: Vec<i32> = (0..2 * TIME).map(|i| (i * i % 13) as i32).collect();
    Tensor::from_data(TensorData::new(ids, [2, TIME]), device)
}

/// Logits, and the gradients of some parameters of each kind for a loss over the logits.
fn outputs(model: &GlaTransformer, device: &Device) -> Vec<(&'static str, Vec<f64>)> {
    let logits = model.forward(ids(device));
    let loss = logits.clone().powf_scalar(2.0).mean();
    let grads = loss.backward();
    let Mixer::Gla(attention) = &model.layers[0].attn else { panic!("the default") };
    let Some(GateProjection::Vector([down, up])) = &attention.gk_proj else {
        panic!("the default")
    };
    let matrix = |x: &Tensor<2>| values(x.grad(&grads).expect("a parameter has a gradient"));
    vec![
        ("logits", values(logits)),
        ("embeddings", matrix(&model.embeddings.weight.val())),
        ("q_proj", matrix(&attention.q_proj.weight.val())),
        ("gk_proj.0", matrix(&down.weight.val())),
        ("gk_proj.1", matrix(&up.weight.val())),
        ("o_proj", matrix(&attention.o_proj.weight.val())),
    ]
}

/// On CUDA, Burn multiplies f32 matrices in TF32 unless its tuning finds something faster for a shape:
/// an error of 2e-4 in a product of 64 x 64, measured against f64. The op itself holds 1e-4 there.
fn tolerance(name: &str, elsewhere: f64) -> f64 {
    if name == "cuda" { 1e-2 } else { elsewhere }
}

#[test]
fn the_model_is_the_same_on_every_device() {
    let config = GlaTransformerConfig::new(13, 32, 1).with_num_heads(2).with_use_short_conv(true);
    // larger weights than the default, so that gates and gradients are of order 1
    let config = config.with_initializer_range(0.3);
    let flex = Device::flex().autodiff();
    let model = config.init(&flex);
    let expected = outputs(&model, &flex);
    for device in devices().into_iter().filter(|device| device.name != "flex") {
        let name = device.name;
        let autodiff = device.device.clone().autodiff();
        let there = model.clone().fork(&autodiff);
        for ((what, expected), (_, got)) in expected.iter().zip(outputs(&there, &autodiff)) {
            check(&format!("{name} {what}"), expected, &got, tolerance(name, 1e-3), ABS_FLOOR)
                .unwrap();
        }

        let there = there.valid();
        let whole = values(there.forward(ids(&device.device)));
        let mut state = there.init_state(2, &device.device);
        let ids = ids(&device.device);
        let head = there.prefill(ids.clone().narrow(1, 0, TIME - 3), &mut state);
        let mut parts = vec![head];
        for step in TIME - 3..TIME {
            let token = ids.clone().narrow(1, step, 1).reshape([2]);
            parts.push(there.step(token, &mut state).unsqueeze_dim::<3>(1));
        }
        let pieces = values(Tensor::cat(parts, 1));
        check(&format!("{name} pieces"), &whole, &pieces, tolerance(name, 1e-4), ABS_FLOOR)
            .unwrap();
        println!("{name}: logits, gradients and decoding agree");
    }
}
