//! What the operator asks of an instruction set.

use std::ops::Range;

use super::Precision;
use super::schedule::{Product, Workspace};
use crate::codec::Trajectory;
use crate::dtype::Dtype;
use crate::floats::Floats;
use crate::layout::EXPONENTS;

/// Vectors of one value for each of the 16 rows of a strip, and the products of integers.
///
/// The functions are unsafe since they may only be called where the CPU has the instruction set;
/// what else they require is that pointers are good for what is read or written.
pub(super) trait Kernel: Sized + 'static {
    /// An element of a plane of activations.
    type Element: Copy;
    /// An element of a decoded block as [`Kernel::weights`] takes it.
    type Packed: Copy;
    /// Four columns (a quad) of the weights of 16 rows.
    type Weights: Copy;
    /// Four columns of one token, for each row.
    type Activations: Copy;
    /// 16 values of i32.
    type Int: Copy;
    /// 16 values of f32.
    type Float: Floats;

    /// Most strips of a panel, 1 to 3.
    const STRIPS: usize;

    /// Planes of activations at a precision.
    fn planes(precision: Precision) -> usize;

    /// Most tokens of a tile (1 to 4), by the number of planes.
    fn tile_tokens(planes: usize) -> usize;

    /// Quantises a token, see [`super::activations`]; returns its scale. `sums` gets whatever
    /// [`Kernel::start`] wants to know of each group, two values a group.
    ///
    /// # Safety
    /// See [`Kernel`].
    unsafe fn quantize(
        x: &[f32],
        precision: Precision,
        planes: *mut Self::Element,
        sums: *mut i32,
    ) -> f32;

    /// [`super::schedule::quantize`] with the instruction set enabled.
    ///
    /// # Safety
    /// See [`super::schedule::quantize`].
    unsafe fn run_quantize(product: &Product<'_, Self>, tokens: Range<usize>);

    /// Multiplies strips with tokens: [`super::panel::multiply`], or another way to the same
    /// result, with the instruction set enabled.
    ///
    /// # Safety
    /// See [`super::panel::multiply`].
    unsafe fn run_multiply(
        product: &Product<'_, Self>,
        strips: Range<usize>,
        tokens: Range<usize>,
        workspace: &mut Workspace<Self>,
    );

    /// Decodes blocks `first..first + blocks` of a strip.
    ///
    /// # Safety
    /// See [`Kernel`]; the strip must hold those blocks.
    unsafe fn decode(
        trajectory: Trajectory,
        strip: &[u8],
        first: usize,
        blocks: usize,
        packed: *mut Self::Packed,
    );

    /// Reads a quad of a strip.
    ///
    /// # Safety
    /// See [`Kernel`].
    unsafe fn weights(packed: *const Self::Packed) -> Self::Weights;

    /// Reads a quad of a plane of a token.
    ///
    /// # Safety
    /// See [`Kernel`].
    unsafe fn activations(plane: *const Self::Element) -> Self::Activations;

    /// `sum + weights . activations`.
    ///
    /// # Safety
    /// See [`Kernel`].
    unsafe fn dot(sum: Self::Int, weights: Self::Weights, x: Self::Activations) -> Self::Int;

    /// Sums of a group before any product.
    ///
    /// # Safety
    /// See [`Kernel`].
    unsafe fn start<const PLANES: usize>(sums: *const i32) -> [Self::Int; PLANES];

    /// The product of a group from the sums of its planes: `f32(v . w)`, or at highest precision
    /// `fma(f32(h . w), 256, f32(l . w))`. The integers are exact.
    ///
    /// # Safety
    /// See [`Kernel`].
    unsafe fn combine<const PLANES: usize>(sums: [Self::Int; PLANES]) -> Self::Float;

    /// The scales of a group of 16 rows, looked up in the table.
    ///
    /// # Safety
    /// See [`Kernel`].
    unsafe fn group_scales(exponents: &[u8; EXPONENTS]) -> Self::Float;

    /// Writes the first `rows` values as `dtype`, rounded to nearest even.
    ///
    /// # Safety
    /// See [`Kernel`].
    unsafe fn emit(values: Self::Float, rows: usize, dtype: Dtype, to: *mut u8);
}
