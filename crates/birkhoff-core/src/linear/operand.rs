//! The rows that are multiplied and the rows that are written: float matrices with a row stride.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::dtype::Dtype;
use crate::error::{Error, Result};

/// Elements of an [`Input`].
#[derive(Clone, Copy, Debug)]
pub enum Floats<'a> {
    /// IEEE single.
    F32(&'a [f32]),
    /// IEEE half.
    F16(&'a [f16]),
    /// bfloat16.
    BF16(&'a [bf16]),
}

/// Elements of an [`Output`].
#[derive(Debug)]
pub enum FloatsMut<'a> {
    /// IEEE single.
    F32(&'a mut [f32]),
    /// IEEE half.
    F16(&'a mut [f16]),
    /// bfloat16.
    BF16(&'a mut [bf16]),
}

/// A matrix of `rows x cols` whose rows start `row_stride` elements apart.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    elements: Floats<'a>,
    rows: usize,
    cols: usize,
    row_stride: usize,
}

/// A matrix of `rows x cols` to be written; what lies between its rows is left as it is.
#[derive(Debug)]
pub struct Output<'a> {
    elements: FloatsMut<'a>,
    rows: usize,
    cols: usize,
    row_stride: usize,
}

/// Checks that `len` elements hold `rows x cols` of them.
fn check(name: &str, len: usize, rows: usize, cols: usize, row_stride: usize) -> Result<()> {
    let needed = match rows.checked_sub(1) {
        None => Some(0),
        Some(last) => last.checked_mul(row_stride).and_then(|start| start.checked_add(cols)),
    };
    if needed.is_some_and(|needed| needed <= len) {
        return Ok(());
    }
    Err(Error::Shape(format!(
        "{name} has {len} elements, too few for {rows} x {cols} with rows {row_stride} apart"
    )))
}

impl<'a> Input<'a> {
    /// `rows` rows of `cols` elements. Rows may overlap, or be the same (stride 0).
    ///
    /// # Errors
    /// [`Error::Shape`] if there are too few elements.
    pub fn new(elements: Floats<'a>, rows: usize, cols: usize, row_stride: usize) -> Result<Self> {
        let len = match elements {
            Floats::F32(elements) => elements.len(),
            Floats::F16(elements) => elements.len(),
            Floats::BF16(elements) => elements.len(),
        };
        check("the input", len, rows, cols, row_stride)?;
        Ok(Input { elements, rows, cols, row_stride })
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// A row as f32, converted into `scratch` where it is not.
    pub(super) fn row<'s>(&'s self, row: usize, scratch: &'s mut Vec<f32>) -> &'s [f32] {
        let range = row * self.row_stride..row * self.row_stride + self.cols;
        // Only grows, so that it is zeroed once and not for each row.
        if scratch.len() < self.cols && !matches!(self.elements, Floats::F32(_)) {
            scratch.resize(self.cols, 0.0);
        }
        match self.elements {
            Floats::F32(elements) => return &elements[range],
            Floats::F16(elements) => {
                elements[range].convert_to_f32_slice(&mut scratch[..self.cols]);
            }
            Floats::BF16(elements) => {
                elements[range].convert_to_f32_slice(&mut scratch[..self.cols]);
            }
        }
        &scratch[..self.cols]
    }
}

impl<'a> Output<'a> {
    /// `rows` rows of `cols` elements.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are too few elements or rows overlap.
    pub fn new(
        elements: FloatsMut<'a>,
        rows: usize,
        cols: usize,
        row_stride: usize,
    ) -> Result<Self> {
        let len = match &elements {
            FloatsMut::F32(elements) => elements.len(),
            FloatsMut::F16(elements) => elements.len(),
            FloatsMut::BF16(elements) => elements.len(),
        };
        check("the output", len, rows, cols, row_stride)?;
        if rows > 1 && row_stride < cols {
            return Err(Error::Shape(format!(
                "output rows of {cols} elements cannot be {row_stride} apart: they would overlap"
            )));
        }
        Ok(Output { elements, rows, cols, row_stride })
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Writes `values` (zeros if there are none) to every row.
    pub(super) fn fill_rows(&mut self, values: Option<&[f32]>) {
        let zeros = vec![0.0; if values.is_none() { self.cols } else { 0 }];
        let values = values.unwrap_or(&zeros);
        let rows = self.rows;
        let target = self.target();
        for row in 0..rows {
            // SAFETY: the output has so many rows and columns, and is borrowed mutably.
            unsafe { write(values, target.dtype(), target.at(row, 0)) }
        }
    }

    /// Asks the system for huge pages where the output is large: it is often fresh memory, and a page
    /// fault for every 4 KiB of it would take a good part of the time of the product.
    #[cfg(target_os = "linux")]
    pub(super) fn advise_huge_pages(&mut self) {
        const WORTHWHILE: usize = 4 << 20;
        const PAGE: usize = 4 << 10;
        let elements = self.rows.saturating_sub(1) * self.row_stride + self.cols;
        let target = self.target();
        let len = elements * target.dtype().size();
        let skipped = target.start.align_offset(PAGE);
        if len >= WORTHWHILE && skipped < PAGE {
            // SAFETY: the range lies in memory that is borrowed mutably, and the advice changes
            // none of it. Its result is of no consequence.
            unsafe {
                libc::madvise(
                    target.start.add(skipped).cast(),
                    (len - skipped) / PAGE * PAGE,
                    libc::MADV_HUGEPAGE,
                );
            }
        }
    }

    /// Where the elements go, for kernels that write disjoint parts from several threads.
    pub(super) fn target(&mut self) -> Target<'_> {
        let (start, dtype): (*mut u8, _) = match &mut self.elements {
            FloatsMut::F32(elements) => (elements.as_mut_ptr().cast(), Dtype::F32),
            FloatsMut::F16(elements) => (elements.as_mut_ptr().cast(), Dtype::F16),
            FloatsMut::BF16(elements) => (elements.as_mut_ptr().cast(), Dtype::BF16),
        };
        Target { start, dtype, row_stride: self.row_stride, output: std::marker::PhantomData }
    }
}

/// The elements of an [`Output`] as a raw pointer.
#[derive(Clone, Copy)]
pub(super) struct Target<'a> {
    start: *mut u8,
    dtype: Dtype,
    row_stride: usize,
    output: std::marker::PhantomData<&'a mut [u8]>,
}

// SAFETY: a target is only written through, and its users see to it that no two threads write the
// same element (`Target::at` is only dereferenced in unsafe code that says so).
unsafe impl Send for Target<'_> {}
// SAFETY: as above.
unsafe impl Sync for Target<'_> {}

impl Target<'_> {
    /// The element type: f32, f16 or bf16.
    #[inline(always)]
    pub(super) fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Where an element lies.
    #[inline(always)]
    pub(super) fn at(&self, row: usize, col: usize) -> *mut u8 {
        self.start.wrapping_add((row * self.row_stride + col) * self.dtype.size())
    }
}

/// Writes values as `dtype`, rounded to nearest even.
///
/// # Safety
/// As many elements must be writable at `to`, aligned for the dtype.
pub(crate) unsafe fn write(values: &[f32], dtype: Dtype, to: *mut u8) {
    // SAFETY: the caller says that the elements are writable, and nothing else refers to them.
    unsafe {
        match dtype {
            Dtype::F16 => std::slice::from_raw_parts_mut(to.cast::<f16>(), values.len())
                .convert_from_f32_slice(values),
            Dtype::BF16 => std::slice::from_raw_parts_mut(to.cast::<bf16>(), values.len())
                .convert_from_f32_slice(values),
            Dtype::F32 => std::ptr::copy_nonoverlapping(values.as_ptr(), to.cast(), values.len()),
            Dtype::F64 => unreachable!("outputs have no f64"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_few_elements_are_refused() {
        let elements = [0.0; 10];
        assert!(Input::new(Floats::F32(&elements), 2, 5, 5).is_ok());
        assert!(Input::new(Floats::F32(&elements), 3, 5, 0).is_ok());
        assert!(Input::new(Floats::F32(&elements), 0, 50, 50).is_ok());
        let error = Input::new(Floats::F32(&elements), 2, 5, 6).unwrap_err().to_string();
        assert!(error.contains("10 elements") && error.contains("2 x 5"), "{error}");
        assert!(Input::new(Floats::F32(&elements), 3, 1, usize::MAX).is_err());
    }

    #[test]
    fn overlapping_output_rows_are_refused() {
        let mut elements = [0.0; 10];
        assert!(Output::new(FloatsMut::F32(&mut elements), 2, 5, 4).is_err());
        assert!(Output::new(FloatsMut::F32(&mut elements), 1, 5, 0).is_ok());
    }
}
