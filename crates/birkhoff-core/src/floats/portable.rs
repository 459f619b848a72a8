//! Vectors in plain Rust.

use super::{Floats, LANES};

impl Floats for [f32; LANES] {
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller says that 16 floats are readable.
        unsafe { from.cast::<Self>().read() }
    }

    #[inline(always)]
    unsafe fn store(values: Self, to: *mut f32) {
        // SAFETY: the caller says that 16 floats are writable.
        unsafe { to.cast::<Self>().write(values) }
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        [value; LANES]
    }

    #[inline(always)]
    unsafe fn add(a: Self, b: Self) -> Self {
        std::array::from_fn(|lane| a[lane] + b[lane])
    }

    #[inline(always)]
    unsafe fn sub(a: Self, b: Self) -> Self {
        std::array::from_fn(|lane| a[lane] - b[lane])
    }

    #[inline(always)]
    unsafe fn mul(a: Self, b: Self) -> Self {
        std::array::from_fn(|lane| a[lane] * b[lane])
    }

    #[inline(always)]
    unsafe fn div(a: Self, b: Self) -> Self {
        std::array::from_fn(|lane| a[lane] / b[lane])
    }

    #[inline(always)]
    unsafe fn mul_add(a: Self, b: Self, c: Self) -> Self {
        std::array::from_fn(|lane| a[lane].mul_add(b[lane], c[lane]))
    }

    #[inline(always)]
    unsafe fn max(a: Self, b: Self) -> Self {
        std::array::from_fn(|lane| if a[lane] > b[lane] { a[lane] } else { b[lane] })
    }

    #[inline(always)]
    unsafe fn round(a: Self) -> Self {
        a.map(f32::round_ties_even)
    }

    #[inline(always)]
    unsafe fn scale_by_exp2(a: Self, n: Self) -> Self {
        std::array::from_fn(|lane| {
            let power = f32::from_bits(((n[lane] as i32 + 127) as u32) << 23);
            if n[lane] < -126.0 { 0.0 } else { a[lane] * power }
        })
    }
}
