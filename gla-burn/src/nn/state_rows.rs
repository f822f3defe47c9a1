//! Sequences of a [`GlaState`] as rows of a batch: branched, joined, replaced, started anew.

use burn::tensor::{Int, Tensor};

use super::state::{newest, only};
use super::{GlaState, LayerState, StateAxis, StateVisitor};

impl GlaState {
    /// The sequences in `rows`, in this order; one that is named twice is branched.
    ///
    /// Copies them: what is left out is freed with this state.
    ///
    /// # Panics
    ///
    /// Panics if `rows` is empty or names a sequence that the state does not have.
    pub fn select(&self, rows: &[usize]) -> Self {
        assert!(!rows.is_empty(), "GlaState: rows must name at least 1 sequence, got 0");
        rows.iter().for_each(|&row| self.check_row(row));
        let mut select = Select { rows };
        let layers = self.layers.iter();
        let layers = layers.map(|layer| LayerState::merge(vec![layer.clone()], &mut select));
        Self { layers: layers.map(LayerState::without_unread).collect() }
    }

    /// Each sequence `times` times, its copies side by side: a prefix branched into that many
    /// continuations.
    ///
    /// # Panics
    ///
    /// Panics if `times` is 0 or the state has no sequence.
    pub fn repeat(&self, times: usize) -> Self {
        let rows: Vec<usize> =
            (0..self.batch()).flat_map(|row| std::iter::repeat_n(row, times)).collect();
        self.select(&rows)
    }

    /// All sequences of `states`, in order, in one batch of the type of the first.
    ///
    /// # Panics
    ///
    /// Panics if there are no states, or if they are not of the same model.
    pub fn cat(states: Vec<Self>) -> Self {
        let mut layers: Vec<_> = states.into_iter().map(|state| state.layers).collect();
        let first = layers.first().expect("GlaState: cat needs at least 1 state, got 0").len();
        for other in layers.iter().map(Vec::len) {
            assert!(first == other, "GlaState: states of {first} and of {other} layers");
        }
        // the layers of all states, from the last to the first
        let mut merged: Vec<LayerState> = (0..first)
            .map(|_| {
                let parts = layers.iter_mut().map(|layers| layers.pop().expect("as many in each"));
                LayerState::merge(parts.collect(), &mut Cat::default())
            })
            .collect();
        merged.reverse();
        Self { layers: merged }
    }

    /// Replaces the sequence `row` by the only one of `sequence`.
    ///
    /// # Panics
    ///
    /// Panics if there is no such row, if `sequence` has not one sequence, or if the states are not
    /// of the same model.
    pub fn put(&mut self, row: usize, sequence: Self) {
        self.check_row(row);
        let (batch, layers) = (sequence.batch(), sequence.layers.len());
        assert!(batch == 1, "GlaState: put takes a state of 1 sequence, got {batch}");
        assert!(
            layers == self.layers.len(),
            "GlaState: states of {} and of {layers} layers",
            self.layers.len()
        );
        for (layer, new) in self.layers.iter_mut().zip(sequence.layers) {
            let parts = vec![std::mem::take(layer), new];
            let joined = LayerState::merge(parts, &mut Put { row, batches: Vec::new() });
            *layer = joined.without_unread();
        }
    }

    /// Puts the sequence `row` before its first token.
    ///
    /// # Panics
    ///
    /// Panics if there is no such row.
    pub fn reset(&mut self, row: usize) {
        self.check_row(row);
        for layer in &mut self.layers {
            let rest = LayerState::merge(vec![std::mem::take(layer)], &mut Reset { row });
            *layer = rest.without_unread();
        }
    }

    /// Takes the sequence `row` out and leaves one before its first token in its place.
    ///
    /// # Panics
    ///
    /// Panics if there is no such row.
    pub fn take(&mut self, row: usize) -> Self {
        let taken = self.select(&[row]);
        self.reset(row);
        taken
    }

    fn check_row(&self, row: usize) {
        let batch = self.batch();
        assert!(row < batch, "GlaState: no row {row} in a state of {batch} sequences");
    }
}

impl LayerState {
    /// Without the keys and values in front that no sequence reads: those of a longer one that is gone.
    fn without_unread(mut self) -> Self {
        let seen = self.seen.iter().copied().max().unwrap_or(0);
        for cached in [&mut self.keys, &mut self.values] {
            *cached = cached.take().filter(|_| seen > 0).map(|x| newest(x, seen));
        }
        self
    }
}

struct Select<'a> {
    rows: &'a [usize],
}

