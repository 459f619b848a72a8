//! Writing compressed files.

use std::path::PathBuf;
use std::sync::{PoisonError, RwLock};

use birkhoff_core::codec::{Codec, Feedback, ScaleRefit};
use birkhoff_core::container::manifest::{
    Checksum, Manifest, PartChecksums, Settings, VERSION, element_type,
};
use birkhoff_core::container::{self, Coding, Tensor, WriterOptions};
use birkhoff_core::isa::Isa;
use birkhoff_core::threads;
use numpy::PyReadonlyArrayDyn;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::arrays;
use crate::distortion::Distortion;
use crate::environment::get_num_threads;
use crate::errors::{Failure, Result};

#[pyclass(frozen, module = "birkhoff._core")]
pub(crate) struct Writer {
    /// `None` once finished or left. Several threads may write at once, one may finish.
    writer: RwLock<Option<container::Writer>>,
}

impl Writer {
    /// Takes the writer out, when nobody writes any more.
    fn take(&self) -> Option<container::Writer> {
        self.writer.write().unwrap_or_else(PoisonError::into_inner).take()
    }
}

fn closed() -> Failure {
    Failure::value("the writer is finished or was left; make a new one")
}

#[pymethods]
impl Writer {
    #[new]
    #[pyo3(signature = (path, plan, *, settings = "{}", overwrite = false))]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        plan: Vec<Bound<'_, PyTuple>>,
        settings: &str,
        overwrite: bool,
    ) -> Result<Writer> {
        let plan = plan.iter().map(planned).collect::<Result<Vec<_>>>()?;
        let options = WriterOptions {
            settings: object(settings)?,
            overwrite,
            refit: ScaleRefit::default(),
            isa: Isa::current()?,
        };
        let writer = py.detach(|| container::Writer::create(&path, plan, options))?;
        Ok(Writer { writer: RwLock::new(Some(writer)) })
    }

    #[pyo3(signature = (name, data, factor = None))]
    fn write(
        &self,
        py: Python<'_>,
        name: &str,
        data: PyReadonlyArrayDyn<'_, u8>,
        factor: Option<PyReadonlyArrayDyn<'_, f32>>,
    ) -> Result<Distortion> {
        let data = arrays::contiguous(&data, "data")?;
        let factor = factor.as_ref().map(arrays::factor).transpose()?;
        let threads = get_num_threads()?;
        py.detach(|| {
            // Locked here, not on the pool, where a thread could meet its own lock again.
            let writer = self.writer.read().unwrap_or_else(PoisonError::into_inner);
            let writer = writer.as_ref().ok_or_else(closed)?;
            threads::install(threads, || {
                let feedback = factor.map(|(data, cols)| Feedback::new(data, cols)).transpose()?;
                Ok(Distortion(writer.write_with(name, data, feedback.as_ref())?))
            })
        })
    }

    fn write_coded(
        &self,
        py: Python<'_>,
        name: &str,
        codes: PyReadonlyArrayDyn<'_, u8>,
        row_scales: PyReadonlyArrayDyn<'_, u8>,
        group_exponents: PyReadonlyArrayDyn<'_, u8>,
    ) -> Result<()> {
        let parts = [
            arrays::contiguous(&codes, "codes")?,
            arrays::contiguous(&row_scales, "row_scales")?,
            arrays::contiguous(&group_exponents, "group_exponents")?,
        ];
        py.detach(|| {
            let writer = self.writer.read().unwrap_or_else(PoisonError::into_inner);
            Ok(writer.as_ref().ok_or_else(closed)?.write_coded(name, parts)?)
        })
    }

    fn finish(&self, py: Python<'_>) -> Result<u64> {
        let finished = py.detach(|| self.take().map(container::Writer::finish));
        Ok(finished.ok_or_else(closed)??)
    }

    fn __enter__(this: Py<Self>) -> Py<Self> {
        this
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyTuple>) {
        py.detach(|| drop(self.take()));
    }
}

#[pyfunction]
#[pyo3(signature = (plan, data, *, settings = "{}"))]
pub(crate) fn manifest(
    py: Python<'_>,
    plan: Vec<Bound<'_, PyTuple>>,
    data: Vec<Vec<PyReadonlyArrayDyn<'_, u8>>>,
    settings: &str,
) -> Result<String> {
    let plan = plan.iter().map(planned).collect::<Result<Vec<_>>>()?;
    if plan.len() != data.len() {
        return Err(Failure::value(format!("{} items, but data of {}", plan.len(), data.len())));
    }
    let data = (data.iter())
        .map(|parts| parts.iter().map(|part| arrays::contiguous(part, "data")).collect())
        .collect::<Result<Vec<Vec<_>>>>()?;
    let settings = object(settings)?;
    py.detach(|| {
        let tensors = (plan.into_iter().zip(&data))
            .map(|(tensor, parts)| tensor.with_checksums(parts))
            .collect::<birkhoff_core::Result<_>>()?;
        Ok(Manifest { version: VERSION, settings, tensors }.to_json()?)
    })
}

#[pyfunction]
#[pyo3(signature = (plan, *, settings = "{}"))]
pub(crate) fn planned_nbytes(plan: Vec<Bound<'_, PyTuple>>, settings: &str) -> Result<u64> {
    let plan = plan.iter().map(planned).collect::<Result<Vec<_>>>()?;
    Ok(container::writer::planned_len(plan, object(settings)?)?)
}

fn object(settings: &str) -> Result<Settings> {
    serde_json::from_str(settings)
        .map_err(|error| Failure::value(format!("settings are no JSON object: {error}")))
}

/// A tensor from an item of the plan; the stub file lists the kinds.
fn planned(item: &Bound<'_, PyTuple>) -> Result<Tensor> {
    let malformed = |error: PyErr| {
        Failure::value(format!("plan item {item:?} is malformed: {}", error.value(item.py())))
    };
    let kind: String = item.get_item(0).and_then(|kind| kind.extract()).map_err(malformed)?;
    let (name, dtype, shape, coding) = match kind.as_str() {
        "coded" => {
            type Coded = (String, String, String, Vec<usize>, usize, usize, u32, String);
            let (_, name, dtype, shape, rows, cols, bits, codec) =
                item.extract::<Coded>().map_err(malformed)?;
            let codec = Codec::from_name(&codec)?;
            let checksums = PartChecksums::default();
            (name, dtype, shape, Coding::Coded { codec, bits, rows, cols, checksums })
        }
        "stored" => {
            type Stored = (String, String, String, Vec<usize>, String);
            let (_, name, dtype, shape, stored) = item.extract::<Stored>().map_err(malformed)?;
            let checksum = Checksum::default();
            (name, dtype, shape, Coding::Stored { dtype: element_type(&stored)?, checksum })
        }
        "tied" => {
            type Tied = (String, String, String, Vec<usize>, String);
            let (_, name, dtype, shape, to) = item.extract::<Tied>().map_err(malformed)?;
            (name, dtype, shape, Coding::Tied { to })
        }
        _ => {
            return Err(Failure::value(format!(
                "plan item {item:?} is neither coded, stored nor tied"
            )));
        }
    };
    Ok(Tensor { name, dtype: element_type(&dtype)?, shape, coding })
}
