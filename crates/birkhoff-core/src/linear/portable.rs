//! The operator in plain Rust, for every machine: the reference of the other kernels.

use std::ops::Range;

use super::kernel::Kernel;
use super::panel;
use super::schedule::{self, Product, Workspace};
use super::{Precision, activations, operand};
use crate::codec::Trajectory;
use crate::codec::scale::GROUP_SCALE;
use crate::decode;
use crate::dtype::Dtype;
use crate::isa::Isa;
use crate::layout::{self, DECODED_BLOCK, EXPONENTS, STRIP};

/// Plain Rust; needs nothing of the CPU.
pub(super) struct Portable;

impl Kernel for Portable {
    type Element = i16;
    type Packed = i8;
    type Weights = [i8; 4 * STRIP];
    type Activations = [i16; 4];
    type Int = [i32; STRIP];
    type Float = [f32; STRIP];

    const STRIPS: usize = 1;

    fn planes(precision: Precision) -> usize {
        if precision == Precision::Highest { 2 } else { 1 }
    }

    fn tile_tokens(_planes: usize) -> usize {
        1
    }

    #[inline(always)]
    unsafe fn quantize(x: &[f32], precision: Precision, planes: *mut i16, _sums: *mut i32) -> f32 {
        // SAFETY: the caller says that the planes are writable.
        unsafe { activations::quantize_i16(x, precision, planes) }
    }

    unsafe fn run_quantize(product: &Product<'_, Self>, tokens: Range<usize>) {
        // SAFETY: the caller upholds all that is needed.
        unsafe { schedule::quantize(product, tokens) }
    }

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
        packed: *mut i8,
    ) {
        // SAFETY: the caller says that the blocks are writable. The values are read only after
        // they are written.
        let out = unsafe { std::slice::from_raw_parts_mut(packed, blocks * DECODED_BLOCK) };
        decode::blocks(Isa::Portable, trajectory, strip, first, out);
    }

    #[inline(always)]
    unsafe fn weights(packed: *const i8) -> Self::Weights {
        // SAFETY: the caller says that the quad is readable.
        unsafe { packed.cast::<Self::Weights>().read() }
    }

    #[inline(always)]
    unsafe fn activations(plane: *const i16) -> Self::Activations {
        // SAFETY: the caller says that the quad is readable.
        unsafe { plane.cast::<Self::Activations>().read() }
    }

    #[inline(always)]
    unsafe fn dot(sum: Self::Int, weights: Self::Weights, x: Self::Activations) -> Self::Int {
        std::array::from_fn(|row| {
            (0..4).fold(sum[row], |sum, col| {
                sum + i32::from(weights[4 * row + col]) * i32::from(x[col])
            })
        })
    }

    #[inline(always)]
    unsafe fn start<const PLANES: usize>(_sums: *const i32) -> [Self::Int; PLANES] {
        [[0; STRIP]; PLANES]
    }

    #[inline(always)]
    unsafe fn combine<const PLANES: usize>(sums: [Self::Int; PLANES]) -> Self::Float {
        std::array::from_fn(|row| match PLANES {
            1 => sums[0][row] as f32,
            _ => (sums[0][row] as f32).mul_add(256.0, sums[1][row] as f32),
        })
    }

    #[inline(always)]
    unsafe fn group_scales(exponents: &[u8; EXPONENTS]) -> Self::Float {
        std::array::from_fn(|row| GROUP_SCALE[usize::from(layout::group_exponent(exponents, row))])
    }

    #[inline(always)]
    unsafe fn emit(values: Self::Float, rows: usize, dtype: Dtype, to: *mut u8) {
        // SAFETY: the caller says that the elements are writable.
        unsafe { operand::write(&values[..rows], dtype, to) }
    }
}
