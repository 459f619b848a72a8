//! NumPy arrays in and out.

use numpy::ndarray::ArrayView1;
use numpy::{Element, PyArray1, PyArrayMethods, PyReadonlyArrayDyn, PyUntypedArrayMethods};
use pyo3::prelude::*;

use crate::errors::{Failure, Result};

/// The elements of a C-contiguous array.
pub(crate) fn contiguous<'a, T: Element>(
    array: &'a PyReadonlyArrayDyn<'_, T>,
    argument: &str,
) -> Result<&'a [T]> {
    // `as_slice` alone takes arrays in Fortran's order too.
    let slice = if array.is_c_contiguous() { array.as_slice().ok() } else { None };
    slice.ok_or_else(|| {
        Failure::value(format!("{argument} must be C-contiguous; use numpy.ascontiguousarray"))
    })
}

/// The elements of the factor of second moments, and its columns.
pub(crate) fn factor<'a>(array: &'a PyReadonlyArrayDyn<'_, f32>) -> Result<(&'a [f32], usize)> {
    match array.shape() {
        &[rows, cols] if rows == cols => Ok((contiguous(array, "factor")?, cols)),
        shape => Err(Failure::value(format!("factor must be a square matrix, not {shape:?}"))),
    }
}

/// A read-only array on bytes that `owner` holds, without a copy.
///
/// # Safety
/// `bytes` must stay where they are, unchanged, as long as `owner` lives.
pub(crate) unsafe fn borrowed<'py>(
    bytes: &[u8],
    owner: Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyArray1<u8>>> {
    // SAFETY: the array keeps a reference to `owner`, and the caller promises the rest.
    let array = unsafe { PyArray1::borrow_from_array(&ArrayView1::from(bytes), owner) };
    array.readwrite().make_nonwriteable();
    Ok(array)
}

/// An array of the given shape that takes over `values`.
pub(crate) fn owned<'py>(
    py: Python<'py>,
    values: Vec<f32>,
    shape: &[usize],
) -> PyResult<Bound<'py, PyAny>> {
    Ok(PyArray1::from_vec(py, values).reshape(shape)?.into_any())
}
