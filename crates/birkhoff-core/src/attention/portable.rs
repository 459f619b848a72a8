//! Attention in plain Rust, for every machine.

use super::kernel::Kernel;
use super::schedule::{Call, Task, Workspace};
use super::tile;
use crate::floats::LANES;

/// Plain Rust; needs nothing of the CPU.
pub(super) struct Portable;

impl Kernel for Portable {
    type Float = [f32; LANES];

    const ROWS: usize = 4;
    const VECTORS: usize = 1;

    unsafe fn run_attend(call: &Call<'_>, task: &Task, workspace: &Workspace) {
        // SAFETY: the caller upholds all that is needed.
        unsafe { tile::attend::<Self, { Self::ROWS }>(call, task, workspace) }
    }
}
