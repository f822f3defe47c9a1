//! What all rows share: parameters of one number a channel, whose gradients are sums over the rows.
//!
//! Without `autotune` Burn 0.22.1 gives each element of a reduced tensor to one unit. On an H100 a
//! thousand units then walk over the gradients of 16,384 tokens for 2 ms, while the bytes take 0.02.
//! So such a sum is formed in two steps where it can be: over the rows of a group, then over the
//! groups. The loss does the same with its sums over the vocabulary.

use burn::nn::Linear;
use burn::tensor::{DType, Tensor, assert_shape, module};

use super::gradient::is_tracked;

/// `x * weight` for each row of `x`.
pub(super) fn scale_rows<const D: usize>(x: Tensor<D>, weight: Tensor<1>) -> Tensor<D> {
    let shape = x.shape();
    match even_groups(&x, &weight) {
        Some(groups) => {
            let [x, weight] = grouped(groups, x, weight);
            (x * weight).reshape(shape)
        }
        None => x * weight.unsqueeze(),
    }
}

/// [`scale_rows`] for what should not be reshaped if that can be helped: a view, which would be copied,
/// or the middle of an elementwise chain, which Burn would fuse less of.
pub(super) fn scale_rows_in_place<const D: usize>(x: Tensor<D>, weight: Tensor<1>) -> Tensor<D> {
    if !sequences_are_groups(&x, &weight) {
        return scale_rows(x, weight);
    }
    let mut spread = [1; D];
    (spread[0], spread[D - 1]) = (x.dims()[0], weight.dims()[0]);
    x * weight.unsqueeze::<D>().expand(spread)
}

/// `x + bias` for each row of `x`.
pub(super) fn shift_rows<const D: usize>(x: Tensor<D>, bias: Tensor<1>) -> Tensor<D> {
    let shape = x.shape();
    match even_groups(&x, &bias) {
        Some(groups) => {
            let [x, bias] = grouped(groups, x, bias);
            (x + bias).reshape(shape)
        }
        None => x + bias.unsqueeze(),
    }
}

/// The projection of each row, as by [`Linear::forward`].
pub(super) fn project_rows<const D: usize>(projection: &Linear, x: Tensor<D>) -> Tensor<D> {
    let mut shape = x.dims();
    if D > 3 {
        // the gradient of the weight were a product for each of the leading axes else, then summed
        let rows: usize = shape[1..D - 1].iter().product();
        let y = project_rows(projection, x.reshape([shape[0], rows, shape[D - 1]]));
        let [_, _, d_output] = y.dims();
        shape[D - 1] = d_output;
        return y.reshape(shape);
    }
    let bias = projection.bias.as_ref().map(|bias| bias.val());
    let Some(bias) = bias.filter(is_tracked) else {
        return projection.forward(x);
    };
    let [d_input, _] = projection.weight.dims();
    assert_shape!(x, [.., d_input]);
    let dtype = x.dtype();
    // in f32, so that the sums over groups are not rounded
    let projected = module::linear(x, projection.weight.val(), None).cast(DType::F32);
    shift_rows(projected, bias.cast(DType::F32)).cast(dtype)
}

/// Rows as `[groups, rows of a group, channels]` and the parameter as `[groups, 1, channels]`: each group
/// has it for itself, and gathers a part of its gradient.
fn grouped<const D: usize>(groups: usize, x: Tensor<D>, parameter: Tensor<1>) -> [Tensor<3>; 2] {
    let [channels] = parameter.dims();
    let rows = num_rows(&x) / groups;
    let parameter = parameter.reshape([1, 1, channels]);
    [x.reshape([groups, rows, channels]), parameter.expand([groups, 1, channels])]
}

/// As many groups as a group has rows, or a few less; none where one sum does as well, or none is formed.
fn even_groups<const D: usize>(x: &Tensor<D>, parameter: &Tensor<1>) -> Option<usize> {
    let [channels] = parameter.dims();
    even_divisor(num_rows(x), channels).filter(|_| is_tracked(parameter))
}

/// Whether there are enough sequences, and short enough, for a sum over each.
fn sequences_are_groups<const D: usize>(x: &Tensor<D>, parameter: &Tensor<1>) -> bool {
    let (batch, [channels]) = (x.dims()[0], parameter.dims());
    let rows = num_rows(x);
    let fits = (4..=1024).contains(&batch) && rows / batch <= 1024 * batch;
    D == 3 && fits && rows > channels && is_tracked(parameter)
}

fn num_rows<const D: usize>(x: &Tensor<D>) -> usize {
    x.dims()[..D - 1].iter().product()
}

