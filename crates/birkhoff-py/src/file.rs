//! Reading safetensors files.

use std::path::PathBuf;

use birkhoff_core::codec::Codec;
use birkhoff_core::container::manifest::element_type;
use birkhoff_core::container::{self, Coding, Tensor};
use birkhoff_core::isa::Isa;
use numpy::PyReadonlyArrayDyn;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::arrays;
use crate::distortion::Distortion;
use crate::environment::{compute, get_num_threads};
use crate::errors::{Failure, Result};
use crate::matrix::HyperMatrix;

#[pyclass(frozen, module = "birkhoff._core")]
pub(crate) struct Entry(Tensor);

#[pymethods]
impl Entry {
    #[getter]
    fn name(&self) -> &str {
        &self.0.name
    }

    #[getter]
    fn dtype(&self) -> String {
        self.0.dtype.to_string()
    }

    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.0.shape)
    }

    #[getter]
    fn coding(&self) -> &'static str {
        match self.0.coding {
            Coding::Coded { .. } => "coded",
            Coding::Stored { .. } => "stored",
            Coding::Tied { .. } => "tied",
        }
    }

    #[getter]
    fn bits(&self) -> Option<u32> {
        match self.0.coding {
            Coding::Coded { bits, .. } => Some(bits),
            _ => None,
        }
    }

    #[getter]
    fn codec(&self) -> Option<&'static str> {
        match self.0.coding {
            Coding::Coded { codec, .. } => Some(codec.name()),
            _ => None,
        }
    }

    #[getter]
    fn matrix_shape(&self) -> Option<(usize, usize)> {
        match self.0.coding {
            Coding::Coded { rows, cols, .. } => Some((rows, cols)),
            _ => None,
        }
    }

    #[getter]
    fn stored_dtype(&self) -> Option<String> {
        match self.0.coding {
            Coding::Stored { dtype, .. } => Some(dtype.to_string()),
            _ => None,
        }
    }

    #[getter]
    fn tied_to(&self) -> Option<&str> {
        match &self.0.coding {
            Coding::Tied { to } => Some(to),
            _ => None,
        }
    }

    #[getter]
    fn nbytes(&self) -> Result<usize> {
        Ok(self.0.stored_len()?)
    }

    #[getter]
    fn original_nbytes(&self) -> Result<usize> {
        Ok(self.0.original_len()?)
    }

    fn __repr__(&self) -> String {
        format!("Entry({:?}, {}, {:?}, {})", self.0.name, self.0.dtype, self.0.shape, self.coding())
    }
}

#[pyclass(frozen, module = "birkhoff._core")]
pub(crate) struct File(container::File);

#[pymethods]
impl File {
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> Result<File> {
        Ok(File(py.detach(|| container::File::open(&path))?))
    }

    #[getter]
    fn path(&self) -> &std::ffi::OsStr {
        self.0.path().as_os_str()
    }

    #[getter]
    fn compressed(&self) -> bool {
        self.0.is_compressed()
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.0.len()
    }

    #[getter]
    fn settings(&self) -> Result<String> {
        let settings = serde_json::to_string(self.0.settings());
        settings.map_err(|error| Failure::value(error.to_string()))
    }

    #[getter]
    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let metadata = PyDict::new(py);
        for (key, value) in self.0.metadata() {
            metadata.set_item(key, value)?;
        }
        Ok(metadata)
    }

    fn entries(&self) -> Vec<Entry> {
        self.0.tensors().iter().cloned().map(Entry).collect()
    }

    fn raw<'py>(this: &Bound<'py, Self>, name: &str) -> Result<Bound<'py, PyAny>> {
        let bytes = this.get().0.bytes(name)?;
        // SAFETY: the class is frozen and holds the memory map, so the bytes stay in place; the map
        // is read-only, and that nobody changes the file is what the stub file asks of the user.
        Ok(unsafe { arrays::borrowed(bytes, this.clone().into_any()) }?.into_any())
    }

    fn matrix(&self, py: Python<'_>, name: &str) -> Result<HyperMatrix> {
        let matrix = py.detach(|| self.0.matrix(name))?;
        let tensor = self.0.tensor(name)?;
        let holder = match &tensor.coding {
            Coding::Tied { to } => self.0.tensor(to)?,
            _ => tensor,
        };
        let codec = match holder.coding {
            Coding::Coded { codec, .. } => codec,
            _ => Codec::default(),
        };
        Ok(HyperMatrix::new(matrix, codec))
    }

    fn float32<'py>(&self, py: Python<'py>, name: &str) -> Result<Bound<'py, PyAny>> {
        let values = compute(py, |isa| self.0.float32(isa, name))??;
        Ok(arrays::owned(py, values, &self.0.tensor(name)?.shape)?)
    }

    fn check(&self, py: Python<'_>, name: &str) -> Result<()> {
        Ok(py.detach(|| self.0.check(name))?)
    }

    fn compare(
        &self,
        py: Python<'_>,
        name: &str,
        data: PyReadonlyArrayDyn<'_, u8>,
        dtype: &str,
    ) -> Result<Distortion> {
        let data = arrays::contiguous(&data, "data")?;
        let dtype = element_type(dtype)?;
        Ok(Distortion(compute(py, |isa| self.0.compare(isa, name, data, dtype))??))
    }

    #[pyo3(signature = (out, *, overwrite = false, progress = None))]
    fn decompress(
        &self,
        py: Python<'_>,
        out: PathBuf,
        overwrite: bool,
        progress: Option<Py<PyAny>>,
    ) -> Result<u64> {
        let (isa, threads) = (Isa::current()?, get_num_threads()?);
        py.detach(|| {
            container::decompress(&self.0, &out, overwrite, isa, threads, |name| {
                Python::attach(|py| {
                    py.check_signals()?;
                    if let Some(progress) = &progress {
                        progress.call1(py, (name,))?;
                    }
                    Ok::<_, Failure>(())
                })
            })
        })
    }

    fn __repr__(&self) -> String {
        let kind = if self.0.is_compressed() { "compressed" } else { "plain" };
        format!("File({:?}, {kind}, {} tensors)", self.0.path(), self.0.tensors().len())
    }
}
