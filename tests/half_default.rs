//! Models on a device whose new tensors are in half precision: what counts, positions above all, stays exact.
//!
//! One test alone: the type of new tensors is chosen once in a process.

use burn::module::Module;
use burn::tensor::{DType, Device, Distribution, Tensor};
use gla_burn::{
    GatedLinearAttentionConfig, MambaConfig, RetentionConfig, SequenceLayout,
    SoftmaxAttentionConfig,
};
use gla_tests::{Cast, half_devices, relative_rms, values};

/// Tokens that come again every 8 see the same in a window of 4, wherever they are.
fn positions_are_exact(device: &Device) {
    const TOKENS: usize = 2200;
    let layer = SoftmaxAttentionConfig::new(16, 2)
        .with_window_size(Some(4))
        .with_initializer_range(0.5)
        .init(device);
    let period = Tensor::<3>::random([1, 8, 16], Distribution::Default, device);
    let y = layer.forward(period.repeat_dim(1, TOKENS / 8));
    let at = |first: usize| y.clone().narrow(1, first, 8);
    for first in [256, 1024, TOKENS - 8] {
        let error = relative_rms(at(first), at(8));
        assert!(error < 2e-2, "tokens from {first} differ from those from 8 by {error}");
    }
}

/// The states of a channel of Mamba begin with the rates 1, 2, ..
fn rates_are_exact(device: &Device) {
    let layer = MambaConfig::new(8).with_state_size(300).init(device);
    let rates = values(layer.A_log.val().narrow(0, 0, 1).cast(DType::F32).exp());
    for (at, rate) in rates.into_iter().enumerate() {
        let expected = (at + 1) as f64;
        assert!((rate / expected - 1.0).abs() < 1e-4, "rate {at} is {rate}");
    }
}

/// Sequences in one row are as if alone, in a layer with short convolutions.
fn packed_rows_are_as_if_alone(device: &Device) {
    let layer = GatedLinearAttentionConfig::new(32)
        .with_num_heads(2)
        .with_use_short_conv(true)
        .with_initializer_range(0.2)
        .init(device);
    let x = Tensor::<3>::random([1, 40, 32], Distribution::Default, device);
    let bounds = [0, 1, 18, 40];
    let packed = layer.forward_with(x.clone(), &SequenceLayout::packed(&bounds, device));
    for ends in bounds.windows(2) {
        let own = |x: &Tensor<3>| x.clone().narrow(1, ends[0], ends[1] - ends[0]);
        let error = relative_rms(own(&packed), layer.forward(own(&x)));
        assert!(error < 2e-2, "tokens {ends:?} differ by {error}");
    }
}

/// Weights of f32, as checkpoints have them, beside the gate that is not a weight.
fn wider_weights_run(device: &Device) {
    let layer = RetentionConfig::new(32).with_num_heads(2).with_initializer_range(0.2).init(device);
    let x = Tensor::<3>::random([1, 40, 32], Distribution::Default, device);
    let half = layer.forward(x.clone());
    let wide = layer.map(&mut Cast(DType::F32)).forward(x.cast(DType::F32));
    assert_eq!(wide.dtype(), DType::F32);
    let error = relative_rms(half, wide);
    assert!(error < 5e-2, "the layer in f32 differs from that in half precision by {error}");
}

#[test]
fn half_precision_by_default() {
    for device in half_devices() {
        let settings = device.device.settings();
        println!("{}: new tensors are {:?}", device.name, settings.float_dtype);
        let device = &device.device;
        device.seed(3);
        positions_are_exact(device);
        rates_are_exact(device);
        packed_rows_are_as_if_alone(device);
        wider_weights_run(device);
    }
}
