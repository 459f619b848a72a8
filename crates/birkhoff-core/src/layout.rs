//! Where each weight's bits lie in the code bytes.
//!
//! A matrix of `rows x cols` (out_features x in_features) is cut into **strips** of 16 rows and
//! **blocks** of 32 columns; both are padded with zeros to whole ones. Within a block, each row has
//! two **streams**: stream 0 holds columns 0 to 15, stream 1 columns 16 to 31, so 16 weights a stream
//! take exactly `bits` 16-bit words. The code bytes are
//!
//! ```text
//! [strip][block][word 0..bits][row 0..16][stream 0..2]  of 16-bit little-endian words
//! ```
//!
//! so that one 64-byte vector holds the same word of all rows and streams of a strip. A stream's
//! words, most significant bit first, are one long number. It is closed: before its first word comes
//! its last word, so that a window that reaches back over the start finds its bits there.
//!
//! At 8 bits the code bytes are the int8 values in the order of a decoded block:
//!
//! ```text
//! [strip][block][quad 0..8][row 0..16][byte 0..4]
//! ```
//!
//! where quad `i` holds columns `2i, 2i + 1, 16 + 2i, 17 + 2i`: the four bytes that an instruction
//! like `vpdpbusd` multiplies and adds for a row. Every codec decodes to this order.
//!
//! **Scales**: a weight is `row_scale * GROUP_SCALE[group_exponent] * value`, with a bfloat16 row
//! scale (`[strip][row]`) and a 4-bit exponent for each group of 128 columns
//! (`[strip][group][byte 0..8]`, row `i` in the low half of byte `i`, row `8 + i` in the high half).

use aligned_vec::{AVec, ConstAlign};

use crate::codec::Trajectory;
use crate::error::{Error, Result};

/// Rows of a strip.
pub const STRIP: usize = 16;
/// Columns of a block.
pub const BLOCK: usize = 32;
/// Weights of a stream in a block.
pub const STREAM: usize = 16;
/// Columns that share a group exponent.
pub const GROUP: usize = 128;
/// Bytes of a decoded block: 16 rows of 32 int8 values.
pub const DECODED_BLOCK: usize = STRIP * BLOCK;
/// Bytes of the group exponents of one group of a strip.
pub const EXPONENTS: usize = STRIP / 2;
/// Bytes of the row scales of a strip.
pub const ROW_SCALES: usize = STRIP * 2;

/// Shape and trajectory of a coded matrix, and the sizes that follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    rows: usize,
    cols: usize,
    trajectory: Trajectory,
}

impl Layout {
    /// The layout of a `rows x cols` matrix.
    ///
    /// # Errors
    /// [`Error::Shape`] if its sizes overflow, [`Error::Bits`] if there is no such trajectory.
    pub fn new(rows: usize, cols: usize, trajectory: Trajectory) -> Result<Self> {
        trajectory.check()?;
        // The decoded f32 matrix is the largest thing whose size is ever computed.
        let padded = (rows.checked_next_multiple_of(STRIP))
            .zip(cols.checked_next_multiple_of(GROUP))
            .and_then(|(rows, cols)| rows.checked_mul(cols)?.checked_mul(size_of::<f64>()));
        match padded {
            Some(bytes) if isize::try_from(bytes).is_ok() => Ok(Layout { rows, cols, trajectory }),
            _ => Err(Error::Shape(format!("a matrix of {rows} x {cols} does not fit in memory"))),
        }
    }

    /// Rows (out_features).
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns (in_features).
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How the codes are read.
    pub fn trajectory(&self) -> Trajectory {
        self.trajectory
    }

    /// Number of strips of 16 rows.
    pub fn strips(&self) -> usize {
        self.rows.div_ceil(STRIP)
    }

    /// Number of blocks of 32 columns.
    pub fn blocks(&self) -> usize {
        self.cols.div_ceil(BLOCK)
    }

    /// Number of groups of 128 columns.
    pub fn groups(&self) -> usize {
        self.cols.div_ceil(GROUP)
    }

    /// Columns with padding, a multiple of 32.
    pub fn padded_cols(&self) -> usize {
        self.blocks() * BLOCK
    }