/// The largest divisor of `terms` up to its root, by which a sum of them comes in two steps; none if
/// it has none, or if there are more sums than terms and so units enough.
pub(super) fn even_divisor(terms: usize, sums: usize) -> Option<usize> {
    let divisor = (2..=terms.isqrt()).rev().find(|&n| terms.is_multiple_of(n))?;
    (terms > sums).then_some(divisor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_come_in_two_even_steps() {
        for (terms, sums, divisor) in [
            (16_384, 1024, Some(128)),
            (32_000, 1024, Some(160)),
            (8 * 1023, 64, Some(88)),
            (50_257, 1024, Some(29)),
            (32_003, 1024, None), // a prime
            (1024, 1024, None),
            (3, 1, None),
            (0, 1, None),
        ] {
            assert_eq!(even_divisor(terms, sums), divisor, "{terms} terms");
        }
    }

    #[cfg(all(feature = "flex", feature = "autodiff"))]
    mod gradients {
        use burn::nn::LinearConfig;
        use burn::tensor::{Device, Distribution, TensorData, Tolerance};

        use super::*;

        const CHANNELS: usize = 4;

        fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
            let device = Device::flex().autodiff();
            Tensor::random(shape, Distribution::Default, &device).require_grad()
        }

        fn same(name: &str, [expected, got]: [TensorData; 2]) {
            println!("{name}");
            got.assert_approx_eq::<f32>(&expected, Tolerance::rel_abs(1e-5, 1e-6));
        }

        /// Those of `plain` and `grouped` agree, and are not of zero.
        fn compare<const D: usize>(
            shape: [usize; D],
            plain: impl Fn(Tensor<D>, Tensor<1>) -> Tensor<D>,
            grouped: impl Fn(Tensor<D>, Tensor<1>) -> Tensor<D>,
        ) {
            let (x, parameter, factor) = (random(shape), random([CHANNELS]), random(shape));
            let [a, b] =
                [plain(x.clone(), parameter.clone()), grouped(x.clone(), parameter.clone())];
            let name = format!("{shape:?}");
            same(&name, [a.to_data(), b.to_data()]);
            let [a, b] = [a, b].map(|y| (y * factor.clone()).sum().backward());
            same(&name, [&a, &b].map(|grads| x.grad(grads).unwrap().to_data()));
            same(&name, [&a, &b].map(|grads| parameter.grad(grads).unwrap().to_data()));
        }

        fn all<const D: usize>(shape: [usize; D], even: Option<[usize; 2]>, in_place: bool) {
            let (x, parameter) = (random(shape), random([CHANNELS]));
            let groups = even_groups(&x, &parameter);
            assert_eq!(groups, even.map(|[groups, _]| groups), "{shape:?}");
            assert_eq!(sequences_are_groups(&x, &parameter), in_place, "{shape:?}");
            if let Some([groups, rows]) = even {
                let of_each = [[groups, rows, CHANNELS], [groups, 1, CHANNELS]];
                assert_eq!(grouped(groups, x, parameter).map(|part| part.dims()), of_each);
            }
            compare(shape, |x, w| x * w.unsqueeze(), scale_rows);
            compare(shape, |x, w| x * w.unsqueeze(), scale_rows_in_place);
            compare(shape, |x, b| x + b.unsqueeze(), shift_rows);
        }

        #[test]
        fn are_those_of_a_plain_broadcast() {
            all([1, 42, CHANNELS], Some([6, 7]), false);
            all([8, 5, CHANNELS], Some([5, 8]), true);
            all([2, 9, 3, CHANNELS], Some([6, 9]), false);
            all([13, CHANNELS], None, false);
            all([1, 2, CHANNELS], None, false);
        }

        #[test]
        fn no_rows_are_no_groups() {
            for shape in [[0, 5, CHANNELS], [9, 0, CHANNELS]] {
                let x = random(shape);
                assert_eq!(even_groups(&x, &random([CHANNELS])), None);
                assert_eq!(scale_rows_in_place(x, random([CHANNELS])).dims(), shape);
            }
        }

        #[test]
        fn of_a_projection_are_those_of_the_module() {
            let device = Device::flex().autodiff();
            let projection = LinearConfig::new(3, CHANNELS).init(&device);
            let (x, factor) = (random([2, 21, 3]), random([2, 21, CHANNELS]));
            let of = |y: Tensor<3>| {
                let grads = (y.clone() * factor.clone()).sum().backward();
                let bias = projection.bias.as_ref().unwrap().val().grad(&grads).unwrap();
                let weight = projection.weight.val().grad(&grads).unwrap();
                let x = x.grad(&grads).unwrap();
                [y.to_data(), bias.to_data(), weight.to_data(), x.to_data()]
            };
            let pairs = of(projection.forward(x.clone()));
            let pairs = pairs.into_iter().zip(of(project_rows(&projection, x.clone())));
            pairs.for_each(|(expected, got)| same("projection", [expected, got]));
        }
    }
}
