//! The operator, on numpy arrays and on memory that torch owns.

use birkhoff_core::isa::Isa;
use birkhoff_core::layout::Layout;
use birkhoff_core::linear::{
    Floats, FloatsMut, Input, LinearOptions, Output, Precision, linear as multiply,
};
use birkhoff_core::{Codec, Dtype, MatrixView};
use half::{bf16, f16};
use numpy::{Element, PyArray1, PyArrayDyn, PyArrayMethods, PyUntypedArrayMethods};
use pyo3::prelude::*;

use crate::arrays;
use crate::environment::get_num_threads;
use crate::errors::{Failure, Result};
use crate::memory::{slice, slice_mut};

fn precision(name: &str) -> Result<Precision> {
    Precision::from_name(name).ok_or_else(|| {
        Failure::value(format!(
            "there is no precision {name:?}; choose \"highest\", \"high\" or \"medium\""
        ))
    })
}

/// `x W^T + bias` of numpy arrays.
///
/// # Errors
/// `ValueError` for a wrong shape, dtype or precision.
pub(crate) fn of_arrays<'py>(
    weight: MatrixView<'_>,
    x: &Bound<'py, PyAny>,
    bias: Option<&Bound<'py, PyAny>>,
    precision_name: &str,
) -> Result<Bound<'py, PyAny>> {
    let py = x.py();
    let options = LinearOptions {
        precision: precision(precision_name)?,
        isa: Isa::current()?,
        threads: get_num_threads()?,
    };
    let numpy = py.import("numpy")?;
    let contiguous = |array: &Bound<'py, PyAny>| numpy.call_method1("ascontiguousarray", (array,));
    let bias = match bias {
        None => None,
        Some(bias) => Some(
            numpy
                .call_method1("ascontiguousarray", (bias, "float32"))?
                .cast_into::<PyArrayDyn<f32>>()
                .map_err(PyErr::from)?
                .readonly(),
        ),
    };
    let bias = bias.as_ref().map(|bias| arrays::contiguous(bias, "bias")).transpose()?;

    let x = numpy.call_method1("asanyarray", (x,))?;
    if let Ok(x) = contiguous(&x)?.cast_into::<PyArrayDyn<f32>>() {
        return of_typed(weight, &x, bias, &options, |x| Floats::F32(x), |y| FloatsMut::F32(y));
    }
    if let Ok(x) = contiguous(&x)?.cast_into::<PyArrayDyn<f16>>() {
        return of_typed(weight, &x, bias, &options, |x| Floats::F16(x), |y| FloatsMut::F16(y));
    }
    Err(Failure::value(format!(
        "x must be float32 or float16, not {}; convert it first",
        x.getattr("dtype")?
    )))
}

fn of_typed<'py, T: Element + Copy + Default + Send + Sync>(
    weight: MatrixView<'_>,
    x: &Bound<'py, PyArrayDyn<T>>,
    bias: Option<&[f32]>,
    options: &LinearOptions,
    input: fn(&[T]) -> Floats<'_>,
    output: fn(&mut [T]) -> FloatsMut<'_>,
) -> Result<Bound<'py, PyAny>> {
    let py = x.py();
    let (out_features, in_features) = (weight.layout().rows(), weight.layout().cols());
    let mut shape = x.shape().to_vec();
    let Some(last) = shape.last_mut().filter(|last| **last == in_features) else {
        return Err(Failure::value(format!(
            "x of shape {:?} does not fit weights of shape ({out_features}, {in_features}): its last \
             dimension must be {in_features}",
            x.shape()
        )));
    };
    *last = out_features;
    let rows: usize = x.shape()[..x.ndim() - 1].iter().product();
    let x = x.readonly();
    let elements = arrays::contiguous(&x, "x")?;
    let mut out = vec![T::default(); rows * out_features];
    py.detach(|| {
        multiply(
            weight,
            Input::new(input(elements), rows, in_features, in_features)?,
            bias,
            Output::new(output(&mut out), rows, out_features, out_features)?,
            options,
        )
    })?;
    Ok(PyArray1::from_vec(py, out).reshape(shape)?.into_any())
}

