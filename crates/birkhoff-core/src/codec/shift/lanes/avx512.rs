//! Thirty-two lanes in a 512-bit register.

use std::arch::x86_64::*;

use super::Lanes;

/// Thirty-two lanes of u16.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(__m512i);

#[repr(C, align(64))]
struct Indices([u16; 32]);

/// Which lane of (first, second) each lane of an interleaved half takes.
const fn interleaved(half: u16) -> Indices {
    let mut indices = [0; 32];
    let mut i = 0;
    while i < 32 {
        indices[i as usize] = (i & 1) * 32 + i / 2 + half * 16;
        i += 1;
    }
    Indices(indices)
}

static FIRST: Indices = interleaved(0);
static SECOND: Indices = interleaved(1);

// SAFETY (all blocks below): the caller guarantees a CPU with AVX-512 F and BW, and valid pointers.
impl Lanes for Avx512 {
    const N: usize = 32;

    #[inline(always)]
    unsafe fn load(from: *const u16) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_loadu_si512(from.cast()) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u16) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_si512(to.cast(), self.0) }
    }

    #[inline(always)]
    unsafe fn splat(value: u16) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_set1_epi16(value as i16) })
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_add_epi16(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_sub_epi16(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn saturating_add(self, other: Self) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_adds_epu16(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn saturating_sub(self, other: Self) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_subs_epu16(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_mullo_epi16(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_min_epu16(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn or(self, other: Self) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_or_si512(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn and(self, other: Self) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_and_si512(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn signed_distance(self, other: Self) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_abs_epi16(_mm512_sub_epi16(self.0, other.0)) })
    }

    #[inline(always)]
    unsafe fn shl<const BITS: u32>(self) -> Self {
        // SAFETY: see above.
        Avx512(unsafe { _mm512_slli_epi16::<BITS>(self.0) })
    }

    #[inline(always)]
    unsafe fn interleave(self, other: Self) -> (Self, Self) {
        // SAFETY: see above; the indices are 64 aligned bytes each.
        unsafe {
            let first = _mm512_load_si512((&raw const FIRST).cast());
            let second = _mm512_load_si512((&raw const SECOND).cast());
            (
                Avx512(_mm512_permutex2var_epi16(self.0, first, other.0)),
                Avx512(_mm512_permutex2var_epi16(self.0, second, other.0)),
            )
        }
    }

    #[inline(always)]
    unsafe fn reduce_min(self) -> u16 {
        // SAFETY: see above; AVX-512 implies SSE4.1.
        unsafe {
            let half = _mm256_min_epu16(
                _mm512_castsi512_si256(self.0),
                _mm512_extracti64x4_epi64::<1>(self.0),
            );
            let quarter =
                _mm_min_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256::<1>(half));
            _mm_cvtsi128_si32(_mm_minpos_epu16(quarter)) as u16
        }
    }
}
