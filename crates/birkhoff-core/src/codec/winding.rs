//! The winding line, `theta -> (theta, g theta) mod 2^(2b)`: two weights of `b` bits a theta.
//!
//! This is the trajectory of "Compress Any Segment Anything Model" (arXiv 2507.08765, section 3)
//! with integer steps; the curve and the scales are those of [`super::shift`].

use super::Tap;

/// The generators g for b = 4, 5, 6.
pub const GENERATORS: [u16; 3] = [157, 741, 1701];

/// The generator at `bits` a weight.
pub const fn generator(bits: u32) -> u16 {
    GENERATORS[bits as usize - 4]
}

/// How weight `index` of a block of a stream is read.
pub(super) const fn tap(bits: u32, index: u32) -> Tap {
    let coordinate = if index % 2 == 0 { 1 } else { generator(bits) };
    Tap { end: (index / 2 + 1) * 2 * bits, multiplier: coordinate << (16 - 2 * bits) }
}
