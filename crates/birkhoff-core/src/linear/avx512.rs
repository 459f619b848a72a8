//! The operator with AVX-512 VNNI: `vpdpbusd` multiplies weights + 128, as unsigned bytes, with
//! planes of signed bytes.
//!
//! `(w + 128) . x = w . x + 128 sum(x)`, so the sums of a group start from `-128 sum(x)`.

use std::arch::x86_64::*;
use std::ops::Range;

use super::Precision;
use super::activations::{self, Steps};
use super::kernel::Kernel;
use super::schedule::{self, Product, Workspace};
use super::{gemv, panel};
use crate::codec::Trajectory;
use crate::codec::scale::GROUP_SCALE;
use crate::decode;
use crate::dtype::Dtype;
use crate::layout::{BLOCK, DECODED_BLOCK, EXPONENTS, GROUP, STRIP};

/// AVX-512 with VBMI, VBMI2 and VNNI: [`crate::isa::Isa::Avx512`].
pub(super) struct Avx512;

/// Inverted in decoded values: `value ^ 0x80` is `value + 128` as an unsigned byte.
const FLIP: u8 = 0x80;

/// 32 columns, 0 for those past the end.
///
/// # Safety
/// The CPU must have AVX-512.
#[inline(always)]
unsafe fn load_block(x: &[f32]) -> [__m512; 2] {
    // SAFETY: what is read lies within `x`.
    unsafe {
        if x.len() >= BLOCK {
            return [_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(STRIP))];
        }
        let mask = (1u32 << x.len()) - 1;
        [
            _mm512_maskz_loadu_ps(mask as u16, x.as_ptr()),
            _mm512_maskz_loadu_ps((mask >> STRIP) as u16, x.as_ptr().wrapping_add(STRIP)),
        ]
    }
}

/// [`activations::largest_bits`].
///
/// # Safety
/// The CPU must have AVX-512.
#[inline(always)]
unsafe fn largest_bits(x: &[f32]) -> u32 {
    // SAFETY: the caller says that the CPU has the instruction set.
    unsafe {
        let magnitude = _mm512_set1_epi32(0x7fff_ffff);
        let mut largest = [_mm512_setzero_si512(); 2];
        for block in x.chunks(BLOCK) {
            let [first, second] = load_block(block);
            let first = _mm512_and_si512(_mm512_castps_si512(first), magnitude);
            let second = _mm512_and_si512(_mm512_castps_si512(second), magnitude);
            largest = [_mm512_max_epu32(largest[0], first), _mm512_max_epu32(largest[1], second)];
        }
        _mm512_reduce_max_epu32(_mm512_max_epu32(largest[0], largest[1]))
    }
}

/// Which bytes of 32 values of i32 in two vectors are two digits (0: the lowest) of a block: what
/// `vpermi2b` takes.
const fn digits(first: usize, second: usize) -> [u8; 64] {
    let mut places = [0; 64];
    let mut index = 0;
    while index < BLOCK {
        places[index] = (4 * activations::column(index) + first) as u8;
        places[BLOCK + index] = (4 * activations::column(index) + second) as u8;
        index += 1;
    }
    places
}

