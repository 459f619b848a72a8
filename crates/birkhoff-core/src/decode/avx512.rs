//! Decoding with AVX-512 VBMI and VBMI2: all 16 rows of a strip in one vector.

use std::arch::x86_64::*;

use super::generic::{self, Vector, with_code};
use crate::codec::Trajectory;
use crate::codec::curve::CURVE;

impl Vector for __m512i {
    const ROWS: usize = 16;

    type Table = Table;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        // SAFETY: the caller says that 64 bytes are readable.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut i8) {
        // SAFETY: the caller says that 64 bytes are writable.
        unsafe { _mm512_storeu_si512(to.cast(), self) }
    }

    #[inline(always)]
    unsafe fn window(before: Self, word: Self, shift: u32) -> Self {
        // SAFETY: the caller says that the CPU has the instruction set.
        unsafe { _mm512_shrdv_epi16(word, before, _mm512_set1_epi16(shift as i16)) }
    }

    #[inline(always)]
    unsafe fn shift_right(self, shift: u32) -> Self {
        // SAFETY: the caller says that the CPU has the instruction set.
        unsafe { _mm512_srlv_epi16(self, _mm512_set1_epi16(shift as i16)) }
    }

    #[inline(always)]
    unsafe fn multiply(self, multiplier: u16) -> Self {
        // SAFETY: the caller says that the CPU has the instruction set.
        unsafe { _mm512_mullo_epi16(self, _mm512_set1_epi16(multiplier as i16)) }
    }

    #[inline(always)]
    unsafe fn merge_high_bytes(even: Self, odd: Self) -> Self {
        /// `a | (b & c)`.
        const OR_AND: i32 = 0xf8;
        // SAFETY: the caller says that the CPU has the instruction set.
        unsafe {
            let even = _mm512_srli_epi16::<8>(even);
            _mm512_ternarylogic_epi32::<OR_AND>(even, odd, _mm512_set1_epi16(0xff00_u16 as i16))
        }
    }

    #[inline(always)]
    unsafe fn lookup(self, table: &Self::Table) -> Self {
        // SAFETY: the caller says that the CPU has the instruction set.
        unsafe {
            let [a, b, c, d] = table.values;
            let low = _mm512_permutex2var_epi8(a, self, b);
            let high = _mm512_permutex2var_epi8(c, self, d);
            _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(self), high)
        }
    }

    #[inline(always)]
    unsafe fn int8(self, table: &Self::Table) -> Self {
        // SAFETY: the caller says that the CPU has the instruction set.
        unsafe { _mm512_xor_si512(self, table.flip) }
    }
}

/// The 256 values of the curve, with the bits of `flip` inverted in each.
#[derive(Clone, Copy)]
pub(crate) struct Table {
    values: [__m512i; 4],
    flip: __m512i,
}

/// The curve, with the bits of `flip` inverted in every value.
///
/// # Safety
/// The CPU must have AVX-512.
#[inline(always)]
pub(crate) unsafe fn curve(flip: u8) -> Table {
    // SAFETY: CURVE has 256 bytes; the caller says that the CPU has the instruction set.
    unsafe {
        let flip = _mm512_set1_epi8(flip as i8);
        let curve = CURVE.as_ptr().cast::<u8>();
        let values = [
            _mm512_xor_si512(__m512i::load(curve), flip),
            _mm512_xor_si512(__m512i::load(curve.add(64)), flip),
            _mm512_xor_si512(__m512i::load(curve.add(128)), flip),
            _mm512_xor_si512(__m512i::load(curve.add(192)), flip),
        ];
        Table { values, flip }
    }
}

/// Decodes blocks `first..` of a strip; see [`super::blocks`]. The bits of `flip` are inverted in
/// every value (0x80 gives `value + 128` as an unsigned byte).
///
/// # Safety
/// The CPU must have [`crate::isa::Isa::Avx512`]; lengths as for [`generic::blocks`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni")]
pub(crate) unsafe fn blocks(
    trajectory: Trajectory,
    flip: u8,
    strip: &[u8],
    first: usize,
    out: &mut [i8],
) {
    // SAFETY: the caller upholds all that is needed.
    unsafe {
        with_code!(trajectory, C => generic::blocks::<__m512i, C>(&curve(flip), strip, first, out));
    }
}
