//! What encoding cost.

use birkhoff_core as core;
use pyo3::prelude::*;

#[pyclass(frozen, module = "birkhoff._core")]
pub(crate) struct Distortion(pub(crate) core::Distortion);

#[pymethods]
impl Distortion {
    #[getter]
    fn signal(&self) -> f64 {
        self.0.signal
    }

    #[getter]
    fn noise(&self) -> f64 {
        self.0.noise
    }

    #[getter]
    fn max_error(&self) -> f64 {
        self.0.max_error
    }

    #[getter]
    fn sqnr(&self) -> f64 {
        self.0.sqnr_db()
    }

    fn __add__(&self, other: &Distortion) -> Distortion {
        let mut sum = self.0;
        sum.add(&other.0);
        Distortion(sum)
    }

    fn __repr__(&self) -> String {
        let core::Distortion { signal, noise, max_error } = self.0;
        format!("Distortion(signal={signal:?}, noise={noise:?}, max_error={max_error:?})")
    }
}