/// Quantises to planes of a digit each, and sums the integers of each group, times -128. With three
/// planes, the sums are of the integers without their lowest digit, and of that.
///
/// # Safety
/// The CPU must have AVX-512, and planes and sums must be writable.
#[inline(always)]
unsafe fn quantize<const PLANES: usize>(
    x: &[f32],
    steps: Steps,
    mut planes: *mut i8,
    sums: *mut i32,
) {
    let upper = const { if PLANES == 3 { digits(2, 1) } else { digits(1, 0) } };
    let lowest = const { digits(0, 0) };
    // SAFETY: the caller says that the CPU has the instruction set and where may be written; the
    // planes of a block are `32 * PLANES` bytes.
    unsafe {
        let inverse = _mm512_set1_ps(steps.inverse);
        // Adding 128 to every digit makes the bytes of the integers the digits + 128.
        let carry = _mm512_set1_epi32(0x0080_8080);
        let flip = _mm512_set1_epi8(FLIP as i8);
        let byte = _mm512_set1_epi32(255);
        let upper = _mm512_loadu_si512(upper.as_ptr().cast());
        let lowest = _mm512_loadu_si512(lowest.as_ptr().cast());
        for (group, columns) in x.chunks(GROUP).enumerate() {
            let mut sum = _mm512_setzero_si512();
            let mut low_sum = _mm512_setzero_si512();
            for block in columns.chunks(BLOCK) {
                let [first, second] = load_block(block);
                let first = _mm512_cvtps_epi32(_mm512_mul_ps(first, inverse));
                let second = _mm512_cvtps_epi32(_mm512_mul_ps(second, inverse));
                sum = _mm512_add_epi32(sum, _mm512_add_epi32(first, second));
                let first = _mm512_add_epi32(first, carry);
                let second = _mm512_add_epi32(second, carry);
                let digits = _mm512_permutex2var_epi8(first, upper, second);
                let digits = _mm512_xor_si512(digits, flip);
                if PLANES == 1 {
                    let lowest = _mm512_extracti64x4_epi64::<1>(digits);
                    _mm256_storeu_si256(planes.cast(), lowest);
                } else {
                    _mm512_storeu_si512(planes.cast(), digits);
                }
                if PLANES == 3 {
                    let digits = _mm512_permutex2var_epi8(first, lowest, second);
                    let digits = _mm512_castsi512_si256(_mm512_xor_si512(digits, flip));
                    _mm256_storeu_si256(planes.add(2 * BLOCK).cast(), digits);
                    low_sum = _mm512_add_epi32(low_sum, _mm512_and_si512(first, byte));
                    low_sum = _mm512_add_epi32(low_sum, _mm512_and_si512(second, byte));
                }
                planes = planes.add(PLANES * BLOCK);
            }
            let mut sum = _mm512_reduce_add_epi32(sum);
            if PLANES == 3 {
                // Each of the lowest digits is its byte less 128.
                let padded = columns.len().next_multiple_of(BLOCK) as i32;
                let low_sum = _mm512_reduce_add_epi32(low_sum).wrapping_sub(128 * padded);
                sum = sum.wrapping_sub(low_sum) >> 8;
                *sums.add(2 * group + 1) = low_sum.wrapping_mul(-128);
            }
            *sums.add(2 * group) = sum.wrapping_mul(-128);
        }
    }
}

impl Kernel for Avx512 {
    type Element = i8;
    type Packed = i8;
    type Weights = __m512i;
    type Activations = __m512i;
    type Int = __m512i;
    type Float = __m512;

    const STRIPS: usize = 3;

    fn planes(precision: Precision) -> usize {
        match precision {
            Precision::Medium => 1,
            Precision::High => 2,
            Precision::Highest => 3,
        }
    }

    fn tile_tokens(planes: usize) -> usize {
        match planes {
            1 => 4,
            _ => 2,
        }
    }

    #[inline(always)]
    unsafe fn quantize(x: &[f32], precision: Precision, planes: *mut i8, sums: *mut i32) -> f32 {
        // SAFETY: the caller upholds all that is needed.
        unsafe {
            let steps = Steps::new(largest_bits(x), precision);
            match precision {
                Precision::Medium => quantize::<1>(x, steps, planes, sums),
                Precision::High => quantize::<2>(x, steps, planes, sums),
                Precision::Highest => quantize::<3>(x, steps, planes, sums),
            }
            steps.scale
        }
    }