impl StateVisitor for Select<'_> {
    fn tensor<const D: usize>(
        &mut self,
        _name: &str,
        _axis: StateAxis,
        parts: Vec<Option<Tensor<D>>>,
    ) -> Option<Tensor<D>> {
        let tensor = only(parts)?;
        let rows: Vec<i64> = self.rows.iter().map(|&row| row as i64).collect();
        let rows = Tensor::<1, Int>::from_data(rows.as_slice(), &tensor.device());
        Some(tensor.select(0, rows))
    }

    fn counts(&mut self, _name: &str, parts: Vec<Vec<usize>>) -> Vec<usize> {
        let counts = parts.concat();
        self.rows.iter().map(|&row| counts[row]).collect()
    }
}

struct Reset {
    row: usize,
}

impl StateVisitor for Reset {
    fn tensor<const D: usize>(
        &mut self,
        _name: &str,
        axis: StateAxis,
        parts: Vec<Option<Tensor<D>>>,
    ) -> Option<Tensor<D>> {
        let tensor = only(parts)?;
        Some(match axis {
            StateAxis::Width => tensor.slice_fill(self.row..self.row + 1, 0.0),
            // a sequence without tokens reads none
            StateAxis::Time => tensor,
        })
    }

    fn counts(&mut self, _name: &str, parts: Vec<Vec<usize>>) -> Vec<usize> {
        let mut counts = parts.concat();
        counts[self.row] = 0;
        counts
    }
}

/// Batch sizes of the states that are joined: counts come before tensors.
#[derive(Default)]
struct Cat {
    batches: Vec<usize>,
}

impl StateVisitor for Cat {
    fn tensor<const D: usize>(
        &mut self,
        name: &str,
        axis: StateAxis,
        parts: Vec<Option<Tensor<D>>>,
    ) -> Option<Tensor<D>> {
        Some(Tensor::cat(aligned(name, axis, parts, &self.batches)?, 0))
    }

    fn counts(&mut self, _name: &str, parts: Vec<Vec<usize>>) -> Vec<usize> {
        self.batches = parts.iter().map(Vec::len).collect();
        parts.concat()
    }
}

struct Put {
    row: usize,
    batches: Vec<usize>,
}

impl StateVisitor for Put {
    fn tensor<const D: usize>(
        &mut self,
        name: &str,
        axis: StateAxis,
        parts: Vec<Option<Tensor<D>>>,
    ) -> Option<Tensor<D>> {
        let mut parts = aligned(name, axis, parts, &self.batches)?.into_iter();
        let (all, new) = (parts.next()?, parts.next()?);
        Some(all.slice_assign(self.row..self.row + 1, new))
    }

    fn counts(&mut self, _name: &str, parts: Vec<Vec<usize>>) -> Vec<usize> {
        self.batches = parts.iter().map(Vec::len).collect();
        let mut counts = parts[0].clone();
        counts[self.row] = parts[1][0];
        counts
    }
}

/// The parts with the same shape but for the first axis. Absent if one of them must not be.
pub(super) fn aligned<const D: usize>(
    name: &str,
    axis: StateAxis,
    parts: Vec<Option<Tensor<D>>>,
    batches: &[usize],
) -> Option<Vec<Tensor<D>>> {
    let shape = parts.iter().flatten().next()?.dims();
    let widths = match axis {
        StateAxis::Width => 1..D,
        StateAxis::Time => 2..D,
    };
    for other in parts.iter().flatten().map(Tensor::dims) {
        assert!(
            shape[widths.clone()] == other[widths.clone()],
            "GlaState: {name} of the states has shapes {shape:?} and {other:?}"
        );
    }
    let like = parts.iter().flatten().next()?;
    let options = (like.device(), like.dtype());
    let length = parts.iter().flatten().map(|part| part.dims()[1]).max()?;
    let parts = parts.into_iter().map(|part| Some(part?.cast(options.1)));
    if axis == StateAxis::Width {
        return parts.collect();
    }

    let fill = |batch: usize, length: usize| {
        let mut shape = shape;
        (shape[0], shape[1]) = (batch, length);
        Tensor::zeros(shape, (&options.0, options.1))
    };
    let fill_up = |(part, &batch): (Option<Tensor<D>>, &usize)| match part {
        None => fill(batch, length),
        Some(part) => match length - part.dims()[1] {
            0 => part,
            missing => Tensor::cat(vec![fill(batch, missing), part], 1),
        },
    };
    Some(parts.zip(batches).map(fill_up).collect())
}
