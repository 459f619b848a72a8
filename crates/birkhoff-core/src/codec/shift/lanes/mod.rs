//! The vector that the search is written over: `N` unsigned 16-bit lanes.

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
pub(super) mod portable;

/// `N` lanes of u16, and the handful of operations that the search needs.
///
/// # Safety
/// Every function requires that the CPU has the instruction set of the implementor; the search
/// guarantees it by calling them only inside a function that enables it.
pub(super) trait Lanes: Copy {
    /// Number of lanes.
    const N: usize;

    /// Reads `N` values.
    ///
    /// # Safety
    /// `from` is valid for reads of `N` values, of any alignment; see also the trait.
    unsafe fn load(from: *const u16) -> Self;

    /// Writes `N` values.
    ///
    /// # Safety
    /// `to` is valid for writes of `N` values, of any alignment; see also the trait.
    unsafe fn store(self, to: *mut u16);

    /// # Safety
    /// See the trait.
    unsafe fn splat(value: u16) -> Self;

    /// # Safety
    /// See the trait.
    unsafe fn add(self, other: Self) -> Self;

    /// # Safety
    /// See the trait.
    unsafe fn sub(self, other: Self) -> Self;

    /// # Safety
    /// See the trait.
    unsafe fn saturating_add(self, other: Self) -> Self;

    /// # Safety
    /// See the trait.
    unsafe fn saturating_sub(self, other: Self) -> Self;

    /// The low 16 bits of the products.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn mul(self, other: Self) -> Self;

    /// # Safety
    /// See the trait.
    unsafe fn min(self, other: Self) -> Self;

    /// # Safety
    /// See the trait.
    unsafe fn or(self, other: Self) -> Self;

    /// # Safety
    /// See the trait.
    unsafe fn and(self, other: Self) -> Self;

    /// `|self - other|`, both read as signed and no more than 32767 apart.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn signed_distance(self, other: Self) -> Self;

    /// # Safety
    /// See the trait.
    unsafe fn shl<const BITS: u32>(self) -> Self;

    /// The lanes of `self` and `other` in turn: the first `N`, then the other `N`.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn interleave(self, other: Self) -> (Self, Self);

    /// The smallest lane.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn reduce_min(self) -> u16;
}
