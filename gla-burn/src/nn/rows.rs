//! What all rows share: parameters of one number a channel, whose gradients are sums over the rows.
//!
//! Without `autotune` Burn 0.22.1 gives each element of a reduced tensor to one unit. On an H100 a
//! thousand units then walk over the gradients of 16,384 tokens for 2 ms, while the bytes take 0.02.
//! So both sums here and those of the loss are formed in two steps of about as many terms each.

use burn::nn::Linear;
use burn::tensor::{Tensor, module};

/// So many sequences leave a sum over one of them short enough.
const SEQUENCES: usize = 8;

/// `x * weight` for each row of `x`.
pub(super) fn scale_rows<const D: usize>(x: Tensor<D>, weight: Tensor<1>) -> Tensor<D> {
    let (shape, rows) = (x.shape(), Rows::even(&x, &weight));
    (rows.split(x) * rows.spread(weight)).reshape(shape)
}

/// `x + bias` for each row of `x`.
pub(super) fn shift_rows<const D: usize>(x: Tensor<D>, bias: Tensor<1>) -> Tensor<D> {
    let (shape, rows) = (x.shape(), Rows::even(&x, &bias));
    (rows.split(x) + rows.spread(bias)).reshape(shape)
}

/// The projection of each row.
pub(super) fn project_rows<const D: usize>(projection: &Linear, x: Tensor<D>) -> Tensor<D> {
    let projected = module::linear(x, projection.weight.val(), None);
    match &projection.bias {
        Some(bias) => shift_rows(projected, bias.val()),
        None => projected,
    }
}

/// Rows in groups, each with a parameter of its own, which gathers a part of the gradient.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    groups: usize,
    /// Of a group
    rows: usize,
    channels: usize,
}

impl Rows {
    /// About as many groups as rows of a group; one where one sum does as well, or none is formed.
    pub fn even<const D: usize>(x: &Tensor<D>, parameter: &Tensor<1>) -> Self {
        let [channels] = parameter.dims();
        let rows: usize = x.dims()[..D - 1].iter().product();
        let divisor = even_divisor(rows, channels).filter(|_| is_tracked(parameter));
        let groups = divisor.unwrap_or(1);
        Self { groups, rows: rows / groups, channels }
    }

    /// The sequences of a batch, if `x` is one and there are enough: Burn fuses elementwise operations
    /// with nothing that was reshaped before them.
    pub fn of_batch<const D: usize>(x: &Tensor<D>, parameter: &Tensor<1>) -> Self {
        match x.dims()[..] {
            [groups, rows, channels] if groups >= SEQUENCES => Self { groups, rows, channels },
            _ => Self::even(x, parameter),
        }
    }

    /// `[groups, rows of a group, channels]`
    pub fn split<const D: usize>(self, x: Tensor<D>) -> Tensor<3> {
        x.reshape([self.groups, self.rows, self.channels])
    }

    /// `[groups, 1, channels]`
    pub fn spread(self, parameter: Tensor<1>) -> Tensor<3> {
        let parameter = parameter.reshape([1, 1, self.channels]);
        parameter.expand([self.groups, 1, self.channels])
    }
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
    #[test]
    fn gradients_are_those_of_a_plain_broadcast() {
        use burn::tensor::{Device, Distribution};

        let device = Device::flex().autodiff();
        for (shape, groups) in
            [([1, 6, 7, 4], 6), ([8, 5, 1, 4], 5), ([2, 9, 3, 4], 6), ([1, 13, 1, 4], 1)]
        {
            let random = |shape: [usize; 4]| {
                Tensor::<4>::random(shape, Distribution::Default, &device).require_grad()
            };
            let parameter =
                || Tensor::<1>::random([4], Distribution::Default, &device).require_grad();
            let (x, weight, bias, factor) =
                (random(shape), parameter(), parameter(), random(shape));
            assert_eq!(Rows::even(&x, &weight).groups, groups, "{shape:?}");

            let plain = x.clone() * weight.clone().unsqueeze() + bias.clone().unsqueeze();
            let grouped = shift_rows(scale_rows(x.clone(), weight.clone()), bias.clone());
            plain.to_data().assert_eq(&grouped.to_data(), true);
            let [plain, grouped] = [plain, grouped].map(|y| (y * factor.clone()).sum().backward());
            let same = |plain: Option<Tensor<1>>, grouped: Option<Tensor<1>>| {
                let [plain, grouped] = [plain, grouped].map(|grad| grad.unwrap().to_data());
                grouped
                    .assert_approx_eq::<f32>(&plain, burn::tensor::Tolerance::rel_abs(1e-5, 1e-6));
            };
            let flat = |grad: Option<Tensor<4>>| grad.map(|grad| grad.flatten(0, 3));
            same(weight.grad(&plain), weight.grad(&grouped));
            same(bias.grad(&plain), bias.grad(&grouped));
            same(flat(x.grad(&plain)), flat(x.grad(&grouped)));
        }
    }
}
