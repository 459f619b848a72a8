//! Vectors of 16 floats, that kernels are written in.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

/// Floats of a vector.
pub(crate) const LANES: usize = 16;

/// 16 values of f32.
///
/// The functions are unsafe since they may only be called where the CPU has the instruction set;
/// what else they require is that pointers are good for what is read or written. Results are the same
/// on every instruction set, but for the payloads of NaN.
pub(crate) trait Floats: Copy {
    /// Reads 16 floats.
    ///
    /// # Safety
    /// See [`Floats`].
    unsafe fn load(from: *const f32) -> Self;

    /// Writes 16 floats.
    ///
    /// # Safety
    /// See [`Floats`].
    unsafe fn store(values: Self, to: *mut f32);

    /// 16 times the same.
    ///
    /// # Safety
    /// See [`Floats`].
    unsafe fn splat(value: f32) -> Self;

    /// `a + b`.
    ///
    /// # Safety
    /// See [`Floats`].
    unsafe fn add(a: Self, b: Self) -> Self;

    /// `a - b`.
    ///
    /// # Safety
    /// See [`Floats`].
    unsafe fn sub(a: Self, b: Self) -> Self;

    /// `a * b`.
    ///
    /// # Safety
    /// See [`Floats`].
    unsafe fn mul(a: Self, b: Self) -> Self;

    /// `a / b`.
    ///
    /// # Safety
    /// See [`Floats`].
    unsafe fn div(a: Self, b: Self) -> Self;

    /// `a * b + c`, rounded once.
    ///
    /// # Safety
    /// See [`Floats`].
    unsafe fn mul_add(a: Self, b: Self, c: Self) -> Self;

    /// The larger of both; where one is NaN, either of them.
    ///
    /// # Safety
    /// See [`Floats`].
    unsafe fn max(a: Self, b: Self) -> Self;

    /// The nearest whole number, ties to even.
    ///
    /// # Safety
    /// See [`Floats`].
    unsafe fn round(a: Self) -> Self;

    /// `a * 2^n` for whole n from -126 to 0; 0 for smaller n, whatever a is; NaN where both are.
    ///
    /// # Safety
    /// See [`Floats`].
    unsafe fn scale_by_exp2(a: Self, n: Self) -> Self;
}
