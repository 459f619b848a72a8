//! Attention in plain Rust, for every machine.

use super::kernel::{Kernel, LANES};
use super::schedule::{Call, Task, Workspace};
use super::tile;

/// Plain Rust; needs nothing of the CPU.
pub(super) struct Portable;

impl Kernel for Portable {
    type Float = [f32; LANES];

    const ROWS: usize = 4;
    const VECTORS: usize = 1;

    unsafe fn run_attend(call: &Call<'_>, task: &Task, workspace: &Workspace) {
        // SAFETY: the caller upholds all that is needed.
        unsafe { tile::attend::<Self, { Self::ROWS }>(call, task, workspace) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::Float {
        // SAFETY: the caller says that 16 floats are readable.
        unsafe { from.cast::<Self::Float>().read() }
    }

    #[inline(always)]
    unsafe fn store(values: Self::Float, to: *mut f32) {
        // SAFETY: the caller says that 16 floats are writable.
        unsafe { to.cast::<Self::Float>().write(values) }
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::Float {
        [value; LANES]
    }

    #[inline(always)]
    unsafe fn add(a: Self::Float, b: Self::Float) -> Self::Float {
        std::array::from_fn(|lane| a[lane] + b[lane])
    }

    #[inline(always)]
    unsafe fn sub(a: Self::Float, b: Self::Float) -> Self::Float {
        std::array::from_fn(|lane| a[lane] - b[lane])
    }

    #[inline(always)]
    unsafe fn mul(a: Self::Float, b: Self::Float) -> Self::Float {
        std::array::from_fn(|lane| a[lane] * b[lane])
    }

    #[inline(always)]
    unsafe fn div(a: Self::Float, b: Self::Float) -> Self::Float {
        std::array::from_fn(|lane| a[lane] / b[lane])
    }

    #[inline(always)]
    unsafe fn mul_add(a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float {
        std::array::from_fn(|lane| a[lane].mul_add(b[lane], c[lane]))
    }

    #[inline(always)]
    unsafe fn max(a: Self::Float, b: Self::Float) -> Self::Float {
        std::array::from_fn(|lane| if a[lane] > b[lane] { a[lane] } else { b[lane] })
    }

    #[inline(always)]
    unsafe fn round(a: Self::Float) -> Self::Float {
        a.map(f32::round_ties_even)
    }

    #[inline(always)]
    unsafe fn scale_by_exp2(a: Self::Float, n: Self::Float) -> Self::Float {
        std::array::from_fn(|lane| {
            let power = f32::from_bits(((n[lane] as i32 + 127) as u32) << 23);
            if n[lane] < -126.0 { 0.0 } else { a[lane] * power }
        })
    }
}
