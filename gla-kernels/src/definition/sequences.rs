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
            Sequences::Uniform { batch, time } => batch * time,
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
        self.spans().iter().map(|(_, len)| len.div_ceil(chunk)).sum()
    }

    /// The table the kernels read: for each sequence `(first chunk, number of chunks)`, then for
    /// each chunk `(first row, rows)`. No chunk straddles two sequences.
    pub fn chunk_table(&self, chunk: usize) -> ChunkTable {
        let spans = self.spans();
        let mut words = Vec::with_capacity(2 * spans.len());
        let mut chunks = Vec::new();
        for (start, len) in &spans {
            let count = len.div_ceil(chunk);
            words.extend([(chunks.len() / 2) as u32, count as u32]);
            for c in 0..count {
                let rows = chunk.min(len - c * chunk);
                chunks.extend([(start + c * chunk) as u32, rows as u32]);
            }
        }
        let num_chunks = chunks.len() / 2;
        words.extend(chunks);
        ChunkTable { words, num_sequences: spans.len(), num_chunks }
    }
}

/// See [`Sequences::chunk_table`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkTable {
    /// The table as the device reads it.
    pub words: Vec<u32>,
    /// Sequences listed.
    pub num_sequences: usize,
    /// Chunks listed.
    pub num_chunks: usize,
}

impl ChunkTable {
    /// Cuts the sequences into segments of `length` chunks.
    pub fn segments(&self, length: usize) -> Segments {
        let chunks = &self.words[2 * self.num_sequences..];
        let mut words = Vec::new();
        let mut bounds = vec![0];
        for sequence in self.words[..2 * self.num_sequences].chunks(2) {
            let (first, count) = (sequence[0] as usize, sequence[1] as usize);
            for start in (0..count).step_by(length) {
                words.extend([(first + start) as u32, length.min(count - start) as u32]);
            }
            bounds.push(words.len() as u32 / 2);
        }
        let count = words.len() / 2;
        words.extend(chunks);
        Segments { table: ChunkTable { words, num_sequences: count, ..*self }, bounds }
    }
}

/// See [`ChunkTable::segments`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segments {
    /// A table with the segments in the place of sequences.
    pub table: ChunkTable,
    /// First segment of each sequence, and the end of the last.
    pub bounds: Vec<u32>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_do_not_straddle_sequences() {
        let packed = Sequences::Packed { cu_seqlens: vec![0, 5, 5, 64, 130], time: 130 };
        packed.validate().unwrap();
        let table = packed.chunk_table(64);
        assert_eq!((table.num_sequences, table.num_chunks), (4, 4));
        assert_eq!(packed.num_chunks(64), 4);
        assert_eq!(table.words[..8], [0, 1, 1, 0, 1, 1, 2, 2]);
        assert_eq!(table.words[8..], [0, 5, 5, 59, 64, 64, 128, 2]);
        assert_eq!(packed.longest(), 66);
    }

    #[test]
    fn segments_cut_sequences() {
        let packed = Sequences::Packed { cu_seqlens: vec![0, 5, 5, 130], time: 130 };
        let table = packed.chunk_table(16);
        assert_eq!((table.num_sequences, table.num_chunks), (3, 9));
        let segments = table.segments(3);
        assert_eq!(segments.bounds, [0, 1, 1, 4]);
        assert_eq!(segments.table.num_sequences, 4);
        assert_eq!(packed.num_chunks(16 * 3), 4);
        assert_eq!(segments.table.words[..8], [0, 1, 1, 3, 4, 3, 7, 2]);
        assert_eq!(segments.table.words[8..], table.words[6..]);
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
