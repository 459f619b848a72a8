//! Sixteen lanes in plain Rust.

use super::Lanes;

/// Sixteen lanes of u16.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub(crate) struct Portable([u16; 16]);

impl Portable {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(u16, u16) -> u16) -> Self {
        Portable(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }
}

impl Lanes for Portable {
    const N: usize = 16;

    #[inline(always)]
    unsafe fn load(from: *const u16) -> Self {
        // SAFETY: the caller guarantees that 16 values can be read.
        Portable(unsafe { from.cast::<[u16; 16]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u16) {
        // SAFETY: the caller guarantees that 16 values can be written.
        unsafe { to.cast::<[u16; 16]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn splat(value: u16) -> Self {
        Portable([value; 16])
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        self.zip(other, u16::wrapping_add)
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        self.zip(other, u16::wrapping_sub)
    }

    #[inline(always)]
    unsafe fn saturating_add(self, other: Self) -> Self {
        self.zip(other, u16::saturating_add)
    }

    #[inline(always)]
    unsafe fn saturating_sub(self, other: Self) -> Self {
        self.zip(other, u16::saturating_sub)
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        self.zip(other, u16::wrapping_mul)
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        self.zip(other, Ord::min)
    }

    #[inline(always)]
    unsafe fn or(self, other: Self) -> Self {
        self.zip(other, |a, b| a | b)
    }

    #[inline(always)]
    unsafe fn and(self, other: Self) -> Self {
        self.zip(other, |a, b| a & b)
    }

    #[inline(always)]
    unsafe fn signed_distance(self, other: Self) -> Self {
        self.zip(other, |a, b| (a as i16).wrapping_sub(b as i16).unsigned_abs())
    }

    #[inline(always)]
    unsafe fn shl<const BITS: u32>(self) -> Self {
        Portable(self.0.map(|lane| lane << BITS))
    }

    #[inline(always)]
    unsafe fn interleave(self, other: Self) -> (Self, Self) {
        let lane = |i: usize| if i.is_multiple_of(2) { self.0[i / 2] } else { other.0[i / 2] };
        (Portable(std::array::from_fn(lane)), Portable(std::array::from_fn(|i| lane(i + 16))))
    }

    #[inline(always)]
    unsafe fn reduce_min(self) -> u16 {
        self.0.into_iter().fold(u16::MAX, Ord::min)
    }
}
