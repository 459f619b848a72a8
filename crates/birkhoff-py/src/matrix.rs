//! Coded matrices.

use birkhoff_core as core;
use birkhoff_core::codec::{Feedback, ScaleRefit};
use birkhoff_core::layout::{EXPONENTS, Layout, STRIP};
use birkhoff_core::matrix::Bytes;
use birkhoff_core::{Codec, Dtype, EncodeOptions, FloatSlice, MatrixView};
use numpy::{PyArrayMethods, PyReadonlyArrayDyn};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::arrays;
use crate::distortion::Distortion;
use crate::environment::compute;
use crate::errors::{Failure, Result};
use crate::linear;

#[pyclass(frozen, module = "birkhoff._core")]
pub(crate) struct HyperMatrix {
    matrix: core::HyperMatrix,
    /// At 8 bits the layout does not say which codec was asked for.
    codec: Codec,
}

impl HyperMatrix {
    pub(crate) fn new(matrix: core::HyperMatrix, codec: Codec) -> HyperMatrix {
        HyperMatrix { matrix, codec }
    }

    /// A read-only array of `shape` on a part of the matrix.
    fn part<'py>(
        this: &Bound<'py, Self>,
        part: impl Fn(MatrixView<'_>) -> &[u8],
        shape: &[usize],
    ) -> PyResult<Bound<'py, PyAny>> {
        // SAFETY: the class is frozen, so the parts stay as they are while the object lives.
        let array =
            unsafe { arrays::borrowed(part(this.get().matrix.view()), this.clone().into_any()) }?;
        Ok(array.reshape(shape)?.into_any())
    }
}

#[pymethods]
impl HyperMatrix {
    #[new]
    #[pyo3(signature = (codes, row_scales, group_exponents, shape, *, bits, codec = "shift"))]
    fn py_new(
        codes: PyReadonlyArrayDyn<'_, u8>,
        row_scales: PyReadonlyArrayDyn<'_, u16>,
        group_exponents: PyReadonlyArrayDyn<'_, u8>,
        shape: (usize, usize),
        bits: u32,
        codec: &str,
    ) -> Result<HyperMatrix> {
        let codec = Codec::from_name(codec)?;
        let layout = Layout::new(shape.0, shape.1, codec.trajectory(bits)?)?;
        let row_scales: Vec<u8> = arrays::contiguous(&row_scales, "row_scales")?
            .iter()
            .flat_map(|scale| scale.to_le_bytes())
            .collect();
        let matrix = core::HyperMatrix::new(
            layout,
            Bytes::copied(arrays::contiguous(&codes, "codes")?),
            Bytes::copied(&row_scales),
            Bytes::copied(arrays::contiguous(&group_exponents, "group_exponents")?),
        )?;
        Ok(HyperMatrix { matrix, codec })
    }

    #[getter]
    fn shape(&self) -> (usize, usize) {
        (self.matrix.layout().rows(), self.matrix.layout().cols())
    }

    #[getter]
    fn bits(&self) -> u32 {
        self.matrix.layout().trajectory().bits()
    }

    #[getter]
    fn codec(&self) -> &'static str {
        self.codec.name()
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.matrix.layout().len()
    }

    #[getter]
    fn bits_per_weight(&self) -> f64 {
        let (rows, cols) = self.shape();
        self.nbytes() as f64 * 8.0 / (rows as f64 * cols as f64)
    }

    #[getter]
    fn codes<'py>(this: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let layout = this.get().matrix.layout();
        let shape = [layout.strips(), layout.blocks(), layout.block_len()];
        Self::part(this, |matrix| matrix.codes(), &shape)
    }

    #[getter]
    fn row_scales<'py>(this: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let strips = this.get().matrix.layout().strips();
        let bytes = Self::part(this, |matrix| matrix.row_scales(), &[strips * STRIP * 2])?;
        bytes.call_method1("view", ("<u2",))
    }

    #[getter]
    fn group_exponents<'py>(this: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let layout = this.get().matrix.layout();
        let shape = [layout.strips(), layout.groups(), EXPONENTS];
        Self::part(this, |matrix| matrix.group_exponents(), &shape)
    }

    fn decode<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyAny>> {
        let values = compute(py, |isa| self.matrix.view().decode(isa))?;
        let (rows, cols) = self.shape();
        Ok(arrays::owned(py, values, &[rows, cols])?)
    }

    #[pyo3(signature = (x, bias = None, precision = "high"))]
    fn linear<'py>(
        &self,
        x: &Bound<'py, PyAny>,
        bias: Option<&Bound<'py, PyAny>>,
        precision: &str,
    ) -> Result<Bound<'py, PyAny>> {
        linear::of_arrays(self.matrix.view(), x, bias, precision)
    }

    fn __reduce__<'py>(this: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let py = this.py();
        let options = PyDict::new(py);
        options.set_item("bits", this.get().bits())?;
        options.set_item("codec", this.get().codec())?;
        let partial = py.import("functools")?.getattr("partial")?;
        let constructor = partial.call((this.get_type(),), Some(&options))?;
        let parts = (Self::codes(this)?, Self::row_scales(this)?, Self::group_exponents(this)?);
        let arguments = (parts.0, parts.1, parts.2, this.get().shape());
        Ok((constructor, arguments).into_pyobject(py)?.into_any())
    }

    fn __repr__(&self) -> String {
        let (rows, cols) = self.shape();
        format!("HyperMatrix({rows} x {cols}, {}, {} bits)", self.codec.name(), self.bits())
    }
}

#[pyfunction]
#[pyo3(signature = (data, dtype, rows, cols, *, bits = 4, codec = "shift", scale = "unbiased", factor = None))]
#[expect(clippy::too_many_arguments, reason = "these are keyword arguments in Python")]
pub(crate) fn encode(
    py: Python<'_>,
    data: PyReadonlyArrayDyn<'_, u8>,
    dtype: &str,
    rows: usize,
    cols: usize,
    bits: u32,
    codec: &str,
    scale: &str,
    factor: Option<PyReadonlyArrayDyn<'_, f32>>,
) -> Result<(HyperMatrix, Distortion)> {
    let data = FloatSlice::new(arrays::contiguous(&data, "data")?, Dtype::from_name(dtype)?)?;
    let codec = Codec::from_name(codec)?;
    let refit = ScaleRefit::from_name(scale).ok_or_else(|| {
        Failure::value(format!(
            "there is no scale {scale:?}; choose \"unbiased\" or \"least-squares\""
        ))
    })?;
    let factor = factor.as_ref().map(arrays::factor).transpose()?;
    let (matrix, distortion) = compute(py, |isa| {
        let feedback = factor.map(|(data, cols)| Feedback::new(data, cols)).transpose()?;
        let options = EncodeOptions { codec, bits, refit, isa };
        core::HyperMatrix::encode_with(data, rows, cols, &options, feedback.as_ref())
    })??;
    Ok((HyperMatrix { matrix, codec }, Distortion(distortion)))
}

#[pyfunction]
pub(crate) fn rates(codec: &str) -> Result<Vec<u32>> {
    Ok(Codec::from_name(codec)?.rates().to_vec())
}

#[pyfunction]
#[pyo3(signature = (rows, cols, *, bits, codec = "shift"))]
pub(crate) fn coded_nbytes(rows: usize, cols: usize, bits: u32, codec: &str) -> Result<usize> {
    Ok(Layout::new(rows, cols, Codec::from_name(codec)?.trajectory(bits)?)?.len())
}
