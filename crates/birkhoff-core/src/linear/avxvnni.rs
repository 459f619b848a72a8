//! The operator with VNNI on 256 bits: `vpdpbusd` as in [`super::avx512`], half a strip at a time,
//! and all else as in [`super::avx2`].
//!
//! The instruction has two encodings, that of AVX-VNNI and that of AVX-512 VL; they compute the same.

use std::arch::x86_64::*;
use std::marker::PhantomData;
use std::ops::Range;

use super::activations;
use super::avx2::Avx2;
use super::kernel::Kernel;
use super::operand::{Input, Output};
use super::panel;
use super::schedule::{self, Product, Workspace};
use super::{LinearOptions, Precision};
use crate::codec::Trajectory;
use crate::decode;
use crate::dtype::Dtype;
use crate::layout::{DECODED_BLOCK, EXPONENTS};
use crate::matrix::MatrixView;

/// An encoding of `vpdpbusd`. The functions may only be called where the CPU has it, and AVX2.
trait Encoding: Sized + 'static {
    /// `sum + weights . x`, unsigned times signed bytes, by fours.
    ///
    /// # Safety
    /// See [`Encoding`].
    unsafe fn dpbusd(sum: __m256i, weights: __m256i, x: __m256i) -> __m256i;

    /// [`Kernel::run_quantize`].
    ///
    /// # Safety
    /// See [`Encoding`] and there.
    unsafe fn run_quantize(product: &Product<'_, AvxVnni<Self>>, tokens: Range<usize>);

    /// [`Kernel::run_multiply`].
    ///
    /// # Safety
    /// See [`Encoding`] and there.
    unsafe fn run_multiply(
        product: &Product<'_, AvxVnni<Self>>,
        strips: Range<usize>,
        tokens: Range<usize>,
        workspace: &mut Workspace<AvxVnni<Self>>,
    );
}