    /// Code bytes of a block of a strip.
    pub fn block_len(&self) -> usize {
        self.trajectory.bits() as usize * (DECODED_BLOCK / 8)
    }

    /// Code bytes of a strip.
    pub fn strip_len(&self) -> usize {
        self.blocks() * self.block_len()
    }

    /// Code bytes.
    pub fn codes_len(&self) -> usize {
        self.strips() * self.strip_len()
    }

    /// Bytes of the row scales.
    pub fn row_scales_len(&self) -> usize {
        self.strips() * ROW_SCALES
    }

    /// Bytes of the group exponents of a strip.
    pub fn strip_exponents_len(&self) -> usize {
        self.groups() * EXPONENTS
    }

    /// Bytes of the group exponents.
    pub fn group_exponents_len(&self) -> usize {
        self.strips() * self.strip_exponents_len()
    }

    /// Bytes of all parts.
    pub fn len(&self) -> usize {
        self.codes_len() + self.row_scales_len() + self.group_exponents_len()
    }

    /// Whether the matrix has no weights.
    pub fn is_empty(&self) -> bool {
        self.rows == 0 || self.cols == 0
    }
}

/// Place of a weight in a decoded block, from its row in the strip and its column in the block.
pub const fn decoded_index(row: usize, col: usize) -> usize {
    let (stream, weight) = (col / STREAM, col % STREAM);
    (weight / 2) * (4 * STRIP) + row * 4 + stream * 2 + weight % 2
}

/// Byte offset, in the codes of a block, of word `word` of a row's stream.
pub const fn word_offset(word: usize, row: usize, stream: usize) -> usize {
    (word * STRIP + row) * 4 + stream * 2
}

/// Copies row `row` of decoded blocks to `out` in the order of its columns.
#[inline(always)]
pub fn decoded_row(blocks: &[i8], row: usize, out: &mut [i8]) {
    let blocks = blocks.as_chunks::<DECODED_BLOCK>().0.iter();
    for (block, out) in blocks.zip(out.as_chunks_mut::<BLOCK>().0) {
        for pair in (0..STREAM).step_by(2) {
            for stream in [0, STREAM] {
                // Two columns of a stream stand together.
                let at = decoded_index(row, stream + pair);
                out[stream + pair] = block[at];
                out[stream + pair + 1] = block[at + 1];
            }
        }
    }
}

/// `len` zero bytes, starting on a cache line.
pub fn zeroed(len: usize) -> AVec<u8, ConstAlign<64>> {
    AVec::from_iter(64, std::iter::repeat_n(0, len))
}

/// Exponent (0 to 15) of row `row` of a strip, from the 8 bytes of its group.
pub const fn group_exponent(bytes: &[u8; EXPONENTS], row: usize) -> u8 {
    bytes[row % EXPONENTS] >> (row / EXPONENTS * 4) & 15
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decoded_index_is_a_permutation() {
        let mut seen = [false; DECODED_BLOCK];
        for row in 0..STRIP {
            for col in 0..BLOCK {
                assert!(!std::mem::replace(&mut seen[decoded_index(row, col)], true));
            }
        }
    }

    #[test]
    fn sizes_follow_the_shape() {
        let layout = Layout::new(17, 130, Trajectory::Shift(4)).unwrap();
        assert_eq!((layout.strips(), layout.blocks(), layout.groups()), (2, 5, 2));
        assert_eq!(layout.codes_len(), 2 * 5 * 4 * 64);
        assert_eq!(layout.row_scales_len(), 64);
        assert_eq!(layout.group_exponents_len(), 2 * 2 * 8);
        assert!(Layout::new(0, 7, Trajectory::Int8).unwrap().is_empty());
    }

    #[test]
    fn impossible_rates_are_refused() {
        for trajectory in [Trajectory::Shift(8), Trajectory::Shift(1), Trajectory::Winding(3)] {
            assert!(Layout::new(1, 1, trajectory).is_err());
        }
    }

    #[test]
    fn impossible_shapes_are_refused() {
        for (rows, cols) in [(usize::MAX, 1), (1, usize::MAX), (1 << 40, 1 << 40)] {
            assert!(Layout::new(rows, cols, Trajectory::Shift(4)).is_err());
        }
    }
}
