//! Python bindings of birkhoff-core: arguments are translated, the GIL is released, errors are
//! mapped, and nothing else happens here.
//!
//! `python/birkhoff/_core.pyi` documents every name.

mod arrays;
mod distortion;
mod environment;
mod errors;
mod file;
mod linear;
mod matrix;
mod writer;

/// Codec, file format and kernels of birkhoff.
#[pyo3::pymodule]
mod _core {
    use pyo3::prelude::*;

    #[pymodule_export]
    use super::distortion::Distortion;
    #[pymodule_export]
    use super::environment::{
        available_isas, cpu_features, default_threads, get_num_threads, isa, set_num_threads,
    };
    #[pymodule_export]
    use super::file::{Entry, File};
    #[pymodule_export]
    use super::linear::BorrowedMatrix;
    #[pymodule_export]
    use super::matrix::{HyperMatrix, coded_nbytes, encode, rates};
    #[pymodule_export]
    use super::writer::{Writer, planned_nbytes};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        // The first use loads NumPy's C interface, where an interrupt would be a panic: use it now.
        numpy::PyArray1::<u8>::zeros(module.py(), 0, false);
        super::errors::add_to(module)
    }
}
