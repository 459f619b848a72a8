//! Instruction sets and threads.

use std::sync::atomic::{AtomicUsize, Ordering};

use birkhoff_core::isa::Isa;
use birkhoff_core::threads;
use pyo3::prelude::*;

use crate::errors::{Failure, Result};

/// What `set_num_threads` has set; 0 if nothing.
static THREADS: AtomicUsize = AtomicUsize::new(0);

#[pyfunction]
pub(crate) fn isa() -> Result<&'static str> {
    Ok(Isa::current()?.name())
}

#[pyfunction]
pub(crate) fn available_isas() -> Vec<&'static str> {
    Isa::available().map(Isa::name).collect()
}

#[pyfunction]
pub(crate) fn cpu_features() -> Vec<&'static str> {
    birkhoff_core::isa::cpu_features()
}

#[pyfunction]
pub(crate) fn default_threads() -> Result<usize> {
    Ok(threads::default_threads()?)
}

#[pyfunction]
pub(crate) fn set_num_threads(threads: usize) -> Result<()> {
    if !(1..=1024).contains(&threads) {
        return Err(Failure::value(format!("threads must be 1 to 1024, not {threads}")));
    }
    THREADS.store(threads, Ordering::Relaxed);
    Ok(())
}

#[pyfunction]
pub(crate) fn get_num_threads() -> Result<usize> {
    Ok(match (threads::from_environment()?, THREADS.load(Ordering::Relaxed)) {
        (Some(threads), _) => threads,
        (None, 0) => threads::default_threads()?,
        (None, threads) => threads,
    })
}

/// Runs `work` without the GIL on as many threads as are set, and with the instruction set in use.
pub(crate) fn compute<R: Send>(py: Python<'_>, work: impl FnOnce(Isa) -> R + Send) -> Result<R> {
    let (isa, threads) = (Isa::current()?, get_num_threads()?);
    Ok(py.detach(|| threads::install(threads, || work(isa))))
}