    #[target_feature(
        enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni"
    )]
    unsafe fn run_quantize(product: &Product<'_, Self>, tokens: Range<usize>) {
        // SAFETY: the caller upholds all that is needed.
        unsafe { schedule::quantize(product, tokens) }
    }

    #[target_feature(
        enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni"
    )]
    unsafe fn run_multiply(
        product: &Product<'_, Self>,
        strips: Range<usize>,
        tokens: Range<usize>,
        workspace: &mut Workspace<Self>,
    ) {
        // SAFETY: the caller upholds all that is needed.
        unsafe {
            if gemv::suits(product, tokens.len()) {
                gemv::multiply(product, strips, tokens, &decode::avx512::curve(FLIP));
            } else {
                panel::multiply(product, strips, tokens, workspace);
            }
        }
    }

    #[inline(always)]
    unsafe fn decode(
        trajectory: Trajectory,
        strip: &[u8],
        first: usize,
        blocks: usize,
        packed: *mut i8,
    ) {
        // SAFETY: the caller says that the blocks are writable and the CPU has the instruction set.
        unsafe {
            let out = std::slice::from_raw_parts_mut(packed, blocks * DECODED_BLOCK);
            decode::avx512::blocks(trajectory, FLIP, strip, first, out);
        }
    }

    #[inline(always)]
    unsafe fn weights(packed: *const i8) -> __m512i {
        // SAFETY: the caller says that the quad is readable.
        unsafe { _mm512_loadu_si512(packed.cast()) }
    }

    #[inline(always)]
    unsafe fn activations(plane: *const i8) -> __m512i {
        // SAFETY: the caller says that the quad is readable.
        unsafe { _mm512_set1_epi32(plane.cast::<i32>().read_unaligned()) }
    }

    #[inline(always)]
    unsafe fn dot(sum: __m512i, weights: __m512i, x: __m512i) -> __m512i {
        // SAFETY: the caller says that the CPU has the instruction set.
        unsafe { _mm512_dpbusd_epi32(sum, weights, x) }
    }

    #[inline(always)]
    unsafe fn start<const PLANES: usize>(sums: *const i32) -> [__m512i; PLANES] {
        // SAFETY: the caller says that the sums are readable, and the CPU has the instruction set.
        unsafe {
            let mut start = [_mm512_setzero_si512(); PLANES];
            match PLANES {
                1 => start[0] = _mm512_set1_epi32(*sums),
                _ => start[1] = _mm512_set1_epi32(*sums),
            }
            if PLANES == 3 {
                start[2] = _mm512_set1_epi32(*sums.add(1));
            }
            start
        }
    }

    #[inline(always)]
    unsafe fn combine<const PLANES: usize>(sums: [__m512i; PLANES]) -> __m512 {
        // SAFETY: the caller says that the CPU has the instruction set.
        unsafe {
            if PLANES == 1 {
                return _mm512_cvtepi32_ps(sums[0]);
            }
            let upper = _mm512_add_epi32(_mm512_slli_epi32::<8>(sums[0]), sums[1]);
            let upper = _mm512_cvtepi32_ps(upper);
            if PLANES == 2 {
                return upper;
            }
            _mm512_fmadd_ps(upper, _mm512_set1_ps(256.0), _mm512_cvtepi32_ps(sums[2]))
        }
    }

    #[inline(always)]
    unsafe fn group_scales(exponents: &[u8; EXPONENTS]) -> __m512 {
        let bytes = u64::from_le_bytes(*exponents);
        let nibbles = 0x0f0f_0f0f_0f0f_0f0f;
        // SAFETY: the table has 16 floats; the caller says that the CPU has the instruction set.
        unsafe {
            let table = _mm512_loadu_ps(GROUP_SCALE.as_ptr());
            let rows = _mm_set_epi64x((bytes >> 4 & nibbles) as i64, (bytes & nibbles) as i64);
            _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(rows), table)
        }
    }

    #[inline(always)]
    unsafe fn emit(values: __m512, rows: usize, dtype: Dtype, to: *mut u8) {
        // SAFETY: the caller says that `rows` elements are writable.
        unsafe {
            let mask = ((1u32 << rows) - 1) as u16;
            match dtype {
                Dtype::F32 => _mm512_mask_storeu_ps(to.cast(), mask, values),
                Dtype::F16 => {
                    let halves = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(values);
                    _mm256_mask_storeu_epi16(to.cast(), mask, halves);
                }
                Dtype::BF16 => {
                    let bits = _mm512_castps_si512(values);
                    let upper = _mm512_srli_epi32::<16>(bits);
                    let even = _mm512_and_si512(upper, _mm512_set1_epi32(1));
                    let half = _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff));
                    let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, half));
                    // Rounding could carry a NaN into infinity: truncate it and keep it quiet.
                    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(values, values);
                    let quiet = _mm512_or_si512(upper, _mm512_set1_epi32(0x40));
                    let bits = _mm512_mask_mov_epi32(rounded, nan, quiet);
                    _mm256_mask_storeu_epi16(to.cast(), mask, _mm512_cvtepi32_epi16(bits));
                }
                Dtype::F64 => unreachable!("outputs have no f64"),
            }
        }
    }
}
