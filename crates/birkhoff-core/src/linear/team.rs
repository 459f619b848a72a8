//! Threads for short jobs.

/// Runs `work` for every task from 0 to `tasks`.
pub(super) fn for_each(_threads: usize, tasks: usize, work: &(dyn Fn(usize) + Sync)) {
    (0..tasks).for_each(work);
}
