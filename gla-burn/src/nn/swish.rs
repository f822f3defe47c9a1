use burn::tensor::activation::sigmoid;
use burn::tensor::{DType, Tensor};

use super::gradient::{carry, constant, is_tracked};

/// `x * silu(gate)`, computed in f32 and rounded to `dtype` once.
///
/// Autodiff would keep four tensors of that shape in f32. Here it keeps the two slopes, which carry the
/// gradients, in `dtype`: those are rounded to it anyway.
pub(super) fn swish_gate<const D: usize>(x: Tensor<D>, gate: Tensor<D>, dtype: DType) -> Tensor<D> {
    let (x_value, gate_value) = (constant(&x).cast(DType::F32), constant(&gate).cast(DType::F32));
    let opening = sigmoid(gate_value.clone());
    let swish = gate_value.clone() * opening.clone();
    let mut product = (x_value.clone() * swish.clone()).cast(dtype);
    if is_tracked(&x) {
        product = product + carry_in(dtype, x, swish);
    }
    if is_tracked(&gate) {
        let closing = 1.0 - opening.clone();
        let slope = x_value * opening * (gate_value * closing + 1.0);
        product = product + carry_in(dtype, gate, slope);
    }
    product
}

/// [`carry`] in `dtype`, with the slope in it too.
fn carry_in<const D: usize>(dtype: DType, x: Tensor<D>, slope: Tensor<D>) -> Tensor<D> {
    // f16 has not the range for a gradient that f32 is to have
    let kept = match (x.dtype(), dtype) {
        (DType::F32, DType::F16) => DType::F32,
        _ => dtype,
    };
    carry(x, slope.cast(kept)).cast(dtype)
}

#[cfg(all(test, feature = "flex", feature = "autodiff"))]
mod tests {
    use burn::tensor::activation::silu;
    use burn::tensor::{Device, Distribution, TensorData, Tolerance};

    use super::*;

    /// Value and gradients of a product of `x` and `gate`, which are no leaves, in f32.
    fn both(
        product: impl Fn(Tensor<2>, Tensor<2>) -> Tensor<2>,
        [x, gate]: [Tensor<2>; 2],
    ) -> [TensorData; 3] {
        let [x, gate] = [x.require_grad(), gate.require_grad()];
        let y = product(-x.clone(), -gate.clone());
        let weights = x.clone().detach().cast(DType::F32).cos().cast(y.dtype());
        let grads = (y.clone() * weights).sum().backward();
        [y, x.grad(&grads).unwrap(), gate.grad(&grads).unwrap()]
            .map(|t| t.cast(DType::F32).into_data())
    }

    fn compare(device: &Device, [x_dtype, dtype]: [DType; 2], tolerance: f32) {
        let random = |spread| {
            let x = Tensor::<2>::random([9, 7], Distribution::Normal(0.0, spread), device);
            x.cast(dtype).cast(DType::F32)
        };
        // saturated gates, both ways, and zero
        let mut edges = [0.0f32; 63];
        edges[..6].copy_from_slice(&[-100.0, -20.0, -1.2785, 20.0, 100.0, 1e-6]);
        let edges = Tensor::<1>::from_floats(edges, device).reshape([9, 7]).cast(dtype);
        for gate in [random(3.0), edges.cast(DType::F32)] {
            let x = random(1.0);
            let plain = both(|x, gate| x * silu(gate), [x.clone(), gate.clone()]);
            let ours =
                both(|x, gate| swish_gate(x, gate, dtype), [x.cast(x_dtype), gate.cast(dtype)]);
            for (name, (plain, ours)) in
                ["value", "dx", "dgate"].iter().zip(plain.into_iter().zip(ours))
            {
                println!("{x_dtype:?} {dtype:?} {name}");
                ours.assert_approx_eq::<f32>(&plain, Tolerance::rel_abs(tolerance, tolerance));
            }
        }
    }

    #[test]
    fn value_and_gradients_are_those_of_the_plain_product() {
        let device = Device::flex().autodiff();
        for device in [device.clone(), device.gradient_checkpointing()] {
            for x_dtype in [None, Some(DType::F32)] {
                for (dtype, tolerance) in
                    [(DType::F32, 1e-5), (DType::BF16, 2e-2), (DType::F16, 3e-3)]
                {
                    compare(&device, [x_dtype.unwrap_or(dtype), dtype], tolerance);
                }
            }
        }
    }

    /// Where f16 would have none left.
    #[test]
    fn a_small_gradient_of_f32_is_kept() {
        let device = Device::flex().autodiff();
        let x = Tensor::<2>::ones([1, 4], &device).require_grad();
        let gate = Tensor::<2>::full([1, 4], 1e-3, &device).cast(DType::F16);
        let y = swish_gate(x.clone(), gate, DType::F16);
        let grads = (y * 1e-5).sum().backward();
        let expected = Tensor::<2>::full([1, 4], 5e-9, &device).into_data();
        let got = x.grad(&grads).unwrap().into_data();
        got.assert_approx_eq::<f32>(&expected, Tolerance::rel_abs(2e-2, 0.0));
    }

    #[test]
    fn what_is_not_tracked_has_no_gradient() {
        let device = Device::flex().autodiff();
        let [x, gate] = [0, 1].map(|_| Tensor::<2>::random([3, 4], Distribution::Default, &device));
        assert!(!is_tracked(&swish_gate(x.clone(), gate.clone(), DType::F32)));
        let x = x.require_grad();
        let grads = swish_gate(x.clone(), gate.clone(), DType::F32).sum().backward();
        assert!(gate.grad(&grads).is_none());
        let expected = silu(gate).into_data();
        x.grad(&grads)
            .unwrap()
            .into_data()
            .assert_approx_eq::<f32>(&expected, Tolerance::default());
    }
}
