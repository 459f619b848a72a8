//! Attention with AVX2 and FMA: 16 floats are two vectors.

use std::arch::x86_64::*;

use super::kernel::Kernel;
use super::schedule::{Call, Task, Workspace};
use super::tile;

/// [`crate::isa::Isa::Avx2`].
pub(super) struct Avx2;

impl Kernel for Avx2 {
    type Float = [__m256; 2];

    const ROWS: usize = 6;
    const VECTORS: usize = 1;

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn run_attend(call: &Call<'_>, task: &Task, workspace: &Workspace) {
        // SAFETY: the caller upholds all that is needed.
        unsafe { tile::attend::<Self, { Self::ROWS }>(call, task, workspace) }
    }
}
