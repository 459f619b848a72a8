//! Attention with AVX-512.

use std::arch::x86_64::*;

use super::kernel::Kernel;
use super::schedule::{Call, Task, Workspace};
use super::tile;

/// [`crate::isa::Isa::Avx512`].
pub(super) struct Avx512;

impl Kernel for Avx512 {
    type Float = __m512;

    const ROWS: usize = 8;
    const VECTORS: usize = 3;

    #[target_feature(
        enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni"
    )]
    unsafe fn run_attend(call: &Call<'_>, task: &Task, workspace: &Workspace) {
        // SAFETY: the caller upholds all that is needed.
        unsafe { tile::attend::<Self, { Self::ROWS }>(call, task, workspace) }
    }
}
