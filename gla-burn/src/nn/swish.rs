use burn::tensor::activation::sigmoid;
use burn::tensor::{DType, Tensor};

use super::rows::is_tracked;

/// `x * silu(gate)`, computed in f32 and rounded to `dtype` once.
///
/// Autodiff would keep four tensors of that shape in f32. Here it keeps the two slopes, in `dtype`, which
/// carry the gradients; those are of that type anyway, unless their tensor is not.
pub(super) fn swish_gate<const D: usize>(x: Tensor<D>, gate: Tensor<D>, dtype: DType) -> Tensor<D> {
    let constant = |tensor: &Tensor<D>| tensor.clone().detach().cast(DType::F32);
    let (x_value, gate_value) = (constant(&x), constant(&gate));
    let opening = sigmoid(gate_value.clone());
    let swish = gate_value.clone() * opening.clone();
    let mut product = (x_value.clone() * swish.clone()).cast(dtype);
    if is_tracked(&x) {
        product = product + carry(x, swish, dtype);
    }
    if is_tracked(&gate) {
        let closing = 1.0 - opening.clone();
        let slope = x_value * opening * (gate_value * closing + 1.0);
        product = product + carry(gate, slope, dtype);
    }
    product
}

/// Zero, with the gradient `slope` for `x`.
fn carry<const D: usize>(x: Tensor<D>, slope: Tensor<D>, dtype: DType) -> Tensor<D> {
    let constant = x.clone().detach();
    (x - constant).cast(dtype) * slope.cast(dtype)
}

#[cfg(all(test, feature = "flex", feature = "autodiff"))]
mod tests {
    use burn::tensor::activation::silu;
    use burn::tensor::{Device, Distribution, TensorData, Tolerance};

    use super::*;

    /// Value and gradients of a product of `x` and `gate`, in f32.
    fn both(
        product: impl Fn(Tensor<2>, Tensor<2>) -> Tensor<2>,
        [x, gate]: [Tensor<2>; 2],
    ) -> [TensorData; 3] {
        let [x, gate] = [x.require_grad(), gate.require_grad()];
        let y = product(x.clone(), gate.clone());
        let weights = x.clone().detach().cast(DType::F32).cos().cast(y.dtype());
        let grads = (y.clone() * weights).sum().backward();
        [y, x.grad(&grads).unwrap(), gate.grad(&grads).unwrap()]
            .map(|t| t.cast(DType::F32).into_data())
    }

    fn compare(dtype: DType, tolerance: f32) {
        let device = Device::flex().autodiff();
        let random = |spread| {
            let x = Tensor::<2>::random([9, 7], Distribution::Normal(0.0, spread), &device);
            x.cast(dtype).cast(DType::F32)
        };
        // saturated gates, both ways, and zero
        let mut edges = [0.0f32; 63];
        edges[..6].copy_from_slice(&[-100.0, -20.0, -1.2785, 20.0, 100.0, 1e-6]);
        let edges = Tensor::<1>::from_floats(edges, &device).reshape([9, 7]).cast(dtype);
        for gate in [random(3.0), edges.cast(DType::F32)] {
            let x = random(1.0);
            let plain = both(|x, gate| x * silu(gate), [x.clone(), gate.clone()]);
            let ours =
                both(|x, gate| swish_gate(x, gate, dtype), [x.cast(dtype), gate.cast(dtype)]);
            for (name, (plain, ours)) in
                ["value", "dx", "dgate"].iter().zip(plain.into_iter().zip(ours))
            {
                println!("{dtype:?} {name}");
                ours.assert_approx_eq::<f32>(&plain, Tolerance::rel_abs(tolerance, tolerance));
            }
        }
    }

    #[test]
    fn value_and_gradients_are_those_of_the_plain_product() {
        compare(DType::F32, 1e-5);
        compare(DType::BF16, 2e-2);
        compare(DType::F16, 3e-3);
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
