//! Decoding with AVX2: half the rows of a strip in one vector, the table by byte shuffles.

use std::arch::x86_64::*;

use super::generic::{self, Vector, with_code};
use crate::codec::Trajectory;
use crate::codec::curve::CURVE;

impl Vector for __m256i {
    const ROWS: usize = 8;

    /// The lower half of the curve, 16 values in both halves of each vector. The upper half is its
    /// mirror image.
    type Table = [__m256i; 8];

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        // SAFETY: the caller says that 32 bytes are readable.
        unsafe { _mm256_loadu_si256(from.cast()) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut i8) {
        // SAFETY: the caller says that 32 bytes are writable.
        unsafe { _mm256_storeu_si256(to.cast(), self) }
    }

    #[inline(always)]
    unsafe fn window(before: Self, word: Self, shift: u32) -> Self {
        // SAFETY: the caller says that the CPU has the instruction set.
        unsafe {
            let before = _mm256_sll_epi16(before, _mm_cvtsi32_si128(16 - shift as i32));
            _mm256_or_si256(word.shift_right(shift), before)
        }
    }

    #[inline(always)]
    unsafe fn shift_right(self, shift: u32) -> Self {
        // SAFETY: the caller says that the CPU has the instruction set.
        unsafe { _mm256_srl_epi16(self, _mm_cvtsi32_si128(shift as i32)) }
    }

    #[inline(always)]
    unsafe fn multiply(self, multiplier: u16) -> Self {
        // SAFETY: the caller says that the CPU has the instruction set.
        unsafe { _mm256_mullo_epi16(self, _mm256_set1_epi16(multiplier as i16)) }
    }

    #[inline(always)]
    unsafe fn merge_high_bytes(even: Self, odd: Self) -> Self {
        // SAFETY: the caller says that the CPU has the instruction set.
        unsafe {
            let odd = _mm256_and_si256(odd, _mm256_set1_epi16(0xff00_u16 as i16));
            _mm256_or_si256(_mm256_srli_epi16::<8>(even), odd)
        }
    }

    #[inline(always)]
    unsafe fn int8(self, _table: &Self::Table) -> Self {
        self
    }

    #[inline(always)]
    unsafe fn lookup(self, table: &Self::Table) -> Self {
        // SAFETY: the caller says that the CPU has the instruction set.
        unsafe {
            // Places from 128 on are mirrored into the lower half, and their values negated.
            let mirrored = _mm256_cmpgt_epi8(_mm256_setzero_si256(), self);
            let place = _mm256_xor_si256(self, mirrored);
            // A shuffle reads 4 bits of the place; the other 3 choose between shuffles. Shifts of
            // whole lanes do: only the top bit of each byte counts.
            let [bit4, bit5, bit6] = [
                _mm256_slli_epi16::<3>(place),
                _mm256_slli_epi16::<2>(place),
                _mm256_slli_epi16::<1>(place),
            ];
            let sixteen = |part: usize| _mm256_shuffle_epi8(table[part], place);
            let thirty_two =
                |part: usize| _mm256_blendv_epi8(sixteen(2 * part), sixteen(2 * part + 1), bit4);
            let sixty_four = |part: usize| {
                _mm256_blendv_epi8(thirty_two(2 * part), thirty_two(2 * part + 1), bit5)
            };
            let value = _mm256_blendv_epi8(sixty_four(0), sixty_four(1), bit6);
            _mm256_sub_epi8(_mm256_xor_si256(value, mirrored), mirrored)
        }
    }
}

/// Decodes blocks `first..` of a strip; see [`super::blocks`].
///
/// # Safety
/// The CPU must have [`crate::isa::Isa::Avx2`]; lengths as for [`generic::blocks`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn blocks(trajectory: Trajectory, strip: &[u8], first: usize, out: &mut [i8]) {
    // SAFETY: CURVE has 256 bytes; the caller upholds all else that is needed.
    unsafe {
        let mut table = [_mm256_setzero_si256(); 8];
        for (table, values) in table.iter_mut().zip(CURVE.chunks_exact(16)) {
            *table = _mm256_broadcastsi128_si256(_mm_loadu_si128(values.as_ptr().cast()));
        }
        with_code!(trajectory, C => generic::blocks::<__m256i, C>(&table, strip, first, out));
    }
}
