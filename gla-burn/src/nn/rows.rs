//! What all rows share: parameters of one number a channel, whose gradients are sums over the rows.
//!
//! Without `autotune` Burn 0.22.1 gives each element of a reduced tensor to one unit. On an H100 a
//! thousand units then walk over the gradients of 16,384 tokens for 2 ms, while the bytes take 0.02.
//! So such a sum is formed in two steps where it can be: over the rows of a group, then over the
//! groups. The loss does the same with its sums over the vocabulary.

use burn::nn::Linear;
use burn::tensor::{DType, Tensor, assert_shape, module};

/// `x * weight` for each row of `x`.
pub(super) fn scale_rows<const D: usize>(x: Tensor<D>, weight: Tensor<1>) -> Tensor<D> {
    Groups::even(&x, &weight).scale(x, weight)
}

/// [`scale_rows`] for what should not be reshaped if that can be helped: a view, which would be copied,
/// or the middle of an elementwise chain, which Burn would fuse less of.
pub(super) fn scale_rows_in_place<const D: usize>(x: Tensor<D>, weight: Tensor<1>) -> Tensor<D> {
    let groups = if Groups::are_sequences(&x, &weight) {
        Groups::Sequences(x.dims()[0])
    } else {
        Groups::even(&x, &weight)
    };
    groups.scale(x, weight)
}

/// `x + bias` for each row of `x`.
pub(super) fn shift_rows<const D: usize>(x: Tensor<D>, bias: Tensor<1>) -> Tensor<D> {
    match Groups::even(&x, &bias) {
        Groups::Rows { groups, rows } => {
            let (shape, [channels]) = (x.shape(), bias.dims());
            let bias = bias.reshape([1, 1, channels]).expand([groups, 1, channels]);
            (x.reshape([groups, rows, channels]) + bias).reshape(shape)
        }
        _ => x + bias.unsqueeze(),
    }
}

/// The projection of each row, as by [`Linear::forward`].
pub(super) fn project_rows<const D: usize>(projection: &Linear, x: Tensor<D>) -> Tensor<D> {
    let bias = match &projection.bias {
        Some(bias) if is_tracked(&bias.val()) => bias.val(),
        _ => return projection.forward(x),
    };
    let [d_input, _] = projection.weight.dims();
    assert_shape!(x, [.., d_input]);
    let dtype = x.dtype();
    // in f32, so that the sums over groups are not rounded
    let projected = module::linear(x, projection.weight.val(), None).cast(DType::F32);
    shift_rows(projected, bias.cast(DType::F32)).cast(dtype)
}

/// How the gradient of a parameter is summed: each group has the parameter for itself.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Groups {
    /// All rows are one group: one sum does as well, or none is formed.
    One,
    /// The sequences of a batch.
    Sequences(usize),
    /// So many groups of so many rows.
    Rows { groups: usize, rows: usize },
}

impl Groups {
    /// As many groups as a group has rows, or a few less.
    fn even<const D: usize>(x: &Tensor<D>, parameter: &Tensor<1>) -> Self {
        let [channels] = parameter.dims();
        let rows = num_rows(x);
        match even_divisor(rows, channels).filter(|_| is_tracked(parameter)) {
            Some(groups) => Self::Rows { groups, rows: rows / groups },
            None => Self::One,
        }
    }

    /// Whether there are enough sequences, and short enough, for a sum over each.
    fn are_sequences<const D: usize>(x: &Tensor<D>, parameter: &Tensor<1>) -> bool {
        let (batch, [channels]) = (x.dims()[0], parameter.dims());
        let rows = num_rows(x);
        let fits = (4..=1024).contains(&batch) && rows / batch <= 1024 * batch;
        D == 3 && fits && rows > channels && is_tracked(parameter)
    }

    fn scale<const D: usize>(self, x: Tensor<D>, weight: Tensor<1>) -> Tensor<D> {
        let [channels] = weight.dims();
        match self {
            Self::One => x * weight.unsqueeze(),
            Self::Sequences(batch) => {
                let mut spread = [1; D];
                (spread[0], spread[D - 1]) = (batch, channels);
                x * weight.unsqueeze::<D>().expand(spread)
            }
            Self::Rows { groups, rows } => {
                let shape = x.shape();
                let weight = weight.reshape([1, 1, channels]).expand([groups, 1, channels]);
                (x.reshape([groups, rows, channels]) * weight).reshape(shape)
            }
        }
    }
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

#[cfg(feature = "autodiff")]
pub(super) fn is_tracked<const D: usize>(x: &Tensor<D>) -> bool {
    x.is_tracked()
}

#[cfg(not(feature = "autodiff"))]
pub(super) fn is_tracked<const D: usize>(_x: &Tensor<D>) -> bool {
    false
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

        fn all<const D: usize>(shape: [usize; D], even: Groups, in_place: bool) {
            let (x, parameter) = (random(shape), random([CHANNELS]));
            assert_eq!(Groups::even(&x, &parameter), even, "{shape:?}");
            assert_eq!(Groups::are_sequences(&x, &parameter), in_place, "{shape:?}");
            compare(shape, |x, w| x * w.unsqueeze(), scale_rows);
            compare(shape, |x, w| x * w.unsqueeze(), scale_rows_in_place);
            compare(shape, |x, b| x + b.unsqueeze(), shift_rows);
        }

        #[test]
        fn are_those_of_a_plain_broadcast() {
            all([1, 42, CHANNELS], Groups::Rows { groups: 6, rows: 7 }, false);
            all([8, 5, CHANNELS], Groups::Rows { groups: 5, rows: 8 }, true);
            all([2, 9, 3, CHANNELS], Groups::Rows { groups: 6, rows: 9 }, false);
            all([13, CHANNELS], Groups::One, false);
            all([1, 2, CHANNELS], Groups::One, false);
        }

        #[test]
        fn no_rows_are_no_groups() {
            for shape in [[0, 5, CHANNELS], [9, 0, CHANNELS]] {
                let x = random(shape);
                assert_eq!(Groups::even(&x, &random([CHANNELS])), Groups::One);
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
