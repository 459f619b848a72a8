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

/// Places of digit `digit` (0: lowest byte) of 32 columns in two vectors of i32, in the order of a
/// decoded block: the first half of an index vector for `vpermi2b`.
const fn digits(upper: usize, lower: usize) -> [u8; 64] {
    let mut places = [0; 64];
    let mut index = 0;
    while index < BLOCK {
        places[index] = (4 * activations::column(index) + upper) as u8;
        places[BLOCK + index] = (4 * activations::column(index) + lower) as u8;
        index += 1;
    }
    places
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
        const HIGHEST: [u8; 64] = digits(2, 1);
        const HIGH: [u8; 64] = digits(1, 0);
        // SAFETY: the caller says that the CPU has the instruction set and that planes and sums
        // are writable; masked loads stay within `x`.
        unsafe {
            let load = |start: usize| {
                let mask = match x.len().saturating_sub(start) {
                    0 => return _mm512_setzero_ps(),
                    len @ ..STRIP => (1 << len) - 1,
                    _ => u16::MAX,
                };
                _mm512_maskz_loadu_ps(mask, x.as_ptr().add(start))
            };
            let magnitude = _mm512_set1_epi32(0x7fff_ffff);
            let mut largest = _mm512_setzero_si512();
            for start in (0..x.len()).step_by(STRIP) {
                let bits = _mm512_and_si512(_mm512_castps_si512(load(start)), magnitude);
                largest = _mm512_max_epu32(largest, bits);
            }
            let steps = Steps::new(_mm512_reduce_max_epu32(largest), precision);
            let inverse = _mm512_set1_ps(steps.inverse);
            let number = Self::planes(precision);
            // Adding 128 to every digit makes the bytes of the sum the digits + 128.
            let carry = _mm512_set1_epi32(0x0080_8080);
            let flip = _mm512_set1_epi8(FLIP as i8);
            let places = match precision {
                Precision::Highest => HIGHEST,
                _ => HIGH,
            };
            let places = _mm512_loadu_si512(places.as_ptr().cast());
            let low_places = _mm512_loadu_si512(HIGH.as_ptr().add(BLOCK).cast::<__m256i>().cast());
            for (group, columns) in x.chunks(GROUP).enumerate() {
                let mut sum = _mm512_setzero_si512();
                let mut low_sum = _mm512_setzero_si512();
                for block in 0..columns.len().div_ceil(BLOCK) {
                    let start = group * GROUP + block * BLOCK;
                    let fixed = |start| _mm512_cvtps_epi32(_mm512_mul_ps(load(start), inverse));
                    let values = [fixed(start), fixed(start + STRIP)];
                    let biased = values.map(|value| _mm512_add_epi32(value, carry));
                    for (value, biased) in values.into_iter().zip(biased) {
                        sum = _mm512_add_epi32(sum, value);
                        let low = _mm512_and_si512(biased, _mm512_set1_epi32(255));
                        low_sum = _mm512_add_epi32(low_sum, low);
                    }
                    let digits = |places| {
                        let bytes = _mm512_permutex2var_epi8(biased[0], places, biased[1]);
                        _mm512_xor_si512(bytes, flip)
                    };
                    let plane = |plane: usize| planes.add((start * number) + plane * BLOCK);
                    let first = digits(places);
                    match precision {
                        Precision::Medium => {
                            _mm256_storeu_si256(
                                plane(0).cast(),
                                _mm512_extracti64x4_epi64::<1>(first),
                            );
                        }
                        Precision::High => _mm512_storeu_si512(plane(0).cast(), first),
                        Precision::Highest => {
                            _mm512_storeu_si512(plane(0).cast(), first);
                            let low = digits(low_places);
                            _mm256_storeu_si256(plane(2).cast(), _mm512_castsi512_si256(low));
                        }
                    }
                }
                let sum = _mm512_reduce_add_epi32(sum);
                // Each of the lowest digits is one of its bytes less 128.
                let padded = columns.len().next_multiple_of(BLOCK) as i32;
                let low_sum = _mm512_reduce_add_epi32(low_sum) - 128 * padded;
                let (sum, low_sum) = match precision {
                    Precision::Highest => (sum.wrapping_sub(low_sum) >> 8, low_sum),
                    _ => (sum, 0),
                };
                *sums.add(2 * group) = sum.wrapping_mul(-128);
                *sums.add(2 * group + 1) = low_sum.wrapping_mul(-128);
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
        // SAFETY: the caller says that both sums are readable.
        std::array::from_fn(|plane| unsafe {
            match (PLANES, plane) {
                (1, 0) | (2, 1) | (3, 1) => _mm512_set1_epi32(*sums),
                (3, 2) => _mm512_set1_epi32(*sums.add(1)),
                _ => _mm512_setzero_si512(),
            }
        })
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
    unsafe fn load(from: *const f32) -> __m512 {
        // SAFETY: the caller says that 16 floats are readable.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store(values: __m512, to: *mut f32) {
        // SAFETY: the caller says that 16 floats are writable.
        unsafe { _mm512_storeu_ps(to, values) }
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m512 {
        // SAFETY: the caller says that the CPU has the instruction set.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        // SAFETY: the caller says that the CPU has the instruction set.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: the caller says that the CPU has the instruction set.
        unsafe { _mm512_fmadd_ps(a, b, c) }
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
