//! How rows fall into sequences, and sequences into chunks.

use crate::GlaError;

/// The sequences among the `B * T` rows of a call.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Sequences {
    /// `batch` sequences of `time` rows each.
    Uniform {
        /// Number of sequences `B`.
        batch: usize,
        /// Rows of each, `T`.
        time: usize,
    },
    /// Sequences of any length packed one after the other (`B = 1`): `N + 1` rising row offsets,
    /// the first 0 and the last `T`. Two equal offsets make an empty sequence.
    Packed {
        /// The offsets.
        cu_seqlens: Vec<usize>,
        /// Rows `T` that they must cover.
        time: usize,
    },
}

impl Sequences {
    /// Number of sequences `N`.
    pub fn count(&self) -> usize {
        match self {
            Sequences::Uniform { batch, .. } => *batch,
            Sequences::Packed { cu_seqlens, .. } => cu_seqlens.len().saturating_sub(1),
        }
    }

    /// Rows of all sequences together.
    pub fn rows(&self) -> usize {
        match self {
            Sequences::Uniform { batch, time } => batch.saturating_mul(*time),
            Sequences::Packed { time, .. } => *time,
        }
    }

    /// Rows of the longest sequence.
    pub fn longest(&self) -> usize {
        match self {
            Sequences::Uniform { time, .. } => *time,
            Sequences::Packed { cu_seqlens, .. } => {
                cu_seqlens.windows(2).map(|w| w[1].saturating_sub(w[0])).max().unwrap_or(0)
            }
        }
    }

    /// Checks the offsets of packed sequences.
    ///
    /// # Errors
    ///
    /// [`GlaError::CuSeqlensTooShort`], [`GlaError::CuSeqlensStart`], [`GlaError::CuSeqlensFalling`] or
    /// [`GlaError::CuSeqlensEnd`].
    pub fn validate(&self) -> Result<(), GlaError> {
        let Sequences::Packed { cu_seqlens, time } = self else {
            return Ok(());
        };
        let (Some(&first), Some(&last)) = (cu_seqlens.first(), cu_seqlens.last()) else {
            return Err(GlaError::CuSeqlensTooShort { len: 0 });
        };
        if cu_seqlens.len() < 2 {
            return Err(GlaError::CuSeqlensTooShort { len: cu_seqlens.len() });
        }
        if first != 0 {
            return Err(GlaError::CuSeqlensStart { first });
        }
        if let Some(at) = cu_seqlens.windows(2).position(|w| w[1] < w[0]) {
            return Err(GlaError::CuSeqlensFalling {
                index: at + 1,
                value: cu_seqlens[at + 1],
                previous: cu_seqlens[at],
            });
        }
        if last != *time {
            return Err(GlaError::CuSeqlensEnd { last, time: *time });
        }
        Ok(())
    }

    /// First row and row count of every sequence.
    pub fn spans(&self) -> Vec<(usize, usize)> {
        match self {
            Sequences::Uniform { batch, time } => (0..*batch).map(|b| (b * time, *time)).collect(),
            Sequences::Packed { cu_seqlens, .. } => {
                cu_seqlens.windows(2).map(|w| (w[0], w[1] - w[0])).collect()
            }
        }
    }

    /// Chunks of `chunk` rows, of which none straddles two sequences.
    pub fn num_chunks(&self, chunk: usize) -> usize {
        match self {
            Sequences::Uniform { batch, time } => batch * time.div_ceil(chunk),
            Sequences::Packed { .. } => {
                self.spans().iter().map(|(_, len)| len.div_ceil(chunk)).sum()
            }
        }
    }

    /// The lines along which chunks of `chunk` rows are walked: the sequences, or where the longest has more
    /// than `segment` chunks, segments of them of so many.
    pub(crate) fn lines(&self, chunk: usize, segment: usize) -> Lines {
        let segmented = self.longest().div_ceil(chunk) > segment;
        match self {
            Sequences::Uniform { batch, time } => {
                let chunks = time.div_ceil(chunk);
                let segment = if segmented { segment } else { chunks };
                let segments = if segmented { chunks.div_ceil(segment) } else { 1 };
                let place = Place::Equal { time: *time, chunks, segments, segment };
                Lines { count: batch * segments, num_chunks: batch * chunks, segmented, place }
            }
            Sequences::Packed { .. } => {
                let length = if segmented { segment } else { usize::MAX };
                let (words, count, num_chunks) = self.table(chunk, length);
                Lines { count, num_chunks, segmented, place: Place::Table(words) }
            }
        }
    }

