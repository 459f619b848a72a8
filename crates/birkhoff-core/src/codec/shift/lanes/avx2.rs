//! Sixteen lanes in a 256-bit register.

use std::arch::x86_64::*;

use super::Lanes;

/// Sixteen lanes of u16.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(__m256i);

// SAFETY (all blocks below): the caller guarantees a CPU with AVX2, and valid pointers.
impl Lanes for Avx2 {
    const N: usize = 16;

    #[inline(always)]
    unsafe fn load(from: *const u16) -> Self {
        // SAFETY: see above.
        Avx2(unsafe { _mm256_loadu_si256(from.cast()) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u16) {
        // SAFETY: see above.
        unsafe { _mm256_storeu_si256(to.cast(), self.0) }
    }

    #[inline(always)]
    unsafe fn splat(value: u16) -> Self {
        // SAFETY: see above.
        Avx2(unsafe { _mm256_set1_epi16(value as i16) })
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: see above.
        Avx2(unsafe { _mm256_add_epi16(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: see above.
        Avx2(unsafe { _mm256_sub_epi16(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn saturating_add(self, other: Self) -> Self {
        // SAFETY: see above.
        Avx2(unsafe { _mm256_adds_epu16(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn saturating_sub(self, other: Self) -> Self {
        // SAFETY: see above.
        Avx2(unsafe { _mm256_subs_epu16(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: see above.
        Avx2(unsafe { _mm256_mullo_epi16(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        // SAFETY: see above.
        Avx2(unsafe { _mm256_min_epu16(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn or(self, other: Self) -> Self {
        // SAFETY: see above.
        Avx2(unsafe { _mm256_or_si256(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn and(self, other: Self) -> Self {
        // SAFETY: see above.
        Avx2(unsafe { _mm256_and_si256(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn signed_distance(self, other: Self) -> Self {
        // SAFETY: see above.
        Avx2(unsafe { _mm256_abs_epi16(_mm256_sub_epi16(self.0, other.0)) })
    }

    #[inline(always)]
    unsafe fn shl<const BITS: u32>(self) -> Self {
        // SAFETY: see above. The count is a constant, so this is the immediate form.
        Avx2(unsafe { _mm256_sll_epi16(self.0, _mm_cvtsi32_si128(BITS as i32)) })
    }

    #[inline(always)]
    unsafe fn interleave(self, other: Self) -> (Self, Self) {
        // SAFETY: see above.
        unsafe {
            let low = _mm256_unpacklo_epi16(self.0, other.0);
            let high = _mm256_unpackhi_epi16(self.0, other.0);
            (
                Avx2(_mm256_permute2x128_si256::<0x20>(low, high)),
                Avx2(_mm256_permute2x128_si256::<0x31>(low, high)),
            )
        }
    }

    #[inline(always)]
    unsafe fn reduce_min(self) -> u16 {
        // SAFETY: see above; AVX2 implies SSE4.1.
        unsafe {
            let halves = _mm_min_epu16(
                _mm256_castsi256_si128(self.0),
                _mm256_extracti128_si256::<1>(self.0),
            );
            _mm_cvtsi128_si32(_mm_minpos_epu16(halves)) as u16
        }
    }
}
