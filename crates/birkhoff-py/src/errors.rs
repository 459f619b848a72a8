//! Errors of the core as Python exceptions.

use std::io::ErrorKind;

use birkhoff_core::Error;
use pyo3::exceptions::{
    PyException, PyFileExistsError, PyFileNotFoundError, PyIsADirectoryError, PyOSError,
    PyPermissionError, PyValueError,
};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyType};

pyo3::create_exception!(
    birkhoff._core,
    BirkhoffError,
    PyException,
    "What birkhoff raises for reasons of its own."
);

/// A result whose error becomes a Python exception.
pub(crate) type Result<T> = std::result::Result<T, Failure>;

/// An error on its way to Python.
pub(crate) struct Failure(PyErr);

impl Failure {
    /// A `ValueError`: an argument is wrong.
    pub(crate) fn value(message: impl Into<String>) -> Failure {
        Failure(PyValueError::new_err(message.into()))
    }
}

impl From<PyErr> for Failure {
    fn from(error: PyErr) -> Failure {
        Failure(error)
    }
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> PyErr {
        failure.0
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure(match error {
            Error::Io { path, source } => Python::attach(|py| {
                let path = path.into_os_string();
                match (source.raw_os_error(), source.kind()) {
                    // Python picks the subclass by the number and adds the path to the message.
                    (Some(code), _) => match strerror(py, code) {
                        Ok(message) => PyOSError::new_err((code, message, path)),
                        Err(error) => error,
                    },
                    (None, kind) => {
                        let message = format!("{}: {source}", path.display());
                        match kind {
                            ErrorKind::NotFound => PyFileNotFoundError::new_err(message),
                            ErrorKind::AlreadyExists => PyFileExistsError::new_err(message),
                            ErrorKind::IsADirectory => PyIsADirectoryError::new_err(message),
                            ErrorKind::PermissionDenied => PyPermissionError::new_err(message),
                            _ => PyOSError::new_err(message),
                        }
                    }
                }
            }),
            Error::Format { .. } | Error::Tensor { .. } => {
                let message = error.to_string();
                Python::attach(|py| match format_error(py) {
                    Ok(class) => PyErr::from_type(class.clone(), message),
                    Err(error) => error,
                })
            }
            _ => PyValueError::new_err(error.to_string()),
        })
    }
}

/// What the system calls an error.
fn strerror(py: Python<'_>, code: i32) -> PyResult<String> {
    py.import("os")?.call_method1("strerror", (code,))?.extract()
}

/// `class FormatError(BirkhoffError, ValueError)`; PyO3's macro makes no class with two bases.
fn format_error(py: Python<'_>) -> PyResult<&Bound<'_, PyType>> {
    static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    let class = CLASS.get_or_try_init(py, || {
        let attributes = PyDict::new(py);
        attributes.set_item("__module__", "birkhoff._core")?;
        attributes.set_item("__doc__", "A file or a tensor is damaged or cannot be used.")?;
        let bases = (py.get_type::<BirkhoffError>(), py.get_type::<PyValueError>());
        let class = py.get_type::<PyType>().call1(("FormatError", bases, attributes))?;
        Ok::<_, PyErr>(class.cast_into::<PyType>()?.unbind())
    })?;
    Ok(class.bind(py))
}

/// Adds the exception classes to the module.
pub(crate) fn add_to(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    module.add("BirkhoffError", py.get_type::<BirkhoffError>())?;
    module.add("FormatError", format_error(py)?)
}