/// A coded matrix in memory that another library owns: the buffers of a torch module.
#[pyclass(frozen, module = "birkhoff._core")]
pub(crate) struct BorrowedMatrix {
    layout: Layout,
    codes: *const u8,
    row_scales: *const u8,
    group_exponents: *const u8,
    /// Keeps the memory alive.
    _owner: Py<PyAny>,
}

// SAFETY: the memory is only read, and whoever made the object keeps it in place.
unsafe impl Send for BorrowedMatrix {}
// SAFETY: as above.
unsafe impl Sync for BorrowedMatrix {}

impl BorrowedMatrix {
    /// # Safety
    /// The caller of `new` has promised that the memory is there as long as the owner lives.
    unsafe fn view(&self) -> MatrixView<'_> {
        // SAFETY: as promised, and of the lengths that the layout says.
        let [codes, row_scales, group_exponents] = unsafe {
            [
                slice(self.codes, self.layout.codes_len()),
                slice(self.row_scales, self.layout.row_scales_len()),
                slice(self.group_exponents, self.layout.group_exponents_len()),
            ]
        };
        MatrixView::new(self.layout, codes, row_scales, group_exponents)
            .expect("the lengths are the layout's")
    }
}

#[pymethods]
impl BorrowedMatrix {
    #[new]
    #[pyo3(signature = (owner, codes, row_scales, group_exponents, shape, *, bits, codec))]
    fn py_new(
        owner: Py<PyAny>,
        codes: usize,
        row_scales: usize,
        group_exponents: usize,
        shape: (usize, usize),
        bits: u32,
        codec: &str,
    ) -> Result<BorrowedMatrix> {
        Ok(BorrowedMatrix {
            layout: Layout::new(shape.0, shape.1, Codec::from_name(codec)?.trajectory(bits)?)?,
            codes: codes as *const u8,
            row_scales: row_scales as *const u8,
            group_exponents: group_exponents as *const u8,
            _owner: owner,
        })
    }

    #[expect(clippy::too_many_arguments, reason = "addresses and shapes, called from one place")]
    fn linear(
        &self,
        py: Python<'_>,
        x: usize,
        dtype: &str,
        rows: usize,
        row_stride: usize,
        bias: Option<usize>,
        out: usize,
        precision_name: &str,
        threads: usize,
    ) -> Result<()> {
        let options =
            LinearOptions { precision: precision(precision_name)?, isa: Isa::current()?, threads };
        let dtype = Dtype::from_name(dtype)?;
        let (out_features, in_features) = (self.layout.rows(), self.layout.cols());
        let x_len = rows.saturating_sub(1) * row_stride + if rows == 0 { 0 } else { in_features };
        let out_len = rows * out_features;
        py.detach(|| {
            // SAFETY: `birkhoff.ops`, the one caller, passes the addresses of live CPU tensors: `x`
            // of `rows` rows of in_features elements `row_stride` apart, `out` contiguous, fresh and
            // of rows x out_features, both of `dtype`; `bias` of out_features f32.
            let (weight, x, bias, out) = unsafe {
                let bias = bias.map(|bias| slice(bias as *const f32, out_features));
                let (x, out) = match dtype {
                    Dtype::F32 => (
                        Floats::F32(slice(x as *const f32, x_len)),
                        FloatsMut::F32(slice_mut(out as *mut f32, out_len)),
                    ),
                    Dtype::F16 => (
                        Floats::F16(slice(x as *const f16, x_len)),
                        FloatsMut::F16(slice_mut(out as *mut f16, out_len)),
                    ),
                    Dtype::BF16 => (
                        Floats::BF16(slice(x as *const bf16, x_len)),
                        FloatsMut::BF16(slice_mut(out as *mut bf16, out_len)),
                    ),
                    Dtype::F64 => {
                        return Err(Failure::value("x must not be float64; convert it first"));
                    }
                };
                (self.view(), x, bias, out)
            };
            let x = Input::new(x, rows, in_features, row_stride)?;
            let out = Output::new(out, rows, out_features, out_features)?;
            Ok(multiply(weight, x, bias, out, &options)?)
        })
    }

    fn decode<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyAny>> {
        // SAFETY: the caller of `new` keeps the memory in place.
        let weight = unsafe { self.view() };
        let values = crate::environment::compute(py, |isa| weight.decode(isa))?;
        Ok(arrays::owned(py, values, &[self.layout.rows(), self.layout.cols()])?)
    }
}
