//! How many threads are used, and the pools they come from.

pub(crate) mod team;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::{Error, Result};

/// The environment variable that sets the number of threads.
pub const THREADS_VARIABLE: &str = "BIRKHOFF_NUM_THREADS";

/// The number of threads `BIRKHOFF_NUM_THREADS` asks for, if it is set.
///
/// # Errors
/// [`Error::ThreadsVariable`] if it is no whole number from 1 to 1024.
pub fn from_environment() -> Result<Option<usize>> {
    let Ok(text) = std::env::var(THREADS_VARIABLE) else { return Ok(None) };
    match text.trim().parse() {
        Ok(threads @ 1..=1024) => Ok(Some(threads)),
        _ => Err(Error::ThreadsVariable(text)),
    }
}

/// `BIRKHOFF_NUM_THREADS` if set, else the CPUs that this process may use (affinity and cgroup
/// quotas respected).
///
/// # Errors
/// As [`from_environment`].
pub fn default_threads() -> Result<usize> {
    Ok(match from_environment()? {
        Some(threads) => threads,
        None => std::thread::available_parallelism().map_or(1, usize::from),
    })
}

/// Runs `work` on a pool of `threads` threads; with one thread, on the caller's own.
///
/// Pools are made once for each process and number of threads, and kept; a forked child makes its
/// own, since threads do not survive a fork.
pub fn install<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
    /// By process and number of threads; none where threads could not be started.
    type Pools = HashMap<(u32, usize), Option<Arc<ThreadPool>>>;
    static POOLS: OnceLock<Mutex<Pools>> = OnceLock::new();
    let pool = POOLS
        .get_or_init(Mutex::default)
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .entry((std::process::id(), threads.max(1)))
        .or_insert_with_key(|&(_, threads)| {
            let builder = ThreadPoolBuilder::new()
                .num_threads(threads)
                .thread_name(|i| format!("birkhoff-{i}"));
            builder.build().ok().map(Arc::new)
        })
        .clone();
    match pool {
        Some(pool) => pool.install(work),
        // Threads could not be started: the global pool, or the caller, does the work.
        None => work(),
    }
}