    /// See [`Place::Table`]; its lines and its chunks. A sequence without rows is a line, but has no segments.
    fn table(&self, chunk: usize, segment: usize) -> (Vec<u32>, usize, usize) {
        let (mut bounds, mut lines, mut chunks) = (vec![0], Vec::new(), Vec::new());
        for (start, len) in self.spans() {
            let (first, count) = (chunks.len() / 2, len.div_ceil(chunk));
            let segments = if segment == usize::MAX { 1 } else { count.div_ceil(segment) };
            for n in 0..segments {
                let skipped = n * segment;
                let row = start + skipped * chunk;
                let own = segment.min(count - skipped);
                lines.extend([first + skipped, own, row, start + len].map(|x| x as u32));
            }
            for c in 0..count {
                let rows = chunk.min(len - c * chunk);
                chunks.extend([(start + c * chunk) as u32, rows as u32]);
            }
            bounds.push(lines.len() as u32 / 4);
        }
        let (count, num_chunks) = (lines.len() / 4, chunks.len() / 2);
        (bounds.into_iter().chain(lines).chain(chunks).collect(), count, num_chunks)
    }
}

/// See [`Sequences::lines`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Lines {
    /// How many.
    pub count: usize,
    /// Chunks of all of them. None straddles two sequences.
    pub num_chunks: usize,
    /// Whether they are segments.
    pub segmented: bool,
    /// How the kernels find them.
    pub place: Place,
}

/// Where lines and chunks lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Sequences of one length: of each its rows, chunks and lines, and the chunks of a line.
    Equal {
        /// Rows of a sequence.
        time: usize,
        /// Its chunks.
        chunks: usize,
        /// Its lines.
        segments: usize,
        /// Chunks of a line.
        segment: usize,
    },
    /// Packed ones. The table that the kernels read: the first line of each sequence and the end of the last's; of
    /// each line `(first chunk, chunks, first row, end of the sequence's rows)`; of each chunk `(first row, rows)`.
    Table(Vec<u32>),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(lines: &Lines) -> &[u32] {
        match &lines.place {
            Place::Table(words) => words,
            equal => panic!("{equal:?}"),
        }
    }

    #[test]
    fn chunks_do_not_straddle_sequences() {
        let packed = Sequences::Packed { cu_seqlens: vec![0, 5, 5, 64, 130], time: 130 };
        packed.validate().unwrap();
        let lines = packed.lines(64, usize::MAX);
        assert_eq!((lines.count, lines.num_chunks, lines.segmented), (4, 4, false));
        let words = words(&lines);
        assert_eq!(words[..5], [0, 1, 2, 3, 4]);
        let of_lines = [[0, 1, 0, 5], [1, 0, 5, 5], [1, 1, 5, 64], [2, 2, 64, 130]];
        assert_eq!(words[5..21], of_lines.concat());
        assert_eq!(words[21..], [0, 5, 5, 59, 64, 64, 128, 2]);
        assert_eq!(packed.longest(), 66);
    }

    #[test]
    fn segments_cut_sequences() {
        let packed = Sequences::Packed { cu_seqlens: vec![0, 5, 5, 130], time: 130 };
        let whole = packed.lines(16, usize::MAX);
        assert_eq!((whole.count, whole.num_chunks), (3, 9));
        let lines = packed.lines(16, 3);
        assert_eq!((lines.count, lines.num_chunks, lines.segmented), (4, 9, true));
        assert_eq!(words(&lines)[..4], [0, 1, 1, 4]);
        let of_lines = [[0, 1, 0, 5], [1, 3, 5, 130], [4, 3, 53, 130], [7, 2, 101, 130]];
        assert_eq!(words(&lines)[4..20], of_lines.concat());
        assert_eq!(words(&lines)[20..], words(&whole)[16..]);
        let uniform = Sequences::Uniform { batch: 3, time: 130 }.lines(16, 4);
        assert_eq!((uniform.count, uniform.num_chunks), (9, 27));
        let equal = Place::Equal { time: 130, chunks: 9, segments: 3, segment: 4 };
        assert_eq!(uniform.place, equal);
        let empty = Sequences::Uniform { batch: 3, time: 0 }.lines(16, 4);
        assert_eq!((empty.count, empty.num_chunks, empty.segmented), (3, 0, false));
    }

    #[test]
    fn bad_offsets_are_named() {
        let check = |cu: &[usize]| {
            let packed = Sequences::Packed { cu_seqlens: cu.to_vec(), time: 10 };
            packed.validate().unwrap_err().to_string()
        };
        assert_eq!(check(&[0]), "cu_seqlens: needs at least 2 entries, got 1");
        assert_eq!(check(&[1, 10]), "cu_seqlens: must start at 0, got 1");
        assert_eq!(check(&[0, 7, 6, 10]), "cu_seqlens: must not fall, got 6 at index 2 after 7");
        assert_eq!(check(&[0, 7]), "cu_seqlens: must end at T = 10, got 7");
    }
}
