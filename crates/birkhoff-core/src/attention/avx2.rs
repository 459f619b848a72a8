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

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::Float {
        // SAFETY: the caller says that 16 floats are readable.
        unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
    }

    #[inline(always)]
    unsafe fn store(values: Self::Float, to: *mut f32) {
        // SAFETY: the caller says that 16 floats are writable.
        unsafe {
            _mm256_storeu_ps(to, values[0]);
            _mm256_storeu_ps(to.add(8), values[1]);
        }
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::Float {
        // SAFETY: the caller says that the CPU has the instruction set.
        [unsafe { _mm256_set1_ps(value) }; 2]
    }

    #[inline(always)]
    unsafe fn add(a: Self::Float, b: Self::Float) -> Self::Float {
        // SAFETY: the caller says that the CPU has the instruction set.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }

    #[inline(always)]
    unsafe fn sub(a: Self::Float, b: Self::Float) -> Self::Float {
        // SAFETY: the caller says that the CPU has the instruction set.
        unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
    }

    #[inline(always)]
    unsafe fn mul(a: Self::Float, b: Self::Float) -> Self::Float {
        // SAFETY: the caller says that the CPU has the instruction set.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }

    #[inline(always)]
    unsafe fn div(a: Self::Float, b: Self::Float) -> Self::Float {
        // SAFETY: the caller says that the CPU has the instruction set.
        unsafe { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
    }

    #[inline(always)]
    unsafe fn mul_add(a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float {
        // SAFETY: the caller says that the CPU has the instruction set.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    unsafe fn max(a: Self::Float, b: Self::Float) -> Self::Float {
        // SAFETY: the caller says that the CPU has the instruction set.
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }

    #[inline(always)]
    unsafe fn round(a: Self::Float) -> Self::Float {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        // SAFETY: the caller says that the CPU has the instruction set.
        unsafe { [_mm256_round_ps::<NEAREST>(a[0]), _mm256_round_ps::<NEAREST>(a[1])] }
    }

    #[inline(always)]
    unsafe fn scale_by_exp2(a: Self::Float, n: Self::Float) -> Self::Float {
        // SAFETY: the caller says that the CPU has the instruction set.
        let scale = |a: __m256, n: __m256| unsafe {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            let power = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent));
            let normal = _mm256_cmp_ps::<_CMP_NLT_UQ>(n, _mm256_set1_ps(-126.0));
            _mm256_and_ps(normal, _mm256_mul_ps(a, power))
        };
        [scale(a[0], n[0]), scale(a[1], n[1])]
    }
}
