//! What attention asks of an instruction set.

use super::schedule::{Call, Task, Workspace};

/// Floats of a vector: one for each of as many queries.
pub(super) const LANES: usize = 16;

/// Vectors of 16 floats.
///
/// The functions are unsafe since they may only be called where the CPU has the instruction set;
/// what else they require is that pointers are good for what is read or written. Results are the same
/// on every instruction set, but for the payloads of NaN.
pub(super) trait Kernel: Sized + 'static {
    /// 16 values of f32.
    type Float: Copy;

    /// Rows (keys, channels) of a tile of sums that stay in registers.
    const ROWS: usize;
    /// Most vectors of a tile, 1 to 3.
    const VECTORS: usize;

    /// [`super::tile::attend`] with the instruction set enabled.
    ///
    /// # Safety
    /// See [`super::tile::attend`].
    unsafe fn run_attend(call: &Call<'_>, task: &Task, workspace: &Workspace);

    /// Reads 16 floats.
    ///
    /// # Safety
    /// See [`Kernel`].
    unsafe fn load(from: *const f32) -> Self::Float;

    /// Writes 16 floats.
    ///
    /// # Safety
    /// See [`Kernel`].
    unsafe fn store(values: Self::Float, to: *mut f32);

    /// 16 times the same.
    ///
    /// # Safety
    /// See [`Kernel`].
    unsafe fn splat(value: f32) -> Self::Float;

    /// `a + b`.
    ///
    /// # Safety
    /// See [`Kernel`].
    unsafe fn add(a: Self::Float, b: Self::Float) -> Self::Float;

    /// `a - b`.
    ///
    /// # Safety
    /// See [`Kernel`].
    unsafe fn sub(a: Self::Float, b: Self::Float) -> Self::Float;

    /// `a * b`.
    ///
    /// # Safety
    /// See [`Kernel`].
    unsafe fn mul(a: Self::Float, b: Self::Float) -> Self::Float;

    /// `a / b`.
    ///
    /// # Safety
    /// See [`Kernel`].
    unsafe fn div(a: Self::Float, b: Self::Float) -> Self::Float;

    /// `a * b + c`, rounded once.
    ///
    /// # Safety
    /// See [`Kernel`].
    unsafe fn mul_add(a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float;

    /// The larger of both; where one is NaN, either of them.
    ///
    /// # Safety
    /// See [`Kernel`].
    unsafe fn max(a: Self::Float, b: Self::Float) -> Self::Float;

    /// The nearest whole number, ties to even.
    ///
    /// # Safety
    /// See [`Kernel`].
    unsafe fn round(a: Self::Float) -> Self::Float;

    /// `a * 2^n` for whole n from -126 to 0; 0 for smaller n, whatever a is; NaN where both are.
    ///
    /// # Safety
    /// See [`Kernel`].
    unsafe fn scale_by_exp2(a: Self::Float, n: Self::Float) -> Self::Float;
}