macro_rules! encoding {
    ($(#[$doc:meta])* $name:ident, $features:literal, $dpbusd:ident) => {
        $(#[$doc])*
        struct $name;

        impl Encoding for $name {
            #[inline(always)]
            unsafe fn dpbusd(sum: __m256i, weights: __m256i, x: __m256i) -> __m256i {
                // SAFETY: the caller says that the CPU has the instruction.
                unsafe { $dpbusd(sum, weights, x) }
            }

            #[target_feature(enable = $features)]
            unsafe fn run_quantize(product: &Product<'_, AvxVnni<Self>>, tokens: Range<usize>) {
                // SAFETY: the caller upholds all that is needed.
                unsafe { schedule::quantize(product, tokens) }
            }

            #[target_feature(enable = $features)]
            unsafe fn run_multiply(
                product: &Product<'_, AvxVnni<Self>>,
                strips: Range<usize>,
                tokens: Range<usize>,
                workspace: &mut Workspace<AvxVnni<Self>>,
            ) {
                // SAFETY: the caller upholds all that is needed.
                unsafe { panel::multiply(product, strips, tokens, workspace) }
            }
        }
    };
}

encoding!(
    /// AVX-VNNI.
    Vex,
    "avx2,fma,f16c,avxvnni",
    _mm256_dpbusd_avx_epi32
);
encoding!(
    /// AVX-512 VL and VNNI.
    Evex,
    "avx2,fma,f16c,avx512f,avx512vl,avx512vnni",
    _mm256_dpbusd_epi32
);

/// [`schedule::run`] with the encoding that this CPU has: [`crate::isa::Isa::AvxVnni`] must be
/// available.
pub(super) fn run(
    matrix: MatrixView<'_>,
    input: &Input<'_>,
    bias: Option<&[f32]>,
    output: &mut Output<'_>,
    options: &LinearOptions,
) {
    if is_x86_feature_detected!("avxvnni") {
        schedule::run::<AvxVnni<Vex>>(matrix, input, bias, output, options);
    } else {
        schedule::run::<AvxVnni<Evex>>(matrix, input, bias, output, options);
    }
}

/// AVX2 with an encoding of VNNI: [`crate::isa::Isa::AvxVnni`].
struct AvxVnni<E>(PhantomData<E>);

impl<E: Encoding> Kernel for AvxVnni<E> {
    type Element = i8;
    type Packed = i8;
    /// Each of half of the rows.
    type Weights = [__m256i; 2];
    type Activations = __m256i;
    type Int = [__m256i; 2];
    type Float = <Avx2 as Kernel>::Float;

    const STRIPS: usize = 1;

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
            2 => 3,
            _ => 2,
        }
    }

    #[inline(always)]
    unsafe fn quantize(x: &[f32], precision: Precision, planes: *mut i8, sums: *mut i32) -> f32 {
        // SAFETY: the caller upholds all that is needed.
        unsafe {
            match precision {
                Precision::Medium => activations::quantize_i8::<1>(x, precision, planes, sums),
                Precision::High => activations::quantize_i8::<2>(x, precision, planes, sums),
                Precision::Highest => activations::quantize_i8::<3>(x, precision, planes, sums),
            }
        }
    }

    unsafe fn run_quantize(product: &Product<'_, Self>, tokens: Range<usize>) {
        // SAFETY: the caller upholds all that is needed.
        unsafe { E::run_quantize(product, tokens) }
    }

    unsafe fn run_multiply(
        product: &Product<'_, Self>,
        strips: Range<usize>,
        tokens: Range<usize>,
        workspace: &mut Workspace<Self>,
    ) {
        // SAFETY: the caller upholds all that is needed.
        unsafe { E::run_multiply(product, strips, tokens, workspace) }
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
            decode::avx2::blocks(trajectory, strip, first, out);
            let flip = _mm256_set1_epi8(i8::MIN);
            for values in out.chunks_exact_mut(32) {
                let values = values.as_mut_ptr().cast();
                _mm256_storeu_si256(values, _mm256_xor_si256(_mm256_loadu_si256(values), flip));
            }
        }
    }

    #[inline(always)]
    unsafe fn weights(packed: *const i8) -> Self::Weights {
        // SAFETY: the caller says that the quad is readable.
        unsafe { [_mm256_loadu_si256(packed.cast()), _mm256_loadu_si256(packed.add(32).cast())] }
    }

    #[inline(always)]
    unsafe fn activations(plane: *const i8) -> Self::Activations {
        // SAFETY: the caller says that the quad is readable.
        unsafe { _mm256_set1_epi32(plane.cast::<i32>().read_unaligned()) }
    }

    #[inline(always)]
    unsafe fn dot(sum: Self::Int, weights: Self::Weights, x: Self::Activations) -> Self::Int {
        // SAFETY: the caller says that the CPU has the instruction set.
        unsafe { [E::dpbusd(sum[0], weights[0], x), E::dpbusd(sum[1], weights[1], x)] }
    }

    #[inline(always)]
    unsafe fn start<const PLANES: usize>(sums: *const i32) -> [Self::Int; PLANES] {
        // SAFETY: the caller says that the sums are readable, and the CPU has the instruction set.
        unsafe {
            let mut start = [[_mm256_setzero_si256(); 2]; PLANES];
            // The sum is of the integers above the lowest of three digits: of the second plane.
            start[PLANES.min(2) - 1] = [_mm256_set1_epi32(*sums); 2];
            if PLANES == 3 {
                start[2] = [_mm256_set1_epi32(*sums.add(1)); 2];
            }
            start
        }
    }

    #[inline(always)]
    unsafe fn combine<const PLANES: usize>(sums: [Self::Int; PLANES]) -> Self::Float {
        // SAFETY: the caller says that the CPU has the instruction set.
        unsafe {
            let mut upper = sums[0];
            if PLANES > 1 {
                for half in 0..2 {
                    let high = _mm256_slli_epi32::<8>(upper[half]);
                    upper[half] = _mm256_add_epi32(high, sums[1][half]);
                }
            }
            match PLANES {
                3 => Avx2::combine([upper, sums[2]]),
                _ => Avx2::combine([upper]),
            }
        }
    }

    #[inline(always)]
    unsafe fn group_scales(exponents: &[u8; EXPONENTS]) -> Self::Float {
        // SAFETY: the caller upholds all that is needed.
        unsafe { Avx2::group_scales(exponents) }
    }

    #[inline(always)]
    unsafe fn emit(values: Self::Float, rows: usize, dtype: Dtype, to: *mut u8) {
        // SAFETY: the caller upholds all that is needed.
        unsafe { Avx2::emit(values, rows, dtype, to) }
    }
}
