//! A coded matrix: its parts, and whole-matrix encode and decode.

use std::ops::Range;
use std::sync::Arc;

use aligned_vec::{AVec, ConstAlign};
use half::bf16;
use memmap2::Mmap;

use crate::codec::scale::GROUP_SCALE;
use crate::decode;
use crate::error::{Error, Result};
use crate::isa::Isa;
use crate::layout::{self, DECODED_BLOCK, EXPONENTS, GROUP, Layout, ROW_SCALES, STRIP};

/// Bytes that start on a cache line when owned, or lie in a memory-mapped file.
#[derive(Clone)]
pub enum Bytes {
    /// In memory of our own.
    Owned(AVec<u8, ConstAlign<64>>),
    /// A range of a file, shared with everyone who maps it.
    Mapped(Arc<Mmap>, Range<usize>),
}

impl Bytes {
    /// A copy of `bytes`.
    pub fn copied(bytes: &[u8]) -> Bytes {
        Bytes::Owned(AVec::from_slice(64, bytes))
    }
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Owned(bytes) => bytes,
            Bytes::Mapped(map, range) => &map[range.clone()],
        }
    }
}

/// A coded matrix of out_features x in_features.
#[derive(Clone)]
pub struct HyperMatrix {
    layout: Layout,
    codes: Bytes,
    row_scales: Bytes,
    group_exponents: Bytes,
}

/// A borrowed [`HyperMatrix`]: what the kernels work on.
#[derive(Clone, Copy)]
pub struct MatrixView<'a> {
    layout: Layout,
    codes: &'a [u8],
    row_scales: &'a [u8],
    group_exponents: &'a [u8],
}

impl HyperMatrix {
    /// Puts a matrix together from its parts.
    ///
    /// # Errors
    /// [`Error::Shape`] if a part has the wrong number of bytes.
    pub fn new(
        layout: Layout,
        codes: Bytes,
        row_scales: Bytes,
        group_exponents: Bytes,
    ) -> Result<Self> {
        MatrixView::new(layout, &codes, &row_scales, &group_exponents)?;
        Ok(HyperMatrix { layout, codes, row_scales, group_exponents })
    }

    /// The matrix, borrowed.
    pub fn view(&self) -> MatrixView<'_> {
        MatrixView {
            layout: self.layout,
            codes: &self.codes,
            row_scales: &self.row_scales,
            group_exponents: &self.group_exponents,
        }
    }

    /// Its shape and trajectory.
    pub fn layout(&self) -> Layout {
        self.layout
    }
}

impl<'a> MatrixView<'a> {
    /// Puts a view together from its parts.
    ///
    /// # Errors
    /// [`Error::Shape`] if a part has the wrong number of bytes.
    pub fn new(
        layout: Layout,
        codes: &'a [u8],
        row_scales: &'a [u8],
        group_exponents: &'a [u8],
    ) -> Result<Self> {
        for (part, bytes, expected) in [
            ("codes", codes.len(), layout.codes_len()),
            ("row_scales", row_scales.len(), layout.row_scales_len()),
            ("group_exponents", group_exponents.len(), layout.group_exponents_len()),
        ] {
            if bytes != expected {
                return Err(Error::Shape(format!(
                    "{part} of a {} x {} matrix at {} bits take {expected} bytes, not {bytes}",
                    layout.rows(),
                    layout.cols(),
                    layout.trajectory().bits(),
                )));
            }
        }
        Ok(MatrixView { layout, codes, row_scales, group_exponents })
    }

    /// Its shape and trajectory.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// All code bytes.
    pub fn codes(&self) -> &'a [u8] {
        self.codes
    }

    /// All row scales: little-endian bfloat16.
    pub fn row_scales(&self) -> &'a [u8] {
        self.row_scales
    }

    /// All group exponents, two a byte.
    pub fn group_exponents(&self) -> &'a [u8] {
        self.group_exponents
    }

    /// The code bytes of a strip.
    pub fn strip(&self, strip: usize) -> &'a [u8] {
        let len = self.layout.strip_len();
        &self.codes[strip * len..][..len]
    }

    /// The row scales of a strip.
    pub fn strip_row_scales(&self, strip: usize) -> [f32; STRIP] {
        let bytes = &self.row_scales[strip * ROW_SCALES..][..ROW_SCALES];
        std::array::from_fn(|row| {
            bf16::from_le_bytes([bytes[2 * row], bytes[2 * row + 1]]).to_f32()
        })
    }

    /// The group exponents of a strip, eight bytes a group.
    pub fn strip_exponents(&self, strip: usize) -> &'a [[u8; EXPONENTS]] {
        let len = self.layout.strip_exponents_len();
        self.group_exponents[strip * len..][..len].as_chunks().0
    }

    /// Decodes the int8 values of a strip in the order of [`crate::layout`], without scales.
    ///
    /// # Panics
    /// If `out` does not hold 512 values a block.
    pub fn decode_strip(&self, isa: Isa, strip: usize, out: &mut [i8]) {
        assert_eq!(out.len(), self.layout.blocks() * DECODED_BLOCK);
        decode::blocks(isa, self.layout.trajectory(), self.strip(strip), 0, out);
    }

    /// Decodes the rows of a strip to f32: `row_scale * GROUP_SCALE[exponent] * value`.
    ///
    /// `out` takes `rows x cols` values, row by row; `scratch` is kept from strip to strip.
    fn decode_rows(
        &self,
        isa: Isa,
        strip: usize,
        scratch: &mut (Vec<i8>, Vec<i8>),
        out: &mut [f32],
    ) {
        let cols = self.layout.cols();
        let (decoded, values) = scratch;
        decoded.resize(self.layout.blocks() * DECODED_BLOCK, 0);
        values.resize(self.layout.padded_cols(), 0);
        self.decode_strip(isa, strip, decoded);
        let row_scales = self.strip_row_scales(strip);
        let exponents = self.strip_exponents(strip);
        for (row, out) in out.chunks_exact_mut(cols).enumerate() {
            layout::decoded_row(decoded, row, values);
            let groups = out.chunks_mut(GROUP).zip(values.chunks(GROUP)).zip(exponents);
            for ((out, values), exponents) in groups {
                let exponent = layout::group_exponent(exponents, row);
                let scale = row_scales[row] * GROUP_SCALE[usize::from(exponent)];
                for (out, &value) in out.iter_mut().zip(values) {
                    *out = scale * f32::from(value);
                }
            }
        }
    }

    /// Decodes the whole matrix to f32, row by row, on the current rayon pool.
    pub fn decode(&self, isa: Isa) -> Vec<f32> {
        use rayon::prelude::*;

        let mut out = vec![0.0; self.layout.rows() * self.layout.cols()];
        if !self.layout.is_empty() {
            out.par_chunks_mut(STRIP * self.layout.cols())
                .enumerate()
                .for_each_init(Default::default, |scratch, (strip, out)| {
                    self.decode_rows(isa, strip, scratch, out)
                });
        }
        out
    }
}
