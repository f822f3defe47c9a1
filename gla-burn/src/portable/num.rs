//! A float primitive with operators, so that the formulas of this module read as formulas.

use std::ops::{Add, Mul, Range};

use burn::backend::tensor::{BoolTensor, FloatTensor};
use burn::backend::{
    Backend, DType, FloatDType, Shape, Slice, TensorData, TensorMetadata, get_device_settings,
};

/// A float tensor of back-end `B` in the dtype of the computation.
///
/// Binary operations broadcast dimensions of size 1; both sides have the same rank.
pub(super) struct Num<B: Backend>(FloatTensor<B>);

// derived, this would ask for `B: Clone`
impl<B: Backend> Clone for Num<B> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<B: Backend> Mul for Num<B> {
    type Output = Self;

    fn mul(self, other: Self) -> Self {
        Self(B::float_mul(self.0, other.0))
    }
}

impl<B: Backend> Add for Num<B> {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self(B::float_add(self.0, other.0))
    }
}

impl<B: Backend> Num<B> {
    pub fn new(primitive: FloatTensor<B>, dtype: FloatDType) -> Self {
        Self(cast::<B>(primitive, dtype.into()))
    }

    pub fn into_primitive(self, dtype: DType) -> FloatTensor<B> {
        cast::<B>(self.0, dtype)
    }

    pub fn zeros<const D: usize>(shape: [usize; D], like: &Self) -> Self {
        let dtype = like.0.dtype().into();
        Self(B::float_zeros(Shape::from(shape), &like.0.device(), dtype))
    }

    /// A constant of zeros and ones, given by the positions of the ones.
    pub fn ones_where<const D: usize>(
        shape: [usize; D],
        like: &Self,
        one: impl Fn([usize; D]) -> bool,
    ) -> Self {
        let mut at = [0; D];
        let next = |_| {
            let value = f32::from(u8::from(one(at)));
            advance(&mut at, &shape);
            value
        };
        let values: Vec<f32> = (0..shape.iter().product()).map(next).collect();
        let data = TensorData::new(values, Shape::from(shape)).convert_dtype(like.0.dtype());
        Self(B::float_from_data(data, &like.0.device()))
    }

    pub fn dims<const D: usize>(&self) -> [usize; D] {
        self.0.shape().dims()
    }

    pub fn reshape<const D: usize>(self, shape: [usize; D]) -> Self {
        Self(B::float_reshape(self.0, Shape::from(shape)))
    }

    pub fn expand<const D: usize>(self, shape: [usize; D]) -> Self {
        Self(B::float_expand(self.0, Shape::from(shape)))
    }

    pub fn permute(self, axes: &[usize]) -> Self {
        Self(B::float_permute(self.0, axes))
    }

    /// Swaps the last two dimensions.
    pub fn t(self) -> Self {
        let rank = self.0.rank();
        Self(B::float_swap_dims(self.0, rank - 2, rank - 1))
    }

    pub fn slice(&self, dim: usize, range: Range<usize>) -> Self {
        let shape = self.0.shape();
        if range == (0..shape[dim]) {
            return self.clone();
        }
        let mut slices: Vec<Slice> = shape.iter().map(|&size| (0..size).into()).collect();
        slices[dim] = range.into();
        Self(B::float_slice(self.0.clone(), &slices))
    }

    /// Joins along `dim`; `parts` is not empty.
    pub fn cat(mut parts: Vec<Self>, dim: usize) -> Self {
        if parts.len() == 1 {
            return parts.remove(0);
        }
        Self(B::float_cat(parts.into_iter().map(|x| x.0).collect(), dim))
    }

    pub fn matmul(self, other: Self) -> Self {
        Self(B::float_matmul(self.0, other.0))
    }

    pub fn exp(self) -> Self {
        Self(B::float_exp(self.0))
    }

    pub fn scale(self, factor: f64) -> Self {
        Self(B::float_mul_scalar(self.0, factor.into()))
    }

    /// Sums over `dim`, which stays with size 1.
    pub fn sum(self, dim: usize) -> Self {
        if self.0.shape()[dim] == 1 {
            return self;
        }
        Self(B::float_sum_dim(self.0, dim))
    }

    /// Zeroes what `mask` hides, by select; `mask` may broadcast this tensor to more elements.
    pub fn hide(self, mask: &Mask<B>) -> Self {
        let (shape, hidden) = (self.0.shape(), mask.0.clone());
        let full = shape.broadcast(&hidden.shape()).expect("a mask that broadcasts");
        let tensor = match shape == full {
            true => self.0,
            false => B::float_expand(self.0, full.clone()),
        };
        let hidden = B::bool_expand(hidden, full);
        Self(B::float_mask_fill(tensor, hidden, 0.0.into()))
    }

    /// Takes rows along `dim`.
    pub fn select(self, dim: usize, rows: &[usize]) -> Self {
        let device = self.0.device();
        let rows: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        let dtype = get_device_settings::<B>(&device).int_dtype;
        let len = rows.len();
        let data = TensorData::new(rows, [len]).convert_dtype(dtype.into());
        let rows = B::int_from_data(data, &device);
        Self(B::float_select(self.0, dim, rows))
    }
}

/// The elements that [`Num::hide`] zeroes.
pub(super) struct Mask<B: Backend>(BoolTensor<B>);

impl<B: Backend> Mask<B> {
    /// Keeps the elements where `keep` holds.
    pub fn keep<const D: usize>(
        shape: [usize; D],
        like: &Num<B>,
        keep: impl Fn([usize; D]) -> bool,
    ) -> Self {
        let kept = Num::ones_where(shape, like, keep).0;
        let dtype = get_device_settings::<B>(&kept.device()).bool_dtype;
        Self(B::float_equal_elem(kept, 0.0.into(), dtype))
    }
}

fn cast<B: Backend>(primitive: FloatTensor<B>, dtype: DType) -> FloatTensor<B> {
    if primitive.dtype() == dtype {
        return primitive;
    }
    B::float_cast(primitive, dtype.into())
}

/// Moves to the next element of a row-major tensor.
fn advance<const D: usize>(at: &mut [usize; D], shape: &[usize; D]) {
    for (at, &size) in at.iter_mut().zip(shape).rev() {
        *at += 1;
        if *at < size {
            return;
        }
        *at = 0;
    }
}
