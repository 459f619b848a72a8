//! Sixteen lanes in a 256-bit register, with or without the permutations of AVX-512.

use std::arch::x86_64::*;

use super::Lanes;

/// Sixteen lanes of u16; `VL` says that the CPU also has AVX-512 BW and VL.
#[derive(Clone, Copy)]
pub(crate) struct Avx2<const VL: bool>(__m256i);

#[repr(C, align(32))]
struct Indices([u16; 16]);

/// Which lane of (first, second) each lane of an interleaved half takes.
const fn interleaved(half: u16) -> Indices {
    let mut indices = [0; 16];
    let mut i = 0;
    while i < 16 {
        indices[i as usize] = (i & 1) * 16 + i / 2 + half * 8;
        i += 1;
    }
    Indices(indices)
}

static FIRST: Indices = interleaved(0);
static SECOND: Indices = interleaved(1);

// SAFETY (all blocks below): the caller guarantees a CPU with AVX2, and with AVX-512 BW and VL where
// `VL` says so, and valid pointers.
impl<const VL: bool> Lanes for Avx2<VL> {
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
        // SAFETY: see above; the indices are 32 aligned bytes each.
        unsafe {
            if VL {
                let first = _mm256_load_si256((&raw const FIRST).cast());
                let second = _mm256_load_si256((&raw const SECOND).cast());
                return (
                    Avx2(_mm256_permutex2var_epi16(self.0, first, other.0)),
                    Avx2(_mm256_permutex2var_epi16(self.0, second, other.0)),
                );
            }
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
