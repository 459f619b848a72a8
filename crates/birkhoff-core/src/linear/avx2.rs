//! The operator with AVX2: `vpmaddwd` multiplies weights and activations of 16 bits, so that no sum
//! can saturate.
//!
//! A vector holds 8 rows; each quad of a strip is two pairs of columns of two vectors.

use std::arch::x86_64::*;
use std::ops::Range;

use super::kernel::Kernel;
use super::panel;
use super::schedule::{self, Product, Workspace};
use super::{Precision, activations, operand};
use crate::codec::Trajectory;
use crate::codec::scale::GROUP_SCALE;
use crate::decode;
use crate::decode::generic::QUADS;
use crate::dtype::Dtype;
use crate::floats::Floats;
use crate::layout::{self, DECODED_BLOCK, EXPONENTS, STRIP};

/// AVX2 with FMA and F16C: [`crate::isa::Isa::Avx2`].
pub(super) struct Avx2;

/// For each pair of columns of a quad, the shuffle that puts the bytes of four rows into the high
/// bytes of words.
const PAIRS: [[u8; 16]; 2] = {
    const ZERO: u8 = 0x80;
    let mut pairs = [[ZERO; 16]; 2];
    let mut word = 0;
    while word < 8 {
        let (row, col) = (word / 2, word % 2);
        pairs[0][2 * word + 1] = (4 * row + col) as u8;
        pairs[1][2 * word + 1] = (4 * row + col + 2) as u8;
        word += 1;
    }
    pairs
};

impl Kernel for Avx2 {
    type Element = i16;
    type Packed = i16;
    /// `[pair of columns][half of the rows]`.
    type Weights = [[__m256i; 2]; 2];
    type Activations = [__m256i; 2];
    type Int = [__m256i; 2];
    type Float = [__m256; 2];

    const STRIPS: usize = 1;

    fn planes(precision: Precision) -> usize {
        if precision == Precision::Highest { 2 } else { 1 }
    }

    fn tile_tokens(planes: usize) -> usize {
        4 / planes
    }

    #[inline(always)]
    unsafe fn quantize(x: &[f32], precision: Precision, planes: *mut i16, _sums: *mut i32) -> f32 {
        // SAFETY: the caller says that the planes are writable.
        unsafe { activations::quantize_i16(x, precision, planes) }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn run_quantize(product: &Product<'_, Self>, tokens: Range<usize>) {
        // SAFETY: the caller upholds all that is needed.
        unsafe { schedule::quantize(product, tokens) }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn run_multiply(
        product: &Product<'_, Self>,
        strips: Range<usize>,
        tokens: Range<usize>,
        workspace: &mut Workspace<Self>,
    ) {
        // SAFETY: the caller upholds all that is needed.
        unsafe { panel::multiply(product, strips, tokens, workspace) }
    }

    #[inline(always)]
    unsafe fn decode(
        trajectory: Trajectory,
        strip: &[u8],
        first: usize,
        blocks: usize,
        packed: *mut i16,
    ) {
        let mut values = [0i8; DECODED_BLOCK];
        for block in 0..blocks {
            // SAFETY: the caller says that the CPU has the instruction set, that the strip holds
            // the blocks and that `packed` takes them, 512 values each.
            unsafe {
                decode::avx2::blocks(trajectory, strip, first + block, &mut values);
                let to = packed.add(block * DECODED_BLOCK);
                for quad in 0..QUADS {
                    for half in 0..2 {
                        let from = values.as_ptr().add(quad * 4 * STRIP + half * 2 * STRIP);
                        let bytes = _mm256_loadu_si256(from.cast());
                        for (pair, places) in PAIRS.iter().enumerate() {
                            let places = _mm256_broadcastsi128_si256(_mm_loadu_si128(
                                places.as_ptr().cast(),
                            ));
                            // The shift brings the bytes down with their sign.
                            let words = _mm256_srai_epi16::<8>(_mm256_shuffle_epi8(bytes, places));
                            let to = to.add(quad * 4 * STRIP + (2 * pair + half) * STRIP);
                            _mm256_storeu_si256(to.cast(), words);
                        }
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn weights(packed: *const i16) -> Self::Weights {
        // SAFETY: the caller says that the quad is readable.
        let load = |index: usize| unsafe { _mm256_loadu_si256(packed.add(16 * index).cast()) };
        [[load(0), load(1)], [load(2), load(3)]]
    }

    #[inline(always)]
    unsafe fn activations(plane: *const i16) -> Self::Activations {
        // SAFETY: the caller says that the quad is readable.
        let pair = |index: usize| unsafe {
            _mm256_set1_epi32(plane.add(2 * index).cast::<i32>().read_unaligned())
        };
        [pair(0), pair(1)]
    }

    #[inline(always)]
    unsafe fn dot(sum: Self::Int, weights: Self::Weights, x: Self::Activations) -> Self::Int {
        // SAFETY: the caller says that the CPU has the instruction set.
        unsafe {
            let mut sum = sum;
            for half in 0..2 {
                for pair in 0..2 {
                    let products = _mm256_madd_epi16(weights[pair][half], x[pair]);
                    sum[half] = _mm256_add_epi32(sum[half], products);
                }
            }
            sum
        }
    }

    #[inline(always)]
    unsafe fn start<const PLANES: usize>(_sums: *const i32) -> [Self::Int; PLANES] {
        // SAFETY: the caller says that the CPU has the instruction set.
        [[unsafe { _mm256_setzero_si256() }; 2]; PLANES]
    }

    #[inline(always)]
    unsafe fn combine<const PLANES: usize>(sums: [Self::Int; PLANES]) -> Self::Float {
        // SAFETY: the caller says that the CPU has the instruction set.
        unsafe {
            let upper = [_mm256_cvtepi32_ps(sums[0][0]), _mm256_cvtepi32_ps(sums[0][1])];
            if PLANES == 1 {
                return upper;
            }
            let lower = [_mm256_cvtepi32_ps(sums[1][0]), _mm256_cvtepi32_ps(sums[1][1])];
            Self::Float::mul_add(upper, Self::Float::splat(256.0), lower)
        }
    }

    #[inline(always)]
    unsafe fn group_scales(exponents: &[u8; EXPONENTS]) -> Self::Float {
        let scales: [f32; STRIP] = std::array::from_fn(|row| {
            GROUP_SCALE[usize::from(layout::group_exponent(exponents, row))]
        });
        // SAFETY: 16 floats are readable.
        unsafe { Self::Float::load(scales.as_ptr()) }
    }

    #[inline(always)]
    unsafe fn emit(values: Self::Float, rows: usize, dtype: Dtype, to: *mut u8) {
        let mut row = [0.0; STRIP];
        // SAFETY: the caller says that the elements are writable.
        unsafe {
            Self::Float::store(values, row.as_mut_ptr());
            operand::write(&row[..rows], dtype, to);
        }
    }
}
